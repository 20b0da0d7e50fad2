"""Laws of guided samples on exact problems: scale 1 is the condition's, others miss the tilt, particles reach it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import F64, generator, randn
from test_guidance import LABELLED, LABELS, LOW, _between, _exact, _marked
from test_steered import Posterior

from scorelab import PerSampleNoise, classifier_free, sample, sigmas
from scorelab.distributions import Gaussian, GaussianMixture, Labelled
from scorelab.evaluation import energy_distance
from scorelab.guidance import ByStep, Projected, Thresholded, autoguidance, classifier, snapped, tilted
from scorelab.typing import ScoreFn

CONDITIONAL, FREE = LABELLED.conditioned(LABELS), LABELLED.score
LEVELS = sigmas.karras(25, sigma_min=LOW, sigma_max=20.0)
BOUNDS = {"rescale": 0.7, "projected": Projected(0.0, 0.1), "threshold": Thresholded(0.9, 0.1)}
ONE: dict[str, ScoreFn] = {
    "classifier": classifier(FREE, Posterior(LABELS), 1.0),
    "classifier-free": classifier_free(CONDITIONAL, FREE, 1.0),
    "bounded": classifier_free(CONDITIONAL, FREE, 1.0, **BOUNDS),
    "negative": classifier_free(CONDITIONAL, LABELLED.conditioned((LABELS + 1) % 4), 1.0),
    "autoguidance": autoguidance(CONDITIONAL, FREE, 1.0, **BOUNDS),
    "an interval": classifier_free(CONDITIONAL, FREE, 1.0, interval=(0.3, 3.0)),
}


@pytest.mark.parametrize("name", ONE)
def test_scale_one_samples_the_conditional_law(name):
    """As the score itself, and by the energy distance of samples with their labels beside them."""
    x = 3 * randn(len(LABELS), 2)
    for sigma in (torch.tensor(0.2, dtype=F64), torch.linspace(0.05, 9, len(LABELS), dtype=F64)):
        torch.testing.assert_close(ONE[name](x, sigma).detach(), CONDITIONAL(x, sigma), rtol=1e-9, atol=1e-9)
    found = sample(ONE[name], 20 * randn(len(LABELS), 2, seed=3), LEVELS)
    mean, deviation = _between(0.0)
    assert energy_distance(_marked(found), _marked(_exact(200))) < mean + 5 * deviation


def test_steps_at_scale_one_are_the_conditional_law_too():
    """Of a classifier, for whom the score outside of the interval is another: guided at all levels."""
    x = 20 * randn(len(LABELS), 2, seed=3)
    wide = classifier(FREE, Posterior(LABELS), 1.0, interval=(0.0, 100.0))
    levels = snapped(LEVELS, (0.3, 3.0))
    torch.testing.assert_close(sample(wide, x, levels, ByStep()), sample(CONDITIONAL, x, levels), rtol=1e-7, atol=1e-7)


NARROW = Gaussian(torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([0.5, 1.0], dtype=F64))
WIDE = Gaussian(torch.tensor([0.0, -0.5], dtype=F64), torch.tensor([2.0, 1.5], dtype=F64))
GRID = sigmas.karras(50, sigma_min=0.02, sigma_max=60.0)


def tilt(w: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variances of N_narrow^w N_wide^(1 - w): precisions add up."""
    a, b = w / NARROW.variances, (1 - w) / WIDE.variances
    return (a * NARROW.mean + b * WIDE.mean) / (a + b), 1 / (a + b)


@pytest.mark.parametrize(("scale", "eta"), [(3.0, 1.0), (0.5, 1.0), (2.0, 0.6)])
def test_particles_have_the_tilted_gaussians_mean_and_variance(scale, eta):
    """Within 6 standard errors, from 10 populations, and 2 % for the step."""
    runs = [
        tilted(NARROW.score, WIDE.score, scale, (1500, 2), GRID, eta=eta, generator=generator(k), dtype=F64)
        for k in range(10)
    ]
    mean, variance = tilt(scale)
    for found, expected in (
        (torch.stack([r.x.mean(0) for r in runs]), mean),
        (torch.stack([r.x.var(0) for r in runs]), variance),
    ):
        error = found.std(0) / len(runs) ** 0.5
        assert ((found.mean(0) - expected).abs() < 6 * error + 0.02 * variance.sqrt()).all()
    # guidance alone is far off: narrower, and its mean beyond
    if scale > 1:
        ends = sample(
            classifier_free(NARROW.score, WIDE.score, scale), (4000, 2), GRID, generator=generator(), dtype=F64
        )
        assert ends.var(0)[0] < 0.6 * variance[0]
        assert ends.mean(0)[0] > mean[0] + 5 * (variance[0] / 4000) ** 0.5


def test_noise_makes_up_for_how_narrow_guidance_is():
    """N(0, 1/4)^4 N(0, 1)^-3 in one dimension: effective sizes do not say that little noise misses it."""
    grid, variance = [*sigmas.geometric(60, sigma_min=0.01, sigma_max=20.0).tolist(), 0.0], 1 / (4 / 0.25 - 3)
    narrow, wide = (Gaussian(torch.zeros(1, dtype=F64), v) for v in (0.25, 1.0))
    means = {}
    for eta in (0.3, 1.5):
        options = {"eta": eta, "dtype": F64}
        starts = [{"x": (4000, 1), "sigmas": grid, "generator": generator(k)} for k in (1, 2)]
        runs = [tilted(narrow.score, wide.score, 4.0, **start, **options) for start in starts]
        means[eta] = sum(float(r.x.square().mean()) for r in runs) / 2
        assert min(float(r.ess.min()) for r in runs) > 0.25 * 4000
    assert means[1.5] == pytest.approx(variance, rel=0.08)
    assert means[0.3] < 0.6 * variance
    # without noise and weights every sample is scaled alike
    guided = classifier_free(narrow.score, wide.score, 4.0)
    ends = sample(guided, torch.full((1, 1), 20.0, dtype=F64), sigmas.geometric(400, sigma_min=1e-3, sigma_max=20.0))
    assert float(ends) ** 2 == pytest.approx(0.25**4, rel=0.02)


def test_effective_sample_sizes_say_when_particles_are_resampled():
    options = {"generator": generator(), "dtype": F64}
    even = tilted(NARROW.score, WIDE.score, 1.0, (500, 2), GRID, **options)
    torch.testing.assert_close(even.ess, torch.full((50,), 500.0))
    assert even.nfe == 50
    assert len(even.x.unique(dim=0)) == 500
    never = tilted(NARROW.score, WIDE.score, 3.0, (500, 2), GRID, threshold=0.0, **options)
    often = tilted(NARROW.score, WIDE.score, 3.0, (500, 2), GRID, threshold=0.5, **options)
    assert float(never.ess.min()) < 200
    # at the smallest levels weights change little, and copies have parted
    assert float(often.ess[-1]) > 200
    assert float(often.ess.max()) <= 500


def test_particles_reach_the_tilted_mixture():
    """By energy distance to exact draws: of a label's part, each kept with probability p(y | x)^(w - 1)."""
    # three labels of two modes each that overlap: far modes take many more particles
    means, w = randn(3, 2, 2, seed=5), 2.0
    d = Labelled([GaussianMixture(m, 0.6, torch.tensor([0.7, 0.3], dtype=F64)) for m in means])
    part, free = d.parts[1], d.score

    def posterior(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return part.log_prob(x, sigma) - d.log_prob(x, sigma)

    drawn = part.sample(60_000, generator(1))
    # p(y | x) is a third of the ratio
    keep = (posterior(drawn, torch.tensor(0.0, dtype=F64)).exp() / 3) ** (w - 1)
    exact = drawn[torch.rand(len(drawn), generator=generator(2), dtype=F64) < keep]
    grid = sigmas.karras(80, sigma_min=0.03, sigma_max=30.0)
    found = tilted(part.score, free, w, (2000, 2), grid, generator=generator(3), dtype=F64)
    # of a classifier it is the same law
    other = tilted(classifier(free, posterior), free, w, (2000, 2), grid, generator=generator(4), dtype=F64)
    sets = exact[:16_000].split(400)
    bar = max(energy_distance(a, b) for a, b in zip(sets[:20], sets[20:40], strict=True))
    for x in (found.x, other.x):
        assert energy_distance(x, exact[-2000:]) < bar
    plain = sample(classifier_free(part.score, free, w), (2000, 2), grid, generator=generator(5), dtype=F64)
    assert energy_distance(plain, exact[-2000:]) > 2 * bar


def test_resampling_is_systematic():
    from scorelab.guidance.particles import _systematic

    share = torch.tensor([0.05, 0.5, 0.0, 0.25, 0.2], dtype=F64)
    counts = torch.stack([torch.bincount(_systematic(share, generator(k)), minlength=5) for k in range(400)])
    assert ((counts - 5 * share).abs() < 1).all()
    assert np.abs((counts.double().mean(0) - 5 * share).numpy()).max() < 5 * 0.5 / 400**0.5


def test_particles_refuse_what_they_cannot_be():
    with pytest.raises(ValueError, match="threshold is 2; expected a share of the particles"):
        tilted(NARROW.score, WIDE.score, 2.0, (10, 2), GRID, threshold=2.0)
    with pytest.raises(ValueError, match="scale is nan"):
        tilted(NARROW.score, WIDE.score, float("nan"), (10, 2), GRID)
    with pytest.raises(TypeError, match="got NoneType; expected two scores"):
        tilted(NARROW.score, None, 2.0, (10, 2), GRID)
    with pytest.raises(ValueError, match="the particles is not finite"):
        tilted(lambda x, s: x * float("nan"), WIDE.score, 2.0, (10, 2), GRID)
    with pytest.raises(ValueError, match="the weight is not finite at 10 of 10 samples"):
        tilted(lambda x, s: -x / s**2, lambda x, s: -x / s**2 + 1e25, 1 + 1e-25, (10, 2), (1.0, 0.9))
    with pytest.raises(ValueError, match=r"x has shape \(0, 2\); expected at least one particle"):
        tilted(NARROW.score, WIDE.score, 2.0, (0, 2), GRID)
    with pytest.raises(TypeError, match="generator is PerSampleNoise; expected a torch.Generator"):
        tilted(NARROW.score, WIDE.score, 2.0, (10, 2), GRID, generator=PerSampleNoise(0))
    with pytest.raises(TypeError, match="dtype is torch.int32; expected floating point"):
        tilted(NARROW.score, WIDE.score, 2.0, (10, 2), GRID, dtype=torch.int32)


def test_particles_in_half_precision_have_the_weights_of_single():
    options = {"scale": 2.0, "x": (64, 2), "sigmas": sigmas.karras(20, sigma_min=1e-3, sigma_max=10.0)}
    scores = lambda x, s: 600 - x / (1 + s**2), lambda x, s: -x / (1 + s**2)
    half, single = (tilted(*scores, **options, generator=generator(1), dtype=d) for d in (torch.half, torch.float))
    torch.testing.assert_close(half.ess, single.ess)
    torch.testing.assert_close(half.x, single.x.half())
