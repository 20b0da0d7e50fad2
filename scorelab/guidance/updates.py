"""How a score is moved away from another one, and what may be done to the move so that large scales stay in bounds.

    x0_hat = x0_other + scale (x0_score - x0_other),        x0_ = x + sigma^2 score, the denoised sample

That is the same in score, noise and denoised sample; what follows is not, and acts on denoised samples, whatever a
network predicts, each sample by itself:

    projected    x0_score + (scale - 1) d, d being x0_score - x0_other, no longer than a norm, and its part along
                 x0_score, which saturates, times eta
    rescaled     x0_hat times 1 - phi + phi std(x0_score)/std(x0_hat), deviations over the numbers of a sample
    thresholded  x0_hat clamped to +-s, times limit/s: s the limit, or a percentile of |x0_hat| if that is more
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from scorelab.checks import broadcast
from scorelab.scores import Formula
from scorelab.typing import Tensor

__all__ = ["Projected", "Thresholded", "contrasted"]


@dataclass(frozen=True)
class Projected:
    """Adaptive projected guidance: ``eta`` 1 and an infinite ``norm`` are plain guidance, eta 0 is as published.

    norm: r, the longest difference of denoised samples, in the data's units (2.5 for EDM2's latents, 15 for SDXL's).
    The paper's momentum is left out: what remembers earlier steps is no function of x and sigma, so no score.

    Sadat, Hilliges and Weber, Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models,
    2024, arXiv:2410.02416.
    """

    eta: float = 0.0
    norm: float = math.inf

    def __post_init__(self) -> None:
        if not math.isfinite(self.eta) or not self.norm > 0:
            raise ValueError(f"eta = {self.eta:g}, norm = {self.norm:g}; expected a finite eta and a positive norm")

    def __call__(self, update: Tensor, x0_hat: Tensor) -> Tensor:
        """The difference of denoised samples ``update`` (B, *D), bounded and projected, for x0_hat (B, *D)."""
        if self.norm < math.inf:
            update = update * (self.norm / _norm(update).clamp_min(self.norm))
        along = x0_hat / _norm(x0_hat).clamp_min(torch.finfo(x0_hat.dtype).tiny)
        return update + (self.eta - 1) * (update * along).flatten(1).sum(1).reshape(_ones(x0_hat)) * along


@dataclass(frozen=True)
class Thresholded:
    """Denoised samples kept within +-limit, the largest value of the data: Imagen's dynamic thresholding.

    percentile: of the magnitudes in a sample, from 0 to 1; None for static thresholding, which clamps alone.

    Saharia et al., Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding, 2022,
    arXiv:2205.11487, section 2.3.
    """

    percentile: float | None = 0.995
    limit: float = 1.0

    def __post_init__(self) -> None:
        share = 1.0 if self.percentile is None else self.percentile
        if not 0 < share <= 1 or not 0 < self.limit < math.inf:
            raise ValueError(
                f"percentile = {self.percentile}, limit = {self.limit:g}; expected 0 < percentile <= 1, such as 0.995, "
                "or None, and a positive limit"
            )

    def __call__(self, x0_hat: Tensor) -> Tensor:
        """x0_hat (B, *D) within +-limit."""
        if self.percentile is None:
            return x0_hat.clamp(-self.limit, self.limit)
        bound = x0_hat.flatten(1).abs().quantile(self.percentile, 1).clamp_min(self.limit).reshape(_ones(x0_hat))
        return torch.maximum(torch.minimum(x0_hat, bound), -bound) * (self.limit / bound)


def rescaled(x0_hat: Tensor, conditional: Tensor, phi: float) -> Tensor:
    """x0_hat (B, *D) with its deviation brought towards that of the conditional one, all the way for phi 1.

    Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, 2023, arXiv:2305.08891, eq. 15 and 16,
    which writes it for the network's output.
    """
    own, wanted = (x.flatten(1).std(1, correction=0).reshape(_ones(x)) for x in (x0_hat, conditional))
    # of a single number, or a constant, there is no deviation to keep
    ratio = torch.where(own > 0, wanted / own.clamp_min(torch.finfo(own.dtype).tiny), 1.0)
    return x0_hat * (1 - phi + phi * ratio)


def contrasted(
    scale: float, rescale: float = 0.0, projected: Projected | None = None, threshold: Thresholded | None = None
) -> Formula:
    """The formula other + scale (score - other), its move projected, then rescaled, then thresholded.

    Raises ValueError for a scale that is not finite, or a rescale that is not between 0 and 1, TypeError for what is no
    Projected or Thresholded.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; expected a finite number: 1 is the score itself, 0 the other one")
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale is {rescale:g}; expected a share phi from 0 (none) to 1, such as 0.7")
    for name, given, kind in (("projected", projected, Projected), ("threshold", threshold, Thresholded)):
        if given is not None and not isinstance(given, kind):
            raise TypeError(f"{name} is {given!r}; expected None or one such as {kind()!r}")

    def formula(x: Tensor, sigma: Tensor, score: Tensor, other: Tensor) -> Tensor:
        if (projected is None and not rescale and threshold is None) or not len(x):
            return torch.lerp(other, score, scale)
        var = broadcast(sigma, x) ** 2
        conditional, update = x + var * score, var * (score - other)
        if projected is not None:
            update = projected(update, conditional)
        x0_hat = changed = conditional + (scale - 1) * update
        if rescale:
            changed = rescaled(changed, conditional, rescale)
        if threshold is not None:
            changed = threshold(changed)
        # two parts, so that small noise levels cost no digits where nothing is changed
        return score + ((scale - 1) * update + (changed - x0_hat)) / var

    return formula


def _ones(x: Tensor) -> tuple[int, ...]:
    """The shape (B, 1, ..., 1)."""
    return (-1, *(1,) * (x.ndim - 1))


def _norm(x: Tensor) -> Tensor:
    """Each sample's Euclidean norm, (B, 1, ..., 1)."""
    norm: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norm.reshape(_ones(x))
