"""All distances of two sets of features, as a record that says what each is of."""

from __future__ import annotations

from typing import Any

import torch

from scorelab.evaluation.estimates import Estimate, as_features
from scorelab.evaluation.frechet import frechet_distance
from scorelab.evaluation.kernels import kernel_distance
from scorelab.evaluation.neighbours import manifold
from scorelab.evaluation.sliced import sliced_wasserstein
from scorelab.typing import Tensor

__all__ = ["LEAST", "check_counts", "compared"]

LEAST = 2048
"""Rows below which a comparison is asked for twice."""
_BLOCK = 5000
_NEIGHBOURS = 10_000


def compared(x: Tensor, data: Tensor, *, few: bool = False) -> dict[str, Any]:
    """Distances of features x (N, D) and data (M, D) by name: value, standard error, 95 % interval, and of what.

    Kernel distances are means over blocks of 5,000 rows; shares of neighbours are of 10,000 random rows at most. The
    Frechet distance is left out, with the reason, where the sets are too small for it or don't vary in some direction.

    Raises ValueError for sets that do not fit, or of fewer than 2,048 rows unless ``few``.
    """
    x, data = as_features(x, "x"), as_features(data, "data", x.shape[1:])
    check_counts(len(x), len(data), few)
    found: dict[str, Any] = {}
    try:
        plain, extrapolated = frechet_distance(x, data)
        found["frechet"] = _told(extrapolated, plain=plain, name=f"FD-{_short(len(x))}, extrapolated")
    except ValueError as error:
        found["frechet"] = {"left_out": str(error)}
    for kernel in ("cubic", "energy"):
        found[f"kernel_{kernel}"] = _told(kernel_distance(x, data, kernel, block=_BLOCK), block=_BLOCK)
    if min(len(x), len(data)) >= 40:
        found["sliced_wasserstein"] = _told(sliced_wasserstein(x, data), projections=256)
    some = [z[_spread(len(z))] for z in (x, data)]
    for name, share in manifold(*some)._asdict().items():
        found[name] = _told(share, samples=len(some[0]), data=len(some[1]))
    return found


def check_counts(samples: int, data: int, few: bool) -> None:
    """Refuse (ValueError) a comparison that says little, unless it is wanted."""
    if min(samples, data) < LEAST and not few:
        raise ValueError(
            f"there are {samples:,} samples and {data:,} data; expected at least {LEAST:,} of each, for fewer say "
            "little: take more, other data (--against), or few=True (--few)"
        )


def _told(estimate: Estimate, **more: Any) -> dict[str, Any]:
    return {"value": estimate.value, "stderr": estimate.stderr, "interval_95": list(estimate.interval()), **more}


def _spread(count: int) -> Tensor:
    """Rows at random, always the same, in order: a mapped file is read through."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:_NEIGHBOURS].sort().values


def _short(count: int) -> str:
    return f"{count // 1000}k" if count >= 1000 and count % 1000 == 0 else str(count)
