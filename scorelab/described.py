"""What a model is made of, as JSON can hold it: parts by their names and arguments, one's own by their import paths."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from scorelab.codecs import CODECS, Codec
from scorelab.nn import NETWORKS
from scorelab.parts import Kind
from scorelab.predictions import PREDICTIONS, Prediction, edm
from scorelab.processes import VE, VP, Cosine, DiscreteVP, Flow, Learned, Process, SubVP
from scorelab.typing import Tensor

__all__ = [
    "CODEC",
    "NETWORK",
    "Constant",
    "Function",
    "LogSigma",
    "UnitVariance",
    "function_from_json",
    "function_to_json",
    "part_from_dict",
    "part_to_dict",
    "prediction_from_json",
    "prediction_to_json",
    "process_from_dict",
    "process_to_dict",
    "remember",
]

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Constant:
    """input_scale: the same number at every sigma."""

    value: float

    def __call__(self, sigma: Tensor) -> Tensor:
        """``value``, in sigma's shape."""
        return torch.full_like(sigma, self.value)


@dataclass(frozen=True)
class UnitVariance:
    """input_scale: 1 / sqrt(sigma^2 + sigma_data^2), EDM's c_in."""

    sigma_data: float

    def __call__(self, sigma: Tensor) -> Tensor:
        """The factor that gives the input unit variance."""
        return torch.rsqrt(sigma**2 + self.sigma_data**2)


@dataclass(frozen=True)
class LogSigma:
    """label: log(sigma / sigma_data)."""

    sigma_data: float = 1.0

    def __call__(self, sigma: Tensor) -> Tensor:
        """The label, in sigma's shape."""
        return (sigma / self.sigma_data).log()


_CALLABLES = {c.__name__: c for c in (Constant, UnitVariance, LogSigma)}
NETWORK, CODEC = Kind("network", NETWORKS, nn.Module), Kind("codec", CODECS, Codec)
_PROCESSES = {made.__name__: made for made in (VE, VP, SubVP, Cosine, Flow, DiscreteVP, Learned)}
_OWN_PROCESS = Kind("process", _PROCESSES, Process)


def _path_of(made: object) -> str | None:
    """The import path of an object's class, None if it has none that another process would find."""
    own = type(made)
    there = getattr(sys.modules.get(own.__module__), own.__qualname__, None) is own
    return f"{own.__module__}:{own.__qualname__}" if there and own.__module__ != "__main__" else None


def part_to_dict(made: nn.Module, table: Mapping[str, Any]) -> dict[str, Any] | None:
    """By what a part is made again: its name and the arguments of its class; None where they are not known."""
    name = next((name for name, known in table.items() if known is type(made)), None) or _path_of(made)
    settings = _arguments(made)
    return {"name": name, **settings} if name is not None and settings is not None else None


def remember(made: nn.Module, arguments: dict[str, Any]) -> None:
    """Keep what a part of one's own was made with, beside whatever its ``config`` may be."""
    made.made_with = arguments  # type: ignore[assignment]


def _arguments(made: object) -> dict[str, Any] | None:
    """What a part's class was called with: as ``remember`` says, else its ``config`` if its class takes that."""
    found = getattr(made, "made_with", getattr(made, "config", {} if isinstance(made, Codec) else None))
    try:
        inspect.signature(type(made)).bind(**found)  # type: ignore[arg-type]
    except TypeError:
        return None
    return dict(found)  # type: ignore[arg-type]


def part_from_dict(settings: dict[str, Any], kind: Kind) -> Any:
    """The part of ``part_to_dict``, which remembers by what it was made."""
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items() if k != "name"}
    made = kind.maker(str(settings["name"]), kind.name)(**arguments)
    if ":" in str(settings["name"]) and isinstance(made, nn.Module):
        remember(made, arguments)
    return made


def process_to_dict(process: Process) -> dict[str, Any]:
    """A process as JSON can hold it: its name and arguments, of one's own those of its ``config``."""
    name = type(process).__name__ if type(process) in _PROCESSES.values() else _path_of(process)
    if isinstance(process, DiscreteVP):
        settings: Any = {"betas": process.betas.tolist()}
    else:
        settings = dataclasses.asdict(process) if dataclasses.is_dataclass(process) else _arguments(process)
    if name is None or not isinstance(settings, dict):
        raise ValueError(
            f"{type(process).__name__} is not one of scorelab's processes and can't be saved; expected a class that "
            "can be imported, with its arguments in an attribute config"
        )
    return {"name": name, **settings}


def process_from_dict(settings: dict[str, Any]) -> Process:
    """The process of ``process_to_dict``."""
    name = str(settings["name"])
    if name not in _PROCESSES and ":" not in name:
        raise ValueError(f"unknown process {name!r}")
    made: Process = part_from_dict(settings, _OWN_PROCESS)
    return made


def prediction_to_json(prediction: Prediction) -> str:
    """The name of a prediction; ValueError for one of one's own."""
    if prediction.name in PREDICTIONS or prediction.name.startswith("edm("):
        return prediction.name
    raise ValueError("a prediction of one's own cannot be saved; use one of scorelab.predictions")


def prediction_from_json(name: str) -> Prediction:
    """The prediction of a name; ValueError for one that is not known."""
    if name.startswith("edm("):
        sigma_data = float(name[4:-1])
        if math.isfinite(sigma_data):
            return edm(sigma_data)
    if name not in PREDICTIONS:
        raise ValueError(f"unknown prediction {name!r}; known: {', '.join(PREDICTIONS)}, edm(sigma_data)")
    return PREDICTIONS[name]


def function_to_json(value: str | Function, what: str) -> Any:
    """An input scale or label, itself if it is a name; ValueError naming ``what`` it is for one of one's own."""
    if isinstance(value, str):
        return value
    if isinstance(value, (Constant, UnitVariance, LogSigma)):
        return {"name": type(value).__name__, **dataclasses.asdict(value)}
    raise ValueError(f"{what} is a function of one's own and cannot be saved; use {', '.join(_CALLABLES)}")


def function_from_json(value: Any) -> str | Function:
    """The input scale or label of ``function_to_json``."""
    if isinstance(value, str):
        return value
    return _CALLABLES[value["name"]](**{k: v for k, v in value.items() if k != "name"})
