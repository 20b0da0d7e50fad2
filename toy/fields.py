"""Score fields at three noise levels, exact and learnt, and where the error sits.

The network only sees noised data, so its error is small where there is data and large where there is none; noise
spreads the data and cures that: at the largest level the error is small everywhere.
"""

from __future__ import annotations

import torch

from scorelab.plotting import extent_of, field, figure, grid_points
from toy.common import Gallery, options, parse

DEFAULT = ("moons",)


def draw(gallery: Gallery, names: tuple[str, ...] = DEFAULT) -> None:
    """fields_TARGET.png; metrics.json gets the error in units of 1/sigma, over the data and over the empty plane."""
    numbers = {}
    for name in names:
        trained = gallery.trained(name)
        d, extent = trained.distribution, extent_of(trained.distribution, 1.0)
        made, axes = figure(3, 3)
        numbers[name] = {}
        for line, factor in zip(axes, (1.0, 8.0, 100.0), strict=True):
            sigma = trained.sigma_min * factor
            level = torch.tensor(sigma)
            field(line[0], d.score, sigma, extent, f"{name}, sigma = {sigma:.3g}: exact score")
            field(line[1], trained.model, sigma, extent, "learnt score")
            grid = grid_points(extent, 120)
            with torch.no_grad():
                error = sigma * (trained.model(grid, level) - d.score(grid, level)).norm(dim=1)
                x = d.sample(10_000, torch.Generator().manual_seed(0))
                x = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
                on_data = sigma * (trained.model(x, level) - d.score(x, level)).norm(dim=1)
            log_p = d.log_prob(grid, sigma)
            shown = line[2].imshow(
                error.reshape(120, 120).log10().numpy(), origin="lower", extent=extent, cmap="viridis", vmin=-3, vmax=1
            )
            lines = [float(log_p.max()) - depth for depth in (9.0, 4.0)]
            xs = grid.reshape(120, 120, 2)
            line[2].contour(
                xs[..., 0], xs[..., 1], log_p.reshape(120, 120), levels=lines, colors="white", linewidths=0.6
            )
            line[2].set_title("log10 of sigma |error|; white: where data is", fontsize=9)
            line[2].tick_params(labelsize=7)
            made.colorbar(shown, ax=line[2], shrink=0.8)
            empty = log_p < log_p.max() - 20
            numbers[name][f"sigma={sigma:.4g}"] = {
                "rms_error_on_data": float(on_data.square().mean().sqrt()),
                "rms_error_where_empty": float(error[empty].square().mean().sqrt()) if bool(empty.any()) else None,
                "share_of_plane_empty": float(empty.float().mean()),
            }
        gallery.save(made, f"fields_{name}")
    gallery.record("fields", numbers)


if __name__ == "__main__":
    draw(*parse(options(__doc__), DEFAULT))
