"""Calibrating a sampler to a run's model, and the likelihood of its data."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from ml_collections import ConfigDict
from tqdm.auto import tqdm

from scorelab.cli.dry_run import in_words
from scorelab.cli.runs import load_run
from scorelab.cli.steering import Steering
from scorelab.data import Coded, Source, Values
from scorelab.likelihood import bits_per_dim, log_likelihood
from scorelab.models import ScoreModel
from scorelab.noise import PerSampleNoise, randn
from scorelab.samplers import calibrate
from scorelab.samplers.calibrated import evaluations_taken
from scorelab.saved import Model
from scorelab.scores import data_mean
from scorelab.training import load_data, own_score, resolve
from scorelab.typing import Batch, ScoreFn, Tensor
from scorelab.writing import check_writable

__all__ = ["calibrate_run", "calibrated_file", "held_data", "likelihood_run", "spacing_of"]


def spacing_of(values: Values | None, levels: int) -> float:
    """The distance, in the model's units, of neighbouring values of data that takes ``levels`` of them, -1: its own."""
    if values is None or not values.step:
        raise ValueError("--bits or --levels, but the data is continuous; expected neither, for its log-density")
    count = round((values.most - values.least) / values.step) + 1
    if levels not in (count, -1):
        raise ValueError(
            f"--levels={levels}, but the data goes from {values.least:g} to {values.most:g} by {values.step:g}; "
            f"expected --levels={count}"
        )
    return values.spacing


def _seconds(score: ScoreFn, x: Tensor, sigma: float) -> float:
    """How long an evaluation takes, the second time."""
    with torch.no_grad():
        for _ in range(2):
            began = time.perf_counter()
            # to look at it is to wait for it
            float(score(x, torch.tensor(sigma)).sum())
    return time.perf_counter() - began


def calibrated_file(workdir: Path, nfe: int, names: list[str]) -> Path:
    """Where a run's calibrated sampler of ``nfe`` evaluations is; names: of what it was guided by."""
    return workdir / f"{'_'.join(filter(None, [f'sampler_{nfe}', *names]))}.json"


def calibrate_run(
    workdir: Path,
    out: Path,
    *,
    nfe: int,
    method: str,
    starts: int,
    seed: int,
    step: int,
    steering: Steering,
) -> str:
    """Fit a sampler of ``nfe`` evaluations to a run's averaged weights, write it to ``out`` and say how good it is.

    steering: what it will be used for, as for sampling.
    """
    config, model, found = load_run(workdir, step=step)
    check_writable(out)
    labels, by = steering.applied(workdir, config, model, starts, found=found)
    score = own_score(model, config, labels, by)
    low, high = model.sigma_range
    grid = resolve(config).sampling.grid
    low, high = grid.get("sigma_min") or low, grid.get("sigma_max") or high
    x = high * PerSampleNoise(seed)(torch.empty(starts, *model.data_shape)).to(model.device)
    x = x + data_mean(model, x)
    seconds = evaluations_taken(nfe, method) * _seconds(score, x, high)
    print(f"calibrating on {len(x)} starts: about {in_words(seconds)}", file=sys.stderr)
    sampler = calibrate(score, x, nfe=nfe, sigma_min=low, sigma_max=high, method=method, progress=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    sampler.save(out)
    r = sampler.report
    return (
        f"{out}: {nfe} evaluations on step {found}, held-out error {r['held_out_error']:.3g} against "
        f"{r['uncalibrated_held_out_error']:.3g} of Adams-Bashforth, fitted in {r['seconds']:.0f} s; "
        f"use it with: scorelab sample --workdir {quote(str(workdir))} --sampler {quote(str(out))}{steering.options()}"
    )


def likelihood_run(
    workdir: Path,
    *,
    n: int,
    divergence: str,
    probes: int,
    levels: int,
    seed: int,
    step: int,
    tolerance: float,
    data: ConfigDict | None = None,
) -> str:
    """Mean log-likelihood of ``n`` data of a run in nats, held-out ones if it has any, or bits per dimension; of a
    conditional model given their classes.

    data: a config of other data than the run's own, which a saved model needs. levels: for bits, how many values a
    number of the data may take, -1 for as many as it does; another count than its own is a ValueError.
    """
    config, model, found = load_run(workdir, step=step)
    config = with_data(config, data)
    source, held, codec = data_for(model, config), config.data.validation, model.codec
    spacing = spacing_of(source.values, levels) if levels else 0.0
    if codec is not None:
        if levels:
            raise ValueError(f"--levels={levels}, but this model's density is that of codes; expected no --levels")
        source = Coded(source, codec)
    batch = held_data(source, config, n).mapped(lambda t: t.to(model.device))
    options = {"divergence": divergence, "probes": probes, "rtol": tolerance, "atol": tolerance}
    measures, statement = _likelihoods(model, batch, spacing, options, torch.Generator().manual_seed(seed))
    # of a codec that only scales, the density of the data itself
    scale = 0.0 if codec is None else codec.log_scale
    numbers: dict[str, Any] = {
        "step": found,
        "samples": len(measures),
        "of": "held-out data" if held else "training data",
        "divergence": divergence,
        "sigma_min": model.sigma_range[0],
        **({"given": "its class"} if model.conditional else {}),
        **({"in": "codes"} if scale is None else {}),
    }
    measures = measures if levels else measures - (scale or 0.0)
    error = float(measures.std() / len(measures) ** 0.5) if len(measures) > 1 else None
    unit = "bits per dimension" if levels else "nats"
    name = "bits_per_dim" if levels else "log_prob"
    numbers |= {name: {"mean": float(measures.mean()), "standard_error": error, "unit": unit}}
    numbers |= {"spacing": spacing} if levels else {}
    return json.dumps({**numbers, "statement": statement}, indent=1)


def with_data(config: ConfigDict, data: ConfigDict | None) -> ConfigDict:
    """The config with the data of another."""
    if data is not None:
        config.data = data.data
    return config


def data_for(model: Model, config: ConfigDict) -> Source:
    """The data of a config; ValueError if it is not of the model's shape, or is scaled otherwise."""
    source, shape = load_data(config), model.outside_shape
    ends = None if source.values is None else source.values.ends
    if source.data_shape != shape or (model.codec is None and ends != model.data_range):
        raise ValueError(
            f"the data is {source.data_shape}, with {ends} scaled to [-1, 1], and the model's is {shape}, "
            f"with {model.data_range}; expected the same: --config names a config with data of the model"
        )
    return source


def held_data(source: Source, config: ConfigDict, n: int) -> Batch:
    """``n`` samples that a run did not train on, or if it held none out, of those that it did."""
    held = config.data.validation
    return (source.hold_out(held) if held else source.first(n)).part(slice(n))


def _likelihoods(
    model: ScoreModel, batch: Batch, spacing: float, options: dict[str, Any], generator: torch.Generator
) -> tuple[Tensor, str]:
    """Log-densities (N,) of data noised by sigma_min, or with a ``spacing`` bits per dimension, and what they are."""
    data, score = batch.x0, model.conditioned(batch.condition) if model.conditional else model
    low, high = model.sigma_range
    known = {"data_std": float(data.square().mean().sqrt()), **options}
    statement = (
        f"log-density of {'the data' if model.codec is None else 'codes of the data'} with noise of sigma_min added"
    )

    def measured(rows: range, generator: torch.Generator = generator) -> Tensor:
        nonlocal statement
        index = torch.arange(rows.start, rows.stop, device=data.device)
        some = data[index]
        if spacing:
            bits = bits_per_dim(score.rows(index), some, low, high, spacing=spacing, generator=generator, **known)
            statement = bits.statement
            return bits.bits
        x = some + low * randn(tuple(some.shape), some, generator)
        return log_likelihood(score.rows(index), x, low, high, generator=generator, **known).log_prob

    size = min(max(4, -(-len(data) // 20)), len(data))
    parts = [range(k, min(k + size, len(data))) for k in range(0, len(data), size)]
    began = time.perf_counter()
    measured(range(1), torch.Generator().manual_seed(0))
    seconds = time.perf_counter() - began
    # a part takes as much longer than one sample as its evaluations do
    whole, one = (torch.arange(count, device=data.device) for count in (size, 1))
    seconds *= _seconds(score.rows(whole), data[whole], high) / _seconds(score.rows(one), data[one], high)
    print(f"likelihood: about {in_words(len(parts) * seconds)}", file=sys.stderr)
    found = [measured(rows) for rows in tqdm(parts, desc=f"likelihood of {len(data)}", unit="part")]
    return torch.cat(found), statement
