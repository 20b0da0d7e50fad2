"""What guidance really samples: beside the tilted density p(x) p(y|x)^w, as which its score looks at each noise level,
the density of the guided probability-flow ODE, and particles with weights that reach the tilt. Exact scores; KL in nats
on the grid of the picture.
"""

from __future__ import annotations

import math

import torch
from tqdm.auto import tqdm

from scorelab import classifier_free, log_likelihood, sigmas
from scorelab.distributions import Labelled, target
from scorelab.evaluation import energy_distance
from scorelab.guidance import tilted
from scorelab.plotting import density, extent_of, figure, grid_points, points
from toy.common import Gallery, options, parse

LABEL, SCALES = 2, (1.0, 2.0, 3.0)
GRID, COUNT = {"full": 100, "quick": 60}, 4000
SIGMA_MIN, SIGMA_MAX = 0.02, 20.0
TOLERANCE = 1e-4


def problem() -> Labelled:
    """The ring of labelled modes, blurred so that labels overlap."""
    found = target("labelled_ring", dtype=torch.float64)
    assert isinstance(found, Labelled)
    for part in found.parts:
        part.std = torch.tensor(0.3, dtype=torch.float64)  # type: ignore[attr-defined]
    return found


def divergence(log_p: torch.Tensor, log_q: torch.Tensor, cell: float) -> float:
    """KL(p || q) in nats of densities by their logarithms at a grid's points."""
    return float((log_p.exp() * (log_p - log_q)).sum() * cell)


def draw(gallery: Gallery) -> None:
    """guidance.png, and its numbers in metrics.json."""
    d = problem()
    part, extent = d.parts[LABEL], extent_of(d)
    n = GRID[gallery.mode]
    at, cell = grid_points(extent, n).double(), ((extent[1] - extent[0]) / n) ** 2
    levels = sigmas.karras(300, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)
    made, axes = figure(5, len(SCALES), size=2.8)
    rows = {}
    for line, w in zip(axes, tqdm(SCALES, desc="scales", unit="scale"), strict=True):
        given, free = part.log_prob(at, SIGMA_MIN), d.log_prob(at, SIGMA_MIN)
        tilt = w * given + (1 - w) * free
        tilt = tilt - torch.logsumexp(tilt, 0) - math.log(cell)
        guided = classifier_free(part.score, d.score, w)
        ode = log_likelihood(guided, at, SIGMA_MIN, SIGMA_MAX, rtol=TOLERANCE, atol=TOLERANCE).log_prob
        generator = torch.Generator().manual_seed(0)
        # from the grid's cells, and anywhere inside of them
        picked = torch.multinomial(tilt.exp(), COUNT, replacement=True, generator=generator)
        exact = at[picked] + cell**0.5 * (torch.rand(COUNT, 2, dtype=at.dtype, generator=generator) - 0.5)
        plain = at[torch.multinomial(ode.exp(), COUNT, replacement=True, generator=generator)]
        plain = plain + cell**0.5 * (torch.rand(COUNT, 2, dtype=at.dtype, generator=generator) - 0.5)
        found = tilted(part.score, d.score, w, (COUNT, 2), levels, generator=generator, dtype=torch.float64)
        gap, back = divergence(ode, tilt, cell), divergence(tilt, ode, cell)
        far, near = energy_distance(plain, exact), energy_distance(found.x, exact)
        most = float(tilt.exp().max())
        density(line[0], tilt, extent, f"w = {w:g}: tilted density", most=most)
        density(line[1], ode, extent, f"guided ODE\nKL to the tilt {gap:.3g} nats", most=most)
        points(line[2], plain, extent, f"guided ODE\nenergy distance to the tilt {far:.2g}", color="#9c3848")
        points(line[3], found.x, extent, f"particles\nenergy distance to the tilt {near:.2g}")
        line[4].semilogx(levels[:-1].numpy(), found.ess.numpy() / COUNT, color="#274c77")
        line[4].set(ylim=(0, 1.05), xlabel="noise level", title="effective sample size, share of particles")
        line[4].invert_xaxis()
        line[4].title.set_fontsize(9)
        line[4].tick_params(labelsize=7)
        rows[f"{w:g}"] = {
            "kl_ode_to_tilt_nats": gap,
            "kl_tilt_to_ode_nats": back,
            "energy_distance_ode": far,
            "energy_distance_particles": near,
            "least_effective_sample_size": float(found.ess.min()),
            "ode_mass_on_grid": float(ode.exp().sum() * cell),
        }
    made.suptitle("label 2 of the labelled ring, standard deviation 0.3; scale w, exact scores", fontsize=10)
    gallery.save(made, "guidance")
    gallery.record("guidance", {"particles": COUNT, "levels": len(levels) - 1, "scales": rows})


if __name__ == "__main__":
    draw(parse(options(__doc__), ())[0])
