"""All distances of two sets of features, and how varied one is, as records that say what each is of."""

from __future__ import annotations

from typing import Any

import torch

from scorelab.evaluation.estimates import Estimate, as_features
from scorelab.evaluation.frechet import frechet_distance
from scorelab.evaluation.kernels import kernel_distance
from scorelab.evaluation.neighbours import manifold
from scorelab.evaluation.sliced import sliced_wasserstein
from scorelab.evaluation.variety import inception_score, vendi_score
from scorelab.typing import Tensor

__all__ = ["LEAST", "check_counts", "compared", "varied"]

LEAST = 2048
"""Rows below which a comparison is asked for twice."""
_BLOCK = 5000
_NEIGHBOURS = 10_000
_WIDEST = 2048


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


def varied(x: Tensor, data: Tensor, logits: Tensor | None = None) -> dict[str, Any]:
    """How varied features x (N, D) are: the Vendi score, beside that of as many rows of data, of 5,000 at most; and by
    logits (N, classes), where there are any, the Inception score. Left out, with the reason, where rows are too few, or
    features too many for the former.
    """
    found: dict[str, Any] = {}
    count = min(len(x), len(data), _BLOCK)
    try:
        # 20 matrices of D by D are held
        if x.shape[1] > _WIDEST:
            raise ValueError(f"there are {x.shape[1]:,} features; expected at most {_WIDEST:,}, Inception's")
        ours, theirs = (vendi_score(z[_spread(len(z), count)]) for z in (x, data))
        found["vendi_score"] = _told(ours, samples=count, of_data={"value": theirs.value, "stderr": theirs.stderr})
    except ValueError as error:
        found["vendi_score"] = {"left_out": str(error)}
    if logits is not None:
        try:
            found["inception_score"] = _told(inception_score(logits), samples=len(logits), splits=10)
        except ValueError as error:
            found["inception_score"] = {"left_out": str(error)}
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


def _spread(count: int, most: int = _NEIGHBOURS) -> Tensor:
    """Rows at random, always the same, in order: a mapped file is read through."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:most].sort().values


def _short(count: int) -> str:
    return f"{count // 1000}k" if count >= 1000 and count % 1000 == 0 else str(count)
