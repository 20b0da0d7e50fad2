"""The two-mode mixture by exact sampling, plain Langevin dynamics and annealed Langevin dynamics.

The modes weigh 4/5 and 1/5 and lie 14 standard deviations apart: plain Langevin keeps the weights of its start, which
is uniform; annealing carries mass between the modes while the noise still bridges them.
"""

from __future__ import annotations

import math
import time

import torch
from matplotlib.axes import Axes
from tqdm.auto import tqdm

from scorelab import ScoreFn, sample, sigmas
from scorelab.plotting import figure, points
from scorelab.samplers import AnnealedLangevin, Langevin, Sampler
from toy.common import Gallery, options, parse

CHAINS = 40_000
QUICK_CHAINS = {"exact score": 8000, "learnt score": 2000}
"""Chains in the quick gallery, where 40,000 would take minutes."""
CHUNK = 4000
EXTENT = (-10.0, 10.0, -10.0, 10.0)
SIGMA_MAX, SIGMA_MIN = 20.0, 0.1

SETTINGS: dict[str, tuple[torch.Tensor, Sampler]] = {
    "plain Langevin": (torch.tensor([SIGMA_MIN]), Langevin(300, 0.1)),
    "annealed, L = 10, T = 100": (
        sigmas.geometric(10, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX),
        AnnealedLangevin(100, 0.1 * SIGMA_MIN**2),
    ),
    "annealed, L = 100, T = 20": (
        sigmas.geometric(100, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX),
        AnnealedLangevin(20, 0.4 * SIGMA_MIN**2),
    ),
}


def chains(score: ScoreFn, setting: str, count: int = CHAINS) -> tuple[torch.Tensor, int, float]:
    """Samples (count, 2), NFE of a batch and seconds; every chain starts uniformly on [-8, 8]^2."""
    levels, sampler = SETTINGS[setting]
    generator = torch.Generator().manual_seed(0)
    began, kept = time.perf_counter(), []
    nfe = 0

    def counting(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        nonlocal nfe
        nfe += 1
        return score(x, sigma)

    # blocks that fit the processor's cache run faster than all chains at once
    for first in tqdm(range(0, count, CHUNK), desc=setting, unit="block"):
        start = 16 * torch.rand(min(CHUNK, count - first), 2, generator=generator) - 8
        kept.append(sample(counting, start, levels, sampler, generator=generator))
    x = torch.cat(kept)
    return x, nfe // len(kept), time.perf_counter() - began


def weight(x: torch.Tensor) -> tuple[float, float]:
    """Share of samples nearer to (5, 5) than to (-5, -5), and its standard error."""
    share = float((x.sum(1) > 0).float().mean())
    return share, math.sqrt(share * (1 - share) / len(x))


def _weights(ax: Axes, rows: list[tuple[str, str, float, float, int, float, int]]) -> None:
    """The weight of the mode with its standard error, for each way of sampling."""
    for k, (setting, kind, share, error, *_) in enumerate(rows):
        ax.errorbar(share, -k, xerr=2 * error, fmt="o", ms=4, color="#9c3848" if kind else "#274c77")
        ax.text(0.5, -k + 0.18, f"{setting}, {kind}" if kind else setting, fontsize=6)
    ax.axvline(0.8, color="k", ls=":", lw=0.8)
    ax.set(yticks=[], xlim=(0.48, 0.85), ylim=(0.7 - len(rows), 0.7), title="weight of the mode; 0.8 is true")
    ax.tick_params(labelsize=7)
    ax.title.set_fontsize(9)


def draw(gallery: Gallery) -> None:
    """langevin.png with the table of weights, which metrics.json repeats."""
    trained = gallery.trained("two_modes")
    exact = trained.distribution.sample(CHAINS, torch.Generator().manual_seed(0))
    rows = [("exact sampling", "", *weight(exact), 0, 0.0, CHAINS)]
    made, axes = figure(4, 2, size=3.0)
    points(axes[0, 0], exact, EXTENT, "exact samples")
    for line, (kind, score) in zip(
        axes, (("exact score", trained.distribution.score), ("learnt score", trained.model)), strict=True
    ):
        for panel, setting in zip(line[1:], SETTINGS, strict=True):
            count = QUICK_CHAINS[kind] if gallery.mode == "quick" else CHAINS
            x, nfe, seconds = chains(score, setting, count)
            rows.append((setting, kind, *weight(x), nfe, seconds, count))
            points(panel, x, EXTENT, f"{setting}\n{kind}, {rows[-1][2]:.3f} upper right", color="#9c3848")
    _weights(axes[1, 0], rows)
    lines = [f"{s:<26}{k:<13}{w:.4f} ± {e:.4f} {n:>5}" for s, k, w, e, n, *_ in rows]
    text = "\n".join([f"{'mode (5,5) should weigh 0.8':<39}{'weight':<16} NFE", *lines])
    made.supxlabel(text, family="monospace", fontsize=8)
    gallery.save(made, "langevin")
    names = ("setting", "score", "weight", "standard_error", "nfe", "seconds", "chains")
    table = [dict(zip(names, row, strict=True)) for row in rows]
    options = {
        name: {
            "levels": len(levels),
            "sigma_max": float(levels[0]),
            "sigma_min": float(levels[-1]),
            "sampler": repr(sampler),
        }
        for name, (levels, sampler) in SETTINGS.items()
    }
    gallery.record("langevin", {"start": "uniform on [-8, 8]^2", "settings": options, "table": table})


if __name__ == "__main__":
    draw(parse(options(__doc__), ())[0])
