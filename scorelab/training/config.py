"""What an experiment is: a config file returns ``default_config()`` with its own values, and ``build`` makes the parts.

Parts, such as the network, are chosen by their ``name``; what else can be set of one stands beside its code, and
``resolve`` fills it in. Any other key is refused, naming the nearest.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import nn

from scorelab.checks import nearest_name
from scorelab.codecs import CODECS, Codec
from scorelab.data import Coded, Files, Source, load
from scorelab.losses import OBJECTIVES, WEIGHTINGS, Objective
from scorelab.models import Constant, LogSigma, ScoreModel, UnitVariance
from scorelab.nn import NETWORKS
from scorelab.parts import Kind
from scorelab.predictions import EPS, FLOW, SCORE, X0, V, edm
from scorelab.processes import PROCESSES, DiscreteVP, Process
from scorelab.samplers import CORRECTORS, SAMPLERS, Corrector, Sampler
from scorelab.sigmas import GRIDS, LEVELS, FromSigmas, SigmaDistribution
from scorelab.training.optim import OPTIMISERS, SCHEDULES
from scorelab.typing import Batch, Tensor

__all__ = ["PARTS", "Experiment", "beside", "build", "default_config", "load_data", "part", "resolve", "sigma_data_of"]

_INNER = Kind("sampler", SAMPLERS, Sampler)
PARTS = {
    "model.net": Kind("network", NETWORKS, nn.Module, given=("data_shape", "num_classes", "null_class")),
    "model.codec": Kind("codec", CODECS, Codec, given=("data_shape",)),
    "process": Kind("process", PROCESSES, Process),
    "optim": Kind("optimiser", OPTIMISERS, torch.optim.Optimizer),
    "optim.schedule": Kind("schedule", SCHEDULES),
    "training.sigmas": Kind("levels", LEVELS, SigmaDistribution),
    "training.weighting": Kind("weighting", WEIGHTINGS),
    "training.objective": Kind("objective", OBJECTIVES, Objective),
    "sampling.grid": Kind("grid", GRIDS),
    "sampling.sampler": Kind(
        "sampler",
        SAMPLERS,
        Sampler,
        {"predictor": _INNER, "inner": _INNER, "corrector": Kind("corrector", CORRECTORS, Corrector)},
    ),
}
"""Where a config chooses parts."""
EVALUATION = Kind("evaluation", {})
"""What a config may measure besides, by import path: the library's own have keys of their own."""


def default_config() -> ConfigDict:
    """Every setting with its default value, but for those of parts, which the parts have.

    It is locked, so that an unknown key is refused with the nearest name; those of parts are looked at by ``resolve``.
    """
    config = ConfigDict(
        {
            "seed": 0,
            "data": {
                # digits | a 2-D target such as ring | mnist | fashion_mnist | idx | cifar10 | arrays | folder | zip |
                # package.module:Name of a torch data set
                "source": "digits",
                "path": "",
                "size": (),  # (height, width): images are scaled to cover it and cropped at the centre
                "grayscale": False,
                "flip": False,  # half of the images left to right
                "dequantise": False,  # uniform noise within a grey level
                "skip_bad": False,  # leave out files that can't be used
                "cache": "",  # a folder for decoded images and unpacked arrays that do not fit in memory
                "background": "white",  # the colour behind transparent images, a name or "#rrggbb"
                "layout": "",  # of arrays: channels_first | channels_last | no_channels; empty: by their shape
                "workers": 0,  # threads that make batches ahead: where a GPU would wait for them
                "validation": 0,  # samples kept out of training, for training.validate_every
            },
            "model": {
                "net": {"name": "unet"},
                "codec": {"name": "identity"},
                "prediction": "eps",  # x0 | eps | score | v | flow | edm
                # log_sigma | relative_log_sigma (log sigma/sigma_data) | time | index (of a sequence's or of DDPM's
                # levels); "": what the network wants
                "label": "",
                # process | unit_variance | unit_data (over sigma_data); "": what the network wants
                "input_scale": "",
                "sigma_data": 0.0,  # the scale that edm and the like take for the data's; 0: its root mean square
                "conditional": False,  # on the data's labels
            },
            "process": {"name": "ve"},
            "optim": {
                "name": "adam",
                "warmup": 100,
                "schedule": {"name": "constant"},
                "clip": 1.0,  # of the gradient's norm, 0 or None: none
                "ema": (0.999,),  # decays of the averages of the weights; sampling takes the first
                "ema_power": (),  # relative widths of power-function averages, such as (0.05, 0.1)
            },
            "training": {
                "steps": 1000,
                "batch_size": 128,
                "sigmas": {"name": "process"},  # the noise levels that are visited
                "weighting": {"name": "sigma2"},
                "objective": {"name": "denoising"},
                "label_dropout": 0.0,  # the share of labels that are left out, which guidance needs: 0.1 for example
                "precision": "auto",  # auto | fp32 | bf16
                "channels_last": "auto",  # auto | yes | no: how images lie in memory
                "compile": False,  # torch.compile the network: minutes of start, faster steps
                "activation_checkpointing": False,  # activations are computed again in the backward pass, for memory
                "fsdp": False,  # under torchrun: weights and all that goes with them are spread over the processes
                "accumulate": 1,  # parts a batch is worked through in, for memory
                "skip_nonfinite": 0,  # how many steps with a loss or gradient that is not finite are left out
                "checkpoint_every": 500,
                "keep_last": 3,  # checkpoints, 0: all
                "keep_every": 0,  # and those of multiples of this step, 0: none besides
                "log_every": 50,
                "validate_every": 500,  # loss at fixed noise, 0: never
                "sample_every": 1000,  # samples, as `scorelab sample` writes them, 0: never
            },
            "sampling": {
                "sampler": {"name": "heun"},
                "grid": {"name": "karras"},
                "clip": False,  # clamp the denoised sample to the data range
                "guidance": 1.0,  # scale of classifier-free guidance: 1 conditional, 0 unconditional, more extrapolates
                "guidance_interval": (),  # (low, high): the noise levels at which it guides; (): all
                "samples": 64,
                "batch_size": 256,
            },
            # what is measured besides while training, by names of one's own: {"name": "package.module:Class", ...}
            "evaluation": {},
        }
    )
    config.lock()
    for path in (*PARTS, "evaluation"):
        _at(config, path).unlock()
    return config


def _at(config: ConfigDict, path: str) -> ConfigDict:
    """The settings of a part."""
    for key in path.split("."):
        config = config[key]
    return config


def beside(path: str) -> tuple[str, ...]:
    """Settings that stand among a part's and are none of its own."""
    return tuple(k for k in _at(default_config(), path) if k != "name")


def resolve(config: ConfigDict) -> ConfigDict:
    """The config with all settings of the parts that it names; ValueError for one that a part lacks, or of another
    type, naming the nearest.
    """
    found = copy.deepcopy(config)
    defaults = {"sampling.grid": {"n": 18}}
    for path, kind in PARTS.items():
        given = _at(config, path)
        others = beside(path)
        resolved = kind.resolve(_plain(given), f"config.{path}", defaults.get(path, {}), others)
        place = _at(found, path)
        with place.unlocked(), place.ignore_type():
            for key, value in resolved.items():
                if key not in others:
                    place[key] = value
        place.unlock()
    for name, given in config.evaluation.items():
        found.evaluation[name] = ConfigDict(EVALUATION.resolve(_plain(given), f"config.evaluation.{name}"))
    return found


def _plain(given: ConfigDict) -> dict[str, Any]:
    """Its settings, those of parts inside as dicts."""
    return {k: _plain(v) if isinstance(v, ConfigDict) else v for k, v in given.items()}


def part(config: ConfigDict, path: str, **context: Any) -> Any:
    """The part that a resolved config names; what its settings leave open comes from ``context``."""
    given = {k: v for k, v in _plain(_at(config, path)).items() if k not in beside(path)}
    return PARTS[path].make(given, f"config.{path}", context)


def named_part(config: ConfigDict, path: str) -> Callable[..., Any]:
    """What makes a part."""
    return PARTS[path].maker(_at(config, path).name, f"config.{path}")


_FILES = ("idx", "mnist", "fashion_mnist", "cifar10", "arrays", "folder", "zip", ":")
_IMAGES = ("folder", "zip", ":")
_USED = {
    "data.path": ("data.source", _FILES),
    "data.size": ("data.source", _FILES),
    "data.grayscale": ("data.source", _FILES),
    "data.flip": ("data.source", _FILES),
    "data.dequantise": ("data.source", _FILES),
    "data.skip_bad": ("data.source", ("folder", "zip")),
    "data.cache": ("data.source", ("folder", "zip", "arrays")),
    "data.background": ("data.source", _IMAGES),
    "data.layout": ("data.source", ("arrays", "idx", "mnist", ":")),
    "training.label_dropout": ("model.conditional", (True,)),
    "sampling.guidance": ("model.conditional", (True,)),
    "sampling.guidance_interval": ("model.conditional", (True,)),
}
"""Settings that some choices leave unused: by which setting, and for which of its values they are read (":" for a torch
data set)."""


def _same(value: object, other: object) -> bool:
    """Whether two settings mean the same: () and "" are None, and lists tuples."""
    a, b = (None if v in ((), [], "", None) else tuple(v) if isinstance(v, list) else v for v in (value, other))
    return a == b


def _check_used(config: ConfigDict) -> None:
    """Refuse (ValueError) a setting with a value of its own that what was chosen does not read."""
    default = default_config()
    for name, (choice, readers) in _USED.items():
        (part, key), (above, chooser) = name.split("."), choice.split(".")
        value, chosen = config[part][key], config[above][chooser]
        imported = isinstance(chosen, str) and ":" in chosen
        if _same(value, default[part][key]) or chosen in readers or (":" in readers and imported):
            continue
        reading = ", ".join(repr(r) if r != ":" else "a torch data set" for r in readers)
        raise ValueError(
            f"{name} is {value!r}, which {choice}={chosen!r} does not read (only {reading}): leave it out, or choose "
            "another"
        )


_PREDICTIONS = {"x0": X0, "eps": EPS, "score": SCORE, "v": V, "flow": FLOW}
_LABELS = ("log_sigma", "relative_log_sigma", "time", "index")
_INPUT_SCALES = ("process", "unit_variance", "unit_data")


_OPTIONAL = ("data.path", "data.size", "data.cache", "optim.clip")


def check_types(config: ConfigDict, default: ConfigDict | None = None, prefix: str = "") -> ConfigDict:
    """The config itself; refuses (ValueError) a missing or unknown key, or a value of another type than the default's.

    None stands for "none" where that means something: in _OPTIONAL.
    """
    default = default_config() if default is None else default
    unknown = [k for k in config if k not in default and prefix[:-1] not in (*PARTS, "evaluation")]
    if unknown:
        raise ValueError(f"unknown config key {prefix}{unknown[0]}; {nearest_name(unknown[0], list(default))}")
    for key, wanted in default.items():
        name, value = f"{prefix}{key}", config.get(key)
        if isinstance(wanted, ConfigDict):
            if not isinstance(value, ConfigDict):
                raise ValueError(f"config.{name} is {value!r}; expected the settings of default_config().{name}")
            check_types(value, wanted, f"{name}.")
        elif value is None and name in _OPTIONAL:
            continue
        elif isinstance(wanted, (tuple, list)):
            numbers = name.startswith("optim.ema") or name == "sampling.guidance_interval"
            kinds = (int, float) if numbers else (int,)
            if not isinstance(value, (tuple, list)) or any(
                isinstance(v, bool) or not isinstance(v, kinds) for v in value
            ):
                of = "numbers such as (0.05, 0.1)" if numbers else "whole numbers such as (1, 2)"
                raise ValueError(f"config.{name} is {value!r}; expected a tuple of {of}")
        elif type(value) is not type(wanted) and not (isinstance(wanted, float) and type(value) is int):
            raise ValueError(f"config.{name} is {value!r}; expected {type(wanted).__name__}, such as {wanted!r}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"config.{name} is {value!r}; expected a finite number")
    return config


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
        made.config = {k: v for k, v in {**_plain(settings), **known}.items() if k in takes}


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
    _check_used(config)
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


def upgraded(recorded: dict[str, Any]) -> dict[str, Any]:
    """A config that an earlier version wrote, all parts' settings in one list, as it would be written now."""
    if not isinstance(recorded.get("model", {}).get("net"), str):
        return recorded
    old, found = copy.deepcopy(recorded), copy.deepcopy(recorded)
    m, o, t, s = (found[group] for group in ("model", "optim", "training", "sampling"))

    def chosen(path: str, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        kind = PARTS[path]
        known = kind.settings(kind.maker(name, f"config.{path}"))
        return {"name": name, **{k: v for k, v in settings.items() if k in known}}

    found["process"] = chosen("process", old["process"]["name"], old["process"])
    net = {k: m.pop(k) for k in tuple(m) if k not in ("net", "prediction", "label", "input_scale", "conditional")}
    m["net"] = chosen("model.net", old["model"]["net"], net)
    if old["model"]["net"] == "mlp":
        m["label"] = m["input_scale"] = ""
    decay = {"decay_from": o.pop("decay_from", 10_000)}
    o["schedule"] = chosen("optim.schedule", old["optim"]["schedule"], decay)
    count = old["sampling"]["levels"]
    t["sigmas"] = chosen("training.sigmas", old["training"]["sigmas"], {"levels": count})
    t["weighting"] = {"name": old["training"]["weighting"]}
    t["objective"] = {"name": "denoising", "reference": t.pop("stable_target", 0)}
    ends = {k: s.pop(k, 0.0) or None for k in ("sigma_min", "sigma_max")}
    s["grid"] = chosen("sampling.grid", old["sampling"]["grid"], {"n": count, "steps": count, **ends})
    of = {k: s.pop(k) for k in ("levels", "steps", "step_size", "eta", "variance") if k in s}
    of["step_size"] = of.get("step_size") or None
    if old["sampling"]["sampler"] == "reverse_sde":
        # it had no eta of its own
        of.pop("eta", None)
    s["sampler"] = chosen("sampling.sampler", old["sampling"]["sampler"], of)
    if old["model"]["label"] == "index" and not old["process"]["name"].startswith("ddpm"):
        t["sigmas"] = chosen("training.sigmas", "sequence", {"levels": count})
    return found
