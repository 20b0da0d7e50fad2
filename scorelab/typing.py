"""The types that every room shares."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["ScoreFn", "Shape", "Tensor"]

ScoreFn = Callable[[Tensor, Tensor], Tensor]
"""``score(x, sigma)``: x (B, *D), sigma () or (B,), both unscaled; returns grad_x log p(x; sigma), (B, *D)."""

Shape = tuple[int, ...]
