"""The optimal variance of an ancestral step, estimated from data: Analytic-DPM, derived here in unscaled coordinates.

From x at level sigma to r < sigma, given x0, the chain has mean x0 + (r^2/sigma^2) (x - x0) and the posterior variance
p = r^2 (1 - r^2/sigma^2). Without x0 the mean is that at x0_hat = E[x0 | x], and the variance, averaged over x and
dimensions, is what the best Gaussian of one variance has in the sense of KL(q || p):

    s^2 = p + (1 - r^2/sigma^2)^2 c(sigma),      c(sigma) = E tr Cov(x0 | x) / D

By x0 = x - sigma eps and E[eps | x] = -sigma score, with eps split into its mean given x and what is left,

    c(sigma) = sigma^2 (1 - sigma^2 E||score||^2 / D)             "norm"
             = sigma^2 E||sigma score + eps||^2 / D               "error"

for the true score. The first is the paper's; where sigma is large it is a small difference of large numbers, and the
second is not. No linear denoiser beats E[x0 | x], so, with v the variance of the data averaged over dimensions
(Jensen's inequality for what is concave in it),

    0 <= c(sigma) <= sigma^2 v / (sigma^2 + v)

Of a score with errors the second is what is best for its own mean, and then has no upper bound.

Bao, Li, Zhu and Zhang, Analytic-DPM: an Analytic Estimate of the Optimal Reverse Variance in Diffusion Probabilistic
Models, 2022, arXiv:2201.06503; of imperfect means: Bao, Li, Sun, Zhu and Zhang, Estimating the Optimal Covariance with
Imperfect Mean in Diffusion Probabilistic Models, 2022, arXiv:2206.07309.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from scorelab.checks import check_batch, check_finite, check_sigmas, level, nearest_name
from scorelab.noise import Noise, PerSampleNoise
from scorelab.samplers.base import Counted
from scorelab.scores import check_known, restricted
from scorelab.typing import ScoreFn, Tensor

__all__ = ["AnalyticVariance", "analytic_variance"]


@dataclass(frozen=True)
class AnalyticVariance:
    """``Ancestral``'s optimal variance: at ``sigmas``, descending and positive, ``denoised`` estimates c, the variance
    of x0 given x averaged over dimensions, with standard ``errors``; ``data_std`` is the root of v, infinity where the
    upper bound does not hold. All in the data's units.
    """

    sigmas: tuple[float, ...]
    denoised: tuple[float, ...]
    errors: tuple[float, ...]
    data_std: float = math.inf

    @property
    def norms(self) -> tuple[float, ...]:
        """E||score||^2 / D at each level, of the true score, with standard errors ``errors`` / sigma^4."""
        return tuple((1 - c / s**2) / s**2 for s, c in zip(self.sigmas, self.denoised, strict=True))

    def at(self, sigma: float) -> float:
        """c at one of ``sigmas``, within its bounds; ValueError for another level."""
        for known, c in zip(self.sigmas, self.denoised, strict=True):
            if math.isclose(known, sigma, rel_tol=1e-6):
                most = 1 / (sigma**-2 + self.data_std**-2) if self.data_std < math.inf else math.inf
                return min(max(c, 0.0), most)
        raise ValueError(
            f"the analytic variance was estimated at {len(self.sigmas)} levels from {self.sigmas[0]:g} to "
            f"{self.sigmas[-1]:g}, and {sigma:g} is none of them; expected analytic_variance(score, x0, sigmas) of the "
            "levels that are sampled"
        )

    def beyond(self, sigma: float, sigma_next: float) -> float:
        """By how much a step's optimal variance exceeds the posterior variance."""
        return (1 - (sigma_next / sigma) ** 2) ** 2 * self.at(sigma)


def analytic_variance(
    score: ScoreFn,
    x0: Tensor,
    sigmas: Tensor | Iterable[float],
    *,
    method: str = "error",
    batch_size: int = 256,
    generator: torch.Generator | PerSampleNoise | None = None,
) -> AnalyticVariance:
    """The optimal variance of ancestral steps over ``sigmas``, from clean data x0 (N, *D) noised once at each level.

    method: "error" or "norm", see above. Data is evaluated ``batch_size`` rows at once if the score says how it is
    restricted to rows. Raises ValueError for fewer than two samples, for levels that the score does not know and for
    scores that are not finite.
    """
    check_batch(x0, "x0")
    check_finite(x0, "x0")
    if method not in ("error", "norm"):
        raise ValueError(f"method is {method!r}; {nearest_name(method, ('error', 'norm'))}")
    if len(x0) < 2 or batch_size < 1:
        raise ValueError(f"got {len(x0)} samples, batch_size {batch_size}; expected at least 2, and 1")
    levels = [s for s in check_sigmas(sigmas) if s > 0]
    check_known(score, levels[-1], levels[0])
    noise, index = Noise(generator), torch.arange(len(x0), device=x0.device)
    parts = [(rows, restricted(score, rows)) for rows in torch.split(index, batch_size)]
    split = [(rows, Counted(part)) for rows, part in parts if part is not None] or [(index, Counted(score))]
    found = []
    with torch.no_grad():
        for sigma in levels:
            z, each = noise(x0), []
            for rows, part in split:
                scaled = sigma * part(x0[rows] + sigma * z[rows], level(sigma, x0))
                own = (scaled + z[rows] if method == "error" else scaled).flatten(1).double().square().mean(1)
                each.append(own if method == "error" else 1 - own)
            c = sigma**2 * torch.cat(each)
            check_finite(c[:, None], f"the score's norm at sigma = {sigma:g}", "check the score function")
            found.append((sigma, float(c.mean()), float(c.std()) / math.sqrt(len(c))))
    # what errors of the score add to c is not bounded by the data
    spread = math.inf if method == "error" else float(x0.flatten(1).double().var(0).mean().sqrt())
    sigma_at, denoised, errors = zip(*found, strict=True)
    return AnalyticVariance(sigma_at, denoised, errors, spread)
