"""What the numbers of a data set mean, and the one pair of maps between them and what a model sees."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from scorelab.typing import Tensor

__all__ = ["Values", "found"]


@dataclass(frozen=True)
class Values:
    """Numbers from ``least`` to ``most``, ``step`` apart (0: any between), of which ``ends`` become -1 and 1 inside.

    ends None: inside they are as they are outside. Bytes are (0, 255, 1) with ends (0, 255), or, dequantised by uniform
    noise of a step's width, with ends (-0.5, 255.5): inside, value k then stands in the middle of its bin.
    """

    least: float
    most: float
    step: float = 0.0
    ends: tuple[float, float] | None = None

    @property
    def scale(self) -> float:
        """Inside units for one outside."""
        return 1.0 if self.ends is None else 2 / (self.ends[1] - self.ends[0])

    @property
    def spacing(self) -> float:
        """``step`` in inside units."""
        return self.step * self.scale

    @property
    def bounds(self) -> tuple[float, float]:
        """``least`` and ``most`` inside."""
        low, high = self.inside(torch.tensor([self.least, self.most], dtype=torch.float64)).tolist()
        return low, high

    def check(self, least: float, most: float, what: str) -> None:
        """ValueError for numbers outside the data's range, and RuntimeWarning for those that span less than a tenth of
        it, as bytes scaled to [0, 1] do; nothing where the data has no ends."""
        if self.ends is None:
            return
        wide = self.most - self.least
        said = f"{what} spans [{least:.4g}, {most:.4g}] of the data's [{self.least:g}, {self.most:g}]"
        if least < self.least - 1e-4 * wide or most > self.most + 1e-4 * wide:
            raise ValueError(f"{said}; expected the data's own values, as scorelab sample --out writes them")
        if 10 * (most - least) < wide:
            warnings.warn(f"{said}: are they scaled otherwise?", RuntimeWarning, stacklevel=4)

    def inside(self, x: Tensor) -> Tensor:
        """What a model sees of numbers outside."""
        return x if self.ends is None else torch.sub(x, self.ends[0]).mul_(self.scale).sub_(1)

    def outside(self, x: Tensor) -> Tensor:
        """The numbers that a model's samples stand for, within ``least`` and ``most`` if these are the data's ends."""
        if self.ends is None:
            return x
        return ((x.clamp(-1, 1) + 1) / self.scale + self.ends[0]).clamp(self.least, self.most)

    def rounded(self, x: Tensor) -> Tensor:
        """Numbers inside, as near as the data's own values come: within its range, and on its steps if it has any."""
        if not self.step:
            return x if self.ends is None else self.inside(self.outside(x))
        steps = ((self.outside(x) - self.least) / self.step).round()
        return self.inside((self.least + steps * self.step).clamp(self.least, self.most))

    def bytes(self, x: Tensor) -> Tensor:
        """uint8, 0 at ``least`` and 255 at ``most``, of numbers inside; rounded."""
        share = (self.outside(x.float()) - self.least) / (self.most - self.least)
        return (255 * share.clamp(0, 1)).round().to(torch.uint8)


def found(parts: Iterable[Tensor]) -> Values:
    """The range of a data set, given in parts of its rows; step 1 where all are whole numbers.

    Raises ValueError for numbers that are not finite (naming the sample) or all the same.
    """
    least, most, whole, before = torch.inf, -torch.inf, True, 0
    for part in parts:
        low, high = (float(v) for v in part.aminmax())
        # infinity and NaN show at one of the ends
        if not -torch.inf < low <= high < torch.inf:
            bad = ~torch.isfinite(part).flatten(1).all(1)
            raise ValueError(
                f"data is not finite at sample {before + int(bad.nonzero()[0])}; expected finite numbers: remove or "
                "repair these"
            )
        least, most, before = min(least, low), max(most, high), before + len(part)
        whole = whole and (not part.is_floating_point() or bool((part == part.round()).all()))
    if least == most:
        raise ValueError(f"the data set is constant, every value is {least:g}: check its source and scaling")
    return Values(least, most, 1.0 if whole else 0.0)
