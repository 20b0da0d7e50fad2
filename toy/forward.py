"""A 1-D mixture dissolves into a Gaussian, and the reverse SDE brings it back: paths over the exact density."""

from __future__ import annotations

import math

import torch

from scorelab import VP, trajectory
from scorelab.distributions import GaussianMixture
from scorelab.plotting import DENSITY, figure
from scorelab.samplers import ReverseSDE
from toy.common import Gallery, options, parse

PROCESS = VP()
SOURCE = GaussianMixture(torch.tensor([[-2.0], [0.5], [2.0]]), 0.2, torch.tensor([0.4, 0.2, 0.4]))
PATHS, STEPS = 12, 500


def marginal(t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The exact density of x_t = alpha x0 + std eps at points z, (T, Z)."""
    alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
    columns = [SOURCE.log_prob((z / a)[:, None], float(s)).exp() / a for a, s in zip(alpha, sigma, strict=True)]
    return torch.stack(columns)


def forward_paths(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Euler-Maruyama paths of dx = f x dt + g dw from samples of the mixture: t (S + 1,), x_t (S + 1, count)."""
    t = torch.linspace(PROCESS.t_min, PROCESS.t_max, STEPS + 1)
    x = SOURCE.sample(count, generator)[:, 0]
    kept = [x]
    for a, b in zip(t[:-1], t[1:], strict=True):
        z = torch.randn(count, generator=generator)
        x = x + PROCESS.drift(a) * x * (b - a) + PROCESS.diffusion(a) * (b - a).sqrt() * z
        kept.append(x)
    return t, torch.stack(kept)


def reverse_paths(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The reverse SDE with the exact score, from noise: t (S,), x_t (S, count)."""
    levels = PROCESS.sigmas(STEPS)
    steps = list(trajectory(SOURCE.score, (count, 1), levels, ReverseSDE(PROCESS), generator=generator, data_std=1.0))
    t = PROCESS.time(levels).float()
    return t, torch.stack([s.x[:, 0] for s in steps]) * PROCESS.alpha(t)[:, None]


def draw(gallery: Gallery) -> None:
    """forward.png; metrics.json gets the total variation between 20,000 reversed samples and the exact marginal."""
    z = torch.linspace(-3.5, 3.5, 300)
    t = torch.linspace(PROCESS.t_min, 1, 300)
    heat = marginal(t, z)
    made, axes = figure(2, size=4.2)
    for panel, (times, paths), title in (
        (
            axes[0, 0],
            forward_paths(PATHS, torch.Generator().manual_seed(0)),
            "forward: data (t = 0) dissolves into noise",
        ),
        (axes[0, 1], reverse_paths(PATHS, torch.Generator().manual_seed(1)), "reverse SDE: noise (t = 1) becomes data"),
    ):
        # each column scaled to its own maximum, or the last ones could not be seen
        scaled = (heat / heat.max(1, keepdim=True).values).T.numpy()
        panel.imshow(scaled, origin="lower", extent=(0, 1, -3.5, 3.5), aspect="auto", cmap=DENSITY)
        panel.plot(times.numpy(), paths.numpy(), lw=0.7, color="white", alpha=0.8)
        panel.set(title=title, xlabel="t", ylabel="x_t", ylim=(-3.5, 3.5), xlim=(0, 1))
    axes[0, 1].invert_xaxis()
    gallery.save(made, "forward")
    _, many = reverse_paths(20_000, torch.Generator().manual_seed(2))
    edges = torch.linspace(-3.5, 3.5, 71)
    found = torch.histogram(many[-1], edges).hist / many.shape[1]
    middle, width = (edges[1:] + edges[:-1]) / 2, float(edges[1] - edges[0])
    exact = marginal(torch.tensor([PROCESS.t_min]), middle)[0] * width
    gallery.record(
        "forward",
        {
            "total_variation_reverse": 0.5 * float((found - exact).abs().sum()),
            "samples": 20_000,
            "steps": STEPS,
            "noise_floor": 0.5 * float((exact * (1 - exact) * 2 / math.pi / 20_000).sqrt().sum()),
        },
    )


if __name__ == "__main__":
    draw(parse(options(__doc__), ())[0])
