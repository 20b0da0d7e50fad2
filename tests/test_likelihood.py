from __future__ import annotations

import math

import pytest
import torch
from problems import F64, correlated, generator, mixture, randn, ring

from scorelab import divergence, log_likelihood
from scorelab.distributions import TARGETS, Gaussian, target
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
    """200 seeds on a mixture: the mean is within 3 standard errors of the exact value, and errors match in size."""
    d = mixture()
    x = torch.tensor([[0.5, 0.8], [-0.6, 1.2]], dtype=F64)
    exact = d.log_prob(x, 0.1)
    options = {"prior": lambda z: d.log_prob(z, HIGH), "divergence": "hutchinson", "rtol": 1e-5, "atol": 1e-5}
    runs = [
        log_likelihood(d.score, x, 0.1, HIGH, probes=1, generator=generator(s), **options).log_prob for s in range(200)
    ]
    values = torch.stack(runs)
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
        (lambda: log_likelihood(ring().score, randn(3, 2), 1.0, 0.1), "descending"),
        (lambda: log_likelihood(ring().score, randn(3, 2), 0.0, 1.0), "sigma_min"),
        (lambda: log_likelihood(ring().score, randn(3, 2) * math.nan, 0.1, 1.0), "not finite at 3"),
        (lambda: log_likelihood(ring().score, randn(3, 2), 0.1, 1.0, divergence="trace"), "'exact' or 'hutchinson'"),
        (lambda: log_likelihood(ring().score, randn(3, 2), 0.1, 1.0, prior=lambda z: z), "one log-density a sample"),
        (lambda: log_likelihood(lambda x, s: -x / (1 + s**2), randn(3, 2), 0.1, 1.0), "scorelab.broadcast"),
        (lambda: log_likelihood(ring().score, randn(3, 2), 0.1, 1.0, probes=0), "at least 1"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
