"""Langevin dynamics: x <- x + a/2 score + sqrt(a) z, at one noise level or annealed over a sequence.

``step_size`` is a. The NCSN releases run x + a' score + sqrt(2 a') z: their step_lr of 2e-5 is step_size = 4e-5 here.
Annealed: a_i = step_size sigma_i^2 / sigma_L^2, sigma_L the smallest level.

Song and Ermon, 2019, arXiv:1907.05600; the final denoising step: Jolicoeur-Martineau et al., 2021, arXiv:2009.05475.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from scorelab.checks import broadcast, level
from scorelab.samplers.base import Sampler, State, evaluate
from scorelab.typing import ScoreFn, Tensor

__all__ = ["AnnealedLangevin", "ConsistentLangevin", "Langevin", "MetropolisLangevin", "UnderdampedLangevin"]


def langevin_step(x: Tensor, score: Tensor, size: float | Tensor, noise: Tensor) -> Tensor:
    """x + size/2 score + sqrt(size) noise; size a number, or one a sample with x's dimensions."""
    if isinstance(size, Tensor):
        return x + 0.5 * size * score + size.sqrt() * noise
    return x.add(score, alpha=0.5 * size).add_(noise, alpha=math.sqrt(size))


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

    def reached(self, sigma: float, sigma_next: float) -> float:
        return 0.0 if sigma_next == 0 and self.denoise else sigma

    def walk(
        self,
        score: ScoreFn,
        x: Tensor,
        sigma: float,
        sigma_next: float,
        state: State,
        noise: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """x after the steps at sigma."""
        size = self.size(sigma, state)
        for _ in range(self.steps):
            x = langevin_step(x, evaluate(score, x, sigma), size, noise(x))
        return x

    def step(
        self,
        score: ScoreFn,
        x: Tensor,
        sigma: float,
        sigma_next: float,
        state: State,
        noise: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, State]:
        x = self.walk(score, x, sigma, sigma_next, state, noise)
        if sigma_next == 0 and self.denoise:
            x = x.add(evaluate(score, x, sigma), alpha=sigma**2)
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


@dataclass(frozen=True)
class ConsistentLangevin(AnnealedLangevin):
    """Annealed Langevin whose noise level is, after every step, the one it claims: exactly so for a point of data.

        x <- x0_hat + (1 - e)(x - x0_hat) + sqrt(r^2 - (1 - e)^2 sigma^2) z,    e = step_size / (2 sigma_L^2)

    r is sigma but in the last of the ``steps`` at a level, where it is the next one. That needs (1 - e) sigma <= r: a
    ValueError says how small the ratio of neighbouring levels may be. Jolicoeur-Martineau et al., 2021,
    arXiv:2009.05475. Ends on the denoised sample.
    """

    steps: int = 1
    step_size: float = 4e-5
    denoise: bool = True

    def init(self, x: Tensor, sigmas: list[float]) -> State:
        lowest = min(s for s in sigmas if s > 0)
        keep = 1 - self.step_size / (2 * lowest**2)
        ratio = min((b / a for a, b in pairwise(sigmas) if b > 0), default=1.0)
        if not 0 <= keep <= ratio * (1 + 1e-9):
            raise ValueError(
                f"step_size = {self.step_size:g} keeps {keep:.4g} of the noise, but neighbouring levels have ratios "
                f"down to {ratio:.4g}; expected step_size from {2 * lowest**2 * (1 - ratio):.4g} to "
                f"{2 * lowest**2:.4g}, or more levels"
            )
        return keep

    def walk(
        self,
        score: ScoreFn,
        x: Tensor,
        sigma: float,
        sigma_next: float,
        state: State,
        noise: Callable[[Tensor], Tensor],
    ) -> Tensor:
        keep = float(state)
        for k in range(self.steps):
            after = sigma_next if k == self.steps - 1 and sigma_next > 0 else sigma
            kick = math.sqrt(max(0.0, (after - keep * sigma) * (after + keep * sigma)))
            x = x.add(evaluate(score, x, sigma), alpha=(1 - keep) * sigma**2).add_(noise(x), alpha=kick)
        return x

    def reached(self, sigma: float, sigma_next: float) -> float:
        return sigma_next if sigma_next > 0 or self.denoise else sigma


@dataclass(frozen=True)
class MetropolisLangevin(AnnealedLangevin):
    """Metropolis-adjusted Langevin: each step is accepted by the log-density, so every level is sampled without bias.

    ``log_prob(x, sigma)`` (B,) in nats, up to a constant, must belong to the score: exact targets have it. steps + 1
    scores a level. Roberts and Tweedie, Exponential Convergence of Langevin Distributions, 1996.
    """

    log_prob: Callable[[Tensor, Tensor], Tensor] | None = None
    steps: int = 100
    step_size: float = 4e-5
    denoise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.log_prob):
            raise TypeError(
                f"log_prob is {self.log_prob!r}; expected a function log_prob(x, sigma) -> (B,), such as that of an "
                "exact distribution"
            )

    def walk(
        self,
        score: ScoreFn,
        x: Tensor,
        sigma: float,
        sigma_next: float,
        state: State,
        noise: Callable[[Tensor], Tensor],
    ) -> Tensor:
        assert self.log_prob is not None
        size, at = self.size(sigma, state), level(sigma, x)
        s, density = evaluate(score, x, sigma), self.log_prob(x, at)
        for _ in range(self.steps):
            z = noise(x)
            proposal = langevin_step(x, s, size, z)
            there, density_there = evaluate(score, proposal, sigma), self.log_prob(proposal, at)
            # log q(x | x') - log q(x' | x): x - x' - size/2 s' = -(sqrt(size) z + size/2 (s + s'))
            back = (z + 0.5 * math.sqrt(size) * (s + there)).flatten(1).square().sum(1)
            gain = density_there - density - 0.5 * (back - z.flatten(1).square().sum(1))
            # a uniform number from a normal one keeps all randomness in one stream
            uniform = torch.special.ndtr(noise(x).flatten(1)[:, 0])
            accept = uniform.log() < gain
            rows = broadcast(accept, x)
            x, s = torch.where(rows, proposal, x), torch.where(rows, there, s)
            density = torch.where(accept, density_there, density)
        return x


@dataclass(frozen=True)
class UnderdampedLangevin(AnnealedLangevin):
    """Langevin dynamics with momentum, annealed: the splitting BAOAB, one evaluation a step.

    Position and velocity follow dx = v dt, dv = (score - friction v) dt + sqrt(2 friction) dw in units in which a step
    is sqrt(step_size) sigma / sigma_L long and ``friction`` is a step's share: the velocity keeps exp(-friction).
    Velocities start from their stationary law at every level. Leimkuhler and Matthews, 2013, doi:10.1093/amrx/abs010.
    """

    friction: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.friction < math.inf:
            raise ValueError(f"friction is {self.friction:g}; expected a positive number")

    def walk(
        self,
        score: ScoreFn,
        x: Tensor,
        sigma: float,
        sigma_next: float,
        state: State,
        noise: Callable[[Tensor], Tensor],
    ) -> Tensor:
        h, keep = math.sqrt(self.size(sigma, state)), math.exp(-self.friction)
        kick = math.sqrt(-math.expm1(-2 * self.friction))
        v = noise(x).clone()
        s = evaluate(score, x, sigma)
        for _ in range(self.steps):
            v = v.add(s, alpha=0.5 * h)
            x = x.add(v, alpha=0.5 * h)
            v = (v * keep).add_(noise(x), alpha=kick)
            x = x.add_(v, alpha=0.5 * h)
            s = evaluate(score, x, sigma)
            v = v.add(s, alpha=0.5 * h)
        return x
