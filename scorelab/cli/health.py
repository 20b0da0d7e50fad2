"""``scorelab health``: what is right and wrong with a run's score and samples, and what is normal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from tqdm.auto import tqdm

import scorelab
from scorelab import parallel
from scorelab.checks import checked_device
from scorelab.cli.analysis import data_for, with_data
from scorelab.cli.runs import load_run
from scorelab.data.sources import Drawn, Source, Stored
from scorelab.evaluation import Estimate
from scorelab.health import Health, SampleHealth, judged, lag, level_health, sample_health
from scorelab.health.verdict import NORMAL
from scorelab.models import ScoreModel
from scorelab.noise import PerSampleNoise, counted
from scorelab.precision import prepare
from scorelab.training import sample_model, with_nfe
from scorelab.typing import Batch

__all__ = ["health_run", "health_table"]

_MOST = 60_000
"""Training data that is looked at."""


def health_run(
    workdir: Path,
    *,
    n: int,
    count: int = 8,
    points: int = 512,
    seed: int = 0,
    step: int = 0,
    weights: str = "ema",
    nfe: int = 0,
    device: str = "",
    data: ConfigDict | None = None,
    changes: Callable[[ConfigDict], ConfigDict] = lambda config: config,
) -> tuple[Health, dict[str, Any]]:
    """What was found of a run's checkpoint, and the record: at ``count`` noise levels with ``points`` data each, and of
    n samples (0: none).

    The averaged weights are compared with the raw ones where both are there. Other arguments are ``JudgedRun``'s.
    """
    begun = time.perf_counter()
    config, model, found = load_run(workdir, step=step, weights=weights)
    config = changes(with_data(config, data))
    config = with_nfe(config, model, nfe) if nfe else config
    source, place = data_for(model, config), parallel.join()
    prepare(model.to(checked_device(device) if device else place), "fp32", compile=False)
    train, held = (b and b.mapped(lambda t: t.to(model.device)) for b in _data(source, config))
    inside_held, inside_train = (b and _coded(model, b) for b in (held, train))
    fresh = inside_held or inside_train
    assert fresh is not None
    truth = source.distribution if isinstance(source, Drawn) and model.codec is None else None
    levels = []
    options: dict[str, Any] = {"truth": truth, "count": count, "points": points}
    options["generator"] = torch.Generator().manual_seed(seed)
    for level in tqdm(level_health(model, fresh, inside_train, **options), total=count, desc="levels", unit="level"):
        levels.append(level)
    lags = {}
    if weights == "ema" and found and (raw := _raw(workdir, step, model)) is not None:
        lags["the raw weights"] = lag(model, raw, fresh, count=count, points=points)
    samples: SampleHealth | None = None
    if n:
        labels = None if model.num_classes is None else source.drawn_classes(n, seed)
        x = sample_model(model, config, n, PerSampleNoise(seed), condition=labels)
        x = x if source.values is None else source.values.rounded(x)
        seen, unseen = (held, None) if train is None else (train, held)
        assert seen is not None
        samples = sample_health(x, seen, unseen, asked=labels)
    health = judged(levels, samples, lags)
    return health, {
        "of": f"{workdir}" + (f", step {found}" if found else ""),
        "weights": weights,
        "seed": seed,
        "samples_drawn": n,
        "data": {
            "source": config.data.source,
            "training": 0 if train is None else len(train.x0),
            "held_out": 0 if held is None else len(held.x0),
        },
        **health.record(),
        "software": f"scorelab {scorelab.__version__}, torch {torch.__version__}",
        "seconds": round(time.perf_counter() - begun, 1),
    }


def _data(source: Source, config: ConfigDict) -> tuple[Batch | None, Batch | None]:
    """Training data, at most ``_MOST``, and what was held out, or fresh data of an exact law."""
    if not isinstance(source, Stored):
        return None, source.batch(config.seed, 2**30, 4096)
    count = config.data.validation
    held = source.hold_out(count) if count else None
    if held is None:
        print(
            "no data was held out (data.validation is 0): what was learnt by heart, and copies, can't be told",
            file=sys.stderr,
        )
    index = source.trained
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))[:_MOST].sort().values]
    return source.labelled(source.take(index), index), held


def _coded(model: ScoreModel, batch: Batch) -> Batch:
    """The batch as training sees it: codes are drawn. Of a network that is told what a sample shows that is it."""
    x0 = batch.x0
    if model.codec is not None:
        with torch.no_grad():
            mean, std = model.codec.moments(x0)
        x0 = mean
        if std is not None:
            x0 = mean + std * counted("normal", tuple(mean.shape[1:]), range(len(mean)), 0, 0, 13).to(mean)
    return Batch(x0, x0 if model.semantic else batch.condition)


def _raw(workdir: Path, step: int, model: ScoreModel) -> ScoreModel | None:
    """The weights that are not averaged, where there are other ones."""
    _, raw, _ = load_run(workdir, step=step, weights="model")
    own = model.weights()
    same = all(torch.equal(value.cpu(), own[name].cpu()) for name, value in raw.weights().items())
    return None if same else raw.to(model.device)


def health_table(record: dict[str, Any]) -> str:
    """The record in lines: the verdict, each level, the samples, and what is normal."""
    of = record["data"]
    lines = [
        f"{record['of']}, {record['weights']}: {record['verdict']}",
        *(f"  also {f['fault']}: {f['seen']}; {f['remedy']}" for f in record["findings"][1:]),
        f"levels, beside {of['held_out']:,} held-out or fresh and {of['training']:,} training data of {of['source']}:",
    ]
    names = [k for k in NORMAL if any(level.get(k) is not None for level in record["levels"])]
    width = {k: max(len(k), 6) for k in names}
    lines.append("  sigma     " + "  ".join(k.rjust(width[k]) for k in names))
    for level in record["levels"]:
        cells = [_cell(level.get(k)).rjust(width[k]) for k in names]
        lines.append(f"  {level['sigma']:<9.4g} " + "  ".join(cells))
    lines += [f"  {k}: normal is {NORMAL[k]}" for k in names]
    if record["told"] is not None:
        unit = "of its levels" if any(isinstance(k, int) for k, _ in record["levels"][0]["profile"]) else "in log sigma"
        lines.append(f"told: best {_cell(record['told'], True)} {unit} from the noise that there is; normal is 0")
    for name, found in record["loss_beside"].items():
        lines.append(f"{name}: log loss lower by {_cell(found, True)}; normal is below 0, an average being better")
    return "\n".join(lines + _of_samples(record["samples"]))


def _of_samples(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    lines = []
    for k, c in enumerate(found["channels"]):
        mean, contrast = (_cell(c[name], True) for name in ("mean", "contrast"))
        lines.append(
            f"samples, channel {k}: mean {mean} deviations off, contrast {contrast}, {c['below']:.1%} of the data "
            f"below and {c['above']:.1%} above all of them; normal is 0 within .25, 1 within a quarter, and none"
        )
    if found["classes"]:
        shares = ", ".join(f"{_cell(c['share'])} ({_cell(c['of_data'])})" for c in found["classes"])
        p = found["p_classes"]
        said = f"classes of {found['classes_of']} (of data), by their nearest training data: {shares}"
        said += "" if p is None else f"; p of equal shares {p:.2g}"
        lines.append(f"{said}; normal is about the data's")
    if (copied := found["copies"]) is not None:
        lines.append(
            f"copies: {_cell(copied['share'], True)} more samples than chance nearest to training data, "
            f"p = {copied['p']:.2g}; authentic {_cell(copied['authentic'], True)} (held-out data "
            f"{_cell(copied['authentic_held'], True)}), C_T {copied['c_t']:.2f}; normal is 0, p above .001, as "
            "authentic as held-out data, C_T above -3"
        )
    return lines


def _cell(found: Any, error: bool = False) -> str:
    """A number in few digits, with its error where that is asked for."""
    if found is None:
        return "-"
    if not isinstance(found, dict):
        return f"{found:.3g}"
    if found["value"] is None:
        return "-"
    return str(Estimate(found["value"], found["stderr"] or 0.0)) if error else f"{found['value']:.3g}"
