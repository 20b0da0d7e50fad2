"""Samples in files, as ``scorelab sample`` and the tools of others write them, read as data of a known kind."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from scorelab.data.decoding import Files
from scorelab.data.files import load, read_arrays
from scorelab.data.sources import Images
from scorelab.data.values import Values, found
from scorelab.typing import Shape, Tensor

__all__ = ["StoredSamples", "read_samples"]

_AT_ONCE = 1000


@dataclass(frozen=True)
class StoredSamples:
    """Samples (N, *data_shape) in the data's own values, or bytes from the least of these to the most; what the values
    are, and the SHA-256 of the file, or of all names and files of a folder."""

    stored: np.ndarray
    values: Values
    pictures: bool
    checksum: str

    def __len__(self) -> int:
        return len(self.stored)

    def take(self, rows: range) -> Tensor:
        """These samples as a model sees them, float32."""
        x = torch.from_numpy(np.array(self.stored[rows.start : rows.stop], np.float32))
        if self.pictures:
            x = self.values.least + x * ((self.values.most - self.values.least) / 255)
        return self.values.inside(x)


def read_samples(place: Path, data_shape: Shape, values: Values) -> StoredSamples:
    """Samples of data with this shape and these values: a ``.npz`` or ``.npy`` with the data's own values under
    samples, images, x0, data or arr_0, channels first, last or, of one channel, none; or a folder of images, black at
    the least value and white at the most.

    Raises ValueError for other shapes, values outside the data's range, and labels that are not one for each sample;
    RuntimeWarning for values that span less than a tenth of the range, as those scaled to [0, 1] do.
    """
    if not place.exists():
        raise ValueError(f"there is no {place}; expected samples: a .npz, a .npy or a folder of images")
    if place.is_dir():
        images = load("folder", Files(str(place)))
        assert isinstance(images, Images)
        x, labels = np.asarray(images.stored), None
    else:
        x, labels = read_arrays(Files(str(place)))
    if labels is not None and labels.shape != (len(x),):
        raise ValueError(f"{place} holds {len(x)} samples and labels {labels.shape}; expected one label each")
    x = _of_shape(x, data_shape, place)
    parts = (torch.from_numpy(x[k : k + _AT_ONCE].astype(np.float64)) for k in range(0, len(x), _AT_ONCE))
    try:
        span = found(parts)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if not place.is_dir():
        values.check(span.least, span.most, str(place))
    return StoredSamples(x, values, place.is_dir(), _checksum(place))


def _of_shape(x: np.ndarray, data_shape: Shape, place: Path) -> np.ndarray:
    """The array as (N, *data_shape), whichever way its channels lie."""
    if x.dtype.kind in "uif" and x.ndim > 1 and len(x):
        for way in (x, np.moveaxis(x, -1, 1), x[:, None]):
            if way.shape[1:] == tuple(data_shape):
                return way
    raise ValueError(f"{place} holds {x.dtype} {x.shape}; expected numbers {('N', *data_shape)}, as the data is")


def _checksum(place: Path) -> str:
    content = hashlib.sha256()
    for path in sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]:
        if place.is_dir():
            content.update(f"{path.relative_to(place).as_posix()}\n{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(2**20):
                content.update(block)
    return content.hexdigest()
