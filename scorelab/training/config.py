"""What an experiment is: a config file returns ``default_config()`` with its own values, and ``build`` makes the parts.

Every key an experiment may set stands in ``default_config``; ml_collections refuses any other, naming the nearest.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from ml_collections import ConfigDict

from scorelab import sigmas as levels
from scorelab.checks import nearest_name
from scorelab.data import Files, Source, load
from scorelab.losses import Denoising, Implicit, Objective, Sliced, weighting
from scorelab.models import Constant, LogSigma, ScoreModel, UnitVariance
from scorelab.nn import MLP, UNet
from scorelab.predictions import EPS, FLOW, SCORE, X0, V, edm
from scorelab.processes import VE, VP, Cosine, DiscreteVP, Flow, Process, SubVP, cosine_betas, linear_betas
from scorelab.typing import Batch, Tensor

__all__ = ["Experiment", "build", "choose", "default_config", "load_data", "sigma_data_of"]


def default_config() -> ConfigDict:
    """Every setting with its default value; locked, so that an unknown key is refused with the nearest name."""
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
                "net": "unet",  # unet | mlp
                "prediction": "eps",  # x0 | eps | score | v | flow | edm
                "label": "log_sigma",  # log_sigma | time | index (of a sequence's or of DDPM's levels)
                "input_scale": "process",  # process | unit_variance
                "width": 64,
                "multipliers": (1, 2),
                "blocks": 2,
                "attention": (),
                "head": 64,
                "dropout": 0.0,
                "depth": 3,
                "features": 32,
                "conditional": False,  # on the data's labels
            },
            "process": {
                "name": "ve",  # ve | vp | subvp | cosine | flow | ddpm | ddpm_cosine
                "sigma_min": 0.01,
                "sigma_max": 50.0,
                "beta_min": 0.1,
                "beta_max": 20.0,
                "steps": 1000,
            },
            "optim": {
                "name": "adam",  # adam | adamw
                "lr": 2e-4,
                "beta1": 0.9,
                "beta2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "warmup": 100,
                # constant | cosine (to 0 at training.steps) | inverse_sqrt (lr sqrt(decay_from/step) after decay_from)
                "schedule": "constant",
                "decay_from": 10_000,
                "clip": 1.0,  # of the gradient's norm, 0 or None: none
                "ema": (0.999,),  # decays of the averages of the weights; sampling takes the first
                "ema_power": (),  # relative widths of power-function averages, such as (0.05, 0.1)
            },
            "training": {
                "steps": 1000,
                "batch_size": 128,
                # process (uniform in time) | log_uniform | tapered (a tenth above twice the data's root mean square) |
                # sequence (geometric, sampling.levels)
                "sigmas": "process",
                "objective": "denoising",  # denoising | implicit | sliced
                "probes": 1,  # of sliced score matching
                "label_dropout": 0.0,  # the share of labels that are left out, which guidance needs: 0.1 for example
                "weighting": "sigma2",  # sigma2 | snr | x0 | edm | min_snr | likelihood
                "stable_target": 0,  # size of the reference batch, 0: the plain denoising target
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
                "sampler": "heun",  # annealed_langevin | ancestral | ddim | euler | heun | reverse_sde | ode
                "levels": 18,
                "grid": "karras",  # karras | geometric | log_linear | process (uniform in time) | steps (DDPM's own)
                "sigma_min": 0.0,  # 0: the model's own
                "sigma_max": 0.0,
                "steps": 100,  # Langevin steps a level
                "step_size": 0.0,  # of Langevin steps at the last level; 0: by NCSNv2's rule for the levels
                "eta": 0.0,
                "variance": "posterior",
                "clip": False,  # clamp the denoised sample to the data range
                "guidance": 1.0,  # scale of classifier-free guidance: 1 conditional, 0 unconditional, more extrapolates
                "guidance_interval": (),  # (low, high): the noise levels at which it guides; (): all
                "samples": 64,
                "batch_size": 256,
            },
        }
    )
    return config.lock()


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
    **{
        f"model.{key}": ("model.net", ("unet",))
        for key in ("label", "input_scale", "multipliers", "blocks", "attention", "head", "dropout")
    },
    **{f"model.{key}": ("model.net", ("mlp",)) for key in ("depth", "features")},
    **{f"process.{key}": ("process.name", ("ve",)) for key in ("sigma_min", "sigma_max")},
    **{f"process.{key}": ("process.name", ("vp", "subvp")) for key in ("beta_min", "beta_max")},
    "training.label_dropout": ("model.conditional", (True,)),
    "sampling.guidance": ("model.conditional", (True,)),
    "sampling.guidance_interval": ("model.conditional", (True,)),
    "training.stable_target": ("training.objective", ("denoising",)),
    "training.probes": ("training.objective", ("sliced",)),
    "process.steps": ("process.name", ("ddpm", "ddpm_cosine")),
    "optim.decay_from": ("optim.schedule", ("inverse_sqrt",)),
    "sampling.eta": ("sampling.sampler", ("ddim",)),
    "sampling.variance": ("sampling.sampler", ("ancestral",)),
    **{f"sampling.{key}": ("sampling.sampler", ("annealed_langevin",)) for key in ("steps", "step_size")},
    **{
        f"sampling.{key}": ("sampling.grid", ("karras", "geometric", "log_linear"))
        for key in ("sigma_min", "sigma_max")
    },
}
"""Settings that some choices leave unused: by which setting, and for which of its values they are read (":" for a torch
data set)."""


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value or None if value in ((), "", None) else value


def _check_used(config: ConfigDict) -> None:
    """Refuse (ValueError) a setting with a value of its own that what was chosen does not read."""
    default = default_config()
    for name, (choice, readers) in _USED.items():
        (part, key), (above, chooser) = name.split("."), choice.split(".")
        value, chosen = config[part][key], config[above][chooser]
        imported = isinstance(chosen, str) and ":" in chosen
        if _plain(value) == _plain(default[part][key]) or chosen in readers or (":" in readers and imported):
            continue
        reading = ", ".join(repr(r) if r != ":" else "a torch data set" for r in readers)
        raise ValueError(
            f"{name} is {value!r}, which {choice}={chosen!r} does not read (only {reading}): leave it out, or choose "
            "another"
        )


_PROCESSES = ("ve", "vp", "subvp", "cosine", "flow", "ddpm", "ddpm_cosine")
_PREDICTIONS = {"x0": X0, "eps": EPS, "score": SCORE, "v": V, "flow": FLOW}


_OPTIONAL = ("data.path", "data.size", "data.cache", "optim.clip", "sampling.sigma_min", "sampling.sigma_max")


def check_types(config: ConfigDict, default: ConfigDict | None = None, prefix: str = "") -> None:
    """Refuse (ValueError) a missing or unknown key, or a value of another type than the default's.

    None stands for "none" where that means something: in _OPTIONAL.
    """
    default = default_config() if default is None else default
    unknown = [k for k in config if k not in default]
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


def build_process(config: ConfigDict) -> Process:
    """The process of ``config.process``."""
    c = config.process
    name = choose(c.name, _PROCESSES, "process.name")
    if name == "ve":
        return VE(c.sigma_min, c.sigma_max)
    if name in ("vp", "subvp"):
        return (VP if name == "vp" else SubVP)(c.beta_min, c.beta_max)
    if name in ("cosine", "flow"):
        return Cosine() if name == "cosine" else Flow()
    return DiscreteVP(linear_betas(c.steps) if name == "ddpm" else cosine_betas(c.steps))


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


def _network(config: ConfigDict, data: Source) -> torch.nn.Module:
    """The network of ``config.model``, with weights drawn from ``config.seed``."""
    m, data_shape, classes = config.model, data.data_shape, _classes(config, data)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        if choose(m.net, ("unet", "mlp"), "model.net") == "mlp":
            return MLP(data_shape, width=m.width, depth=m.depth, features=m.features, **classes)
        return UNet(
            data_shape,
            width=m.width,
            multipliers=tuple(m.multipliers),
            blocks=m.blocks,
            attention=tuple(m.attention),
            head=m.head,
            dropout=m.dropout,
            embedding="positional" if m.label == "index" else "fourier",
            **classes,
        )


def _objective(config: ConfigDict, distribution: levels.SigmaDistribution, sigma_data: float) -> Objective:
    """The objective of ``config.training``."""
    t = config.training
    weight = weighting(t.weighting, sigma_data=sigma_data, sigmas=distribution)
    name = choose(t.objective, ("denoising", "implicit", "sliced"), "training.objective")
    if name == "denoising":
        return Denoising(distribution, weight, t.stable_target)
    return Implicit(distribution, weight) if name == "implicit" else Sliced(distribution, weight, t.probes)


def _levels(kind: str, process: Process, sequence: Tensor, sigma_data: float) -> levels.SigmaDistribution:
    """Which noise levels training visits, ``training.sigmas``."""
    choose(kind, ("process", "log_uniform", "tapered", "sequence"), "training.sigmas")
    low, high = process.sigma_range
    if kind == "sequence":
        return levels.FromSigmas(sequence)
    if kind == "log_uniform":
        return levels.LogUniform(low, high)
    if kind == "tapered":
        return levels.Tapered(low, 2 * sigma_data, high)
    return (
        levels.FromSigmas(process.step_sigmas.flip(0))
        if isinstance(process, DiscreteVP)
        else levels.FromProcess(process)
    )


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


def build(config: ConfigDict, *, sigma_data: float | None = None) -> Experiment:
    """All parts; weights are drawn from ``config.seed`` without touching global random state.

    sigma_data: what a model was made for, where the data may have changed since; None: the data's root mean square.

    Raises ValueError for a value that is not known or does not fit, naming the key.
    """
    m, t = config.model, config.training
    check_types(config)
    _check_training(config)
    data = load_data(config)
    reference, process = data.reference(), build_process(config)
    _warn_of_scale(reference, process)
    sigma_data = sigma_data_of(reference) if sigma_data is None else sigma_data
    net = _network(config, data)
    prediction = (
        edm(sigma_data)
        if m.prediction == "edm"
        else _PREDICTIONS[choose(m.prediction, (*_PREDICTIONS, "edm"), "model.prediction")]
    )
    low, high = process.sigma_range
    sequence = levels.geometric(config.sampling.levels, sigma_min=low, sigma_max=high)
    label: Any = choose(m.label, ("log_sigma", "time", "index"), "model.label")
    scale: Any = choose(m.input_scale, ("process", "unit_variance"), "model.input_scale")
    if isinstance(net, MLP):
        scale, label = Constant(1 / sigma_data), LogSigma(sigma_data)
    elif scale == "unit_variance":
        scale = UnitVariance(sigma_data)
    model = ScoreModel(
        net,
        process,
        prediction,
        data_shape=data.data_shape,
        data_range=None if data.values is None else data.values.ends,
        input_scale=scale,
        label=label,
        levels=None if isinstance(process, DiscreteVP) or label != "index" else sequence,
    )
    distribution = _levels(t.sigmas, process, sequence, sigma_data)
    objective = _objective(config, distribution, sigma_data)
    _check_used(config)
    held_out = data.hold_out(config.data.validation) if config.data.validation else None
    return Experiment(data, model, objective, held_out, sigma_data)
