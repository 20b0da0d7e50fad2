"""Denoising score matching: the score of q(x | x0) = N(x0, sigma^2 I) is -(x - x0)/sigma^2 = -eps/sigma.

With x = x0 + sigma eps, each sample's loss is

    weight(sigma) * mean over dimensions of (sigma score(x, sigma) + eps)^2

averaged (not summed) over dimensions, without a factor 1/2. A weight of 1 is the eps-MSE, lambda = sigma^2 of NCSN. By
Tweedie sigma score + eps = (x0_hat - x0)/sigma, so a weight w on the error of x0_hat is w sigma^2 here:

    sigma2, snr   1                          (SNR ||x0_hat - x0||^2 is the eps-MSE)
    output        sigma^2/out^2              (the squared error of what the network predicts, F; 1 for the score)
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
from typing import Any

import torch

from scorelab.checks import broadcast, check_batch, nearest_name, widened
from scorelab.losses.base import Objective, conditioned
from scorelab.predictions import EPS, SCORE, Prediction
from scorelab.sigmas import SigmaDistribution
from scorelab.typing import Batch, ScoreFn, Tensor

__all__ = ["WEIGHTINGS", "Denoising", "Weighting", "denoising_loss", "posterior_mean", "weighting"]

Weighting = Callable[[Tensor], Tensor]


def _likelihood(sigmas: SigmaDistribution | None = None) -> Weighting:
    """That of the bound of the likelihood, whatever levels are visited: Song et al., 2021, arXiv:2101.09258."""
    if sigmas is None:
        raise ValueError("the likelihood weighting needs the distribution of sigmas; pass sigmas=LogUniform(...)")
    place = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    w = sigmas.rate(sigmas(place))
    share = float(w.mean() ** 2 / w.square().mean())
    if share < 0.1:
        warnings.warn(
            f"the likelihood weighting has an effective sample size of {share:.2%} with these levels: weights "
            f"from {float(w.min()):.3g} to {float(w.max()):.3g}, so few samples decide; visit levels evenly in log "
            "sigma instead (LogUniform, training.sigmas.name='log_uniform'), where all weigh the same",
            RuntimeWarning,
            stacklevel=2,
        )
    return sigmas.rate


def _eps() -> Weighting:
    """The error of eps: NCSN's sigma^2 times that of the score, DDPM's SNR times that of x0."""
    return torch.ones_like


def _output(prediction: Prediction) -> Weighting:
    """The error of what the network predicts; of a score that of eps."""
    # the score's own error would weigh the smallest levels alone
    return torch.ones_like if prediction == SCORE else lambda s: (s / prediction.out(s)).square()


def _x0() -> Weighting:
    """The error of x0."""
    return torch.square


def _edm(sigma_data: float) -> Weighting:
    """EDM's, 1/sigma^2 + 1/sigma_data^2 times the error of x0: Karras et al., 2022, arXiv:2206.00364."""
    return lambda s: (s**2 + sigma_data**2) / sigma_data**2


def _min_snr(gamma: float = 5.0) -> Weighting:
    """min(SNR, gamma) times the error of x0: Hang et al., 2023, arXiv:2303.09556."""
    return lambda s: (gamma * s**2).clamp_max(1.0)


WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    "sigma2": _eps,
    "snr": _eps,
    "output": _output,
    "x0": _x0,
    "edm": _edm,
    "min_snr": _min_snr,
    "likelihood": _likelihood,
}
"""Weights of the eps-MSE by name."""


def weighting(
    name: str,
    *,
    sigma_data: float = 0.5,
    gamma: float = 5.0,
    sigmas: SigmaDistribution | None = None,
    prediction: Prediction = EPS,
) -> Weighting:
    """A weight of the eps-MSE by name; sigma_data is for "edm", gamma for "min_snr", sigmas for "likelihood",
    prediction for "output".

    RuntimeWarning where "likelihood" leaves a tenth or less of the samples in effect, (mean w)^2 / mean w^2: it undoes
    the sampling of sigma, so distributions that seldom visit small levels give those weights of thousands.
    """
    if name not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {name!r}; {nearest_name(name, WEIGHTINGS)}")
    options: dict[str, dict[str, Any]] = {
        "edm": {"sigma_data": sigma_data},
        "min_snr": {"gamma": gamma},
        "likelihood": {"sigmas": sigmas},
        "output": {"prediction": prediction},
    }
    return WEIGHTINGS[name](**options.get(name, {}))


def denoising_loss(
    score: ScoreFn, x0: Tensor, sigma: Tensor, noise: Tensor, weight: Weighting = torch.ones_like
) -> Tensor:
    """The loss of each sample, (B,): x0 and noise (B, *D), sigma () or (B,) > 0; averaged over dimensions, no half."""
    check_batch(x0, "x0")
    level = broadcast(sigma, x0)
    error = level * score((x0 + level * noise).to(x0.dtype), sigma) + noise
    return weight(widened(sigma)) * error.flatten(1).square().mean(1)


@dataclass(frozen=True)
class Denoising(Objective):
    """Denoising score matching over a distribution of noise levels.

    With ``reference`` > 0 the target is the stable one: x0 in it is replaced by its posterior mean over that many
    samples,

        sum_k softmax_k(-||x - x0_k||^2 / (2 sigma^2)) x0_k,

    whose expectation tends to E[x0 | x], with far less variance, as they grow in number. A sample with a condition
    averages over those that have the same, one whose condition none of them has, such as "none", over all. Xu et al.,
    Stable Target Field for Reduced Variance Score Estimation in Diffusion Models, 2023, arXiv:2302.00670.

    With ``uncertainty``, log u (B,) of sigma (B,), every level's gradient is divided by the loss that is expected
    there, and u learns it: Karras et al., 2024, arXiv:2312.02696, appendix B.4. The losses keep their values.
    """

    sigmas: SigmaDistribution
    weight: Weighting = torch.ones_like
    reference: int = 0
    uncertainty: Callable[[Tensor], Tensor] | None = None

    def levels(self, u: Tensor) -> Tensor:
        return self.sigmas(u)

    def losses(self, score: Callable[..., Tensor], batch: Batch, u: Tensor, noise: Tensor) -> Tensor:
        clean, sigma = batch.x0, self.levels(u).to(widened(batch.x0))
        if batch.reference is not None:
            level = broadcast(sigma, clean)
            x = clean + level * noise
            # the loss rebuilds x from both: x0 + sigma noise is unchanged
            clean = posterior_mean(x, sigma, batch.reference.x0, _others(batch, batch.reference))
            noise = (x - clean) / level
        loss = denoising_loss(conditioned(score, batch.condition), clean, sigma, noise, self.weight)
        if self.uncertainty is None or not torch.is_grad_enabled():
            return loss
        return _balanced(loss, self.uncertainty(sigma))

    def zero(self, batch: Batch, u: Tensor, noise: Tensor) -> Tensor:
        """That of the plain target, for the stable one too."""
        return self.weight(self.levels(u).to(widened(batch.x0))) * noise.flatten(1).square().mean(1)


def _balanced(loss: Tensor, log_u: Tensor) -> Tensor:
    """The losses (B,), with the gradients of loss / u + log u, which is least where u is the loss expected there."""
    found = loss * torch.exp(-log_u) + log_u
    return loss.detach() + (found - found.detach())


def _others(batch: Batch, reference: Batch) -> Tensor | None:
    """Which samples of the reference each of the batch does not average over, (B, N); None for none."""
    if batch.condition is None or reference.condition is None:
        return None
    if batch.condition.ndim != 1:
        raise ValueError(
            f"the stable target averages over samples of the same class, and conditions are "
            f"{tuple(batch.condition.shape)}; expected (B,) classes, or training.objective.reference=0"
        )
    others = torch.ne(batch.condition.unsqueeze(1), reference.condition)
    # one whose condition none of them has averages over all
    return others & (others.sum(1, keepdim=True) < others.shape[1])


def posterior_mean(x: Tensor, sigma: Tensor, x0: Tensor, others: Tensor | None = None) -> Tensor:
    """E[x0 | x] for x (B, *D) at sigma (B,) when x0 (N, *D) are all the data, equally likely; with ``others`` (B, N),
    without those that are marked for each x.
    """
    # around the data's mean: a matrix product loses the digits of an offset
    centre, precision = x0.flatten(1).mean(0), sigma.unsqueeze(1) ** -2
    flat, centres = x.flatten(1) - centre, x0.flatten(1) - centre
    half = 0.5 * centres.square().sum(1, keepdim=True)
    # -||x - c||^2 / (2 sigma^2) without ||x||^2, which the softmax ignores: one product, and one array of its size
    logits = torch.cat([flat * precision, -precision], 1) @ torch.cat([centres, half], 1).T
    if others is not None:
        logits.masked_fill_(others, float("-inf"))
    # not below e^-40: denormal numbers would slow all that follows
    weight = logits.sub_(logits.amax(1, keepdim=True)).clamp_min_(-40.0).exp_()
    total, dims = weight @ torch.cat([centres, torch.ones_like(half)], 1), centres.shape[1]
    return (centre + total.narrow(1, 0, dims) / total.narrow(1, dims, 1)).reshape(x.shape)
