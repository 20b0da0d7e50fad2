"""Paths of the reverse SDE and the probability-flow ODE; annealed Langevin and the reverse SDE as animations."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable

import matplotlib.pyplot as plt
import torch
from PIL import Image

from scorelab import VE, sigmas, trajectory
from scorelab.plotting import extent_of, figure, points
from scorelab.samplers import AnnealedLangevin, Heun, ReverseSDE, Step
from toy.common import Gallery, Trained, options, parse

DEFAULT = ("swiss_roll",)
FRAMES = 10
LEVELS = 60
"""Noise levels of annealed Langevin dynamics, enough for it to look right."""


def animate(gallery: Gallery, steps: Iterable[Step], trained: Trained, title: str, name: str, total: int) -> None:
    """A GIF of about FRAMES steps, each point cloud shown in units of sqrt(sigma^2 + data_std^2)."""
    every, frames = max(1, total // FRAMES), []
    extent = extent_of(trained.distribution)
    half = (extent[1] - extent[0]) / 2 / trained.data_std
    for i, step in enumerate(steps):
        if i % every and i != total:
            continue
        scale = math.hypot(step.sigma, trained.data_std)
        made, axes = figure(1, size=3.6)
        points(
            axes[0, 0],
            step.x / scale,
            (-half, half, -half, half),
            f"{title}\nsigma = {step.sigma:.3g}, x in units of {scale:.2g}",
        )
        buffer = io.BytesIO()
        made.savefig(buffer, dpi=80)
        plt.close(made)
        frames.append(Image.open(buffer).convert("P", palette=Image.Palette.ADAPTIVE, colors=32))
    path = gallery.out / f"{name}.gif"
    frames[0].save(path, save_all=True, append_images=[*frames[1:], *[frames[-1]] * 8], duration=110, loop=0)


def draw(gallery: Gallery, names: tuple[str, ...] = DEFAULT) -> None:
    """trajectories_TARGET.png, annealed_TARGET.gif and reverse_TARGET.gif."""
    numbers = {}
    for name in names:
        trained = gallery.trained(name)
        low, high = trained.sigma_min, trained.sigma_max
        levels = sigmas.geometric(126, sigma_min=low, sigma_max=high)
        start = high * torch.randn(24, 2, generator=torch.Generator().manual_seed(3))
        extent = extent_of(trained.distribution, 0.6)
        made, axes = figure(2, size=4.2)
        cloud = trained.distribution.sample(4000, torch.Generator().manual_seed(0))
        nfe = {}
        for panel, sampler, title in (
            (axes[0, 0], ReverseSDE(VE(low, high)), "reverse SDE"),
            (axes[0, 1], Heun(), "ODE (Heun)"),
        ):
            generator = torch.Generator().manual_seed(4)
            steps = list(trajectory(trained.model, start, levels, sampler, generator=generator))
            nfe[title] = steps[-1].nfe
            points(
                panel, cloud, extent, f"{title}: 24 paths, from sigma = {trained.data_std / 2:.2g} on", color="#bbbbbb"
            )
            # before that the paths cross the picture in a few strokes and hide all else
            path = torch.stack([s.x for s in steps if s.sigma <= trained.data_std / 2])
            panel.plot(path[..., 0].numpy(), path[..., 1].numpy(), lw=0.7)
            panel.plot(path[-1, :, 0].numpy(), path[-1, :, 1].numpy(), "k.", ms=4)
        gallery.save(made, f"trajectories_{name}")
        annealed = trajectory(
            trained.model,
            (1500, 2),
            sigmas.geometric(LEVELS, sigma_min=low, sigma_max=high),
            AnnealedLangevin(8, 0.4 * low**2),
            generator=torch.Generator().manual_seed(5),
        )
        animate(gallery, annealed, trained, "annealed Langevin", f"annealed_{name}", LEVELS)
        reverse = trajectory(
            trained.model,
            (1500, 2),
            levels,
            ReverseSDE(VE(low, high)),
            generator=torch.Generator().manual_seed(6),
        )
        animate(gallery, reverse, trained, "reverse SDE", f"reverse_{name}", len(levels) - 1)
        numbers[name] = {"nfe": nfe, "levels": len(levels)}
    gallery.record("trajectories", numbers)


if __name__ == "__main__":
    draw(*parse(options(__doc__), DEFAULT))
