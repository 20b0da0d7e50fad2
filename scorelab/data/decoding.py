"""Images as uint8 (C, H, W): decoded once, of one size, into memory or into a memory-mapped file."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["Files", "Listing", "decode", "fitted", "picture"]

_IN_MEMORY = 2**31


@dataclass(frozen=True)
class Files:
    """What to read and how: ``path`` to a file or folder; size (H, W) images are scaled to cover and cropped to at the
    centre, () as they are; grayscale; flip half of the images, left to right; uniform dequantisation; skip_bad files;
    cache, a folder for decoded images that do not fit in memory."""

    path: str = ""
    size: tuple[int, ...] = ()
    grayscale: bool = False
    flip: bool = False
    dequantise: bool = False
    skip_bad: bool = False
    cache: str = ""

    def __post_init__(self) -> None:
        if len(self.size) not in (0, 2) or any(not isinstance(n, int) or n < 1 for n in self.size):
            raise ValueError(
                f"data.size is {self.size}; expected (height, width) in pixels, or () for images as they are"
            )

    @property
    def place(self) -> Path:
        """The path, which must exist."""
        if not self.path:
            raise ValueError("data.path is empty; expected the file or folder to read")
        place = Path(self.path)
        if not place.exists():
            raise ValueError(f"data.path: there is no {place}; expected an existing file or folder")
        return place


@dataclass(frozen=True)
class Listing:
    """Encoded images by name, and their labels if there are any."""

    names: Sequence[str]
    read: Callable[[str], bytes]
    labels: dict[str, int] | None
    where: str
    stamp: list[list[float]]
    """Sizes and times of change of what is read: a cache of anything else is not used."""


def picture(row: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3) for Pillow."""
    found: np.ndarray = row[0] if len(row) == 1 else row.transpose(1, 2, 0)
    return found


def _eight_bits(image: Image.Image) -> Image.Image:
    """Gray images of 16 bits in 8, where Pillow's own conversion would cut them off at 255."""
    if image.mode == "F":
        raise ValueError("it holds floating-point pixels; save such data as .npy")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its pixels span [{values.min():g}, {values.max():g}]; expected 8 or 16 bits")
    return Image.fromarray((values / 257).round().astype(np.uint8))


def fitted(image: Image.Image, files: Files) -> np.ndarray:
    """(C, H, W) of an image: gray or colour, and of the wanted size by scaling to cover and cropping at the centre."""
    image = _eight_bits(ImageOps.exif_transpose(image))
    gray = files.grayscale or image.mode in ("1", "L", "LA")
    image = image.convert("L" if gray else "RGB")
    if files.size:
        height, width = files.size
        scale = max(height / image.height, width / image.width)
        covering = (
            max(width, math.ceil(image.width * scale - 1e-6)),
            max(height, math.ceil(image.height * scale - 1e-6)),
        )
        if covering != image.size:
            image = image.resize(covering, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    pixels: np.ndarray = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _pixels(listing: Listing, files: Files) -> Iterator[tuple[str, np.ndarray]]:
    """Decoded images; a bad one is an error, or with skip_bad a warning at the end."""
    bad: list[str] = []
    shape: tuple[int, ...] | None = None
    for name in listing.names:
        try:
            with Image.open(io.BytesIO(listing.read(name))) as image:
                pixels = fitted(image, files)
            if shape is not None and pixels.shape != shape:
                raise ValueError(
                    f"it is {pixels.shape} (channels, height, width), those before it are {shape}: set data.size, or "
                    "data.grayscale"
                )
        except (
            OSError,
            SyntaxError,
            ValueError,
            KeyError,
            # of archives: damaged, of an unknown compression, encrypted
            zipfile.BadZipFile,
            zlib.error,
            NotImplementedError,
            RuntimeError,
            EOFError,
            UnidentifiedImageError,
            Image.DecompressionBombError,
        ) as error:
            if isinstance(error, UnidentifiedImageError):
                # Pillow's own text names an object in memory
                error = ValueError("it is no image of a format known to Pillow")
            if not files.skip_bad:
                raise ValueError(
                    f"{listing.where}: {name} can't be used ({error}); remove or repair it, or set data.skip_bad=True"
                ) from error
            bad.append(f"{name} ({error})")
            continue
        shape = pixels.shape
        yield name, pixels
    if bad:
        shown = ", ".join(bad[:10]) + (", ..." if len(bad) > 10 else "")
        count = f"{len(bad)} of {len(listing.names)} files skipped"
        warnings.warn(f"{listing.where}: {count}: {shown}", RuntimeWarning, stacklevel=2)


def decode(listing: Listing, files: Files) -> tuple[torch.Tensor, list[str]]:
    """All images, uint8 (N, C, H, W), and their names; ValueError, naming the file, for what can't be used."""
    if not listing.names:
        raise ValueError(f"{listing.where} holds no images; expected files such as .png or .jpg: check data.path")
    return _cached(listing, files) if files.cache else _stacked(listing, files)


def _none_read(listing: Listing) -> ValueError:
    return ValueError(f"{listing.where}: none of {len(listing.names)} files could be read; check data.path")


def _stacked(listing: Listing, files: Files) -> tuple[torch.Tensor, list[str]]:
    """All images in memory, and their names."""
    found, names, size = [], [], 0
    for name, row in _pixels(listing, files):
        found.append(row)
        names.append(name)
        size += row.nbytes
        if size > _IN_MEMORY:
            raise ValueError(
                f"{listing.where} takes more than {_IN_MEMORY >> 20} MiB decoded; expected less, or data.cache set to "
                "a folder for a memory-mapped copy"
            )
    if not found:
        raise _none_read(listing)
    return torch.from_numpy(np.stack(found)), names


def _cached(listing: Listing, files: Files) -> tuple[torch.Tensor, list[str]]:
    """All images in a memory-mapped file, decoded at the first call, and their names."""
    what = [listing.where, listing.stamp, files.size, files.grayscale, files.skip_bad]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    folder = Path(files.cache)
    place, about = folder / f"{key}.u8", folder / f"{key}.json"
    if not about.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        aside, names, shape = folder / f"{key}.{os.getpid()}", [], ()
        try:
            with aside.open("wb") as file:
                for name, row in _pixels(listing, files):
                    file.write(np.ascontiguousarray(row).data)
                    names.append(name)
                    shape = row.shape
            if not names:
                raise _none_read(listing)
            aside.replace(place)
        finally:
            aside.unlink(missing_ok=True)
        # last, and whole: without it the images are decoded again
        aside.write_text(json.dumps({"shape": [len(names), *shape], "names": names}))
        aside.replace(about)
    found = json.loads(about.read_text())
    # copy on write: torch wants memory that it may write to
    return torch.from_numpy(np.memmap(place, np.uint8, "c", shape=tuple(found["shape"]))), found["names"]
