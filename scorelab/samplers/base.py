"""What a sampler is, and the one loop that drives all of them.

A sampler turns a score function into samples by steps from one noise level to the next lower one:

    init(x, sigmas) -> state,      step(Context(score, x, sigma, sigma_next, state, noise)) -> x, state

Levels are Python floats and the score sees them as 0-dim tensors, so a step costs no device synchronisation. The score
is never evaluated at 0: a step to 0 returns the denoised sample. Nothing is kept between steps but x and the state.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from scorelab.checks import (
    call,
    check_batch,
    check_finite,
    check_output,
    check_sigmas,
    checked_device,
    explained,
    level,
    marked,
)
from scorelab.noise import Noise, PerSampleNoise
from scorelab.predictions import denoise_from_score
from scorelab.scores import (
    can_split,
    check_known,
    combined,
    data_mean,
    device_of,
    dtype_of,
    networks,
    restricted,
    sigma_range,
)
from scorelab.sigmas import karras
from scorelab.typing import ScoreFn, Shape, Tensor

__all__ = [
    "Context",
    "Counted",
    "Sampler",
    "State",
    "Step",
    "StoppedEarly",
    "Wrapper",
    "check_sampler",
    "drive",
    "evaluate",
]

State = Any
"""Whatever a sampler keeps from step to step; None for one without memory."""


class Context(NamedTuple):
    """What a step is made from: the score, x (B, *D) at noise level ``sigma``, the next level, the sampler's state, and
    ``noise(x)``, standard normal like x, which the next call may overwrite."""

    score: ScoreFn
    x: Tensor
    sigma: float
    sigma_next: float
    state: State
    noise: Callable[[Tensor], Tensor]


class Step(NamedTuple):
    """One step of a trajectory: x (B, *D) at noise level ``sigma``, after ``nfe`` evaluations of the score.

    ``x0_hat`` is the denoised sample at the step's first evaluation, None if there was none. Only the last step of an
    adaptive solver that stopped early has a level for each sample, ``sigma`` (B,).
    """

    x: Tensor
    x0_hat: Tensor | None
    sigma: float | Tensor
    nfe: int


class StoppedEarly(Exception):
    """Raised by a sampler whose budget of evaluations is spent: x (B, *D) stands at the noise levels sigma (B,)."""

    def __init__(self, x: Tensor, sigma: Tensor) -> None:
        super().__init__("the budget of evaluations is spent")
        self.x, self.sigma = x, sigma


class Sampler(ABC):
    """Base of all samplers.

    ``order``: the order of convergence to the exact probability-flow ODE, None for a stochastic sampler.
    ``every_level``: the steps run at ``sigma`` itself (Langevin), so the driver appends a final 0 and every positive
    level is visited. ``sigmas``, an attribute of few: the levels of a sampler that brings its own.
    """

    order: int | None = None
    every_level: bool = False

    def verify(self, score: ScoreFn, x: Tensor) -> None:  # noqa: B027
        """Warn, before the first step from x (B, *D), of a score that this sampler was not made for."""

    def init(self, x: Tensor, sigmas: list[float]) -> State:
        """The state before the first step; a sampler around this one asks again, with all levels, to begin anew."""
        return None

    @abstractmethod
    def step(self, at: Context) -> tuple[Tensor, State]:
        """x at sigma_next from x at sigma, and the new state; nothing of the context is changed in place."""

    def reached(self, sigma: float, sigma_next: float) -> float:
        """The noise level of x after a step."""
        return sigma_next


class Wrapper(Sampler):
    """Base of samplers around another, ``inner``, whose levels, state, checks and order they have unless they say."""

    @property
    @abstractmethod
    def inner(self) -> Sampler:
        """The sampler that makes the steps."""

    @property
    def order(self) -> int | None:  # type: ignore[override]
        """That of the inner sampler."""
        return self.inner.order

    @property
    def every_level(self) -> bool:  # type: ignore[override]
        """That of the inner sampler."""
        return self.inner.every_level

    @property
    def sigmas(self) -> tuple[float, ...] | None:
        """The inner sampler's own levels, if it has any."""
        return getattr(self.inner, "sigmas", None)

    def verify(self, score: ScoreFn, x: Tensor) -> None:
        self.inner.verify(score, x)

    def init(self, x: Tensor, sigmas: list[float]) -> State:
        return self.inner.init(x, sigmas)

    def step(self, at: Context) -> tuple[Tensor, State]:
        return self.inner.step(at)

    def reached(self, sigma: float, sigma_next: float) -> float:
        return self.inner.reached(sigma, sigma_next)


def check_sampler(sampler: object, what: str = "sampler") -> None:
    """Refuse (TypeError) what is no sampler."""
    if not isinstance(sampler, Sampler):
        raise TypeError(f"{what} is {sampler!r}; expected a sampler object such as scorelab.samplers.Heun()")


def warn_of_training(score: object) -> None:
    """RuntimeWarning of a network left in training mode, where that changes what it computes: dropout, batch norm."""
    for module in (m for network in networks(score) for m in network.modules()):
        p = getattr(module, "p", 0)
        if module.training and (isinstance(module, _BatchNorm) or (isinstance(p, (int, float)) and p > 0)):
            warnings.warn(
                f"the network is in training mode, so its {type(module).__name__} is at work; expected model.eval() "
                "before sampling and densities",
                RuntimeWarning,
                stacklevel=4,
            )
            return


class Counted:
    """The user's score with its output checked and its evaluations counted; what is returned holds until the next call,
    which may overwrite it (a CUDA graph, a compiled network): who keeps it longer makes a copy.

    With ``denoised``, ``x0_hat`` is the denoised sample of the first evaluation since it was None. ``levels`` are noise
    levels that were made into tensors beforehand.
    """

    def __init__(self, score: ScoreFn, denoised: bool = False) -> None:
        warn_of_training(score)
        self.score, self.denoised = score, denoised
        self.levels: dict[float, Tensor] = {}
        self.nfe = 0
        self.x0_hat: Tensor | None = None

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The score, checked; it sees a level given as a number as a 0-dim tensor."""
        if not isinstance(sigma, Tensor):
            sigma = level(sigma, x)
        try:
            output = self.score(x, sigma)
        except RuntimeError as error:
            if (said := explained(error)) is not None:
                raise said from error
            raise
        return self._note(output, x, sigma)

    @contextmanager
    def evaluating(self, score: ScoreFn) -> Iterator[None]:
        """Another score in its place for a while, of the same kind, counted with it."""
        own, self.score = self.score, score
        try:
            yield
        finally:
            self.score = own

    def _note(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        self.nfe += 1
        # what fits is seen here, at less cost
        fits = type(output) is Tensor and output.shape == x.shape and output.dtype == x.dtype
        found = output if fits and output.device == x.device else check_output(output, x, sigma)
        # at once, for the next call may overwrite it
        if self.denoised and self.x0_hat is None:
            self.x0_hat = denoise_from_score(found, x, sigma)
        return found

    def __getattr__(self, name: str) -> Any:
        # there only if the score has it
        if name == "rows" and can_split(self.score):
            return self._rows
        if name == "score_and_variance" and hasattr(self.score, name):
            return self._score_and_variance
        raise AttributeError(name)

    def _score_and_variance(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        output, v = call(self.score.score_and_variance, x, sigma)  # type: ignore[attr-defined]
        return self._note(output, x, sigma), check_output(v, x, sigma)

    def _rows(self, index: Tensor) -> ScoreFn:
        part = restricted(self.score, index)
        assert part is not None

        def few(x: Tensor, sigma: Tensor) -> Tensor:
            self.nfe += 1
            return check_output(call(part, x, sigma), x, sigma)

        return few


def evaluate(score: ScoreFn, x: Tensor, sigma: float, *, scaled: bool = False) -> Tensor:
    """The score at one noise level given as a float; ``scaled``: sigma score = -eps_hat, in memory of its own."""
    known = score.levels.get(sigma) if type(score) is Counted else None
    at = level(sigma, x) if known is None else known
    # a product with a 0-dim tensor costs half of one with a number
    return score(x, at) * at if scaled else score(x, at)


def check_shape(x: object) -> Shape:
    """A shape (B, *D) as a tuple; ValueError for anything else."""
    shape = tuple(x) if isinstance(x, Sequence) else ()
    if len(shape) < 2 or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"x is {x!r}; expected a tensor (B, *D) or a shape such as (64, 2): whole numbers, B first")
    return shape


def check_held(shape: Shape) -> None:
    """Refuse (ValueError) a shape of samples that memory can't hold."""
    try:
        # what is not written to is not taken
        torch.empty(tuple(shape))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{shape[0]} samples are more than memory can hold; expected fewer at once") from error


def start(
    x: Tensor | Shape,
    sigma: float,
    data_std: float,
    noise: Noise,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    score: ScoreFn,
) -> Tensor:
    """x itself, in the wanted dtype and place, or for a shape a draw from N(m, (sigma^2 + data_std^2) I), m the score's
    ``data_mean`` or 0."""
    if isinstance(x, Tensor):
        check_batch(x)
        check_finite(x, "x")
        return x.to(device=x.device if device is None else device, dtype=x.dtype if dtype is None else dtype)
    shape = check_shape(x)
    if not 0 <= data_std < float("inf"):
        raise ValueError(f"data_std is {data_std:g}; expected a finite number >= 0")
    dtype = torch.get_default_dtype() if dtype is None else dtype
    like = torch.empty(shape, dtype=dtype, device=device)
    return noise(like) * math.hypot(sigma, data_std) + data_mean(score, like)


def grid_of(score: ScoreFn, sigmas: Tensor | Iterable[float] | None, sampler: Sampler) -> list[float]:
    """The levels that were given, those that the sampler brings, or 18 over all that the score knows.

    A sampler that runs at every level has a final 0 after them.
    """
    own: tuple[float, ...] | None = getattr(sampler, "sigmas", None)
    if sigmas is None and own is None:
        low, high = sigma_range(score)
        if not 0 < low < high < math.inf:
            raise ValueError(
                "sigmas is None, and neither the sampler nor the score says which noise levels to take; expected a "
                "sequence, e.g. scorelab.sigmas.karras(18, sigma_min=0.002, sigma_max=80)"
            )
        sigmas = karras(18, sigma_min=low, sigma_max=high)
    grid = list(own or ()) if sigmas is None else check_sigmas(sigmas, at_least=1 if sampler.every_level else 2)
    if own is not None and grid != list(own):
        raise ValueError(f"this sampler was fitted to its own {len(own)} noise levels; leave sigmas out, or pass those")
    return [*grid, 0.0] if sampler.every_level and grid[-1] > 0 else grid


def _stopped(stop: StoppedEarly, nfe: int, dtype: torch.dtype) -> Step:
    """The last step of a run whose budget was spent, with a warning."""
    low, high = float(stop.sigma.min()), float(stop.sigma.max())
    warnings.warn(
        f"the sampler stopped early, after {nfe} evaluations: its samples stand at noise levels from {low:.4g} to "
        f"{high:.4g} (the last Step of trajectory has each one's); raise max_nfe or loosen the tolerance to finish",
        RuntimeWarning,
        stacklevel=4,
    )
    return Step(stop.x.to(dtype), None, stop.sigma, nfe)


def drive(
    score: ScoreFn,
    x: Tensor | Shape,
    sigmas: Tensor | Iterable[float] | None,
    sampler: Sampler,
    *,
    generator: torch.Generator | PerSampleNoise | None,
    data_std: float,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    differentiable: bool,
    debug: bool,
    denoised: bool,
) -> Iterator[Step]:
    """Check the inputs once, then yield the start and every step; ``denoised`` fills x0_hat."""
    if not callable(score):
        raise TypeError(f"score is {type(score).__name__}; expected a callable score(x, sigma)")
    check_sampler(sampler)
    grid = grid_of(score, sigmas, sampler)
    check_known(score, min(s for s in grid if s > 0), grid[0])
    noise = Noise(generator, reuse=not differentiable)
    device = checked_device(device) if device is not None else None if isinstance(x, Tensor) else device_of(score)
    if dtype is None:
        dtype = x.dtype if isinstance(x, Tensor) else dtype_of(score) or torch.get_default_dtype()
    x = start(x, grid[0], data_std, noise, torch.promote_types(dtype, torch.float32), device, score)
    if x.dtype != dtype:
        # it sees x in half precision; the sampler's own x, levels and coefficients are float32
        score = combined(lambda x, s, out: out, score, inputs=lambda x, s: (x.to(dtype), s), variance=True)
    counted = Counted(score, denoised)
    # one tensor for all levels: a tensor for each, at each step, would cost as much as the step
    tensors = torch.tensor(grid, dtype=x.dtype, device=x.device).unbind()
    counted.levels = {s: marked(t, s) for s, t in zip(grid, tensors, strict=True)}

    def stepping() -> Iterator[Step]:
        current, count = x, len(x)
        if count:
            sampler.verify(counted.score, current)
        state = sampler.init(current, grid)
        yield Step(current.to(dtype), None, grid[0], 0)
        for sigma, sigma_next in pairwise(grid):
            counted.x0_hat = None
            stop: StoppedEarly | None = None
            with nullcontext() if differentiable or not torch.is_grad_enabled() else torch.no_grad():
                if count:
                    try:
                        made: Any = sampler.step(Context(counted, current, sigma, sigma_next, state, noise))
                        if not isinstance(made, tuple) or len(made) != 2:
                            got = type(made).__name__
                            raise TypeError(f"{type(sampler).__name__}.step returned {got}; expected (x, state)")
                        if not isinstance(made[0], Tensor) or made[0].shape != current.shape:
                            shape = getattr(made[0], "shape", type(made[0]).__name__)
                            said = f"{type(sampler).__name__}.step returned x of {shape}"
                            raise ValueError(f"{said}; expected the shape that it was given, {tuple(current.shape)}")
                        current, state = made
                    except StoppedEarly as early:
                        stop = early
            if stop is not None:
                yield _stopped(stop, counted.nfe, dtype)
                return
            if debug:
                check_finite(current, f"x at sigma = {sigma_next:g}")
            # a sampler that differentiates the score would leave its graph in every step
            x0_hat = counted.x0_hat
            x0_hat = x0_hat if x0_hat is None else (x0_hat if differentiable else x0_hat.detach()).to(dtype)
            yield Step(current.to(dtype), x0_hat, sampler.reached(sigma, sigma_next), counted.nfe)

    return stepping()
