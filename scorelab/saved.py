"""A network, what data it is of, and its files: the base of models."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scorelab.codecs import CODECS, Codec
from scorelab.described import CODEC, NETWORK, part_from_dict, part_to_dict
from scorelab.nn import NETWORKS
from scorelab.typing import Shape, Tensor
from scorelab.writing import save_tensors, whole

__all__ = ["Model", "module_checksum", "unwrapped"]


class _Unfit(ValueError):
    """What a sound file holds is not what can be made of it."""


class Model(nn.Module):
    """Base of models of x (B, *data_shape).

    data_range: the values of the data outside, None if unbounded. codec: by which samples are decoded (``decode``); x
    is codes then. ``precision``, "fp32" or "bf16", is what the network computes in (see scorelab.precision.prepare).
    ``kind`` is what files call the model.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        net: nn.Module,
        *,
        data_shape: Shape,
        data_range: tuple[float, float] | None = None,
        codec: Codec | None = None,
    ) -> None:
        super().__init__()
        self.net, self.data_shape = net, tuple(data_shape)
        self.data_range = None if data_range is None else (float(data_range[0]), float(data_range[1]))
        self.codec = None if codec is None else codec.requires_grad_(False).eval()
        self.precision = "fp32"

    def train(self, mode: bool = True) -> Self:
        """Training mode, but for the codec."""
        super().train(mode)
        if self.codec is not None:
            self.codec.eval()
        return self

    @property
    def outside_shape(self) -> Shape:
        """Of a sample as it is decoded."""
        with torch.no_grad():
            return tuple(self.decode(torch.zeros(1, *self.data_shape, device=self.device)).shape[1:])

    def encode(self, x0: Tensor) -> Tensor:
        """Codes (B, *data_shape) of data, in which scores and densities are: itself, for a model without a codec."""
        return x0 if self.codec is None else self.codec.encode(x0)

    def decode(self, z: Tensor) -> Tensor:
        """The data that codes (B, *data_shape) stand for: themselves, for a model without a codec."""
        return z if self.codec is None else self.codec.decode(z)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype | None:
        """Of what type the weights are, None without any."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), None)

    @property
    def num_classes(self) -> int | None:
        """How many classes the network knows, None if none."""
        found: int | None = getattr(unwrapped(self.net), "num_classes", None)
        return found

    @property
    def null_condition(self) -> Tensor | None:
        """The condition that stands for none, without a dimension for the batch; None if the network knows none."""
        null = getattr(unwrapped(self.net), "null_condition", None)
        return None if null is None else torch.as_tensor(null)

    @property
    def conditional(self) -> bool:
        """Whether the network knows conditions, which its training takes from the data."""
        return self.num_classes is not None or self.null_condition is not None or self.semantic

    @property
    def semantic(self) -> bool:
        """Whether the condition is a code of the sample itself, which the network makes of it."""
        return bool(getattr(unwrapped(self.net), "semantic", False))

    def rehearse(self, x: Tensor) -> None:
        """One evaluation of x, the network called as it is in training."""
        raise NotImplementedError

    def _computed(self, x: Tensor, *others: Tensor, by: str = "") -> Any:
        """What the network returns, or a method of it, in its precision."""
        call = getattr(unwrapped(self.net), by) if by else self.net
        try:
            if self.precision == "bf16":
                with torch.autocast(x.device.type, torch.bfloat16):
                    output = call(x, *others)
            else:
                output = call(x, *others)
        except RuntimeError as error:
            own = next((p.dtype for p in self.parameters()), x.dtype)
            if x.dtype == own or torch.is_autocast_enabled(x.device.type):
                raise
            raise TypeError(
                f"x is {x.dtype}, the network's weights are {own}, and it fails on that ({error}); pass x.to({own}), "
                f"or convert the model with .to({x.dtype})"
            ) from error
        return output

    def to_dict(self) -> dict[str, Any]:
        """All settings but the weights, as JSON can hold them; ValueError for what is one's own and can't be named."""
        return {
            "format": 1,
            "kind": self.kind,
            "net": part_to_dict(unwrapped(self.net), NETWORKS),
            "data_shape": list(self.data_shape),
            "data_range": self.data_range,
            "codec": None if self.codec is None else part_to_dict(self.codec, CODECS),
        }

    def weights(self) -> dict[str, Tensor]:
        """All weights by the names that files have: the network's own, and a codec's as "codec:...".

        The network's are those inside what torch.compile or DataParallel wrap around it.
        """
        found: dict[str, Tensor] = dict(unwrapped(self.net).state_dict())
        for prefix, module in self._beside():
            found |= {prefix + k: v for k, v in module.state_dict().items()}
        return found

    def _beside(self) -> list[tuple[str, nn.Module]]:
        """What has weights beside the network, and what stands before their names."""
        return [] if self.codec is None else [("codec:", self.codec)]

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter by its names in ``weights``, one that is shared by all of its names."""
        yield from unwrapped(self.net).named_parameters(remove_duplicate=False)
        for prefix, module in self._beside():
            for name, parameter in module.named_parameters(remove_duplicate=False):
                if parameter.requires_grad or prefix != "codec:":
                    yield prefix + name, parameter

    def load_weights(self, state: dict[str, Tensor], where: str | Path = "these weights") -> None:
        """Take weights that are named as ``weights`` names them; ValueError, saying what differs, if they don't fit."""
        own = self.weights()
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        differing = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
        if missing or extra or differing:
            raise ValueError(
                f"{where} does not fit this network: {len(missing)} keys missing {missing[:3]}, {len(extra)} not known "
                f"{extra[:3]}, {len(differing)} of another shape {differing[:3]}"
            )
        for prefix, module in self._beside():
            module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        # a network's names have no colon
        unwrapped(self.net).load_state_dict({k: v for k, v in state.items() if ":" not in k})

    def save(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write ``model.json`` and ``model.safetensors`` into the directory ``path``.

        The network is saved without what torch.compile or DataParallel wrap around it, shared weights under each of
        their names. dtype: of the network's numbers in the file, by default their own; torch.float16 halves it, and
        ``load`` gives what is left in single precision. Raises ValueError for a process, prediction or function of
        one's own; RuntimeWarning for a network that ``load`` will need.
        """
        folder, described = Path(path), self.to_dict()
        if described["net"] is None:
            warnings.warn(
                f"the file can't say how {type(unwrapped(self.net)).__name__} is made, a network without an attribute "
                f"config that holds its arguments; pass it again: {type(self).__name__}.load(path, net=...)",
                RuntimeWarning,
                stacklevel=2,
            )
        settings, state = json.dumps(described, indent=1), self.weights()
        folder.mkdir(parents=True, exist_ok=True)
        with whole(folder / "model.safetensors") as aside:
            save_tensors({k: v.to(dtype) if dtype and _halved(k, v) else v for k, v in state.items()}, aside)
        with whole(folder / "model.json") as aside:
            aside.write_text(settings + "\n")

    @classmethod
    def load(cls, path: str | Path, net: nn.Module | None = None, *, weights: str = "") -> Self:
        """The model saved in ``path``, in evaluation mode; a network of one's own is passed as ``net``.

        Of the directory of a run it is that of the last checkpoint, with averaged weights. ``weights``: the name of a
        file, by default "ema.safetensors" of a run and "model.safetensors" else. Raises ValueError for missing files or
        for weights that do not fit, with the differences summarised.
        """
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ValueError(
                f"there is no directory {folder}; expected one written by {cls.__name__}.save, or of a run"
            )
        if (folder / "checkpoints").is_dir() and not (folder / "model.json").is_file():
            saved = sorted(place.parent for place in folder.glob("checkpoints/step_*/model.json"))
            if not saved:
                raise ValueError(f"{folder} is a run without a checkpoint; expected one that was trained")
            folder, weights = saved[-1], weights or "ema.safetensors"
        weights = weights or "model.safetensors"
        for name in ("model.json", weights):
            if not (folder / name).is_file():
                raise ValueError(
                    f"{folder} holds no {name}; expected a directory written by {cls.__name__}.save, or of a run"
                )
        _check_recorded(folder, weights)
        try:
            state = load_file(folder / weights)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / weights} is damaged ({error}): save the model again") from error
        try:
            settings = json.loads((folder / "model.json").read_text())
            if not isinstance(settings, dict):
                raise TypeError(f"it holds {settings!r}")
            if net is None:
                _check_count(settings, state)
            model = cls.from_dict(settings, net)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            said = f"it lacks {error}" if isinstance(error, KeyError) else error
            remedy = "" if isinstance(error, _Unfit) else ": save the model again"
            raise ValueError(f"{folder / 'model.json'} can't be used ({said}){remedy}") from error
        model.load_weights(state, folder / weights)
        return model.eval()

    @classmethod
    def from_dict(cls, settings: dict[str, Any], net: nn.Module | None = None) -> Self:
        """The model with these settings and fresh weights; ValueError for those of another kind of model."""
        if settings.get("format") != 1:
            raise ValueError(f"model settings have format {settings.get('format')!r}; this version reads 1")
        # scores were all there were once
        if (kind := settings.get("kind", "score")) != cls.kind:
            article = "an" if kind[0] in "aeiou" else "a"
            raise _Unfit(
                f"it holds {article} {kind} model and no {cls.kind} model; expected {kind.capitalize()}Model.load"
            )
        if net is None:
            if settings["net"] is None:
                raise _Unfit(
                    "this model has a network of your own, without a config attribute that says how it is made; pass "
                    f"it: {cls.__name__}.load(path, net=...)"
                )
            with torch.random.fork_rng(devices=[]):
                net = _network(settings["net"])
        return cls(net, **cls._arguments(settings))

    @classmethod
    def _arguments(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Those of ``__init__`` but the network."""
        return {
            "data_shape": tuple(settings["data_shape"]),
            "data_range": None if settings["data_range"] is None else tuple(settings["data_range"]),
            "codec": None if settings.get("codec") is None else part_from_dict(settings["codec"], CODEC),
        }


def _check_recorded(folder: Path, name: str) -> None:
    """Refuse (ValueError) a file of a checkpoint that is not as its manifest recorded it."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return
    try:
        wanted = json.loads(manifest.read_text())["files"][name]["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{manifest} is damaged ({error!r}), or does not know {name}: take another step") from error
    if hashlib.sha256((folder / name).read_bytes()).hexdigest() != wanted:
        raise ValueError(f"{folder / name} is damaged (its checksum is not the recorded one): take another step")


def _halved(name: str, value: Tensor) -> bool:
    """Whether it may be of another type in a file: what is trained, not a codec that was, by whose fingerprint it is
    known again."""
    return value.is_floating_point() and not name.startswith("codec:")


def _network(settings: dict[str, Any]) -> nn.Module:
    """The network of ``part_to_dict``."""
    name = str(settings["name"])
    # names were those of classes once
    made: nn.Module = part_from_dict({**settings, "name": name if ":" in name else name.lower()}, NETWORK)
    return made


def _check_count(settings: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Refuse (ValueError) a network of more weights than there are, before memory is taken for it."""
    own = settings.get("net") or {}
    if ":" in str(own.get("name", ":")):
        return
    with torch.device("meta"):
        count = sum(p.numel() for p in _network(own).state_dict().values())
    held = sum(v.numel() for v in state.values())
    if count > held:
        raise ValueError(f"its network has {count:,} numbers, and the file of weights {held:,}")


def module_checksum(module: nn.Module) -> str:
    """SHA-256 of all that a module's state holds, by name, and of its class."""
    content = hashlib.sha256(f"{type(module).__module__}.{type(module).__qualname__}".encode())
    for name, value in sorted(module.state_dict().items()):
        content.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        content.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def unwrapped(net: nn.Module) -> nn.Module:
    """The network inside torch.compile's and DataParallel's wrappers."""
    while True:
        if isinstance(net, (nn.DataParallel, DistributedDataParallel)):
            net = net.module
        elif isinstance(inner := getattr(net, "_orig_mod", None), nn.Module):
            net = inner
        else:
            return net
