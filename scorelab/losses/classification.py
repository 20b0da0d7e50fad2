"""Cross-entropy of a classifier of noisy samples: -log p(class | x, sigma) in nats, x = x0 + sigma eps.

Its gradient in x guides a score towards a class. Song et al., 2021, arXiv:2011.13456, appendix I; Dhariwal and Nichol,
2021, arXiv:2105.05233.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from scorelab.checks import broadcast, widened
from scorelab.losses.base import Objective
from scorelab.sigmas import SigmaDistribution
from scorelab.typing import Batch, Tensor

__all__ = ["CrossEntropy"]


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """-log p(class | x, sigma) in nats over a distribution of noise levels; called with a ``ClassifierModel``, logits
    (B, num_classes) of (x, sigma). Raises ValueError for a batch without classes."""

    sigmas: SigmaDistribution
    num_classes: int
    kind: ClassVar[str] = "classifier"

    def levels(self, u: Tensor) -> Tensor:
        return self.sigmas(u)

    def losses(self, score: Callable[..., Tensor], batch: Batch, u: Tensor, noise: Tensor) -> Tensor:
        logits, classes = self._logits(score, batch, u, noise)
        return functional.cross_entropy(logits, classes, reduction="none")

    def right(self, score: Callable[..., Tensor], batch: Batch, u: Tensor, noise: Tensor) -> Tensor:
        """1 for samples (B,) whose likeliest class is their own, 0 for the others."""
        logits, classes = self._logits(score, batch, u, noise)
        return torch.eq(logits.argmax(1), classes).to(logits.dtype)

    def zero(self, batch: Batch, u: Tensor, noise: Tensor) -> Tensor:
        """Those of a classifier that holds all classes for equally likely."""
        return torch.full_like(u, math.log(self.num_classes))

    def _logits(self, model: Callable[..., Tensor], batch: Batch, u: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        if batch.condition is None:
            raise ValueError("a classifier is trained on samples with classes, and the batch has none")
        sigma = self.levels(u).to(widened(batch.x0))
        x = (batch.x0 + broadcast(sigma, batch.x0) * noise).to(batch.x0.dtype)
        return widened(model(x, sigma)), batch.condition
