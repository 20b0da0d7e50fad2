from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from problems import F64, correlated, generator, mixture, randn, ring
from scipy import integrate, stats

from scorelab.distributions import STD, TARGETS, Checkerboard, Empirical, Gaussian, GaussianMixture, target

EXACT = {"gaussian": correlated, "mixture": mixture, **{n: (lambda n=n: target(n, dtype=F64)) for n in TARGETS}}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("sigma", [0.02, 0.5, 30.0])
def test_score_is_the_gradient_of_log_prob(name, sigma):
    d = EXACT[name]()
    x = d.sample(64, generator()) + sigma * randn(64, *d.data_shape)
    x = torch.cat([x, 20 * x]).requires_grad_()
    (gradient,) = torch.autograd.grad(d.log_prob(x, sigma).sum(), x)
    found = d.score(x.detach(), sigma)
    torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-8 * float(gradient.abs().max()))
    torch.testing.assert_close(d.denoise(x.detach(), sigma), x.detach() + sigma**2 * found)


@pytest.mark.parametrize("name", [n for n in EXACT if n != "gaussian"])
def test_density_integrates_to_one(name):
    d, sigma = EXACT[name](), 0.15
    half = 16.0 if name == "two_modes" else 5.0
    n = 300
    axis = (torch.arange(n, dtype=F64) + 0.5) / n * 2 * half - half
    points = torch.cartesian_prod(axis, axis)
    assert float(d.log_prob(points, sigma).exp().sum()) * (2 * half / n) ** 2 == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", TARGETS)
def test_samples_follow_the_density(name):
    """The mean of log p over samples equals minus the entropy of the density, by quadrature, at 5 standard errors."""
    d, sigma = EXACT[name](), 0.1
    x = d.sample(20_000, generator()) + sigma * randn(20_000, 2)
    half = 16.0 if name == "two_modes" else 4.0
    n = 260
    axis = (torch.arange(n, dtype=F64) + 0.5) / n * 2 * half - half
    log_p = d.log_prob(torch.cartesian_prod(axis, axis), sigma)
    exact = float((log_p.exp() * log_p).sum()) * (2 * half / n) ** 2
    found = d.log_prob(x, sigma)
    assert abs(float(found.mean()) - exact) < 5 * float(found.std()) / math.sqrt(len(x))


def test_gaussian_against_scipy():
    d, sigma = correlated(), 0.7
    x = 3 * randn(40, 3)
    cov = (d.basis * d.variances) @ d.basis.T + sigma**2 * torch.eye(3, dtype=F64)
    expected = stats.multivariate_normal(d.mean.numpy(), cov.numpy()).logpdf(x.numpy())
    torch.testing.assert_close(d.log_prob(x, sigma), torch.tensor(expected))
    drawn = d.sample(200_000, generator())
    torch.testing.assert_close(torch.cov(drawn.T), cov - sigma**2 * torch.eye(3, dtype=F64), rtol=0.02, atol=0.02)


def test_checkerboard_against_quadrature():
    d, sigma = Checkerboard(dtype=F64), 0.4
    for x, y in ((0.3, -0.2), (2.5, 1.0)):
        dark = [(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0]
        total = sum(
            integrate.quad(lambda u, x=x: stats.norm.pdf(x, u, sigma), i - 2, i - 1)[0]
            * integrate.quad(lambda v, y=y: stats.norm.pdf(y, v, sigma), j - 2, j - 1)[0]
            for i, j in dark
        )
        found = d.log_prob(torch.tensor([[x, y]], dtype=F64), sigma)
        assert float(found) == pytest.approx(math.log(total / 8), abs=1e-9)
    inside = d.log_prob(torch.tensor([[-1.5, -1.5], [-0.5, -1.5], [9.0, 0.0]], dtype=F64))
    assert inside.tolist() == [-math.log(8), -math.inf, -math.inf]
    mixed = d.log_prob(torch.tensor([[-1.5, -1.5], [0.3, -0.2]], dtype=F64), torch.tensor([0.0, 0.4], dtype=F64))
    assert mixed.tolist() == [-math.log(8), float(d.log_prob(torch.tensor([[0.3, -0.2]], dtype=F64), 0.4))]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("sigma", [0.0, 0.1, 5.0])
def test_mixtures_are_right_ten_thousand_deviations_away(dtype, sigma):
    for name in ("ring", "grid", "two_modes", "moons"):
        d = target(name, dtype=dtype)
        scale = math.hypot(STD[name], sigma)
        # a direction in which one centre is nearest by a clear margin
        direction = torch.tensor([[math.cos(0.31), math.sin(0.31)], [math.cos(2.9), math.sin(2.9)]], dtype=dtype)
        x = 1e4 * scale * direction
        near = d.means[torch.cdist(x.double(), d.means.double()).argmin(1)]
        expected = -(x - near) / scale**2
        torch.testing.assert_close(d.score(x, sigma), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_checkerboard_is_right_ten_thousand_deviations_away():
    for dtype in (torch.float32, F64):
        d, sigma = Checkerboard(dtype=dtype), 0.1
        x = torch.tensor([[1000.0, 0.4], [-1000.0, -1.5]], dtype=dtype)
        found = d.score(x, sigma)
        torch.testing.assert_close(
            found[:, 0], torch.tensor([-(1000.0 - 2), 998.0], dtype=dtype) / sigma**2, rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("sigma", [0.9, 30.0, 3e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_checkerboard_keeps_its_digits_at_large_noise(sigma, dtype):
    """Beside Gauss-Legendre quadrature over its squares: score = (E[x0 | x] - x) / sigma^2."""
    d = Checkerboard(dtype=dtype)
    x = (sigma * randn(40, 2)).to(dtype)
    nodes, weights = (torch.tensor(v) for v in np.polynomial.legendre.leggauss(24))
    # (columns, nodes): positions along one axis, and the mass and first moment of each column, (B, 2, columns)
    place = d.edges.double()[:, None] + d.side * (nodes + 1) / 2
    exponent = -((x.double()[:, :, None, None] - place) ** 2) / (2 * sigma**2)
    scale = exponent.amax((2, 3), keepdim=True)
    density = (exponent - scale).exp() * weights * d.side / 2
    mass, moment = density.sum(3), (density * place).sum(3)
    squares = mass[:, 0, d.columns] * mass[:, 1, d.lines]
    first = (moment[:, 0, d.columns] * mass[:, 1, d.lines]).sum(1) / squares.sum(1)
    second = (mass[:, 0, d.columns] * moment[:, 1, d.lines]).sum(1) / squares.sum(1)
    score = (torch.stack([first, second], 1) - x.double()) / sigma**2
    area = len(d.columns) * d.side**2 * 2 * math.pi * sigma**2
    log_prob = squares.sum(1).log() + scale.flatten(1).sum(1) - math.log(area)
    eps = torch.finfo(dtype).eps
    # of a single number far from the board, or of a few of them
    assert ((d.score(x, sigma) - score).abs() <= 30 * eps * score.abs().amax(1, keepdim=True)).all()
    assert ((d.log_prob(x, sigma) - log_prob).abs() <= 30 * eps * log_prob.abs()).all()


@pytest.mark.parametrize("cov", [torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 2.0], [2.0, 4.0]]), 0.0])
def test_a_singular_gaussian_has_no_density_without_noise(cov):
    d, x = Gaussian(torch.zeros(2), cov), torch.ones(3, 2)
    for fn in (d.score, d.log_prob):
        with pytest.raises(ValueError, match=r"variances of 0 has no density at sigma = 0; expected sigma > 0"):
            fn(x, 0.0)
        with pytest.raises(ValueError, match="no density"):
            fn(x, torch.tensor([1.0, 0.0, 1.0]))
        assert torch.isfinite(fn(x, 0.1)).all()
    thin = Gaussian(torch.zeros(2, dtype=F64), torch.diag(torch.tensor([1.0, 1e-10], dtype=F64)))
    assert torch.isfinite(thin.score(x.double(), 0.0)).all()


def test_large_mixtures_refine_the_nearest_distances():
    """4,000 centres of dimension 100 take the matrix product; in float32 near a centre it must keep its digits."""
    centres = 5 * torch.randn(4000, 100, generator=generator())
    d, exact = Empirical(centres), Empirical(centres.double())
    x = centres[:32] + 0.01 * torch.randn(32, 100, generator=generator(1))
    torch.testing.assert_close(d.log_prob(x, 0.01).double(), exact.log_prob(x.double(), 0.01), rtol=1e-4, atol=0)
    torch.testing.assert_close(d.score(x, 0.01).double(), exact.score(x.double(), 0.01), rtol=1e-3, atol=0.05)


def test_one_sigma_a_sample_equals_one_at_a_time():
    sigma = torch.tensor([0.1, 1.0, 7.0], dtype=F64)
    for d in (correlated(), mixture(), ring(), Checkerboard(dtype=F64)):
        x = randn(3, *d.data_shape)
        for fn in (d.score, d.denoise, d.log_prob):
            each = torch.cat([fn(x[i : i + 1], sigma[i]) for i in range(3)])
            torch.testing.assert_close(fn(x, sigma), each)


def test_chunking_changes_nothing(monkeypatch):
    d, x = ring(), randn(100, 2)
    whole = d.score(x, 0.3)
    monkeypatch.setattr("scorelab.distributions.base.CHUNK", 64)
    torch.testing.assert_close(d.score(x, 0.3), whole)
    torch.testing.assert_close(d.score(x, torch.full((100,), 0.3, dtype=F64)), whole)


_MEMORY = """
import resource, torch
from scorelab.distributions import Empirical
data = torch.rand(60_000, 784)
e = Empirical(data)
x = data[:100] + 0.5 * torch.randn(100, 784)
assert e.score(x, 0.5).isfinite().all() and e.log_prob(x, 0.5).isfinite().all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def test_sixty_thousand_centres_stay_under_two_gibibytes():
    peak = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True)
    assert float(peak.stdout) < 2


def test_targets_are_what_they_are_called():
    two = target("two_modes")
    assert isinstance(two, GaussianMixture)
    torch.testing.assert_close(two.weights, torch.tensor([0.8, 0.2]))
    assert two.means.tolist() == [[5.0, 5.0], [-5.0, -5.0]]
    assert len(ring().means) == 8
    assert STD["ring"] == 0.08
    for name in TARGETS:
        d = target(name)
        if isinstance(d, GaussianMixture) and len(d.means) > 25:
            extent = float((d.means.max(0).values - d.means.min(0).values).max())
            assert STD[name] <= 0.05 * extent
            gaps = torch.cdist(d.means, d.means).fill_diagonal_(9).min(1).values
            assert float(gaps.max()) < 0.7 * STD[name]
    with pytest.raises(ValueError, match="did you mean 'moons'"):
        target("moon")


def test_bad_input_is_refused():
    d = ring()
    with pytest.raises(ValueError, match=r"expected \(B, 2\)"):
        d.score(randn(4, 3), 0.1)
    with pytest.raises(ValueError, match="batch"):
        d.log_prob(randn(2))
    with pytest.raises(ValueError, match="sigma is -1"):
        d.score(randn(4, 2), -1.0)
    with pytest.raises(ValueError, match=r"sigma spans \[-1, -1\]"):
        d.score(randn(4, 2), torch.tensor(-1.0))
    with pytest.raises(ValueError, match="no density at sigma = 0"):
        Empirical(randn(5, 2)).log_prob(randn(4, 2))
    with pytest.raises(ValueError, match="no score at sigma = 0"):
        Checkerboard(dtype=F64).score(randn(4, 2), 0.0)
    with pytest.raises(ValueError, match="NaN"):
        GaussianMixture(torch.tensor([[math.nan]]), 1.0)
    with pytest.raises(ValueError, match="symmetric"):
        Gaussian(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="below 0"):
        Gaussian(torch.zeros(2), torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="weights"):
        GaussianMixture(torch.zeros(2, 2), 1.0, torch.tensor([1.0, -1.0]))
