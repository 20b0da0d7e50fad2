"""Distances of two sets by a kernel k, E k(x, x') + E k(y, y') - 2 E k(x, y): unbiased, with standard errors.

Gretton et al., A Kernel Two-Sample Test, 2012. KID is it for a cubic kernel of Inception features: Binkowski et al.,
2018, arXiv:1801.01401. The energy distance is it for k = -||x - y||: Szekely and Rizzo, Energy statistics, 2013.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from scorelab.checks import doubled
from scorelab.evaluation.estimates import Estimate, as_features, parts
from scorelab.typing import Tensor

__all__ = ["energy_distance", "kernel_distance"]

_AT_ONCE = 2**24
"""Values of the kernel."""


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _energy(a: Tensor, b: Tensor) -> Tensor:
    return -torch.cdist(a, b)


def _means(kernel: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of each row of a over those of b, and of each of b over a's; of a set with itself without a row's own pair."""
    other = a if b is None else b
    ahead, back = [], torch.zeros(len(other), dtype=a.dtype, device=a.device)
    for first in range(0, len(a), size := max(1, _AT_ONCE // len(other))):
        values = kernel(a[first : first + size], other)
        if b is None:
            values.diagonal(first).zero_()
        ahead.append(values.sum(1))
        back += values.sum(0)
    count = len(other) - (b is None)
    return torch.cat(ahead) / count, back / (len(a) - (b is None))


def kernel_distance(
    x: Tensor, y: Tensor, kernel: str | Callable[[Tensor, Tensor], Tensor] = "cubic", *, block: int | None = None
) -> Estimate:
    """Of features x (N, D) and y (M, D): its value is unbiased, so of sets of one law it may be negative.

    kernel: "cubic", (x y / D + 1)^3, KID's; "energy"; or a function of (n, D) and (m, D) to (n, m). block: at most so
    many rows at once, every row in one block, which costs (N + M) block evaluations where all at once cost (N + M)^2;
    the value is the mean of the blocks'. None: all at once.

    The error is that of a U-statistic's projection, so not KID's customary one, the spread of 100 overlapping subsets.
    Raises ValueError for sets that do not fit.
    """
    x, y = as_features(x, "x"), as_features(y, "y", x.shape[1:])
    known: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cubic": _cubic, "energy": _energy}
    if isinstance(kernel, str) and kernel not in known:
        raise ValueError(f"kernel is {kernel!r}; expected one of {', '.join(known)}, or a function")
    if block is not None and block < 2:
        raise ValueError(f"block is {block}; expected at least 2 rows, or None for all at once")
    function = known[kernel] if isinstance(kernel, str) else kernel
    number = 1 if block is None else max(1, min(-(-max(len(x), len(y)) // block), min(len(x), len(y)) // 2))
    of_x, of_y = parts(len(x), number), parts(len(y), number)
    centre = y[:: max(1, len(y) // 10_000)].double().mean(0) if kernel == "energy" else None
    values, moved_x, moved_y = [], [], []
    for k in range(number):
        # on one GPU without float64 that is done by the CPU
        a, b = (z if number == 1 else z[i == k] for z, i in ((x, of_x), (y, of_y)))
        a, b = (doubled(z) for z in (a, b))
        if centre is not None:
            # distances by matrix products lose the digits of an offset
            a, b = a - centre.to(a), b - centre.to(b)
        among_x, among_y = _means(function, a)[0], _means(function, b)[0]
        ahead, back = _means(function, a, b)
        values.append(float(among_x.mean() + among_y.mean() - 2 * ahead.mean()))
        moved_x.append(among_x - ahead)
        moved_y.append(among_y - back)
    variance = sum(4 * float(torch.cat(z).var()) / len(s) for z, s in ((moved_x, x), (moved_y, y)))
    return Estimate(math.fsum(values) / number, math.sqrt(variance))


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E||X - Y|| - E||X - X'|| - E||Y - Y'||, unbiased, in the data's units; x (N, *D), y (M, *D).

    It is 0 in expectation for samples of one distribution, and can then come out negative; ``kernel_distance`` gives
    its standard error.
    """
    return kernel_distance(x, y, "energy").value
