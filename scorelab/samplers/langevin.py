"""Langevin dynamics: x <- x + a/2 score + sqrt(a) z, at one noise level or annealed over a sequence.

``step_size`` is a. The NCSN releases run x + a' score + sqrt(2 a') z: their step_lr of 2e-5 is step_size = 4e-5 here.
Annealed: a_i = step_size sigma_i^2 / sigma_L^2, sigma_L the smallest level.

Where data is a single point, or has structure finer than sigma, the score is -(x - x0)/sigma^2 and the steps settle at
a variance of sigma^2 / (1 - rho/4), rho = step_size / sigma_L^2, at every level; from rho = 4 on they diverge. So the
annealed samplers refuse rho >= 4 and warn from rho = 0.8 on. Their default is NCSNv2's rule for the levels at hand.

Song and Ermon, 2019, arXiv:1907.05600; the final denoising step: Jolicoeur-Martineau et al., 2021, arXiv:2009.05475.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from scorelab.checks import broadcast, level
from scorelab.samplers.base import Context, Sampler, State, evaluate
from scorelab.sigmas import langevin_step_size
from scorelab.typing import Tensor

__all__ = [
    "PUBLISHED_STEP_SIZES",
    "AnnealedLangevin",
    "ConsistentLangevin",
    "Langevin",
    "MetropolisLangevin",
    "UnderdampedLangevin",
]

PUBLISHED_STEP_SIZES = {
    "ncsn": 2 * 2e-5,  # 10 levels from 1 to 0.01, 100 steps
    "ncsnv2_cifar10": 2 * 6.2e-6,  # 232 levels from 50 to 0.01, 5 steps
    "ncsnv2_celeba": 2 * 3.3e-6,  # 500 from 90, 5 steps
    "ncsnv2_church": 2 * 4.9e-6,  # 788 from 140, 4 steps
    "ncsnv2_bedroom": 2 * 1.8e-6,  # 1086 from 190, 3 steps; tower has the same
    "ncsnv2_ffhq": 2 * 9e-7,  # 2311 from 348, 3 steps
}
"""step_size of the releases, whose own step_lr is half of it, all for a smallest level of 0.01."""


def langevin_step(x: Tensor, score: Tensor, size: float | Tensor, noise: Tensor) -> Tensor:
    """x + size/2 score + sqrt(size) noise; size a number, or one a sample with x's dimensions."""
    if isinstance(size, Tensor):
        return x + 0.5 * size * score + size.sqrt() * noise
    return x.add(score, alpha=0.5 * size).add_(noise, alpha=math.sqrt(size))


def _check(steps: int, step_size: float | None) -> None:
    if steps < 1 or not (step_size is None or 0 < step_size < math.inf):
        raise ValueError(f"steps = {steps}, step_size = {step_size}; expected steps >= 1 and a positive step_size")


@dataclass(frozen=True)
class Langevin(Sampler):
    """``steps`` Langevin steps of the same size at each level it is given; plain Langevin takes one level [sigma].

    ``denoise``: end with Tweedie's x + sigma^2 score (one more evaluation); by default off, for x itself is the sample.
    """

    steps: int = 1000
    step_size: float | None = 1e-2
    denoise: bool = False

    every_level = True

    def __post_init__(self) -> None:
        _check(self.steps, self.step_size)

    def init(self, x: Tensor, sigmas: list[float]) -> State:
        return langevin_step_size(sigmas, self.steps) if self.step_size is None else self.step_size

    def size(self, sigma: float, state: State) -> float:
        """The step size at a level."""
        return float(state)

    def reached(self, sigma: float, sigma_next: float) -> float:
        return 0.0 if sigma_next == 0 and self.denoise else sigma

    def walk(self, at: Context) -> Tensor:
        """x after the steps at sigma."""
        score, x, sigma, _, state, noise = at
        size = self.size(sigma, state)
        for _ in range(self.steps):
            x = langevin_step(x, evaluate(score, x, sigma), size, noise(x))
        return x

    def step(self, at: Context) -> tuple[Tensor, State]:
        score, _, sigma, sigma_next, state, _ = at
        x = self.walk(at)
        if sigma_next == 0 and self.denoise:
            x = x.add(evaluate(score, x, sigma), alpha=sigma**2)
        return x, state


@dataclass(frozen=True)
class AnnealedLangevin(Langevin):
    """NCSN's sampler: ``steps`` Langevin steps at each level, of size step_size sigma^2 / sigma_L^2.

    step_size: None takes ``sigmas.langevin_step_size`` of the levels; ``PUBLISHED_STEP_SIZES`` has the releases'. A
    ValueError refuses one that is unstable for the smallest level, a RuntimeWarning says where much noise stays.
    """

    steps: int = 100
    step_size: float | None = None
    denoise: bool = True

    def init(self, x: Tensor, sigmas: list[float]) -> State:
        """step_size / sigma_L^2."""
        lowest = min(s for s in sigmas if s > 0)
        size = float(super().init(x, sigmas))
        share = size / lowest**2
        advice = f"expected about {langevin_step_size(sigmas, self.steps):.3g} (step_size=None), or a larger last level"
        if share >= 4:
            raise ValueError(
                f"step_size = {size:.4g} is {share:.3g} times the smallest level squared, sigma = {lowest:.4g}, and "
                f"diverges from 4 on; {advice}"
            )
        if self.step_size is not None and self.excess(share) > 1.25:
            warnings.warn(
                f"step_size = {size:.4g} is {share:.3g} times the smallest level squared, sigma = {lowest:.4g}, and "
                f"leaves up to {self.excess(share):.3g} times the variance of the noise at every level; {advice}",
                RuntimeWarning,
                stacklevel=4,
            )
        return share

    def excess(self, share: float) -> float:
        """Variance over sigma^2 that the steps settle at on a point of data, for step_size = share sigma_L^2."""
        return 1 / (1 - share / 4)

    def size(self, sigma: float, state: State) -> float:
        return float(state) * sigma**2


@dataclass(frozen=True)
class ConsistentLangevin(AnnealedLangevin):
    """Annealed Langevin whose noise level is, after every step, the one it claims: exactly so for a point of data.

        x <- x0_hat + (1 - e)(x - x0_hat) + sqrt(r^2 - (1 - e)^2 sigma^2) z,    e = step_size / (2 sigma_L^2)

    r is sigma but in the last of the ``steps`` at a level, where it is the next one. That needs (1 - e) sigma <= r: a
    ValueError says how small the ratio of neighbouring levels may be. step_size: None keeps 1 - e = (r/sigma)^2 at the
    smallest ratio, which with one step a level is ancestral sampling. Jolicoeur-Martineau et al., 2021,
    arXiv:2009.05475. Ends on the denoised sample.
    """

    steps: int = 1

    def init(self, x: Tensor, sigmas: list[float]) -> State:
        lowest = min(s for s in sigmas if s > 0)
        ratio = min((b / a for a, b in pairwise(sigmas) if b > 0), default=1.0)
        if self.step_size is None:
            return ratio**2
        keep = 1 - self.step_size / (2 * lowest**2)
        if not 0 <= keep <= ratio * (1 + 1e-9):
            raise ValueError(
                f"step_size = {self.step_size:g} keeps {keep:.4g} of the noise, but neighbouring levels have ratios "
                f"down to {ratio:.4g}; expected step_size from {2 * lowest**2 * (1 - ratio):.4g} to "
                f"{2 * lowest**2:.4g}, or more levels"
            )
        return keep

    def walk(self, at: Context) -> Tensor:
        score, x, sigma, sigma_next, state, noise = at
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
    step_size: float | None = None
    denoise: bool = False

    def excess(self, share: float) -> float:
        return 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.log_prob):
            raise TypeError(
                f"log_prob is {self.log_prob!r}; expected a function log_prob(x, sigma) -> (B,), such as that of an "
                "exact distribution"
            )

    def walk(self, at: Context) -> Tensor:
        score, x, sigma, _, state, noise = at
        assert self.log_prob is not None
        size, here = self.size(sigma, state), level(sigma, x)
        # a score may use the memory of its last output again
        s, density = evaluate(score, x, sigma).clone(), self.log_prob(x, here)
        for _ in range(self.steps):
            z = noise(x)
            proposal = langevin_step(x, s, size, z)
            there, density_there = evaluate(score, proposal, sigma), self.log_prob(proposal, here)
            # log q(x | x') - log q(x' | x): x - x' - size/2 s' = -(sqrt(size) z + size/2 (s + s'))
            back = (z + 0.5 * math.sqrt(size) * (s + there)).flatten(1).square().sum(1)
            gain = density_there - density - 0.5 * (back - z.flatten(1).square().sum(1))
            # a uniform number from a normal one keeps all randomness in one stream
            uniform = torch.special.ndtr(noise(x).flatten(1)[:, 0])
            accept = uniform.log() < gain
            accepted = broadcast(accept, x)
            x, s = torch.where(accepted, proposal, x), torch.where(accepted, there, s)
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

    def excess(self, share: float) -> float:
        # the splitting has the exact variance of a Gaussian wherever it is stable
        return 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.friction < math.inf:
            raise ValueError(f"friction is {self.friction:g}; expected a positive number")

    def walk(self, at: Context) -> Tensor:
        score, x, sigma, _, state, noise = at
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
