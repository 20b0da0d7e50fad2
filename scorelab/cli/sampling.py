"""Sampling from a run directory, and writing samples in the data's own range."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ml_collections import ConfigDict
from PIL import Image

from scorelab import parallel
from scorelab.adapters import clipped
from scorelab.models import ScoreModel
from scorelab.noise import PerSampleNoise
from scorelab.samplers import Calibrated, sample
from scorelab.training import build_sampling, checkpoint
from scorelab.typing import ScoreFn, Tensor

__all__ = ["RunSamples", "check_out", "load_run", "own_score", "sample_model", "sample_run", "write_samples"]


@dataclass(frozen=True)
class RunSamples:
    """Samples (N, *D), inside range, with the model and the step they come from."""

    x: Tensor
    model: ScoreModel
    step: int


def load_run(workdir: Path, *, step: int = 0, raw: bool = False) -> tuple[ConfigDict, ScoreModel, int]:
    """Config, model and step of a run's checkpoint (0: the last); ValueError if it is missing or damaged."""
    settings, folder = workdir / "config.json", workdir / "checkpoints"
    if not settings.is_file():
        raise ValueError(f"{workdir} holds no config.json; expected the directory of a run: scorelab train makes one")
    place = folder / f"step_{step:08d}" if step else checkpoint.latest(folder)
    if place is None or not place.is_dir():
        there = ", ".join(str(int(p.name[5:])) for p in sorted(folder.glob("step_*"))) or "none"
        raise ValueError(f"{workdir} has no checkpoint{f' of step {step}' if step else ''}; steps there: {there}")
    found = checkpoint.verify(place)
    model = ScoreModel.load(place, weights="model.safetensors" if raw else "ema.safetensors")
    return ConfigDict(json.loads(settings.read_text())), model, found


def own_score(model: ScoreModel, config: ConfigDict) -> ScoreFn:
    """The model, with its denoised sample clamped to the data's range where the experiment says so."""
    return clipped(model, -1.0, 1.0) if config.sampling.clip and model.data_range is not None else model


def sample_model(
    model: ScoreModel,
    config: ConfigDict,
    n: int,
    generator: torch.Generator | PerSampleNoise,
    *,
    sampler: Path | None = None,
    progress: bool = True,
) -> Tensor:
    """n samples with the experiment's own sampler and batch size, or with a calibrated sampler's file."""
    noise_levels, own = build_sampling(config, model)
    return sample(
        own_score(model, config),
        (n, *model.data_shape),
        noise_levels if sampler is None else None,
        own if sampler is None else Calibrated.load(sampler),
        generator=generator,
        progress=progress,
        batch_size=config.sampling.batch_size,
        sharded=isinstance(generator, PerSampleNoise),
    )


def sample_run(
    workdir: Path, *, n: int = 0, seed: int = 0, step: int = 0, raw: bool = False, sampler: Path | None = None
) -> RunSamples:
    """Samples of a run's checkpoint, averaged weights unless ``raw``; sample i depends on (seed, i) alone.

    Under torchrun every process makes its share and returns all of them.
    """
    config, model, found = load_run(workdir, step=step, raw=raw)
    model.to(parallel.join())
    count = n or config.sampling.samples
    return RunSamples(sample_model(model, config, count, PerSampleNoise(seed), sampler=sampler), model, found)


def _bytes(x: Tensor) -> np.ndarray:
    """uint8 (B, H, W) or (B, H, W, 3) of images in [-1, 1], rounded."""
    levels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    return levels[:, 0].numpy() if levels.shape[1] == 1 else levels.permute(0, 2, 3, 1).numpy()


def check_out(out: Path) -> None:
    """Refuse a file of another kind, before samples are drawn for it."""
    if out.suffix not in ("", ".png", ".npz"):
        raise ValueError(f"--out is {out}; expected .png, .npz, or a directory for single PNGs")


def write_samples(run: RunSamples, out: Path) -> str:
    """Write ``.npz`` (values in data_range), one PNG grid, or a directory of PNGs; says what was written."""
    check_out(out)
    images = len(run.model.data_shape) == 3 and run.model.data_shape[0] in (1, 3)
    out = out.with_suffix(".npz") if not images and out.suffix == ".png" else out
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        x = run.x
        if run.model.data_range is not None:
            low, high = run.model.data_range
            x = (x.clamp(-1, 1) + 1) * ((high - low) / 2) + low
        np.savez_compressed(out, samples=x.cpu().numpy())
    elif not images:
        raise ValueError(f"samples of shape {run.model.data_shape} are no images; write them to a .npz file")
    elif out.suffix == ".png":
        pictures = _bytes(run.x)
        columns = round(len(pictures) ** 0.5)
        empty = np.zeros((-len(pictures) % columns, *pictures.shape[1:]), np.uint8)
        tiles = np.concatenate([pictures, empty])
        lines = [np.concatenate(list(tiles[i : i + columns]), 1) for i in range(0, len(tiles), columns)]
        Image.fromarray(np.concatenate(lines)).save(out)
    else:
        out.mkdir(exist_ok=True)
        for i, picture in enumerate(_bytes(run.x)):
            Image.fromarray(picture).save(out / f"{i:06d}.png")
    return f"{len(run.x)} samples of step {run.step}: {out}"
