"""Posterior scores against the scores of posteriors in closed form."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from problems import F64, correlated, generator, randn

from scorelab import VE, PerSampleNoise, ScoreModel, log_likelihood, sample, sigmas
from scorelab.distributions import Gaussian, GaussianMixture
from scorelab.inverse import (
    DPS,
    Blur,
    Inpainting,
    LinearFunction,
    Matrix,
    Measurement,
    NonlinearFunction,
    SuperResolution,
    dps,
    exact_posterior,
    moment_matching,
    plug_in,
    pseudo_inverse,
)
from scorelab.inverse.solvers import conjugate_gradients, gmres
from scorelab.models import Constant, LogSigma
from scorelab.nn import MLP, UNet
from scorelab.predictions import edm
from scorelab.samplers import Heun

LEVELS = (0.01, 0.3, 2.0, 40.0)
DIAGONAL = Gaussian(randn(6, seed=11), torch.linspace(0.01, 4, 6, dtype=F64))
_A = randn(6, 6, seed=12)
FULL = Gaussian(randn(6, seed=11), _A @ _A.T / 6)
ROUND = Gaussian(randn(6, seed=11), 0.49)
MIX = GaussianMixture(randn(4, 6, seed=13), torch.tensor([0.3, 0.5, 0.4, 0.2], dtype=F64))

OPERATORS = {
    "known": Inpainting(torch.tensor([True, False, True, True, False, False])),
    "matrix": Matrix(randn(3, 6, seed=14)),
    "tall": Matrix(randn(8, 6, seed=15)),
    "rank 2": Matrix(randn(4, 2, seed=1) @ randn(2, 6, seed=2)),
    "function": LinearFunction(lambda x: x.cumsum(1)[:, 1::2], randn(2, 6)),
}


def measured(prior, operator, noise_std, rows=1, seed=3):
    x0 = prior.sample(rows, generator(seed))
    y = operator(x0)
    return Measurement(operator, y + noise_std * torch.randn(y.shape, dtype=F64, generator=generator(50)), noise_std)


def at(sigma):
    return torch.tensor(sigma, dtype=F64)


def test_the_closed_form_is_bayes_rule():
    """log p(x0 | y) - log p(x0) - log p(y | x0) is the same for every x0."""
    x0 = randn(50, 6)
    for prior in (DIAGONAL, FULL, MIX):
        for operator in OPERATORS.values():
            m = measured(prior, operator, 0.4)
            gap = exact_posterior(prior, m).log_prob(x0) - prior.log_prob(x0) - m.log_likelihood(x0)
            torch.testing.assert_close(gap, gap[:1].expand(50), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("noise_std", [0.0, 0.3])
def test_noiseless_posteriors_keep_what_was_measured(noise_std):
    m = measured(MIX, OPERATORS["matrix"], noise_std)
    off = m.residual(exact_posterior(MIX, m).sample(100, generator()))
    assert (float(off.abs().max()) < 1e-6) == (noise_std == 0)


@pytest.mark.parametrize("noise_std", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("prior", [DIAGONAL, FULL], ids=["diagonal", "correlated"])
def test_moment_matching_is_exact_on_gaussians(prior, name, noise_std):
    m = measured(prior, OPERATORS[name], noise_std)
    exact = exact_posterior(prior, m)
    for sigma in LEVELS:
        x = exact.sample(5, generator(1)) + sigma * randn(5, 6, seed=2)
        expected = exact.score(x, sigma)
        for options in ({}, {"solver": "gmres"}, {"symmetrise": True}):
            found = moment_matching(prior.score, m, tol=1e-12, **options)(x, at(sigma))
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("sigma", [0.1, 0.8, 5.0])
def test_moment_matching_is_its_formula_on_mixtures(sigma):
    """Beside dense algebra with the whole Jacobian, a sample at a time."""
    m, a = measured(MIX, OPERATORS["matrix"], 0.3), randn(3, 6, seed=14)
    x = MIX.sample(4, generator(1)) + sigma * randn(4, 6, seed=2)
    found = moment_matching(MIX.score, m, tol=1e-12)(x, at(sigma))
    for row, score in zip(x, found, strict=True):
        j = torch.autograd.functional.jacobian(lambda z: MIX.denoise(z[None], sigma)[0], row)
        off = m.y[0] - a @ MIX.denoise(row[None], sigma)[0]
        system = sigma**2 * a @ j @ a.T + 0.09 * torch.eye(3, dtype=F64)
        expected = MIX.score(row[None], sigma)[0] + j.T @ a.T @ torch.linalg.solve(system, off)
        torch.testing.assert_close(score, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", OPERATORS)
def test_posterior_scores_have_their_limit_at_no_noise(name):
    """grad log p(x) + A'(y - A x)/noise_std^2, Bayes' rule at sigma = 0; none where y has no noise either."""
    m = measured(FULL, OPERATORS[name], 0.2)
    x = FULL.sample(3, generator(1))
    expected = FULL.score(x, 0.0) + m.operator.adjoint(m.y - m.operator(x)) / 0.04
    made = (moment_matching, lambda s, m: moment_matching(s, m, solver="gmres"), lambda s, m: pseudo_inverse(s, m, 0.7))
    for method in made:
        for sigma in (0.0, at(0.0), torch.zeros(3, dtype=F64), 1e-9):
            torch.testing.assert_close(method(FULL.score, m)(x, sigma), expected, rtol=1e-6, atol=1e-6)
        with pytest.raises(ValueError, match="sigma is 0, and so is noise_std, .* expected a positive noise level"):
            method(FULL.score, Measurement(m.operator, m.y))(x, 0.0)
    assert torch.equal(pseudo_inverse(FULL.score, m, 0.7, adaptive=True)(x, 0.0), FULL.score(x, 0.0))


@pytest.mark.parametrize("noise_std", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("name", OPERATORS)
def test_pseudo_inverse_guidance_is_exact_on_round_gaussians(name, noise_std):
    m = measured(ROUND, OPERATORS[name], noise_std)
    exact = exact_posterior(ROUND, m)
    for sigma in LEVELS:
        x = exact.sample(5, generator(1)) + sigma * randn(5, 6, seed=2)
        expected = exact.score(x, sigma)
        found = pseudo_inverse(ROUND.score, m, 0.7)(x, at(sigma))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
        # the release's weighting is the likelihood's score times r^2
        ratio = 0.49 * sigma**2 / (0.49 + sigma**2)
        released = pseudo_inverse(ROUND.score, m, 0.7, adaptive=True)(x, at(sigma))
        prior = ROUND.score(x, sigma)
        torch.testing.assert_close(released - prior, ratio * (found - prior), rtol=1e-9, atol=1e-9)


def test_images_of_blurs_and_means():
    """Complex coordinates, and operators without any, on N(m, s^2 I) of images."""
    prior = Gaussian(randn(2, 4, 4), 0.25)
    blur = Blur(torch.tensor([[0.2, 0.5], [0.1, 0.2]], dtype=F64), (2, 4, 4))
    for operator in (blur, SuperResolution((2, 4, 4), 2), SuperResolution((2, 4, 4), 2) @ blur):
        m = measured(prior, operator, 0.1)
        exact, x = exact_posterior(prior, m), 2 * randn(3, 2, 4, 4, seed=4)
        for score in (pseudo_inverse(prior.score, m, 0.5), moment_matching(prior.score, m, tol=1e-12)):
            torch.testing.assert_close(score(x, at(1.3)), exact.score(x, 1.3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sigma", LEVELS)
def test_dps_is_its_closed_form(sigma):
    """On a Gaussian x0_hat = m + J (x - m), J = C (C + sigma^2)^-1."""
    m = measured(FULL, OPERATORS["matrix"], 0.3)
    x, a = randn(5, 6, seed=2), randn(3, 6, seed=14)
    c = _A @ _A.T / 6
    j = c @ torch.linalg.inv(c + sigma**2 * torch.eye(6, dtype=F64))
    off = m.y - (FULL.mean + (x - FULL.mean) @ j.T) @ a.T
    expected = FULL.score(x, sigma) + 0.7 * off @ a @ j / 0.09
    torch.testing.assert_close(dps(FULL.score, m, 0.7)(x, at(sigma)), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(plug_in(FULL.score, m.log_likelihood, 0.7)(x, at(sigma)), expected, rtol=1e-9, atol=1e-9)


def test_any_operator_and_any_likelihood():
    """A product of numbers, differentiated by hand at a flat denoiser: x0_hat = x where sigma tends to 0."""
    operator = NonlinearFunction(lambda x: x[:, :1] * x[:, 1:2], randn(1, 6))
    m = Measurement(operator, torch.tensor([[0.5]], dtype=F64), 0.2)
    x, sigma = randn(4, 6, seed=2), at(1e-6)
    off = (0.5 - x[:, :1] * x[:, 1:2]) / 0.04
    slope = torch.cat([off * x[:, 1:2], off * x[:, :1], torch.zeros(4, 4, dtype=F64)], 1)
    torch.testing.assert_close(dps(FULL.score, m)(x, sigma) - FULL.score(x, sigma), slope, rtol=1e-5, atol=1e-5)
    for made in (lambda: pseudo_inverse(FULL.score, m, 1.0), lambda: moment_matching(FULL.score, m)):
        with pytest.raises(TypeError, match="the operator, NonlinearFunction, has no adjoint and this method needs"):
            made()


def methods(m):
    return {
        "dps": dps(Splittable(), m),
        "pseudo-inverse": pseudo_inverse(Splittable(), m, 1.0),
        "moment matching": moment_matching(Splittable(), m, tol=1e-12),
        "gmres": moment_matching(Splittable(), m, tol=1e-12, solver="gmres"),
    }


@pytest.mark.parametrize("name", ["dps", "pseudo-inverse", "moment matching", "gmres"])
@pytest.mark.parametrize("each", [False, True], ids=["one y", "a y for each"])
def test_rows_are_rows(name, each):
    m = measured(MIX, OPERATORS["function"], 0.3, rows=64 if each else 1)
    score = methods(m)[name]
    x, levels = 3 * randn(64, 6), torch.linspace(0.05, 9, 64, dtype=F64)
    for sigma in (at(0.7), levels):
        whole = score(x, sigma)
        for index in (torch.tensor([5]), torch.tensor([60, 2, 33])):
            few = score.rows(index) if each else score
            part = few(x[index], sigma if sigma.ndim == 0 else sigma[index])
            torch.testing.assert_close(part, whole[index], rtol=1e-8, atol=1e-8)


class Splittable:
    """The mixture's score, which no batch binds."""

    def __call__(self, x, sigma):
        return MIX.score(x, sigma)

    def rows(self, index):
        return self


def test_batches_are_split_with_their_measurements():
    m = measured(MIX, OPERATORS["matrix"], 0.3, rows=10)
    grid = sigmas.karras(8, sigma_min=0.02, sigma_max=20.0)
    for made in (lambda s: dps(s, m, 0.05), lambda s: pseudo_inverse(s, m, 1.0), lambda s: moment_matching(s, m)):
        score = made(Splittable())
        whole = sample(score, (10, 6), grid, generator=PerSampleNoise(0), dtype=F64)
        parts = sample(score, (10, 6), grid, generator=PerSampleNoise(0), dtype=F64, batch_size=3)
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)
        assert not hasattr(made(MIX.score), "rows")


def network(classes=3):
    torch.manual_seed(0)
    net = MLP((6,), width=16, depth=2, features=4, num_classes=classes, null_class=True)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return ScoreModel(
        net, VE(0.01, 20.0), edm(1.0), data_shape=(6,), input_scale=Constant(1.0), label=LogSigma(1.0)
    ).eval()


def test_networks_are_conditioned_on_measurements():
    """In float32; labels and measurements are split together."""
    labels = torch.arange(10) % 3
    m = measured(MIX, OPERATORS["matrix"], 0.5, rows=10)
    m = Measurement(m.operator, m.y.float(), 0.5)
    bound = network().conditioned(labels)
    x, index = randn(10, 6).float(), torch.tensor([7, 2, 3])
    methods = {
        "dps": dps(bound, m),
        "pseudo-inverse": pseudo_inverse(bound, m, 1.0),
        "moments": moment_matching(bound, m, solver="gmres", symmetrise=True, tol=1e-5),
    }
    for score in methods.values():
        whole = score(x, torch.tensor(0.8))
        assert whole.dtype == torch.float32
        assert not whole.requires_grad
        torch.testing.assert_close(score.rows(index)(x[index], torch.tensor(0.8)), whole[index], rtol=1e-3, atol=1e-3)
        assert score.sigma_range == bound.sigma_range


@pytest.mark.parametrize("options", [{}, {"solver": "gmres", "symmetrise": True}])
def test_half_precision_costs_digits_and_nothing_else(options):
    m = measured(MIX, OPERATORS["matrix"], 0.5)
    x = randn(10, 6).bfloat16()
    for made in (dps, lambda s, m: pseudo_inverse(s, m, 1.0), lambda s, m: moment_matching(s, m, tol=1e-3, **options)):
        low = made(MIX.score, m)(x, torch.tensor(0.8))
        assert low.dtype == torch.bfloat16
        whole = made(MIX.score, m)(x.double(), at(0.8))
        assert float((low.double() - whole).norm() / whole.norm()) < 0.05


class Target:
    """A likelihood bound to rows."""

    def __init__(self, y):
        self.y = y

    def __call__(self, x0):
        return -(x0.sum(1) - self.y).square()

    def rows(self, index):
        return Target(self.y[index])


def test_any_likelihood_is_split_with_its_rows():
    score, x, index = plug_in(Splittable(), Target(randn(10, seed=4))), randn(10, 6), torch.tensor([7, 2])
    torch.testing.assert_close(score.rows(index)(x[index], at(0.8)), score(x, at(0.8))[index])


class WithVariance(Splittable):
    """A learned variance beside the score."""

    def score_and_variance(self, x, sigma):
        return MIX.score(x, sigma), torch.full_like(x, 0.3)


def test_learned_variance_is_passed_on():
    m = measured(MIX, OPERATORS["matrix"], 0.5)
    for score in (dps(WithVariance(), m), moment_matching(WithVariance(), m)):
        x = randn(4, 6)
        found, v = score.score_and_variance(x, at(0.8))
        torch.testing.assert_close(found, score(x, at(0.8)))
        assert torch.equal(v, torch.full_like(x, 0.3))
    assert not hasattr(dps(Splittable(), m), "score_and_variance")


def test_posteriors_have_densities_and_gradients():
    """The graph is kept where it is asked for: the probability flow's density of a Gaussian's posterior."""
    prior, operator = correlated(), Matrix(randn(1, 3, seed=2))
    m = measured(prior, operator, 0.5)
    exact = exact_posterior(prior, m)
    x = exact.sample(4, generator(5))
    score = moment_matching(prior.score, m, tol=1e-12)
    found = log_likelihood(score, x, 0.1, 9.0, prior=lambda z: exact.log_prob(z, 9.0), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.log_prob, exact.log_prob(x, 0.1), rtol=1e-6, atol=1e-6)
    x.requires_grad_(True)
    for made in (dps, lambda s, m: pseudo_inverse(s, m, 1.0), moment_matching):
        score = made(prior.score, m)
        assert torch.autograd.gradcheck(lambda x, score=score: score(x, at(0.8)), (x[:1],))


def test_solvers_solve():
    """Beside dense solutions, rows of different condition; a matrix that is not symmetric is GMRES's."""
    root = randn(3, 7, 7)
    spd = root @ root.mT + torch.tensor([10.0, 0.1, 1e-2], dtype=F64).reshape(3, 1, 1) * torch.eye(7, dtype=F64)
    b = randn(3, 7, seed=1)
    for solve, matrix in ((conjugate_gradients, spd), (gmres, spd), (gmres, root)):
        found = solve(lambda z, a=matrix: (a @ z.unsqueeze(2)).squeeze(2), b, 1e-12, 60)
        torch.testing.assert_close(found, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-6)
    # a right side of 0, and one iteration where there is one eigenvalue
    assert torch.equal(conjugate_gradients(lambda z: 2 * z, torch.zeros(2, 3), 1e-6, 5), torch.zeros(2, 3))
    assert torch.equal(gmres(lambda z: 2 * z, torch.zeros(2, 3), 1e-6, 5), torch.zeros(2, 3))
    torch.testing.assert_close(gmres(lambda z: 2 * z, b, 1e-12, 1), b / 2)
    with pytest.warns(RuntimeWarning, match="conjugate gradients left a relative residual of .* after 2 iterations"):
        conjugate_gradients(lambda z: (spd @ z.unsqueeze(2)).squeeze(2), b, 1e-12, 2)
    with pytest.warns(RuntimeWarning, match="GMRES left"):
        gmres(lambda z: (root @ z.unsqueeze(2)).squeeze(2), b, 1e-12, 2)
    with pytest.raises(ValueError, match="GMRES met numbers that are not finite"):
        gmres(lambda z: z / 0, b, 1e-12, 2)


def test_conjugate_gradients_keep_their_best_where_they_fail():
    """No sample is thrown away by a matrix that is not positive: residuals are at most those of z = 0."""
    root = randn(20, 7, 7)
    matrix, b = root + root.mT, randn(20, 7, seed=1)
    with pytest.warns(RuntimeWarning, match="conjugate gradients left"):
        z = conjugate_gradients(lambda z: (matrix @ z.unsqueeze(2)).squeeze(2), b, 1e-12, 60)
    left = (b - (matrix @ z.unsqueeze(2)).squeeze(2)).norm(dim=1)
    assert bool((left <= b.norm(dim=1) * (1 + 1e-12)).all())


def test_attention_is_differentiated_twice():
    """Symmetrised Jacobians and kept graphs of a network whose fused attention has no second derivative on a CPU."""
    torch.manual_seed(0)
    net = UNet((1, 4, 4), width=8, multipliers=(1,), blocks=1, attention=(0,), head=8)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model = ScoreModel(net, VE(0.01, 20.0), edm(1.0), data_shape=(1, 4, 4), label="log_sigma").eval()
    m, x = Measurement(SuperResolution((1, 4, 4), 2), torch.zeros(1, 1, 2, 2), 0.5), randn(2, 1, 4, 4).float()
    found = moment_matching(model, m, solver="gmres", symmetrise=True)(x, torch.tensor(0.8))
    assert found.isfinite().all()
    x.requires_grad_(True)
    (slope,) = torch.autograd.grad(dps(model, m)(x, torch.tensor(0.8)).square().sum(), x)
    assert slope.isfinite().all()


def test_jacobians_that_are_not_symmetric():
    """A linear field that is no gradient: GMRES solves with J', symmetrised ones with (J + J')/2; CG says it fails."""
    b = -(torch.eye(6, dtype=F64) * 0.4 + 0.3 * randn(6, 6, seed=3))

    def field(x, sigma):
        return x @ b.T

    m = Measurement(Matrix(randn(3, 6, seed=14)), randn(1, 3), 0.3)
    x, sigma, a = randn(4, 6), 0.8, randn(3, 6, seed=14)
    j = torch.eye(6, dtype=F64) + sigma**2 * b
    off = m.y - (x @ j.T) @ a.T
    for options, inner in (({"solver": "gmres"}, j.T), ({"solver": "gmres", "symmetrise": True}, (j + j.T) / 2)):
        system = sigma**2 * a @ inner @ a.T + 0.09 * torch.eye(3, dtype=F64)
        expected = field(x, sigma) + torch.linalg.solve(system, off.T).T @ a @ j
        found = moment_matching(field, m, tol=1e-12, **options)(x, at(sigma))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    with pytest.warns(RuntimeWarning, match="take solver='gmres' where the score's Jacobian is not symmetric"):
        moment_matching(field, m, tol=1e-12)(x, at(sigma))


@pytest.mark.parametrize("solver", ["cg", "gmres"])
def test_negative_variances_are_told(solver):
    """J = diag(1, -1), sigma = 1: of y = x0 + noise, variances 1 and -1 beside noise_std^2, which makes up for 4."""
    j = torch.tensor([1.0, -1.0], dtype=F64)
    m = Measurement(Inpainting(torch.tensor([True, True])), torch.tensor([[3.0, 2.0]], dtype=F64), 2.0)
    x = randn(4, 2)
    expected = (j - 1) * x + j * (m.y - j * x) / (j + 4)
    found = moment_matching(lambda x, s: (j - 1) * x, m, solver=solver)(x, at(1.0))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    less = moment_matching(lambda x, s: (j - 1) * x, Measurement(m.operator, m.y, 0.1), solver=solver)
    with pytest.warns(RuntimeWarning) as told:
        less(x, at(1.0))
    assert sum("gives y negative variances" in str(w.message) for w in told) == 1


def test_single_precision_converges():
    """tol beyond float32's digits ends at its rounding, without a warning."""
    m = measured(FULL, OPERATORS["matrix"], 0.3)
    exact, x = exact_posterior(FULL, m), randn(5, 6, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = moment_matching(FULL.score, m, tol=1e-9)(x.float(), torch.tensor(0.8))
    torch.testing.assert_close(found.double(), exact.score(x, 0.8), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("made", "error", "said"),
    [
        (lambda m: dps(MIX.score, Measurement(m.operator, m.y)), ValueError, "noise_std is 0, and this method divides"),
        (lambda m: dps(MIX.score, m, math.nan), ValueError, "scale is nan; expected a finite number: 1 is the post"),
        (lambda m: pseudo_inverse(MIX.score, m, 0.0), ValueError, "data_std is 0; expected the data's standard"),
        (lambda m: moment_matching(MIX.score, m, solver="lu"), ValueError, "solver is 'lu'; expected 'cg' or 'gmres'"),
        (lambda m: moment_matching(MIX.score, m, iterations=0), ValueError, "iterations = 0; expected 0 < tol < 1"),
        (lambda m: plug_in(MIX.score, None), TypeError, "log_likelihood is None; expected a function of x0_hat"),
        (lambda m: dps(None, m), TypeError, "got NoneType; expected a callable"),
        (
            lambda m: plug_in(MIX.score, lambda x: x.sum())(randn(2, 6), at(1.0)),
            ValueError,
            r"log_likelihood returned shape \(\); expected \(2,\): one a sample",
        ),
        (
            lambda m: plug_in(MIX.score, lambda x: x.detach().sum(1))(randn(2, 6), at(1.0)),
            ValueError,
            "the log_likelihood's output carries no gradient",
        ),
        (
            lambda m: dps(lambda x, s: MIX.score(x, s).detach(), m)(randn(2, 6), at(1.0)),
            ValueError,
            "the score's output carries no gradient",
        ),
        (
            lambda m: exact_posterior(MIX, Measurement(m.operator, m.y.expand(2, -1))),
            ValueError,
            "y has 2 rows; expected one",
        ),
        (lambda m: exact_posterior(None, m), TypeError, "prior is NoneType; expected a Gaussian or a GaussianMixture"),
    ],
)
def test_what_is_no_posterior_is_refused(made, error, said):
    with pytest.raises(error, match=said):
        made(measured(MIX, OPERATORS["matrix"], 0.3))


def test_the_example_of_the_page_runs():
    text = (Path(__file__).parent.parent / "docs" / "inverse.md").read_text()
    block, editing = re.findall(r"```python\n(.*?)```", text, re.S)
    edited: dict[str, object] = {}
    exec(compile(editing, "docs/inverse.md", "exec"), edited)
    for name in ("between", "as_one", "varied"):
        image = edited[name]
        assert isinstance(image, torch.Tensor)
        assert image.shape == (1, 1, 8, 8)
        assert float(image.abs().max()) < 1.5
    made: dict[str, object] = {}
    exec(compile(block, "docs/inverse.md", "exec"), made)
    x, known = made["x"], made["known"]
    assert isinstance(x, torch.Tensor)
    # N(0, 0.25) given 1 with noise 0.1: mean 1/(1 + 0.04), variance 0.0025/0.26 + the last level's
    off = x[..., :4] - 1 / 1.04
    assert float(off.mean().abs()) < 5 * math.sqrt(0.0097 / off.numel()) + 0.01
    assert isinstance(known, torch.Tensor)
    assert float(x[:, ~known].std()) == pytest.approx(0.5, abs=0.05)


def test_inference_mode_is_refused_where_it_differentiates_and_spoils_no_operator():
    operator, x = Matrix(randn(3, 6, seed=14).float()), randn(2, 6).float()
    with torch.inference_mode():
        y = operator(ROUND.mean.float()[None])
        steered = dps(ROUND.score, Measurement(operator, y, 0.3))
        for made, sampler in ((steered, Heun()), (ROUND.score, DPS(Measurement(operator, y)))):
            with pytest.raises(ValueError, match=r"inference_mode is on; expected torch.no_grad"):
                sample(made, x, (2.0, 1.0), sampler)
        late = x + 0
    exact = Measurement(operator, y.clone(), 0.3)
    torch.testing.assert_close(dps(ROUND.score, exact)(late, torch.tensor(1.0)), steered(x, torch.tensor(1.0)))


def test_samples_that_grow_without_bound_are_warned_of():
    """The score form of DPS is stiff where the noise is small: Heun's steps are too long for it."""
    x0, y = Gaussian(torch.zeros(4, dtype=F64), 1.0), torch.tensor([[1.0, -0.5]], dtype=F64)
    a = torch.tensor([[1.0, 0.5, 0.0, 0.0], [0.0, 1.0, -1.0, 0.5]], dtype=F64)
    score = dps(x0.score, Measurement(Matrix(a), y, 0.1))
    levels = sigmas.karras(100, sigma_min=0.005, sigma_max=40)
    with pytest.warns(RuntimeWarning, match="samples have grown to .* steps of Heun are too long for this score"):
        sample(score, (8, 4), levels, dtype=F64, generator=generator())
