"""For every target the exact density, the learnt density by the probability-flow ODE, and samples; with KL in nats.

``--data points.npy --steps 2000`` learns points of one's own, an array (N, 2), instead; from the clone's folder.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm.auto import tqdm

from scorelab import log_likelihood, sample, sigmas
from scorelab.cli.density import density_run
from scorelab.distributions import TARGETS
from scorelab.evaluation import kl_to_model
from scorelab.plotting import density, extent_of, figure, grid_points, points
from scorelab.training import default_config, load_data, train
from toy.common import Gallery, Trained, options, parse

GRID = 200
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
        density(line[0], exact, extent, f"{name}: exact density at sigma {low:.2g}", most=most, colorbar=True)
        text = f"learnt density at sigma {low:.2g}\nKL {kl.value:.4f} ± {kl.stderr:.4f} nats"
        density(line[1], learnt_density(trained, extent), extent, text, most=most, colorbar=True)
        levels = sigmas.karras(40, sigma_min=low, sigma_max=trained.sigma_max)
        x = sample(
            trained.model, (4000, 2), levels, generator=torch.Generator().manual_seed(2), data_std=trained.data_std
        )
        points(line[2], x, extent, "4,000 samples (Heun, 79 evaluations)")
    gallery.save(made, "densities")
    gallery.record("densities", numbers)


def own(data: Path, steps: int, out: Path) -> str:
    """Learn points (N, 2) of one's own with the default settings, a run in ``out``, and draw what was learnt."""
    config = default_config()
    config.data.source, config.data.path = "arrays", str(data.expanduser().resolve())
    config.training.steps, config.training.batch_size = steps, 256
    if (shape := load_data(config).data_shape) != (2,):
        raise ValueError(f"--data: {data} holds samples of shape {shape}; expected points (N, 2)")
    run = out / f"{data.resolve().parent.name}_{data.stem}"
    train(config, run, spare_threads=True)
    return density_run(run, run / "density.png", n=GRID)


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--data", type=Path, help="an array of points (N, 2), .npy or .npz, in place of targets")
    parser.add_argument("--steps", type=int, default=2000, help="of training on --data")
    given = parser.parse_args()
    if given.data is None:
        draw(*parse(parser, TARGETS))
    else:
        try:
            print(own(given.data, given.steps, given.out))
        except (ValueError, OSError) as error:
            parser.error(str(error))
