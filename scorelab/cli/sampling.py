"""Sampling from a run directory, and writing samples in the data's own range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ml_collections import ConfigDict
from PIL import Image

from scorelab import parallel
from scorelab.checks import checked_device
from scorelab.cli.runs import load_drawn
from scorelab.cli.steering import Steering
from scorelab.data import Values
from scorelab.noise import PerSampleNoise
from scorelab.plotting.pictures import are_images, picture_bytes, scatter, tiled
from scorelab.precision import prepare
from scorelab.samplers.base import check_held
from scorelab.saved import Model
from scorelab.training import sample_model, with_nfe
from scorelab.training.run import recorded_values
from scorelab.typing import Tensor
from scorelab.writing import check_writable, whole

__all__ = ["RunSamples", "check_out", "sample_run", "values_of", "write_samples"]


@dataclass(frozen=True)
class RunSamples:
    """Samples (N, *D) as the model sees them, what their numbers mean, the model and the step they come from, and their
    classes (N,), None if they have none."""

    x: Tensor
    values: Values | None
    model: Model
    step: int
    labels: Tensor | None = None

    @property
    def shown(self) -> bool:
        """Whether a sample can be shown as an image."""
        return are_images(tuple(self.x.shape[1:]))

    @property
    def columns(self) -> int:
        """As many for each class, where they come in turn and are few; 0 where that is not so."""
        count = 0 if self.labels is None else 1 + int(self.labels.max())
        few = self.labels is not None and torch.equal(self.labels, torch.arange(len(self.x)) % count)
        return count * max(1, round(len(self.x) ** 0.5 / count)) if few and 1 < count <= 32 else 0


def sample_run(
    workdir: Path,
    *,
    n: int = 0,
    seed: int = 0,
    step: int = 0,
    weights: str = "ema",
    sampler: Path | None = None,
    steering: Steering = Steering(),  # noqa: B008
    precision: str = "fp32",
    compile: bool = False,
    device: str = "",
    nfe: int = 0,
    changes: Callable[[ConfigDict], ConfigDict] = lambda config: config,
) -> RunSamples:
    """Samples of a run's checkpoint and ``weights`` (see ``load_run``); sample i depends on (seed, i) alone, and on its
    class. n: 0 for the experiment's own number, or so many of each class. steering: what it is conditioned on and
    guided by. precision, compile: how the network computes (see ``prepare``). device: by default the GPU, if there is
    one. nfe: as many noise levels as take this many evaluations at most. changes: what is changed of the experiment's
    settings.

    Under torchrun every process makes its share and returns all of them.
    """
    config, model, found = load_drawn(workdir, step=step, weights=weights)
    config = changes(config)
    place = parallel.join()
    prepare(model.to(checked_device(device) if device else place), precision, compile=compile)
    if nfe:
        config = with_nfe(config, model, nfe)
    count, classes = n or config.sampling.samples, steering.classes(model)
    if not n and classes and steering.condition in ("", "each"):
        count = max(1, count // classes) * classes
    check_held((count, *model.data_shape))
    labels, by = steering.applied(workdir, config, model, count, found=found, weights=weights, seed=seed)
    if by is not None:
        prepare(by, precision, compile=compile)
    x = sample_model(model, config, count, PerSampleNoise(seed), condition=labels, by=by, sampler=sampler)
    return RunSamples(x, values_of(workdir, model), model, found, labels)


def values_of(workdir: Path, model: Model) -> Values | None:
    """What a run's numbers mean; of one that did not record it, by the model's range."""
    found = recorded_values(workdir)
    if found or model.data_range is None:
        return found
    least, most = model.data_range
    # images of bytes are whole numbers
    return Values(least, most, 1.0 if model.data_range == (0.0, 255.0) else 0.0, model.data_range)


def check_out(out: Path) -> None:
    """Refuse what can't be written, before samples are drawn for it: files of another kind, directories in use."""
    if out.suffix not in ("", ".png", ".npz"):
        raise ValueError(f"--out is {out}; expected .png, .npz, or a directory for single PNGs")
    if not out.suffix and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out is {out}, which is there and not empty; expected a new directory, or an empty one")
    check_writable(out if out.suffix else out / "000000.png")


def write_samples(run: RunSamples, out: Path) -> str:
    """Write ``.npz`` (``samples`` as the data has them, images of bytes as uint8 (N, H, W, C)), one PNG (a grid, or a
    scatter plot of vectors), or a directory of PNGs; says what was written. ValueError for what can't be shown so.
    """
    check_out(out)
    images = run.shown
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        x = run.x if run.values is None else run.values.outside(run.x)
        # as the tools that judge images take them
        pixels = (
            images and run.values is not None and (run.values.least, run.values.most, run.values.step) == (0, 255, 1)
        )
        with whole(out) as aside, aside.open("wb") as file:
            levels = picture_bytes(run.x, run.values) if pixels else x.cpu().numpy()
            arrays = {"samples": levels[..., None] if pixels and levels.ndim == 3 else levels}
            if run.labels is not None:
                arrays["labels"] = run.labels.numpy()
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    elif out.suffix == ".png" and run.x.ndim == 2:
        with whole(out) as aside:
            x = run.x if run.values is None else run.values.outside(run.x)
            scatter(x).savefig(aside, format="png")
    elif not images:
        raise ValueError(f"samples of shape {tuple(run.x.shape[1:])} are no images; write them to a .npz file")
    elif out.suffix == ".png":
        with whole(out) as aside:
            Image.fromarray(tiled(run.x, run.values, run.columns)).save(aside, "PNG")
    else:
        out.mkdir(exist_ok=True)
        for i, picture in enumerate(picture_bytes(run.x, run.values)):
            with whole(out / f"{i:06d}.png") as aside:
                Image.fromarray(picture).save(aside, "PNG")
    return f"{len(run.x)} samples{f' of step {run.step}' if run.step else ''}: {out}"
