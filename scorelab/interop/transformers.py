"""The weights of releases' transformers by the names that ``DiT`` has for them."""

from __future__ import annotations

import torch

from scorelab.interop.reading import State
from scorelab.nn.dit import DiT

__all__ = ["from_dit"]

_DIT = {
    "first": "x_embedder.proj",
    "embed.1": "t_embedder.mlp.0",
    "embed.3": "t_embedder.mlp.2",
    "classes": "y_embedder.embedding_table",
    "modulation": "final_layer.adaLN_modulation.1",
    "last": "final_layer.linear",
}
_DIT_BLOCK = {
    "qkv": "attn.qkv",
    "out": "attn.proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
    "modulation": "adaLN_modulation.1",
}


def _in_dit(ours: str) -> str:
    """The release's name of a weight."""
    module, _, kind = ours.rpartition(".")
    if module in _DIT:
        return f"{_DIT[module]}.{kind}"
    _, number, part = module.split(".", 2)
    return f"blocks.{number}.{_DIT_BLOCK[part]}.{kind}"


def from_dit(net: DiT, state: State) -> State:
    """Of DiT's ``DiT``; its fixed ``pos_embed``, which a DiT has by itself, is compared and left out.

    Raises ValueError for weights that are missing, not known or of another shape, saying how many, and for positions
    that are not those of ``net``.
    """
    own = {_in_dit(name): (name, value.shape) for name, value in net.state_dict().items()}
    theirs = {name: value for name, value in state.items() if name != "pos_embed"}
    missing, unknown = [k for k in own if k not in theirs], [k for k in theirs if k not in own]
    differing = [
        f"{k} {tuple(theirs[k].shape)}, not {tuple(shape)}"
        for k, (_, shape) in own.items()
        if k in theirs and theirs[k].shape != shape
    ]
    if missing or unknown or differing:
        raise ValueError(
            f"these weights are of another network: {len(missing)} are missing ({', '.join(missing[:3])}), "
            f"{len(unknown)} are not known ({', '.join(unknown[:3])}), {len(differing)} have another shape "
            f"({'; '.join(differing[:3])}); expected those of a DiT with {_told(net)}"
        )
    positions = state.get("pos_embed")
    # a file in half precision has them rounded
    if positions is not None and (
        positions.shape != net.positions.shape
        or not torch.allclose(positions.to(net.positions), net.positions, rtol=0, atol=1e-2)
    ):
        raise ValueError(
            f"pos_embed {tuple(positions.shape)} is not the embedding of positions {tuple(net.positions.shape)} of a "
            f"DiT with {_told(net)}; expected weights for this data_shape and patch"
        )
    return {name: theirs[k] for k, (name, _) in own.items()}


def _told(net: DiT) -> str:
    return ", ".join(f"{k}={v}" for k, v in net.config.items())
