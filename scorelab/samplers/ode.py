"""Fixed-step solvers of the probability-flow ODE dx/dsigma = (x - x0_hat)/sigma = -sigma score, unscaled.

Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022, arXiv:2206.00364.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scorelab.samplers.base import Sampler, State, evaluate
from scorelab.typing import ScoreFn, Tensor

__all__ = ["Euler", "Heun"]


@dataclass(frozen=True)
class Euler(Sampler):
    """First order; one evaluation a step. Equal to deterministic DDIM."""

    order = 1

    def step(
        self,
        score: ScoreFn,
        x: Tensor,
        sigma: float,
        sigma_next: float,
        state: State,
        noise: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, State]:
        # x + (sigma_next - sigma) * (-sigma s); to 0 this is x + sigma^2 s, the denoised sample
        return x + (sigma - sigma_next) * sigma * evaluate(score, x, sigma), state


@dataclass(frozen=True)
class Heun(Sampler):
    """Second order, the trapezoidal rule: two evaluations a step, one in a step to 0 (there it is Euler)."""

    order = 2

    def step(
        self,
        score: ScoreFn,
        x: Tensor,
        sigma: float,
        sigma_next: float,
        state: State,
        noise: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, State]:
        first = -sigma * evaluate(score, x, sigma)
        width = sigma_next - sigma
        if sigma_next == 0:
            return x + width * first, state
        second = -sigma_next * evaluate(score, x + width * first, sigma_next)
        return x + 0.5 * width * (first + second), state
