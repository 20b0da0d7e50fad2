"""Samplers that add noise at every step: DDPM's ancestral sampling and DDIM.

From sigma to r < sigma, unscaled, with d = (x - x0_hat) = -sigma^2 score:

    DDIM        x0_hat + sqrt(r^2 - c^2) d / sigma + c z,     c^2 = eta^2 r^2 (1 - r^2/sigma^2)
    ancestral   x0_hat + (r^2/sigma^2) d + s z                posterior: s^2 = r^2 (1 - r^2/sigma^2)
                                                              forward:   s^2 = (sigma^2-r^2)(1+r^2)/(1+sigma^2)
                                                              analytic:  see scorelab.samplers.analytic

Ho et al., 2020, arXiv:2006.11239; Song, Meng and Ermon, Denoising Diffusion Implicit Models, 2021, arXiv:2010.02502.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from scorelab.checks import level
from scorelab.processes import Process, step_variances
from scorelab.samplers.analytic import AnalyticVariance
from scorelab.samplers.base import Context, Sampler, State, evaluate
from scorelab.typing import ScoreFn, Tensor

__all__ = ["DDIM", "Ancestral"]


@lru_cache(maxsize=8192)
def _alpha(process: Process, sigma: float) -> float:
    """The process's scale of the data where its noise level is sigma; 1 at 0."""
    return float(process.alpha(process.time(torch.tensor(sigma, dtype=torch.float64)))) if sigma > 0 else 1.0


@dataclass(frozen=True)
class Ancestral(Sampler):
    """DDPM's sampler; ``variance`` "posterior" (beta tilde), "forward" (beta), "learned" or "analytic".

    The forward variance is that of x_t given x_s: (sigma^2 - r^2) (alpha_t/alpha_s)^2, unscaled, with the scales of
    ``process``, by default a variance-preserving one's. Learned variance
    asks the score for ``score_and_variance(x, sigma) -> (score, v)``, v (B, *D) in [0, 1], and takes
    log s^2 = v log(forward) + (1 - v) log(posterior); a score without it is a TypeError. Nichol and Dhariwal, 2021,
    arXiv:2102.09672. The analytic, optimal variance is estimated beforehand: an ``AnalyticVariance`` in code, from
    the run's training data where a config says "analytic".
    """

    variance: str | AnalyticVariance = "posterior"
    process: Process | None = None

    def __post_init__(self) -> None:
        names = ("posterior", "forward", "learned", "analytic")
        if self.variance not in names and not isinstance(self.variance, AnalyticVariance):
            raise ValueError(
                f"variance is {self.variance!r}; expected 'posterior', 'forward', 'learned', or "
                "analytic_variance(score, x0, sigmas)"
            )

    def step(self, at: Context) -> tuple[Tensor, State]:
        score, x, sigma, sigma_next, state, noise = at
        mean, std = self.transition(score, x, sigma, sigma_next)
        if sigma_next == 0:
            return mean, state
        if isinstance(std, float):
            return mean.add_(noise(x), alpha=std), state
        return mean.addcmul(std, noise(x)), state

    def variances(self, sigma: float, sigma_next: float) -> tuple[float, float]:
        """Posterior and forward variance of a step."""
        if self.process is None:
            return step_variances(sigma, sigma_next)
        return step_variances(sigma, sigma_next, (_alpha(self.process, sigma) / _alpha(self.process, sigma_next)) ** 2)

    def transition(
        self, score: ScoreFn, x: Tensor, sigma: float, sigma_next: float, least: float = 0.0
    ) -> tuple[Tensor, Tensor | float]:
        """Mean (B, *D) and standard deviation of the step's Gaussian, from one evaluation.

        ``least``: what learned variance takes for a posterior variance of 0, that of a step to 0.
        """
        posterior, forward = self.variances(sigma, sigma_next)
        gap = (sigma - sigma_next) * (sigma + sigma_next)
        if self.variance == "analytic":
            raise ValueError("variance is 'analytic'; expected one of data, analytic_variance(score, x0, sigmas)")
        if isinstance(self.variance, AnalyticVariance):
            mean = x.add(evaluate(score, x, sigma), alpha=gap)
            return mean, math.sqrt(posterior + self.variance.beyond(sigma, sigma_next))
        if self.variance != "learned":
            mean = x.add(evaluate(score, x, sigma), alpha=gap)
            return mean, math.sqrt(posterior if self.variance == "posterior" else forward)
        both = getattr(score, "score_and_variance", None)
        if both is None:
            raise TypeError(
                "variance is 'learned', but this score learned none; expected 'posterior' or 'forward', or a score "
                "with score_and_variance(x, sigma) -> (score, v), as of networks with variance=True"
            )
        s, v = both(x, level(sigma, x))
        small = posterior or least
        std = math.sqrt(small) * torch.exp(0.5 * v * math.log(forward / small)) if small else torch.zeros_like(v)
        return x.add(s, alpha=gap), std


@dataclass(frozen=True)
class DDIM(Sampler):
    """eta = 0 is Euler for the ODE, eta = 1 is ancestral sampling with the posterior variance."""

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta:g}; expected a number from 0 (deterministic) to 1 (ancestral)")

    @property
    def order(self) -> int | None:  # type: ignore[override]
        """1 without noise, else None."""
        return 1 if self.eta == 0 else None

    def step(self, at: Context) -> tuple[Tensor, State]:
        score, x, sigma, sigma_next, state, noise = at
        ratio = sigma_next / sigma
        # without noise it also runs upwards, where ratio > 1
        c = self.eta * sigma_next * math.sqrt((1 - ratio) * (1 + ratio)) if self.eta > 0 else 0.0
        direction = math.sqrt((sigma_next - c) * (sigma_next + c))
        # x0_hat + direction (x - x0_hat) / sigma = x + (sigma - direction) sigma score
        mean = x.add(evaluate(score, x, sigma), alpha=(sigma - direction) * sigma)
        return (mean.add_(noise(x), alpha=c) if c > 0 else mean), state


def check_eta(eta: float) -> None:
    """Refuse a scale of the noise that is negative or not finite."""
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta is {eta:g}; expected a finite number >= 0")
