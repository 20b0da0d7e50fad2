"""Every sampler at the edges: half precision, memory layouts, empty and one-step requests, a broken sample."""

from __future__ import annotations

import math

import pytest
import torch
from problems import generator

from scorelab import (
    VE,
    VP,
    bits_per_dim,
    broadcast,
    log_likelihood,
    sample,
    sample_log_prob,
    sigmas,
    trajectory,
    variational_bound,
)
from scorelab.distributions import Gaussian
from scorelab.evaluation import kl_to_model
from scorelab.samplers import (
    DDIM,
    RK4,
    AdamsBashforth,
    AdaptiveReverseSDE,
    Ancestral,
    AnnealedLangevin,
    Churn,
    DPMSolverMultistep,
    DPMSolverSinglestep,
    Euler,
    Heun,
    Midpoint,
    PredictorCorrector,
    ProbabilityFlow,
    ReverseSDE,
    SDEDPMSolver,
    StochasticHeun,
    UniPC,
    calibrate,
)


class Narrow:
    """The score of N(0, I) that knows the levels from 0.1 to 10."""

    sigma_range = (0.1, 10.0)

    def __call__(self, x, sigma):
        return -x / (1 + broadcast(sigma, x) ** 2)


@pytest.mark.parametrize(("low", "high"), [(0.05, 10.0), (0.1, 20.0)])
def test_levels_that_a_score_does_not_know_are_refused_at_every_entrance(low, high):
    score, x, normal = Narrow(), torch.randn(16, 2, generator=generator()), Gaussian(torch.zeros(2), 1.0)
    levels = sigmas.geometric(3, sigma_min=low, sigma_max=high)
    entrances = [
        lambda: sample(score, x, levels),
        lambda: trajectory(score, x, levels),
        lambda: log_likelihood(score, x, low, high),
        lambda: sample_log_prob(score, x, low, high),
        lambda: bits_per_dim(score, x, low, high, spacing=0.1),
        lambda: variational_bound(score, x, levels),
        lambda: calibrate(score, x, nfe=2, sigma_min=low, sigma_max=high),
        lambda: kl_to_model(normal, score, low, high, count=4),
    ]
    for enter in entrances:
        with pytest.raises(ValueError, match=r"this score knows \[0.1, 10\] \(its sigma_range\): choose levels inside"):
            enter()


SAMPLERS = [
    Euler(),
    Heun(),
    Midpoint(),
    RK4(),
    AdamsBashforth(3),
    AdamsBashforth(3, "x0"),
    DPMSolverMultistep(2),
    DPMSolverSinglestep(3),
    UniPC(3),
    DDIM(0.5),
    Ancestral(),
    ReverseSDE(VP()),
    StochasticHeun(VE()),
    SDEDPMSolver(),
    Churn(),
    PredictorCorrector(Euler()),
    AnnealedLangevin(20, 2e-3),
    AdaptiveReverseSDE(),
    ProbabilityFlow(1e-2, 1e-2),
]
STD = 0.5
LEVELS = sigmas.karras(15, sigma_min=0.05, sigma_max=10.0)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: str(s).split("(")[0])


def score(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Of data N(0, STD^2 I), for either form of sigma."""
    return -x / (STD**2 + broadcast(sigma, x) ** 2)


def start(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return 10 * torch.randn(64, 3, 4, generator=generator(1)).to(dtype)


@every_sampler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_the_spread_of_single(sampler, dtype):
    found = sample(score, start(dtype), LEVELS, sampler, generator=generator(2))
    single = sample(score, start(), LEVELS, sampler, generator=generator(2))
    assert found.dtype == dtype
    assert float(found.float().std()) == pytest.approx(float(single.std()), rel=0.15)


@every_sampler
def test_memory_layout_changes_nothing(sampler):
    x = start().permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not x.is_contiguous()
    a = sample(score, x, LEVELS, sampler, generator=generator(2))
    b = sample(score, x.contiguous(), LEVELS, sampler, generator=generator(2))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@every_sampler
def test_nothing_asked_and_one_step(sampler):
    assert sample(score, (0, 3, 4), LEVELS, sampler).shape == (0, 3, 4)
    assert sample(score, start()[:0], LEVELS, sampler).shape == (0, 3, 4)
    one = sample(score, start(), [10.0, 0.0], sampler, generator=generator(2))
    if not sampler.every_level:
        # one evaluation: Tweedie's denoised sample
        torch.testing.assert_close(one, start() * STD**2 / (STD**2 + 100), rtol=1e-4, atol=1e-4)
    assert one.isfinite().all()


@every_sampler
def test_a_broken_sample_is_named(sampler):
    def broken(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        found = score(x, sigma).clone()
        found[17] = math.nan
        return found

    with pytest.raises(ValueError, match="not finite at 1 of 64 samples .first: sample 17."):
        sample(broken, start(), LEVELS, sampler, generator=generator(2))


@every_sampler
def test_repeated_and_misplaced_levels_are_refused(sampler):
    for levels in ([5.0, 5.0, 0.0], [5.0, 0.0, 0.0], [1.0, 2.0], [0.0], [math.nan, 0.0], [-1.0]):
        with pytest.raises(ValueError, match="sigmas"):
            sample(score, start(), levels, sampler)
