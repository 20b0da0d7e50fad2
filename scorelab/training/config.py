"""An experiment: ``build`` makes its parts from a config."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from ml_collections import ConfigDict
from torch import nn

from scorelab.checks import nearest_name
from scorelab.classifiers import ClassifierModel
from scorelab.codecs import Codec
from scorelab.data import Coded, Files, Source, load
from scorelab.described import remember
from scorelab.evaluation.features import features_of
from scorelab.interop.loading import pretrained
from scorelab.latent import AutoencoderModel, Frozen
from scorelab.losses import OBJECTIVES, Bins, Elbo, Objective
from scorelab.models import Constant, LogSigma, ScoreModel, UnitVariance
from scorelab.noised import NoisedModel
from scorelab.precision import settled_precision
from scorelab.predictions import EPS, FLOW, SCORE, X0, V, edm
from scorelab.processes import DiscreteVP, Process
from scorelab.saved import Model
from scorelab.sigmas import FromSigmas, SigmaDistribution
from scorelab.training.settings import check_types, check_used, default_config, named_part, part, plain, resolve
from scorelab.typing import Batch, Tensor

__all__ = [
    "Experiment",
    "Scales",
    "build",
    "choose",
    "load_data",
    "network",
    "scales_of",
    "sigma_data_of",
    "training_data",
]

_PREDICTIONS = {"x0": X0, "eps": EPS, "score": SCORE, "v": V, "flow": FLOW}
_LABELS = ("log_sigma", "relative_log_sigma", "time", "index")
_INPUT_SCALES = ("process", "unit_variance", "unit_data")


class Scales(NamedTuple):
    """What is chosen from the data where a config leaves it open: its scale, and the ends of the noise levels."""

    sigma_data: float
    sigma_min: float
    sigma_max: float


_UNIT = Scales(1.0, 0.004, 20.0)


@dataclass
class Experiment:
    """The parts of an experiment: data, a model with fresh weights, a ``ScoreModel`` or a ``ClassifierModel``, and the
    training objective."""

    data: Source
    model: Model
    objective: Objective
    held_out: Batch | None = None
    """Samples that training does not see, ``data.validation`` of them."""
    scales: Scales = _UNIT
    """What the model was made for."""

    @property
    def sigma_data(self) -> float:
        """The data's scale, which preconditioning uses."""
        return self.scales.sigma_data

    def summary(self, config: ConfigDict) -> str:
        """What is trained, on what, and what was chosen from the data where the config leaves it open, in lines."""
        data, model, t, scales = self.data, self.model, config.training, self.scales
        values = data.values
        stored = data.source if isinstance(data, Coded) else data
        count = f"{len(stored)} samples" if isinstance(stored, Sized) else "fresh samples at every step"
        classes = f", {len(data.classes)} classes" if data.classes else ""
        span = "" if values is None else f", values from {values.least:g} to {values.most:g}"
        if model.codec is not None:
            span += f", as codes by {type(model.codec).__name__}"
        elif model.data_range is not None:
            span += ", scaled to [-1, 1]"
        lines = [f"data: {config.data.source}, {count} of shape {data.data_shape}{classes}{span}"]
        if isinstance(model, NoisedModel):
            low, high = model.sigma_range
            chosen = [
                k for k in ("sigma_min", "sigma_max") if not config.model.saved and config.process.get(k, 0) is None
            ]
            why = {
                "sigma_min": "sigma_min, a 250th of that, can't be seen",
                "sigma_max": "sigma_max is the largest distance of samples, or 20 times that",
            }
            lines.append(
                f"noise: {type(model.process).__name__}, sigma from {low:.6g} to {high:.6g} beside a root mean "
                f"square of {scales.sigma_data:.4g}" + "".join(f"; {why[k]}" for k in chosen)
            )
        predicts = f"prediction {model.prediction.name}" if isinstance(model, ScoreModel) else model.kind
        parameters = sum(p.numel() for p in model.parameters())
        saved = config.model.saved
        whose = f" of {saved}, with its process and prediction, whatever the config's," if saved else ","
        return "\n".join(
            [
                *lines,
                f"model: {type(model.net).__name__}{whose} {parameters:,} parameters, {predicts}, in "
                f"{settled_precision(t.precision, model)}",
                f"training: {t.steps:,} steps of {t.batch_size}, {t.steps * t.batch_size:,} samples",
            ]
        )


def choose(value: str, names: tuple[str, ...], key: str) -> str:
    """A value of a key that is one of ``names``; ValueError with the nearest if it is not."""
    if value not in names:
        raise ValueError(f"{key} is {value!r}; {nearest_name(value, names)}")
    return value


def sigma_data_of(x0: Tensor) -> float:
    """Root mean square of the data about 0: the scale that preconditioning uses."""
    parts = torch.split(x0, 256)
    return math.sqrt(math.fsum(float(part.double().square().sum()) for part in parts) / x0.numel())


def scales_of(x0: Tensor) -> Scales:
    """Of data (N, *D): its root mean square, a 250th of that, and the largest distance or 20 times the first.

    Karras et al., 2022, arXiv:2206.00364, have sigma_data/250 and 160 sigma_data; the largest distance is technique 1
    of Song and Ermon, 2020, arXiv:2006.09011.

    Raises ValueError where all of it is 0.
    """
    sigma_data, dims = sigma_data_of(x0), x0[0].numel()
    if not sigma_data > 0:
        raise ValueError("all the data is 0, so noise levels can't follow from it: check data.source and data.path")
    count = min(len(x0), 1000, max(64, 2**24 // dims))
    some = x0[torch.linspace(0, len(x0) - 1, count).long()].flatten(1)
    # as exact as it needs to be, and a matrix product
    farthest = max((float(torch.cdist(part, some).max()) for part in torch.split(some, 256)), default=0.0)
    return Scales(sigma_data, sigma_data / 250, max(farthest, 20 * sigma_data))


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


def training_data(config: ConfigDict) -> Source:
    """The same without what was held out of training."""
    source = load_data(config)
    if config.data.validation:
        source.hold_out(config.data.validation)
    return source


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
    interval = tuple(config.sampling.guidance_interval)
    if interval and (len(interval) != 2 or not 0 <= interval[0] < interval[1]):
        raise ValueError(
            f"sampling.guidance_interval is {interval}; expected noise levels (low, high), 0 <= low < high, or "
            "() for all"
        )
    if t.batch_size % t.accumulate:
        raise ValueError(
            f"training.accumulate is {t.accumulate} for a batch_size of {t.batch_size}; expected a divisor of it"
        )


def _check_levels(sigmas: SigmaDistribution, process: Process, name: str) -> None:
    """RuntimeWarning where training visits noise levels beyond the process's, at which nothing is sampled; ValueError
    where most are."""
    levels, (low, high) = sigmas((torch.arange(1000) + 0.5) / 1000).detach(), process.sigma_range
    beyond = float(((levels < low * (1 - 1e-4)) | (levels > high * (1 + 1e-4))).float().mean())
    if beyond < 0.05:
        return
    said = (
        f"training.sigmas ({name}) goes from {float(levels.min()):.4g} to {float(levels.max()):.4g}, {beyond:.0%} of "
        f"it beyond the process's [{low:.4g}, {high:.4g}], where samples are drawn; expected it inside: set its ends, "
        "or process.sigma_min and sigma_max"
    )
    if beyond > 0.5:
        raise ValueError(said)
    warnings.warn(said, RuntimeWarning, stacklevel=3)


def _classes(config: ConfigDict, data: Source) -> dict[str, Any]:
    """What the network is told of the data's classes."""
    if not 0 <= config.training.label_dropout < 1:
        raise ValueError(f"training.label_dropout is {config.training.label_dropout:g}; expected 0 <= share < 1")
    if not config.model.conditional:
        if getattr(named_part(config, "model.net"), "classifies", False):
            raise ValueError(
                f"model.net.name={config.model.net.name!r} learns classes; expected model.conditional=True"
            )
        return {}
    if not data.classes:
        labels = getattr(data.source if isinstance(data, Coded) else data, "labels", None)
        got = "none" if labels is None else f"labels from {int(labels.min())} to {int(labels.max())}"
        raise ValueError(
            f"model.conditional needs a class for every sample, and the data has {got}; expected whole numbers from 0"
        )
    _check_seen(data)
    return {"num_classes": len(data.classes), "null_class": config.training.label_dropout > 0}


def _check_seen(data: Source) -> None:
    """RuntimeWarning of classes without a sample; ValueError where most are."""
    labels, names = getattr(data.source if isinstance(data, Coded) else data, "labels", None), data.classes
    seen = set(range(len(names))) if labels is None else set(labels.unique().tolist())
    empty = [name for k, name in enumerate(names) if k not in seen]
    if not empty:
        return
    said = (
        f"of {len(names)} classes {len(empty)} have no sample ({', '.join(empty[:3])}{', ...' * (len(empty) > 3)}), so "
        "nothing is learnt of them; expected labels 0, 1, ... without gaps: np.unique(labels, return_inverse=True)[1]"
    )
    if 2 * len(empty) > len(names):
        raise ValueError(said)
    warnings.warn(said, RuntimeWarning, stacklevel=3)


_PUBLISHED_UNSCALED = ("ncsnpp", "ddpm", "refinenet")
"""Networks that were published with inputs which grow with the noise."""


def _warn_of_scale(x0: Tensor, model: NoisedModel, sigma_data: float, net: str) -> None:
    """RuntimeWarning if the largest noise does not cover the data, for samples begin as noise alone, or if the network
    sees inputs whose scale is that of the noise."""
    process = model.process
    high, std = process.sigma_range[1], float(x0.std()) if x0.numel() < 2**27 else sigma_data_of(x0)
    grows = model.input_scale == "process" and float(process.alpha(torch.tensor(process.t_max)).detach()) == 1
    if grows and high > 20 * sigma_data and net not in _PUBLISHED_UNSCALED:
        warnings.warn(
            f"the network's inputs grow with the noise, up to {high:.4g}, beside a scale of {sigma_data:.4g} of the "
            "data, from which few networks learn; expected model.input_scale='unit_variance', best with "
            "model.prediction='edm'",
            RuntimeWarning,
            stacklevel=3,
        )
    if x0.ndim == 2 and len(x0) < x0.shape[1]:
        warnings.warn(
            f"{len(x0)} samples of {x0.shape[1]} dimensions are fewer than dimensions; expected an array (samples, "
            "dimensions): is it transposed?",
            RuntimeWarning,
            stacklevel=3,
        )
    # nothing is sampled by a classifier
    if std > high and isinstance(model, ScoreModel):
        warnings.warn(
            f"the data has a standard deviation of {std:.4g}, the largest noise level is {high:.4g}: samples would "
            "begin far from it; raise process.sigma_max to several times that, or scale the data",
            RuntimeWarning,
            stacklevel=3,
        )


def network(config: ConfigDict, data_shape: tuple[int, ...], **classes: Any) -> nn.Module:
    """The network of ``config.model`` for data of a shape, with weights drawn from ``config.seed``.

    classes: num_classes, and null_class, whether it knows no class too, of a network with conditions.
    """
    known: dict[str, Any] = {"data_shape": tuple(data_shape), **classes}
    if config.model.label == "index":
        known["embedding"] = "positional"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        net: nn.Module = part(resolve(config), "model.net", **known)
    _remember(net, config.model.net, known)
    return net


def _trained_network(config: ConfigDict, data: Source) -> nn.Module:
    net = network(config, data.data_shape, **_classes(config, data))
    if config.model.conditional and getattr(net, "num_classes", None) is None:
        raise ValueError(
            f"model.conditional is True, but the network {config.model.net.name!r} has no num_classes; expected one "
            "that takes conditions"
        )
    return net


def _remember(made: nn.Module, settings: ConfigDict, known: dict[str, Any]) -> None:
    """Let a part of one's own know by what it is made again from a saved model."""
    if ":" in settings.name:
        takes = inspect.signature(type(made)).parameters
        remember(made, {k: v for k, v in {**plain(settings), **known}.items() if k in takes and k != "name"})


def _choice(config: ConfigDict, key: str, net: nn.Module, names: tuple[str, ...], otherwise: str) -> str:
    """``config.model.label`` or ``input_scale``: as it says, as the network wants it first, or ``otherwise``."""
    wanted: tuple[str, ...] = getattr(net, "wants", {}).get(key, ())
    found = choose(config.model[key] or (*wanted, otherwise)[0], names, f"model.{key}")
    wanted = wanted or names
    if found not in wanted:
        raise ValueError(
            f"model.{key} is {found!r}, which model.net.name={config.model.net.name!r} does not take (only "
            f"{', '.join(map(repr, wanted))}): leave it out, or choose another network"
        )
    return found


def _codec(config: ConfigDict, data: Source) -> Codec | None:
    """The codec of ``config.model``, fitted to the data; None for one that changes nothing."""
    scaled = data.values is None or data.values.ends is not None
    codec: Codec = part(config, "model.codec", data_shape=data.data_shape, scaled=scaled)
    if type(codec) is Codec:
        return None
    if isinstance(codec, Frozen):
        ends, of_codec = None if data.values is None else data.values.ends, codec.model.data_range
        if ends != of_codec:
            raise ValueError(
                f"model.codec.path learnt from data with {of_codec} scaled to [-1, 1], and the data has {ends}; "
                "expected the same"
            )
    codec.fit(data.reference())
    _remember(codec, config.model.codec, {"data_shape": data.data_shape})
    return codec


_OF_MODEL = ("net", "codec", "prediction", "label", "label_scale", "index_order", "input_scale")


def without_model(config: ConfigDict) -> ConfigDict:
    """The config without those settings of the network and the process that ``config.model.saved`` takes the place of;
    as it is where there is none."""
    if not config.model.saved:
        return config
    found, default = copy.deepcopy(config), default_config()
    with found.unlocked(), found.ignore_type():
        found.process = default.process
        for key in _OF_MODEL:
            found.model[key] = default.model[key]
    return found


def _saved_model(config: ConfigDict, data: Source) -> ScoreModel:
    """The model that ``config.model.saved`` names; ValueError if it does not fit the data."""
    m = config.model
    try:
        model = ScoreModel.load(pretrained(m.saved))
    except ValueError as error:
        raise ValueError(f"model.saved: {error}") from error
    if model.data_shape != data.data_shape:
        raise ValueError(
            f"model.saved is of data {model.data_shape}, and the data has {data.data_shape}; expected the same"
        )
    if m.conditional != model.conditional:
        raise ValueError(
            f"model.saved {'takes' if model.conditional else 'takes no'} conditions; expected model.conditional="
            f"{model.conditional}"
        )
    classes = _classes(config, data).get("num_classes")
    if classes is not None and classes != model.num_classes:
        raise ValueError(f"model.saved knows {model.num_classes} classes, and the data has {classes}; expected as many")
    return model


def _mean(reference: Tensor) -> Tensor:
    """Of each channel, (C, 1, ...)."""
    return reference.double().transpose(0, 1).flatten(1).mean(1).reshape(-1, *(1,) * (reference.ndim - 2))


def _model(
    config: ConfigDict, data: Source, codec: Codec | None, process: Process, sigmas: Any, sigma_data: float
) -> Model:
    """A model with fresh weights."""
    m = config.model
    net = _trained_network(config, data)
    if getattr(net, "encodes", False):
        return AutoencoderModel(net, data_shape=data.data_shape, codec=codec)
    if isinstance(process, nn.Module):
        _remember(process, config.process, {})
    label = _choice(config, "label", net, _LABELS, "log_sigma")
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
    input_scales: dict[str, Any] = {
        "process": "process",
        "unit_variance": UnitVariance(sigma_data),
        "unit_data": Constant(1 / sigma_data),
    }
    usual = "unit_variance" if m.prediction == "edm" else "process"
    options: dict[str, Any] = {
        "data_shape": data.data_shape,
        "input_scale": input_scales[_choice(config, "input_scale", net, _INPUT_SCALES, usual)],
        "label": LogSigma(sigma_data) if label == "relative_log_sigma" else label,
        "label_scale": m.label_scale or getattr(net, "label_scale", 1.0),
        "index_order": m.index_order,
        "levels": None if isinstance(process, DiscreteVP) else levels,
        "codec": codec,
    }
    if getattr(net, "classifies", False):
        return ClassifierModel(net, process, **options)
    return ScoreModel(net, process, prediction, variance=bool(m.net.get("variance")), **options)


_NETWORKS = {"classifier": "'classifier'", "autoencoder": "'autoencoder' or 'mlp_autoencoder'", "score": "another"}


def _check_objective(model: Model, objective: Objective) -> None:
    """Refuse (ValueError) an objective of another kind of model, a variance that nothing learns, and an objective that
    misses one."""
    if objective.kind != model.kind:
        fitting = " or ".join(repr(name) for name, other in OBJECTIVES.items() if other.kind == model.kind)
        raise ValueError(
            f"training.objective is {type(objective).__name__}, for {objective.kind} models, and the network "
            f"{type(model.net).__name__} is for {model.kind} models; expected training.objective.name={fitting}, or "
            f"model.net.name={_NETWORKS[objective.kind]}"
        )
    critic = getattr(model.net, "critic", None) is not None
    if isinstance(objective, Elbo) and critic != (objective.adversarial > 0):
        said = f"training.objective.adversarial is {objective.adversarial:g}, and the network has "
        said += f"{'a' if critic else 'no'} critic; expected both, model.net.critic=32 for example, or neither"
        raise ValueError(said)
    if not isinstance(model, ScoreModel):
        return
    if model.variance and not objective.learns_variance:
        raise ValueError(
            f"the network returns a variance, and {type(objective).__name__} learns none; expected "
            "training.objective.name='hybrid', or model.net.variance=False and a fixed sampling.sampler.variance"
        )
    if objective.learns_variance and not model.variance:
        raise ValueError(
            f"training.objective {type(objective).__name__} learns a variance, and the network returns none; expected "
            "model.net.variance=True, or another objective"
        )


def build(config: ConfigDict, *, data: Source | None = None, scales: Scales | None = None) -> Experiment:
    """All parts; weights are drawn from ``config.seed`` without touching global random state.

    data: in place of ``config.data``'s; scales: what a model was made for, where the data may have changed since; None:
    what follows from the data.

    Raises ValueError for a value that is not known or does not fit, naming the key.
    """
    check_types(config)
    config = resolve(without_model(config))
    m = config.model
    _check_training(config)
    data = load_data(config) if data is None else data
    check_used(config)
    saved = _saved_model(config, data) if m.saved else None
    codec = _codec(config, data) if saved is None else saved.codec
    if codec is not None:
        data = Coded(data, codec)
    reference = data.reference()
    scales = scales_of(reference) if scales is None else scales
    sigma_data = m.sigma_data or scales.sigma_data
    process: Process = (
        part(config, "process", sigma_min=scales.sigma_min, sigma_max=scales.sigma_max)
        if saved is None
        else saved.process
    )
    low, high = process.sigma_range
    known = {"process": process, "sigma_min": low, "sigma_max": high, "sigma_data": sigma_data, "knee": 2 * sigma_data}
    sigmas = part(config, "training.sigmas", **known)
    # those that follow from the data come with a warning of a process that does not cover it
    if config.training.sigmas.name != "auto":
        _check_levels(sigmas, process, config.training.sigmas.name)
    model = saved or _model(config, data, codec, process, sigmas, sigma_data)
    if isinstance(model, NoisedModel):
        model.data_mean = _mean(reference)
    model.data_range = None if data.values is None or codec is not None else data.values.ends
    if isinstance(model, NoisedModel):
        _warn_of_scale(reference, model, sigma_data, m.net.name)
    weight = part(config, "training.weighting", sigmas=sigmas, prediction=getattr(model, "prediction", EPS), **known)
    uncertainty = model.uncertainty if getattr(model.net, "last_uncertainty", None) is not None else None
    known["num_classes"] = model.num_classes
    values = data.values
    known["bins"] = None
    if seen := config.training.objective.get("features"):
        known["seen"] = features_of(seen, "training.objective.features")
    if values is not None and values.step and codec is None:
        known["bins"] = Bins(values.spacing, *values.bounds)
    objective = part(config, "training.objective", sigmas=sigmas, weight=weight, uncertainty=uncertainty, **known)
    _check_objective(model, objective)
    held_out = data.hold_out(config.data.validation) if config.data.validation else None
    return Experiment(data, model, objective, held_out, scales._replace(sigma_data=sigma_data))
