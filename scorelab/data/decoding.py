"""Images as uint8 (C, H, W): decoded once, of one size, into memory or into a memory-mapped file."""

from __future__ import annotations

import hashlib
import io
import json
import math
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from scorelab.writing import whole

__all__ = ["IN_MEMORY", "LAYOUTS", "Files", "Listing", "decode", "fitted", "fitted_row", "white_of"]

IN_MEMORY = 2**31
LAYOUTS = ("channels_first", "channels_last", "no_channels")


@dataclass(frozen=True)
class Files:
    """What to read and how: ``path`` to a file or folder; size (H, W) images are scaled to cover and cropped to at the
    centre, () as they are; grayscale; flip half of the images, left to right; uniform dequantisation; skip_bad files;
    cache, a folder for decoded images that do not fit in memory; background, the colour behind transparent images, a
    name or "#rrggbb"; layout of arrays where their shape leaves a choice: one of LAYOUTS."""

    path: str = ""
    size: tuple[int, ...] = ()
    grayscale: bool = False
    flip: bool = False
    dequantise: bool = False
    skip_bad: bool = False
    cache: str = ""
    background: str = "white"
    layout: str = ""

    def __post_init__(self) -> None:
        if self.layout not in ("", *LAYOUTS):
            raise ValueError(f"data.layout is {self.layout!r}; expected '' or one of {', '.join(LAYOUTS)}")
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise ValueError(
                f"data.background is {self.background!r}; expected a colour such as 'white' or '#808080'"
            ) from error
        if len(self.size) not in (0, 2) or any(not isinstance(n, int) or n < 1 for n in self.size):
            raise ValueError(
                f"data.size is {self.size}; expected (height, width) in pixels, or () for images as they are"
            )

    @property
    def place(self) -> Path:
        """The path, which must exist."""
        if not self.path:
            raise ValueError("data.path is empty; expected the file or folder to read")
        place = Path(self.path).expanduser()
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
    classes: tuple[str, ...] = ()
    """What the labels are called."""


def _eight_bits(image: Image.Image, white: int) -> Image.Image:
    """Gray images of 16 bits in 8, ``white`` becoming 255, where Pillow's own conversion would cut them off at 255."""
    if image.mode == "F":
        raise ValueError("it holds floating-point pixels; save such data as .npy")
    if not image.mode.startswith("I"):
        return image
    if not white or "transparency" in image.info:
        what = "a transparent value" if white else "those before it 8"
        raise ValueError(f"it has 16 bits and {what}; expected images of one kind: convert it")
    values = np.asarray(image).astype(np.float64)
    if values.min() < 0 or values.max() > white:
        raise ValueError(f"its pixels span [{values.min():g}, {values.max():g}]; expected 8 or 16 bits")
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))


def _opaque(image: Image.Image, background: str) -> Image.Image:
    """The image before a background, if anything of it may be transparent."""
    if not (image.has_transparency_data or image.mode in ("La", "RGBa")):
        return image
    colour = ImageColor.getrgb(background)[:3]
    gray = image.mode in ("1", "L", "LA", "La") and len(set(colour)) == 1
    over = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*colour, 255)), over).convert("L" if gray else "RGB")


def fitted(image: Image.Image, files: Files, white: int = 65535) -> np.ndarray:
    """(C, H, W) of an image: gray or colour, before the background where it is transparent, and of the wanted size by
    scaling to cover and cropping at the centre; ``white`` is that of images of 16 bits, 0 where there are none."""
    image = _opaque(_eight_bits(ImageOps.exif_transpose(image), white), files.background)
    gray = files.grayscale or image.mode in ("1", "L")
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


def fitted_row(row: np.ndarray, files: Files) -> np.ndarray:
    """The same of uint8 (C, H, W), channel by channel where they are not gray or red, green and blue."""
    if len(row) == 3:
        return fitted(Image.fromarray(np.ascontiguousarray(row.transpose(1, 2, 0))), files)
    if files.grayscale and len(row) != 1:
        raise ValueError(f"data.grayscale for images of {len(row)} channels; expected 1 or 3")
    return np.concatenate([fitted(Image.fromarray(np.ascontiguousarray(channel)), files) for channel in row])


def white_of(most: int, where: str) -> int:
    """White in images of 16 bits with values up to ``most``: the largest value of the fewest bits, and a warning."""
    white: int = 2 ** max(8, most.bit_length()) - 1
    if white < 65535:
        said = f"{where}: images of 16 bits hold values up to {most}; they are read as {white.bit_length()} bits"
        warnings.warn(f"{said}, {white} being white", RuntimeWarning, stacklevel=2)
    return white


def _white(listing: Listing) -> int:
    """That of all images of 16 bits, which are looked at beforehand; 0 if the first image has 8."""
    most = -1
    for name in listing.names:
        try:
            with Image.open(io.BytesIO(listing.read(name))) as image:
                if image.mode.startswith("I"):
                    most = max(most, int(np.asarray(image).max()))
                elif most < 0:
                    return 0
        except _UNREADABLE:
            continue  # it is named when it is decoded
    return white_of(most, listing.where) if most >= 0 else 0


_UNREADABLE = (
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
)
"""What opening and decoding a damaged image raises."""


def _pixels(listing: Listing, files: Files) -> Iterator[tuple[str, np.ndarray]]:
    """Decoded images; a bad one is an error, or with skip_bad a warning at the end."""
    bad: list[str] = []
    shape: tuple[int, ...] | None = None
    white = _white(listing)
    for name in listing.names:
        try:
            with Image.open(io.BytesIO(listing.read(name))) as image:
                # cameras put previews behind the picture in JPEG
                if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                    raise ValueError("it holds several pages or frames; expected one image: split it")
                pixels = fitted(image, files, white)
            if shape is not None and pixels.shape != shape:
                how = "data.grayscale" if files.size else "data.size, or data.grayscale"
                raise ValueError(
                    f"it is {pixels.shape} (channels, height, width), those before it are {shape}: set {how}"
                )
        except _UNREADABLE as error:
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


def decode(listing: Listing, files: Files) -> tuple[np.ndarray, list[str]]:
    """All images, uint8 (N, C, H, W), and their names; ValueError, naming the file, for what can't be used."""
    if not listing.names:
        raise ValueError(f"{listing.where} holds no images; expected files such as .png or .jpg: check data.path")
    return _cached(listing, files) if files.cache else _stacked(listing, files)


def _none_read(listing: Listing) -> ValueError:
    return ValueError(f"{listing.where}: none of {len(listing.names)} files could be read; check data.path")


def _stacked(listing: Listing, files: Files) -> tuple[np.ndarray, list[str]]:
    """All images in memory, and their names."""
    found, names, size = [], [], 0
    for name, row in _pixels(listing, files):
        found.append(row)
        names.append(name)
        size += row.nbytes
        if size > IN_MEMORY:
            raise ValueError(
                f"{listing.where} takes more than {IN_MEMORY >> 20} MiB decoded; expected less, or data.cache set to "
                "a folder for a memory-mapped copy"
            )
    if not found:
        raise _none_read(listing)
    return np.stack(found), names


def _cached(listing: Listing, files: Files) -> tuple[np.ndarray, list[str]]:
    """All images in a memory-mapped file, decoded at the first call, and their names."""
    names = list(listing.names)
    what = [listing.where, names, listing.stamp, files.size, files.grayscale, files.skip_bad, files.background]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    folder = Path(files.cache).expanduser()
    place, about = folder / f"{key}.u8", folder / f"{key}.json"
    found = _whole(place, about)
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        kept, shape = [], ()
        with whole(place) as aside:
            with aside.open("wb") as file:
                for name, row in _pixels(listing, files):
                    file.write(np.ascontiguousarray(row).data)
                    kept.append(name)
                    shape = row.shape
            if not kept:
                raise _none_read(listing)
        # last, and whole: without it the images are decoded again
        found = {"shape": [len(kept), *shape], "names": kept}
        with whole(about) as aside:
            aside.write_text(json.dumps(found))
    return np.memmap(place, np.uint8, "r", shape=tuple(found["shape"])), found["names"]


def _whole(place: Path, about: Path) -> dict[str, Any] | None:
    """What ``about`` says of a cache; None if it is not there, or damaged."""
    try:
        found: dict[str, Any] = json.loads(about.read_text())
        if place.stat().st_size == math.prod(found["shape"]) and len(found["names"]) == found["shape"][0] > 0:
            return found
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    return None
