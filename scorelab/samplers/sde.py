"""Stochastic solvers of higher order: EDM's churn, SDE-DPM-Solver++ and the stochastic Heun method.

Karras et al., 2022, arXiv:2206.00364, algorithm 2; Lu et al., DPM-Solver++, 2022, arXiv:2211.01095, and its SDE form;
Kloeden and Platen, Numerical Solution of Stochastic Differential Equations, 1992, section 15.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from scorelab.processes import Process
from scorelab.samplers.base import Sampler, State, evaluate
from scorelab.samplers.multistep import History, combine, x0_hat
from scorelab.samplers.ode import Heun
from scorelab.samplers.stochastic import check_eta, check_explicit, warn_of_left_noise
from scorelab.typing import ScoreFn, Tensor

__all__ = ["Churn", "SDEDPMSolver", "StochasticHeun"]


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

    def step(
        self,
        score: ScoreFn,
        x: Tensor,
        sigma: float,
        sigma_next: float,
        state: State,
        noise: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, State]:
        steps, highest = state
        gamma = min(self.s_churn / steps, math.sqrt(2) - 1) if self.s_min <= sigma <= self.s_max else 0.0
        raised = min(sigma * (1 + gamma), highest)
        if raised > sigma:
            x = x.add(noise(x), alpha=self.s_noise * math.sqrt((raised - sigma) * (raised + sigma)))
        return Heun().step(score, x, raised, sigma_next, None, noise)[0], state


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

    def step(
        self,
        score: ScoreFn,
        x: Tensor,
        sigma: float,
        sigma_next: float,
        state: State,
        noise: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, State]:
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


@lru_cache(maxsize=8192)
def _native(process: Process, sigma: float, sigma_next: float) -> tuple[float, ...]:
    """alpha, drift and squared diffusion at both ends (just inside the step, where discrete processes kink), and dt."""
    t = process.time(torch.tensor([sigma, sigma_next], dtype=torch.float64))
    dt = t[1] - t[0]
    inside = torch.stack([t[0] + 1e-6 * dt, t[1] - 1e-6 * dt])
    return tuple(float(v) for v in (*process.alpha(t), *process.drift(inside), *(process.diffusion(inside) ** 2), dt))


@dataclass(frozen=True)
class StochasticHeun(Sampler):
    """Heun's method for the reverse SDE with any ``eta``, its linear part solved exactly and x0_hat linear over a step:

        x' = x0_hat + e^(-h) (x - x0_hat) + r sqrt(1 - (r/sigma)^(2 eta^2)) z,    h = (1 + eta^2) log(sigma/r)
        x <- x' + [1 - (1 - e^(-h))/h] (x0_hat(x', r) - x0_hat)

    unscaled, so it is the same for every process and right for a point of data, however long the step. ``explicit``
    takes instead the stochastic Heun method in the ``process``'s own time, x_t = alpha x, where the variance of the
    noise over a step is the trapezoidal rule of eta^2 g^2; it is unstable where a step spans much of a level, and a
    RuntimeWarning says so:

        dx_t = [f x_t - (1 + eta^2)/2 g^2 score_t] dt + eta g dw,  time running down

    Weak order 2, for the noise does not depend on x. Two evaluations a step, one in a step to 0, which denoises.
    """

    process: Process | None = None
    eta: float = 1.0
    explicit: bool = False

    def __post_init__(self) -> None:
        check_eta(self.eta)
        check_explicit(self.process, self.explicit)

    def init(self, x: Tensor, sigmas: list[float]) -> State:
        if self.explicit:
            warn_of_left_noise(self, sigmas)

    @property
    def order(self) -> int | None:  # type: ignore[override]
        """2 without noise, else None."""
        return 2 if self.eta == 0 else None

    def step(
        self,
        score: ScoreFn,
        x: Tensor,
        sigma: float,
        sigma_next: float,
        state: State,
        noise: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, State]:
        first = evaluate(score, x, sigma)
        if sigma_next == 0:
            return x.add(first, alpha=sigma**2), state
        if self.process is None or not self.explicit:
            h = (1 + self.eta**2) * math.log(sigma / sigma_next)
            whole = -math.expm1(-h)
            guess = x.add(first, alpha=whole * sigma**2)
            if self.eta > 0:
                kick = math.sqrt(-math.expm1(-2 * self.eta**2 * math.log(sigma / sigma_next)))
                guess = guess.add_(noise(x), alpha=sigma_next * kick)
            # x0_hat(x', r) - x0_hat(x, sigma), without the first's memory: the second evaluation may overwrite it
            change = x.add(first, alpha=sigma**2).neg_().add_(guess)
            change = change.add_(evaluate(score, guess, sigma_next), alpha=sigma_next**2)
            return guess.add(change, alpha=1 - whole / h), state
        alpha, alpha_next, f, f_next, g2, g2_next, dt = _native(self.process, sigma, sigma_next)
        push = -0.5 * (1 + self.eta**2)
        # score_t = score / alpha
        slope = (alpha * f) * x + (push * g2 / alpha) * first
        start = alpha * x
        if self.eta > 0:
            start = start.add_(noise(x), alpha=self.eta * math.sqrt(-0.5 * (g2 + g2_next) * dt))
        guess = start.add(slope, alpha=dt)
        second = evaluate(score, guess / alpha_next, sigma_next)
        slope = slope.add_(guess, alpha=f_next).add_(second, alpha=push * g2_next / alpha_next)
        return start.add_(slope, alpha=0.5 * dt) / alpha_next, state
