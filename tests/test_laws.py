"""What samplers leave at the last level, beside what the level says: exact, for on a Gaussian every step is affine."""

from __future__ import annotations

import math

import pytest
import torch
from problems import F64, PROCESSES, generator, randn
from test_solvers import Moments

from scorelab import sample, sigmas
from scorelab.samplers import (
    PUBLISHED_STEP_SIZES,
    Ancestral,
    AnnealedLangevin,
    Euler,
    PredictorCorrector,
    ReverseDiffusion,
    ReverseSDE,
    StochasticHeun,
    UnderdampedLangevin,
)
from scorelab.samplers.corrected import corrector_step_size


@pytest.mark.parametrize("make", [ReverseSDE, StochasticHeun])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
def test_a_point_of_data_keeps_the_level_however_long_the_step(make, eta):
    """On N(0, 0) the variance at every level r is r^2."""
    for last in (1.0, 1e-2, 1e-5):
        mean, variance = Moments(make(eta=eta), [30.0, 3.0, last], variance=0.0, mean=0.0).end()
        assert mean == 0
        assert variance == pytest.approx(last**2, rel=1e-9)


@pytest.mark.parametrize("name", PROCESSES)
def test_fifty_levels_of_a_process_leave_no_noise(name):
    """A coordinate of standard deviation 0.01 ends no wider than the exact denoised sample, s^2 / sqrt(s^2 + r^2)."""
    process, s = PROCESSES[name], 0.01
    levels = sigmas.from_process(process, 50).tolist()
    exact = s**2 / math.hypot(s, levels[-2])
    for sampler in (ReverseSDE(process), StochasticHeun(process)):
        std = math.sqrt(Moments(sampler, levels, variance=s**2, mean=0.0).end()[1])
        assert 0.4 * exact < std < 1.02 * exact
    for explicit in (ReverseSDE(process, explicit=True), ReverseDiffusion(process)):
        if name == "ve":
            explicit.init(torch.zeros(1, 1), levels)
            continue
        with pytest.warns(RuntimeWarning, match="leave noise of standard deviation .* times what the level says"):
            explicit.init(torch.zeros(1, 1), levels)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_forward_variance_is_that_of_the_processs_own_transition(name):
    """In scaled coordinates the noise of x_t given x_s, by the process; one unit of alpha_s is one of x here."""
    process = PROCESSES[name]
    s, t = (torch.tensor(v, dtype=F64) for v in (0.3, 0.5))
    high, low = float(process.sigma(t)), float(process.sigma(s))
    _, std = process.transition(s, t)
    _, forward = Ancestral("forward", process).variances(high, low)
    assert forward == pytest.approx(float(std / process.alpha(s)) ** 2, rel=1e-6)


@pytest.mark.parametrize("dims", [1, 2, 3, 10, 128])
def test_the_default_corrector_has_the_law_of_the_level_in_every_dimension(dims):
    """On N(0, v I), v = s^2 + sigma^2, steps b = 2 (snr sigma)^2 settle at a variance of v / (1 - b/(2 v))."""
    corrector, sigma, v = PredictorCorrector(Euler()).corrector, 0.5, 1.25
    x, noise = randn(60_000 // dims, dims), generator(dims)
    for _ in range(150):
        x = corrector.correct(lambda y, s: -y / v, x, sigma, lambda y: torch.randn(y.shape, generator=noise, dtype=F64))
    b = 2 * (corrector.snr * sigma) ** 2
    assert float(x.var()) == pytest.approx(v / (1 - b / (2 * v)), rel=5 * math.sqrt(2 / x.numel()))


@pytest.mark.parametrize("dims", [10, 128])
def test_the_published_rule_has_the_law_that_was_derived(dims):
    """((D + 2)/D)^2 for small steps without the bound."""
    noise = generator(dims)
    x = (dims + 2) / dims * randn(60_000 // dims, dims)
    for _ in range(2500 if dims == 10 else 1000):
        z, s = torch.randn(x.shape, generator=noise, dtype=F64), -x
        b = corrector_step_size(0.08, z.norm(dim=1, keepdim=True), s.norm(dim=1, keepdim=True))
        x = x + b * s + (2 * b).sqrt() * z
    assert float(x.square().mean()) == pytest.approx(((dims + 2) / dims) ** 2, rel=0.05 if dims == 10 else 0.015)


def test_langevin_steps_too_long_for_the_smallest_level_are_refused():
    score, x = (lambda y, s: -y / s**2), torch.zeros(4, 2)
    for make in (AnnealedLangevin, UnderdampedLangevin):
        with pytest.raises(
            ValueError, match=r"times the smallest level squared, sigma = 0.003, and diverges from 4 on"
        ):
            sample(score, x, [1.0, 0.1, 0.003], make(2, 4e-5))
        assert torch.isfinite(sample(score, x, sigmas.karras(18, sigma_min=0.002, sigma_max=80.0), make(3))).all()
    # 1 / (1 - 2.5 / 4)
    with pytest.warns(RuntimeWarning, match=r"up to 2.67 times the variance of the noise"):
        sample(score, x, [1.0, 0.1, 0.004], AnnealedLangevin(2, 4e-5))
    cifar = sigmas.geometric(232, sigma_min=0.01, sigma_max=50.0)
    assert sigmas.langevin_step_size(cifar, 5) == pytest.approx(PUBLISHED_STEP_SIZES["ncsnv2_cifar10"], rel=0.02)
