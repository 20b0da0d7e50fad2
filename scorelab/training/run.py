"""A run directory: who owns it, going on from its last whole checkpoint, saving on signals, and the loop.

It holds config.json (resolved), metrics.jsonl, samples/ and checkpoints/, and TensorBoard's events.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict

from scorelab import parallel
from scorelab.checks import check_range
from scorelab.data import Values
from scorelab.models import ScoreModel
from scorelab.precision import settled_precision
from scorelab.saved import Model
from scorelab.training import checkpoint
from scorelab.training.config import Scales, build
from scorelab.training.engine import NonFiniteError, Trainer
from scorelab.training.sampling import check_sampling
from scorelab.training.settings import PARTS, check_types, default_config, named_part, resolve
from scorelab.training.upgrading import upgraded
from scorelab.training.watch import Watch, keep_until
from scorelab.writing import save_json

__all__ = ["Interrupted", "recorded_config", "recorded_data", "recorded_values", "train"]


class Interrupted(KeyboardInterrupt):
    """Training was stopped by ``signal`` and saved at ``step``, unless that is 0."""

    def __init__(self, signal: int, step: int) -> None:
        done = f"stopped and saved at step {step}; the same command goes on from there"
        super().__init__(done if step else "stopped before the first step, with nothing to save")
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
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: object) -> None:
        self.caught = number
        self.__exit__()
        if parallel.world()[0] == 0:
            print("\nsaving after this step; once more stops at once", file=sys.stderr, flush=True)


def _plain(config: ConfigDict) -> dict[str, Any]:
    """The resolved config as JSON writes it back (tuples become lists)."""
    return json.loads(config.to_json())  # type: ignore[no-any-return]


def _differences(old: dict[str, Any], new: dict[str, Any], default: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Settings that differ; one that ``old`` does not know yet had its default value."""
    for key in sorted(old.keys() | new.keys()):
        a, b, c = old.get(key, default.get(key)), new.get(key), default.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, c if isinstance(c, dict) else {}, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}: {a!r} there, {b!r} now"


def _defaults(config: ConfigDict) -> ConfigDict:
    """The defaults of an experiment with these parts."""
    found = default_config()
    for path in PARTS:
        mine, theirs = found, config
        for key in path.split("."):
            mine, theirs = mine[key], theirs[key]
        mine.name = theirs.name
        for key, inner in theirs.items():
            if isinstance(inner, ConfigDict) and key not in mine:
                mine[key] = inner
    return resolve(found)


def _check_saved(workdir: Path, model: Model) -> None:
    """Refuse (ValueError) to go on with other settings than those of the run's own last checkpoint."""
    place = checkpoint.latest(workdir / "checkpoints")
    then = _read(place / "model.json") if place is not None else None
    now = json.loads(json.dumps(model.to_dict()))
    changed = [k for k in now if then is not None and k in then and k != "data_mean" and then[k] != now[k]]
    if changed:
        raise ValueError(
            f"model.saved is another model than {workdir} was begun with ({', '.join(changed)} differ); expected the "
            f"same: {place} has its settings"
        )


def _begun(path: Path) -> bool:
    """Whether this is what a run leaves that was killed before it had written its config."""
    if path.name in ("config.writing", "data.json") or path.name.endswith(("_config.json", "_data.json")):
        return True
    return path.name == "checkpoints" and path.is_dir() and not any(path.iterdir())


def recorded_config(workdir: Path) -> dict[str, Any] | None:
    """The config that a run directory was made with; None if it is none yet. ValueError if it can't be one."""
    settings = workdir / "config.json"
    if not settings.is_file():
        if workdir.exists() and (not workdir.is_dir() or any(p for p in workdir.iterdir() if not _begun(p))):
            raise ValueError(
                f"{workdir} is not empty and holds no config.json; expected a new directory or a run's own"
            )
        return None
    found = _read(settings)
    try:
        return None if found is None else upgraded(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{settings} is damaged (it lacks {error}); repair it or choose another --workdir") from error


def _check_owner(workdir: Path, config: ConfigDict, accept_changes: bool) -> None:
    """Refuse (ValueError) a directory of another experiment, or one whose checkpoints are gone.

    How often to write and how to sample may change, and so may training.steps under a learning rate that does not
    depend on it, and with ``accept_changes`` all.
    """
    recorded = recorded_config(workdir)
    if recorded is not None and not accept_changes:
        free = ["sampling.", "evaluation.", "data.workers", "data.cache", "training.activation_checkpointing"]
        free += [f"training.{k}" for k in ("checkpoint_every", "log_every", "validate_every", "sample_every", "keep_")]
        ends = "steps" in inspect.signature(named_part(config, "optim.schedule")).parameters
        if not ends:
            free.append("training.steps")
        different = _differences(recorded, _plain(config), _plain(_defaults(config)))
        changed = [d for d in different if not d.startswith(tuple(free))]
        if any(d.startswith("training.steps") for d in changed):
            changed.append(f"the {config.optim.schedule.name} schedule ends at training.steps")
        if changed:
            raise ValueError(
                f"{workdir} belongs to another experiment ({'; '.join(changed)}): choose another --workdir, or go on "
                "with the new settings by --accept_changes"
            )


def recorded_data(workdir: Path) -> dict[str, Any]:
    """What a run directory says of its data: its fingerprint, its scales, and what its numbers mean; empty if nothing.

    ValueError if it is damaged.
    """
    path = workdir / "data.json"
    found = _read(path) or {}
    try:
        if "sigma_data" in found:
            # of a run from before they were chosen, the levels that were the defaults
            known = {"sigma_min": 0.01, "sigma_max": 50.0, **found}
            found["scales"] = Scales(*(float(known[k]) for k in Scales._fields))
        if (v := found.get("values")) is not None:
            ends = None if v["ends"] is None else (float(v["ends"][0]), float(v["ends"][1]))
            found["values"] = Values(float(v["least"]), float(v["most"]), float(v["step"]), ends)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); repair it or choose another --workdir") from error
    return found


def recorded_values(workdir: Path) -> Values | None:
    """What the numbers of a run's data mean; None if that is not recorded."""
    return recorded_data(workdir).get("values")


def _about_data(trainer: Trainer, workdir: Path, accept_changes: bool) -> dict[str, Any]:
    """What is to be recorded of the data; ValueError, saying what differs, if the run was trained on other data."""
    experiment, before = trainer.experiment, recorded_data(workdir)
    now, values = experiment.data.fingerprint(), experiment.data.values
    # classes that had only numbers for names are the same by any name
    if before.get("classes") == [str(k) for k in range(len(now.get("classes", ())))]:
        before["classes"] = now["classes"]
    changed = [f"{k}: {before[k]} there, {v} now" for k, v in now.items() if before.get(k, v) != v]
    changed = ["its " + c.split(":")[0] if len(c) > 100 else c for c in changed]
    if changed and not accept_changes:
        raise ValueError(
            f"{workdir} was trained on other data ({'; '.join(changed)}): choose another --workdir, or go on with this "
            "data by --accept_changes, the network's scale (sigma_data) staying as it was"
        )
    return {**now, **experiment.scales._asdict(), "values": None if values is None else asdict(values)}


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object; None if there is no such file, ValueError if it is damaged."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); repair it or choose another --workdir") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {found!r}; expected what a run wrote: repair it or choose another --workdir")
    return found


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Refuse (ValueError) a run that another process trains. The lock ends with the process, however that ends."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(opened)
        raise ValueError(f"{folder.parent} is being trained by another process; wait for it or stop it") from error
    except OSError as error:
        # NFS and some others lock no directories: better to train there unprotected than not at all
        warnings.warn(
            f"{folder.parent} can't be locked ({error}); train it by one process only", RuntimeWarning, stacklevel=2
        )
    try:
        yield
    finally:
        os.close(opened)


def _resume(trainer: Trainer, workdir: Path, accept_changes: bool, held: ExitStack, back_to: int | None) -> None:
    """Go on from the last whole checkpoint, in all processes alike; then the directory is this experiment's, and locked
    while ``held``.
    """
    config, folder, step = trainer.config, workdir / "checkpoints", -1
    if trainer.rank == 0:
        _check_owner(workdir, config, accept_changes)
        about = _about_data(trainer, workdir, accept_changes)
        # it is made before config.json is written
        gone = recorded_config(workdir) is not None and not folder.is_dir()
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(_locked(folder))
        checkpoint.sweep(folder)
        if back_to is not None:
            checkpoint.go_back(folder, back_to)
        found = checkpoint.sound(folder)
        step = -1 if found is None else checkpoint.verify(found)
        rows = keep_until(workdir / "metrics.jsonl", sys.maxsize)
        before = (recorded_config(workdir) or {}).get("training", {}).get("checkpoint_every", sys.maxsize)
        if found is None and rows and (gone or rows[-1]["step"] > before):
            if gone:
                folder.rmdir()
            raise ValueError(
                f"{workdir} has metrics up to step {rows[-1]['step']}, but {folder} holds no checkpoint: put them "
                "back, or remove metrics.jsonl to begin anew"
            )
    step = int(parallel.most(step)[0])
    if step >= 0:
        trainer.restore(checkpoint.place_of(folder, step))
    if trainer.rank == 0:
        save_json(about, workdir / "data.json")
        save_json(_plain(config), workdir / "config.json")


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    progress: bool = True,
    accept_changes: bool = False,
    step: int | None = None,
    spare_threads: bool = False,
) -> Model:
    """Train an experiment to ``training.steps`` in a run directory, going on from its last whole checkpoint if it has
    one; under torchrun with all its processes, on the GPU if there is one. step: go on from this checkpoint instead,
    and set later ones aside. spare_threads: compute in one thread where a second gains little, so that another busy
    process costs little.

    Returns the model with averaged weights, a ``ScoreModel`` or a ``ClassifierModel``. Raises ValueError for bad
    settings, another experiment's directory (unless ``accept_changes``) or checkpoints of which none is whole,
    NonFiniteError, OSError for a checkpoint that can't be written, and Interrupted once it has saved where SIGINT or
    SIGTERM stopped it (a second signal stops at once).
    """
    workdir, config = Path(workdir).expanduser(), resolve(check_types(config))
    with _Signals() as signals, ExitStack() as held:
        device = parallel.join()
        recorded = recorded_config(workdir)
        known = recorded_data(workdir)
        experiment = build(config, scales=known.get("scales"))
        if config.model.saved:
            _check_saved(workdir, experiment.model)
        experiment.model.to(device)
        if spare_threads and device.type == "cpu" and _is_small(experiment.model, config.training.batch_size):
            held.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        if config.training.precision == "auto":
            # a run keeps the precision that it was begun in
            begun = (recorded or {}).get("training", {}).get("precision")
            config.training.precision = begun or settled_precision("auto", experiment.model)
        if config.training.sample_every and isinstance(experiment.model, ScoreModel):
            check_sampling(config, experiment.model)
        trainer = Trainer(experiment, config)
        if experiment.model.data_range is not None:
            check_range(
                trainer.batches.data.batch(config.seed, 0, config.training.batch_size).x0, (-1.0, 1.0), "batch 0"
            )
        _resume(trainer, workdir, accept_changes, held, step)
        if progress and trainer.rank == 0:
            print(experiment.summary(config), file=sys.stderr, flush=True)
            busy, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
            if spare_threads and device.type == "cpu" and busy > 0.5 * cores and torch.get_num_threads() > 1:
                advice = "with OMP_NUM_THREADS=1 training may be several times as fast"
                print(f"this machine is busy (load {busy:.1f} of {cores} cores): {advice}", file=sys.stderr, flush=True)
        watch = Watch(trainer, workdir, progress)
        try:
            _loop(trainer, watch, workdir / "checkpoints", signals)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}{_way_back(workdir, config.optim.lr)}") from error
        finally:
            watch.close()
            trainer.batches.close()
    return trainer.averaged()


def _is_small(model: Model, batch_size: int) -> bool:
    """Whether a forward pass makes fewer than 2^25 products, where two threads were at most 11 % faster than one."""
    each = sum(p.numel() for p in model.parameters()) * math.prod(model.data_shape[1:])
    return batch_size * each < 2**25


def _way_back(workdir: Path, lr: float) -> str:
    """How to go on after a loss that is not finite: from the checkpoint before the last, which may hold the cause."""
    steps = [int(p.name[5:]) for p in checkpoint.places(workdir / "checkpoints")]
    if not steps:
        return ""
    before = steps[-2:][0]
    return f"; to go on from step {before}, add --step={before} --config.optim.lr={lr / 3:.3g} --accept_changes"


def _loop(trainer: Trainer, watch: Watch, folder: Path, signals: _Signals) -> None:
    t, saved = trainer.config.training, trainer.step
    while True:
        stop = int(parallel.most(signals.caught)[0])
        if trainer.step != saved and (trainer.step % t.checkpoint_every == 0 or trainer.step == t.steps or stop):
            trainer.save(folder)
            saved = trainer.step
            if trainer.rank == 0:
                checkpoint.prune(folder, t.keep_last, t.keep_every)
        if stop and trainer.step < t.steps:
            raise Interrupted(stop, trainer.step)
        watch.evaluate()
        if trainer.step >= t.steps:
            return
        began = time.perf_counter()
        due = (trainer.step + 1) % t.log_every == 0 or trainer.step + 1 == t.steps
        metrics = trainer.advance(measure=due)
        watch.stepped(metrics, time.perf_counter() - began)
