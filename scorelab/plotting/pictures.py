"""Samples as pictures: images as pixels, one by one or as one, points as scatter plots."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch

from scorelab.data import Values
from scorelab.plotting.figures import figure
from scorelab.typing import Shape, Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["are_images", "picture_bytes", "scatter", "tiled"]

_GAP, _ENLARGED = 2, 48
"""Pixels between pictures, and up to which size they are enlarged by a whole number."""


def are_images(data_shape: Shape) -> bool:
    """Whether samples of this shape can be shown: gray or colour images."""
    return len(data_shape) == 3 and data_shape[0] in (1, 3)


def picture_bytes(x: Tensor, values: Values | None = None) -> np.ndarray:
    """uint8 (B, H, W) or (B, H, W, 3) of images (B, 1 or 3, H, W), whose numbers are ``values``, by default [-1, 1]."""
    levels = (Values(-1.0, 1.0) if values is None else values).bytes(x).cpu()
    return levels[:, 0].numpy() if levels.shape[1] == 1 else levels.permute(0, 2, 3, 1).numpy()


def tiled(x: Tensor, values: Values | None = None, columns: int = 0) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3): the same side by side, by default about as many lines as columns, small ones enlarged,
    with gaps between them."""
    pictures = picture_bytes(x, values)
    columns = columns or max(1, round(len(pictures) ** 0.5))
    times = max(1, _ENLARGED // max(pictures.shape[1:3]))
    pictures = pictures.repeat(times, 1).repeat(times, 2)
    _, h, w, *channels = pictures.shape
    lines = -(-len(pictures) // columns)
    page = np.full((lines * (h + _GAP) - _GAP, columns * (w + _GAP) - _GAP, *channels), 255, np.uint8)
    for k, picture in enumerate(pictures):
        top, left = k // columns * (h + _GAP), k % columns * (w + _GAP)
        page[top : top + h, left : left + w] = picture
    return page


def scatter(x: Tensor, most: int = 4, within: Tensor | None = None) -> Figure:
    """Points (N, D): a histogram of one dimension, a scatter plot of two, of more the pairs of the first ``most``.

    within: points (M, D) whose place sets the axes, by default the points themselves.
    """
    x, dims = x.detach().cpu(), x.shape[1]
    size = min(5.0, max(1.5, 60 / max(len(x), 1) ** 0.5))
    ends = None
    if within is not None and dims > 1:
        low, high = within.detach().cpu().amin(0), within.detach().cpu().amax(0)
        ends = torch.stack([low - 0.15 * (high - low), high + 0.15 * (high - low)]).tolist()
    pairs = list(combinations(range(min(dims, most)), 2)) if dims > 1 else [(0, 0)]
    columns = min(3, len(pairs))
    drawn, axes = figure(columns, -(-len(pairs) // columns), 5.0 if len(pairs) == 1 else 3.2)
    for ax, (i, k) in zip(axes.flat, pairs, strict=False):
        if dims == 1:
            ax.hist(x[:, 0].numpy(), 60, color="#274c77")
            ax.set(xlabel="dimension 0", ylabel=f"of {len(x):,} samples")
        else:
            ax.plot(x[:, i].numpy(), x[:, k].numpy(), ".", ms=size, color="#274c77", alpha=0.6, mew=0)
            if ends is not None:
                ax.set(xlim=(ends[0][i], ends[1][i]), ylim=(ends[0][k], ends[1][k]))
            ax.set(xlabel=f"dimension {i}", ylabel=f"dimension {k}", aspect="equal" if dims == 2 else "auto")
        ax.tick_params(labelsize=8)
    for ax in axes.flat[len(pairs) :]:
        ax.set_axis_off()
    return drawn
