"""For every target the exact density, the learnt density by the probability-flow ODE, and samples; with KL in nats."""

from __future__ import annotations

import torch
from tqdm.auto import tqdm

from scorelab import log_likelihood, sample, sigmas
from scorelab.distributions import TARGETS
from scorelab.evaluation import kl_to_model
from scorelab.plotting import density, extent_of, figure, grid_points, points
from toy.common import Gallery, Trained, parse

GRID = 64
POINTS = 4000
TOLERANCE, PICTURE_TOLERANCE = 1e-4, 3e-4


def learnt_density(trained: Trained, extent: tuple[float, float, float, float], n: int = GRID) -> torch.Tensor:
    """log p of the model at ``grid_points(extent, n)``, (n * n,)."""
    options = {"data_std": trained.data_std, "rtol": PICTURE_TOLERANCE, "atol": PICTURE_TOLERANCE}
    parts = grid_points(extent, n).split(4096)
    found = [log_likelihood(trained.model, x, trained.sigma_min, trained.sigma_max, **options).log_prob for x in parts]
    return torch.cat(found)


def draw(gallery: Gallery, names: tuple[str, ...] = TARGETS) -> None:
    """densities.png and, for each target, its KL(data || model) with standard error in metrics.json."""
    made, axes = figure(3, len(names))
    numbers = {}
    for line, name in zip(axes, tqdm(names, desc="densities", unit="target"), strict=True):
        trained = gallery.trained(name)
        d, extent, low = trained.distribution, extent_of(trained.distribution), trained.sigma_min
        kl = kl_to_model(
            d,
            trained.model,
            low,
            trained.sigma_max,
            count=POINTS,
            data_std=trained.data_std,
            rtol=TOLERANCE,
            atol=TOLERANCE,
            generator=torch.Generator().manual_seed(1),
        )
        numbers[name] = {
            "kl_nats": kl.value,
            "standard_error": kl.stderr,
            "points": kl.points,
            "sigma_min": low,
            "sigma_max": trained.sigma_max,
            "training_seconds": trained.seconds,
            "training_steps": trained.steps,
        }
        exact = d.log_prob(grid_points(extent, GRID), low)
        most = float(exact.exp().quantile(0.999))
        density(line[0], exact, extent, f"{name}: exact density", most=most)
        text = f"learnt density, KL {kl.value:.4f} ± {kl.stderr:.4f} nats"
        density(line[1], learnt_density(trained, extent), extent, text, most=most)
        levels = sigmas.karras(40, sigma_min=low, sigma_max=trained.sigma_max)
        x = sample(
            trained.model, (4000, 2), levels, generator=torch.Generator().manual_seed(2), data_std=trained.data_std
        )
        points(line[2], x, extent, "4,000 samples (Heun, 79 evaluations)")
    gallery.save(made, "densities")
    gallery.record("densities", numbers)


if __name__ == "__main__":
    draw(*parse(__doc__, TARGETS))
