"""What images look like to a network: the numbers that distances of sets are of, and the files that keep them.

Images are (B, C, H, W) from -1 to 1, as models see them.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from scorelab import parallel
from scorelab.checks import check_batch, nearest_name
from scorelab.classifiers import ClassifierModel
from scorelab.interop.loading import PRETRAINED, pretrained
from scorelab.parts import Kind
from scorelab.saved import module_checksum
from scorelab.typing import Tensor
from scorelab.writing import whole

__all__ = [
    "Features",
    "FromClassifier",
    "FromModule",
    "Inception",
    "Pixels",
    "collected",
    "features_of",
]

_INCEPTION = "6726825d"
"""The first digits of the file's SHA-256, as its two names say."""


class Features(ABC):
    """``features(x)`` are (B, D), float32, of images x (B, C, H, W) from -1 to 1; no row depends on its neighbours.
    Networks follow the images to their device, and have no gradients of their own."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """(B, D)."""

    @abstractmethod
    def about(self) -> dict[str, str]:
        """What decides them, by name: the network and its checksum, and what is done to images before."""

    classifies = False
    """Whether the network tells classes apart, for the Inception score."""

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits (B, classes), from one evaluation; ValueError where there are no classes."""
        raise ValueError(f"{type(self).__name__} has no classes; expected features of a classifier, or of Inception")

    def logits(self, x: Tensor) -> Tensor:
        """(B, classes); ValueError where there are none."""
        return self.both(x)[1]


class Pixels(Features):
    """The pixels themselves."""

    def __call__(self, x: Tensor) -> Tensor:
        check_batch(x)
        return x.flatten(1).float()

    def about(self) -> dict[str, str]:
        return {"features": "pixels", "checksum": "", "images": "from -1 to 1"}


class FromModule(Features):
    """What a ``torch.nn.Module`` of one's own returns, (B, D) or (B, D, *sizes), of which the mean over sizes is taken.

    It gets images from -1 to 1, and is used in evaluation mode. name: what records call it.
    """

    def __init__(self, module: nn.Module, name: str = "") -> None:
        self.module, self.name = module.eval().requires_grad_(False), name or type(module).__name__

    def __call__(self, x: Tensor) -> Tensor:
        check_batch(x)
        found = self.module.to(x.device)(x)
        if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != len(x):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{self.name} returned {got} for {len(x)} images; expected a tensor (B, D) or (B, D, ...)")
        return found.flatten(2).mean(2).float() if found.ndim > 2 else found.float()

    def about(self) -> dict[str, str]:
        return {"features": self.name, "checksum": module_checksum(self.module), "images": "from -1 to 1"}


class FromClassifier(Features):
    """What the last layer of a classifier of noised images sees, at its least noise; its logits are those.

    Raises ValueError for a classifier whose network is not scorelab's own.
    """

    classifies = True

    def __init__(self, model: ClassifierModel, name: str = "classifier") -> None:
        pool = getattr(model.net, "pool", None)
        if not isinstance(getattr(pool, "out", None), nn.Linear):
            raise ValueError(f"{type(model.net).__name__} has no layer to take; expected scorelab.nn.Classifier")
        self.model, self.name, self.last = model.eval().requires_grad_(False), name, pool.out  # type: ignore[union-attr]

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits, from one evaluation."""
        seen: list[Tensor] = []
        hook = self.last.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        try:
            logits = self.model.to(x.device)(x, x.new_tensor(self.model.sigma_range[0]))
        finally:
            hook.remove()
        return seen[0].float(), logits.float()

    def __call__(self, x: Tensor) -> Tensor:
        return self.both(x)[0]

    def about(self) -> dict[str, str]:
        images = f"from -1 to 1, noise level {self.model.sigma_range[0]:.3g}"
        return {"features": self.name, "checksum": module_checksum(self.model), "images": images}


class Inception(Features):
    """Inception-v3 with the weights that the FID was published with, 2,048 numbers, by torch-fidelity's network.

    path: the file of weights, under torch-fidelity's or pytorch-fid's name; nothing is fetched. Images become bytes,
    gray ones three equal channels, of 299 x 299 pixels by TensorFlow 1's bilinear rule. Logits are without the bias, as
    published. Raises ValueError where torch-fidelity or the file is missing, and for another file.
    """

    classifies = True

    def __init__(self, path: str | Path) -> None:
        place = Path(path).expanduser()
        if not place.is_file():
            raise ValueError(
                f"there is no {place}; expected Inception's weights, weights-inception-2015-12-05-{_INCEPTION}.pth of "
                f"torch-fidelity's release v0.2.0 or pt_inception-2015-12-05-{_INCEPTION}.pth of pytorch-fid"
            )
        self.checksum = hashlib.sha256(place.read_bytes()).hexdigest()
        if not self.checksum.startswith(_INCEPTION):
            raise ValueError(
                f"{place} has the SHA-256 {self.checksum[:8]}...; expected {_INCEPTION}..., the FID's weights"
            )
        # tensors alone, before a reader that would run more
        torch.load(place, weights_only=True)
        self.net = _inception()("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(place))

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_batch(x)
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"images are {tuple(x.shape)}; expected (B, 1 or 3, H, W)")
        pixels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)
        with torch.no_grad():
            features, logits = self.net.to(x.device)(pixels)
        return features, logits

    def __call__(self, x: Tensor) -> Tensor:
        return self.both(x)[0]

    def about(self) -> dict[str, str]:
        images = "bytes, 299 x 299 by TensorFlow 1's bilinear rule"
        return {"features": "inception", "checksum": self.checksum, "images": images}


def _inception() -> Any:
    """torch-fidelity's class; its package itself imports torchvision, for data sets, which is not needed."""
    known = sys.modules.get("torch_fidelity")
    spec = None if known else importlib.util.find_spec("torch_fidelity")
    if known is None and spec is None:
        raise ValueError("Inception's features need torch-fidelity: pip install --no-deps torch-fidelity")
    if spec is not None:
        package = ModuleType("torch_fidelity")
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["torch_fidelity"] = package
    try:
        return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    finally:
        if spec is not None:
            del sys.modules["torch_fidelity"]


def features_of(text: str, where: str = "--features") -> Features:
    """pixels; digits or fashion_mnist, of the classifiers that come with scorelab; classifier:DIR, of a run or a saved
    one; inception:FILE; or package.module:Class, a module of one's own made without arguments. Raises ValueError for
    others, naming ``where`` it was asked for."""
    kind, _, rest = text.partition(":")
    if text == "pixels":
        return Pixels()
    if text in PRETRAINED:
        return FromClassifier(ClassifierModel.load(pretrained(f"{text}_features")), text)
    if kind == "inception":
        return Inception(rest)
    if kind == "classifier":
        return FromClassifier(ClassifierModel.load(rest), Path(rest).name)
    if not rest:
        raise ValueError(
            f"{where} is {text!r}; {nearest_name(text, ('pixels', *PRETRAINED, 'classifier', 'inception'))} (pixels, "
            f"{', '.join(PRETRAINED)}, classifier:DIR, inception:FILE or package.module:Class)"
        )
    made = Kind("features", {}).maker(text, where)()
    if not isinstance(made, (Features, nn.Module)):
        raise ValueError(f"{where}={text} makes a {type(made).__name__}; expected a torch.nn.Module or Features")
    return made if isinstance(made, Features) else FromModule(made, text)


def collected(
    features: Features,
    images: Callable[[range], Tensor],
    count: int,
    *,
    place: Path,
    known: dict[str, Any] | None = None,
    size: int = 256,
) -> Tensor:
    """Features (count, D) of ``images(rows)``, ``size`` at a time, in a file that the result is mapped from: memory
    does not grow with count.

    place: a folder. known: what the images are (a data set's fingerprint and split, say): with it the file is kept by
    that and ``features.about()``, and found again; without it is written again. Under torchrun every process makes its
    share, and all see the whole: the folder is one that they share.

    Raises ValueError for images that give no finite features; where a process fails, all do.
    """
    if count < 1 or size < 1:
        raise ValueError(f"count is {count}, size is {size}; expected 1 or more")
    settled = json.dumps({"of": known, "count": count, **features.about()}, sort_keys=True, default=str)
    name = f"{hashlib.sha256(settled.encode()).hexdigest()[:16]}.npy"
    place.mkdir(parents=True, exist_ok=True)
    target, (rank, size_of_world) = place / name, parallel.world()
    # all processes see alike what is there, and a number that none of another job's has
    missing, job = parallel.most(float(known is None or not target.is_file()), float(os.getpid()))
    if missing:
        mine, files = parallel.shard(count), [place / f".{job:.0f}_{k}_{name}" for k in range(size_of_world)]
        part = files[rank]
        try:
            parallel.together(lambda: _write(features, images, mine, part, size))
            parallel.together(lambda: None if rank else _join(files, count, target))
        finally:
            part.unlink(missing_ok=True)
    return torch.from_numpy(np.load(target, mmap_mode="c"))


def _write(features: Features, images: Callable[[range], Tensor], mine: range, part: Path, size: int) -> None:
    """Features of some rows, to a file of this process."""
    with part.open("wb") as file:
        for first in range(mine.start, mine.stop, size):
            rows = range(first, min(first + size, mine.stop))
            found = features(images(rows))
            bad = ~torch.isfinite(found).all(1)
            if bool(bad.any()):
                raise ValueError(f"features of image {rows[int(bad.nonzero()[0])]} are not finite; expected numbers")
            file.write(found.cpu().contiguous().numpy().astype("<f4").data)


def _join(parts: list[Path], count: int, target: Path) -> None:
    """The processes' files as one array."""
    dims = sum(p.stat().st_size for p in parts) // (4 * count)
    with whole(target) as aside, aside.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (count, dims)})
        for part in parts:
            with part.open("rb") as content:
                shutil.copyfileobj(content, file)
