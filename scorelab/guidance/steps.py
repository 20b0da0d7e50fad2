"""Guidance on an interval of noise levels, step by step.

Where guidance begins and ends the field jumps. A solver keeps its order across a jump if it lies between two steps: if
a level of the grid stands on it (``snapped``), and if each step takes all its evaluations from one side (``ByStep``).
Heun's corrector stands at the next level, which is the other side's: no function of sigma alone can tell it.

Kynkaanniemi et al., 2024, arXiv:2404.07724, give intervals as steps, with the corrector as its step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from scorelab.checks import check_sigmas
from scorelab.guidance.base import Guided, Interval, check_interval
from scorelab.samplers.base import Context, Counted, Sampler, State, Wrapper, check_sampler
from scorelab.samplers.ode import Heun
from scorelab.scores import Combined
from scorelab.typing import ScoreFn, Tensor

__all__ = ["ByStep", "snapped"]


def snapped(sigmas: Tensor | Iterable[float], interval: Interval) -> Tensor:
    """The grid with a level on each end of the interval (low, high) that lies inside of it: float64 (n,).

    The nearest level moves there, so that there are as many steps as before; where that is the first, the last positive
    one or the other end, a level is added. Raises ValueError for what is no grid or interval.
    """
    grid, interval = check_sigmas(sigmas, at_least=2), check_interval(interval)
    last = min(s for s in grid if s > 0)
    fixed = {grid[0], last, *interval}
    for end in interval:
        if last < end < grid[0] and end not in grid:
            near = min((s for s in grid if s > 0), key=lambda s: abs(math.log(s / end)))
            grid = sorted([*(s for s in grid if s != near or near in fixed), end], reverse=True)
    return torch.tensor(grid, dtype=torch.float64)


class _State(NamedTuple):
    """Which guided scores guided in the last step, the grid, and the inner sampler's state."""

    guided: tuple[bool, ...] | None
    grid: list[float]
    inner: State


@dataclass(frozen=True)
class ByStep(Wrapper):
    """A sampler each of whose steps is guided as a whole, or not at all: its evaluations follow the step's flag.

    steps: (first, last), from 0 and both inclusive: guide in these, whatever the noise level. None: a step is guided
    where its first level lies in the guided score's own interval. So EDM2's ``steps=(17, 22)`` of 32 is
    ``sample(classifier_free(conditional, unconditional, 2.0), x, karras(32, ...), ByStep(Heun(), (17, 22)))``.

    Where guidance begins or ends a solver of the ODE forgets its earlier steps, which saw another field. Raises
    TypeError for an inner one that is no sampler, ValueError for steps that are none, or a score without guidance.
    """

    sampler: Sampler = Heun()  # noqa: RUF009
    steps: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_sampler(self.sampler)
        if self.steps is not None and (len(self.steps) != 2 or not 0 <= self.steps[0] <= self.steps[1]):
            raise ValueError(f"steps is {self.steps}; expected (first, last), 0 <= first <= last, such as (17, 22)")

    @property
    def inner(self) -> Sampler:
        """The sampler that makes the steps."""
        return self.sampler

    def verify(self, score: ScoreFn, x: Tensor) -> None:
        if not any(True for _ in _guided(score)):
            raise ValueError(
                "the score is not guided, as far as it shows; expected one of scorelab.guidance, such as "
                "classifier_free(conditional, unconditional, 2.0), not inside of a function of one's own"
            )
        super().verify(score, x)

    def init(self, x: Tensor, sigmas: list[float]) -> State:
        if self.steps is not None and self.steps[1] >= len(sigmas) - 1:
            raise ValueError(
                f"steps is {self.steps}, and {len(sigmas)} levels make {len(sigmas) - 1} steps; expected some of "
                f"0 to {len(sigmas) - 2}"
            )
        return _State(None, sigmas, super().init(x, sigmas))

    def step(self, at: Context) -> tuple[Tensor, State]:
        before, grid, inner = at.state
        # by its level, for a sampler around this one may go back to earlier steps
        number = grid.index(at.sigma)
        counted = _counted(at.score)
        score = at.score if counted is None else counted.score

        def guides(part: Guided) -> bool:
            return part.inside(at.sigma) if self.steps is None else self.steps[0] <= number <= self.steps[1]

        now = tuple(map(guides, _guided(score)))
        if before not in (None, now) and self.order is not None:
            inner = self.sampler.init(at.x, grid)
        flagged = _held(score, guides)
        if counted is not None:
            with counted.evaluating(flagged):
                x, inner = self.sampler.step(at._replace(state=inner))
        else:
            x, inner = self.sampler.step(at._replace(score=flagged, state=inner))
        return x, _State(now, grid, inner)


def _counted(score: ScoreFn) -> Counted | None:
    """The score that the driver counts, itself or inside of what a sampler around this one made of it."""
    if isinstance(score, Counted):
        return score
    parts = score.scores if isinstance(score, Combined) else ()
    return next((found for found in map(_counted, parts) if found is not None), None)


def _guided(score: ScoreFn) -> Iterator[Guided]:
    """The guided scores that a score is made of, itself among them."""
    if isinstance(score, Guided):
        yield score
    for part in score.scores if isinstance(score, Combined) else ():
        yield from _guided(part)


def _held(score: ScoreFn, guides: Callable[[Guided], bool]) -> ScoreFn:
    """The score with each guided one in it guiding at all noise levels or at none."""
    if not isinstance(score, Combined):
        return score
    if isinstance(score, Guided) and not guides(score):
        return _held(score.scores[0], guides)
    made = copy.copy(score)
    made.scores = tuple(_held(part, guides) for part in score.scores)
    if isinstance(made, Guided):
        made.low, made.high = 0.0, math.inf
    return made
