"""diffusers' schedulers, which say what a network there was trained for, as processes, noise levels and samplers.

A scheduler's config has the betas of DDPM's process (or the ends of a VE one), what the network predicts, and how so
many steps are chosen of all. Its time step t counts from 0, the least noise; sigma_t^2 = (1 - abar_t) / abar_t. What a
config leaves out is as its class has it by default. Betas are float64 here and float32 there, which moves the lowest
levels by about 1e-4 of their value.

Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, 2024, arXiv:2305.08891 (spacings, betas that
end without signal).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scorelab.adapters import clipped
from scorelab.checks import nearest_name
from scorelab.predictions import EPS, X0, Prediction, V
from scorelab.processes import VE, DiscreteVP, Process, cosine_betas
from scorelab.samplers import (
    DDIM,
    AdamsBashforth,
    Ancestral,
    DPMSolverMultistep,
    Euler,
    Heun,
    LangevinCorrector,
    PredictorCorrector,
    Sampler,
    SDEDPMSolver,
    State,
    UniPC,
    Wrapper,
)
from scorelab.samplers.base import Context, evaluate
from scorelab.sigmas import geometric, karras
from scorelab.typing import Tensor

__all__ = ["DEFAULTS", "Clipping", "config_of", "from_scheduler", "prediction_of", "process_of", "read_config"]

_BETAS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_CLIPPED: dict[str, Any] = {"clip_sample": True, "clip_sample_range": 1.0}
_SOLVER: dict[str, Any] = {
    "timestep_spacing": "linspace",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_MULTISTEP: dict[str, Any] = {
    **_BETAS,
    **_SOLVER,
    "solver_order": 2,
    "thresholding": False,
    "lower_order_final": True,
    "use_flow_sigmas": False,
    "final_sigmas_type": "zero",
    "rescale_betas_zero_snr": False,
    "use_dynamic_shifting": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {
        **_BETAS,
        **_CLIPPED,
        "variance_type": "fixed_small",
        "thresholding": False,
        "timestep_spacing": "leading",
        "rescale_betas_zero_snr": False,
    },
    "DDIMScheduler": {
        **_BETAS,
        **_CLIPPED,
        "set_alpha_to_one": True,
        "thresholding": False,
        "timestep_spacing": "leading",
        "rescale_betas_zero_snr": False,
    },
    "PNDMScheduler": {**_BETAS, "timestep_spacing": "leading"},
    "EulerDiscreteScheduler": {
        **_BETAS,
        **_SOLVER,
        "interpolation_type": "linear",
        "sigma_min": None,
        "sigma_max": None,
        "timestep_type": "discrete",
        "final_sigmas_type": "zero",
        "rescale_betas_zero_snr": False,
    },
    "EulerAncestralDiscreteScheduler": {**_BETAS, "timestep_spacing": "linspace", "rescale_betas_zero_snr": False},
    "HeunDiscreteScheduler": {
        **_BETAS,
        **_SOLVER,
        **_CLIPPED,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
    },
    "DPMSolverMultistepScheduler": {
        **_MULTISTEP,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "lambda_min_clipped": -float("inf"),
        "variance_type": None,
    },
    "UniPCMultistepScheduler": {
        **_MULTISTEP,
        "predict_x0": True,
        "solver_type": "bh2",
        "disable_corrector": [],
        "solver_p": None,
        "sigma_min": None,
        "sigma_max": None,
    },
    "ScoreSdeVeScheduler": {
        "num_train_timesteps": 2000,
        "snr": 0.15,
        "sigma_min": 0.01,
        "sigma_max": 1348.0,
        "correct_steps": 1,
    },
}
"""The schedulers that are known, with what matters here of their configs, as it is where a config leaves it out."""

_BUILT: dict[str, tuple[Any, ...]] = {
    "thresholding": (False,),
    "use_beta_sigmas": (False, None),
    "use_flow_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "use_dynamic_shifting": (False,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "predict_x0": (True,),
    "disable_corrector": ([], ()),
    "solver_p": (None,),
}
"""Values of the keys of which others are not built here."""


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError for a file that is not there or holds none."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; expected a config of diffusers")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no config ({str(error).partition(chr(10))[0]})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}; expected a config, by keys")
    return found


def config_of(source: object) -> dict[str, Any]:
    """The config of a scheduler of diffusers: of an object, its folder, its pipeline's, its file, or the config itself.

    Its class is under ``_class_name``. Raises ValueError for anything else.
    """
    if isinstance(source, (str, Path)):
        place = Path(source).expanduser()
        if place.is_dir():
            inner = place / "scheduler" / "scheduler_config.json"
            place = inner if inner.is_file() else place / "scheduler_config.json"
        return read_config(place)
    if isinstance(source, Mapping):
        return dict(source)
    config = getattr(source, "config", None)
    if not isinstance(config, Mapping):
        raise ValueError(f"got {type(source).__name__}; expected a scheduler of diffusers, its config or its folder")
    return {**config, "_class_name": type(source).__name__}


def _known(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A config's class, and its values with the defaults of that; ValueError for a class that is not known."""
    name = str(config.get("_class_name"))
    if name not in DEFAULTS:
        raise ValueError(f"scheduler {name!r} is not built here; {nearest_name(name, DEFAULTS)}")
    c = {key: config.get(key, default) for key, default in DEFAULTS[name].items()}
    for key, default in DEFAULTS[name].items():
        value, least = c[key], 0 if key in ("steps_offset", "correct_steps") else 1
        if type(default) is int and (type(value) is not int or value < least):
            raise ValueError(f"{key} of {name} is {value!r}; expected a whole number from {least} on")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and value < math.inf
        if isinstance(default, float) and not number:
            raise ValueError(f"{key} of {name} is {value!r}; expected a number")
        if key in ("beta_start", "beta_end") and not 0 < value < 1:
            raise ValueError(f"{key} of {name} is {value!r}; expected a number between 0 and 1")
        if key in ("sigma_min", "sigma_max") and value is not None and not (number and value > 0):
            raise ValueError(f"{key} of {name} is {value!r}; expected a positive number")
        if isinstance(default, (str, bool)) and not isinstance(value, (type(default), type(None))):
            raise ValueError(f"{key} of {name} is {value!r}; expected one such as {default!r}")
    if c["num_train_timesteps"] > 100_000:
        raise ValueError(f"num_train_timesteps of {name} is {c['num_train_timesteps']}; expected 100,000 at most")
    return name, c


def _betas(name: str, c: dict[str, Any]) -> Tensor:
    count, kind, low, high = c["num_train_timesteps"], c["beta_schedule"], c["beta_start"], c["beta_end"]
    if c["trained_betas"] is not None:
        given = c["trained_betas"].tolist() if isinstance(c["trained_betas"], np.ndarray) else c["trained_betas"]
        if not isinstance(given, (list, tuple)) or len(given) != count or any(type(v) is not float for v in given):
            raise ValueError(f"trained_betas of {name} is no list of {count} fractions, as num_train_timesteps says")
        found = torch.tensor(given, dtype=torch.float64)
    elif kind == "linear":
        found = torch.linspace(low, high, count, dtype=torch.float64)
    elif kind == "scaled_linear":
        found = torch.linspace(low**0.5, high**0.5, count, dtype=torch.float64) ** 2
    elif kind == "squaredcos_cap_v2":
        found = cosine_betas(count)
    elif kind == "sigmoid" and name == "DDPMScheduler":
        found = torch.linspace(-6, 6, count, dtype=torch.float64).sigmoid() * (high - low) + low
    else:
        raise ValueError(f"beta_schedule of {name} is {kind!r}, which is not built here")
    if c.get("rescale_betas_zero_snr"):
        raise ValueError(
            f"rescale_betas_zero_snr of {name} is true: its last step has no signal, a noise level of infinity, which "
            "no process here has; expected false"
        )
    return found


def process_of(config: dict[str, Any]) -> Process:
    """The process of a scheduler's config: DDPM's in steps, or VE.

    Raises ValueError for a class that is not known, for betas that are none, and for a last level of infinity.
    """
    name, c = _known(config)
    if name == "ScoreSdeVeScheduler":
        return VE(c["sigma_min"], c["sigma_max"])
    return DiscreteVP(_betas(name, c))


def prediction_of(config: dict[str, Any]) -> Prediction:
    """What the network predicts; of a VE scheduler's the noise, which is the score there times -sigma."""
    name, c = _known(config)
    kinds = {"epsilon": EPS, "v_prediction": V, "sample": X0}
    kind = c.get("prediction_type", "epsilon")
    if kind not in kinds:
        raise ValueError(f"prediction_type of {name} is {kind!r}; {nearest_name(str(kind), kinds)}")
    return kinds[kind]


@dataclass(frozen=True)
class Clipping(Wrapper):
    """A sampler whose denoised samples are clamped to [-limit, limit] at every step.

    noise_kept: the noise in x stays as it was estimated before that, as in diffusers' DDIM; else it is what then lies
    between x and the denoised sample, as in ``scorelab.clipped``.
    """

    sampler: Sampler
    limit: float = 1.0
    noise_kept: bool = False

    @property
    def inner(self) -> Sampler:
        """The sampler itself."""
        return self.sampler

    def step(self, at: Context) -> tuple[Tensor, State]:
        if not self.noise_kept:
            return self.sampler.step(at._replace(score=clipped(at.score, -self.limit, self.limit)))
        score = evaluate(at.score, at.x, at.sigma)
        x0_hat = at.x.add(score, alpha=at.sigma**2)
        x, state = self.sampler.step(at._replace(score=lambda x, sigma: score))
        return x + (x0_hat.clamp(-self.limit, self.limit) - x0_hat), state


def _timesteps(name: str, c: dict[str, Any], steps: int, lambdas: Tensor) -> np.ndarray[Any, Any]:
    """The steps that a scheduler visits, descending; fractions between them for those of k-diffusion's kind."""
    total, spacing = c["num_train_timesteps"], c["timestep_spacing"]
    # the multistep solvers count one more, their end
    beyond = name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
    whole = beyond or name in ("DDPMScheduler", "DDIMScheduler")
    # steps of less signal than this are left out
    last = total - int((lambdas < c.get("lambda_min_clipped", -np.inf)).sum())
    if spacing == "trailing":
        found = np.round(np.arange(last, 0, -total / steps)) - 1
    elif spacing == "leading":
        found = np.arange(steps + beyond)[::-1] * (last // (steps + beyond)) + c["steps_offset"]
    else:
        found = np.linspace(0, last - 1, steps + beyond)[::-1]
        found = np.round(found) if whole else found
    found = found[:steps] if beyond else found
    if not len(found) or found[0] > total - 1 or (np.diff(found) >= 0).any():
        raise ValueError(
            f"{steps} steps of {name} with {spacing!r} spacing and steps_offset {c['steps_offset']} are none of "
            f"{total} in all, each once; expected fewer"
        )
    return found


def _grid(name: str, c: dict[str, Any], steps: int) -> list[float]:
    """The noise levels of a scheduler's steps, descending, and what it ends at."""
    levels = DiscreteVP(_betas(name, c)).step_sigmas.numpy()
    times = _timesteps(name, c, steps, -torch.from_numpy(levels).log())
    grid = np.interp(times, np.arange(len(levels)), levels)
    if c.get("use_karras_sigmas") or c.get("use_exponential_sigmas"):
        # of the levels visited, or of all
        visited = grid if name in ("EulerDiscreteScheduler", "HeunDiscreteScheduler") else levels[::-1]
        low, high = (c.get(k) for k in ("sigma_min", "sigma_max"))
        ends = {"sigma_min": low or float(visited[-1]), "sigma_max": high or float(visited[0])}
        made = karras(steps, **ends)[:-1] if c["use_karras_sigmas"] else geometric(steps, **ends)
        grid = made.numpy()
    last = 0.0
    if name == "DDIMScheduler":
        stride = len(levels) // steps
        if (times[:-1] - stride != times[1:]).any():
            raise ValueError(
                f"DDIMScheduler with {c['timestep_spacing']!r} spacing ends its {steps} steps {stride} below where "
                "they begin, which is not where the next begins; expected 'leading', or 'trailing' with a number that "
                f"divides {len(levels)}"
            )
        before = int(times[-1]) - stride
        last = float(levels[before]) if before >= 0 else 0.0 if c["set_alpha_to_one"] else float(levels[0])
        if math.isclose(last, grid[-1]) and c["clip_sample"]:
            raise ValueError(
                "set_alpha_to_one is false and clip_sample true: the last step clips, at the level where it begins, "
                "which no sampler here does; expected one of them otherwise"
            )
    elif c.get("final_sigmas_type") == "sigma_min":
        own = name == "UniPCMultistepScheduler" and (c["use_karras_sigmas"] or c["use_exponential_sigmas"])
        last = float(grid[-1] if own else levels[0])
    # a step to its own level changes nothing
    return [float(s) for s in grid] + ([] if math.isclose(last, grid[-1]) else [last])


_VARIANCES = {
    "fixed_small": "posterior",
    "fixed_small_log": "posterior",
    "fixed_large": "forward",
    "learned_range": "learned",
}


def _sampler(name: str, c: dict[str, Any], grid: list[float], first: float) -> Sampler:
    """Whose steps on this grid are the scheduler's; ``first``: the process's lowest level."""
    if name == "DDPMScheduler":
        kind = c["variance_type"]
        if kind not in _VARIANCES:
            raise ValueError(f"variance_type is {kind!r}; {nearest_name(str(kind), _VARIANCES)}")
        if not kind.startswith("fixed_small") and grid[-2] > first * (1 + 1e-9):
            raise ValueError(
                f"variance_type {kind!r} adds noise to the end of steps that leave out the first, as "
                f"{c['timestep_spacing']!r} spacing with steps_offset {c['steps_offset']} does; expected 'fixed_small'"
            )
        made: Sampler = Ancestral(_VARIANCES[kind])
    elif name in ("DDIMScheduler", "EulerDiscreteScheduler"):
        made = DDIM() if name == "DDIMScheduler" else Euler()
    elif name == "EulerAncestralDiscreteScheduler":
        made = DDIM(eta=1.0)
    elif name == "HeunDiscreteScheduler":
        made = Heun()
    else:
        made = _multistep(name, c, grid)
    if c.get("clip_sample"):
        made = Clipping(made, float(c["clip_sample_range"]), name == "DDIMScheduler")
    return made


def _multistep(name: str, c: dict[str, Any], grid: list[float]) -> Sampler:
    order, short = c["solver_order"], len(grid) - 1 < 15
    lower = (
        c["lower_order_final"]
        if name == "UniPCMultistepScheduler"
        else c["euler_at_final"] or (c["lower_order_final"] and short)
    )
    if order > 1 and grid[-1] > 0 and lower:
        raise ValueError(
            f"{name} lowers the order of its last step, to {grid[-1]:.4g}, which no sampler here does; expected "
            "final_sigmas_type 'zero', or lower_order_final false"
        )
    if name == "UniPCMultistepScheduler":
        if order > 2 or c["solver_type"] not in ("bh1", "bh2"):
            raise ValueError(
                f"solver_order = {order}, solver_type = {c['solver_type']!r} of {name} is not built here, for the "
                "order of its last steps falls; expected an order of 1 or 2, of 'bh1' or 'bh2'"
            )
        return UniPC(order, c["solver_type"])
    solvers: dict[tuple[Any, ...], Sampler] = {
        ("dpmsolver++", 2, "midpoint"): DPMSolverMultistep(2),
        ("dpmsolver++", 2, "heun"): AdamsBashforth(2, "x0"),
        ("sde-dpmsolver++", 2, "midpoint"): SDEDPMSolver(1.0),
    }
    solvers |= {("dpmsolver++", 1, kind): Euler() for kind in ("midpoint", "heun")}
    solvers |= {("sde-dpmsolver++", 1, kind): Ancestral() for kind in ("midpoint", "heun")}
    key = c["algorithm_type"], order, c["solver_type"]
    if key not in solvers:
        raise ValueError(
            f"algorithm_type = {key[0]!r}, solver_order = {order}, solver_type = {key[2]!r} is not built here; "
            "expected 'dpmsolver++' or 'sde-dpmsolver++' of order 1 or 2 (its third order is not scorelab's "
            "DPMSolverMultistep(3): it weighs the second difference by half)"
        )
    return solvers[key]


def _centres(source: object) -> bool:
    """Whether the network in a pipeline's folder takes data in [0, 1], which it puts into [-1, 1] itself."""
    places = (
        [Path(source).expanduser() / name for name in ("unet/config.json", "config.json")]
        if isinstance(source, (str, Path))
        else []
    )
    return any(read_config(place).get("center_input_sample") is True for place in places if place.is_file())


def from_scheduler(source: object, steps: int) -> tuple[Tensor, Sampler]:
    """Noise levels (float64, descending, unscaled) and the sampler whose steps on them are a scheduler's.

    source: a scheduler of diffusers, its config with ``_class_name``, or a folder; steps: as for its set_timesteps.
    ``sample(model, shape, *from_scheduler(folder, 50), data_std=1)`` starts as its pipeline does, for x there begins
    with variance 1. clip_sample is part of the sampler. VE's levels are twice as large where the folder's network
    centres data from [0, 1], for they are of data in [-1, 1].

    Karras's levels, and the fractions between steps that Euler's and Heun's "linspace" visits, are those of diffusers;
    a network is told where they lie among the steps' logarithms, where diffusers rounds, or says another fraction.

    Raises ValueError for what is not built here, naming the class or key: classes other than ``DEFAULTS``, PNDM's
    steps, dynamic thresholding, steps whose ends are not where the next begin.
    """
    name, c = _known(config_of(source))
    if type(steps) is not int or not 1 <= steps <= c["num_train_timesteps"]:
        raise ValueError(f"steps is {steps!r}; expected a whole number from 1 to {c['num_train_timesteps']}")
    if name == "PNDMScheduler":
        raise ValueError(
            "the steps of PNDMScheduler are none of scorelab's samplers; expected scorelab.interop.as_sampler(...), "
            "which asks diffusers for them"
        )
    if name == "ScoreSdeVeScheduler":
        scale = 2.0 if _centres(source) else 1.0
        low, high = scale * c["sigma_min"], scale * c["sigma_max"]
        sampler: Sampler = Ancestral("forward", VE(low, high))
        if c["correct_steps"]:
            corrector = LangevinCorrector(c["snr"], c["correct_steps"])
            sampler = PredictorCorrector(sampler, corrector, corrector_first=True)
        levels = geometric(steps, sigma_min=low, sigma_max=high)
        return torch.cat([levels, torch.zeros(1, dtype=torch.float64)]), sampler
    for key, built in _BUILT.items():
        if key in c and c[key] not in built:
            expected = " or ".join(map(repr, built))
            raise ValueError(f"{key} of {name} is {c[key]!r}, which is not built here; expected {expected}")
    grid = _grid(name, c, steps)
    if len(grid) < 2 or any(b >= a for a, b in pairwise(grid)):
        raise ValueError(f"{steps} steps of {name} make no descending levels; expected another number of them")
    found = _sampler(name, c, grid, float(DiscreteVP(_betas(name, c)).step_sigmas[0]))
    return torch.tensor(grid, dtype=torch.float64), found
