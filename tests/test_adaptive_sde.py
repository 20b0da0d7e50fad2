from __future__ import annotations

import math

import pytest
import torch
from problems import F64, generator, mixture, randn
from scipy import stats

from scorelab import PerSampleNoise, sample, trajectory
from scorelab.distributions import GaussianMixture
from scorelab.samplers import AdaptiveReverseSDE, LangevinCorrector, PredictorCorrector
from scorelab.samplers.adaptive_sde import Path

HALVES = GaussianMixture(torch.tensor([[-2.0], [1.0]], dtype=F64), 0.3, torch.tensor([0.3, 0.7], dtype=F64))


def noised(n: int) -> torch.Tensor:
    """Exact samples at sigma = 20."""
    return HALVES.sample(n, generator(1)) + 20 * randn(n, 1, seed=7)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_a_refined_path_is_still_brownian_and_still_the_same_path(eta):
    """Increments over unequal pieces: independent, of the clock's variance, and summing to the whole one."""
    count, g, high, low = 40_000, generator(3), 10.0, 0.1
    path = Path(math.log(high / low), eta, torch.randn(count, 1, dtype=F64, generator=g))

    def clock(share):
        return (high * (low / high) ** float(share[0])) ** (-2 * eta**2)

    everyone, total = path.moving, (low ** (-2 * eta**2) - high ** (-2 * eta**2)) ** 0.5 * path.z
    pieces, spans = [], []
    for halvings in (3, 0, 1, 0, 0):
        for _ in range(halvings):
            path.halve(everyone, torch.randn(count, 1, dtype=F64, generator=g))
        begin, end = path.behind()
        spans.append(clock(end) - clock(begin))
        pieces.append(path.z.clone())
        path.accept(everyone)
    assert not path.moving.any()
    torch.testing.assert_close(sum(s**0.5 * z for s, z in zip(spans, pieces, strict=True)), total, rtol=1e-5, atol=1e-5)
    scaled = torch.cat(pieces, 1)
    covariance = scaled.T @ scaled / count
    # standard errors 1/sqrt(n) off the diagonal and sqrt(2/n) on it
    assert float((covariance - torch.eye(len(pieces), dtype=F64)).abs().max()) < 5 * math.sqrt(2 / count)


def test_each_sample_refines_its_own_path():
    path = Path(math.log(100), 1.0, torch.ones(2, 3))
    path.halve(torch.tensor([True, False]), torch.zeros(2, 3))
    assert path.depth.tolist() == [1, 0]
    path.accept(torch.tensor([True, True]))
    assert path.moving.tolist() == [True, False]
    assert path.depth.tolist() == [1, 0]
    assert path.behind()[0].tolist() == [0.5, 1.0]


@pytest.mark.parametrize("eta", [1e-9, 5.0])
def test_any_noise_scale_is_finite(eta):
    x = sample(
        HALVES.score, noised(50).float(), [20.0, 0.002], AdaptiveReverseSDE(eta, 0.1, 0.1), generator=generator()
    )
    assert bool(torch.isfinite(x).all())


@pytest.mark.parametrize("eta", [0.7, 1.0, 1.5])
def test_samples_of_a_mixture_follow_its_law(eta):
    x = sample(
        HALVES.score,
        noised(4000),
        [20.0, 0.05],
        AdaptiveReverseSDE(eta, 3e-3, 3e-3),
        generator=generator(2),
    )
    cdf = sum(w * stats.norm.cdf(x.numpy().ravel(), m, math.hypot(0.3, 0.05)) for w, m in ((0.3, -2.0), (0.7, 1.0)))
    assert stats.kstest(cdf, "uniform").pvalue > 1e-5


def test_a_tighter_tolerance_takes_more_evaluations_and_a_looser_one_still_ends():
    x = noised(50)
    nfe = []
    for tolerance in (1e-1, 1e-2, 1e-3):
        steps = trajectory(
            HALVES.score, x, [20.0, 0.05, 0.0], AdaptiveReverseSDE(1.0, tolerance, tolerance), generator=generator(2)
        )
        nfe.append(list(steps)[-1].nfe)
    assert nfe[0] < nfe[1] < nfe[2]


@pytest.mark.parametrize("grid", [[10.0, 0.1, 0.0], [10.0, 3.0, 1.0, 0.1, 0.0]])
@pytest.mark.parametrize("corrector", [None, LangevinCorrector(0.1)])
def test_the_noise_of_a_sample_does_not_depend_on_the_batch(grid, corrector):
    d = mixture()
    x = 10 * randn(7, 2)
    sampler = AdaptiveReverseSDE()
    sampler = sampler if corrector is None else PredictorCorrector(sampler, corrector)
    whole = sample(d.score, x, grid, sampler, generator=PerSampleNoise(5))
    parts = sample(d.score, x, grid, sampler, generator=PerSampleNoise(5), batch_size=3)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-9)


def test_scores_that_can_be_split_get_only_the_rows_that_step():
    d, sizes = mixture(), []

    class Splitting:
        def __call__(self, x, sigma):
            sizes.append(len(x))
            return d.score(x, sigma)

        def rows(self, index):
            return self

    x = 10 * randn(40, 2)
    split = sample(Splitting(), x, [10.0, 0.1, 0.0], AdaptiveReverseSDE(), generator=generator(4))
    whole = sample(lambda y, s: d.score(y, s), x, [10.0, 0.1, 0.0], AdaptiveReverseSDE(), generator=generator(4))
    torch.testing.assert_close(split, whole)
    assert min(sizes) < 40


def test_limits_are_reported():
    with pytest.raises(ValueError, match="eta is 0"):
        AdaptiveReverseSDE(0.0)
    with pytest.raises(RuntimeError, match=r"max_steps = 3 .*sigma ="):
        sample(mixture().score, 10 * randn(4, 2), [10.0, 0.01], AdaptiveReverseSDE(max_steps=3), generator=generator())
    with pytest.raises(ValueError, match=r"scorelab\.broadcast"):
        sample(lambda x, s: -x / (0.01 + s**2), randn(2, 2), [10.0, 0.1], AdaptiveReverseSDE())
