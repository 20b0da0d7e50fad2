"""Images and arrays in files: IDX (MNIST, Fashion-MNIST), CIFAR-10, folders, zips, NumPy arrays, torch data sets.

Images are decoded once, into uint8 (N, C, H, W) in memory or in a memory-mapped file. Every reader names the file that
it can't use and says what to do; ``skip_bad`` leaves such files out, counts and lists them.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import os
import shutil
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from scorelab.checks import nearest_name
from scorelab.data.decoding import IN_MEMORY, Files, Listing, decode, fitted, fitted_row, white_of
from scorelab.data.sources import Arrays, Drawn, Images, Source, digits
from scorelab.distributions import LABELLED, TARGETS, target
from scorelab.writing import whole

__all__ = ["FORMATS", "Files", "load", "read_arrays", "read_idx"]

_IDX_TYPES = {k: np.dtype(v) for k, v in {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}.items()}
_FASHION = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package dataset-fashion-mnist puts its files."""
_NAMES = {
    "fashion_mnist": "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot",
    "cifar10": "airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck",
}
"""What the publishers of data call its classes."""
_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *(
            "png",
            "apng",
            "jpg",
            "jpeg",
            "jpe",
            "jfif",
            "bmp",
            "dib",
            "gif",
            "webp",
            "avif",
            "tif",
            "tiff",
            "tga",
            "ico",
        ),
        *("ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "jpx", "pcx", "sgi", "rgb", "psd"),
    )
)
"""Of images; Pillow registers documents, films and data formats beside them."""


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file, gzip or plain; ValueError, naming it, if it is damaged or of another kind."""
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} can't be read ({error}); it is truncated or damaged: fetch it again") from error
    kind, rank = (data[2], data[3]) if len(data) >= 4 and data[:2] == b"\0\0" else (0, 0)
    if kind not in _IDX_TYPES or rank == 0 or len(data) < 4 + 4 * rank:
        raise ValueError(
            f"{path} is no IDX file (it begins with {data[:4].hex()}); expected 0000, a type and a rank, or arrays in "
            "a .npy or .npz: np.save('data.npy', np.loadtxt('data.csv', delimiter=',')) for a table"
        )
    shape = np.frombuffer(data, ">u4", rank, 4).astype(int)
    dtype = _IDX_TYPES[kind]
    expected = 4 + 4 * rank + int(shape.prod()) * dtype.itemsize
    if len(data) != expected:
        raise ValueError(f"{path} holds {len(data)} bytes, its header says {expected}; it is truncated: fetch it again")
    return np.frombuffer(data, dtype, offset=4 + 4 * rank).reshape(shape)


def _named(folder: Path, stem: str) -> Path:
    """The file ``stem`` with -idx or .idx, with or without .gz."""
    tried = [folder / (stem.replace("-idx", dot + "idx") + end) for dot in ("-", ".") for end in ("", ".gz")]
    for path in tried:
        if path.is_file():
            return path
    raise ValueError(f"{folder} holds no {stem}[.gz]; expected the four files of MNIST or Fashion-MNIST: set data.path")


def _idx(files: Files) -> Source:
    place = files.place
    if place.is_dir():
        images, labels = (
            read_idx(_named(place, "train-images-idx3-ubyte")),
            read_idx(_named(place, "train-labels-idx1-ubyte")),
        )
        if len(images) != len(labels):
            raise ValueError(
                f"{place}: {len(images)} images and {len(labels)} labels; expected as many: fetch it again"
            )
        return _arrays(images, labels, files, str(place))
    return _arrays(read_idx(place), None, files, str(place))


def _fashion_mnist(files: Files) -> Source:
    if not files.path and not Path(_FASHION).is_dir():
        raise ValueError(
            f"Fashion-MNIST is not at {_FASHION}, where Debian's package dataset-fashion-mnist puts it; install it, or "
            "set data.path to a folder with its four files"
        )
    return _named_classes(_idx(files if files.path else replace(files, path=_FASHION)), "fashion_mnist")


def _named_classes(source: Source, name: str) -> Source:
    names = tuple(_NAMES[name].split(", "))
    if len(source.classes) == len(names):
        source.classes = names
    return source


def _cifar10(files: Files) -> Source:
    place = files.place
    inner = place / "cifar-10-batches-bin"
    paths = sorted((inner if inner.is_dir() else place).glob("data_batch_*.bin")) if place.is_dir() else [place]
    if not paths:
        raise ValueError(f"{place} holds no data_batch_*.bin; expected CIFAR-10's binary version, unpacked")
    rows = []
    for path in paths:
        raw = np.fromfile(path, np.uint8)
        if len(raw) == 0 or len(raw) % 3073:
            raise ValueError(f"{path} holds {len(raw)} bytes; expected a multiple of 3073: it is truncated")
        rows.append(raw.reshape(-1, 3073))
    data = np.concatenate(rows)
    return _named_classes(_arrays(data[:, 1:].reshape(-1, 3, 32, 32), data[:, 0], files, str(place)), "cifar10")


def _numpy(files: Files) -> Source:
    """``.npy`` and ``.npz``; see ``read_arrays``."""
    if files.place.is_dir():
        raise ValueError(
            f"data.path is {files.place}, a folder; expected a .npy or .npz file: data.source='folder' reads images"
        )
    return _arrays(*read_arrays(files), files, str(files.place))


def read_arrays(files: Files) -> tuple[np.ndarray, np.ndarray | None]:
    """A ``.npy``, or a ``.npz`` with the data under images, samples, x0, data or arr_0, and its labels if it has them.

    ``.npy`` is memory-mapped. What is in an ``.npz`` is read whole, or, with data.cache, unpacked there and mapped.
    """
    place = files.place
    try:
        with place.open("rb") as file:
            begins = file.read(6)
        if begins != b"\x93NUMPY" and begins[:2] != b"PK":
            raise ValueError(f"it begins with {begins.hex()}, as neither does")
        opened = np.load(place, mmap_mode="r", allow_pickle=False)
        return (opened, None) if isinstance(opened, np.ndarray) else _archived(opened, files)
    except MemoryError as error:
        raise ValueError(
            f"{place} does not fit in memory ({error}); set data.cache to a folder for a memory-mapped copy, or save "
            "the data as .npy, which is mapped as it is"
        ) from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{place} can't be read as .npy or .npz ({error}); write it again with numpy.save") from error


def _archived(archive: np.lib.npyio.NpzFile, files: Files) -> tuple[np.ndarray, np.ndarray | None]:
    """Data and labels of an ``.npz``."""
    with archive:
        key = next((k for k in ("images", "samples", "x0", "data", "arr_0") if k in archive.files), None)
        if key is None:
            raise ValueError(
                f"it holds {', '.join(archive.files)}; expected the data under images, samples, x0, data or arr_0"
            )
        labels = archive["labels"] if "labels" in archive.files else None
        return _unpacked(files.place, key, Path(files.cache).expanduser()) if files.cache else archive[key], labels


def _unpacked(place: Path, key: str, cache: Path) -> np.ndarray:
    """An array of an ``.npz``, memory-mapped from a copy in the cache."""
    about = place.stat()
    what = f"{place.resolve()} {about.st_size} {about.st_mtime} {key}"
    copy = cache / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.npy"
    with zipfile.ZipFile(place) as archive:
        member = archive.getinfo(f"{key}.npy")
        if not copy.is_file() or copy.stat().st_size != member.file_size:
            cache.mkdir(parents=True, exist_ok=True)
            with whole(copy) as aside, archive.open(member) as packed, aside.open("wb") as file:
                shutil.copyfileobj(packed, file, 2**20)
    found: np.ndarray = np.load(copy, mmap_mode="r", allow_pickle=False)
    return found


def _arrays(x: np.ndarray, labels: Sequence[Any] | np.ndarray | None, files: Files, where: str) -> Source:
    """uint8 arrays (N, C, H, W) as images, others as data, channels first. Errors begin with ``where``."""
    try:
        return _source(x, labels, files)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def _source(x: np.ndarray, labels: Sequence[Any] | np.ndarray | None, files: Files) -> Source:
    if x.ndim < 2 or x.dtype.kind not in "uif" or x.size == 0:
        raise ValueError(f"it holds {x.dtype} {x.shape}; expected numbers (N, *D) with N >= 1, points on a line (N, 1)")
    kept = None if labels is None else _labels(labels, [f"sample {i}" for i in range(len(x))])
    x = _channels_first(x, files.layout)
    if x.dtype != np.uint8 or x.ndim != 4:
        if files.size or files.grayscale or files.flip or files.dequantise:
            raise ValueError(
                f"it holds {x.dtype} {x.shape}; data.size, grayscale, flip and dequantise are for uint8 images"
            )
        data = torch.from_numpy(x.astype(np.float32)) if 4 * x.size <= IN_MEMORY else x
        return Arrays(data, kept, (0.0, 255.0) if x.dtype == np.uint8 else None)
    if files.size or (files.grayscale and x.shape[1] != 1):
        x = np.stack([fitted_row(row, files) for row in x])
    pixels = x if x.nbytes > IN_MEMORY else torch.from_numpy(np.array(x))
    return Images(pixels, kept, flip=files.flip, dequantise=files.dequantise)


def _channels_first(x: np.ndarray, layout: str) -> np.ndarray:
    """(N, C, *sizes) of an array (N, *D), by ``layout`` or by which of its axes can be that of 1 to 4 channels.

    Points (N, D) are as they are. Raises ValueError where the shape can be read in two ways.
    """
    if x.ndim == 2:
        if layout:
            raise ValueError(
                f"it holds points {x.shape}; data.layout {layout!r} is for images and sequences: leave it out"
            )
        return x
    if not layout:
        first, last = x.shape[1] <= 4, x.shape[-1] <= 4
        # images of three or more axes are rarely one pixel high
        if first and (not last or x.shape[1] == 1):
            layout = "channels_first"
        elif last and not first:
            layout = "channels_last"
        elif x.dtype == np.uint8 and x.ndim == 3 and not last:
            layout = "no_channels"
        else:
            raise ValueError(
                f"it holds {x.dtype} {x.shape}, which can be read in several ways; set data.layout to channels_first, "
                "(N, C, *sizes), channels_last, (N, *sizes, C), or no_channels, (N, *sizes)"
            )
    if layout == "no_channels":
        return x[:, None]
    return x if layout == "channels_first" else np.moveaxis(x, -1, 1)


def _labels(labels: Sequence[Any] | np.ndarray, names: Sequence[object]) -> torch.Tensor:
    """Classes (N,) of samples called ``names``, whole numbers; ValueError, naming the sample, for anything else."""
    shape = labels.shape if isinstance(labels, np.ndarray) else (len(labels),)
    if shape != (len(names),):
        raise ValueError(f"labels of shape {shape} for {len(names)} samples; expected one whole number each")
    found = []
    for name, label in zip(names, labels, strict=True):
        # a number of NumPy's or torch's
        value = label.item() if isinstance(label, (np.generic, torch.Tensor)) and np.ndim(label) == 0 else label
        if not isinstance(value, (int, float)) or value != value or abs(value) >= 2**63 or value != int(value):
            raise ValueError(f"the label of {name} is {_short(label)}; expected one whole number for every sample")
        found.append(int(value))
    return torch.tensor(found)


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) < 60 else text[:57] + "..."


def _visible(names: Iterable[str], where: str) -> list[str]:
    """Images among paths inside a folder or archive, in order; hidden ones are left out and listed once."""
    found = sorted(n for n in names if PurePosixPath(n).suffix.lower() in _SUFFIXES)
    hidden = [n for n in found if any(p.startswith(".") or p == "__MACOSX" for p in PurePosixPath(n).parts)]
    if hidden:
        shown = ", ".join(hidden[:5]) + (", ..." if len(hidden) > 5 else "")
        warnings.warn(f"{where}: {len(hidden)} hidden files are left out: {shown}", RuntimeWarning, stacklevel=2)
    return sorted(set(found) - set(hidden))


def _walk(folder: Path) -> Iterable[str]:
    """Paths of all files below a folder, relative to it; links are followed, but not round in circles."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} can't be read ({error.strerror}): repair it, or take it out of {folder}")

    for place, inner, names in os.walk(folder, onerror=refuse, followlinks=True):
        here = Path(place)
        above = {p.resolve() for p in (here, *here.parents) if p.is_relative_to(folder)}
        inner[:] = [n for n in inner if not ((here / n).is_symlink() and (here / n).resolve() in above)]
        for name in names:
            yield (here / name).relative_to(folder).as_posix()


def _folder(files: Files) -> Source:
    place = files.place
    if not place.is_dir():
        raise ValueError(f"data.path is {place}, a file; expected a folder of images")
    names = _visible(_walk(place), str(place))
    classes = sorted({Path(n).parts[0] for n in names if len(Path(n).parts) > 1})
    labels = (
        {n: classes.index(Path(n).parts[0]) for n in names}
        if classes and all(len(Path(n).parts) > 1 for n in names)
        else None
    )
    try:
        stats = [(place / name).stat() for name in names]
    except OSError as error:
        raise ValueError(f"{error.filename} can't be read ({error.strerror}): repair or remove it") from error
    stamp = [[s.st_size, s.st_mtime] for s in stats]
    listing = Listing(names, lambda name: (place / name).read_bytes(), labels, str(place), stamp, tuple(classes))
    return _images(listing, files)


def _zip(files: Files) -> Source:
    """A zip of images; ``dataset.json`` inside holds {"labels": [[name, label], ...]} or null, as EDM's writes it, with
    names that begin where it lies."""
    place = files.place
    try:
        archive = zipfile.ZipFile(place)
        names = _visible(archive.namelist(), str(place))
        twice = [n for n, count in Counter(archive.namelist()).items() if count > 1]
        if twice:
            raise ValueError(f"it holds {twice[0]} twice")
        tables = [PurePosixPath(n) for n in archive.namelist() if PurePosixPath(n).name == "dataset.json"]
        table = min(tables, key=lambda n: len(n.parts), default=None)
        pairs = None if table is None else json.loads(archive.read(str(table)))["labels"]
        labels = None if table is None or pairs is None else _table(pairs, table.parent)
    except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{place} can't be read as a zip of images ({error}); make it again") from error
    if labels is not None:
        missing = [n for n in names if n not in labels]
        if missing:
            raise ValueError(
                f"{place}: dataset.json has no label for {len(missing)} images (first: {missing[0]}); label all"
            )
    stamp = [[place.stat().st_size, place.stat().st_mtime]]
    return _images(Listing(names, archive.read, labels, str(place), stamp), files)


def _table(pairs: list[list[Any]], folder: PurePosixPath) -> dict[str, int]:
    """Labels by path in the archive, of [name, label] pairs relative to a folder in it."""
    names = [str(folder / name) for name, _ in pairs]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} has {names.count(twice[0])} labels in dataset.json; expected one")
    labels = _labels([label for _, label in pairs], names)
    return dict(zip(names, labels.tolist(), strict=True))


def _images(listing: Listing, files: Files) -> Source:
    pixels, names = decode(listing, files)
    labels = None if listing.labels is None else torch.tensor([listing.labels[n] for n in names])
    stored = pixels if isinstance(pixels, np.memmap) else torch.from_numpy(pixels)
    return Images(stored, labels, flip=files.flip, dequantise=files.dequantise, classes=listing.classes)


FORMATS: dict[str, Callable[[Files], Source]] = {
    "idx": _idx,
    "mnist": _idx,
    "fashion_mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "arrays": _numpy,
    "folder": _folder,
    "zip": _zip,
}


def load(source: str, files: Files = Files()) -> Source:  # noqa: B008
    """The data that ``data.source`` names: "digits", a 2-D target, a format of ``FORMATS``, or a torch data set by its
    import path, "package.module:Name".

    Raises ValueError, naming the file, for what is missing, damaged or does not fit together.
    """
    if source == "none":
        raise ValueError(
            "this is a saved model, which has no data; expected a run's directory, or --config with data of its kind"
        )
    if source in ("digits", *TARGETS, *LABELLED):
        if files.path:
            raise ValueError(
                f"data.path is {files.path!r}, but data.source is {source!r}, which reads no files; set data.source to "
                f"one of {', '.join(FORMATS)}"
            )
        return digits() if source == "digits" else Drawn(target(source))
    if source in FORMATS:
        return FORMATS[source](files)
    if ":" in source:
        return _torch_dataset(source, files)
    raise ValueError(f"data.source is {source!r}; {nearest_name(source, ('digits', *FORMATS, *TARGETS, *LABELLED))}")


def _torch_dataset(source: str, files: Files) -> Source:
    """Any ``torch.utils.data.Dataset`` of samples or (sample, label): tensors, arrays or Pillow images.

    It is called with data.path if that is set, else with nothing, and read once.
    """
    module, _, name = source.partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
        dataset = make(files.path) if files.path else make()
        count = len(dataset)
    except Exception as error:
        raise ValueError(
            f"data.source is {source!r}: {type(error).__name__}: {error}; expected an importable package.module:Name "
            "of a torch Dataset with a length, called with data.path or with nothing"
        ) from error
    rows: list[Any] = []
    labels: list[Any] = []
    for i in range(count):
        try:
            row = dataset[i]
        except Exception as error:
            raise ValueError(f"{source}: sample {i} can't be read: {type(error).__name__}: {error}") from error
        if isinstance(row, (tuple, list)) and len(row) != 2:
            raise ValueError(f"{source}: sample {i} holds {len(row)} things; expected a sample, or (sample, label)")
        x, label = row if isinstance(row, (tuple, list)) else (row, None)
        rows.append(x if isinstance(x, Image.Image) else np.asarray(x))
        labels.append(label)
    if not rows:
        raise ValueError(f"{source} is empty; expected at least one sample")
    deep = [int(np.asarray(x).max()) for x in rows if isinstance(x, Image.Image) and x.mode.startswith("I")]
    white = white_of(max(deep), source) if deep else 0
    for i, x in enumerate(rows):
        try:
            rows[i] = fitted(x, files, white) if isinstance(x, Image.Image) else x
        except ValueError as error:
            raise ValueError(f"{source}: sample {i} can't be used: {error}") from error
        if rows[i].shape != rows[0].shape:
            raise ValueError(
                f"{source}: sample {i} has shape {rows[i].shape}, those before it {rows[0].shape}; set "
                + ("data.grayscale" if files.size else "data.size")
            )
    x = np.stack(rows)
    left = replace(files, size=(), grayscale=False) if x.dtype == np.uint8 else Files(layout=files.layout)
    return _arrays(x, None if all(label is None for label in labels) else labels, left, source)
