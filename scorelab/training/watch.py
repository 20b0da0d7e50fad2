"""Watching a run: a progress bar, metrics.jsonl, TensorBoard, samples and a loss at fixed noise, as it goes.

Rows of metrics.jsonl hold ``step`` and either what training measured, or ``validation_loss``, or the samples' mean and
standard deviation per channel beside the data's. TensorBoard's events are written where the package is installed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from scorelab import parallel
from scorelab.plotting.pictures import are_images, scatter, tiled
from scorelab.training.engine import Metrics, Trainer
from scorelab.training.evaluations import Evaluation, Samples, evaluations
from scorelab.typing import Tensor
from scorelab.writing import whole

__all__ = ["TIMINGS", "Watch", "keep_until"]

TIMINGS = ("seconds", "images_per_second", "data_share")
"""Keys of metrics.jsonl that differ from run to run."""


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


_WORTH_TELLING = 5.0
"""Seconds of making batches, below which their share says nothing."""


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
        self.evaluations = evaluations(trainer.config)
        self._evaluated: set[tuple[int, str]] = set()
        if first:
            kept = keep_until(workdir / "metrics.jsonl", trainer.step)
            self._evaluated = {(r["step"], e.key) for r in kept for e in self.evaluations if e.key in r}
            if importlib.util.find_spec("tensorboard") is not None:
                from torch.utils.tensorboard import SummaryWriter

                self._events = SummaryWriter(str(workdir), purge_step=trainer.step + 1)
            self._metrics = (workdir / "metrics.jsonl").open("a")
        self._began, self._spent, self._steps = time.perf_counter(), 0.0, 0

    def close(self) -> None:
        """Close the bar and the files."""
        self._show_bar(self._bar.close)
        if self._first:
            self._metrics.close()
        if self._events is not None:
            self._events.close()

    def _show_bar(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError:
            # the pipe or terminal that it went to has gone, and the run has not; tqdm still holds the lock that bars of
            # other threads wait for
            self._bar.disable = True
            type(self._bar).set_lock(threading.RLock())

    def stepped(self, metrics: Metrics | None, seconds: float) -> None:
        """A step took ``seconds``; write what it measured."""
        self._spent += seconds
        self._steps += 1
        self._show_bar(self._bar.update)
        if metrics is None:
            return
        size, waited = self.trainer.config.training.batch_size, self.trainer.batches.waited
        speed, share = self._steps * size / max(self._spent, 1e-9), waited / max(self._spent, 1e-9)
        self._write({**asdict(metrics), "images_per_second": speed, "data_share": share})
        shown = {"loss": f"{metrics.loss:.4f}", "samples/s": f"{speed:.0f}"}
        self._bar.set_postfix(shown | ({"data": f"{share:.0%}"} if share > 0.1 else {}), refresh=False)
        if share > 0.25 and not self._told and waited > _WORTH_TELLING:
            said = f"making batches takes {share:.0%} of the time: raise data.workers, or read from a faster disk"
            self._show_bar(lambda: self._bar.write(said, file=sys.stderr))
            self._told = True
        self._spent, self._steps, self.trainer.batches.waited = 0.0, 0, 0.0

    def evaluate(self) -> None:
        """What is due at this step and was not measured yet; what fails only warns, and is tried again at its turn."""
        step, last = self.trainer.step, self.trainer.config.training.steps
        due = [e for e in self.evaluations if e.due(step, last)]
        if not due:
            return
        # the first process knows what was written before the run stopped
        done = parallel.most(*(float((step, e.key) in self._evaluated) for e in due))
        pending = [e for e, already in zip(due, done, strict=True) if not already]
        model = self.trainer.evaluated() if pending else None
        for evaluation in pending:
            assert model is not None
            try:
                found = evaluation.run(model, self.trainer)
                self._write({"step": step, **found.numbers})
                if found.samples is not None and self._first:
                    self._show(found.samples, step, evaluation)
            except Exception as error:
                # the run is worth more than its evaluations
                why = " ".join(f"{type(error).__name__}: {error}".split())
                warnings.warn(f"no {evaluation.what} at step {step}: {why}", RuntimeWarning, stacklevel=2)

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

    def _show(self, x: Tensor, step: int, evaluation: Evaluation) -> None:
        folder = self.workdir / "samples"
        folder.mkdir(exist_ok=True)
        name = f"step_{step:08d}" if isinstance(evaluation, Samples) else f"{evaluation.key}_{step:08d}"
        if not are_images(tuple(x.shape[1:])):
            with whole(folder / f"{name}.npz") as aside, aside.open("wb") as file:
                np.savez_compressed(file, samples=x.cpu().numpy())
            if x.ndim == 2:
                with whole(folder / f"{name}.png") as aside:
                    # every step's axes are those of the data
                    data = self.trainer.experiment.data.first(4000).x0.to(x.device)
                    scatter(x, within=self.trainer.model.decode(data)).savefig(aside, format="png")
            return
        picture = tiled(x, self.trainer.experiment.data.values)
        with whole(folder / f"{name}.png") as aside:
            Image.fromarray(picture).save(aside, "PNG")
        if self._events is not None:
            self._events.add_image(evaluation.what, picture, step, dataformats="HW" if picture.ndim == 2 else "HWC")
