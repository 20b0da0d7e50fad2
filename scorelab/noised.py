"""A network of noised data and of how much noise is in it: what it is told, what it is made of, and its files.

output = net(input_scale(sigma) x, label(sigma), ...),     x = x0 + sigma eps, unscaled
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scorelab.checks import broadcast, check_sigmas, widened
from scorelab.codecs import CODECS, Codec
from scorelab.described import (
    CODEC,
    NETWORK,
    Function,
    function_from_json,
    function_to_json,
    part_from_dict,
    part_to_dict,
    process_from_dict,
    process_to_dict,
)
from scorelab.nn import NETWORKS
from scorelab.processes import DiscreteVP, Process
from scorelab.tables import Table
from scorelab.typing import Shape, Tensor
from scorelab.writing import save_tensors, whole

__all__ = ["NoisedModel", "unwrapped"]


_LABELS = ("time", "log_sigma", "index")
_ORDERS = ("ascending", "descending")


class _Unfit(ValueError):
    """What a sound file holds is not what can be made of it."""


class NoisedModel(nn.Module):
    """Base of models of x (B, *data_shape), unscaled, at noise levels sigma () or (B,).

    net: called as net(scaled x, label (B,)), with a condition beside them where it takes one.
    input_scale: "process" (alpha) or a callable of sigma. label: "time", "log_sigma", "index" (position among
    ``levels``, by default the process's steps) or a callable of sigma; multiplied by label_scale. index_order:
    "ascending" counts from the least noise (DDPM), "descending" from the most (NCSN). data_range: the values of the
    data outside, None if unbounded. codec: by which samples are decoded (``decode``); x is codes then.
    data_mean: of the data in each channel, (C,), around which samples begin; None for 0.

    A network that takes whole indices only says so by an attribute ``integer_labels = True``; it then gets int64, and a
    level that is none of the grid's to 1e-4 is a ValueError; with ``num_levels``, so is a grid of another number.
    ``precision``, "fp32" or "bf16", is what the network computes in (see scorelab.precision.prepare). ``kind`` is what
    files call the model.
    """

    kind: ClassVar[str]
    levels: Tensor | None
    data_mean: Tensor | None

    def __init__(
        self,
        net: nn.Module,
        process: Process,
        *,
        data_shape: Shape,
        data_range: tuple[float, float] | None = None,
        input_scale: str | Function = "process",
        label: str | Function = "time",
        label_scale: float = 1.0,
        index_order: str = "ascending",
        levels: Tensor | None = None,
        codec: Codec | None = None,
        data_mean: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(process, Process):
            raise TypeError(f"process is {type(process).__name__}; expected a scorelab process such as VP()")
        if input_scale != "process" and not callable(input_scale):
            raise ValueError(f"input_scale is {input_scale!r}; expected 'process' or a callable of sigma")
        if label not in _LABELS and not callable(label):
            raise ValueError(f"label is {label!r}; expected one of {_LABELS} or a callable of sigma")
        if index_order not in _ORDERS:
            raise ValueError(f"index_order is {index_order!r}; expected one of {_ORDERS}")
        if label == "index":
            if levels is None and isinstance(process, DiscreteVP):
                levels = process.step_sigmas.flip(0)
            if levels is None:
                raise ValueError("label='index' needs the noise levels it counts; pass levels=sigmas.geometric(...)")
        self.net, self.process = net, process
        self.data_shape = tuple(data_shape)
        self.data_range = None if data_range is None else (float(data_range[0]), float(data_range[1]))
        self.input_scale, self.label, self.label_scale = input_scale, label, float(label_scale)
        self.index_order = index_order
        # ascending, as a plain attribute: it stays float64 on the CPU when the model moves or changes precision
        grid = None if levels is None else [s for s in check_sigmas(levels) if s > 0][::-1]
        self.levels = None if grid is None else torch.tensor(grid, dtype=torch.float64)
        self._logs = None if self.levels is None else Table(self.levels.log())
        known = getattr(unwrapped(net), "num_levels", None)
        if label == "index" and known is not None and grid is not None and len(grid) != known:
            raise ValueError(
                f"the network knows {known} noise levels, and the model counts {len(grid)}; expected the same number"
            )
        self.precision = "fp32"
        self.data_mean = None if data_mean is None else torch.tensor(data_mean, dtype=torch.float64)
        if self.data_mean is not None:
            if self.data_mean.shape != self.data_shape[:1]:
                raise ValueError(f"data_mean is {data_mean}; expected a number for each of {data_shape[0]} channels")
            self.data_mean = self.data_mean.reshape(-1, *(1,) * (len(self.data_shape) - 1))
        self.codec = None if codec is None else codec.requires_grad_(False).eval()

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The noise levels that the model knows."""
        return self.process.sigma_range

    def train(self, mode: bool = True) -> Self:
        """Training mode, but for the codec."""
        super().train(mode)
        if self.codec is not None:
            self.codec.eval()
        return self

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
        return self.num_classes is not None or self.null_condition is not None

    def conditioned(self, condition: Any) -> Any:
        """What the model is for a condition, as a function of (x, sigma)."""
        raise NotImplementedError

    def _called(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The noise level in x's dimensions, and what the network returns."""
        level = broadcast(sigma, x).to(widened(x))
        sigma = level.reshape(-1)
        if isinstance(self.input_scale, str):
            scale = self.process.alpha(self.process.time(sigma))
        else:
            scale = self.input_scale(sigma)
        label = self._label(sigma).expand(x.shape[0])
        scaled = (scale.reshape(level.shape) * x).to(x.dtype)
        given = (scaled, label) if condition is None else (scaled, label, condition)
        try:
            if self.precision == "bf16":
                with torch.autocast(x.device.type, torch.bfloat16):
                    output: Tensor = self.net(*given)
            else:
                output = self.net(*given)
        except RuntimeError as error:
            own = next((p.dtype for p in self.parameters()), x.dtype)
            if x.dtype == own or torch.is_autocast_enabled(x.device.type):
                raise
            raise TypeError(
                f"x is {x.dtype}, the network's weights are {own}, and it fails on that ({error}); pass x.to({own}), "
                f"or convert the model with .to({x.dtype})"
            ) from error
        if not isinstance(output, Tensor):
            raise ValueError(
                f"the network returned {type(output).__name__}; expected a tensor: wrap a network that gives more in "
                "one that returns what it predicts"
            )
        return level, output

    def _label(self, sigma: Tensor) -> Tensor:
        if callable(self.label):
            return self.label_scale * self.label(sigma)
        if self.label == "time":
            return self.label_scale * self.process.time(sigma)
        if self.label == "log_sigma":
            return self.label_scale * sigma.log()
        index = self._index(sigma)
        return self.label_scale * index if index.is_floating_point() else index

    def _index(self, sigma: Tensor) -> Tensor:
        assert self._logs is not None
        table = self._logs.like(sigma)
        log = sigma.log()
        last = len(table) - 1
        if last == 0:
            index = torch.zeros_like(sigma)
        else:
            left = self._logs.segment(log)
            index = (left + (log - table.take(left)) / (table.take(left + 1) - table.take(left))).clamp(0, last)
        if self.index_order == "descending":
            index = last - index
        if not getattr(self.net, "integer_labels", False):
            return index
        nearest = index.round()
        near = table[(last - nearest if self.index_order == "descending" else nearest).long()]
        # a graph that is being exported has no values to look at
        if not torch.compiler.is_exporting() and bool(((near - log).abs() > 1e-4).any()):
            raise ValueError(
                f"sigma = {float(sigma[(near - log).abs().argmax()]):g} is none of this model's {last + 1} levels and "
                "its network takes whole indices only: sample at its own levels"
            )
        return nearest.long()

    def to_dict(self) -> dict[str, Any]:
        """All settings but the weights, as JSON can hold them; ValueError for a callable or prediction of one's own."""
        return {
            "format": 1,
            "kind": self.kind,
            "net": part_to_dict(unwrapped(self.net), NETWORKS),
            "process": process_to_dict(self.process),
            "data_shape": list(self.data_shape),
            "data_range": self.data_range,
            "input_scale": function_to_json(self.input_scale, "input_scale"),
            "label": function_to_json(self.label, "label"),
            "label_scale": self.label_scale,
            "index_order": self.index_order,
            "levels": None if self.levels is None else self.levels.flip(0).tolist(),
            "codec": None if self.codec is None else part_to_dict(self.codec, CODECS),
            "data_mean": None if self.data_mean is None else self.data_mean.flatten().tolist(),
        }

    def weights(self) -> dict[str, Tensor]:
        """All weights by the names that files have: the network's own, and a learned process's as "process:...".

        The network's are those inside what torch.compile or DataParallel wrap around it.
        """
        found: dict[str, Tensor] = dict(unwrapped(self.net).state_dict())
        for prefix, module in self._beside():
            found |= {prefix + k: v for k, v in module.state_dict().items()}
        return found

    def _beside(self) -> list[tuple[str, nn.Module]]:
        """What has weights beside the network, and what stands before their names."""
        parts = (("process:", self.process), ("codec:", self.codec))
        return [(prefix, module) for prefix, module in parts if isinstance(module, nn.Module)]

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
        their names. dtype: of the numbers in the file, by default their own; torch.float16 halves it, and ``load``
        gives what is left in single precision. Raises ValueError for a process, prediction or function of one's own;
        RuntimeWarning for a network that ``load`` will need.
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
            save_tensors({k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in state.items()}, aside)
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
            raise _Unfit(f"it holds a {kind} model and no {cls.kind} model; expected {kind.capitalize()}Model.load")
        if net is None:
            if settings["net"] is None:
                raise _Unfit(
                    "this model has a network of your own, without a config attribute that says how it is made; pass "
                    f"it: {cls.__name__}.load(path, net=...)"
                )
            with torch.random.fork_rng(devices=[]):
                net = _network(settings["net"])
        return cls(net, process_from_dict(settings["process"]), **cls._arguments(settings))

    @classmethod
    def _arguments(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Those of ``__init__`` but network and process."""
        levels = settings["levels"]
        return {
            "data_shape": tuple(settings["data_shape"]),
            "data_range": None if settings["data_range"] is None else tuple(settings["data_range"]),
            "input_scale": function_from_json(settings["input_scale"]),
            "label": function_from_json(settings["label"]),
            "label_scale": settings["label_scale"],
            "index_order": settings["index_order"],
            "levels": None if levels is None else torch.tensor(levels, dtype=torch.float64),
            "codec": None if settings.get("codec") is None else part_from_dict(settings["codec"], CODEC),
            "data_mean": settings.get("data_mean"),
        }


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


def unwrapped(net: nn.Module) -> nn.Module:
    """The network inside torch.compile's and DataParallel's wrappers."""
    while True:
        if isinstance(net, (nn.DataParallel, DistributedDataParallel)):
            net = net.module
        elif isinstance(inner := getattr(net, "_orig_mod", None), nn.Module):
            net = inner
        else:
            return net
