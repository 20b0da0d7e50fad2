"""By what a score is known again: a few of its values at fixed points, kept with what was fitted to it."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch

from scorelab.checks import call, check_output, level
from scorelab.noise import counted
from scorelab.scores import restricted
from scorelab.typing import ScoreFn, Tensor

__all__ = ["Fingerprint"]

_POINTS, _NUMBERS = 4, 16
_TOLERANCE = 0.05
"""Of the values' root mean square: half precision, TF32 and compiled networks stay below 0.02."""


@dataclass(frozen=True)
class Fingerprint:
    """``values`` of -sigma score, 16 dimensions of 4 points of N(0, std^2 I) for data of ``shape``, at one level."""

    sigma: float
    std: float
    shape: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]
    tolerance: float = _TOLERANCE

    @classmethod
    def of(cls, score: ScoreFn, sigma: float, std: float, x: Tensor) -> Fingerprint:
        """That of a score of data like x (B, *D)."""
        values = _values(score, sigma, std, x)
        return cls(sigma, std, tuple(x.shape[1:]), tuple(tuple(row) for row in values.tolist()))

    @classmethod
    def parse(cls, found: dict[str, Any]) -> Fingerprint:
        """From what ``text`` gave and JSON kept; KeyError, TypeError or ValueError for anything else."""
        values = tuple(tuple(float(v) for v in row) for row in found["values"])
        sigma, std, tolerance = (float(found[name]) for name in ("sigma", "std", "tolerance"))
        return cls(sigma, std, tuple(int(n) for n in found["shape"]), values, tolerance)

    def text(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def verify(self, score: ScoreFn, x: Tensor) -> None:
        """RuntimeWarning if this is another score, or one of other data than x (B, *D): 4 rows are evaluated once."""
        if tuple(x.shape[1:]) != self.shape:
            said = f"for data of shape {self.shape}, not {tuple(x.shape[1:])}"
        else:
            known = torch.tensor(self.values, dtype=torch.float64)
            found = _values(score, self.sigma, self.std, x)
            off = float((found - known[: len(found)]).norm() / known[: len(found)].norm().clamp_min(1e-300))
            if off <= self.tolerance:
                return
            said = f"to another score: at sigma = {self.sigma:.4g} its values differ by {off:.2g} of their size"
        warnings.warn(
            f"this sampler was fitted {said}; its samples may be far less accurate than its report says, less than an "
            "uncalibrated sampler's: calibrate one for this score (and for these conditions, if it has any)",
            RuntimeWarning,
            stacklevel=4,
        )


def _values(score: ScoreFn, sigma: float, std: float, x: Tensor) -> Tensor:
    """-sigma score at the fixed points, some dimensions of each, float64 on the CPU; of min(4, B) points."""
    points = (std * counted("normal", tuple(x.shape[1:]), range(_POINTS), 0)).to(x)
    at, count = level(sigma, x), min(len(x), _POINTS)
    few = restricted(score, torch.arange(count, device=x.device))
    with torch.no_grad():
        if few is not None:
            points = points[:count]
            out = call(few, points, at)
        else:
            try:
                out = call(score, points, at)
            except RuntimeError:
                # bound to the rows of its batch
                points = points.repeat(-(-len(x) // _POINTS), *[1] * (x.ndim - 1))[: len(x)]
                out = call(score, points, at)
    flat = check_output(out, points, at)[:_POINTS].flatten(1)
    return -sigma * flat[:, :: -(-flat.shape[1] // _NUMBERS)].cpu().double()
