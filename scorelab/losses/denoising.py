"""Denoising score matching: the score of q(x | x0) = N(x0, sigma^2 I) is -(x - x0)/sigma^2 = -eps/sigma.

With x = x0 + sigma eps, each sample's loss is

    weight(sigma) * mean over dimensions of (sigma score(x, sigma) + eps)^2

averaged (not summed) over dimensions, without a factor 1/2. A weight of 1 is the eps-MSE, lambda = sigma^2 of NCSN. By
Tweedie sigma score + eps = (x0_hat - x0)/sigma, so a weight w on the error of x0_hat is w sigma^2 here:

    sigma2, snr   1                          (SNR ||x0_hat - x0||^2 is the eps-MSE)
    x0            sigma^2
    edm           (sigma^2 + sd^2)/sd^2
    min_snr       min(1, gamma sigma^2)      (min(SNR, gamma) on x0)
    likelihood    d log sigma / du           (undoes the sampling of sigma: D times the expected loss bounds KL, up to
                                              a constant of the data)

Vincent, A Connection Between Score Matching and Denoising Autoencoders, 2011; Song and Ermon, 2019, arXiv:1907.05600;
Karras et al., 2022, arXiv:2206.00364; Hang et al., Efficient Diffusion Training via Min-SNR Weighting, 2023,
arXiv:2303.09556; Song et al., Maximum Likelihood Training of Score-Based Diffusion Models, 2021, arXiv:2101.09258.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from scorelab.checks import broadcast, check_batch, nearest_name, widened
from scorelab.noise import randn
from scorelab.sigmas import SigmaDistribution
from scorelab.typing import ScoreFn, Tensor

__all__ = ["WEIGHTINGS", "Denoising", "Losses", "denoising_loss", "posterior_mean", "weighting"]

Weighting = Callable[[Tensor], Tensor]

WEIGHTINGS = ("sigma2", "snr", "x0", "edm", "min_snr", "likelihood")


def weighting(
    name: str, *, sigma_data: float = 0.5, gamma: float = 5.0, sigmas: SigmaDistribution | None = None
) -> Weighting:
    """A weight of the eps-MSE by name; sigma_data is for "edm", gamma for "min_snr", sigmas for "likelihood".

    RuntimeWarning where "likelihood" leaves a tenth or less of the samples in effect, (mean w)^2 / mean w^2: it undoes
    the sampling of sigma, so distributions that seldom visit small levels give those weights of thousands.
    """
    if name in ("sigma2", "snr"):
        return torch.ones_like
    if name == "x0":
        return torch.square
    if name == "edm":
        return lambda s: (s**2 + sigma_data**2) / sigma_data**2
    if name == "min_snr":
        return lambda s: (gamma * s**2).clamp_max(1.0)
    if name == "likelihood":
        if sigmas is None:
            raise ValueError("the likelihood weighting needs the distribution of sigmas; pass sigmas=LogUniform(...)")
        place = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
        w = sigmas.rate(sigmas(place))
        share = float(w.mean() ** 2 / w.square().mean())
        if share < 0.1:
            warnings.warn(
                f"the likelihood weighting has an effective sample size of {share:.2%} with these levels: weights "
                f"from {float(w.min()):.3g} to {float(w.max()):.3g}, so few samples decide; visit levels evenly in log "
                "sigma instead (LogUniform, training.sigmas='log_uniform'), where all weigh the same",
                RuntimeWarning,
                stacklevel=2,
            )
        return sigmas.rate
    raise ValueError(f"unknown weighting {name!r}; {nearest_name(name, WEIGHTINGS)}")


def denoising_loss(
    score: ScoreFn, x0: Tensor, sigma: Tensor, noise: Tensor, weight: Weighting = torch.ones_like
) -> Tensor:
    """The loss of each sample, (B,): x0 and noise (B, *D), sigma () or (B,) > 0; averaged over dimensions, no half."""
    check_batch(x0, "x0")
    level = broadcast(sigma, x0)
    error = level * score((x0 + level * noise).to(x0.dtype), sigma) + noise
    return weight(widened(sigma)) * error.flatten(1).square().mean(1)


class Losses(NamedTuple):
    """Loss and noise level of each sample, both (B,)."""

    loss: Tensor
    sigma: Tensor


class Noised(NamedTuple):
    """Targets (B, *D), noise levels (B,) and noise (B, *D): the network sees clean + sigma noise."""

    clean: Tensor
    sigma: Tensor
    noise: Tensor

    def rows(self, rows: slice) -> Noised:
        """Some of the samples."""
        return Noised(self.clean[rows], self.sigma[rows], self.noise[rows])


@dataclass(frozen=True)
class Denoising:
    """Denoising score matching over a distribution of noise levels: ``objective(score, x0, generator)``.

    Levels are stratified, one in each of B equal parts of probability, which leaves the expected loss unchanged and
    lowers its variance. With ``reference`` > 0 the target is the stable one: of a batch of ``count(B)`` samples the
    first B are noised, and x0 in the target is replaced by its posterior mean over the whole batch,

        sum_k softmax_k(-||x - x0_k||^2 / (2 sigma^2)) x0_k,

    whose expectation tends to E[x0 | x], with far less variance, as the batch grows. Xu et al., Stable Target Field for
    Reduced Variance Score Estimation in Diffusion Models, 2023, arXiv:2302.00670.
    """

    sigmas: SigmaDistribution
    weight: Weighting = torch.ones_like
    reference: int = 0

    def count(self, batch_size: int) -> int:
        """How many samples a call needs to train on ``batch_size`` of them."""
        return max(batch_size, self.reference)

    def __call__(self, score: ScoreFn, x0: Tensor, generator: torch.Generator, batch_size: int | None = None) -> Losses:
        """Losses (batch_size,) of a batch x0 (count(batch_size), *D); batch_size is by default all of it."""
        count = len(x0) if batch_size is None else batch_size
        sigma = self.levels(torch.rand(count, generator=generator, device=generator.device)).to(widened(x0))
        noise = randn((count, *x0.shape[1:]), x0, generator)
        return self.losses(score, self.noised(x0[:count], sigma, noise, x0))

    def levels(self, u: Tensor) -> Tensor:
        """Noise levels of a batch from uniform numbers u (B,), ascending: one in each of B parts of probability."""
        return self.sigmas((torch.arange(len(u), device=u.device) + u) / len(u))

    def noised(self, clean: Tensor, sigma: Tensor, noise: Tensor, x0: Tensor) -> Noised:
        """What ``losses`` takes, from some samples (n, *D), their levels (n,) and noise, and the batch x0 they are of,
        from which the stable target is made.
        """
        if self.reference:
            level = broadcast(sigma, clean)
            x = clean + level * noise
            # the loss rebuilds x from both: x0 + sigma noise is unchanged
            clean = posterior_mean(x, sigma, x0)
            noise = (x - clean) / level
        return Noised(clean, sigma, noise)

    def losses(self, score: ScoreFn, noised: Noised) -> Losses:
        """Losses of noised samples."""
        return Losses(denoising_loss(score, noised.clean, noised.sigma, noised.noise, self.weight), noised.sigma)


def posterior_mean(x: Tensor, sigma: Tensor, x0: Tensor) -> Tensor:
    """E[x0 | x] for x (B, *D) at sigma (B,) when x0 (N, *D) are all the data, equally likely."""
    # around the data's mean: a matrix product loses the digits of an offset
    centre, precision = x0.flatten(1).mean(0), sigma.unsqueeze(1) ** -2
    flat, centres = x.flatten(1) - centre, x0.flatten(1) - centre
    half = 0.5 * centres.square().sum(1, keepdim=True)
    # -||x - c||^2 / (2 sigma^2) without ||x||^2, which the softmax ignores: one product, and one array of its size
    logits = torch.cat([flat * precision, -precision], 1) @ torch.cat([centres, half], 1).T
    # not below e^-40: denormal numbers would slow all that follows
    weight = logits.sub_(logits.amax(1, keepdim=True)).clamp_min_(-40.0).exp_()
    total, dims = weight @ torch.cat([centres, torch.ones_like(half)], 1), centres.shape[1]
    return (centre + total.narrow(1, 0, dims) / total.narrow(1, dims, 1)).reshape(x.shape)
