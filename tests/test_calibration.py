"""Calibration: ranks of exact draws are uniform, those of draws of another law are not."""

from __future__ import annotations

import math

import pytest
import torch
from problems import F64, generator, mixture, randn

from scorelab.distributions import GaussianMixture
from scorelab.evaluation import calibration_ranks, uniformity
from scorelab.inverse import Matrix, Measurement, exact_posterior


def test_ranks_by_hand():
    truth, draws = torch.tensor([[0.5, 3.0]]), torch.tensor([[[0.0, 4.0], [1.0, 5.0], [0.2, 6.0]]])
    assert calibration_ranks(truth, draws).tolist() == [[2, 0]]


def ranks_of(widened=1.0, shifted=0.0, n=4000, draws=31):
    """x0 in the plane, its sum measured: ranks of the first coordinate among exact draws, moved off their mean."""
    prior, found = mixture(), []
    truth = prior.sample(n, generator(1))
    y = truth.sum(1, keepdim=True) + 0.5 * randn(n, 1, seed=2)
    # conditioned by hand on each part, for thousands of y at once
    means, var = prior.means, prior.std**2
    s = 2 * var + 0.25
    off = y - means.sum(1)
    weight = torch.softmax(prior.weights.log() - 0.5 * off**2 / s - 0.5 * s.log(), 1)
    pick = torch.multinomial(weight, draws, replacement=True, generator=generator(3))
    mean = (means[:, 0] + var / s * off).gather(1, pick)
    std = (var - var**2 / s).sqrt()[pick]
    drawn = mean + std * torch.randn(n, draws, dtype=F64, generator=generator(4))
    centre = (weight * (means[:, 0] + var / s * off)).sum(1, keepdim=True)
    found = centre + widened * (drawn - centre) + shifted * std
    return calibration_ranks(truth[:, :1], found.unsqueeze(2))[:, 0]


def test_exact_draws_are_calibrated_and_others_are_not():
    assert uniformity(ranks_of(), 31) > 1e-3
    assert uniformity(ranks_of(widened=1.1), 31) < 1e-5
    assert uniformity(ranks_of(widened=0.9), 31) < 1e-5
    assert uniformity(ranks_of(shifted=0.15), 31) < 1e-5


def test_closed_form_posteriors_are_calibrated():
    prior = GaussianMixture(randn(3, 4, seed=5), torch.tensor([0.3, 0.6, 0.4], dtype=F64))
    operator, n, draws = Matrix(randn(2, 4)), 300, 15
    truth = prior.sample(n, generator(1))
    y = operator(truth) + 0.2 * randn(n, 2, seed=2)
    drawn = torch.stack(
        [exact_posterior(prior, Measurement(operator, y[i : i + 1], 0.2)).sample(draws, generator(i)) for i in range(n)]
    )
    ranks = calibration_ranks(truth, drawn)
    assert min(uniformity(ranks[:, k], draws) for k in range(4)) > 1e-3 / 4


@pytest.mark.parametrize("draws", [4, 19])
def test_the_p_value_is_uniform_where_ranks_are(draws):
    """Over 400 sets of ranks: Kolmogorov's distance below its quantile of 1 - 1e-5."""
    sets = torch.randint(0, draws + 1, (400, 500), generator=generator(7))
    p = torch.tensor([uniformity(ranks, draws) for ranks in sets]).sort().values
    steps = torch.arange(1, 401) / 400
    assert float((p - steps).abs().max()) < math.sqrt(math.log(2e5) / 800) + 1 / 400


def test_what_has_no_ranks_is_refused():
    with pytest.raises(ValueError, match=r"truth is \(3, 2\), draws \(3, 5, 1\); expected"):
        calibration_ranks(torch.zeros(3, 2), torch.zeros(3, 5, 1))
    with pytest.raises(ValueError, match=r"ranks are \(2,\); expected \(N,\) with whole numbers from 0 to 4"):
        uniformity(torch.tensor([0, 5]), 4)
    with pytest.raises(ValueError, match="order is 4 with 3 draws; expected 1 to 3"):
        uniformity(torch.tensor([0, 1]), 3)
