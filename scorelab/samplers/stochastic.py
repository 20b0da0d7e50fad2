"""Samplers that add noise at every step: DDPM's ancestral sampling, DDIM, and reverse SDEs in native time.

From sigma to r < sigma, unscaled, with d = (x - x0_hat) = -sigma^2 score:

    DDIM        x0_hat + sqrt(r^2 - c^2) d / sigma + c z,     c^2 = eta^2 r^2 (1 - r^2/sigma^2)
    ancestral   x0_hat + (r^2/sigma^2) d + s z                posterior: s^2 = r^2 (1 - r^2/sigma^2)
                                                              forward:   s^2 = (sigma^2-r^2)(1+r^2)/(1+sigma^2)

Ho et al., 2020, arXiv:2006.11239; Song, Meng and Ermon, Denoising Diffusion Implicit Models, 2021, arXiv:2010.02502;
Song et al., 2021, arXiv:2011.13456.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch

from scorelab.checks import level
from scorelab.processes import Process
from scorelab.samplers.base import Sampler, State, evaluate
from scorelab.typing import ScoreFn, Tensor

__all__ = ["DDIM", "Ancestral", "ReverseDiffusion", "ReverseSDE"]


@lru_cache(maxsize=8192)
def _alpha(process: Process, sigma: float) -> float:
    """The process's scale of the data where its noise level is sigma; 1 at 0."""
    return float(process.alpha(process.time(torch.tensor(sigma, dtype=torch.float64)))) if sigma > 0 else 1.0


@dataclass(frozen=True)
class Ancestral(Sampler):
    """DDPM's sampler; ``variance`` "posterior" (beta tilde), "forward" (beta) or "learned".

    The forward variance is that of x_t given x_s: (sigma^2 - r^2) (alpha_t/alpha_s)^2, unscaled, with the scales of
    ``process``, by default a variance-preserving one's. Learned variance
    asks the score for ``score_and_variance(x, sigma) -> (score, v)``, v (B, *D) in [0, 1], and takes
    log s^2 = v log(forward) + (1 - v) log(posterior); a score without it is a TypeError. Nichol and Dhariwal, 2021,
    arXiv:2102.09672.
    """

    variance: str = "posterior"
    process: Process | None = None

    def __post_init__(self) -> None:
        if self.variance not in ("posterior", "forward", "learned"):
            raise ValueError(f"variance is {self.variance!r}; expected 'posterior', 'forward' or 'learned'")

    def step(
        self,
        score: ScoreFn,
        x: Tensor,
        sigma: float,
        sigma_next: float,
        state: State,
        noise: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, State]:
        mean, std = self.transition(score, x, sigma, sigma_next)
        if sigma_next == 0:
            return mean, state
        if isinstance(std, float):
            return mean.add_(noise(x), alpha=std), state
        return mean.addcmul(std, noise(x)), state

    def variances(self, sigma: float, sigma_next: float) -> tuple[float, float]:
        """Posterior and forward variance of a step."""
        gap = (sigma - sigma_next) * (sigma + sigma_next)
        if self.process is None:
            forward = gap * (1 + sigma_next**2) / (1 + sigma**2)
        else:
            forward = gap * (_alpha(self.process, sigma) / _alpha(self.process, sigma_next)) ** 2
        return sigma_next**2 * gap / sigma**2, forward

    def transition(
        self, score: ScoreFn, x: Tensor, sigma: float, sigma_next: float, least: float = 0.0
    ) -> tuple[Tensor, Tensor | float]:
        """Mean (B, *D) and standard deviation of the step's Gaussian, from one evaluation.

        ``least``: what learned variance takes for a posterior variance of 0, that of a step to 0.
        """
        posterior, forward = self.variances(sigma, sigma_next)
        gap = (sigma - sigma_next) * (sigma + sigma_next)
        if self.variance != "learned":
            mean = x.add(evaluate(score, x, sigma), alpha=gap)
            return mean, math.sqrt(posterior if self.variance == "posterior" else forward)
        both = getattr(score, "score_and_variance", None)
        if both is None:
            raise TypeError("learned variance needs a score with score_and_variance(x, sigma) -> (score, v)")
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

    def step(
        self,
        score: ScoreFn,
        x: Tensor,
        sigma: float,
        sigma_next: float,
        state: State,
        noise: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, State]:
        ratio = sigma_next / sigma
        c = self.eta * sigma_next * math.sqrt((1 - ratio) * (1 + ratio))
        direction = math.sqrt((sigma_next - c) * (sigma_next + c))
        # x0_hat + direction (x - x0_hat) / sigma = x + (sigma - direction) sigma score
        mean = x.add(evaluate(score, x, sigma), alpha=(sigma - direction) * sigma)
        return (mean.add_(noise(x), alpha=c) if c > 0 else mean), state


class _Scales(NamedTuple):
    """What a step from sigma to sigma_next needs of a process, as Python floats."""

    alpha: float
    alpha_next: float
    dt: float
    drift: float
    diffusion: float
    transition_scale: float
    transition_std: float


@lru_cache(maxsize=8192)
def _scales(process: Process, sigma: float, sigma_next: float) -> _Scales:
    t = process.time(torch.tensor([sigma, sigma_next], dtype=torch.float64))
    alpha, (scale, std) = process.alpha(t), process.transition(t[1], t[0])
    dt = float(t[1] - t[0])
    # just inside the step: at a kink of a discrete process its own segment counts, not the one above
    inside = t[0] + 1e-6 * (t[1] - t[0])
    drift, diffusion = float(process.drift(inside)), float(process.diffusion(inside))
    return _Scales(float(alpha[0]), float(alpha[1]), dt, drift, diffusion, float(scale), float(std))


def check_eta(eta: float) -> None:
    """Refuse a scale of the noise that is negative or not finite."""
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta is {eta:g}; expected a finite number >= 0")


def check_explicit(process: Process | None, explicit: bool) -> None:
    """Refuse explicit steps without the process in whose time they are made."""
    if explicit and not isinstance(process, Process):
        raise TypeError(f"process is {process!r}; expected a process such as VP() for explicit steps in its time")


@lru_cache(maxsize=64)
def _left_variance(sampler: Sampler, sigmas: tuple[float, ...]) -> float:
    """Variance at the last positive level for data that is a single point: all steps are affine there, so a unit of x
    alone and one of noise alone go in.
    """
    unit = torch.eye(2, dtype=torch.float64)
    variance = sigmas[0] ** 2
    for sigma, sigma_next in pairwise(sigmas):
        x, _ = sampler.step(lambda x, s: -x / s**2, unit[:, :1], sigma, sigma_next, None, lambda _: unit[:, 1:])
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
class ReverseSDE(Sampler):
    """The reverse SDE with noise eta, its linear part solved exactly and x0_hat kept over a step, unscaled:

        x <- x0_hat + (r/sigma)^(1 + eta^2) (x - x0_hat) + r sqrt(1 - (r/sigma)^(2 eta^2)) z

    It is the same for every process and right for a point of data, however long the step; eta = 1 is ancestral
    sampling. ``explicit`` takes instead the published Euler-Maruyama steps in the ``process``'s own time and scaled
    coordinates, x_t = alpha x, which are unstable where a step spans much of a level (a RuntimeWarning says so):

        dx_t = [f x_t - (1 + eta^2)/2 g^2 score_t] dt + eta g dw,  time running down

    eta = 1 is the reverse SDE, 0 the probability-flow ODE; any eta >= 0 keeps the marginals. A step to 0 denoises.
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
        """1 without noise, else None."""
        return 1 if self.eta == 0 else None

    def step(
        self,
        score: ScoreFn,
        x: Tensor,
        sigma: float,
        sigma_next: float,
        state: State,
        noise: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, State]:
        s = evaluate(score, x, sigma)
        if sigma_next == 0:
            return x.add(s, alpha=sigma**2), state
        if self.process is None or not self.explicit:
            ratio = sigma_next / sigma
            x = x.add(s, alpha=(1 - ratio ** (1 + self.eta**2)) * sigma**2)
            kick = sigma_next * math.sqrt(1 - ratio ** (2 * self.eta**2))
            return (x.add_(noise(x), alpha=kick) if self.eta > 0 else x), state
        alpha, alpha_next, dt, f, g, *_ = _scales(self.process, sigma, sigma_next)
        # score_t = score / alpha
        keep = (1 + f * dt) * alpha / alpha_next
        push = -0.5 * (1 + self.eta**2) * g**2 * dt / (alpha * alpha_next)
        x = (keep * x).add_(s, alpha=push)
        if self.eta > 0:
            x = x.add_(noise(x), alpha=self.eta * g * math.sqrt(-dt) / alpha_next)
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

    def step(
        self,
        score: ScoreFn,
        x: Tensor,
        sigma: float,
        sigma_next: float,
        state: State,
        noise: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, State]:
        s = evaluate(score, x, sigma)
        if sigma_next == 0:
            return x.add(s, alpha=sigma**2), state
        alpha, alpha_next, *_, a, b = _scales(self.process, sigma, sigma_next)
        push = (0.5 if self.ode else 1.0) * b**2 / (alpha * alpha_next)
        x = ((2 - a) * alpha / alpha_next * x).add_(s, alpha=push)
        return (x if self.ode else x.add_(noise(x), alpha=b / alpha_next)), state
