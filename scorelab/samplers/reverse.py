"""Reverse SDEs: solved exactly in their linear part, unscaled, or by explicit steps in a process's own time.

    dx_t = [f x_t - (1 + eta^2)/2 g^2 score_t] dt + eta g dw,    x_t = alpha x,  time running down

eta = 1 is the reverse SDE, 0 the probability-flow ODE; any eta >= 0 keeps the marginals.

Song et al., 2021, arXiv:2011.13456; Kloeden and Platen, Numerical Solution of Stochastic Differential Equations, 1992,
section 15.1.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch

from scorelab.processes import Process
from scorelab.samplers.base import Context, Sampler, State, evaluate
from scorelab.samplers.stochastic import check_eta
from scorelab.typing import Tensor

__all__ = ["ReverseDiffusion", "ReverseSDE", "StochasticHeun"]


class _Native(NamedTuple):
    """A step in a process's own time, as Python floats: the data's scale at both ends, the time between them, drift and
    squared diffusion at both (just inside: at a kink of a discrete process its own segment counts), and scale and
    standard deviation of x_t given x_s."""

    alpha: float
    alpha_next: float
    dt: float
    drift: float
    drift_next: float
    diffusion: float
    diffusion_next: float
    transition_scale: float
    transition_std: float


@lru_cache(maxsize=8192)
def _native(process: Process, sigma: float, sigma_next: float) -> _Native:
    t = process.time(torch.tensor([sigma, sigma_next], dtype=torch.float64))
    dt = t[1] - t[0]
    inside = torch.stack([t[0] + 1e-6 * dt, t[1] - 1e-6 * dt])
    f, g2, transition = process.drift(inside), process.diffusion(inside) ** 2, process.transition(t[1], t[0])
    numbers = (*process.alpha(t), dt, *f, *g2, *transition)
    return _Native(*(float(v) for v in numbers))


@lru_cache(maxsize=64)
def _left_variance(sampler: Sampler, sigmas: tuple[float, ...]) -> float:
    """Variance at the last positive level for data that is a single point: all steps are affine there, so a unit of x
    alone and one of noise alone go in.
    """
    unit = torch.eye(2, dtype=torch.float64)
    variance = sigmas[0] ** 2
    for sigma, sigma_next in pairwise(sigmas):
        x, _ = sampler.step(
            Context(lambda x, s: -x / s**2, unit[:, :1], sigma, sigma_next, None, lambda _: unit[:, 1:])
        )
        variance = float(x[0]) ** 2 * variance + float(x[1]) ** 2
    return variance


def warn_of_left_noise(sampler: Sampler, sigmas: list[float]) -> None:
    """RuntimeWarning if the steps, on data that is a single point, end with too much noise for the last level."""
    positive = tuple(s for s in sigmas if s > 0)
    level, sigma = positive[-1], positive[-2:][0]
    variance = _left_variance(sampler, positive)
    if variance > 9 * level**2:
        warnings.warn(
            f"explicit steps as long as the last, from sigma = {sigma:.4g}, leave noise of standard deviation "
            f"{math.sqrt(variance):.4g} at sigma = {level:.4g}, {math.sqrt(variance) / level:.3g} times what the level "
            "says, and no later step removes it: take more levels, end at a larger one, or a sampler with exact linear "
            "steps (ReverseSDE(), StochasticHeun(), Ancestral())",
            RuntimeWarning,
            stacklevel=4,
        )


@dataclass(frozen=True)
class _Reverse(Sampler):
    process: Process | None = None
    eta: float = 1.0
    explicit: bool = False

    def __post_init__(self) -> None:
        check_eta(self.eta)
        if self.explicit and not isinstance(self.process, Process):
            raise TypeError(
                f"process is {self.process!r}; expected a process such as VP() for explicit steps in its time"
            )

    def init(self, x: Tensor, sigmas: list[float]) -> State:
        if self.explicit:
            warn_of_left_noise(self, sigmas)


@dataclass(frozen=True)
class ReverseSDE(_Reverse):
    """The reverse SDE with noise eta, its linear part solved exactly and x0_hat kept over a step, unscaled:

        x <- x0_hat + (r/sigma)^(1 + eta^2) (x - x0_hat) + r sqrt(1 - (r/sigma)^(2 eta^2)) z

    It is the same for every process and right for a point of data, however long the step; eta = 1 is ancestral
    sampling. ``explicit`` takes instead the published Euler-Maruyama steps in the ``process``'s own time and scaled
    coordinates, which are unstable where a step spans much of a level (a RuntimeWarning says so). A step to 0 denoises.
    """

    @property
    def order(self) -> int | None:  # type: ignore[override]
        """1 without noise, else None."""
        return 1 if self.eta == 0 else None

    def step(self, at: Context) -> tuple[Tensor, State]:
        score, x, sigma, sigma_next, state, noise = at
        s = evaluate(score, x, sigma)
        if sigma_next == 0:
            return x.add(s, alpha=sigma**2), state
        if self.process is None or not self.explicit:
            ratio = sigma_next / sigma
            x = x.add(s, alpha=(1 - ratio ** (1 + self.eta**2)) * sigma**2)
            kick = sigma_next * math.sqrt(1 - ratio ** (2 * self.eta**2))
            return (x.add_(noise(x), alpha=kick) if self.eta > 0 else x), state
        alpha, alpha_next, dt, f, _, g2, *_ = _native(self.process, sigma, sigma_next)
        # score_t = score / alpha
        keep = (1 + f * dt) * alpha / alpha_next
        push = -0.5 * (1 + self.eta**2) * g2 * dt / (alpha * alpha_next)
        x = (keep * x).add_(s, alpha=push)
        if self.eta > 0:
            x = x.add_(noise(x), alpha=self.eta * math.sqrt(-g2 * dt) / alpha_next)
        return x, state


@dataclass(frozen=True)
class ReverseDiffusion(Sampler):
    """The reverse of the discretised forward step x_t = a x_s + b z, as score_sde's "reverse diffusion":

    x_s = x_t - (a - 1) x_t + b^2 score_t + b z            (half the score term and no z for ``ode``)

    An explicit step: where it spans much of a level, noise is left, and a RuntimeWarning says how much.
    """

    process: Process
    ode: bool = False

    def init(self, x: Tensor, sigmas: list[float]) -> State:
        warn_of_left_noise(self, sigmas)

    def step(self, at: Context) -> tuple[Tensor, State]:
        score, x, sigma, sigma_next, state, noise = at
        s = evaluate(score, x, sigma)
        if sigma_next == 0:
            return x.add(s, alpha=sigma**2), state
        alpha, alpha_next, *_, a, b = _native(self.process, sigma, sigma_next)
        push = (0.5 if self.ode else 1.0) * b**2 / (alpha * alpha_next)
        x = ((2 - a) * alpha / alpha_next * x).add_(s, alpha=push)
        return (x if self.ode else x.add_(noise(x), alpha=b / alpha_next)), state


@dataclass(frozen=True)
class StochasticHeun(_Reverse):
    """Heun's method for the reverse SDE with any ``eta``, its linear part solved exactly and x0_hat linear over a step:

        x' = x0_hat + e^(-h) (x - x0_hat) + r sqrt(1 - (r/sigma)^(2 eta^2)) z,    h = (1 + eta^2) log(sigma/r)
        x <- x' + [1 - (1 - e^(-h))/h] (x0_hat(x', r) - x0_hat)

    unscaled, so it is the same for every process and right for a point of data, however long the step. ``explicit``
    takes instead the stochastic Heun method in the ``process``'s own time, x_t = alpha x, where the variance of the
    noise over a step is the trapezoidal rule of eta^2 g^2; it is unstable where a step spans much of a level, and a
    RuntimeWarning says so. Weak order 2, for the noise does not depend on x. Two evaluations a step, one in a step to
    0, which denoises.
    """

    @property
    def order(self) -> int | None:  # type: ignore[override]
        """2 without noise, else None."""
        return 2 if self.eta == 0 else None

    def step(self, at: Context) -> tuple[Tensor, State]:
        score, x, sigma, sigma_next, state, noise = at
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
        alpha, alpha_next, dt, f, f_next, g2, g2_next, *_ = _native(self.process, sigma, sigma_next)
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
