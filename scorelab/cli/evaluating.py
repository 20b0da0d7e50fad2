"""``scorelab evaluate``: how far a run's samples are from data, how sure that is, and all that it depends on."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from tqdm.auto import tqdm

import scorelab
from scorelab import parallel
from scorelab.checks import checked_device, nearest_name
from scorelab.cli.analysis import data_for, with_data
from scorelab.cli.runs import load_run
from scorelab.cli.steering import Steering
from scorelab.data import Source, read_samples
from scorelab.data.sources import Stored
from scorelab.evaluation import collected, compared, features_of
from scorelab.evaluation.comparison import check_counts
from scorelab.noise import PerSampleNoise
from scorelab.precision import prepare
from scorelab.training import load_data, sample_model, with_nfe
from scorelab.typing import Tensor

__all__ = ["evaluate_run", "evaluate_samples", "table"]

_AT_ONCE = 1000
_AGAINST = ("train", "held_out")


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
        self.about = {"source": config.data.source, "against": self.against, "count": count}
        self._known = {"data": source.fingerprint(), "held_out": self.held}

    def features(self, against: str, device: torch.device) -> Tensor:
        """Of the data, (count, D), computed once and kept for all runs."""
        images, count = _images(self.source, self.held, against)
        known = {**self._known, "against": against}
        return collected(self.seen, lambda rows: images(rows).to(device), count, place=_cache(), known=known)

    def record(self, images: Callable[[range], Tensor], n: int, device: torch.device, of: str) -> dict[str, Any]:
        """What n samples are of, ``images(rows)`` inside, and their distances, once rounded to the data's values."""
        check_counts(n, self.about["count"], self.few)
        begun, values = time.perf_counter(), self.source.values

        def rounded(rows: range) -> Tensor:
            return values.rounded(images(rows)).to(device)

        real = self.features(self.against, device)
        # one for all processes of torchrun
        aside = _cache() / f".{os.environ.get('TORCHELASTIC_RUN_ID', os.getpid())}"
        try:
            x = collected(self.seen, rounded, n, place=aside, size=_AT_ONCE)
            distances = compared(x, real, few=self.few)
            parallel.wait()
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return {
            "of": f"{n:,} samples of {of}",
            "data": self.about,
            **self.seen.about(),
            "rounding": "to the data's values" if values.step else "none",
            "samples": n,
            "distances": distances,
            "software": f"scorelab {scorelab.__version__}, torch {torch.__version__}",
            "seconds": round(time.perf_counter() - begun, 1),
        }


def evaluate_run(
    workdir: Path,
    *,
    n: int,
    features: str = "pixels",
    against: str = "",
    few: bool = False,
    seed: int = 0,
    step: int = 0,
    weights: str = "ema",
    sampler: Path | None = None,
    steering: Steering = Steering(),  # noqa: B008
    nfe: int = 0,
    device: str = "",
    data: ConfigDict | None = None,
    changes: Callable[[ConfigDict], ConfigDict] = lambda config: config,
) -> dict[str, Any]:
    """The record of n samples beside data; under torchrun every process draws its share.

    against: "train", the data that the run learnt from, or "held_out", what it held out (by default, if there is any).
    features: see ``features_of``. Samples are rounded to the values that the data takes, as images in files are. The
    other arguments are ``sample_run``'s and ``likelihood_run``'s. Features of the data are kept in ~/.cache/scorelab,
    or under XDG_CACHE_HOME. Raises ValueError for data that is drawn afresh, and for fewer than 2,048 samples or data
    unless ``few``.
    """
    config, model, found = load_run(workdir, step=step, weights=weights)
    config = changes(with_data(config, data))
    config = with_nfe(config, model, nfe) if nfe else config
    beside = _Beside(data_for(model, config), config, against=against, features=features, few=few)
    place = parallel.join()
    prepare(model.to(checked_device(device) if device else place), "fp32", compile=False)
    labels, by = steering.applied(workdir, config, model, n, found=found, weights=weights)
    bar = tqdm(total=len(parallel.shard(n)), desc=f"samples of {workdir.name}", unit="sample")

    def drawn(rows: range) -> Tensor:
        some = labels if labels is None or len(labels) == 1 else labels[rows.start : rows.stop]
        options: dict[str, Any] = {"condition": some, "by": by, "sampler": sampler, "progress": False, "sharded": False}
        x = sample_model(model, config, len(rows), PerSampleNoise(seed, rows.start), **options)
        bar.update(len(rows))
        return x

    with bar:
        record = beside.record(drawn, n, model.device, f"{workdir}{f', step {found}' if found else ''}")
    return {
        **record,
        "weights": weights,
        "seed": seed,
        "sampler": str(sampler) if sampler else json.loads(config.sampling.to_json_best_effort()),
        "steering": {k: v for k, v in asdict(steering).items() if v},
    }


def evaluate_samples(
    place: Path,
    config: ConfigDict,
    *,
    features: str = "pixels",
    against: str = "",
    few: bool = False,
    device: str = "",
) -> dict[str, Any]:
    """The record of samples in a file or folder (see ``read_samples``) beside ``config.data``, as ``evaluate_run``'s:
    equal to it for samples that ``scorelab sample`` wrote to a ``.npz``."""
    beside = _Beside(load_data(config), config, against=against, features=features, few=few)
    samples = read_samples(place, beside.source.data_shape, beside.source.values)
    joined = parallel.join()
    on = checked_device(device) if device else joined
    record = beside.record(samples.take, len(samples), on, str(place))
    return {**record, "file": {"path": str(place), "sha256": samples.checksum}}


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
    for name, found in record["distances"].items():
        if "left_out" in found:
            lines.append(f"{name:<20} left out: {found['left_out']}")
            continue
        low, high = found["interval_95"]
        plain = f", plain {found['plain']:.4g}" if "plain" in found else ""
        lines.append(f"{name:<20} {found['value']:.4g} ± {found['stderr']:.2g}, 95 %: {low:.4g} to {high:.4g}{plain}")
    return "\n".join(lines)
