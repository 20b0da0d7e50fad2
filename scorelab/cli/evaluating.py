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
from torch import nn
from tqdm.auto import tqdm

import scorelab
from scorelab import parallel
from scorelab.checks import checked_device, nearest_name
from scorelab.classifiers import ClassifierModel
from scorelab.cli.analysis import data_for, with_data
from scorelab.cli.runs import load_run
from scorelab.cli.steering import Steering
from scorelab.data.sources import Stored
from scorelab.evaluation import Features, FromClassifier, FromModule, Inception, Pixels, collected, compared
from scorelab.evaluation.comparison import check_counts
from scorelab.noise import PerSampleNoise
from scorelab.parts import Kind
from scorelab.precision import prepare
from scorelab.training import sample_model, with_nfe
from scorelab.typing import Tensor

__all__ = ["evaluate_run", "features_of"]

_AT_ONCE = 1000
_AGAINST = ("train", "held_out")


def features_of(text: str) -> Features:
    """pixels; classifier:DIR, of a run or a saved one; inception:FILE; or package.module:Class, a module of one's own
    made without arguments. Raises ValueError for others."""
    kind, _, rest = text.partition(":")
    if text == "pixels":
        return Pixels()
    if kind == "inception":
        return Inception(rest)
    if kind == "classifier":
        return FromClassifier(ClassifierModel.load(rest), Path(rest).name)
    if not rest:
        raise ValueError(
            f"--features is {text!r}; {nearest_name(text, ('pixels', 'classifier', 'inception'))} (pixels, "
            "classifier:DIR, inception:FILE or package.module:Class)"
        )
    made = Kind("features", {}).maker(text, "--features")()
    if not isinstance(made, (Features, nn.Module)):
        raise ValueError(f"--features={text} makes a {type(made).__name__}; expected a torch.nn.Module or Features")
    return made if isinstance(made, Features) else FromModule(made, text)


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
    begun = time.perf_counter()
    config, model, found = load_run(workdir, step=step, weights=weights)
    config = changes(with_data(config, data))
    config = with_nfe(config, model, nfe) if nfe else config
    source = data_for(model, config)
    if not isinstance(source, Stored):
        raise ValueError(f"data.source={config.data.source!r} has fresh samples at every step; expected stored data")
    held = config.data.validation
    against = against or ("held_out" if held else "train")
    images, count = _images(source, held, against)
    check_counts(n, count, few)
    place = parallel.join()
    prepare(model.to(checked_device(device) if device else place), "fp32", compile=False)
    labels, by = steering.applied(workdir, config, model, n, found=found, weights=weights)
    seen = features_of(features)
    known = {"data": source.fingerprint(), "held_out": held, "against": against}
    bar = tqdm(total=len(parallel.shard(n)), desc=f"samples of {workdir.name}", unit="sample")

    def drawn(rows: range) -> Tensor:
        some = labels if labels is None or len(labels) == 1 else labels[rows.start : rows.stop]
        options: dict[str, Any] = {"condition": some, "by": by, "sampler": sampler, "progress": False, "sharded": False}
        x = sample_model(model, config, len(rows), PerSampleNoise(seed, rows.start), **options)
        bar.update(len(rows))
        return x if source.values is None else source.values.rounded(x)

    # one for all processes of torchrun
    aside = _cache() / f".{os.environ.get('TORCHELASTIC_RUN_ID', os.getpid())}"
    try:
        real = collected(seen, lambda rows: images(rows).to(model.device), count, place=_cache(), known=known)
        with bar:
            x = collected(seen, drawn, n, place=aside, size=_AT_ONCE)
        distances = compared(x, real, few=few)
        parallel.wait()
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return {
        "of": f"{n:,} samples of {workdir}" + (f", step {found}" if found else ""),
        "weights": weights,
        "seed": seed,
        "sampler": str(sampler) if sampler else json.loads(config.sampling.to_json_best_effort()),
        "steering": {k: v for k, v in asdict(steering).items() if v},
        "data": {"source": config.data.source, "against": against, "count": count},
        **seen.about(),
        "rounding": "to the data's values" if source.values is not None and source.values.step else "none",
        "samples": n,
        "distances": distances,
        "software": f"scorelab {scorelab.__version__}, torch {torch.__version__}",
        "seconds": round(time.perf_counter() - begun, 1),
    }


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
