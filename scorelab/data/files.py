"""Images and arrays in files: IDX (MNIST, Fashion-MNIST), CIFAR-10, folders, zips, NumPy arrays, torch data sets.

Images are decoded once, into uint8 (N, C, H, W) in memory or in a memory-mapped file. Every reader names the file that
it can't use and says what to do; ``skip_bad`` leaves such files out, counts and lists them.
"""

from __future__ import annotations

import gzip
import importlib
import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from scorelab.checks import nearest_name
from scorelab.data.decoding import Files, Listing, decode, fitted, picture
from scorelab.data.sources import Arrays, Drawn, Images, Source, digits
from scorelab.distributions import TARGETS, target

__all__ = ["FORMATS", "Files", "load", "read_idx"]

_IDX_TYPES = {k: np.dtype(v) for k, v in {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}.items()}
_FASHION = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package dataset-fashion-mnist puts its files."""
_SUFFIXES = frozenset(Image.registered_extensions())


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file, gzip or plain; ValueError, naming it, if it is damaged or of another kind."""
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} can't be read ({error}); it is truncated or damaged: fetch it again") from error
    kind, rank = (data[2], data[3]) if len(data) >= 4 and data[:2] == b"\0\0" else (0, 0)
    if kind not in _IDX_TYPES or rank == 0 or len(data) < 4 + 4 * rank:
        raise ValueError(f"{path} is no IDX file (it begins with {data[:4].hex()}); expected 0000, a type and a rank")
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
    return _idx(files if files.path else Files(**{**files.__dict__, "path": _FASHION}))


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
    return _arrays(data[:, 1:].reshape(-1, 3, 32, 32), data[:, 0], files, str(place))


def _numpy(files: Files) -> Source:
    """``.npy``, or ``.npz`` with the data under images, samples, x0, data or arr_0 and labels under labels."""
    place = files.place
    if place.is_dir():
        raise ValueError(
            f"data.path is {place}, a folder; expected a .npy or .npz file: data.source='folder' reads images"
        )
    try:
        found = np.load(place, allow_pickle=False)
        parts = {"images": found} if isinstance(found, np.ndarray) else {k: found[k] for k in found.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{place} can't be read as .npy or .npz ({error}); write it again with numpy.save") from error
    key = next((k for k in ("images", "samples", "x0", "data", "arr_0") if k in parts), None)
    if key is None:
        raise ValueError(
            f"{place} holds {', '.join(parts)}; expected the data under images, samples, x0, data or arr_0"
        )
    labels = parts.get("labels")
    return _arrays(parts[key], labels, files, str(place))


def _arrays(x: np.ndarray, labels: np.ndarray | None, files: Files, where: str) -> Source:
    """uint8 arrays as images, also (N, H, W) and (N, H, W, 1 or 3); others as data. Errors begin with ``where``."""
    try:
        return _source(x, labels, files)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def _source(x: np.ndarray, labels: np.ndarray | None, files: Files) -> Source:
    if x.ndim < 2 or x.dtype.kind not in "uif" or len(x) == 0:
        raise ValueError(f"it holds {x.dtype} {x.shape}; expected numbers (N, *D) with N >= 1, points on a line (N, 1)")
    if labels is not None and labels.shape != (len(x),):
        raise ValueError(f"labels of shape {labels.shape} for {len(x)} samples; expected one each")
    kept = None if labels is None else torch.tensor(labels.astype(np.int64))
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        if files.size or files.grayscale or files.flip or files.dequantise:
            raise ValueError(
                f"it holds {x.dtype} {x.shape}; data.size, grayscale, flip and dequantise are for uint8 images"
            )
        data = torch.tensor(x, dtype=torch.float32)
        return Arrays(data, kept, (0.0, 255.0) if x.dtype == np.uint8 else None)
    if x.ndim == 3:
        x = x[:, None]
    elif x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if files.size or (files.grayscale and x.shape[1] == 3):
        x = np.stack([fitted(Image.fromarray(picture(row)), files) for row in x])
    return Images(torch.tensor(x), kept, flip=files.flip, dequantise=files.dequantise)


def _folder(files: Files) -> Source:
    place = files.place
    if not place.is_dir():
        raise ValueError(f"data.path is {place}, a file; expected a folder of images")
    names = sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    classes = sorted({Path(n).parts[0] for n in names if len(Path(n).parts) > 1})
    labels = (
        {n: classes.index(Path(n).parts[0]) for n in names}
        if classes and all(len(Path(n).parts) > 1 for n in names)
        else None
    )
    stats = [(place / name).stat() for name in names]
    stamp = [[s.st_size, s.st_mtime] for s in stats]
    return _images(Listing(names, lambda name: (place / name).read_bytes(), labels, str(place), stamp), files)


def _zip(files: Files) -> Source:
    """A zip of images; ``dataset.json`` inside holds {"labels": [[name, label], ...]} or null, as EDM's writes it."""
    place = files.place
    try:
        archive = zipfile.ZipFile(place)
        names = sorted(n for n in archive.namelist() if Path(n).suffix.lower() in _SUFFIXES)
        table = json.loads(archive.read("dataset.json"))["labels"] if "dataset.json" in archive.namelist() else None
        labels = None if table is None else {str(name): int(label) for name, label in table}
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


def _images(listing: Listing, files: Files) -> Source:
    pixels, names = decode(listing, files)
    labels = None if listing.labels is None else torch.tensor([listing.labels[n] for n in names])
    return Images(pixels, labels, flip=files.flip, dequantise=files.dequantise)


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
    if source == "digits" or source in TARGETS:
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
    raise ValueError(f"data.source is {source!r}; {nearest_name(source, ('digits', *FORMATS, *TARGETS))}")


def _torch_dataset(source: str, files: Files) -> Source:
    """Any ``torch.utils.data.Dataset`` of samples or (sample, label): tensors, arrays or Pillow images.

    It is called with data.path if that is set, else with nothing, and read once.
    """
    module, _, name = source.partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
        dataset = make(files.path) if files.path else make()
        count = len(dataset)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(
            f"data.source is {source!r}: {error}; expected an importable package.module:Name of a torch Dataset with a "
            "length, called with data.path or with nothing"
        ) from error
    rows, labels = [], []
    for i in range(count):
        row = dataset[i]
        x, label = row if isinstance(row, (tuple, list)) else (row, None)
        if isinstance(x, Image.Image):
            x = fitted(x, files)
        rows.append(np.asarray(x))
        labels.append(label)
        if rows[-1].shape != rows[0].shape:
            raise ValueError(
                f"{source}: sample {i} has shape {rows[-1].shape}, those before it {rows[0].shape}; set data.size"
            )
    if not rows:
        raise ValueError(f"{source} is empty; expected at least one sample")
    known = None if labels[0] is None else np.array(labels)
    x = np.stack(rows)
    left = Files(flip=files.flip, dequantise=files.dequantise) if x.dtype == np.uint8 else Files()
    return _arrays(x, known, left, source)
