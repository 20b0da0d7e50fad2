"""Where batches come from. A batch is a function of (seed, step) alone, so a resumed run sees the same data.

Images are float32 (B, C, H, W) in [-1, 1] inside; ``data_range`` records the range outside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from scorelab.checks import check_batch, check_finite, check_range, nearest_name
from scorelab.distributions import TARGETS, Distribution, target
from scorelab.typing import Shape, Tensor

__all__ = ["Arrays", "Drawn", "Source", "counter_generator", "digits", "load"]


def counter_generator(*counters: int) -> torch.Generator:
    """A CPU generator that depends on these counters alone."""
    seed = 0
    for counter in counters:
        # splitmix64: neighbouring counters give unrelated seeds
        seed = (seed + counter + 0x9E3779B97F4A7C15) & (2**64 - 1)
        seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        seed ^= seed >> 31
    return torch.Generator().manual_seed(seed)


class Source(ABC):
    """``batch(seed, step, size)`` gives x0 (size, *data_shape)."""

    data_shape: Shape
    data_range: tuple[float, float] | None = None

    @abstractmethod
    def batch(self, seed: int, step: int, size: int) -> Tensor:
        """The batch of a training step."""

    @abstractmethod
    def reference(self) -> Tensor:
        """Data to take statistics of, (N, *data_shape)."""


class Arrays(Source):
    """A data set in memory, x0 (N, *D) in [-1, 1] if ``data_range`` is given; every epoch in a new order.

    Raises ValueError for data that is empty, constant, not finite, or outside the declared range.
    """

    def __init__(self, x0: Tensor, labels: Tensor | None = None, data_range: tuple[float, float] | None = None) -> None:
        check_batch(x0, "data")
        if len(x0) == 0:
            raise ValueError("the data set is empty; expected at least one sample: check its source")
        check_finite(x0, "data")
        if float(x0.min()) == float(x0.max()):
            raise ValueError(
                f"the data set is constant, every value is {float(x0.min()):g}: check its source and scaling"
            )
        if labels is not None and len(labels) != len(x0):
            raise ValueError(f"{len(labels)} labels for {len(x0)} samples; expected one each")
        if data_range is not None:
            low, high = data_range
            check_range(x0, data_range)
            x0 = (x0 - low) * (2 / (high - low)) - 1
        self.x0, self.labels, self.data_range = x0, labels, data_range
        self.data_shape = tuple(x0.shape[1:])
        self._order: tuple[tuple[int, int], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.x0)

    def batch(self, seed: int, step: int, size: int) -> Tensor:
        first = step * size
        places = torch.arange(first, first + size)
        epochs = places // len(self)
        parts = [
            self._epoch(seed, e)[places[epochs == e] % len(self)] for e in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
        return self.x0[torch.cat(parts)]

    def _epoch(self, seed: int, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != (seed, epoch):
            order = torch.randperm(len(self), generator=counter_generator(seed, epoch, 1))
            self._order = (seed, epoch), order
        return self._order[1]

    def reference(self) -> Tensor:
        return self.x0


class Drawn(Source):
    """Fresh samples of an exact distribution at every step."""

    def __init__(self, distribution: Distribution) -> None:
        self.distribution = distribution
        self.data_shape = distribution.data_shape

    def batch(self, seed: int, step: int, size: int) -> Tensor:
        return self.distribution.sample(size, counter_generator(seed, step, 2))

    def reference(self) -> Tensor:
        return self.distribution.sample(10_000, counter_generator(0, 0, 3))


def digits() -> Arrays:
    """scikit-learn's 1,797 handwritten digits, 8x8, gray levels 0 to 16, with labels; needs scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("the digits need scikit-learn; install it with: pip install 'scorelab[data]'") from error
    images, labels = load_digits(return_X_y=True)
    x0 = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return Arrays(x0, torch.tensor(labels), (0.0, 16.0))


def load(source: str) -> Source:
    """The data of a config's ``data.source``: "digits" or the name of a 2-D target."""
    if source == "digits":
        return digits()
    if source in TARGETS:
        return Drawn(target(source))
    raise ValueError(f"data.source is {source!r}; {nearest_name(source, ('digits', *TARGETS))}")
