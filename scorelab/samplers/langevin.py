"""Langevin dynamics: x <- x + a/2 score + sqrt(a) z, at one noise level or annealed over a sequence.

``step_size`` is a. The NCSN releases run x + a' score + sqrt(2 a') z: their step_lr of 2e-5 is step_size = 4e-5 here.
Annealed: a_i = step_size sigma_i^2 / sigma_L^2, sigma_L the smallest level.

Song and Ermon, 2019, arXiv:1907.05600; the final denoising step: Jolicoeur-Martineau et al., 2021, arXiv:2009.05475.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from scorelab.samplers.base import Sampler, State, evaluate
from scorelab.typing import ScoreFn, Tensor

__all__ = ["AnnealedLangevin", "Langevin"]


def langevin_step(x: Tensor, score: Tensor, size: float | Tensor, noise: Tensor) -> Tensor:
    """x + size/2 score + sqrt(size) noise; size a number, or one a sample with x's dimensions."""
    root = size.sqrt() if isinstance(size, Tensor) else math.sqrt(size)
    return x + 0.5 * size * score + root * noise


def _check(steps: int, step_size: float) -> None:
    if steps < 1 or not 0 < step_size < math.inf:
        raise ValueError(f"steps = {steps}, step_size = {step_size:g}; expected steps >= 1 and a positive step_size")


@dataclass(frozen=True)
class Langevin(Sampler):
    """``steps`` Langevin steps of the same size at each level it is given; plain Langevin takes one level [sigma].

    ``denoise``: end with Tweedie's x + sigma^2 score (one more evaluation); by default off, for x itself is the sample.
    """

    steps: int = 1000
    step_size: float = 1e-2
    denoise: bool = False

    every_level = True

    def __post_init__(self) -> None:
        _check(self.steps, self.step_size)

    def size(self, sigma: float, state: State) -> float:
        """The step size at a level."""
        return self.step_size

    def step(
        self,
        score: ScoreFn,
        x: Tensor,
        sigma: float,
        sigma_next: float,
        state: State,
        noise: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, State]:
        size = self.size(sigma, state)
        for _ in range(self.steps):
            x = langevin_step(x, evaluate(score, x, sigma), size, noise(x))
        if sigma_next == 0 and self.denoise:
            x = x + sigma**2 * evaluate(score, x, sigma)
        return x, state


@dataclass(frozen=True)
class AnnealedLangevin(Langevin):
    """NCSN's sampler: ``steps`` Langevin steps at each level, of size step_size sigma^2 / sigma_L^2."""

    steps: int = 100
    step_size: float = 4e-5
    denoise: bool = True

    def init(self, x: Tensor, sigmas: list[float]) -> State:
        return min(s for s in sigmas if s > 0)

    def size(self, sigma: float, state: State) -> float:
        return self.step_size * (sigma / float(state)) ** 2
