"""Watching a run: a progress bar, metrics.jsonl, TensorBoard, samples and a loss at fixed noise, as it goes.

Rows of metrics.jsonl hold ``step`` and either what training measured, or ``validation_loss``, or the samples' mean and
standard deviation per channel beside the data's. TensorBoard's events are written where the package is installed.
"""

from __future__ import annotations

import importlib.util
import json
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from scorelab import parallel
from scorelab.models import ScoreModel
from scorelab.noise import PerSampleNoise, counted
from scorelab.plotting.pictures import are_images, tiled
from scorelab.training.batches import Draw
from scorelab.training.engine import BINS, Metrics, Trainer
from scorelab.training.sampling import in_turn, sample_model
from scorelab.typing import Tensor
from scorelab.writing import whole

__all__ = ["TIMINGS", "Watch", "keep_until"]

TIMINGS = ("seconds", "images_per_second", "data_share")
"""Keys of metrics.jsonl that differ from run to run."""
_FIXED = 512
"""Samples that the loss at fixed noise takes, at most."""


def keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop metrics past ``step``, which the resumed run writes again; the rows that are left."""
    if not path.is_file():
        return []
    kept, rows = [], []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            early = row["step"] <= step
        except (ValueError, KeyError, TypeError):
            continue  # the line that was being written when the run was killed
        if early:
            kept.append(line)
            rows.append(row)
    with whole(path) as aside:
        aside.write_text("".join(line + "\n" for line in kept))
    return rows


def _moments(x: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every channel of (N, C, *sizes)."""
    count = x.numel() // x.shape[1]
    total, squares = torch.zeros(2, x.shape[1], dtype=torch.float64)
    for part in torch.split(x.cpu(), 256):
        channels = part.double().transpose(0, 1).flatten(1)
        total += channels.sum(1)
        squares += channels.square().sum(1)
    mean = total / count
    return mean.tolist(), ((squares - count * mean**2) / max(1, count - 1)).clamp_min(0).sqrt().tolist()


class Watch:
    """What is written and shown of a run, by the first process; all of them evaluate."""

    def __init__(self, trainer: Trainer, workdir: Path, progress: bool) -> None:
        self.trainer, self.workdir = trainer, workdir
        t, first = trainer.config.training, trainer.rank == 0
        self._first = first
        self._bar = tqdm(
            total=t.steps, initial=trainer.step, desc="training", unit="step", disable=not (progress and first)
        )
        self._events: Any = None
        self._told = not first
        self._evaluated: set[tuple[int, str]] = set()
        if first:
            kept = keep_until(workdir / "metrics.jsonl", trainer.step)
            self._evaluated = {(r["step"], k) for r in kept for k in ("validation_loss", "sample_mean") if k in r}
            if importlib.util.find_spec("tensorboard") is not None:
                from torch.utils.tensorboard import SummaryWriter

                self._events = SummaryWriter(str(workdir), purge_step=trainer.step + 1)
            self._metrics = (workdir / "metrics.jsonl").open("a")
        self._began, self._spent, self._steps = time.perf_counter(), 0.0, 0
        data = trainer.experiment.data.reference()
        self._data_mean, self._data_std = _moments(data[:10_000])

    def close(self) -> None:
        """Close the bar and the files."""
        self._bar.close()
        if self._first:
            self._metrics.close()
        if self._events is not None:
            self._events.close()

    def stepped(self, metrics: Metrics | None, seconds: float) -> None:
        """A step took ``seconds``; write what it measured."""
        self._spent += seconds
        self._steps += 1
        self._bar.update()
        if metrics is None:
            return
        size, waited = self.trainer.config.training.batch_size, self.trainer.batches.waited
        speed, share = self._steps * size / max(self._spent, 1e-9), waited / max(self._spent, 1e-9)
        self._write({**asdict(metrics), "images_per_second": speed, "data_share": share})
        shown = {"loss": f"{metrics.loss:.4f}", "images/s": f"{speed:.0f}"}
        self._bar.set_postfix(shown | ({"data": f"{share:.0%}"} if share > 0.1 else {}), refresh=False)
        if share > 0.25 and not self._told and self._steps > 1:
            self._bar.write(f"making batches takes {share:.0%} of the time: raise data.workers or use a faster disk")
            self._told = True
        self._spent, self._steps, self.trainer.batches.waited = 0.0, 0, 0.0

    def evaluate(self) -> None:
        """Loss at fixed noise and samples, where they are due at this step and not there yet."""
        t, step = self.trainer.config.training, self.trainer.step
        wanted = [("validation_loss", t.validate_every), ("sample_mean", t.sample_every)]
        due = [bool(n and step) and (step % n == 0 or step == t.steps) for _, n in wanted]
        # the first process knows what was written before the run stopped
        done = parallel.most(*(float((step, key) in self._evaluated) for key, _ in wanted))
        validate, draw = (d and not already for d, already in zip(due, done, strict=True))
        if not validate and not draw:
            return
        model = self.trainer.evaluated()
        for wanted_now, what, part in ((validate, "validation loss", self._validate), (draw, "samples", self._draw)):
            if not wanted_now:
                continue
            try:
                part(model, step)
            except Exception as error:
                # the run is worth more than its evaluations; the next one is tried again
                why = " ".join(f"{type(error).__name__}: {error}".split())
                warnings.warn(f"no {what} at step {step}: {why}", RuntimeWarning, stacklevel=2)

    def _validate(self, model: ScoreModel, step: int) -> None:
        bins = self._fixed_noise_losses(model)
        self._write({"step": step, "validation_loss": float(np.mean(bins)), "validation_bins": bins})

    def _draw(self, model: ScoreModel, step: int) -> None:
        config = self.trainer.config
        n = config.sampling.samples
        x = sample_model(model, config, n, PerSampleNoise(0), condition=in_turn(model, n), progress=False)
        mean, std = _moments(x)
        own = {"data_mean": self._data_mean, "data_std": self._data_std}
        self._write({"step": step, "sample_mean": mean, "sample_std": std, **own})
        if self._first:
            self._show(x, step)

    def _fixed_noise_losses(self, model: torch.nn.Module) -> list[float]:
        """The mean loss in each part of the noise levels: held-out samples if there are any, always the same noise."""
        e, batches = self.trainer.experiment, self.trainer.batches
        held = batches.known(e.data.batch(0, 0, _FIXED) if e.held_out is None else e.held_out.part(slice(_FIXED)))
        # every part of the levels has as many samples
        least = -(-max(BINS, self.trainer.processes) // BINS) * BINS
        count = max(least, len(held.x0) // BINS * BINS)
        index = torch.arange(count) % len(held.x0)
        batch, u = held.mapped(lambda t: t[index]), (torch.arange(count) + 0.5) / count
        noise = counted("normal", batches.noise_shape(batch), range(count), 0, 10).to(batch.x0)
        draw, mine, found = Draw(batch, u, noise), parallel.shard(count), []
        with torch.no_grad():
            for first in range(mine.start, mine.stop, batches.size):
                some = draw.part(slice(first, min(first + batches.size, mine.stop)))
                found.append(e.objective.losses(model, *some.mapped(lambda t: t.to(batches.device))))
        losses = parallel.gather(torch.cat(found), count)
        return losses.double().cpu().reshape(BINS, -1).mean(1).tolist()

    def _write(self, row: dict[str, Any]) -> None:
        if not self._first:
            return
        self._metrics.write(json.dumps({**row, "seconds": time.perf_counter() - self._began}) + "\n")
        self._metrics.flush()
        if self._events is None:
            return
        for key, value in row.items():
            parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
            for name, part in parts:
                # a part of the noise levels without a sample has no value
                if part is not None:
                    self._events.add_scalar(f"{key}/{name}", part, row["step"])
            if isinstance(value, (int, float)) and key != "step":
                self._events.add_scalar(key, value, row["step"])

    def _show(self, x: Tensor, step: int) -> None:
        folder = self.workdir / "samples"
        folder.mkdir(exist_ok=True)
        if not are_images(tuple(x.shape[1:])):
            with whole(folder / f"step_{step:08d}.npz") as aside, aside.open("wb") as file:
                np.savez_compressed(file, samples=x.cpu().numpy())
            return
        picture = tiled(x, self.trainer.experiment.data.values)
        with whole(folder / f"step_{step:08d}.png") as aside:
            Image.fromarray(picture).save(aside, "PNG")
        if self._events is not None:
            self._events.add_image("samples", picture, step, dataformats="HW" if picture.ndim == 2 else "HWC")
