"""The types that every room shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

__all__ = ["Batch", "ScoreFn", "Shape", "Tensor"]

ScoreFn = Callable[[Tensor, Tensor], Tensor]
"""``score(x, sigma)``: x (B, *D), sigma () or (B,), both unscaled; returns grad_x log p(x; sigma), (B, *D)."""

Shape = tuple[int, ...]
"""(B, *D)."""


class Batch(NamedTuple):
    """Samples x0 (B, *D), and what they are conditioned on, (B, ...), None if nothing.

    ``reference``: samples to average targets over, N of the same step, where an objective asks for them.
    """

    x0: Tensor
    condition: Tensor | None = None
    reference: Batch | None = None

    def part(self, rows: slice) -> Batch:
        """Some of the samples; the reference stays whole."""
        return Batch(self.x0[rows], None if self.condition is None else self.condition[rows], self.reference)

    def mapped(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with all its tensors mapped."""
        condition = None if self.condition is None else fn(self.condition)
        return Batch(fn(self.x0), condition, None if self.reference is None else self.reference.mapped(fn))
