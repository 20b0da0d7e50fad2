"""Images as pixels, one by one or as one picture."""

from __future__ import annotations

import numpy as np

from scorelab.data import Values
from scorelab.typing import Shape, Tensor

__all__ = ["are_images", "picture_bytes", "tiled"]


def are_images(data_shape: Shape) -> bool:
    """Whether samples of this shape can be shown: gray or colour images."""
    return len(data_shape) == 3 and data_shape[0] in (1, 3)


def picture_bytes(x: Tensor, values: Values | None = None) -> np.ndarray:
    """uint8 (B, H, W) or (B, H, W, 3) of images (B, 1 or 3, H, W), whose numbers are ``values``, by default [-1, 1]."""
    levels = (Values(-1.0, 1.0) if values is None else values).bytes(x).cpu()
    return levels[:, 0].numpy() if levels.shape[1] == 1 else levels.permute(0, 2, 3, 1).numpy()


def tiled(x: Tensor, values: Values | None = None, columns: int = 0) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3): the same side by side, by default about as many lines as columns."""
    pictures = picture_bytes(x, values)
    columns = columns or round(len(pictures) ** 0.5)
    empty = np.zeros((-len(pictures) % columns, *pictures.shape[1:]), np.uint8)
    tiles = np.concatenate([pictures, empty])
    lines = [np.concatenate(list(tiles[i : i + columns]), 1) for i in range(0, len(tiles), columns)]
    return np.concatenate(lines)
