"""``scorelab density``: what a run on 2-D data has learnt, as a picture."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm.auto import tqdm

from scorelab.cli.runs import load_run
from scorelab.likelihood import log_likelihood
from scorelab.noise import PerSampleNoise
from scorelab.plotting import density, figure, grid_points, points
from scorelab.plotting.figures import around
from scorelab.training import load_data, sample_model
from scorelab.writing import check_writable, whole

__all__ = ["density_run"]

TOLERANCE = 3e-4
"""Of the adaptive solver: a picture shows no more."""


def density_run(workdir: Path, out: Path, *, n: int = 200, step: int = 0, seed: int = 0) -> str:
    """Draw the data, the learnt density at n x n points (in the data's own units, at sigma_min) and as many samples.

    Raises ValueError for a run of other than 2-D data, or whose codec has no density.
    """
    config, model, found = load_run(workdir, step=step)
    if model.data_shape != (2,):
        raise ValueError(f"{workdir} was trained on data of shape {model.data_shape}; expected points, of shape (2,)")
    if n < 2:
        raise ValueError(f"--n is {n}; expected 2 or more points in each direction")
    codec, scale = model.codec, 0.0 if model.codec is None else model.codec.log_scale
    if scale is None:
        raise ValueError(f"{workdir} has a {type(codec).__name__}, by which codes have no density in the data's units")
    check_writable(out)
    data = load_data(config).first(4000).x0
    extent, (low, high) = around(data), model.sigma_range
    grid = grid_points(extent, n)
    codes, inner = (grid, data) if codec is None else (codec.encode(grid), codec.encode(data))
    logs, options = [], {"data_std": float(inner.square().mean().sqrt()), "rtol": TOLERANCE, "atol": TOLERANCE}
    for part in tqdm(torch.split(codes, 4000), desc=f"density at {n * n:,} points", unit="part"):
        score = model if not model.conditional else model.conditioned(None)
        logs.append(log_likelihood(score, part, low, high, **options).log_prob - scale)  # type: ignore[arg-type]
    log_prob = torch.cat(logs)
    x = sample_model(model, config, len(data), PerSampleNoise(seed))
    drawn, axes = figure(3, size=4.4)
    points(axes[0, 0], data, extent, f"{len(data):,} points of the data")
    inside = float((log_prob.double().exp().sum()) * (extent[1] - extent[0]) * (extent[3] - extent[2]) / n**2)
    # the geometric mean of both dimensions' units
    title = f"learnt density at sigma {low * float(torch.tensor(scale / 2).exp()):.3g}, step {found:,}"
    density(axes[0, 1], log_prob, extent, title, colorbar=True)
    points(axes[0, 2], x, extent, f"{len(x):,} samples")
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole(out) as aside:
        drawn.savefig(aside, format="png")
    return f"{out}: {n}x{n} densities of step {found}, which integrate to {inside:.3f} over the picture"
