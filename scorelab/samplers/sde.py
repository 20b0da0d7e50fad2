"""Stochastic solvers of higher order: EDM's churn and SDE-DPM-Solver++.

Karras et al., 2022, arXiv:2206.00364, algorithm 2; Lu et al., DPM-Solver++, 2022, arXiv:2211.01095, and its SDE form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scorelab.samplers.base import Context, Sampler, State
from scorelab.samplers.multistep import History, combine, x0_hat
from scorelab.samplers.ode import Heun
from scorelab.samplers.stochastic import check_eta
from scorelab.typing import Tensor

__all__ = ["Churn", "SDEDPMSolver"]


@dataclass(frozen=True)
class Churn(Sampler):
    """EDM's stochastic sampler: noise is added to raise sigma by a factor 1 + gamma, then Heun steps down from there.

    gamma = min(s_churn / N, sqrt(2) - 1) at levels in [s_min, s_max], else 0; N is the number of steps. The noise has
    standard deviation ``s_noise``. The level is not raised above the first of the sequence, where scores may end.
    """

    s_churn: float = 40.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.s_churn < math.inf and 0 <= self.s_min <= self.s_max and 0 <= self.s_noise < math.inf):
            raise ValueError(
                f"s_churn = {self.s_churn:g}, s_min = {self.s_min:g}, s_max = {self.s_max:g}, s_noise = "
                f"{self.s_noise:g}; expected numbers >= 0 with s_min <= s_max"
            )

    def init(self, x: Tensor, sigmas: list[float]) -> State:
        return len(sigmas) - 1, sigmas[0]

    def step(self, at: Context) -> tuple[Tensor, State]:
        _, x, sigma, _, state, noise = at
        steps, highest = state
        gamma = min(self.s_churn / steps, math.sqrt(2) - 1) if self.s_min <= sigma <= self.s_max else 0.0
        raised = min(sigma * (1 + gamma), highest)
        if raised > sigma:
            x = x.add(noise(x), alpha=self.s_noise * math.sqrt((raised - sigma) * (raised + sigma)))
        return Heun().step(at._replace(x=x, sigma=raised, state=None))[0], state


@dataclass(frozen=True)
class SDEDPMSolver(Sampler):
    """SDE-DPM-Solver++ (2M): a second-order multistep exponential integrator of the reverse SDE on x0_hat.

    ``eta`` scales the noise: 1 is the reverse SDE, 0 DPM-Solver++ (2M). One evaluation a step.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        check_eta(self.eta)

    def init(self, x: Tensor, sigmas: list[float]) -> State:
        return History((), ())

    def step(self, at: Context) -> tuple[Tensor, State]:
        score, x, sigma, sigma_next, state, noise = at
        value = x0_hat(score, x, sigma)
        if sigma_next == 0:
            return value, state
        # the SDE that keeps the marginals with noise eta: x0_hat is approached at the rate 1 + eta^2 in log sigma
        h, rate = math.log(sigma / sigma_next), 1 + self.eta**2
        whole = -math.expm1(-rate * h)
        values: tuple[Tensor, ...] = (value,)
        weights: tuple[float, ...] = (whole,)
        if state.sigmas:
            ratio = 0.5 * h / math.log(state.sigmas[0] / sigma)
            values, weights = (value, *state.values), (whole * (1 + ratio), -whole * ratio)
        x = combine(x, math.exp(-rate * h), values, weights)
        if self.eta > 0:
            x = x.add_(noise(x), alpha=sigma_next * math.sqrt(-math.expm1(-2 * self.eta**2 * h)))
        return x, History((sigma,), (value,))
