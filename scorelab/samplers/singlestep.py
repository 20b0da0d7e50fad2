"""DPM-Solver++ in its single-step forms: exponential integrators on x0_hat, restarted at every step.

With h = log(sigma/r) and x0_hat at sigma and at levels in between, sigma e^{-h/2} for 2S, sigma e^{-h/3} and
sigma e^{-2h/3} for 3S. Lu et al., DPM-Solver++, 2022, arXiv:2211.01095.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scorelab.samplers.base import Context, Sampler, State
from scorelab.samplers.multistep import combine, x0_hat
from scorelab.typing import Tensor

__all__ = ["DPMSolverSinglestep"]


@dataclass(frozen=True)
class DPMSolverSinglestep(Sampler):
    """DPM-Solver++ (2S) and (3S): ``order`` evaluations a step, one in a step to 0."""

    order: int = 2

    def __post_init__(self) -> None:
        if self.order not in (2, 3):
            raise ValueError(f"order is {self.order}; expected 2 (2S) or 3 (3S)")

    def step(self, at: Context) -> tuple[Tensor, State]:
        score, x, sigma, sigma_next, state, _ = at
        first = x0_hat(score, x, sigma)
        if sigma_next == 0:
            return first, state
        h = math.log(sigma / sigma_next)
        whole = -math.expm1(-h)

        def stage(part: float, others: tuple[Tensor, ...], weights: tuple[float, ...]) -> Tensor:
            s = sigma * math.exp(-part * h)
            return x0_hat(score, combine(x, s / sigma, others, weights), s)

        scale = sigma_next / sigma
        if self.order == 2:
            half = stage(0.5, (first,), (-math.expm1(-0.5 * h),))
            return combine(x, scale, (half,), (whole,)), state
        third = stage(1 / 3, (first,), (-math.expm1(-h / 3),))
        part = 2 * h / 3
        bend = 2 * (math.expm1(-part) / part + 1)
        second = stage(2 / 3, (first, third), (-math.expm1(-part) - bend, bend))
        bend = 1.5 * (1 - whole / h)
        return combine(x, scale, (first, second), (whole - bend, bend)), state
