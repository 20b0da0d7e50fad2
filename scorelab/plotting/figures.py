"""Pictures of densities, score fields and images, drawn on matplotlib axes that the caller owns.

One colour map stands for densities everywhere; points keep equal aspect.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from scorelab.distributions import Distribution
from scorelab.typing import ScoreFn, Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DENSITY",
    "around",
    "density",
    "extent_of",
    "field",
    "figure",
    "grid_points",
    "image_grid",
    "points",
    "scaled_for",
]

DENSITY = "magma"
"""The colour map of densities."""

Extent = tuple[float, float, float, float]


def figure(columns: int, lines: int = 1, size: float = 3.2) -> tuple[Figure, np.ndarray]:
    """A figure that needs no display, and its axes as an array (lines, columns); size is a panel's, in inches."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(size * columns, size * lines), dpi=110, layout="constrained")
    return made, made.subplots(lines, columns, squeeze=False)


def scaled_for(axes: Axes, intervals: Sequence[tuple[float, float]]) -> None:
    """A logarithmic vertical axis for estimates with these intervals; linear about 0, by their median width, where some
    reach below: what is unbiased may be negative."""
    if min(low for low, _ in intervals) > 0:
        axes.set_yscale("log")
        return
    width = float(np.median([high - low for low, high in intervals]))
    axes.set_yscale("symlog", linthresh=max(width, 1e-12))
    axes.axhline(0, color="k", ls=":", lw=0.8)


def extent_of(distribution: Distribution, margin: float = 0.25) -> Extent:
    """A square (left, right, bottom, top) that holds a 2-D distribution, ``margin`` of its size free around it."""
    return around(distribution.sample(20_000, torch.Generator(distribution.device).manual_seed(0)), margin)


def around(x: Tensor, margin: float = 0.25) -> Extent:
    """A square that holds points (N, 2), likewise."""
    x = x.detach().cpu()
    low, high = x.min(0).values, x.max(0).values
    centre, half = (low + high) / 2, float((high - low).max()) / 2 * (1 + margin)
    return (
        float(centre[0]) - half,
        float(centre[0]) + half,
        float(centre[1]) - half,
        float(centre[1]) + half,
    )


def grid_points(extent: Extent, n: int) -> Tensor:
    """The n * n cell centres of a grid over the extent, line by line from the bottom, (n * n, 2)."""
    half_x, half_y = (extent[1] - extent[0]) / n / 2, (extent[3] - extent[2]) / n / 2
    xs = torch.linspace(extent[0] + half_x, extent[1] - half_x, n)
    ys = torch.linspace(extent[2] + half_y, extent[3] - half_y, n)
    y, x = torch.meshgrid(ys, xs, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def _square(axes: Axes, extent: Extent, title: str) -> None:
    axes.set(xlim=extent[:2], ylim=extent[2:], aspect="equal", title=title)
    axes.tick_params(labelsize=7)
    axes.title.set_fontsize(9)


def density(
    axes: Axes, log_prob: Tensor, extent: Extent, title: str, *, most: float | None = None, colorbar: bool = False
) -> None:
    """A density from its logarithm at ``grid_points``; ``most`` fixes the top of the colour scale for comparisons."""
    n = round(len(log_prob) ** 0.5)
    values = log_prob.detach().double().exp().reshape(n, n).cpu().numpy()
    shown = axes.imshow(values, origin="lower", extent=extent, cmap=DENSITY, vmin=0, vmax=most, interpolation="nearest")
    if colorbar:
        bar = axes.figure.colorbar(shown, ax=axes, shrink=0.7)
        bar.ax.tick_params(labelsize=7)
    _square(axes, extent, title)


def points(axes: Axes, x: Tensor, extent: Extent, title: str, *, most: int = 4000, color: str = "#274c77") -> None:
    """A scatter plot of (at most ``most``) points (N, 2)."""
    shown = x[:most].detach().cpu().numpy()
    axes.plot(shown[:, 0], shown[:, 1], ".", ms=1.2, color=color, alpha=0.6, mew=0)
    _square(axes, extent, title)


def field(axes: Axes, score: ScoreFn, sigma: float, extent: Extent, title: str, *, n: int = 18) -> None:
    """Arrows of a 2-D score field; lengths are compressed, so that near and far arrows can be read together."""
    x = grid_points(extent, n)
    with torch.no_grad():
        s = score(x, torch.tensor(sigma)).cpu()
    length = s.norm(dim=1, keepdim=True)
    arrows = (s / length.clamp_min(1e-12) * torch.log1p(length / length.median().clamp_min(1e-12))).numpy()
    axes.quiver(x[:, 0].numpy(), x[:, 1].numpy(), arrows[:, 0], arrows[:, 1], width=0.004, color="#222222")
    _square(axes, extent, title)


def image_grid(axes: Axes, x: Tensor, title: str, *, columns: int = 10) -> None:
    """Images (B, C, H, W) in [-1, 1], gray or RGB, side by side."""
    x = ((x.detach().cpu() + 1) / 2).clamp(0, 1)
    b, c, h, w = x.shape
    lines = -(-b // columns)
    canvas = torch.ones(c, lines * (h + 1) - 1, columns * (w + 1) - 1)
    for i, image in enumerate(x):
        top, left = (i // columns) * (h + 1), (i % columns) * (w + 1)
        canvas[:, top : top + h, left : left + w] = image
    picture = canvas[0] if c == 1 else canvas[:3].permute(1, 2, 0)
    axes.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[], title=title)
    axes.title.set_fontsize(9)
