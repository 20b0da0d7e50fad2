"""A number with its standard error, and the order-free parts of a set that standard errors are made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch

from scorelab.checks import check_batch, check_finite, doubled
from scorelab.typing import Tensor

__all__ = ["GROUPS", "Estimate", "as_features", "jackknifed", "parts", "rows"]

GROUPS = 20
"""Of the jackknife."""
_ROWS = 4096


class Estimate(NamedTuple):
    """A number and its standard error over both sets; ``value`` is as good as unbiased where that is said."""

    value: float
    stderr: float

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Its two ends, by the normal law."""
        if not 0 < level < 1:
            raise ValueError(f"level is {level}; expected a probability between 0 and 1, such as 0.95")
        reach = NormalDist().inv_cdf((1 + level) / 2) * self.stderr
        return self.value - reach, self.value + reach

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.stderr:.2g}"


def as_features(x: Tensor, name: str, shape: Sequence[int] | None = None) -> Tensor:
    """x (N, *D) as features (N, D); ValueError where it has fewer than 2 rows, or is not of the other set's shape."""
    check_batch(x, name, shape)
    x = x.flatten(1)
    if len(x) < 2:
        raise ValueError(f"{name} has {len(x)} row{'s' * (len(x) != 1)}; expected at least 2, better thousands")
    return x


def rows(x: Tensor, size: int = _ROWS) -> Iterator[Tensor]:
    """The rows of features in order, some at a time, in float64: those of a memory-mapped file are read as needed."""
    for part in torch.split(x, size):
        part = doubled(part)
        check_finite(part, "features")
        yield part


def parts(count: int, number: int) -> Tensor:
    """Which of ``number`` parts each of ``count`` rows belongs to, (count,): of equal size to within one, at random but
    always the same, so that no order of the rows (by class, say) is in a part."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order * number // count


def jackknifed(whole: float, left: Sequence[float]) -> Estimate:
    """Of a statistic of all rows, and of all but each of G groups: without its bias of order 1/N (Quenouille, 1956)."""
    number, mean = len(left), math.fsum(left) / len(left)
    spread = math.fsum((z - mean) ** 2 for z in left)
    return Estimate(number * whole - (number - 1) * mean, math.sqrt((number - 1) / number * spread))
