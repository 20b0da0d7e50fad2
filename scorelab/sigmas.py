"""Noise-level sequences, and the distributions of noise levels that training visits.

A sequence is a float64 CPU tensor, strictly descending. ``karras`` and ``log_linear`` end with 0 ("end on the denoised
sample"), as published; ``geometric`` is NCSN's and ends at sigma_min.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.special import ndtr

from scorelab.checks import check_batch, check_finite, check_sigmas
from scorelab.processes import VE, DiscreteVP, Process
from scorelab.tables import Table
from scorelab.typing import Tensor

__all__ = [
    "GRIDS",
    "LEVELS",
    "FromProcess",
    "FromSigmas",
    "LogNormal",
    "LogUniform",
    "SigmaDistribution",
    "Suggestion",
    "Tapered",
    "from_betas",
    "from_process",
    "geometric",
    "karras",
    "langevin_step_size",
    "log_linear",
    "respace",
    "sequence",
    "suggest",
    "visited",
]


def _check(n: int, sigma_min: float, sigma_max: float) -> None:
    if n < 1:
        raise ValueError(f"n is {n}; expected at least one noise level")
    if not 0 < sigma_min <= sigma_max < math.inf or (n > 1 and sigma_min == sigma_max):
        raise ValueError(
            f"sigma_min = {sigma_min:g}, sigma_max = {sigma_max:g}; expected 0 < sigma_min < sigma_max, both finite"
        )


def geometric(n: int, *, sigma_min: float, sigma_max: float) -> Tensor:
    """n levels with a constant ratio, sigma_max first, sigma_min last (n = 1: sigma_max alone).

    Song and Ermon, Generative Modeling by Estimating Gradients of the Data Distribution, 2019, arXiv:1907.05600.
    """
    _check(n, sigma_min, sigma_max)
    levels = torch.linspace(math.log(sigma_max), math.log(sigma_min), n, dtype=torch.float64).exp()
    levels[-1] = sigma_min
    levels[0] = sigma_max
    return levels


def karras(n: int, *, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """n levels uniform in sigma^(1/rho) and a final 0: (n + 1,).

    Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022, arXiv:2206.00364, eq. 5.
    """
    _check(n, sigma_min, sigma_max)
    if not rho > 0:
        raise ValueError(f"rho is {rho:g}; expected a positive number (7 as published)")
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = torch.linspace(*ends, n, dtype=torch.float64) ** rho
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


def log_linear(n: int, *, sigma_min: float, sigma_max: float) -> Tensor:
    """n geometric levels and a final 0: (n + 1,)."""
    levels = geometric(n, sigma_min=sigma_min, sigma_max=sigma_max)
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


def from_process(process: Process, n: int, t_end: float | None = None) -> Tensor:
    """n levels uniform in the process's time, down to t_end (by default its t_sample), and a final 0: (n + 1,)."""
    return torch.cat([process.sigmas(n, t_end), torch.zeros(1, dtype=torch.float64)])


def from_betas(betas: Tensor, steps: int | str | None = None) -> Tensor:
    """The levels of DDPM's steps, or of some of them, and a final 0: float64 (S + 1,).

    ``steps`` is as in ``respace``; None takes all.
    """
    levels = DiscreteVP(betas).step_sigmas
    if steps is not None:
        levels = levels[torch.tensor(respace(len(levels), steps))]
    return torch.cat([levels.flip(0), torch.zeros(1, dtype=torch.float64)])


def respace(total: int, steps: int | str) -> list[int]:
    """Which of ``total`` steps (0-based, ascending) a shorter sampler visits.

    ``steps``: a number of steps spread evenly from first to last; "10,10,10" for as many in each of equal parts;
    "ddim50" for a constant integer stride that gives exactly 50 (Nichol and Dhariwal, 2021, arXiv:2102.09672);
    "leading50" for the stride total // 50 from the first step, which misses the last; "trailing50" for total/50 back
    from the last step, rounded, which misses the first (Lin et al., 2024, arXiv:2305.08891).
    """
    text = str(steps)
    for name in ("leading", "trailing"):
        if text.startswith(name):
            wanted = _positive(text[len(name) :], steps)
            if wanted > total:
                raise ValueError(f"{wanted} steps asked of {total} in all; ask for at most {total}")
            if name == "leading":
                return [k * (total // wanted) for k in range(wanted)]
            return [round((k + 1) * total / wanted) - 1 for k in range(wanted)]
    if text.startswith("ddim"):
        wanted = _positive(text[4:], steps)
        for stride in range(1, total + 1):
            taken = list(range(0, total, stride))
            if len(taken) == wanted:
                return taken
        raise ValueError(f"no integer stride takes {wanted} of {total} steps; use a plain number, e.g. {wanted}")
    counts = [_positive(part, steps) for part in text.split(",")]
    start, chosen = 0, []
    for i, count in enumerate(counts):
        size = total // len(counts) + (i < total % len(counts))
        if count > size:
            raise ValueError(f"{count} steps asked of a part of {size} (of {total} in all); ask for at most {size}")
        gap = (size - 1) / (count - 1) if count > 1 else 1.0
        chosen += [start + round(k * gap) for k in range(count)]
        start += size
    return chosen


def _positive(text: str, steps: int | str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError(
            f"steps is {steps!r}; expected a positive number, 'ddim50', 'leading50', "
            "'trailing50', or numbers joined by commas"
        )
    return int(text)


class SigmaDistribution(ABC):
    """Which noise levels training visits, as a quantile function of u, uniform on (0, 1)."""

    @abstractmethod
    def __call__(self, u: Tensor) -> Tensor:
        """Noise levels of u's shape, dtype and device."""

    @abstractmethod
    def rate(self, sigma: Tensor) -> Tensor:
        """d log sigma / du: what divides out this distribution in favour of a log-uniform one."""


@dataclass(frozen=True)
class LogUniform(SigmaDistribution):
    """log sigma uniform between the ends: the continuous limit of a geometric sequence."""

    sigma_min: float
    sigma_max: float

    def __post_init__(self) -> None:
        _check(2, self.sigma_min, self.sigma_max)

    def __call__(self, u: Tensor) -> Tensor:
        return torch.exp(math.log(self.sigma_min) + u * math.log(self.sigma_max / self.sigma_min))

    def rate(self, sigma: Tensor) -> Tensor:
        return torch.full_like(sigma, math.log(self.sigma_max / self.sigma_min))


@dataclass(frozen=True)
class Tapered(SigmaDistribution):
    """log sigma uniform on either side of a ``knee``, with the ``share`` of the samples above it.

    Far above the data's standard deviation the score is nearly that of one Gaussian and needs few samples.
    """

    sigma_min: float
    knee: float
    sigma_max: float
    share: float = 0.1

    def __post_init__(self) -> None:
        if not (0 < self.sigma_min < self.knee < self.sigma_max < math.inf and 0 < self.share < 1):
            raise ValueError(
                f"Tapered got {self.sigma_min:g}, {self.knee:g}, {self.sigma_max:g} and a share of {self.share:g}; "
                "expected 0 < sigma_min < knee < sigma_max and 0 < share < 1"
            )

    def _spans(self) -> tuple[float, float]:
        return math.log(self.knee / self.sigma_min), math.log(self.sigma_max / self.knee)

    def __call__(self, u: Tensor) -> Tensor:
        below, above = self._spans()
        low = u * (below / (1 - self.share))
        high = below + (u - (1 - self.share)) * (above / self.share)
        return torch.exp(math.log(self.sigma_min) + torch.where(low < below, low, high))

    def rate(self, sigma: Tensor) -> Tensor:
        below, above = self._spans()
        return torch.full_like(sigma, below / (1 - self.share)).where(sigma < self.knee, above / self.share)


@dataclass(frozen=True)
class LogNormal(SigmaDistribution):
    """log sigma normal with mean and std; Karras et al., 2022, arXiv:2206.00364: P_mean = -1.2, P_std = 1.2."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError(f"LogNormal got mean {self.mean:g}, std {self.std:g}; expected finite and std > 0")

    def __call__(self, u: Tensor) -> Tensor:
        return torch.exp(self.mean + self.std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))

    def rate(self, sigma: Tensor) -> Tensor:
        z = (sigma.log() - self.mean) / self.std
        return self.std * math.sqrt(2 * math.pi) * torch.exp(0.5 * z**2)


@dataclass(frozen=True)
class FromProcess(SigmaDistribution):
    """Time uniform between t_min and t_max."""

    process: Process

    def __call__(self, u: Tensor) -> Tensor:
        p = self.process
        return p.sigma(p.t_min + u * (p.t_max - p.t_min))

    def rate(self, sigma: Tensor) -> Tensor:
        # g^2 / alpha^2 = d sigma^2 / dt
        p = self.process
        t = p.time(sigma)
        return 0.5 * (p.t_max - p.t_min) * (p.diffusion(t) / p.std(t)) ** 2


class FromSigmas(SigmaDistribution):
    """Each level of a fixed sequence equally often (NCSN, DDPM); a final 0 is left out."""

    def __init__(self, sigmas: Tensor | list[float]) -> None:
        grid = check_sigmas(sigmas)
        self.sigmas = torch.tensor([s for s in grid if s > 0], dtype=torch.float64)
        self._table = Table(self.sigmas)

    def __call__(self, u: Tensor) -> Tensor:
        n = len(self.sigmas)
        index = (u * n).long().clamp(0, n - 1)
        return self._table.like(u).take(index)

    def rate(self, sigma: Tensor) -> Tensor:
        raise ValueError("a fixed sequence has no density; for the likelihood weighting use LogUniform or FromProcess")


def visited(process: Process) -> SigmaDistribution:
    """The levels that a process is trained at as published: uniform in time, or DDPM's own steps."""
    return FromSigmas(process.step_sigmas.flip(0)) if isinstance(process, DiscreteVP) else FromProcess(process)


def fitting(process: Process, sigma_data: float) -> SigmaDistribution:
    """EDM's levels for a VE process, half a unit of log sigma below the data's scale (its -1.2 where that is 0.5), with
    its deviation of 1.2; the levels that other processes visit."""
    return LogNormal(math.log(sigma_data) - 0.5, 1.2) if isinstance(process, VE) else visited(process)


def sequence(sigma_min: float, sigma_max: float, levels: int = 10) -> FromSigmas:
    """Each level of a geometric sequence equally often, as NCSN's."""
    return FromSigmas(geometric(levels, sigma_min=sigma_min, sigma_max=sigma_max))


GRIDS: dict[str, Callable[..., Tensor]] = {
    "karras": karras,
    "geometric": geometric,
    "log_linear": log_linear,
    "process": from_process,
    "steps": from_betas,
}
"""Noise levels of sampling by the names that configs have for them."""
LEVELS: dict[str, Callable[..., SigmaDistribution]] = {
    "auto": fitting,
    "process": visited,
    "log_uniform": LogUniform,
    "log_normal": LogNormal,
    "tapered": Tapered,
    "sequence": sequence,
}
"""Noise levels of training, likewise."""

_MOST = 1.5


@dataclass(frozen=True)
class Suggestion:
    """Settings for annealed Langevin dynamics, computed from data; ``str()`` gives them with the reasons."""

    sigma_data: float
    distances: tuple[float, float, float]
    sigma_max: float
    sigma_min: float
    ratio: float
    levels: int
    steps: int
    step_size: float
    rows: int
    mismatch: float
    bounded: bool

    def sigmas(self) -> Tensor:
        """The geometric sequence."""
        return geometric(self.levels, sigma_min=self.sigma_min, sigma_max=self.sigma_max)

    def __str__(self) -> str:
        low, middle, high = self.distances
        rule = (
            "neighbouring levels overlap: half of one level's radii lie within 3 deviations of the next"
            if not self.bounded
            else "the overlap rule gives more than 1.5, or nothing, in few dimensions, so at most 1.5 is taken"
        )
        return "\n".join(
            [
                f"sigma_data  {self.sigma_data:.4g}   root mean square of the data, for preconditioning",
                f"distances   {low:.4g}, {middle:.4g}, {high:.4g}   1 %, median, largest, between {self.rows} samples",
                f"sigma_max   {self.sigma_max:.4g}   the largest distance, so that noise joins all samples",
                f"sigma_min   {self.sigma_min:.4g}   a hundredth of the data's range, or what was asked",
                f"ratio       {self.ratio:.4g}   {rule}",
                f"L           {self.levels}   levels from sigma_max to sigma_min with that ratio",
                f"T           {self.steps}   Langevin steps a level, given",
                f"step_size   {self.step_size:.4g}   leaves {self.mismatch:.4g} times the variance that the next level "
                "expects, nearest to 1",
            ]
        )


def suggest(data: Tensor, *, steps: int = 5, sigma_min: float | None = None, rows: int = 2000) -> Suggestion:
    """Settings of NCSNv2's rules for data (N, *D), from ``rows`` of its samples, with ``steps`` a level.

    The samples are drawn at random, always the same ones: data is often sorted.

    The step size is this library's, x + a/2 score + sqrt(a) z: twice the epsilon of the paper. Song and Ermon, Improved
    Techniques for Training Score-Based Generative Models, 2020, arXiv:2006.09011, techniques 1, 2 and 4.

    Raises ValueError for fewer than two samples, constant or non-finite data, or steps < 1.
    """
    check_batch(data, "data")
    check_finite(data, "data")
    index = np.random.default_rng(0).permutation(len(data))[:rows]
    some = data[torch.from_numpy(np.sort(index)).to(data.device)].flatten(1).cpu().double()
    spread = float(some.max() - some.min()) if len(some) else 0.0
    if len(some) < 2 or spread == 0 or steps < 1:
        raise ValueError(
            f"{len(some)} samples that span {spread:g}, steps = {steps}; expected at least two that differ, and "
            "steps >= 1"
        )
    pairs = torch.pdist(some)
    quantiles = [float(np.quantile(pairs.numpy(), q)) for q in (0.01, 0.5)]
    highest, lowest = float(pairs.max()), 0.01 * spread if sigma_min is None else float(sigma_min)
    wanted = _overlap_ratio(some.shape[1])
    _check(2, lowest, highest)
    levels = max(2, 1 + math.ceil(math.log(highest / lowest) / math.log(wanted)))
    ratio = (highest / lowest) ** (1 / (levels - 1))
    share, mismatch = _step_share(ratio, steps)
    return Suggestion(
        sigma_data=float(some.square().mean().sqrt()),
        distances=(quantiles[0], quantiles[1], highest),
        sigma_max=highest,
        sigma_min=lowest,
        ratio=ratio,
        levels=levels,
        steps=steps,
        step_size=2 * share * lowest**2,
        rows=len(some),
        mismatch=mismatch,
        bounded=wanted == _MOST,
    )


def langevin_step_size(sigmas: Tensor | Iterable[float], steps: int) -> float:
    """The step size of annealed Langevin dynamics over these levels, ``steps`` at each, by NCSNv2's rule.

    The variance that is left of a point of data comes nearest to what the next level expects, for the largest ratio of
    two neighbours. The step is this library's, x + a/2 score + sqrt(a) z, at the smallest positive level; for one level
    alone it is a tenth of its square. Song and Ermon, 2020, arXiv:2006.09011, technique 4.
    """
    grid = [s for s in check_sigmas(sigmas) if s > 0]
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least one at each level")
    ratio = max((a / b for a, b in pairwise(grid)), default=1.0)
    return (0.1 if ratio == 1 else 2 * _step_share(ratio, steps)[0]) * grid[-1] ** 2


def _overlap_ratio(dims: int) -> float:
    """g with Phi(sqrt(2 D)(g - 1) + 3 g) - Phi(sqrt(2 D)(g - 1) - 3 g) = 1/2, at most 1.5.

    There is no root for D <= 4, and it is 19.5 for D = 5: up to D = 40 the bound decides.
    """

    def gap(g: float) -> float:
        middle = math.sqrt(2 * dims) * (g - 1)
        return float(ndtr(middle + 3 * g) - ndtr(middle - 3 * g)) - 0.5

    from scipy.optimize import brentq

    return _MOST if gap(_MOST) > 0 else float(brentq(gap, 1.0, _MOST))


def _step_share(ratio: float, steps: int) -> tuple[float, float]:
    """e / sigma_L^2 in (0, 1) that brings the variance left after T steps nearest to 1, and that variance."""

    def left(share: float) -> float:
        q = 2 * share / (1 - (1 - share) ** 2)
        return (1 - share) ** (2 * steps) * (ratio**2 - q) + q

    shares = np.geomspace(1e-6, 0.999, 2000)
    start = int(np.argmin([abs(left(s) - 1) for s in shares]))
    low, high = shares[max(0, start - 1)], shares[min(len(shares) - 1, start + 1)]
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(lambda s: abs(left(s) - 1), bounds=(low, high), method="bounded")
    return float(found.x), left(float(found.x))
