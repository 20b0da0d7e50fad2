"""Distances of sets of features: values against closed forms, errors by how often their intervals hold the truth."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from problems import F64, generator, randn
from scipy.linalg import sqrtm

from scorelab.evaluation import (
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    manifold,
    sliced_wasserstein,
    vendi_score,
)

TIMES = 400


def held(estimates, truth):
    """In how many of the cases the 95 % interval holds the truth, and the mean error in standard errors of one."""
    values, errors = (np.array(z) for z in zip(*estimates, strict=True))
    return float((np.abs(values - truth) < 1.96 * errors).mean()), float((values.mean() - truth) / errors.mean())


def gaussians(i, n, dims, shift, scales=1.0):
    g = generator(i)
    x = torch.randn(n, dims, generator=g, dtype=F64)
    y = torch.randn(n, dims, generator=g, dtype=F64) * scales
    y[:, 0] += shift
    return x, y


@pytest.mark.parametrize(("dims", "n", "shift"), [(2, 300, 0.5), (8, 400, 0.3), (8, 400, 0.0)])
def test_intervals_hold_the_frechet_distance_of_gaussians(dims, n, shift):
    """Independent directions: ||m||^2 + sum (1 - s)^2. 93 to 97 % of 400 for a nominal 95."""
    scales = torch.linspace(0.7, 1.3, dims, dtype=F64) if shift else torch.ones(dims, dtype=F64)
    truth = shift**2 + float((1 - scales).square().sum())
    found = [frechet_distance(*gaussians(i, n, dims, shift, scales)) for i in range(TIMES)]
    share, bias = held([f.extrapolated for f in found], truth)
    assert 0.93 <= share <= (0.97 if shift else 1)
    assert abs(bias) < 0.5
    assert np.mean([f.plain for f in found]) - truth > dims**2 / n / 4


@pytest.mark.parametrize("counts", [(400, 300), (97, 1200)])
def test_frechet_distance_is_the_textbook_formula(counts):
    """By scipy's matrix root, as releases compute it."""
    x, y = randn(counts[0], 6), 0.3 + randn(counts[1], 6, seed=1) @ randn(6, 6, seed=2)
    a, b = (np.cov(z.numpy(), rowvar=False) for z in (x, y))
    right = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(x, y).plain == pytest.approx(right, rel=1e-9)
    assert frechet_distance(x.float(), y.float()).plain == pytest.approx(right, rel=1e-5)
    of_moments = frechet_distance(x, Moments.of(y))
    assert of_moments.plain == pytest.approx(right, rel=1e-9)
    assert of_moments.extrapolated.stderr < frechet_distance(x, y).extrapolated.stderr


def test_moments_are_those_of_any_division():
    x = 1000 + randn(10_001, 5)
    whole = Moments.of(x)
    torch.testing.assert_close(whole.covariance, torch.from_numpy(np.cov(x.numpy(), rowvar=False)), rtol=1e-10, atol=0)
    for sizes in ([1, 10_000], [5000, 2, 4999], [10_001]):
        some = [Moments.of(part) for part in torch.split(x, sizes)]
        joined = sum(some[1:], some[0])
        torch.testing.assert_close(joined.mean, whole.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(joined.scatter, whole.scatter, rtol=1e-10, atol=1e-8)


def cubic(dims, a, b):
    """E (x y / D + 1)^3 of x ~ N(a, I) and y ~ N(b, I)."""
    ab, aa, bb = a @ b, a @ a, b @ b
    second = ab**2 + aa + bb + dims
    third = ab**3 + 3 * ab * (aa + bb + dims + 2)
    return third / dims**3 + 3 * second / dims**2 + 3 * ab / dims + 1


@pytest.mark.parametrize("block", [None, 100])
def test_intervals_hold_the_kernel_distance_of_gaussians(block):
    dims, a, b = 4, np.zeros(4), np.array([0.6, 0, 0, 0])
    truth = cubic(dims, a, a) + cubic(dims, b, b) - 2 * cubic(dims, a, b)
    found = [kernel_distance(*gaussians(i, 300, dims, 0.6), block=block) for i in range(TIMES)]
    share, bias = held(found, truth)
    assert 0.93 <= share <= 0.97
    assert abs(bias) < 4 / math.sqrt(TIMES)


def test_intervals_hold_the_energy_distance_of_gaussians():
    """E|X - Y| of N(d, 2) on a line, folded."""

    def mean(d):
        return 2 / math.sqrt(math.pi) * math.exp(-(d**2) / 4) + d * math.erf(d / 2)

    found = [kernel_distance(*gaussians(i, 200, 1, 0.7), "energy") for i in range(TIMES)]
    share, bias = held(found, 2 * mean(0.7) - 2 * mean(0))
    assert 0.93 <= share <= 0.97
    assert abs(bias) < 4 / math.sqrt(TIMES)


@pytest.mark.parametrize("kernel", ["cubic", "energy", lambda a, b: a @ b.T])
def test_kernel_distance_by_hand(kernel, monkeypatch):
    """All pairs, a few at a time as well; blocks hold every row once."""
    x, y = randn(37, 3), 0.5 + randn(29, 3, seed=1)
    functions = {
        "cubic": lambda a, b: (float(a @ b) / 3 + 1) ** 3,
        "energy": lambda a, b: -float((a - b).norm()),
    }
    k = functions.get(kernel, lambda a, b: float(a @ b)) if isinstance(kernel, str) else lambda a, b: float(a @ b)
    within = [np.mean([k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]) for z in (x, y)]
    right = sum(within) - 2 * np.mean([k(a, b) for a in x for b in y])
    found = kernel_distance(x, y, kernel)
    assert found.value == pytest.approx(right, rel=1e-9)
    monkeypatch.setattr("scorelab.evaluation.kernels._AT_ONCE", 64)
    torch.testing.assert_close(torch.tensor(kernel_distance(x, y, kernel)), torch.tensor(found))


def test_intervals_hold_the_sliced_distance_of_gaussians():
    """On a line it is the shift squared and the difference of deviations squared."""
    found = [sliced_wasserstein(*gaussians(i, 200, 1, 0.5, 1.4), projections=1) for i in range(TIMES)]
    share, bias = held(found, 0.5**2 + 0.4**2)
    assert 0.93 <= share <= 0.97
    assert abs(bias) < 0.25
    null = [sliced_wasserstein(*gaussians(i, 200, 3, 0.0), projections=16) for i in range(40)]
    assert abs(held(null, 0.0)[1]) < 1


def test_sliced_distance_of_sets_of_other_sizes_is_that_of_their_steps():
    """Each row twice and three times: nothing changes of the laws."""
    from scorelab.evaluation.sliced import _squared

    x, y = randn(60, 2).sort(0).values, randn(60, 2, seed=1).sort(0).values
    assert _squared(x.repeat_interleave(2, 0), y.repeat_interleave(3, 0)) == pytest.approx(_squared(x, y), rel=1e-9)


def test_shares_of_neighbours_have_their_means():
    """Of one law density is 1 and coverage 1 - prod (N - 1 - j)/(N + M - 1 - j) on average, in any dimension."""
    n, m, k = 60, 90, 5
    found = [manifold(randn(n, 3, seed=i), randn(m, 3, seed=1000 + i), k_dc=k) for i in range(TIMES)]
    apart = 1 - math.prod((m - 1 - j) / (n + m - 1 - j) for j in range(k))
    for name, right in (("density", 1.0), ("coverage", apart)):
        values = np.array([getattr(f, name).value for f in found])
        assert abs(values.mean() - right) < 4 * values.std() / math.sqrt(TIMES)


def test_neighbours_see_what_is_missing_and_what_is_wrong(monkeypatch):
    data = torch.cat([randn(200, 2), 20 + randn(200, 2, seed=1)])
    one, odd = randn(300, 2, seed=2), torch.cat([data[::2] + 0.01, 99 + randn(100, 2, seed=3)])
    of_one, of_odd = manifold(one, data), manifold(odd, data)
    assert of_one.precision.value > 0.95
    assert 0.4 < of_one.recall.value < 0.55
    assert 0.4 < of_one.coverage.value < 0.55
    assert of_odd.precision.value == pytest.approx(2 / 3, abs=0.01)
    assert of_odd.recall.value > 0.9
    assert manifold(data + 99, data).precision == (0, pytest.approx(math.sqrt(2 / 404 * 402 / 404 / 404)))
    monkeypatch.setattr("scorelab.evaluation.neighbours._AT_ONCE", 1000)
    assert manifold(odd, data) == of_odd


def test_kinds_are_counted():
    """K directions equally often: K; directions of no preference: as many as dimensions, which few rows miss."""
    assert vendi_score(torch.eye(7, dtype=F64).repeat(40, 1) * 3).value == pytest.approx(7, rel=0.02)
    found = [vendi_score(randn(200, 12, seed=i)) for i in range(100)]
    values = np.array([f.value for f in found])
    assert abs(values.mean() - 12) < 0.05
    assert values.std() == pytest.approx(np.mean([f.stderr for f in found]), rel=0.5)
    sure = 100 * torch.eye(5).repeat(200, 1)
    assert inception_score(sure).value == pytest.approx(5, rel=0.05)
    assert inception_score(torch.zeros(100, 5)).value == pytest.approx(1)
    logits = randn(1000, 4)
    p = logits.softmax(1)
    right = math.exp(float((p * (p / p.mean(0)).log()).sum(1).mean()))
    assert inception_score(logits, splits=1).value == pytest.approx(right, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: frechet_distance(x, x), "x has 30 rows of 8 features; expected at least 36"),
        (lambda x: frechet_distance(x.repeat(9, 1), x[:, :4]), r"y has shape \(30, 4\)"),
        (lambda x: frechet_distance(x.repeat(9, 2), x.repeat(9, 2)), "don't vary in some direction"),
        (lambda x: frechet_distance(x.repeat(9, 1) / 0, x.repeat(9, 1)), "not finite"),
        (lambda x: kernel_distance(x, x[:1]), "y has 1 row; expected at least 2"),
        (lambda x: kernel_distance(x, x, "rbf"), "kernel is 'rbf'; expected one of cubic, energy"),
        (lambda x: kernel_distance(x, x, block=1), "block is 1"),
        (lambda x: kernel_distance(x, x[:, :2]), r"y has shape \(30, 2\)"),
        (lambda x: sliced_wasserstein(x, x), "expected at least 40 rows"),
        (lambda x: manifold(x[:4], x), "k is 3 and 5, of 4 and 30 rows"),
        (lambda x: vendi_score(x * 0 if len(x) > 40 else torch.zeros(50, 3)), "all 0"),
        (lambda x: inception_score(x, splits=20), "splits is 20 of 30 rows"),
    ],
)
def test_sets_that_do_not_fit_are_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call(randn(30, 8))


def test_torchmetrics_finds_the_same():
    """On the same features; its kernel distance is of one subset, all rows. torch-fidelity's formulas were compared by
    hand, for it does not import without torchvision."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Given(torch.nn.Identity):
        num_features = 16

    x, y = randn(300, 16), 0.2 + randn(300, 16, seed=1) * torch.linspace(0.5, 1.5, 16)
    fid = FrechetInceptionDistance(feature=Given()).set_dtype(F64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kid = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=300).set_dtype(F64)
    for metric in (fid, kid):
        metric.update(y, real=True)
        metric.update(x, real=False)
    assert frechet_distance(x, y).plain == pytest.approx(float(fid.compute()), rel=1e-6)
    assert kernel_distance(x, y).value == pytest.approx(float(kid.compute()[0]), rel=1e-6)
