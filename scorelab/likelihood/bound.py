"""The variational bound: a lower bound on the log-density of what ancestral sampling generates.

The data's noising q and the sampler's chain p over levels sigma_T > ... > sigma_1 > 0 give

    log p(x0)  >=  -L_T - sum_i L_i - L_0
    L_T = KL(q(x_T | x0) || N(m, (sigma_T^2 + data_std^2) I)),    m the score's data_mean or 0
    L_i = KL(q(x_{i-1} | x_i, x0) || p(x_{i-1} | x_i))        both Gaussian, so in closed form given x_i
    L_0 = -log p(x0 | x_1)                                    a density, or the mass of a bin

For equal variances L_i is (SNR(sigma_{i-1}) - SNR(sigma_i))/2 ||x0 - x0_hat||^2. With K draws of the whole chain

    log (1/K) sum_k p(x0, x_1 .. x_T) / q(x_1 .. x_T | x0)

is a bound that tightens as K grows. All is unscaled; a Kullback-Leibler divergence does not change under scaling.

Ho et al., 2020, arXiv:2006.11239; Nichol and Dhariwal, Improved DDPM, 2021, arXiv:2102.09672; Kingma et al., VDM,
2021, arXiv:2107.00630; Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016, arXiv:1509.00519.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch

from scorelab.checks import check_finite, check_range, check_sigmas, level
from scorelab.likelihood.ode import check_density_batch, normal_log_prob
from scorelab.losses.variational import Bins, gaussian_kl
from scorelab.noise import Noise, PerSampleNoise
from scorelab.samplers.analytic import AnalyticVariance
from scorelab.samplers.base import Counted
from scorelab.samplers.stochastic import Ancestral
from scorelab.scores import check_known, data_mean
from scorelab.typing import ScoreFn, Tensor

__all__ = ["VariationalBound", "variational_bound"]


@dataclass(frozen=True)
class VariationalBound:
    """``log_prob`` (B,), the bound in nats; its parts with one draw: ``prior`` L_T (B,), ``steps`` L_i (T - 1, B) from
    the noisiest on, ``decoder`` L_0 (B,), all None for more draws; ``nfe`` evaluations of the whole batch."""

    log_prob: Tensor
    prior: Tensor | None
    steps: Tensor | None
    decoder: Tensor | None
    nfe: int


_REMEDY = "check the score function, or take levels that fall less at once"


def _sum(x: Tensor) -> Tensor:
    total: Tensor = x.flatten(1).sum(1)
    return total


def _tensor(value: Tensor | float, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else level(value, like)


def _check(
    score: ScoreFn,
    x0: Tensor,
    sigmas: Tensor | Iterable[float],
    sampler: Ancestral,
    draws: int,
    numbers: dict[str, float | None],
    data_range: tuple[float, float],
) -> list[float]:
    """The positive levels; errors for everything that can't be used."""
    check_density_batch(x0, "x0")
    if not isinstance(sampler, Ancestral):
        raise TypeError(f"sampler is {sampler!r}; expected scorelab.samplers.Ancestral(), whose chain has a density")
    if not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws is {draws!r}; expected a whole number >= 1")
    for name, value in numbers.items():
        if value is not None and not (0 < value < math.inf or (name == "data_std" and value == 0)):
            raise ValueError(f"{name} is {value:g}; expected a positive number")
    if numbers["spacing"] is not None:
        if not data_range[0] < data_range[1]:
            raise ValueError(f"data_range is {data_range}; expected (low, high) of the values x0 may take")
        check_range(x0, data_range, "x0")
    levels = [s for s in check_sigmas(sigmas) if s > 0]
    check_known(score, levels[-1], levels[0])
    return levels


def variational_bound(
    score: ScoreFn,
    x0: Tensor,
    sigmas: Tensor | Iterable[float],
    sampler: Ancestral = Ancestral(),  # noqa: B008
    *,
    data_std: float = 0.0,
    spacing: float | None = None,
    data_range: tuple[float, float] = (-1.0, 1.0),
    decoder_std: float | None = None,
    draws: int = 1,
    generator: torch.Generator | PerSampleNoise | None = None,
) -> VariationalBound:
    """A lower bound on log p(x0) in nats, for clean data x0 (B, *D), of what ``Ancestral`` generates over ``sigmas``.

    data_std: the chain starts from N(m, (sigma_T^2 + data_std^2) I); with m = 0, 1 is N(0, I) of DDPM's scaled x.
    spacing: None for the log-density of continuous x0; else x0 lies on values that far apart in ``data_range`` and the
    decoder gives the mass of bins, open at both ends (2/255 for k/127.5 - 1). decoder_std: of the last step, by default
    from the sampler's forward variance; guided-diffusion takes the posterior variance of the step before, and learned
    variance, here too, lies between both; an analytic variance is that of x0 given x, without ``spacing``. draws: K; 1
    averages closed forms of the divergences over one chain, more weigh whole chains and tighten the bound.

    bits/dim are ``-log_prob / (D log 2)``. Raises ValueError for shapes, levels or counts that don't fit.
    """
    numbers = {"spacing": spacing, "data_std": data_std, "decoder_std": decoder_std}
    levels = _check(score, x0, sigmas, sampler, draws, numbers, data_range)
    counted, noise = Counted(score), Noise(generator)
    weights = []
    with torch.no_grad():
        for _ in range(draws):
            chain = _Chain(counted, x0, levels, sampler, noise, math.hypot(levels[0], data_std))
            decoder = chain.decode(decoder_std, spacing, data_range)
            if draws == 1:
                steps = torch.stack(chain.divergences) if chain.divergences else x0.new_zeros(0, len(x0))
                prior = _sum(gaussian_kl(x0 - data_mean(score, x0), levels[0], chain.prior_std))
                bound = -(prior + steps.sum(0) + decoder)
                check_finite(bound, "the bound", _REMEDY)
                return VariationalBound(bound, prior, steps, decoder, counted.nfe)
            weights.append(chain.log_weight - decoder)
        log_prob = torch.logsumexp(torch.stack(weights), 0) - math.log(draws)
    check_finite(log_prob, "the bound", _REMEDY)
    return VariationalBound(log_prob, None, None, None, counted.nfe)


class _Chain:
    """One draw of x_T, ..., x_1 given x0: L_i of its steps, and log p(x_1 .. x_T) / q(x_1 .. x_T | x0)."""

    def __init__(
        self,
        score: ScoreFn,
        x0: Tensor,
        levels: list[float],
        sampler: Ancestral,
        noise: Noise,
        prior_std: float,
    ) -> None:
        self.score, self.x0, self.levels, self.sampler, self.prior_std = score, x0, levels, sampler, prior_std
        z = noise(x0)
        x = x0 + levels[0] * z
        start = normal_log_prob(x - data_mean(score, x), prior_std)
        self.log_weight = start - normal_log_prob(levels[0] * z, levels[0])
        self.divergences = []
        for a, b in pairwise(levels):
            mean, std = sampler.transition(score, x, a, b)
            true_mean, true_std = x0 + (b / a) ** 2 * (x - x0), math.sqrt(sampler.variances(a, b)[0])
            self.divergences.append(_sum(gaussian_kl(true_mean - mean, true_std, std)))
            z = noise(x0)
            x = true_mean + true_std * z
            self.log_weight = self.log_weight + _sum(
                0.5 * z**2 - 0.5 * ((x - mean) / std) ** 2 - _tensor(std / true_std, x).log()
            )
        self.x = x

    def decode(self, std: float | None, spacing: float | None, data_range: tuple[float, float]) -> Tensor:
        """L_0 = -log p(x0 | x_1), (B,)."""
        last = self.levels[-1]
        least = 0.0
        if len(self.levels) > 1:
            # the posterior variance of the step before, in the coordinates in which x0 is clean data
            process_scale = self.sampler.variances(last, 0.0)[1] / last**2
            least = self.sampler.variances(self.levels[-2], last)[0] * process_scale
        mean, own = self.sampler.transition(self.score, self.x, last, 0.0, least)
        if std is not None:
            own = std
        elif isinstance(self.sampler.variance, AnalyticVariance) and spacing is None:
            # best for a density: a few numbers that are far off would widen it, which bins do not need
            own = own or math.sqrt(self.sampler.variances(last, 0.0)[1])
        elif self.sampler.variance != "learned" or not least:
            own = math.sqrt(self.sampler.variances(last, 0.0)[1])
        gap = self.x0 - mean
        if spacing is None:
            return _sum(0.5 * (gap / own) ** 2 + _tensor(own, gap).log() + 0.5 * math.log(2 * math.pi))
        return -_sum(Bins(spacing, *data_range).log_mass(self.x0, mean, own))
