"""``scorelab evaluate``: how far a run's samples are from data, how sure that is, and all that it depends on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import nn
from tqdm.auto import tqdm

import scorelab
from scorelab import parallel
from scorelab.checks import checked_device, nearest_name
from scorelab.cli.analysis import data_for, with_data
from scorelab.cli.runs import load_drawn
from scorelab.cli.steering import Steering
from scorelab.data import Source, read_samples
from scorelab.data.sources import Stored
from scorelab.evaluation import Features, collected, compared, features_of
from scorelab.evaluation.comparison import check_counts, varied
from scorelab.evaluation.estimates import parts
from scorelab.latent import AutoencoderModel
from scorelab.noise import PerSampleNoise
from scorelab.precision import prepare
from scorelab.saved import module_checksum
from scorelab.training import load_data, sample_model, with_nfe
from scorelab.typing import Tensor

__all__ = ["JudgedRun", "evaluate_samples", "sampler_of", "table"]

_AT_ONCE = 1000
_AGAINST = ("train", "held_out")


class _WithLogits(Features):
    """Features, and beside them logits, so that samples are drawn and seen once."""

    def __init__(self, seen: Features) -> None:
        self.seen = seen

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat(self.seen.both(x), 1)

    def about(self) -> dict[str, str]:
        return self.seen.about()


class _Beside:
    """Data that samples are judged beside, and their features."""

    def __init__(self, source: Source, config: ConfigDict, *, against: str, features: str, few: bool) -> None:
        if not isinstance(source, Stored):
            raise ValueError(
                f"data.source={config.data.source!r} has fresh samples at every step; expected stored data"
            )
        self.source, self.held, self.few = source, config.data.validation, few
        self.against = against or ("held_out" if self.held else "train")
        count = _images(source, self.held, self.against)[1]
        self.seen = features_of(features)
        fingerprint = source.fingerprint()
        self.about = {"source": config.data.source, "against": self.against, "count": count}
        self.about |= {"content": fingerprint["content"]}
        self._known = {"data": fingerprint, "held_out": self.held}

    def features(self, against: str, device: torch.device) -> Tensor:
        """Of the data, (count, D), computed once and kept for all runs."""
        images, count = _images(self.source, self.held, against)
        known = {**self._known, "against": against}
        return collected(self.seen, lambda rows: images(rows).to(device), count, place=_cache(), known=known)

    def about_samples(self, n: int) -> dict[str, Any]:
        """What records of n samples beside it say alike."""
        rounding = "to the data's values" if self.source.values.step else "none"
        return {"data": self.about, **self.seen.about(), "rounding": rounding, "samples": n}

    def compared(self, images: Callable[[range], Tensor], n: int, device: torch.device) -> dict[str, Any]:
        """Distances of n samples, ``images(rows)`` inside, once rounded to the data's values."""
        begun, values = time.perf_counter(), self.source.values

        def rounded(rows: range) -> Tensor:
            return values.rounded(images(rows)).to(device)

        real = self.features(self.against, device)
        # one for all processes of torchrun
        aside = _cache() / f".{os.environ.get('TORCHELASTIC_RUN_ID', os.getpid())}"
        try:
            seen = _WithLogits(self.seen) if self.seen.classifies else self.seen
            whole = collected(seen, rounded, n, place=aside, size=_AT_ONCE)
            x, logits = whole.tensor_split([real.shape[1]], 1)
            distances = compared(x, real, few=self.few)
            variety = varied(x, real, logits if self.seen.classifies else None)
            parallel.wait()
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        found = {"distances": distances, "variety": variety}
        software = f"scorelab {scorelab.__version__}, torch {torch.__version__}"
        return {**found, "software": software, "seconds": round(time.perf_counter() - begun, 1)}

    def floor(self, device: torch.device) -> dict[str, Any]:
        """Distances of the data from itself, which no sampler is expected to go below: of the part that samples are not
        judged beside, or where none was held out of two halves."""
        real = self.features(self.against, device)
        if self.held:
            other = next(name for name in _AGAINST if name != self.against)
            of, x = f"{other} beside {self.against}", self.features(other, device)
        else:
            half = parts(len(real), 2)
            of, x, real = f"two halves of {self.against}", real[half == 0], real[half == 1]
        return {"of": of, "distances": compared(x, real, few=True)}


class JudgedRun:
    """n samples of a run, or of a saved model, beside data; under torchrun every process draws its share.

    against: "train", the data that the run learnt from, or "held_out", what it held out (by default, if there is any).
    features: see ``features_of``. Unless ``steering`` names a condition, classes are drawn as often as the data has
    them. Samples are rounded to the values that the data takes, as images in files are. The other arguments are
    ``sample_run``'s and ``likelihood_run``'s. Features of the data are kept in ~/.cache/scorelab, or under
    XDG_CACHE_HOME. Raises ValueError for data that is drawn afresh, and for fewer than 2,048 samples or data
    unless ``few``.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        n: int,
        features: str = "pixels",
        against: str = "",
        few: bool = False,
        seed: int = 0,
        step: int = 0,
        weights: str = "ema",
        steering: Steering = Steering(),  # noqa: B008
        nfe: int = 0,
        device: str = "",
        data: ConfigDict | None = None,
        changes: Callable[[ConfigDict], ConfigDict] = lambda config: config,
    ) -> None:
        config, self.model, found = load_drawn(workdir, step=step, weights=weights)
        self.config = config = changes(with_data(config, data))
        self.beside = _Beside(data_for(self.model, config), config, against=against, features=features, few=few)
        check_counts(n, self.beside.about["count"], few)
        place = parallel.join()
        prepare(self.model.to(checked_device(device) if device else place), "fp32", compile=False)
        if not steering.condition and steering.classes(self.model):
            # of each in turn are no independent draws, and too near to the data
            steering = replace(steering, condition="data")
        known: dict[str, Any] = {"found": found, "weights": weights, "seed": seed, "source": self.beside.source}
        self._labels, self._by = steering.applied(workdir, config, self.model, n, **known)
        if nfe:
            self.config = with_nfe(config, self.model, nfe)
        self.workdir, self.steering = workdir, steering
        self._n, self._seed = n, seed
        self.about = {
            "of": f"{n:,} samples of {workdir}" + (f", step {found}" if found else ""),
            "weights": weights,
            "model": module_checksum(self.model),
            "seed": seed,
            "steering": {k: v for k, v in asdict(steering).items() if v},
            **self.beside.about_samples(n),
        }
        """What all records of the run say alike."""

    def record(self, sampler: Path | None = None, config: ConfigDict | None = None) -> dict[str, Any]:
        """Draw them, by the file of a calibrated sampler or the sampler of a config (None: the run's), and compare.

        Its ``network_evaluations`` are those that a sample took on average, two for each that is guided by no class.
        """
        config, seconds, evaluated = self.config if config is None else config, 0.0, 0
        bar = tqdm(total=len(parallel.shard(self._n)), desc=f"samples of {self.workdir.name}", unit="sample")

        def drawn(rows: range) -> Tensor:
            nonlocal seconds
            begun, labels = time.perf_counter(), self._labels
            labels = labels if labels is None or len(labels) == 1 else labels[rows.start : rows.stop]
            generator = PerSampleNoise(self._seed, rows.start)
            options: dict[str, Any] = {"by": self._by, "sampler": sampler, "progress": False, "sharded": False}
            x = sample_model(self.model, config, len(rows), generator, condition=labels, **options)
            seconds += time.perf_counter() - begun
            bar.update(len(rows))
            return x

        def count(net: nn.Module, given: tuple[Tensor, ...]) -> None:
            nonlocal evaluated
            evaluated += len(given[0])

        hook = self.model.net.register_forward_pre_hook(count)
        try:
            with bar:
                found = self.beside.compared(drawn, self._n, self.model.device)
        finally:
            hook.remove()
        each = evaluated / max(1, len(parallel.shard(self._n)))
        by = {"name": "prior"} if isinstance(self.model, AutoencoderModel) else sampler_of(config, sampler)
        own = {"sampler": by, "network_evaluations": round(each, 2)}
        return {**self.about, **own, **found, "seconds_drawing": round(seconds, 1)}


def sampler_of(config: ConfigDict, file: Path | None = None) -> dict[str, Any]:
    """What records say of a config's sampler, or of a calibrated one's file."""
    if file is not None:
        return {"path": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    found: dict[str, Any] = json.loads(config.sampling.to_json_best_effort())
    return found


def evaluate_samples(
    place: Path,
    config: ConfigDict,
    *,
    features: str = "pixels",
    against: str = "",
    few: bool = False,
    device: str = "",
) -> dict[str, Any]:
    """The record of samples in a file or folder (see ``read_samples``) beside ``config.data``, as ``JudgedRun``'s:
    equal to it for samples that ``scorelab sample`` wrote to a ``.npz``."""
    beside = _Beside(load_data(config), config, against=against, features=features, few=few)
    samples = read_samples(place, beside.source.data_shape, beside.source.values)
    n, joined = len(samples), parallel.join()
    check_counts(n, beside.about["count"], few)
    found = beside.compared(samples.take, n, checked_device(device) if device else joined)
    file = {"path": str(place), "sha256": samples.checksum}
    return {"of": f"{n:,} samples of {place}", "file": file, **beside.about_samples(n), **found}


def _images(source: Stored, held: int, against: str) -> tuple[Callable[[range], Tensor], int]:
    """Rows of the data that samples are judged beside, and how many there are."""
    there = _AGAINST if held else ("train",)
    if against not in there:
        raise ValueError(f"--against is {against!r}; {nearest_name(against, there)}")
    batch = source.hold_out(held) if held else None
    if against == "held_out" and batch is not None:
        return lambda rows: batch.x0[rows.start : rows.stop], held
    trained = source.trained
    return lambda rows: source.take(trained[rows.start : rows.stop]), len(trained)


def _cache() -> Path:
    """Where features of data are kept for all runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "scorelab" / "features"


def table(record: dict[str, Any]) -> str:
    """The record in lines."""
    of = record["data"]
    lines = [f"{record['of']}, beside {of['count']:,} of {of['source']} ({of['against']})"]
    lines.append(f"features: {record['features']}; rounding {record['rounding']}")
    for name, found in (record["distances"] | record["variety"]).items():
        if "left_out" in found:
            lines.append(f"{name:<20} left out: {found['left_out']}")
            continue
        low, high = found["interval_95"]
        more = f", plain {found['plain']:.4g}" if "plain" in found else ""
        if "of_data" in found:
            more = f", of the data {found['of_data']['value']:.4g} ± {found['of_data']['stderr']:.2g}"
        lines.append(f"{name:<20} {found['value']:.4g} ± {found['stderr']:.2g}, 95 %: {low:.4g} to {high:.4g}{more}")
    return "\n".join(lines)
