"""Multistep solvers of the probability-flow ODE: one evaluation a step, the order from evaluations already made.

Every step is a linear combination whose coefficients follow from the noise levels alone:

    x(r) = (r/sigma)^p x + sum_j c_j h_j,     h_j = sigma score = -eps_hat, or x0_hat, at the last levels, newest first

Adams-Bashforth integrates the polynomial through the h_j exactly (by Gauss-Legendre quadrature, to rounding):

    on "sigma"      dx/dsigma = eps_hat                   polynomial in sigma           the classical method
    on "log_sigma"  dx/dlog(sigma) = sigma eps_hat        polynomial in log sigma       the same in log sigma
    on "eps"        dx/dsigma = eps_hat                   polynomial in log sigma       exponential
    on "x0"         d(x/sigma)/dsigma = -x0_hat/sigma^2   polynomial in log sigma       exponential

All are unscaled; a step to 0 returns x0_hat. The first steps, with fewer evaluations behind them, use lower orders: the
official code of DPM-Solver++ (3M) and UniPC begins the same way, but its second step differs.

Zhang and Chen, Fast Sampling of Diffusion Models with Exponential Integrator, 2023, arXiv:2204.13902; Lu et al.,
DPM-Solver++, 2022, arXiv:2211.01095; Zhao et al., UniPC, 2023, arXiv:2302.04867.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from scorelab.samplers.base import Context, Sampler, State, evaluate
from scorelab.typing import ScoreFn, Tensor

__all__ = ["AdamsBashforth", "DPMSolverMultistep", "Multistep", "UniPC"]

_NODES, _QUADRATURE = (a.tolist() for a in np.polynomial.legendre.leggauss(40))


class History(NamedTuple):
    """What multistep solvers remember: levels and h at them, newest first."""

    sigmas: tuple[float, ...]
    values: tuple[Tensor, ...]


def combine(x: Tensor, scale: float, values: tuple[Tensor, ...], weights: tuple[float, ...]) -> Tensor:
    """scale x + sum_j weights_j values_j, in new memory."""
    first = weights[0]
    if scale == 1:
        total = x.add(values[0], alpha=first)
    else:
        # one operation where a scaled x and its sum with the first value would be two
        total, rest = torch.lerp(values[0], x, scale), first - (1 - scale)
        if abs(rest) > 1e-15:
            total.add_(values[0], alpha=rest)
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total.add_(value, alpha=weight)
    return total


def x0_hat(score: ScoreFn, x: Tensor, sigma: float) -> Tensor:
    """The denoised sample x + sigma^2 score."""
    return x.add(evaluate(score, x, sigma), alpha=sigma**2)


class Multistep(Sampler):
    """Base: ``weights`` gives the coefficients of a step from the levels of the history and the next one."""

    steps: int
    """How many evaluations a step combines."""
    exponential: bool = True
    """x0_hat is remembered and x scaled by r/sigma; else sigma score, and x is not scaled."""

    @abstractmethod
    def weights(self, sigmas: tuple[float, ...], sigma_next: float) -> tuple[float, ...]:
        """c_j for levels newest first; as many as levels."""

    def init(self, x: Tensor, sigmas: list[float]) -> State:
        return History((), ())

    def step(self, at: Context) -> tuple[Tensor, State]:
        score, x, sigma, sigma_next, state, _ = at
        if sigma_next == 0:
            return x0_hat(score, x, sigma), state
        value = x0_hat(score, x, sigma) if self.exponential else evaluate(score, x, sigma, scaled=True)
        kept = History((sigma, *state.sigmas[: self.steps - 1]), (value, *state.values[: self.steps - 1]))
        scale = sigma_next / sigma if self.exponential else 1.0
        return combine(x, scale, kept.values, self.weights(kept.sigmas, sigma_next)), kept


def _lagrange(nodes: list[float], j: int, v: float) -> float:
    return math.prod((v - other) / (nodes[j] - other) for k, other in enumerate(nodes) if k != j)


@lru_cache(maxsize=8192)
def adams_weights(on: str, sigmas: tuple[float, ...], sigma_next: float) -> tuple[float, ...]:
    """c_j = the integral over the step of the Lagrange polynomial of level j times what multiplies h_j."""
    begin, end = math.log(sigmas[0]), math.log(sigma_next)
    middle, half = 0.5 * (begin + end), 0.5 * (end - begin)
    nodes = [s if on == "sigma" else math.log(s) for s in sigmas]
    found = [0.0] * len(sigmas)
    for node, quadrature in zip(_NODES, _QUADRATURE, strict=True):
        u = middle + half * node
        s = math.exp(u)
        # the measure of each form, with dsigma = sigma du and dx/dsigma = -h
        measure = -half * quadrature * (sigma_next / s if on == "x0" else s)
        for j in range(len(sigmas)):
            # -dx/dlog(sigma) at level j is sigma_j h_j
            own = sigmas[j] / s if on == "log_sigma" else 1.0
            found[j] += measure * own * _lagrange(nodes, j, s if on == "sigma" else u)
    return tuple(found)


@dataclass(frozen=True)
class AdamsBashforth(Multistep):
    """Adams-Bashforth of order 1 to 4 with variable steps, ``on`` "sigma", "log_sigma", "eps" or "x0" (see above).

    Cold start: the first steps have orders 1, 2, ..., so on a uniform refinement the whole is of order 2 at most.
    """

    order: int = 3
    on: str = "eps"

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3, 4) or self.on not in ("sigma", "log_sigma", "eps", "x0"):
            raise ValueError(
                f"order = {self.order}, on = {self.on!r}; expected an order from 1 to 4, on 'sigma', 'log_sigma', "
                "'eps' or 'x0'"
            )

    @property
    def steps(self) -> int:  # type: ignore[override]
        """Evaluations combined: the order."""
        return self.order

    @property
    def exponential(self) -> bool:  # type: ignore[override]
        """Whether x0_hat is remembered."""
        return self.on == "x0"

    def weights(self, sigmas: tuple[float, ...], sigma_next: float) -> tuple[float, ...]:
        return adams_weights(self.on, sigmas, sigma_next)


@dataclass(frozen=True)
class DPMSolverMultistep(Multistep):
    """DPM-Solver++ (2M) and (3M): order 2 or 3.

    2M weighs the difference of the last two x0_hat by half the integral of the first, not by its own integral. 3M is
    exponential Adams-Bashforth on x0: the paper's, exact for quadratic x0_hat, where a release that circulates halves
    the weight of the second difference.
    """

    order: int = 2

    def __post_init__(self) -> None:
        if self.order not in (2, 3):
            raise ValueError(f"order is {self.order}; expected 2 (2M) or 3 (3M)")

    @property
    def steps(self) -> int:  # type: ignore[override]
        """Evaluations combined: the order."""
        return self.order

    def weights(self, sigmas: tuple[float, ...], sigma_next: float) -> tuple[float, ...]:
        if self.order == 3:
            return adams_weights("x0", sigmas, sigma_next)
        whole = -math.expm1(math.log(sigma_next / sigmas[0]))
        if len(sigmas) == 1:
            return (whole,)
        ratio = 0.5 * math.log(sigmas[0] / sigma_next) / math.log(sigmas[1] / sigmas[0])
        return whole * (1 + ratio), -whole * ratio


@lru_cache(maxsize=8192)
def unipc_weights(sigmas: tuple[float, ...], sigma_next: float, variant: str, corrected: bool) -> tuple[float, ...]:
    """Coefficients of x0_hat at ``sigmas`` (newest first) and, for the corrector, first of x0_hat at sigma_next."""
    h = math.log(sigmas[0] / sigma_next)
    whole = -math.expm1(-h)
    scale = -h if variant == "bh1" else -whole
    ratios = [math.log(sigmas[0] / s) / h for s in sigmas[1:]] + [1.0]
    order = len(sigmas)
    # b_k = k! phi_{k+1}(-h) h / B(h), phi by recursion
    phi, factorial, b = -whole / -h - 1, 1, []
    for k in range(1, order + 1):
        b.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    used = order if corrected else order - 1
    if used == 0:
        return (whole,)
    vandermonde = np.vander(ratios[:used], used, increasing=True).T
    # the published methods fix the one coefficient of these cases to its limit
    rho = [0.5] if used == 1 else np.linalg.solve(vandermonde, b[:used]).tolist()
    parts = [-scale * p / r for p, r in zip(rho, ratios[:used], strict=True)]
    if corrected:
        return (parts[-1], whole - sum(parts), *parts[:-1])
    return (whole - sum(parts), *parts)


@lru_cache(maxsize=8192)
def merged_unipc_weights(sigmas: tuple[float, ...], sigma_next: float, p: int, variant: str) -> tuple[float, ...]:
    """The correction of x at sigmas[0], carried on by the scale of the step, and the prediction from there."""
    predicted = unipc_weights(sigmas[:p], sigma_next, variant, False)
    found = [*predicted, *[0.0] * (len(sigmas) - len(predicted))]
    if len(sigmas) > 1:
        # x at sigmas[0] is the last prediction; what the corrector adds to it
        corrected = unipc_weights(sigmas[1:], sigmas[0], variant, True)
        before = unipc_weights(sigmas[1:], sigmas[0], variant, False)
        scale = sigma_next / sigmas[0]
        for j, (new, old) in enumerate(zip(corrected, (0.0, *before), strict=True)):
            found[j] += scale * (new - old)
    return tuple(found)


@dataclass(frozen=True)
class UniPC(Multistep):
    """UniPC: a predictor of order p, and a corrector that reuses the next evaluation, so still one a step.

    Correction and next prediction are one linear combination of x, the last prediction, and p + 1 evaluations.
    ``p`` 1 to 3; ``variant`` "bh1" or "bh2", B(h) = h or e^h - 1 of the paper. ``order`` is p + 1: the corrector's.
    From a cold start p = 3 is of order 3, for its first corrector is of order 2.
    """

    p: int = 3
    variant: str = "bh2"

    def __post_init__(self) -> None:
        if self.p not in (1, 2, 3) or self.variant not in ("bh1", "bh2"):
            raise ValueError(f"p = {self.p}, variant = {self.variant!r}; expected p from 1 to 3 and 'bh1' or 'bh2'")

    @property
    def order(self) -> int:  # type: ignore[override]
        """p + 1."""
        return self.p + 1

    @property
    def steps(self) -> int:  # type: ignore[override]
        """Evaluations combined: p by the predictor, one more by the corrector."""
        return self.p + 1

    def weights(self, sigmas: tuple[float, ...], sigma_next: float) -> tuple[float, ...]:
        return merged_unipc_weights(sigmas, sigma_next, self.p, self.variant)
