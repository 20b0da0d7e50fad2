from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from problems import F64, REFERENCE, generator

from scorelab import VP, sigmas
from scorelab.checks import check_sigmas
from scorelab.processes import linear_betas


def test_geometric_has_a_constant_ratio_and_ends_exactly():
    levels = sigmas.geometric(10, sigma_min=0.01, sigma_max=1.0)
    assert levels[0] == 1.0
    assert levels[-1] == 0.01
    torch.testing.assert_close(levels[1:] / levels[:-1], torch.full((9,), 0.01 ** (1 / 9), dtype=F64))
    assert sigmas.geometric(1, sigma_min=0.1, sigma_max=3.0).tolist() == [3.0]


def test_karras_is_the_published_formula():
    levels = sigmas.karras(18, sigma_min=0.002, sigma_max=80)
    i = np.arange(18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(levels[:-1], expected, rtol=1e-12)
    assert levels[-1] == 0
    assert len(sigmas.log_linear(5, sigma_min=0.1, sigma_max=1)) == 6


@pytest.mark.parametrize("steps", ["250", "10,10,10", "ddim50"])
def test_respacing_equals_guided_diffusion(steps):
    ref = np.load(REFERENCE / "guided_diffusion_gaussian.npz")
    assert sigmas.respace(1000, steps) == ref[f"respace1000/{steps}"].tolist()


def test_leading_and_trailing_steps_are_the_published_ones():
    """Lin et al., arXiv:2305.08891, table 2, counted from 0; 3 of 10 by hand."""
    assert sigmas.respace(1000, "leading5") == [0, 200, 400, 600, 800]
    assert sigmas.respace(1000, "trailing5") == [199, 399, 599, 799, 999]
    assert sigmas.respace(10, "leading3") == [0, 3, 6]
    assert sigmas.respace(10, "trailing3") == [2, 6, 9]


def test_from_betas_and_from_process():
    betas = linear_betas(1000)
    abar = torch.cumprod(1 - betas, 0)
    every = sigmas.from_betas(betas)
    torch.testing.assert_close(every[:-1], ((1 - abar) / abar).sqrt().flip(0), rtol=1e-9, atol=0)
    some = sigmas.from_betas(betas, 10)
    assert len(some) == 11
    assert some[0] == every[0]
    assert sigmas.from_process(VP(), 5)[-1] == 0


@pytest.mark.parametrize(
    "distribution",
    [
        sigmas.LogUniform(0.1, 10.0),
        sigmas.Tapered(0.1, 2.0, 10.0),
        sigmas.LogNormal(),
        sigmas.FromProcess(VP()),
        sigmas.FromProcess(VP(0.5, 5.0)),
    ],
)
def test_rate_is_the_derivative_of_the_quantile_function(distribution):
    u = torch.linspace(0.05, 0.95, 50, dtype=F64, requires_grad=True)
    sigma = distribution(u)
    (slope,) = torch.autograd.grad(sigma.log().sum(), u)
    torch.testing.assert_close(distribution.rate(sigma.detach()), slope, rtol=1e-6, atol=0)


def test_from_sigmas_visits_each_level_equally():
    distribution = sigmas.FromSigmas(sigmas.log_linear(4, sigma_min=1, sigma_max=8))
    drawn = distribution(torch.rand(40_000, generator=generator(), dtype=F64))
    values, counts = drawn.unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=F64))
    assert float((counts / 40_000 - 0.25).abs().max()) < 5 * math.sqrt(0.25 * 0.75 / 40_000)
    with pytest.raises(ValueError, match="no density"):
        distribution.rate(drawn)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([1.0, 1.0], "strictly descending"),
        ([1.0, 2.0], "strictly descending"),
        ([1.0, -0.5], ">= 0"),
        ([0.0], "positive first level"),
        ([1.0, float("nan")], "finite"),
        ([], "at least 1"),
        (torch.ones(2, 2), "one dimension"),
    ],
)
def test_bad_levels_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        check_sigmas(bad)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sigmas.geometric(0, sigma_min=0.1, sigma_max=1),
        lambda: sigmas.karras(5, sigma_min=1, sigma_max=0.1),
        lambda: sigmas.karras(5, sigma_min=0.1, sigma_max=1, rho=0),
        lambda: sigmas.respace(10, 11),
        lambda: sigmas.respace(10, "ddim7"),
        lambda: sigmas.respace(10, "trailing11"),
        lambda: sigmas.respace(10, "leading"),
        lambda: sigmas.respace(10, "x"),
        lambda: sigmas.LogNormal(std=0),
    ],
)
def test_bad_settings_are_refused(make):
    with pytest.raises(ValueError, match="expected|ask for|use a"):
        make()


def test_suggest_follows_the_published_rules():
    """CIFAR-10 in NCSNv2, D = 3072, from 50 to 0.01: 232 levels (219 by the rule itself), epsilon 6.2e-6 for T = 5."""
    ratio = sigmas._overlap_ratio(3072)
    middle = math.sqrt(2 * 3072) * (ratio - 1)
    phi = torch.special.ndtr(torch.tensor([middle + 3 * ratio, middle - 3 * ratio], dtype=F64))
    assert float(phi[0] - phi[1]) == pytest.approx(0.5, abs=1e-9)
    assert 1 + math.log(50 / 0.01) / math.log(ratio) == pytest.approx(232, rel=0.06)
    share, left = sigmas._step_share((50 / 0.01) ** (1 / 231), 5)
    assert share * 0.01**2 == pytest.approx(6.2e-6, rel=0.02)
    assert left == pytest.approx(1.055, abs=0.001)


def _median_distance(x: torch.Tensor) -> float:
    pick = torch.randint(len(x), (2, 20_000), generator=generator(5))
    return float((x[pick[0]] - x[pick[1]]).abs().median())


def test_suggest_from_data():
    x = torch.rand(300, 1, 4, 4, generator=generator(), dtype=F64)
    found = sigmas.suggest(x, steps=3)
    flat = x.flatten(1)
    assert found.sigma_max == pytest.approx(float(torch.cdist(flat, flat).max()), rel=1e-6)
    assert found.sigma_data == pytest.approx(float(x.square().mean().sqrt()))
    levels = found.sigmas()
    assert len(levels) == found.levels
    assert float(levels[0] / levels[1]) == pytest.approx(found.ratio)
    assert found.ratio <= sigmas._overlap_ratio(16) + 1e-9
    assert "between 300 samples" in str(found)
    assert sigmas.suggest(x[:, 0, 0, :2]).ratio <= 1.5
    assert "at most 1.5" in str(sigmas.suggest(x[:, 0, 0, :2]))
    # sorted data: classes one after the other, or values ascending
    line = torch.linspace(0, 1, 20_000, dtype=F64)[:, None] ** 2
    assert sigmas.suggest(line, rows=400).sigma_max == pytest.approx(1.0, abs=0.05)
    assert sigmas.suggest(line, rows=400).distances[1] == pytest.approx(_median_distance(line), rel=0.1)
    for bad in (x[:1], torch.ones(5, 2)):
        with pytest.raises(ValueError, match="at least two that differ"):
            sigmas.suggest(bad)
