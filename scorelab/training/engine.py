"""The training loop: Adam with warm-up and clipping, EMA, metrics, checkpoints, exact resuming.

Everything random in step n (data order, noise levels, noise, dropout) follows from (seed, n), so a run that is resumed
from a checkpoint is bit for bit the run that was never interrupted.
"""

from __future__ import annotations

import copy
import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn
from tqdm.auto import tqdm

from scorelab.checks import check_range
from scorelab.data.sources import counter_generator
from scorelab.models import ScoreModel
from scorelab.training import checkpoint
from scorelab.training.config import Experiment, build
from scorelab.training.ema import EMA

__all__ = ["Interrupted", "NonFiniteError", "Trainer", "claim", "train"]


class NonFiniteError(ValueError):
    """The loss or a gradient is not finite."""


class Interrupted(KeyboardInterrupt):
    """Training was stopped by ``signal`` and saved at ``step``."""

    def __init__(self, signal: int, step: int) -> None:
        super().__init__(f"stopped and saved at step {step}; the same command goes on from there")
        self.signal, self.step = signal, step


class _Signals:
    """While it is entered, the first SIGINT or SIGTERM is only noted (``caught``), and the second acts as ever."""

    def __init__(self) -> None:
        self.caught = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        # handlers can be set in the main thread only
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.caught = number
        self.__exit__()


@dataclass(frozen=True)
class Metrics:
    """What one step measured: mean loss, its mean in each third of the noise levels, gradient norm, learning rate."""

    step: int
    loss: float
    loss_low: float
    loss_middle: float
    loss_high: float
    gradient_norm: float
    lr: float
    ema_initial_share: float


class Trainer:
    """Trains an experiment in memory, one ``advance`` a step; ``state`` and ``restore`` carry it over."""

    def __init__(self, experiment: Experiment, config: ConfigDict) -> None:
        self.experiment, self.config = experiment, config
        self.model = experiment.model.train()
        o = config.optim
        if o.schedule not in ("constant", "cosine"):
            raise ValueError(f"optim.schedule is {o.schedule!r}; expected 'constant' or 'cosine'")
        parameters = list(self.model.parameters())
        self.optimiser = torch.optim.Adam(parameters, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, fused=True)
        self.parameters = parameters
        self.ema = EMA(parameters, o.ema)
        self.step = self.skipped = 0
        self._random = any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.model.modules())

    def _lr(self) -> float:
        o, steps = self.config.optim, self.config.training.steps
        warm = min(1.0, (self.step + 1) / o.warmup) if o.warmup > 0 else 1.0
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, self.step / steps))) if o.schedule == "cosine" else 1.0
        return float(o.lr * warm * fall)

    def _seeded(self) -> AbstractContextManager[Any]:
        """Dropout draws from global state: seed it for this step, and put it back afterwards."""
        return torch.random.fork_rng() if self._random else nullcontext()

    def advance(self, measure: bool = True) -> Metrics | None:
        """One step; None where nothing was measured, or the step skipped.

        Raises NonFiniteError, before any weight is changed, naming the step and the noise levels.
        """
        c, objective = self.config, self.experiment.objective
        size = c.training.batch_size
        x0 = self.experiment.data.batch(c.seed, self.step, objective.count(size)).to(self.model.device)
        lr = self._lr()
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        with self._seeded():
            if self._random:
                torch.manual_seed(counter_generator(c.seed, self.step, 5).initial_seed())
            noised = objective.noised(x0, counter_generator(c.seed, self.step, 4), size)
            self.optimiser.zero_grad()
            parts, part = [], size // c.training.accumulate
            for first in range(0, size, part):
                found = objective.losses(self.model, noised.rows(slice(first, first + part))).loss
                torch.autograd.backward(found.sum() / size)
                parts.append(found.detach())
        losses, sigma = torch.cat(parts), noised.sigma
        limit = c.optim.clip if c.optim.clip > 0 else math.inf
        # a loss that is not finite makes this sum so, too: one look at the device for both
        norm = float(nn.utils.clip_grad_norm_(self.parameters, limit) + 0 * losses.sum())
        if not math.isfinite(norm):
            self._skip(losses, sigma, lr)
            return None
        self.optimiser.step()
        self.ema.update()
        self.step += 1
        if not measure:
            return None
        low, middle, high = (float(p.mean()) for p in losses[sigma.argsort()].tensor_split(3))
        return Metrics(self.step, float(losses.mean()), low, middle, high, norm, lr, self.ema.initial_share)

    def _skip(self, losses: Tensor, sigma: Tensor, lr: float) -> None:
        """Leave this step out, or raise NonFiniteError if that was done too often."""
        broken = ~torch.isfinite(losses)
        where = "a gradient is not finite"
        if broken.any():
            levels = sigma[broken]
            span = f"{float(levels.min()):.4g} to {float(levels.max()):.4g}"
            where = f"the loss is not finite at sigma = {span} ({len(levels)} of {len(losses)} samples)"
        if self.skipped >= self.config.training.skip_nonfinite:
            raise NonFiniteError(
                f"step {self.step}: {where}; nothing was changed or written after the last checkpoint: lower optim.lr "
                f"(now {lr:g}) or check the data" + (f"; {self.skipped} steps were skipped before" * (self.skipped > 0))
            )
        warnings.warn(f"step {self.step} is skipped: {where}", RuntimeWarning, stacklevel=3)
        self.skipped += 1
        self.step += 1

    def averaged(self) -> ScoreModel:
        """A copy of the model with the averaged weights, in evaluation mode; the trained one is not touched."""
        copied = copy.deepcopy(self.model)
        copied.net.load_state_dict(self.ema.weights(self.model.net))
        return copied.requires_grad_(False).eval()

    def save(self, folder: Path) -> Path:
        """Write a checkpoint of this step into ``folder``."""
        training = {
            "step": self.step,
            "skipped": self.skipped,
            "optimiser": self.optimiser.state_dict(),
            "ema_count": self.ema.count,
            "ema_initial_share": self.ema.initial_share,
        }
        return checkpoint.write(folder, self.step, self.model, self.ema.weights(self.model.net), training)

    def restore(self, place: Path) -> None:
        """Continue from a checkpoint; ValueError if it is damaged."""
        weights, averages, training = checkpoint.read(place)
        self.model.net.load_state_dict(weights)
        names = {id(p): name for name, p in self.model.net.named_parameters()}
        for parameter, average in zip(self.ema.parameters, self.ema.average, strict=True):
            average.copy_(averages[names[id(parameter)]])
        self.optimiser.load_state_dict(training["optimiser"])
        self.step, self.skipped, self.ema.count = training["step"], training["skipped"], training["ema_count"]
        self.ema.initial_share = training["ema_initial_share"]


def _plain(config: ConfigDict) -> dict[str, Any]:
    """The resolved config as JSON writes it back (tuples become lists)."""
    return json.loads(config.to_json())  # type: ignore[no-any-return]


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}: {a!r} there, {b!r} now"


def claim(workdir: Path, config: ConfigDict) -> None:
    """Make ``workdir`` this experiment's run directory, or check that it is.

    Raises ValueError, leaving all as it was, if it holds anything else. How often to write and how to sample may
    change, and so may training.steps under a constant learning rate.
    """
    settings = workdir / "config.json"
    if not settings.is_file():
        if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
            raise ValueError(
                f"{workdir} is not empty and holds no config.json; expected a new directory or a run's own"
            )
        workdir.mkdir(parents=True, exist_ok=True)
    else:
        try:
            recorded = json.loads(settings.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{settings} is damaged ({error}); repair it or choose another --workdir") from error
        free = ["sampling.", "training.checkpoint_every", "training.log_every", "training.keep_"]
        if config.optim.schedule == "constant":
            free.append("training.steps")
        changed = [d for d in _differences(recorded, _plain(config)) if not d.startswith(tuple(free))]
        if changed:
            raise ValueError(
                f"{workdir} belongs to another experiment ({'; '.join(changed)}): choose another --workdir"
            )
    aside = settings.with_suffix(".writing")
    aside.write_text(json.dumps(_plain(config), indent=1) + "\n")
    aside.replace(settings)


def _keep_until(path: Path, step: int) -> None:
    """Drop metrics past ``step``: the resumed run writes them again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # the line that was being written when the run was killed
        if row["step"] <= step:
            kept.append(line)
    aside = path.with_suffix(".writing")
    aside.write_text("".join(line + "\n" for line in kept))
    aside.replace(path)


def train(config: ConfigDict, workdir: str | Path, *, progress: bool = True) -> ScoreModel:
    """Train an experiment to ``training.steps`` in a run directory, resuming from its last checkpoint if it has one.

    Returns the model with averaged weights. Writes config.json, metrics.jsonl and checkpoints/. Raises ValueError for
    bad settings, another experiment's directory or a damaged checkpoint, NonFiniteError, and Interrupted once it has
    saved where SIGINT or SIGTERM stopped it (a second signal stops at once).
    """
    workdir = Path(workdir)
    experiment = build(config)
    trainer = Trainer(experiment, config)
    if experiment.data.data_range is not None:
        check_range(experiment.data.batch(config.seed, 0, config.training.batch_size), (-1.0, 1.0), "the first batch")
    claim(workdir, config)
    folder, log = workdir / "checkpoints", workdir / "metrics.jsonl"
    folder.mkdir(exist_ok=True)
    checkpoint.sweep(folder)
    last = checkpoint.latest(folder)
    if last is not None:
        trainer.restore(last)
    _keep_until(log, trainer.step)
    t = config.training
    began = time.perf_counter()
    bar = tqdm(total=t.steps, initial=trainer.step, desc="training", unit="step", disable=not progress)
    with bar, log.open("a") as metrics, _Signals() as signals:
        while trainer.step < t.steps and not signals.caught:
            due = (trainer.step + 1) % t.log_every == 0 or trainer.step + 1 == t.steps
            row = trainer.advance(measure=due)
            bar.update()
            if row is not None:
                metrics.write(json.dumps({**row.__dict__, "seconds": time.perf_counter() - began}) + "\n")
                metrics.flush()
                bar.set_postfix(loss=f"{row.loss:.4f}", refresh=False)
            if trainer.step % t.checkpoint_every == 0 or trainer.step == t.steps or signals.caught:
                trainer.save(folder)
                checkpoint.prune(folder, t.keep_last, t.keep_every)
        if signals.caught and trainer.step < t.steps:
            raise Interrupted(signals.caught, trainer.step)
    return trainer.averaged()
