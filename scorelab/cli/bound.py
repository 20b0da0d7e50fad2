"""``scorelab likelihood --method bound``: the variational bound of a run's data, term by term."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from tqdm.auto import tqdm

from scorelab.checks import nearest_name
from scorelab.cli.analysis import data_for, held_data, spacing_of, with_data
from scorelab.cli.runs import load_run
from scorelab.likelihood import VariationalBound, variational_bound
from scorelab.models import ScoreModel
from scorelab.noise import PerSampleNoise
from scorelab.plotting import figure
from scorelab.processes import DiscreteVP
from scorelab.samplers import Ancestral, Sampler
from scorelab.sigmas import from_betas
from scorelab.training import own_score, resolve, with_statistics
from scorelab.typing import Tensor
from scorelab.writing import check_writable, whole

__all__ = ["bound_run", "with_error"]

_AT_ONCE = 64
_VARIANCES = ("posterior", "forward", "learned", "analytic")


def bound_run(
    workdir: Path,
    out: Path,
    *,
    n: int,
    levels: int,
    seed: int,
    step: int,
    steps: int,
    variance: str = "",
    data: ConfigDict | None = None,
) -> str:
    """The bound of ``n`` data of a run, held-out ones if it has any, on what ancestral sampling generates over
    ``steps`` noise levels, 0: all of a process of steps, 1,000 of another; in nats, or with ``levels`` in bits per
    dimension (see ``likelihood_run``). Its terms over the levels are drawn into ``out``, a .png.

    Where the run samples with denoised samples clamped to the data's range (``sampling.clip``), the chain's are: data
    lies there, so no term grows, and from sigma = 2e4 a small error of eps is a large one of x0_hat.

    variance: of the chain's steps, "posterior", "forward", "learned" or "analytic", from training data; by default the
    learned one, or that which the run samples with. data: see ``likelihood_run``. Raises ValueError for a model of
    codes.
    """
    if out.suffix != ".png":
        raise ValueError(f"--out is {out}; expected a name that ends in .png")
    if variance not in ("", *_VARIANCES):
        raise ValueError(f"--variance is {variance!r}; {nearest_name(variance, _VARIANCES)}")
    config, model, found = load_run(workdir, step=step)
    check_writable(out)
    config = with_data(config, data)
    if model.codec is not None:
        raise ValueError("the bound of a model of codes is not that of its data; expected --method=ode")
    source = data_for(model, config)
    batch = held_data(source, config, n).mapped(lambda t: t.to(model.device))
    own = "learned" if model.variance else resolve(config).sampling.sampler.get("variance", "posterior")
    variance = variance or own
    if variance == "learned" and not model.variance:
        raise ValueError("--variance=learned, but the network learned none; expected posterior, forward or analytic")
    sampler: Sampler = Ancestral(variance, model.process)
    options: dict[str, Any] = {"data_std": _prior_std(model, batch.x0)}
    if levels:
        options["spacing"] = spacing_of(source.values, levels)
        assert source.values is not None
        # the first and the last value, whose bins are open
        options["data_range"] = source.values.bounds
    grid = _grid(model, steps)
    sampler = with_statistics(sampler, model, config, grid)
    assert isinstance(sampler, Ancestral)
    score: Any = own_score(model, config, batch.condition if model.conditional else None, guided=False)
    terms = []
    for rows in tqdm(torch.split(torch.arange(len(batch.x0)), _AT_ONCE), desc=f"bound of {len(batch.x0)}", unit="part"):
        noise = PerSampleNoise(seed, int(rows[0]))
        mine = rows.to(model.device)
        terms.append(variational_bound(score.rows(mine), batch.x0[mine], grid, sampler, generator=noise, **options))
    told = {
        "step": found,
        "samples": len(batch.x0),
        "of": "held-out data" if config.data.validation else "training data",
        "method": f"variational bound over {len(grid)} levels, variance {variance}",
        **({"given": "its class"} if model.conditional else {}),
    }
    return json.dumps(told | _summed(terms, batch.x0[0].numel(), grid, bool(levels), out), indent=1)


def _grid(model: ScoreModel, steps: int) -> Tensor:
    """The levels, descending, without 0."""
    process = model.process
    if isinstance(process, DiscreteVP):
        return from_betas(process.betas, steps or None)[:-1]
    return process.sigmas(steps or 1000, process.t_min)


def _prior_std(model: ScoreModel, x0: Tensor) -> float:
    """By how much the start is wider than the noise, in unscaled coordinates: scaled x begins at N(0, I), and that of
    VE as wide as noised data."""
    scale = float(model.process.alpha(torch.tensor(model.process.t_max)).detach())
    return float(x0.square().mean().sqrt()) if scale == 1 else 1.0


def _summed(terms: list[VariationalBound], dims: int, grid: Tensor, bits: bool, out: Path) -> dict[str, Any]:
    """The means of the bound and its parts with standard errors, and the picture of its terms."""
    unit = dims * math.log(2) if bits else 1.0
    parts: dict[str, list[Tensor | None]] = {
        "prior": [t.prior for t in terms],
        "steps": [t.steps.sum(0) for t in terms if t.steps is not None],
        "decoder": [t.decoder for t in terms],
    }
    every = {}
    for name, found in parts.items():
        every[name] = torch.cat([p for p in found if p is not None]).double().cpu() / unit
    total = every["prior"] + every["steps"] + every["decoder"]
    step = torch.cat([t.steps for t in terms if t.steps is not None], 1).double().cpu() / unit
    drawn, axes = figure(1, size=4.4)
    axes[0, 0].loglog(grid[1:].tolist(), step.mean(1).tolist(), color="#274c77")
    called = "bits per dimension" if bits else "nats"
    axes[0, 0].set(xlabel="noise level after the step, sigma", ylabel=f"term of the bound, {called}")
    axes[0, 0].set_title(f"the bound: {float(total.mean()):.4g} {called}, of {len(total)} samples", fontsize=9)
    with whole(out) as aside:
        drawn.savefig(aside, format="png")
    said = {name: with_error(value) for name, value in {"bound": total, **every}.items()}
    return {**said, "unit": f"{called}, of minus log p", "terms": str(out)}


def with_error(x: Tensor) -> dict[str, float | None]:
    """The mean of x (N,) and its standard error, as records have them; no error of one number."""
    return {"mean": float(x.mean()), "standard_error": float(x.std() / len(x) ** 0.5) if len(x) > 1 else None}
