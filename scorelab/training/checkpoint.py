"""Checkpoints that appear whole or not at all.

A checkpoint is a directory ``step_XXXXXXXX``: model.json, model.safetensors and a file for each average of the weights
(which ``ScoreModel.load`` reads; ema.safetensors is the first), training.pt (optimiser and counters, loadable with
weights_only=True) and manifest.json with the size and SHA-256 of each file. It is written beside its place, synced, and
renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from scorelab.saved import Model
from scorelab.typing import Tensor
from scorelab.writing import save_tensors

__all__ = ["files_of", "latest", "place_of", "places", "prune", "read", "sound", "sweep", "verify", "write"]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Put a file or folder on the disk itself; Windows opens no folders, and syncs only what it may write."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name == "posix" else os.O_RDWR)
    except PermissionError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


Averages = dict[str, dict[str, Tensor]]
"""State dicts of averages by their names; the first is the one to sample with."""


def place_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step_{step:08d}"


def write(
    folder: Path,
    step: int,
    model: Model,
    weights: dict[str, Tensor],
    averages: Averages,
    training: dict[str, Any],
) -> Path:
    """Write ``folder/step_XXXXXXXX``; refuses (ValueError) to write a weight that is not finite."""
    states = {"model.safetensors": weights, **{file: averages[name] for name, file in files_of(averages).items()}}
    for name, value in (item for state in states.values() for item in state.items()):
        if not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"weight {name} is not finite at step {step}: nothing written, earlier checkpoints are kept"
            )
    place = place_of(folder, step)
    aside = folder / f".writing_{place.name}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _fill(aside, step, json.dumps(model.to_dict(), indent=1), states, training)
    except (OSError, SafetensorError, RuntimeError) as error:
        # a full disk gets its space back
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(
            f"the checkpoint of step {step} could not be written ({error}); earlier ones are kept: make room, then the "
            "same command goes on from the last"
        ) from error
    before = folder / f".removing_{place.name}"
    if place.exists():
        place.rename(before)
    aside.rename(place)
    shutil.rmtree(before, ignore_errors=True)
    _sync(folder)
    return place


def _fill(aside: Path, step: int, settings: str, states: Averages, training: dict[str, Any]) -> None:
    """All files of a checkpoint, synced."""
    aside.mkdir()
    (aside / "model.json").write_text(settings + "\n")
    for file, state in states.items():
        save_tensors(state, aside / file)
    torch.save(training, aside / "training.pt")
    files = sorted(p for p in aside.iterdir())
    manifest = {p.name: {"bytes": p.stat().st_size, "sha256": _digest(p)} for p in files}
    (aside / "manifest.json").write_text(json.dumps({"step": step, "files": manifest}, indent=1) + "\n")
    for path in [*files, aside / "manifest.json", aside]:
        _sync(path)


def sweep(folder: Path) -> None:
    """Remove what was being written or removed when a run was killed."""
    for left in [*folder.glob(".writing_*"), *folder.glob(".removing_*")]:
        shutil.rmtree(left)


def places(folder: Path) -> list[Path]:
    """All checkpoints, by their steps."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir()) if folder.is_dir() else []


def prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Remove all but the last ``keep_last`` checkpoints (0: keep all) and those of multiples of ``keep_every``."""
    for place in places(folder)[:-keep_last] if keep_last else []:
        if not keep_every or int(place.name[5:]) % keep_every:
            # what is half removed must not look like a checkpoint
            removed = place.rename(folder / f".removing_{place.name}")
            shutil.rmtree(removed)


def latest(folder: Path) -> Path | None:
    """The checkpoint of the highest step, None if there is none."""
    found = places(folder)
    return found[-1] if found else None


def last_step(workdir: Path) -> int:
    """The step of a run directory's last checkpoint, 0 if it has none."""
    found = latest(workdir / "checkpoints")
    return 0 if found is None else int(found.name[5:])


def go_back(folder: Path, step: int) -> None:
    """Set the checkpoints after a step aside, as ``aside_step_...``; ValueError if there is none of that step."""
    steps = [int(p.name[5:]) for p in places(folder)]
    if step not in steps:
        raise ValueError(f"{folder} has no checkpoint of step {step}; there: {', '.join(map(str, steps)) or 'none'}")
    for place in places(folder):
        if int(place.name[5:]) > step:
            kept = folder / f"aside_{place.name}"
            shutil.rmtree(kept, ignore_errors=True)
            place.rename(kept)


def sound(folder: Path) -> Path | None:
    """The last checkpoint that is whole, None if there is none at all.

    Damaged ones after it are set aside, as ``damaged_step_...``, with a warning. Raises ValueError, and touches
    nothing, if there are some and none is whole.
    """
    damaged: list[tuple[Path, str]] = []
    for place in reversed(places(folder)):
        try:
            verify(place)
        except ValueError as error:
            damaged.append((place, str(error)))
            continue
        for bad, why in damaged:
            kept = folder / f"damaged_{bad.name}"
            shutil.rmtree(kept, ignore_errors=True)
            bad.rename(kept)
            warnings.warn(
                f"{why}; it is set aside as {kept.name}, and {place.name} taken", RuntimeWarning, stacklevel=2
            )
        return place
    if damaged:
        raise ValueError(
            f"{damaged[0][1]}; no earlier one is whole: remove {folder} to begin anew, or choose another --workdir"
        )
    return None


def verify(place: Path) -> int:
    """The step of a checkpoint whose files are all there and unchanged; ValueError naming the first that is not."""
    manifest = place / "manifest.json"
    if not manifest.is_file():
        raise ValueError(f"checkpoint {place} holds no manifest.json, it is missing or half-written")
    try:
        recorded = json.loads(manifest.read_text())
        step, files = int(recorded["step"]), recorded["files"].items()
        sizes = {name: (entry["bytes"], entry["sha256"]) for name, entry in files}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint {place} has a damaged manifest.json ({error})") from error
    for name, (count, digest) in sizes.items():
        path = place / name
        if not path.is_file() or path.stat().st_size != count:
            size = path.stat().st_size if path.is_file() else "no"
            raise ValueError(f"checkpoint {place}: {name} has {size} bytes, expected {count}")
        if _digest(path) != digest:
            raise ValueError(f"checkpoint {place}: the checksum of {name} is not the recorded one")
    return step


def files_of(names: Iterable[str]) -> dict[str, str]:
    """The file of each average: the first is ema.safetensors whatever its name."""
    return {name: f"{name}.safetensors" if i else "ema.safetensors" for i, name in enumerate(names)}


def read(place: Path) -> tuple[dict[str, Tensor], Averages, dict[str, Any]]:
    """Network weights, averages by their names, and the training state of a verified checkpoint."""
    verify(place)
    training = torch.load(place / "training.pt", weights_only=True, map_location="cpu")
    files = files_of(training["averages"])
    return load_file(place / "model.safetensors"), {n: load_file(place / f) for n, f in files.items()}, training
