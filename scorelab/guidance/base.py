"""What guided scores share: a formula of a score and another one, at some noise levels; elsewhere the score itself.

s = steer(x, sigma, s_1, s_2)    at low < sigma <= high,        s = s_1    elsewhere, where s_2 is not evaluated
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from scorelab.checks import broadcast, check_output, level_of
from scorelab.scores import Combined, Formula, sigma_range
from scorelab.typing import ScoreFn, Tensor

__all__ = ["Guided", "Interval", "check_interval", "check_scores"]

Interval = tuple[float, float]


class Guided(Combined):
    """``steer(x, sigma, *outputs)`` of two scores; outside of the interval (low, high) only the first is evaluated.

    together: see ``classifier_free``. Raises ValueError for an interval of no levels.
    """

    def __init__(
        self,
        steer: Formula,
        scores: tuple[ScoreFn, ScoreFn],
        interval: Interval | None = None,
        together: bool | None = False,
    ) -> None:
        low, high = (0.0, math.inf) if interval is None else check_interval(interval)
        super().__init__(steer, scores, None, True)
        # a score with an attribute "together" evaluates pairs
        self.low, self.high, self._at_once = _single(low), _single(high), together

    def inside(self, sigma: float) -> bool:
        """Whether it guides at a noise level."""
        # in single precision, as a level that is one of the ends may come
        return self.low < _single(sigma) <= self.high

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The levels that the first score knows, and where it guides the second, too."""
        (low, high), (least, most) = map(sigma_range, self.scores)
        below, above = self.low < _single(least), self.high > _single(most)
        return max(low, least) if below else low, min(high, most) if above else high

    def outputs(self, x: Tensor, sigma: Tensor) -> tuple[Any, ...]:
        known = level_of(sigma)
        if known is not None and not self.inside(known):
            return check_output(self.scores[0](x, sigma), x, sigma), None
        pair = getattr(self.scores[0], "together", None)
        if pair is not None and (_faster(x) if self._at_once is None else self._at_once):
            both = pair(self.scores[1], x, sigma)
            if both is not None:
                return tuple(check_output(s, x, sigma) for s in both)
        return super().outputs(x, sigma)

    def _finished(self, x: Tensor, sigma: Tensor, outputs: tuple[Any, ...]) -> Tensor:
        guided = super()._finished(x, sigma, outputs) if outputs[1] is not None else outputs[0]
        if outputs[1] is None or level_of(sigma) is not None or (self.low == 0 and self.high == math.inf):
            return guided
        inside = (sigma.float() > self.low) & (sigma.float() <= self.high)
        return torch.where(inside if sigma.ndim == 0 else broadcast(inside, x), guided, outputs[0])


def check_interval(interval: Interval) -> Interval:
    """The interval; ValueError for one of no levels."""
    if len(interval) != 2 or not 0 <= interval[0] < interval[1]:
        raise ValueError(f"interval is {interval}; expected noise levels (low, high), 0 <= low < high")
    return interval


def check_scores(scores: tuple[ScoreFn, ...], example: str) -> None:
    """Refuse (TypeError) what is not callable."""
    for score in scores:
        if not callable(score):
            raise TypeError(f"got {type(score).__name__}; expected two scores, such as {example}")


def _faster(x: Tensor) -> bool:
    """Whether one evaluation of twice the batch takes less than two: on GPUs, and on CPUs for little data.

    With 2 CPU cores it took .55 to .93 of the time for up to 16,384 numbers, 1.02 to 1.35 for more, or for many points;
    on an H100 .46 for up to 16 images of 32x32, .66 for 64, .93 for 256.
    """
    return x.device.type != "cpu" or (x.numel() <= 2**14 and len(x) <= 1024)


def _single(value: float) -> float:
    """The nearest number in single precision."""
    return float(np.float32(value))
