"""Fixed-step solvers of the probability-flow ODE dx/dsigma = (x - x0_hat)/sigma = -sigma score, unscaled.

Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022, arXiv:2206.00364.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scorelab.samplers.base import Context, Sampler, State, evaluate
from scorelab.typing import Tensor

__all__ = ["RK4", "Euler", "Heun", "Midpoint"]


@dataclass(frozen=True)
class Euler(Sampler):
    """First order; one evaluation a step. Equal to deterministic DDIM."""

    order = 1

    def step(self, at: Context) -> tuple[Tensor, State]:
        score, x, sigma, sigma_next, state, _ = at
        # x + (sigma_next - sigma) * (-sigma s); to 0 this is x + sigma^2 s, the denoised sample
        return x.add(evaluate(score, x, sigma), alpha=(sigma - sigma_next) * sigma), state


@dataclass(frozen=True)
class Heun(Sampler):
    """Second order, the trapezoidal rule: two evaluations a step, one in a step to 0 (there it is Euler)."""

    order = 2

    def step(self, at: Context) -> tuple[Tensor, State]:
        score, x, sigma, sigma_next, state, _ = at
        # -dx/dsigma = sigma score, and width runs against sigma
        first, width = evaluate(score, x, sigma, scaled=True), sigma - sigma_next
        if sigma_next == 0:
            return x.add(first, alpha=width), state
        second = evaluate(score, x.add(first, alpha=width), sigma_next)
        return x.add(first, alpha=0.5 * width).add_(second, alpha=0.5 * width * sigma_next), state


@dataclass(frozen=True)
class Midpoint(Sampler):
    """Second order: two evaluations a step, the second halfway in ``on``, "log_sigma" or "sigma".

    A step to 0 is Euler's.
    """

    on: str = "log_sigma"

    order = 2

    def __post_init__(self) -> None:
        if self.on not in ("sigma", "log_sigma"):
            raise ValueError(f"on is {self.on!r}; expected 'sigma' or 'log_sigma'")

    def step(self, at: Context) -> tuple[Tensor, State]:
        score, x, sigma, sigma_next, state, _ = at
        first = evaluate(score, x, sigma)
        if sigma_next == 0:
            return x.add(first, alpha=sigma**2), state
        middle = math.sqrt(sigma * sigma_next) if self.on == "log_sigma" else 0.5 * (sigma + sigma_next)
        half = x.add(first, alpha=(sigma - middle) * sigma)
        # dx/dsigma = -sigma score, dx/dlog(sigma) = -sigma^2 score
        width = middle * math.log(sigma / sigma_next) if self.on == "log_sigma" else sigma - sigma_next
        return x.add(evaluate(score, half, middle), alpha=width * middle), state


@dataclass(frozen=True)
class RK4(Sampler):
    """The classical fourth-order Runge-Kutta method in log sigma: four evaluations a step, one in a step to 0."""

    order = 4

    def step(self, at: Context) -> tuple[Tensor, State]:
        score, x, sigma, sigma_next, state, _ = at
        # -dx/dlog(sigma) = sigma (sigma score), and width = log(sigma/r) runs against log sigma
        first = evaluate(score, x, sigma, scaled=True)
        if sigma_next == 0:
            return x.add(first, alpha=sigma), state
        middle, width = math.sqrt(sigma * sigma_next), math.log(sigma / sigma_next)
        second = evaluate(score, x.add(first, alpha=width / 2 * sigma), middle, scaled=True)
        third = evaluate(score, x.add(second, alpha=width / 2 * middle), middle, scaled=True)
        fourth = evaluate(score, x.add(third, alpha=width * middle), sigma_next)
        total = x.add(first, alpha=width / 6 * sigma).add_(second, alpha=width / 3 * middle)
        return total.add_(third, alpha=width / 3 * middle).add_(fourth, alpha=width * sigma_next**2 / 6), state
