"""Networks: a residual MLP for points; U-Nets, RefineNets and a transformer for signals, images and volumes."""

from collections.abc import Callable

from torch import nn

from scorelab.nn.autoencoder import ConvAutoencoder, MLPAutoencoder
from scorelab.nn.classifier import Classifier
from scorelab.nn.diffae import DiffAE
from scorelab.nn.dit import DiT
from scorelab.nn.edm2 import EDM2
from scorelab.nn.mlp import MLP
from scorelab.nn.refinenet import RefineNet
from scorelab.nn.unet import UNet, adm, ddpm, ncsnpp

__all__ = [
    "EDM2",
    "MLP",
    "NETWORKS",
    "Classifier",
    "ConvAutoencoder",
    "DiT",
    "DiffAE",
    "MLPAutoencoder",
    "RefineNet",
    "UNet",
    "adm",
    "ddpm",
    "fitting",
    "ncsnpp",
]


def fitting(
    data_shape: tuple[int, ...],
    *,
    width: int | None = None,
    depth: int | None = None,
    multipliers: tuple[int, ...] | None = None,
    blocks: int | None = None,
    attention: tuple[int, ...] | None = None,
    head: int | None = None,
    dropout: float | None = None,
    embedding: str | None = None,
    num_classes: int | None = None,
    null_class: bool = False,
) -> nn.Module:
    """The network for data of a shape: an MLP for vectors (D,), else a U-Net that goes down to a size of 8 or less.

    What is left open is their own default, for images a width of 32 and one block a resolution. Raises ValueError for a
    setting that this network lacks, naming it.
    """
    given: dict[str, object] = {"width": width, "depth": depth, "multipliers": multipliers, "blocks": blocks}
    given |= {"attention": attention} | {"head": head, "dropout": dropout, "embedding": embedding}
    made, names = (MLP, ("width", "depth")) if len(data_shape) == 1 else (UNet, tuple(k for k in given if k != "depth"))
    known = {k: v for k, v in given.items() if v is not None}
    for key in known:
        # what training adds for labels that are indices
        if key not in names and known[key] != "positional":
            raise ValueError(
                f"model.net.{key} is {known[key]!r}, but data of shape {tuple(data_shape)} gets "
                f"model.net.name={made.__name__.lower()!r}, which has only {', '.join(names)}: leave it out"
            )
    if made is UNet:
        levels = 1
        while max(data_shape[1:]) > 8 * 2 ** (levels - 1):
            levels += 1
        known = {"width": 32, "multipliers": (1, *(2,) * max(1, levels - 1)), "blocks": 1, **known}
    settings = {k: v for k, v in known.items() if k in names}
    return made(tuple(data_shape), num_classes=num_classes, null_class=null_class, **settings)  # type: ignore[arg-type]


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "auto": fitting,
    "mlp": MLP,
    "unet": UNet,
    "ddpm": ddpm,
    "ncsnpp": ncsnpp,
    "adm": adm,
    "edm2": EDM2,
    "dit": DiT,
    "refinenet": RefineNet,
    "classifier": Classifier,
    "autoencoder": ConvAutoencoder,
    "mlp_autoencoder": MLPAutoencoder,
    "diffae": DiffAE,
}
"""Networks by the names that configs and saved models have for them."""
