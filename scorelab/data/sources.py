"""Where batches come from. A batch is a function of (seed, step) alone, and each of its rows of its place besides: a
resumed run sees the same data, and so do several processes that share a batch.

Images are float32 (B, C, H, W) in [-1, 1] inside; ``data_range`` records the range outside.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch

from scorelab.checks import check_batch, check_finite, check_range
from scorelab.distributions import Distribution
from scorelab.noise import counted, counter_generator, streams
from scorelab.typing import Shape, Tensor

__all__ = ["Arrays", "Drawn", "Images", "Source", "Stored", "digits"]


class Source(ABC):
    """``batch(seed, step, size)`` gives x0 (size, *data_shape), or only some rows of it."""

    data_shape: Shape
    data_range: tuple[float, float] | None = None

    @abstractmethod
    def batch(self, seed: int, step: int, size: int, rows: range | None = None) -> Tensor:
        """The batch of a training step, or these rows of it."""

    @abstractmethod
    def reference(self) -> Tensor:
        """Data to take statistics of, (N, *data_shape)."""

    def hold_out(self, count: int) -> Tensor:
        """Samples (count, *data_shape) that no batch will hold from now on; ValueError if there are too few."""
        raise ValueError(f"{type(self).__name__} has fresh samples at every step; expected data.validation = 0")


class Stored(Source):
    """A data set of N samples; every epoch takes them in a new order."""

    labels: Tensor | None = None

    def __init__(self, count: int, labels: Tensor | None) -> None:
        if count == 0:
            raise ValueError("the data set is empty; expected at least one sample: check its source")
        if labels is not None and len(labels) != count:
            raise ValueError(f"{len(labels)} labels for {count} samples; expected one each")
        self.count, self.labels = count, labels
        self._order: tuple[tuple[int, int], Tensor] | None = None
        self._trained: Tensor | None = None

    def __len__(self) -> int:
        return self.count

    @abstractmethod
    def take(self, index: Tensor) -> Tensor:
        """These samples, as they are stored."""

    def hold_out(self, count: int) -> Tensor:
        if not 0 < count < len(self):
            raise ValueError(f"data.validation is {count} of {len(self)} samples; expected fewer than there are")
        order = torch.randperm(len(self), generator=counter_generator(0, 0, 7))
        self._trained, self._order = order[count:], None
        return self.take(order[:count])

    def indices(self, seed: int, step: int, size: int, rows: range | None = None) -> Tensor:
        """Which samples a step's batch holds, (size,), or these rows of it."""
        count = len(self) if self._trained is None else len(self._trained)
        rows = range(size) if rows is None else rows
        places = torch.arange(step * size + rows.start, step * size + rows.stop)
        epochs = places // count
        found = torch.cat(
            [
                self._epoch(seed, e, count)[places[epochs == e] % count]
                for e in range(int(epochs[0]), int(epochs[-1]) + 1)
            ]
        )
        return found if self._trained is None else self._trained[found]

    def _epoch(self, seed: int, epoch: int, count: int) -> Tensor:
        known = self._order
        if known is None or known[0] != (seed, epoch):
            known = (seed, epoch), torch.randperm(count, generator=counter_generator(seed, epoch, 1))
            self._order = known
        return known[1]


def _refuse_constant(x: Tensor) -> None:
    low, high = float(x.min()), float(x.max())
    if low == high:
        raise ValueError(f"the data set is constant, every value is {low:g}: check its source and scaling")


class Arrays(Stored):
    """A data set in memory, x0 (N, *D) in [-1, 1] if ``data_range`` is given.

    Raises ValueError for data that is empty, constant, not finite, or outside the declared range.
    """

    def __init__(self, x0: Tensor, labels: Tensor | None = None, data_range: tuple[float, float] | None = None) -> None:
        check_batch(x0, "data")
        super().__init__(len(x0), labels)
        check_finite(x0, "data")
        _refuse_constant(x0)
        if data_range is not None:
            low, high = data_range
            check_range(x0, data_range)
            x0 = (x0 - low) * (2 / (high - low)) - 1
        self.x0, self.data_range = x0, data_range
        self.data_shape = tuple(x0.shape[1:])

    def take(self, index: Tensor) -> Tensor:
        return self.x0[index]

    def batch(self, seed: int, step: int, size: int, rows: range | None = None) -> Tensor:
        return self.take(self.indices(seed, step, size, rows))

    def reference(self) -> Tensor:
        return self.x0


class Images(Stored):
    """uint8 images (N, C, H, W), in memory or memory-mapped; batches are float32 in [-1, 1].

    flip: half of them left to right. dequantise: (k + u)/128 - 1 with uniform u instead of k/127.5 - 1. Both follow
    from (seed, step, place in the batch). Raises ValueError for images that are none, empty or constant.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor | None = None, *, flip: bool = False, dequantise: bool = False
    ) -> None:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4:
            raise ValueError(f"images are {pixels.dtype} {tuple(pixels.shape)}; expected uint8 (N, C, H, W)")
        super().__init__(len(pixels), labels)
        _refuse_constant(pixels)
        self.pixels, self.flip, self.dequantise = pixels, flip, dequantise
        self.data_shape, self.data_range = tuple(pixels.shape[1:]), (0.0, 255.0)

    def take(self, index: Tensor) -> Tensor:
        return self.pixels[index].float().mul_(1 / 127.5).sub_(1)

    def batch(self, seed: int, step: int, size: int, rows: range | None = None) -> Tensor:
        rows = range(size) if rows is None else rows
        x = self.pixels[self.indices(seed, step, size, rows)].float()
        if self.flip:
            flipped = counted("uniform", (1,), rows, seed, step, 6).flatten() < 0.5
            x[flipped] = x[flipped].flip(-1)
        if self.dequantise:
            return x.add_(counted("uniform", self.data_shape, rows, seed, step, 8)).mul_(1 / 128).sub_(1)
        return x.mul_(1 / 127.5).sub_(1)

    def reference(self) -> Tensor:
        # 512 MiB at most
        count = max(1, min(10_000, 2**27 // math.prod(self.data_shape)))
        some = torch.arange(0, len(self), -(-len(self) // count))
        return self.take(some)


class Drawn(Source):
    """Fresh samples of an exact distribution at every step."""

    def __init__(self, distribution: Distribution) -> None:
        self.distribution = distribution
        self.data_shape = distribution.data_shape

    def batch(self, seed: int, step: int, size: int, rows: range | None = None) -> Tensor:
        x = self.distribution.sample(size, streams((seed % 2**64, 2), step, 1)[0])
        return x if rows is None else x[rows.start : rows.stop]

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
