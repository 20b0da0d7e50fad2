from __future__ import annotations

import math

import pytest
import torch
from problems import F64, correlated, generator, mixture, randn, ring

from scorelab import PerSampleNoise, bits_per_dim, divergence, log_likelihood, sample_log_prob
from scorelab.distributions import TARGETS, Gaussian, GaussianMixture, target
from scorelab.evaluation import kl_to_model

LOW, HIGH = 0.05, 30.0


@pytest.mark.parametrize("name", ["mixture", "correlated", *TARGETS])
def test_exact_scores_give_exact_densities(name):
    d = {"mixture": mixture, "correlated": correlated}.get(name, lambda: target(name, dtype=F64))()
    x = d.sample(40, generator()) + LOW * randn(40, *d.data_shape)
    found = log_likelihood(d.score, x, LOW, HIGH, prior=lambda z: d.log_prob(z, HIGH), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.log_prob, d.log_prob(x, LOW), rtol=0, atol=1e-4)
    assert found.stderr is None
    assert found.latent.shape == x.shape


def test_the_default_prior_is_off_by_what_the_exact_prior_says():
    """KL through the default prior is KL of the exact p(.; sigma_max) to that prior: the flow itself loses nothing."""
    d, high = ring(), 3.0
    found = kl_to_model(d, d.score, LOW, high, count=2000, data_std=math.sqrt(0.5 + 0.08**2), generator=generator())
    x = d.sample(200_000, generator(1)) + high * randn(200_000, 2, seed=2)
    prior = Gaussian(torch.zeros(2, dtype=F64), 0.5 + 0.08**2 + high**2)
    expected = float((d.log_prob(x, high) - prior.log_prob(x)).mean())
    assert found.value == pytest.approx(expected, abs=4 * found.stderr + 2e-4)
    assert expected < 1e-3


def test_hutchinson_is_unbiased_and_says_its_error():
    """200 rows on a mixture, each with its probe: the mean is within 3 standard errors of the exact value, and errors
    match in size."""
    d = mixture()
    x = torch.tensor([[0.5, 0.8], [-0.6, 1.2]], dtype=F64)
    exact = d.log_prob(x, 0.1)
    options = {"prior": lambda z: d.log_prob(z, HIGH), "divergence": "hutchinson", "rtol": 1e-4, "atol": 1e-4}
    values = log_likelihood(d.score, x.repeat(200, 1), 0.1, HIGH, probes=1, generator=generator(), **options).log_prob
    values = values.reshape(200, 2)
    assert bool((values.std(0) > 1e-3).all())  # probes do matter here: the target is not Gaussian
    gap = (values.mean(0) - exact).abs() / (values.std(0) / math.sqrt(200))
    assert float(gap.max()) < 3
    many = log_likelihood(d.score, x, 0.1, HIGH, probes=200, generator=generator(), **options)
    assert many.stderr is not None
    torch.testing.assert_close(many.stderr, values.std(0) / math.sqrt(200), rtol=0.35, atol=0)


def test_divergences():
    d, x = mixture(), randn(7, 2)
    sigma = torch.tensor(0.3, dtype=F64)
    hessians = torch.stack([torch.autograd.functional.hessian(lambda y: d.log_prob(y[None], 0.3)[0], row) for row in x])
    expected = hessians.diagonal(dim1=1, dim2=2).sum(1)
    value, trace = divergence.exact(lambda y: d.score(y, sigma), x)
    torch.testing.assert_close(value, d.score(x, sigma))
    torch.testing.assert_close(trace, expected)
    # with probes e1 sqrt(2), e2 sqrt(2), whose mean outer product is I, Hutchinson is exact
    probes = math.sqrt(2) * torch.eye(2, dtype=F64)[:, None].expand(2, 7, 2)
    _, mean, single = divergence.hutchinson(lambda y: d.score(y, sigma), x, probes)
    torch.testing.assert_close(mean, expected)
    assert single.shape == (2, 7)


def test_images_and_conditions_that_split():
    def score(x, s):
        return -x / (1 + s.reshape(-1, 1, 1, 1) ** 2)

    x = randn(3, 1, 2, 2)
    prior = Gaussian(torch.zeros(1, 2, 2, dtype=F64), 1.0 + 10.0**2)
    found = log_likelihood(score, x, 0.1, 10.0, prior=prior.log_prob)
    torch.testing.assert_close(
        found.log_prob, Gaussian(torch.zeros(1, 2, 2, dtype=F64), 1.01).log_prob(x), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: log_likelihood(ring().score, randn(3, 2), 1.0, 0.1), "0 < sigma_min < sigma_max"),
        (lambda: log_likelihood(ring().score, randn(3, 2), 0.0, 1.0), "sigma_min"),
        (lambda: log_likelihood(ring().score, randn(3, 2) * math.nan, 0.1, 1.0), "not finite at 3"),
        (lambda: log_likelihood(ring().score, randn(3, 2), 0.1, 1.0, divergence="trace"), "'exact', 'hutchinson' or"),
        (lambda: log_likelihood(ring().score, randn(3, 2), 0.1, 1.0, prior=lambda z: z), "one log-density a sample"),
        (lambda: log_likelihood(lambda x, s: -x / (1 + s**2), randn(3, 2), 0.1, 1.0), "scorelab.broadcast"),
        (lambda: log_likelihood(ring().score, randn(3, 2), 0.1, 1.0, probes=0), "at least 1"),
        (lambda: log_likelihood(ring().score, randn(3, 2), 0.1, 1.0, divergence="hutch++", probes=3), "at least 4"),
        (lambda: log_likelihood(ring().score, randn(3, 2), 0.1, 1.0, probe="uniform"), "rademacher"),
        (lambda: sample_log_prob(ring().score, randn(3, 2), 0.0, 1.0), "sigma_min"),
        (lambda: bits_per_dim(ring().score, randn(3, 2), 0.1, 1.0, spacing=0.0), "spacing"),
        (
            lambda: bits_per_dim(ring().score, randn(3, 2), 0.1, 1.0, spacing=0.1, draws=2, divergence="hutchinson"),
            "exact trace",
        ),
        (lambda: sample_log_prob(ring().score, randn(3, 2), 0.1, 1.0, prior=lambda z: z[:, :1]), "one log-density"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def wide() -> Gaussian:
    """A Gaussian in 12 dimensions with a spectrum that falls fast, as Hutch++ likes it."""
    basis = torch.linalg.qr(randn(12, 12, seed=3)).Q
    return Gaussian(torch.zeros(12, dtype=F64), basis @ torch.diag(4.0 ** -torch.arange(12, dtype=F64)) @ basis.T)


def test_hutchpp_is_exact_with_a_full_sketch_and_unbiased_without():
    d, x = wide(), wide().sample(3, generator())
    sigma = torch.tensor(1e-4, dtype=F64)
    expected = divergence.exact(lambda y: d.score(y, sigma), x)[1]

    def field(y):
        return d.score(y, sigma)

    full = divergence.split(field, x, randn(12, 3, 12, seed=1), randn(1, 3, 12, seed=2))
    torch.testing.assert_close(divergence.hutchpp(field, x, *full)[1], expected)
    plain, better = [], []
    for seed in range(300):
        sketch = divergence.rademacher((4, 3, 12), x, generator(seed))
        v = divergence.rademacher((12, 3, 12), x, generator(1000 + seed))
        parts = divergence.split(field, x, sketch, randn(4, 3, 12, seed=1000 + seed))
        better.append(divergence.hutchpp(field, x, *parts)[1])
        plain.append(divergence.hutchinson(field, x, v)[1])
    found = torch.stack(better)
    gap = (found.mean(0) - expected).abs() / (found.std(0) / math.sqrt(300))
    assert float(gap.max()) < 3.5
    # the same 12 products with the Jacobian: less than half the error
    assert float(found.std(0).max()) < 0.5 * float(torch.stack(plain).std(0).min())


@pytest.mark.parametrize(
    ("kind", "probe", "probes"),
    [("hutchinson", "gaussian", 1), ("hutch++", "rademacher", 4), ("hutch++", "gaussian", 4)],
)
def test_other_probes_are_unbiased(kind, probe, probes):
    d = wide()
    x = d.sample(2, generator(8))
    options = {"prior": lambda z: d.log_prob(z, 5.0), "divergence": kind, "probe": probe, "rtol": 1e-4, "atol": 1e-4}
    values = torch.stack(
        [
            log_likelihood(d.score, x, 0.1, 5.0, probes=probes, generator=generator(s), **options).log_prob
            for s in range(60)
        ]
    )
    gap = (values.mean(0) - d.log_prob(x, 0.1)).abs() / (values.std(0) / math.sqrt(60))
    assert float(gap.max()) < 3.5


@pytest.mark.parametrize("dims", [2, 3, 8])
def test_hutchpp_with_a_probe_for_each_dimension_is_the_exact_trace(dims):
    """The mixture's own density: a sketch that follows x once needed more than 1,000 steps here."""
    d = GaussianMixture(randn(5, dims, seed=1), 0.1)
    x = d.sample(4, generator(2))
    found = log_likelihood(d.score, x, 0.01, 20.0, prior=lambda z: d.log_prob(z, 20.0), divergence="hutch++", probes=8)
    torch.testing.assert_close(found.log_prob, d.log_prob(x, 0.01), rtol=0, atol=1e-3)
    assert found.stderr is None


def test_hutchpp_takes_no_more_steps_than_the_exact_trace_and_not_its_bias():
    d = GaussianMixture(randn(5, 6, seed=1), 0.1)
    x = d.sample(2, generator(2))
    options = {"prior": lambda z: d.log_prob(z, 20.0), "rtol": 1e-4, "atol": 1e-4}
    steps = log_likelihood(d.score, x, 0.01, 20.0, **options).nfe
    found = [
        log_likelihood(d.score, x, 0.01, 20.0, divergence="hutch++", probes=5, generator=generator(s), **options)
        for s in range(12)
    ]
    assert max(f.nfe for f in found) < 1.3 * steps
    values = torch.stack([f.log_prob for f in found])
    gap = (values.mean(0) - d.log_prob(x, 0.01)).abs() / (values.std(0) / math.sqrt(12))
    assert float(gap.max()) < 3.5


def test_a_multiple_of_the_identity_costs_hutchpp_no_variance():
    """tr(c I) = c D from every single probe, where (I - QQ')v without its length set varies."""
    x = randn(3, 7)
    parts = divergence.split(lambda y: -0.7 * y, x, randn(2, 3, 7, seed=1), randn(5, 3, 7, seed=2))
    _, trace, single = divergence.hutchpp(lambda y: -0.7 * y, x, *parts)
    torch.testing.assert_close(single, torch.full((5, 3), -4.9, dtype=F64))
    torch.testing.assert_close(trace, torch.full((3,), -4.9, dtype=F64))


def test_samples_know_their_log_density():
    d, x = mixture(), HIGH * randn(30, 2)
    y, found = sample_log_prob(d.score, x, LOW, HIGH, prior=lambda z: d.log_prob(z, HIGH), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.log_prob, d.log_prob(y, LOW), rtol=0, atol=1e-4)
    back = log_likelihood(d.score, y, LOW, HIGH, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(back.latent, x, rtol=1e-4, atol=1e-4)


def test_gradients_of_the_log_density():
    """d log p / dx is the score itself at sigma_min, and d log p / d mean is minus it."""
    d = mixture()
    x = (d.sample(5, generator()) + LOW * randn(5, 2)).requires_grad_(True)
    shift = torch.zeros(2, dtype=F64, requires_grad=True)
    found = log_likelihood(
        lambda y, s: d.score(y - shift, s),
        x,
        LOW,
        HIGH,
        prior=lambda z: d.log_prob(z - shift, HIGH),
        rtol=1e-7,
        atol=1e-7,
        differentiable=True,
    )
    by_x, by_shift = torch.autograd.grad(found.log_prob.sum(), (x, shift))
    expected = d.score(x.detach(), LOW)
    torch.testing.assert_close(by_x, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(by_shift, -expected.sum(0), rtol=1e-3, atol=1e-3)


def test_bits_per_dim_of_a_known_density():
    """Data of spread far above the bins: bits are those of the density; more draws never raise the expected bound."""
    d, spacing = Gaussian(torch.zeros(2, dtype=F64), 0.25), 0.125
    x0 = (d.sample(400, generator()) / spacing).round() * spacing
    options = {"prior": lambda z: d.log_prob(z, 9.0), "rtol": 1e-4, "atol": 1e-4}
    one = bits_per_dim(d.score, x0, 0.01, 9.0, spacing=spacing, generator=generator(1), **options)
    # P of a bin by its exact Gaussian mass
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=F64), math.sqrt(0.25 + 1e-4))
    mass = normal.cdf(x0 + spacing / 2) - normal.cdf(x0 - spacing / 2)
    exact = -mass.log2().mean(1)
    assert float((one.bits - exact).mean()) == pytest.approx(0.0, abs=0.03)
    five = bits_per_dim(d.score, x0, 0.01, 9.0, spacing=spacing, draws=5, generator=generator(1), **options)
    assert float((five.bits - exact).abs().mean()) < float((one.bits - exact).abs().mean())
    assert "bins of width 0.125, 5 draws" in five.statement
    assert "sigma_min = 0.01" in five.statement


@pytest.mark.parametrize("hidden", ["no_grad", "detach", "inference", "caller"])
def test_a_score_that_autograd_cannot_follow_is_refused(hidden):
    """Its trace would silently be 0 and the density wrong by nats."""
    d, x = mixture(), randn(3, 2)
    scores = {
        "no_grad": torch.no_grad()(d.score),
        "detach": lambda y, s: d.score(y.detach(), s),
        "inference": torch.inference_mode()(d.score),
        "caller": d.score,
    }
    with torch.inference_mode(hidden == "caller"):
        for call in (log_likelihood, sample_log_prob):
            with pytest.raises(ValueError, match="autograd can follow"):
                call(scores[hidden], x, 0.1, 5.0)
    # a score that truly is constant has trace 0
    constant = log_likelihood(lambda y, s: torch.ones_like(y), x, 0.1, 0.2)
    assert bool(torch.isfinite(constant.log_prob).all())


def test_half_precision_and_other_generators_are_refused():
    with pytest.raises(TypeError, match="off by nats"):
        log_likelihood(ring().score, randn(3, 2).bfloat16(), 0.1, 1.0)
    with pytest.raises(TypeError, match=r"torch\.Generator for the probes"):
        log_likelihood(ring().score, randn(3, 2), 0.1, 1.0, divergence="hutchinson", generator=PerSampleNoise(0))
