"""An experiment: ``build`` makes its parts from a config."""

from __future__ import annotations

import inspect
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import nn

from scorelab.checks import nearest_name
from scorelab.codecs import Codec
from scorelab.data import Coded, Files, Source, load
from scorelab.losses import Objective
from scorelab.models import Constant, LogSigma, ScoreModel, UnitVariance
from scorelab.predictions import EPS, FLOW, SCORE, X0, V, edm
from scorelab.processes import DiscreteVP, Process
from scorelab.sigmas import FromSigmas
from scorelab.training.settings import check_types, check_used, part, plain, resolve
from scorelab.typing import Batch, Tensor

__all__ = ["Experiment", "build", "choose", "load_data", "sigma_data_of"]

_PREDICTIONS = {"x0": X0, "eps": EPS, "score": SCORE, "v": V, "flow": FLOW}
_LABELS = ("log_sigma", "relative_log_sigma", "time", "index")
_INPUT_SCALES = ("process", "unit_variance", "unit_data")


@dataclass
class Experiment:
    """The parts of an experiment: data, a model with fresh weights, and the training objective."""

    data: Source
    model: ScoreModel
    objective: Objective
    held_out: Batch | None = None
    """Samples that training does not see, ``data.validation`` of them."""
    sigma_data: float = 1.0
    """Root mean square of the data, which the model was made for."""


def choose(value: str, names: tuple[str, ...], key: str) -> str:
    """A value of a key that is one of ``names``; ValueError with the nearest if it is not."""
    if value not in names:
        raise ValueError(f"{key} is {value!r}; {nearest_name(value, names)}")
    return value


def sigma_data_of(x0: Tensor) -> float:
    """Root mean square of the data about 0: the scale that preconditioning uses."""
    parts = torch.split(x0, 256)
    return math.sqrt(math.fsum(float(part.double().square().sum()) for part in parts) / x0.numel())


def load_data(config: ConfigDict) -> Source:
    """The data of ``config.data``."""
    c = config.data
    size = tuple(c.size or ())
    if len(size) not in (0, 2) or any(not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(f"data.size is {c.size!r}; expected (height, width), whole numbers, or () for the images' own")
    files = Files(
        c.path or "", size, c.grayscale, c.flip, c.dequantise, c.skip_bad, c.cache or "", c.background, c.layout
    )
    return load(c.source, files)


def _check_training(config: ConfigDict) -> None:
    t = config.training
    for key in ("workers", "validation"):
        if config.data[key] < 0:
            raise ValueError(f"data.{key} is {config.data[key]}; expected 0 or more")
    for key in ("steps", "batch_size", "checkpoint_every", "log_every", "accumulate"):
        if t[key] < 1:
            raise ValueError(f"training.{key} is {t[key]}; expected at least 1")
    for key in ("skip_nonfinite", "keep_last", "keep_every", "validate_every", "sample_every"):
        if t[key] < 0:
            raise ValueError(f"training.{key} is {t[key]}; expected 0 or more")
    if t.keep_every % t.checkpoint_every:
        raise ValueError(
            f"training.keep_every is {t.keep_every}, of which few checkpoints are a multiple; expected a multiple of "
            f"training.checkpoint_every, {t.checkpoint_every}"
        )
    if t.batch_size % t.accumulate:
        raise ValueError(
            f"training.accumulate is {t.accumulate} for a batch_size of {t.batch_size}; expected a divisor of it"
        )


def _classes(config: ConfigDict, data: Source) -> dict[str, Any]:
    """What the network is told of the data's classes."""
    if not 0 <= config.training.label_dropout < 1:
        raise ValueError(f"training.label_dropout is {config.training.label_dropout:g}; expected 0 <= share < 1")
    if not config.model.conditional:
        return {}
    if not data.classes:
        labels = getattr(data, "labels", None)
        got = "none" if labels is None else f"labels from {int(labels.min())} to {int(labels.max())}"
        raise ValueError(
            f"model.conditional needs a class for every sample, and the data has {got}; expected whole numbers from 0"
        )
    return {"num_classes": len(data.classes), "null_class": config.training.label_dropout > 0}


def _warn_of_scale(x0: Tensor, process: Process) -> None:
    """RuntimeWarning if the largest noise does not cover the data: samples begin as noise alone."""
    high, std = process.sigma_range[1], float(x0.std()) if x0.numel() < 2**27 else sigma_data_of(x0)
    if std > high:
        warnings.warn(
            f"the data has a standard deviation of {std:.4g}, the largest noise level is {high:.4g}: samples would "
            "begin far from it; raise process.sigma_max to several times that, or scale the data",
            RuntimeWarning,
            stacklevel=3,
        )


def _network(config: ConfigDict, data: Source) -> nn.Module:
    """The network of ``config.model``, with weights drawn from ``config.seed``."""
    known = {"data_shape": data.data_shape, **_classes(config, data)}
    if config.model.label == "index":
        known["embedding"] = "positional"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        net: nn.Module = part(config, "model.net", **known)
    _remember(net, config.model.net, known)
    if config.model.conditional and getattr(net, "num_classes", None) is None:
        raise ValueError(
            f"model.conditional is True, but the network {config.model.net.name!r} has no num_classes; expected one "
            "that takes conditions"
        )
    return net


def _remember(made: Any, settings: ConfigDict, known: dict[str, Any]) -> None:
    """Give a part of one's own the arguments by which it is made again from a saved model, if it does not have them."""
    if not hasattr(made, "config"):
        takes = inspect.signature(type(made)).parameters
        made.config = {k: v for k, v in {**plain(settings), **known}.items() if k in takes}


def _choice(config: ConfigDict, key: str, net: nn.Module, names: tuple[str, ...]) -> str:
    """``config.model.label`` or ``input_scale``: as it says, or as the network wants it first."""
    wanted: tuple[str, ...] = getattr(net, "wants", {}).get(key, names)
    found = choose(config.model[key] or wanted[0], names, f"model.{key}")
    if found not in wanted:
        raise ValueError(
            f"model.{key} is {found!r}, which model.net.name={config.model.net.name!r} does not take (only "
            f"{', '.join(map(repr, wanted))}): leave it out, or choose another network"
        )
    return found


def build(config: ConfigDict, *, sigma_data: float | None = None) -> Experiment:
    """All parts; weights are drawn from ``config.seed`` without touching global random state.

    sigma_data: what a model was made for, where the data may have changed since; None: the data's root mean square.

    Raises ValueError for a value that is not known or does not fit, naming the key.
    """
    check_types(config)
    config = resolve(config)
    m = config.model
    _check_training(config)
    data = load_data(config)
    check_used(config)
    codec: Codec | None = part(config, "model.codec", data_shape=data.data_shape)
    if type(codec) is Codec:
        codec = None
    else:
        assert codec is not None
        codec.fit(data.reference())
        _remember(codec, config.model.codec, {"data_shape": data.data_shape})
        data = Coded(data, codec)
    reference, process = data.reference(), part(config, "process")
    if isinstance(process, nn.Module):
        _remember(process, config.process, {})
    _warn_of_scale(reference, process)
    if not m.sigma_data >= 0:
        raise ValueError(
            f"model.sigma_data is {m.sigma_data:g}; expected the data's scale, or 0 for its root mean square"
        )
    sigma_data = m.sigma_data or (sigma_data_of(reference) if sigma_data is None else sigma_data)
    net = _network(config, data)
    low, high = process.sigma_range
    known = {"process": process, "sigma_min": low, "sigma_max": high, "sigma_data": sigma_data, "knee": 2 * sigma_data}
    sigmas = part(config, "training.sigmas", **known)
    label = _choice(config, "label", net, _LABELS)
    levels = sigmas.sigmas if label == "index" and isinstance(sigmas, FromSigmas) else None
    if label == "index" and levels is None and not isinstance(process, DiscreteVP):
        raise ValueError(
            f"model.label is 'index', but training.sigmas.name is {config.training.sigmas.name!r}; expected "
            "'sequence', whose levels are counted, or a process of steps, ddpm or ddpm_cosine"
        )
    prediction = (
        edm(sigma_data)
        if m.prediction == "edm"
        else _PREDICTIONS[choose(m.prediction, (*_PREDICTIONS, "edm"), "model.prediction")]
    )
    scales: dict[str, Any] = {
        "process": "process",
        "unit_variance": UnitVariance(sigma_data),
        "unit_data": Constant(1 / sigma_data),
    }
    model = ScoreModel(
        net,
        process,
        prediction,
        data_shape=data.data_shape,
        data_range=None if data.values is None or codec is not None else data.values.ends,
        input_scale=scales[_choice(config, "input_scale", net, _INPUT_SCALES)],
        label=LogSigma(sigma_data) if label == "relative_log_sigma" else label,
        levels=None if isinstance(process, DiscreteVP) else levels,
        codec=codec,
    )
    weight = part(config, "training.weighting", sigmas=sigmas, **known)
    objective = part(config, "training.objective", sigmas=sigmas, weight=weight, **known)
    held_out = data.hold_out(config.data.validation) if config.data.validation else None
    return Experiment(data, model, objective, held_out, sigma_data)
