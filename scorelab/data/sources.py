"""Where batches come from. A batch is a function of (seed, step) alone, and each of its rows of its place besides: a
resumed run sees the same data, and so do several processes that share a batch.

Images are float32 (B, C, H, W) in [-1, 1] inside; ``values`` maps them to what they are outside, and back.
"""

from __future__ import annotations

import hashlib
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from scorelab.checks import check_batch, check_finite, check_range
from scorelab.codecs import Codec
from scorelab.data.values import Values, found
from scorelab.distributions import Distribution, Labelled
from scorelab.noise import counted, counter_generator, streams
from scorelab.typing import Batch, Shape, Tensor

__all__ = ["Arrays", "Coded", "Drawn", "Images", "Source", "Stored", "digits"]

_MOST_CLASSES = 2**20


class Source(ABC):
    """``batch(seed, step, size)`` gives samples (size, *data_shape) and their labels, or only some rows of them.

    ``classes``: what the labels 0, 1, ... are called; empty if there are none.
    """

    data_shape: Shape
    values: Values | None = None
    classes: tuple[str, ...] = ()

    @abstractmethod
    def batch(self, seed: int, step: int, size: int, rows: range | None = None) -> Batch:
        """The batch of a training step, or these rows of it."""

    @abstractmethod
    def reference(self) -> Tensor:
        """Data to take statistics of, (N, *data_shape)."""

    def first(self, count: int) -> Batch:
        """The first samples of ``reference``, at most ``count``, with their labels."""
        return Batch(self.reference()[:count])

    def hold_out(self, count: int) -> Batch:
        """Samples (count, *data_shape) that no batch will hold from now on; ValueError if there are too few."""
        raise ValueError(f"{type(self).__name__} has fresh samples at every step; expected data.validation = 0")

    def class_shares(self) -> Tensor | None:
        """Of what batches are made of, (K,) in float64, of sum 1; None without classes."""
        return None

    def drawn_classes(self, n: int, seed: int) -> Tensor:
        """Independent classes (n,), as often as batches hold them; that of sample i follows from (seed, i) alone.

        Raises ValueError where there are none.
        """
        shares = self.class_shares()
        if shares is None:
            raise ValueError("the data has no classes, so none can be drawn as often as it has them")
        ends = shares.cumsum(0)
        drawn = counted("uniform", (1,), range(n), seed, 0, 14).flatten().double()
        return torch.searchsorted(ends / ends[-1], drawn, right=True)

    def fingerprint(self) -> dict[str, Any]:
        """By what a run knows its data again, by name; nothing where its settings say it all."""
        return {"classes": list(self.classes)} if self.classes else {}


class Stored(Source):
    """N samples in a tensor, or in a NumPy array that may be memory-mapped; every epoch takes them in a new order."""

    values: Values
    labels: Tensor | None = None
    most_reference: int = 2**62
    """Samples that statistics are taken of, at most."""
    fixed: bool = True
    """Whether batches hold the samples as they are."""

    def __init__(self, stored: Tensor | np.ndarray, labels: Tensor | None, classes: Sequence[str] = ()) -> None:
        count = len(stored)
        if count == 0:
            raise ValueError("the data set is empty; expected at least one sample: check its source")
        if labels is not None and len(labels) != count:
            raise ValueError(f"{len(labels)} labels for {count} samples; expected one each")
        # labels that are no classes, such as -1 for unknown, can't be conditioned on
        if labels is not None and 0 <= int(labels.min()) <= int(labels.max()) < _MOST_CLASSES:
            self.classes = tuple(classes) or tuple(str(k) for k in range(int(labels.max()) + 1))
            if int(labels.max()) >= len(self.classes):
                raise ValueError(f"labels go up to {int(labels.max())}, for {len(self.classes)} names of classes")
        self.stored, self.count, self.labels = stored, count, labels
        self._order: tuple[tuple[int, int], Tensor] | None = None
        self._trained: Tensor | None = None

    def __len__(self) -> int:
        return self.count

    @abstractmethod
    def take(self, index: Tensor) -> Tensor:
        """These samples, inside."""

    def kept(self, index: Tensor) -> Tensor:
        """These samples, as they are stored."""
        if isinstance(self.stored, Tensor):
            return self.stored[index]
        rows = self.stored[index.numpy()]
        return torch.from_numpy(rows if rows.dtype == np.uint8 else rows.astype(np.float32, copy=False))

    def reference(self) -> Tensor:
        return self.take(self._referred())

    def first(self, count: int) -> Batch:
        index = self._referred()[:count]
        return self.labelled(self.take(index), index)

    def _referred(self) -> Tensor:
        # 256 MiB at most, evenly spread
        count = max(1, min(self.most_reference, 2**26 // math.prod(self.data_shape)))
        return torch.arange(0, len(self), -(-len(self) // count))

    def fingerprint(self) -> dict[str, Any]:
        # of larger data some rows stand for all
        rows = max(1, 2**28 // self.kept(torch.tensor([0])).nbytes)
        content = hashlib.sha256()
        for index in torch.split(torch.arange(0, len(self), -(-len(self) // rows)), 1024):
            content.update(self.kept(index).contiguous().numpy().data)
        known: dict[str, Any] = {"samples": len(self), "shape": list(self.data_shape), "content": content.hexdigest()}
        known |= super().fingerprint()
        if self.labels is not None:
            known["labels"] = hashlib.sha256(self.labels.contiguous().numpy().data).hexdigest()
        return known

    def hold_out(self, count: int) -> Batch:
        if not 0 < count < len(self):
            raise ValueError(f"data.validation is {count} of {len(self)} samples; expected fewer than there are")
        order = torch.randperm(len(self), generator=counter_generator(0, 0, 7))
        self._trained, self._order = order[count:], None
        return self.labelled(self.take(order[:count]), order[:count])

    @property
    def trained(self) -> Tensor:
        """Which samples batches are made of: all but those that were held out."""
        return torch.arange(len(self)) if self._trained is None else self._trained.sort().values

    def class_shares(self) -> Tensor | None:
        if self.labels is None or not self.classes:
            return None
        counts = torch.bincount(self.labels[self.trained].long(), minlength=len(self.classes)).double()
        return counts / counts.sum()

    def labelled(self, x0: Tensor, index: Tensor) -> Batch:
        """The batch of these samples."""
        return Batch(x0, None if self.labels is None else self.labels[index])

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


def _parts(x: Tensor | np.ndarray) -> Iterator[Tensor]:
    """The rows in order, some MiB at a time."""
    size = max(1, 2**21 // max(1, math.prod(x.shape[1:])))
    for first in range(0, len(x), size):
        part = x[first : first + size]
        yield part if isinstance(part, Tensor) else torch.from_numpy(np.asarray(part, np.float64))


class Arrays(Stored):
    """A data set x0 (N, *D), scaled to [-1, 1] if its ``data_range`` is given and else left as it is.

    A NumPy array stays where it is, memory-mapped for example, and is read row by row; a tensor is scaled at once.
    Raises ValueError for data that is empty, constant, not finite, or outside the declared range.
    """

    def __init__(
        self,
        x0: Tensor | np.ndarray,
        labels: Tensor | None = None,
        data_range: tuple[float, float] | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        if isinstance(x0, Tensor):
            check_batch(x0, "data")
            check_finite(x0, "data")
        super().__init__(x0, labels, classes)
        self.values = found(_parts(x0))
        if data_range is not None:
            ends = torch.tensor([self.values.least, self.values.most])
            check_range(ends, data_range)
            self.values = Values(*data_range, self.values.step, data_range)
        if isinstance(x0, Tensor):
            self.stored = self.values.inside(x0)
        self.data_shape = tuple(x0.shape[1:])

    def take(self, index: Tensor) -> Tensor:
        return self.kept(index) if isinstance(self.stored, Tensor) else self.values.inside(self.kept(index))

    def batch(self, seed: int, step: int, size: int, rows: range | None = None) -> Batch:
        index = self.indices(seed, step, size, rows)
        return self.labelled(self.take(index), index)

    def _referred(self) -> Tensor:
        return torch.arange(len(self)) if isinstance(self.stored, Tensor) else super()._referred()


class Images(Stored):
    """uint8 images (N, C, H, W), in memory or memory-mapped; batches are float32 in [-1, 1].

    flip: half of them left to right. dequantise: (k + u)/128 - 1 with uniform u instead of k/127.5 - 1. In batches both
    follow from (seed, step, place in the batch); elsewhere there are no flips, and u is 1/2.

    Raises ValueError for images that are none, empty or constant.
    """

    most_reference = 10_000

    def __init__(
        self,
        pixels: Tensor | np.ndarray,
        labels: Tensor | None = None,
        *,
        flip: bool = False,
        dequantise: bool = False,
        classes: Sequence[str] = (),
    ) -> None:
        if pixels.dtype not in (torch.uint8, np.uint8) or pixels.ndim != 4:
            raise ValueError(f"images are {pixels.dtype} {tuple(pixels.shape)}; expected uint8 (N, C, H, W)")
        super().__init__(pixels, labels, classes)
        found(_parts(pixels))
        self.flip, self.dequantise, self.fixed = flip, dequantise, not (flip or dequantise)
        self.data_shape = tuple(pixels.shape[1:])
        # with noise of a step's width added a value stands in the middle of its bin
        self.values = Values(0.0, 255.0, 1.0, (-0.5, 255.5) if dequantise else (0.0, 255.0))

    def take(self, index: Tensor) -> Tensor:
        return self.values.inside(self.kept(index).float())

    def batch(self, seed: int, step: int, size: int, rows: range | None = None) -> Batch:
        rows = range(size) if rows is None else rows
        index = self.indices(seed, step, size, rows)
        x = self.kept(index).float()
        if self.flip:
            flipped = counted("uniform", (1,), rows, seed, step, 6).flatten() < 0.5
            x[flipped] = x[flipped].flip(-1)
        if self.dequantise:
            x.add_(counted("uniform", self.data_shape, rows, seed, step, 8)).sub_(0.5)
        return self.labelled(self.values.inside(x), index)


class Coded(Source):
    """The codes of another source's samples; ``values`` are those of what they decode to.

    Where a sample is always the same, and all of them are at most ``most_kept`` numbers, each is encoded once.
    """

    most_kept: int = 2**29

    def __init__(self, source: Source, codec: Codec) -> None:
        self.source, self.codec = source, codec
        self.values, self.classes = source.values, source.classes
        self.data_shape = tuple(self.first(1).x0.shape[1:])
        self._kept: _Kept | None = None
        if isinstance(source, Stored) and source.fixed and codec.fingerprint:
            fits = 2 * len(source) * math.prod(self.data_shape) <= self.most_kept
            self._kept = _Kept(source, codec) if fits else None

    def batch(self, seed: int, step: int, size: int, rows: range | None = None) -> Batch:
        rows = range(size) if rows is None else rows
        if self._kept is not None:
            index = self._kept.source.indices(seed, step, size, rows)
            z = self._drawn(*self._kept.moments(index), rows, seed, step, 12)
            return self._kept.source.labelled(z, index)
        return self._coded(self.source.batch(seed, step, size, rows), seed, step, 12, rows=rows)

    def reference(self) -> Tensor:
        return self._coded(Batch(self.source.reference())).x0

    def first(self, count: int) -> Batch:
        return self._coded(self.source.first(count))

    def hold_out(self, count: int) -> Batch:
        return self._coded(self.source.hold_out(count))

    def class_shares(self) -> Tensor | None:
        return self.source.class_shares()

    def fingerprint(self) -> dict[str, Any]:
        codec = {"codec": self.codec.fingerprint} if self.codec.fingerprint else {}
        return {**self.source.fingerprint(), **codec}

    def _coded(self, batch: Batch, *counters: int, rows: range | None = None) -> Batch:
        """The batch's codes, drawn by its rows and these counters."""
        with torch.no_grad():
            mean, std = self.codec.moments(batch.x0)
        return batch._replace(x0=self._drawn(mean, std, range(len(mean)) if rows is None else rows, *counters))

    def _drawn(self, mean: Tensor, std: Tensor | None, rows: range, *counters: int) -> Tensor:
        if std is None:
            return mean
        return mean + std * counted("normal", tuple(mean.shape[1:]), rows, *(counters or (0, 0, 13)))


_TOGETHER = 64


class _Kept:
    """Moments of the codes of stored samples, which are all encoded once, when some are first asked for, and by blocks
    of the data: another batch would round otherwise, and a run that goes on differ from one that never stopped."""

    def __init__(self, source: Stored, codec: Codec) -> None:
        self.source, self.codec = source, codec
        self._found: tuple[Tensor, ...] = ()
        self._lock = threading.Lock()

    def moments(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of these samples."""
        with self._lock:
            if not self._found:
                self._found = self._encoded()
        mean, *std = (kept[index] for kept in self._found)
        return mean, std[0] if std else None

    def _encoded(self) -> tuple[Tensor, ...]:
        count, parts = len(self.source), []
        with torch.no_grad():
            for rows in tqdm(torch.split(torch.arange(count), _TOGETHER), "codes", disable=count < 5000, unit="part"):
                parts.append([m for m in self.codec.moments(self.source.take(rows)) if m is not None])
        return tuple(torch.cat(some) for some in zip(*parts, strict=True))


class Drawn(Source):
    """Fresh samples of an exact distribution at every step."""

    def __init__(self, distribution: Distribution) -> None:
        self.distribution = distribution
        self.data_shape = distribution.data_shape
        if isinstance(distribution, Labelled):
            self.classes = tuple(str(k) for k in range(len(distribution.parts)))

    def batch(self, seed: int, step: int, size: int, rows: range | None = None) -> Batch:
        generator, labels = streams((seed % 2**64, 2), step, 1)[0], None
        if isinstance(self.distribution, Labelled):
            x, labels = self.distribution.sample_labelled(size, generator)
        else:
            x = self.distribution.sample(size, generator)
        whole = Batch(x, labels)
        return whole if rows is None else whole.part(slice(rows.start, rows.stop))

    def class_shares(self) -> Tensor | None:
        return self.distribution.weights.double() if isinstance(self.distribution, Labelled) else None

    def reference(self) -> Tensor:
        return self.first(10_000).x0

    def first(self, count: int) -> Batch:
        generator = counter_generator(0, 0, 3)
        if isinstance(self.distribution, Labelled):
            return Batch(*self.distribution.sample_labelled(10_000, generator)).part(slice(count))
        return Batch(self.distribution.sample(10_000, generator)[:count])


def digits() -> Arrays:
    """scikit-learn's 1,797 handwritten digits, 8x8, gray levels 0 to 16, with labels; needs scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("the digits need scikit-learn; install it with: pip install 'scorelab[data]'") from error
    images, labels = load_digits(return_X_y=True)
    x0 = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return Arrays(x0, torch.tensor(labels), (0.0, 16.0))
