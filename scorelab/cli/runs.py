"""What a run directory, or a saved model, holds: its settings and its model at a step."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TypeVar

import torch
from ml_collections import ConfigDict
from safetensors.torch import load_file

from scorelab.checks import nearest_name
from scorelab.interop.loading import PRETRAINED, pretrained
from scorelab.latent import AutoencoderModel
from scorelab.models import ScoreModel
from scorelab.saved import Model
from scorelab.training import Snapshot, checkpoint, default_config, reconstruct
from scorelab.training.run import recorded_config

__all__ = ["is_autoencoder", "load_drawn", "load_run", "place_of", "run_config"]

M = TypeVar("M", bound=Model)


def place_of(workdir: str | None, model: str | None) -> tuple[Path, Path]:
    """The directory that --workdir or --model names, and where its samples go; ValueError unless it is one of them."""
    if model and workdir:
        raise ValueError("got --model and --workdir; expected one of them")
    if not model:
        if not workdir:
            raise ValueError("--workdir is missing; expected the directory of a run, e.g. --workdir runs/digits")
        found = Path(workdir).expanduser()
        return found, found / "samples"
    found = pretrained(model)
    if not found.is_dir():
        raise ValueError(f"--model is {model!r}, no directory of a saved model; {nearest_name(model, PRETRAINED)}")
    return found, Path("samples") / found.name


def load_run(workdir: Path, *, step: int = 0, weights: str = "ema") -> tuple[ConfigDict, ScoreModel, int]:
    """Config, model and step of a run's checkpoint (0: the last); ValueError if it is missing or damaged, or of no
    score model.

    ``weights``: "model" for the raw ones, "ema" for the first average, "ema_0.9999" or "ema_power_0.1" for another; a
    power-function average of a width that is not stored is made from those that are, in all checkpoints up to the step.

    A directory of a saved model alone is one of step 0, with the default settings of sampling, and without data.
    """
    return _load(ScoreModel, workdir, step, weights)


def load_drawn(
    workdir: Path, *, step: int = 0, weights: str = "ema"
) -> tuple[ConfigDict, ScoreModel | AutoencoderModel, int]:
    """The same of a run that samples can be drawn of: an autoencoder's, too."""
    return _load(AutoencoderModel if is_autoencoder(workdir) else ScoreModel, workdir, step, weights)


def is_autoencoder(workdir: Path) -> bool:
    """Whether a run, or a saved model, is one; False where there is none."""
    place = workdir if (workdir / "model.json").is_file() else checkpoint.latest(workdir / "checkpoints")
    if place is None or not (place / "model.json").is_file():
        return False
    try:
        return bool(json.loads((place / "model.json").read_text())["kind"] == AutoencoderModel.kind)
    except (ValueError, KeyError, TypeError):
        # what is wrong with it is said where it is loaded
        return False


def _load(of: type[M], workdir: Path, step: int, weights: str) -> tuple[ConfigDict, M, int]:
    if (workdir / "model.json").is_file():
        return _saved(of, workdir, step, weights)
    folder, config = workdir / "checkpoints", run_config(workdir)
    place = folder / f"step_{step:08d}" if step else checkpoint.latest(folder)
    if place is None or not place.is_dir():
        there = ", ".join(str(int(p.name[5:])) for p in sorted(folder.glob("step_*"))) or "none"
        raise ValueError(f"{workdir} has no checkpoint{f' of step {step}' if step else ''}; steps there: {there}")
    try:
        found = checkpoint.verify(place)
    except ValueError as damage:
        raise ValueError(f"{damage}: take another by --step, or train on, which sets it aside") from damage
    width = weights.removeprefix("ema_power_")
    first = next(iter(torch.load(place / "training.pt", weights_only=True)["averages"]))
    weights = "ema" if weights == first else weights
    stored = sorted(p.stem for p in place.glob("*.safetensors"))
    if weights in stored:
        return config, of.load(place, weights=f"{weights}.safetensors"), found
    if width == weights:
        raise ValueError(
            f"{place} holds no weights {weights!r}; expected {', '.join(stored)}, or ema_power_ and a width"
        )
    model = of.load(place)
    averages, error = reconstruct(_snapshots(folder, found), _as_width(width))
    if error > 0.05:
        warnings.warn(
            f"the stored averages can't make up one of width {width} (relative error {error:.2g}): keep more "
            "checkpoints (training.keep_every) or take a width nearer to optim.ema_power",
            RuntimeWarning,
            stacklevel=2,
        )
    model.load_weights(averages)
    return config, model, found


def run_config(workdir: Path) -> ConfigDict:
    """The config of a run; settings that came after it have their defaults. ValueError where there is none."""
    recorded = recorded_config(workdir) if workdir.is_dir() else None
    if recorded is None:
        raise ValueError(f"{workdir} holds no config.json; expected the directory of a run: scorelab train makes one")
    config = default_config().unlock()
    with config.ignore_type():
        config.update(recorded)
    return config


def _saved(of: type[M], folder: Path, step: int, weights: str) -> tuple[ConfigDict, M, int]:
    if step or weights not in ("ema", "model"):
        raise ValueError(f"{folder} holds one model and no checkpoints; expected neither --step nor --weights")
    model, config = of.load(folder), default_config()
    config.data.source, config.model.conditional = "none", model.conditional
    if model.null_condition is not None:
        config.training.label_dropout = 0.1
    if isinstance(model, ScoreModel) and model.variance:
        config.sampling.sampler = ConfigDict({"name": "ancestral", "variance": "learned"})
    return config, model, 0


def _as_width(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"the width of an average is {text!r}; expected a number such as ema_power_0.1") from error


def _snapshots(folder: Path, step: int) -> list[Snapshot]:
    """The power-function averages of all checkpoints up to a step."""
    found = []
    for place in checkpoint.places(folder):
        files = sorted(place.glob("ema_power_*.safetensors"))
        if files and int(place.name[5:]) <= step:
            checkpoint.verify(place)
            counts = torch.load(place / "training.pt", weights_only=True)["averages"]
            found += [
                Snapshot(counts[f.stem]["count"], float(f.stem.removeprefix("ema_power_")), load_file(f)) for f in files
            ]
    return found
