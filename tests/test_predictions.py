from __future__ import annotations

import itertools

import pytest
import torch
from problems import F64, mixture, randn

from scorelab.predictions import EPS, FLOW, SCORE, X0, Prediction, V, coefficients, convert, edm

ALL = {"x0": X0, "eps": EPS, "score": SCORE, "v": V, "flow": FLOW, "edm": edm(0.7)}


def truths(sigma: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """x and what each prediction is for the exact mixture, straight from the definitions in scaled coordinates."""
    m, s = mixture(), torch.tensor(sigma, dtype=F64)
    x = m.sample(50) + sigma * randn(50, 2)
    x0 = m.denoise(x, s)
    eps = (x - x0) / s
    alpha, std = 1 / (1 + s**2).sqrt(), s / (1 + s**2).sqrt()
    skip, out = 0.49 / (s**2 + 0.49), s * 0.7 / (s**2 + 0.49).sqrt()
    return x, {
        "x0": x0,
        "eps": eps,
        "score": m.score(x, s),
        "v": alpha * eps - std * x0,
        "flow": eps - x0,
        "edm": (x0 - skip * x) / out,
    }


@pytest.mark.parametrize("sigma", [0.01, 0.3, 1.0, 20.0])
@pytest.mark.parametrize(("source", "target"), list(itertools.product(ALL, ALL)))
def test_every_conversion(source, target, sigma):
    x, truth = truths(sigma)
    found = convert(truth[source], x, torch.tensor(sigma, dtype=F64), ALL[source], ALL[target])
    torch.testing.assert_close(found, truth[target], rtol=1e-7, atol=1e-7 * (1 + 1 / sigma**2))


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(ALL, 2)))
@pytest.mark.parametrize("sigma", [1e-4, 1e-2, 3.0, 1e3])
def test_coefficients_keep_float32_accuracy_at_every_sigma(source, target, sigma):
    """In float32 the closed forms agree with float64 to a few ulp, where differences of skips would lose all digits."""
    low = coefficients(torch.tensor(sigma), ALL[source], ALL[target])
    high = coefficients(torch.tensor(sigma, dtype=F64), ALL[source], ALL[target])
    for a, b in zip(low, high, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=3e-6, atol=0)


def test_sigma_may_be_one_a_sample_and_a_prediction_ones_own():
    x, f = randn(3, 2, 2), randn(3, 2, 2, seed=1)
    sigma = torch.tensor([0.1, 1.0, 5.0], dtype=F64)
    mine = Prediction(EPS.skip, EPS.out)
    torch.testing.assert_close(convert(f, x, sigma, mine, V), convert(f, x, sigma, EPS, V))
    each = torch.cat([convert(f[i : i + 1], x[i : i + 1], sigma[i], EPS, V) for i in range(3)])
    torch.testing.assert_close(convert(f, x, sigma, EPS, V), each)


def test_bad_input_is_refused():
    x = randn(4, 2)
    with pytest.raises(ValueError, match=r"sigma has shape \(3,\)"):
        convert(x, x, torch.ones(3, dtype=F64), EPS, V)
    with pytest.raises(ValueError, match="same shape"):
        convert(x[:2], x, 1.0, EPS, V)
    with pytest.raises(TypeError, match="floating"):
        convert(x, x.long(), 1.0, EPS, V)
    with pytest.raises(ValueError, match="sigma_data"):
        edm(0.0)
