"""Checkpoints that appear whole or not at all.

A checkpoint is a directory ``step_XXXXXXXX``: model.json, model.safetensors and ema.safetensors (which
``ScoreModel.load`` reads), training.pt (optimiser and counters, loadable with weights_only=True) and manifest.json with
the size and SHA-256 of each file. It is written beside its place, synced, and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from scorelab.models import ScoreModel
from scorelab.typing import Tensor

__all__ = ["latest", "prune", "read", "sweep", "verify", "write"]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(folder: Path, step: int, model: ScoreModel, ema: dict[str, Tensor], training: dict[str, Any]) -> Path:
    """Write ``folder/step_XXXXXXXX``; refuses (ValueError) to write a weight that is not finite."""
    for name, value in [*model.net.state_dict().items(), *ema.items()]:
        if not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"weight {name} is not finite at step {step}: nothing written, earlier checkpoints are kept"
            )
    place = folder / f"step_{step:08d}"
    aside = folder / f".writing_{place.name}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _fill(aside, step, model, ema, training)
    except (OSError, SafetensorError, RuntimeError) as error:
        # a full disk gets its space back
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(
            f"the checkpoint of step {step} could not be written ({error}); earlier ones are kept: make room, then the "
            "same command goes on from the last"
        ) from error
    if place.exists():
        shutil.rmtree(place)
    aside.rename(place)
    _sync(folder)
    return place


def _fill(aside: Path, step: int, model: ScoreModel, ema: dict[str, Tensor], training: dict[str, Any]) -> None:
    """All files of a checkpoint, synced."""
    model.save(aside)
    save_file({k: v.contiguous().cpu() for k, v in ema.items()}, aside / "ema.safetensors")
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


def prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Remove all but the last ``keep_last`` checkpoints (0: keep all) and those of multiples of ``keep_every``."""
    places = sorted(p for p in folder.glob("step_*") if p.is_dir())
    for place in places[:-keep_last] if keep_last else []:
        if not keep_every or int(place.name[5:]) % keep_every:
            # what is half removed must not look like a checkpoint
            removed = place.rename(folder / f".removing_{place.name}")
            shutil.rmtree(removed)


def latest(folder: Path) -> Path | None:
    """The checkpoint of the highest step, None if there is none."""
    found = sorted(p for p in folder.glob("step_*") if p.is_dir()) if folder.is_dir() else []
    return found[-1] if found else None


def verify(place: Path) -> int:
    """The step of a checkpoint whose files are all there and unchanged; ValueError naming the first that is not."""
    remedy = "remove this directory to go on from the checkpoint before it"
    manifest = place / "manifest.json"
    if not manifest.is_file():
        raise ValueError(f"checkpoint {place} holds no manifest.json, it is missing or half-written; {remedy}")
    try:
        recorded = json.loads(manifest.read_text())
        files = recorded["files"].items()
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise ValueError(f"checkpoint {place} has a damaged manifest.json ({error}); {remedy}") from error
    for name, entry in files:
        path = place / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            size = path.stat().st_size if path.is_file() else "no"
            raise ValueError(f"checkpoint {place}: {name} has {size} bytes, expected {entry['bytes']}; {remedy}")
        if _digest(path) != entry["sha256"]:
            raise ValueError(f"checkpoint {place}: the checksum of {name} is not the recorded one; {remedy}")
    return int(recorded["step"])


def read(place: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Network weights, averaged weights and training state of a verified checkpoint."""
    verify(place)
    training = torch.load(place / "training.pt", weights_only=True, map_location="cpu")
    return load_file(place / "model.safetensors"), load_file(place / "ema.safetensors"), training
