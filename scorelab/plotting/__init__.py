"""Densities, score fields and image grids."""

from scorelab.plotting.figures import (
    DENSITY,
    density,
    extent_of,
    field,
    figure,
    grid_points,
    image_grid,
    points,
    scaled_for,
)

__all__ = ["DENSITY", "density", "extent_of", "field", "figure", "grid_points", "image_grid", "points", "scaled_for"]
