"""What can be set: every key with its default, and the parts that a config names.

What can be set of a part stands beside its code; ``resolve`` fills it in. Any other key is refused, naming the nearest.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import nn

from scorelab.checks import nearest_name
from scorelab.codecs import CODECS, Codec
from scorelab.latent import autoencoded, semantic
from scorelab.losses import OBJECTIVES, WEIGHTINGS, Objective
from scorelab.nn import NETWORKS
from scorelab.parts import Kind
from scorelab.processes import PROCESSES, Process
from scorelab.samplers import CORRECTORS, SAMPLERS, Corrector, Sampler
from scorelab.sigmas import GRIDS, LEVELS, SigmaDistribution
from scorelab.training.measures import Distance, Evaluation
from scorelab.training.optim import OPTIMISERS, SCHEDULES

__all__ = [
    "EVALUATION",
    "PARTS",
    "beside",
    "check_types",
    "check_used",
    "default_config",
    "named_part",
    "part",
    "plain",
    "resolve",
]

_CODECS = {**CODECS, "autoencoder": autoencoded, "semantic": semantic}
_INNER = Kind("sampler", SAMPLERS, Sampler)
PARTS = {
    "model.net": Kind("network", NETWORKS, nn.Module, given=("data_shape", "num_classes", "null_class")),
    "model.codec": Kind("codec", _CODECS, Codec, given=("data_shape", "scaled")),
    "process": Kind("process", PROCESSES, Process),
    "optim": Kind("optimiser", OPTIMISERS, torch.optim.Optimizer),
    "optim.schedule": Kind("schedule", SCHEDULES),
    "training.sigmas": Kind("levels", LEVELS, SigmaDistribution),
    "training.weighting": Kind("weighting", WEIGHTINGS),
    "training.objective": Kind("objective", OBJECTIVES, Objective, given=("num_classes",)),
    "sampling.grid": Kind("grid", GRIDS),
    "sampling.sampler": Kind(
        "sampler",
        SAMPLERS,
        Sampler,
        {"predictor": _INNER, "inner": _INNER, "corrector": Kind("corrector", CORRECTORS, Corrector)},
    ),
}
"""Where a config chooses parts."""
EVALUATION = Kind("evaluation", {"distance": Distance}, Evaluation, given=("called",))
"""What a config may measure besides the loss at fixed noise and samples, which have keys of their own."""


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
                "path": "",  # of the files, for the sources that read some
                "size": (),  # (height, width): images are scaled to cover it and cropped at the centre
                "grayscale": False,  # of colour images
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
                # the directory of a saved model to go on from, with its network, process and prediction; "": a new one
                "saved": "",
                "net": {"name": "auto"},
                "codec": {"name": "auto"},
                "prediction": "edm",  # x0 | eps | score | v | flow | edm
                # log_sigma | relative_log_sigma (log sigma/sigma_data) | time | index (of a sequence's or of DDPM's
                # levels); "": what the network wants
                "label": "",
                "index_order": "ascending",  # of label=index: 0 is the least noise, or the most with "descending"
                "label_scale": 0.0,  # what the label is multiplied by; 0: what the network wants, if it says so, else 1
                # process | unit_variance | unit_data (over sigma_data); "": what the network wants, if it says so, else
                # unit_variance for edm, process for all others
                "input_scale": "",
                "sigma_data": 0.0,  # the scale that edm and the like take for the data's; 0: its root mean square
                "conditional": False,  # on the data's labels
            },
            "process": {"name": "ve"},
            "optim": {
                "name": "adam",
                "warmup": 100,  # steps over which the learning rate rises from 0
                "schedule": {"name": "constant"},
                "clip": 1.0,  # of the gradient's norm, 0 or None: none
                "ema": (0.999,),  # decays of the averages of the weights; sampling takes the first
                "ema_power": (),  # relative widths of power-function averages, such as (0.05, 0.1)
            },
            "training": {
                "steps": 1000,
                "batch_size": 64,  # of all processes together
                "sigmas": {"name": "auto"},  # the noise levels that are visited
                "weighting": {"name": "output"},
                "objective": {"name": "denoising"},
                "label_dropout": 0.0,  # the share of labels that are left out, which guidance needs: 0.1 for example
                "precision": "auto",  # auto | fp32 | bf16
                "channels_last": "auto",  # auto | yes | no: how images lie in memory
                "compile": False,  # torch.compile the network: minutes of start, faster steps
                "activation_checkpointing": False,  # activations are computed again in the backward pass, for memory
                "fsdp": False,  # under torchrun: weights and all that goes with them are spread over the processes
                "accumulate": 1,  # parts a batch is worked through in, for memory
                "skip_nonfinite": 0,  # how many steps with a loss or gradient that is not finite are left out
                "checkpoint_every": 500,  # steps
                "keep_last": 3,  # checkpoints, 0: all
                "keep_every": 0,  # and those of multiples of this step, 0: none besides
                "log_every": 50,  # steps between two rows of metrics.jsonl
                "validate_every": 500,  # loss at fixed noise, 0: never
                "sample_every": 1000,  # samples, as `scorelab sample` writes them, 0: never
            },
            "sampling": {
                "sampler": {"name": "heun"},
                "grid": {"name": "karras"},
                "clip": False,  # clamp the denoised sample to the data range
                "guidance": 1.0,  # scale of classifier-free guidance: 1 conditional, 0 unconditional, more extrapolates
                "guidance_interval": (),  # (low, high): the noise levels at which it guides; (): all
                "guidance_rescale": 0.0,  # share of the guided deviation that is brought back to the conditional one's
                "samples": 64,  # how many are drawn
                "batch_size": 256,  # at once
            },
            # what is measured besides while training, by names of one's own, as in c.evaluation.pixels = {"name":
            # "distance", "every": 1000}
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
        resolved = kind.resolve(plain(given), f"config.{path}", defaults.get(path, {}), others)
        place = _at(found, path)
        with place.unlocked(), place.ignore_type():
            for key, value in resolved.items():
                if key not in others:
                    place[key] = value
        place.unlock()
    for name, given in config.evaluation.items():
        if not isinstance(given, ConfigDict):
            raise ValueError(
                f"config.evaluation.{name} is {given!r}; expected {{'name': 'distance'}} and its settings, or those of "
                "package.module:Class"
            )
        found.evaluation[name] = ConfigDict(EVALUATION.resolve(plain(given), f"config.evaluation.{name}"))
    return found


def plain(given: ConfigDict) -> dict[str, Any]:
    """Its settings, those of parts inside as dicts."""
    return {k: plain(v) if isinstance(v, ConfigDict) else v for k, v in given.items()}


def part(config: ConfigDict, path: str, **context: Any) -> Any:
    """The part that a resolved config names; what its settings leave open comes from ``context``."""
    others = beside(path)
    given = {k: v for k, v in plain(_at(config, path)).items() if k not in others}
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
    "sampling.guidance_rescale": ("model.conditional", (True,)),
}
"""Settings that some choices leave unused: by which setting, and for which of its values they are read (":" for a torch
data set)."""


def _same(value: object, other: object) -> bool:
    """Whether two settings mean the same: () and "" are None, and lists tuples."""
    a, b = (None if v in ((), [], "", None) else tuple(v) if isinstance(v, list) else v for v in (value, other))
    return a == b


def check_used(config: ConfigDict) -> None:
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
