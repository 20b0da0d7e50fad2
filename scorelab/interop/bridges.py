"""Samplers across the border: a diffusers scheduler as a scorelab sampler, and a sampler as a scheduler.

A scheduler is told the network's output and returns the next x, which is either scaled, alpha x with
alpha = 1/sqrt(1 + sigma^2), or unscaled, and then scaled for the network by its ``scale_model_input``. A sampler asks a
score function instead. Turned into a scheduler, its step is run once for each evaluation: it replays those known, with
the noise drawn before, and where it asks for another it is left at that place.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from scorelab.checks import broadcast, level_of
from scorelab.interop.schedulers import config_of, prediction_of
from scorelab.models import ScoreModel
from scorelab.noise import counter_generator
from scorelab.predictions import EPS, SCORE, Prediction, coefficients
from scorelab.processes import DiscreteVP, Process
from scorelab.samplers import Sampler, State
from scorelab.samplers.base import Context, evaluate, grid_of
from scorelab.sigmas import from_betas
from scorelab.typing import Tensor

__all__ = ["SamplerScheduler", "SchedulerSampler", "as_sampler", "as_scheduler"]


def _package(name: str) -> Any:
    """A module of the diffusers package; ValueError where that is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"this needs the diffusers package ({error}); expected it installed: pip install 'scorelab[interop]'"
        ) from error


def as_sampler(source: object, steps: int) -> SchedulerSampler:
    """A scheduler of diffusers as a sampler with levels of its own: ``sample(score, x, sampler=as_sampler(s, 50))``.

    source: a live scheduler, of which a copy is taken, or a config or folder of one, which diffusers then makes. Any is
    taken whose ``step`` follows from the last outputs for noise, data or v. Its random numbers follow, for each sample,
    from the noise that the sampler is given. Unlike ``from_scheduler`` it needs diffusers for every step.

    Raises ValueError for a scheduler that is none, and for one of flows, VE, EDM or levels that don't descend.
    """
    if isinstance(source, (str, Path, Mapping)):
        config = config_of(source)
        package, name = _package("diffusers"), str(config.get("_class_name"))
        kind = getattr(package, name, None)
        if not (isinstance(kind, type) and issubclass(kind, package.SchedulerMixin)):
            raise ValueError(f"diffusers has no scheduler {name!r}; expected one of its schedulers' configs")
        source = getattr(package, name).from_config(config)
    return SchedulerSampler(source, steps)


class SchedulerSampler(Sampler):
    """See ``as_sampler``; ``sigmas`` are its levels."""

    def __init__(self, scheduler: object, steps: int) -> None:
        made: Any = copy.deepcopy(scheduler)
        config, name = config_of(made), type(made).__name__
        foreign = config.get("use_flow_sigmas") or "sigma_data" in config or "prediction_type" not in config
        if foreign or not hasattr(made, "step") or not hasattr(made, "alphas_cumprod"):
            raise ValueError(f"{name} is no scheduler of DDPM's process in steps; expected one such as DDIMScheduler")
        if "learned" in str(config.get("variance_type")):
            raise ValueError(f"{name} takes a learned variance, which no score has; expected from_scheduler(...)")
        made.set_timesteps(steps)
        self.scheduler, self.prediction = made, prediction_of({"_class_name": "DDIMScheduler", **_named(config)})
        self.each, count = int(made.order), len(made.timesteps)
        self.levels = _levels(made)
        # of several evaluations a step all but the last step have them all
        ends = [min(i, count) for i in range(0, count + self.each, self.each)]
        self.sigmas = tuple(self.levels[i] for i in ends)
        if len(self.levels) != count + 1 or any(b >= a for a, b in zip(self.sigmas, self.sigmas[1:], strict=False)):
            raise ValueError(
                f"{steps} steps of {name} have no descending levels; expected another number, or scheduler"
            )
        probe, one = copy.deepcopy(made), torch.ones(1, 1, 1, 1)
        self.scaled = bool((probe.scale_model_input(one, probe.timesteps[0]) == one).all())
        self.random = "generator" in inspect.signature(made.step).parameters

    def init(self, x: Tensor, sigmas: list[float]) -> State:
        return copy.deepcopy(self.scheduler), 0

    def step(self, at: Context) -> tuple[Tensor, State]:
        scheduler, first = at.state
        sample = at.x * self._alpha(self.levels[first])
        options: dict[str, Any] = {}
        if self.random:
            bits = at.noise(at.x).flatten(1)[:, 0].double().view(torch.int64).tolist()
            options["generator"] = [counter_generator(seed, first) for seed in bits]
        last = min(first + self.each, len(self.levels) - 1)
        for i in range(first, last):
            level, t = self.levels[i], scheduler.timesteps[i]
            x = sample / self._alpha(level)
            score = evaluate(at.score, x, level)
            sigma = torch.tensor(level, dtype=torch.float64)
            a, b = (float(v) for v in coefficients(sigma, SCORE, self.prediction))
            scheduler.scale_model_input(sample, t)
            sample = scheduler.step(a * x + b * score, t, sample, **options).prev_sample
        return sample / self._alpha(self.levels[last]), (scheduler, last)

    def _alpha(self, sigma: float) -> float:
        """What x is multiplied by to be the scheduler's."""
        return float((1 + sigma**2) ** -0.5) if self.scaled else 1.0


def _named(config: dict[str, Any]) -> dict[str, Any]:
    return {"prediction_type": config["prediction_type"]}


def _levels(scheduler: Any) -> list[float]:
    """The level of every evaluation of a scheduler, and that of its end."""
    own = getattr(scheduler, "sigmas", None)
    if own is not None and len(own) == len(scheduler.timesteps) + 1:
        return [float(s) for s in own]
    abar = scheduler.alphas_cumprod.double().cpu()
    sigmas = ((1 - abar) / abar).sqrt()
    end = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    return [*sigmas[scheduler.timesteps.long().cpu()].tolist(), ((1 - end) / end) ** 0.5]


class _Asked(Exception):
    """A sampler's step asks for the score of x at a level that is not known yet."""

    def __init__(self, x: Tensor, sigma: float) -> None:
        super().__init__("an evaluation")
        self.x, self.sigma = x, sigma


def as_scheduler(
    sampler: Sampler,
    model: ScoreModel | None = None,
    *,
    process: Process | None = None,
    prediction: Prediction = EPS,
    sigmas: Callable[[int], Tensor] | None = None,
) -> SamplerScheduler:
    """A sampler as a scheduler for diffusers' pipelines: ``DDPMPipeline(unet, as_scheduler(Heun(), model))``.

    model: says process and prediction, or these themselves; sigmas: levels for a number of steps, by default those of
    the process's steps, evenly spread, and 0. A sampler of several evaluations has as many time steps. DDIMPipeline
    makes a DDIM of any scheduler: put this one into ``pipeline.scheduler`` afterwards.

    Needs the diffusers package: ValueError without. Raises ValueError for a process that is not in steps, and for
    samplers whose levels depend on x.
    """
    if not isinstance(sampler, Sampler):
        raise ValueError(f"sampler is {sampler!r}; expected a sampler such as scorelab.samplers.Heun()")
    if model is not None:
        process, prediction = model.process, model.prediction
    if not isinstance(process, DiscreteVP):
        raise ValueError(f"process is {process!r}; expected a DiscreteVP, whose steps diffusers' networks are told")
    return SamplerScheduler(sampler, process, prediction, sigmas)


class SamplerScheduler:
    """See ``as_scheduler``. x is scaled here, alpha x, as the network sees it."""

    init_noise_sigma = 1.0
    order = 1

    def __init__(
        self,
        sampler: Sampler,
        process: DiscreteVP,
        prediction: Prediction,
        sigmas: Callable[[int], Tensor] | None,
    ) -> None:
        names = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
        if prediction.name not in names:
            raise ValueError(f"prediction is {prediction!r}; expected EPS, V or X0, as diffusers knows them")
        self.sampler, self.process, self.prediction = sampler, process, prediction
        self._sigmas = sigmas or (lambda steps: from_betas(process.betas, steps))
        self.config = _package("diffusers.configuration_utils").FrozenDict(
            num_train_timesteps=process.steps,
            trained_betas=process.betas.tolist(),
            prediction_type=names[prediction.name],
            clip_sample=False,
        )
        self._output = _package("diffusers.schedulers.scheduling_ddpm").DDPMSchedulerOutput
        self._randn = _package("diffusers.utils.torch_utils").randn_tensor
        self.timesteps = torch.arange(process.steps - 1, -1, -1)
        self.num_inference_steps: int | None = None

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Begin a run of so many steps of the sampler."""
        grid = grid_of(_zero, self._sigmas(num_inference_steps), self.sampler)
        low, high = self.process.sigma_range
        positive = [s for s in grid if s > 0]
        if positive[0] > high * (1 + 1e-4) or positive[-1] < low * (1 - 1e-4):
            raise ValueError(f"sigmas span [{positive[-1]:g}, {positive[0]:g}]; expected levels in [{low:g}, {high:g}]")
        self._grid, asked = grid, _evaluations(self.sampler, grid)
        self._asked = [sigma for step in asked for sigma in step]
        self._counts = [len(step) for step in asked]
        self.order = max(self._counts)
        index = self.process.time(torch.tensor(self._asked, dtype=torch.float64)) * self.process.steps - 1
        whole = bool(((index - index.round()).abs() < 1e-4).all())
        self.timesteps = (index.round().long() if whole else index.clamp_min(0).float()).to(device)
        self.num_inference_steps = num_inference_steps
        self._place, self._evaluation, self._state = 0, 0, None
        self._x: Tensor | None = None
        self._known: list[Tensor] = []
        self._noise: list[Tensor] = []

    def scale_model_input(self, sample: Tensor, timestep: object = None) -> Tensor:
        """The sample, which is scaled already."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """The next sample, and what the output says of the data; time steps come in their order, each once.

        eta is 0, for noise is the sampler's own; generator: as in diffusers, also one for each sample.
        """
        if self.num_inference_steps is None or self._evaluation >= len(self._asked):
            raise ValueError("there is no step left; expected set_timesteps(...) before each run")
        if eta or use_clipped_model_output:
            raise ValueError(f"eta is {eta:g}; expected 0 and no clipping: the sampler has its own, as DDIM(eta=1)")
        expected = float(self.timesteps[self._evaluation])
        if abs(float(timestep) - expected) > 1e-3:
            raise ValueError(f"timestep is {float(timestep):g}; expected {expected:g}, for steps come in their order")
        sigma = self._asked[self._evaluation]
        x = sample / self._alpha(sigma)
        level = broadcast(torch.tensor(sigma, dtype=x.dtype, device=x.device), x)
        a, b = coefficients(level, self.prediction, SCORE)
        score = a * x + b * model_output
        if self._x is None:
            self._x, self._state = x, self.sampler.init(x, self._grid) if self._place == 0 else self._state
        self._known.append(score)
        self._evaluation += 1
        x_next, reached = self._advanced(generator)
        made, denoised = x_next * self._alpha(reached), x + sigma**2 * score
        if not return_dict:
            return made, denoised
        return self._output(prev_sample=made, pred_original_sample=denoised)

    def _advanced(self, generator: Any) -> tuple[Tensor, float]:
        """x where the next evaluation is asked for, or at the end, and its level."""
        assert self._x is not None
        while True:
            sigma, sigma_next = self._grid[self._place : self._place + 2]
            at = Context(self._replay(), self._x, sigma, sigma_next, self._state, self._replayed(generator))
            try:
                x, self._state = self.sampler.step(at)
            except _Asked as asked:
                return asked.x, asked.sigma
            self._place += 1
            self._known, self._noise = [], []
            self._x = x
            # a step without evaluations is made at once
            if self._place == len(self._counts) or self._counts[self._place]:
                self._x = None
                return x, self.sampler.reached(sigma, sigma_next)

    def _replay(self) -> Callable[[Tensor, Tensor], Tensor]:
        known = iter(self._known)

        def score(x: Tensor, sigma: Tensor) -> Tensor:
            found = next(known, None)
            if found is None:
                raise _Asked(x.clone(), float(sigma))
            return found

        return score

    def _replayed(self, generator: Any) -> Callable[[Tensor], Tensor]:
        drawn = iter(list(self._noise))

        def noise(x: Tensor) -> Tensor:
            found = next(drawn, None)
            if found is None:
                made: Tensor = self._randn(tuple(x.shape), generator=generator, device=x.device, dtype=x.dtype)
                self._noise.append(made)
                found = made
            return found.clone()

        return noise

    def _alpha(self, sigma: float) -> float:
        return float((1 + sigma**2) ** -0.5)

    def __len__(self) -> int:
        return self.process.steps


def _zero(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.zeros_like(x)


def _evaluations(sampler: Sampler, grid: list[float]) -> list[list[float]]:
    """The levels at which each step asks for the score."""
    found: list[list[float]] = []

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        value = level_of(sigma)
        if value is None:
            raise ValueError(
                f"{type(sampler).__name__} chooses levels for each sample; expected a sampler on a fixed grid"
            )
        found[-1].append(value)
        return torch.zeros_like(x)

    x = torch.ones(1, 2, dtype=torch.float64)
    state = sampler.init(x, grid)
    for sigma, sigma_next in zip(grid, grid[1:], strict=False):
        found.append([])
        x, state = sampler.step(Context(score, x, sigma, sigma_next, state, torch.zeros_like))
    return found
