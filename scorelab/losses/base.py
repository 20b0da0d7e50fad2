"""What an objective is: losses of samples from a batch, uniform numbers and noise, all of which others draw.

Everything random comes in: u (B,) in (0, 1), stratified and ascending, chooses the noise levels, and noise is standard
normal. So a step follows from (seed, step, place) whatever the objective, and a process or a schedule can be learned.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch

from scorelab.noise import randn
from scorelab.typing import Batch, ScoreFn, Tensor

__all__ = ["Losses", "Objective", "conditioned"]


class Losses(NamedTuple):
    """Loss and noise level of each sample, both (B,)."""

    loss: Tensor
    sigma: Tensor


class Objective(ABC):
    """``losses(score, batch, u, noise)``; score(x, sigma) or, for a batch with conditions, score(x, sigma, condition).

    ``draws``: how many standard normals a sample needs for each of its numbers; noise is (B, *D) for one, else
    (B, draws, *D). ``reference``: how many samples of the data ``batch.reference`` must hold at least, 0 for none.
    ``learns_variance``: the score is called with variance=True and returns (score, v). ``kind``: of the models that it
    is for, which it is called with in place of a score. ``observes``: it goes by the losses of earlier steps, which
    ``observe`` is told after each of training, and which ``state`` keeps.
    """

    draws: int = 1
    reference: int = 0
    learns_variance: bool = False
    kind: ClassVar[str] = "score"
    observes: bool = False

    def levels(self, u: Tensor) -> Tensor:
        """Noise levels (B,) of u (B,); NaN, and u of no use, for an objective without any."""
        return torch.full_like(u, math.nan)

    @abstractmethod
    def losses(self, score: Callable[..., Tensor], batch: Batch, u: Tensor, noise: Tensor) -> Tensor:
        """The loss of each sample, (B,)."""

    def zero(self, batch: Batch, u: Tensor, noise: Tensor) -> Tensor:
        """The losses (B,) of a score that is 0, beside which a network's are judged."""
        return self.losses(lambda x, *_: torch.zeros_like(x), batch, u, noise)

    def observe(self, u: Tensor, losses: Tensor) -> None:  # noqa: B027
        """The losses (B,) of a whole step at u (B,), in all processes."""

    def state(self) -> dict[str, Tensor]:
        """What has been observed, for a checkpoint."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:  # noqa: B027
        """Go on from a checkpoint's ``state``."""

    def count(self, batch_size: int) -> int:
        """How many samples a call needs to train on ``batch_size`` of them."""
        return max(batch_size, self.reference)

    def __call__(self, score: ScoreFn, x0: Tensor, generator: torch.Generator, batch_size: int | None = None) -> Losses:
        """Losses (batch_size,) of a batch x0 (count(batch_size), *D); batch_size is by default all of it.

        Its rows must be in random order, for noise levels ascend with them.
        """
        count = len(x0) if batch_size is None else batch_size
        u = (torch.arange(count) + torch.rand(count, generator=generator, device=generator.device).cpu()) / count
        u = u.to(x0.device)
        shape = (count, *x0.shape[1:]) if self.draws == 1 else (count, self.draws, *x0.shape[1:])
        batch = Batch(x0[:count], None, Batch(x0) if self.reference else None)
        return Losses(self.losses(score, batch, u, randn(shape, x0, generator)), self.levels(u))


def conditioned(score: Callable[..., Tensor], condition: Tensor | None) -> ScoreFn:
    """The score for the conditions of a batch."""
    return score if condition is None else lambda x, sigma: score(x, sigma, condition)
