"""Scores of other people's making: those that use their output memory again, and those that differentiate inside."""

from __future__ import annotations

import inspect

import pytest
import torch
from problems import F64, generator, mixture, randn

from scorelab import PerSampleNoise, bits_per_dim, log_likelihood, sample, sample_log_prob, samplers, sigmas
from scorelab.checks import broadcast
from scorelab.likelihood import variational_bound
from scorelab.processes import VE
from scorelab.samplers import (
    AdaptiveReverseSDE,
    Ancestral,
    Calibrated,
    Heun,
    LangevinCorrector,
    MetropolisLangevin,
    PredictorCorrector,
    ProbabilityFlow,
    calibrate,
)

D = mixture()
HIGH, LOW = 8.0, 0.1


class _Into(torch.autograd.Function):
    """fn(x, sigma) written into memory that is there, with fn's own gradient by x and sigma."""

    @staticmethod
    def forward(ctx, x, sigma, fn, memory):
        ctx.fn = fn
        ctx.save_for_backward(x, sigma)
        memory[: len(x)] = fn(x.detach(), sigma.detach())
        # as a CUDA graph's replay does, it is overwritten without autograd's knowing
        return memory.data[: len(x)]

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x, sigma = (t.detach().requires_grad_(True) for t in ctx.saved_tensors)
            found = torch.autograd.grad(ctx.fn(x, sigma), (x, sigma), grad, allow_unused=True)
        return *found, None, None


class Reused:
    """The mixture's score; every call overwrites what the last one returned."""

    def __init__(self, memory=None):
        self.memory = torch.empty(4096, 2, dtype=F64) if memory is None else memory
        self.variance = torch.empty_like(self.memory)

    def __call__(self, x, sigma):
        return _Into.apply(x, sigma, D.score, self.memory)

    def score_and_variance(self, x, sigma):
        self.variance[: len(x)] = 0.3
        return self(x, sigma), self.variance[: len(x)]

    def rows(self, index):
        return Reused(self.memory)


class Fresh(Reused):
    """The same in new memory."""

    def __call__(self, x, sigma):
        return D.score(x, sigma)

    def score_and_variance(self, x, sigma):
        return D.score(x, sigma), torch.full_like(x, 0.3)

    def rows(self, index):
        return self


DEFAULT = ["AdamsBashforth", "AdaptiveReverseSDE", "Ancestral", "Churn", "DDIM", "DPMSolverMultistep", "Euler", "Heun"]
DEFAULT += ["DPMSolverSinglestep", "Midpoint", "ProbabilityFlow", "RK4", "ReverseSDE", "SDEDPMSolver", "StochasticHeun"]
DEFAULT += ["UniPC"]
CASES = [
    *(vars(samplers)[name]() for name in DEFAULT),
    samplers.ReverseDiffusion(VE()),
    *(make(steps=3) for make in (samplers.Langevin, samplers.AnnealedLangevin, samplers.UnderdampedLangevin)),
    samplers.ConsistentLangevin(),
    MetropolisLangevin(log_prob=D.log_prob, steps=5),
    Ancestral("learned"),
    PredictorCorrector(Heun(), LangevinCorrector()),
    PredictorCorrector(ProbabilityFlow(max_nfe=60)),
    Calibrated((HIGH, 1.0, LOW, 0.0), ((1.0,), (1.2, -0.2), (0.9, 0.1))),
]


def test_every_sampler_is_among_the_cases():
    made = {type(case).__name__ for case in CASES}
    known = {
        name
        for name, item in vars(samplers).items()
        if inspect.isclass(item) and issubclass(item, samplers.Sampler) and item is not samplers.Sampler
    }
    assert made == known


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of a step that is long, and of the budget that is spent
@pytest.mark.parametrize("sampler", CASES, ids=lambda s: type(s).__name__)
def test_a_score_that_overwrites_its_output_gives_the_same_samples(sampler):
    levels = None if isinstance(sampler, Calibrated) else [*sigmas.geometric(6, sigma_min=LOW, sigma_max=HIGH), 0.0]
    x = HIGH * randn(7, 2)
    fresh, reused = (sample(s, x, levels, sampler, generator=generator(1)) for s in (Fresh(), Reused()))
    assert torch.equal(fresh, reused)


@pytest.mark.parametrize(
    "density",
    [
        lambda s, x: log_likelihood(s, x, LOW, HIGH).log_prob,
        lambda s, x: log_likelihood(s, x, LOW, HIGH, method="bosh3", rtol=1e-3, atol=1e-3).latent,
        lambda s, x: log_likelihood(s, x, LOW, HIGH, divergence="hutchinson", generator=generator()).log_prob,
        lambda s, x: sample_log_prob(s, x, LOW, HIGH)[1].log_prob,
        lambda s, x: bits_per_dim(s, x, LOW, HIGH, spacing=0.1, generator=generator()).bits,
        lambda s, x: variational_bound(s, x, [HIGH, 1.0, LOW], generator=generator()).log_prob,
        lambda s, x: variational_bound(s, x, [HIGH, 1.0, LOW], Ancestral("learned"), generator=generator()).log_prob,
        lambda s, x: torch.tensor(calibrate(s, x, nfe=3, sigma_min=LOW, sigma_max=HIGH, **FEW).weights[-1]),
        lambda s, x: torch.tensor(
            calibrate(s, x, nfe=3, sigma_min=LOW, sigma_max=HIGH, method="least_squares", **FEW).weights[-1]
        ),
    ],
)
def test_a_score_that_overwrites_its_output_gives_the_same_densities_and_fits(density):
    x = randn(20, 2)
    assert torch.equal(density(Fresh(), x), density(Reused(), x))


FEW = {"trials": 12, "iterations": 5, "reference_steps": 16}


def test_a_score_that_overwrites_its_output_and_forgets_x_is_still_refused():
    """Its trace would be 0: comparing an output with its own memory would let it pass."""
    memory = torch.empty(5, 2, dtype=F64)

    def detached(x, sigma):
        memory.copy_(D.score(x.detach(), sigma))
        return memory

    with pytest.raises(ValueError, match="carries no gradient"):
        log_likelihood(detached, randn(5, 2), LOW, HIGH)


WRONG = {
    "the first level": lambda x, s: D.score(x, s.flatten()[:1].expand(len(x))),
    "one number": lambda x, s: D.score(x, torch.tensor(float(s.flatten()[0]), dtype=F64)),
    "the mean": lambda x, s: D.score(x, s.mean()),
    "the last level": lambda x, s: D.score(x, s.flatten()[-1]),
    "a wrong axis, in one memory": lambda x, s: MEMORY.copy_(-x / (0.01 + s**2)),
}
MEMORY = torch.empty(2, 2, dtype=F64)


@pytest.mark.parametrize("score", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("sampler", [ProbabilityFlow(), AdaptiveReverseSDE(), None])
def test_a_score_that_reads_one_level_for_all_is_refused(score, sampler):
    x = randn(2 if score is WRONG["a wrong axis, in one memory"] else 6, 2)
    with pytest.raises(ValueError, match=r"scorelab\.broadcast"):
        log_likelihood(score, x, LOW, HIGH) if sampler is None else sample(score, x, [HIGH, LOW], sampler)


def energy(x, sigma):
    """-log of N(0, 1 + sigma^2), (B,)."""
    return 0.5 * (x**2 / (1 + broadcast(sigma, x) ** 2)).flatten(1).sum(1)


def unprepared(x, sigma):
    x = x.detach().requires_grad_(True)
    return -torch.autograd.grad(energy(x, sigma).sum(), x)[0]


def prepared(x, sigma):
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_(True)
        return -torch.autograd.grad(energy(x, sigma).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize(
    "use",
    [
        lambda s: sample(s, (4, 2), [1.0, 0.1, 0.0], dtype=F64, generator=generator()),
        lambda s: sample(s, (4, 2), [1.0, 0.1], ProbabilityFlow(), dtype=F64, generator=generator()),
        lambda s: sample(s, (4, 2), [1.0, 0.1], AdaptiveReverseSDE(), dtype=F64, generator=PerSampleNoise(0)),
        lambda s: log_likelihood(s, randn(4, 2), 0.1, 1.0),
        lambda s: variational_bound(s, randn(4, 2), [1.0, 0.1], generator=generator()),
        lambda s: calibrate(s, randn(20, 2), nfe=2, sigma_min=0.1, sigma_max=1.0, **FEW),
    ],
)
def test_a_score_that_differentiates_inside_is_told_what_to_add(use):
    use(prepared)
    with pytest.raises(ValueError, match=r"torch\.enable_grad\(\).*requires_grad_\(True\)"):
        use(unprepared)


def test_its_density_needs_the_graph_of_what_it_differentiates():
    def without_graph(x, sigma):
        with torch.enable_grad():
            return unprepared(x, sigma)

    with pytest.raises(ValueError, match="create_graph=True"):
        log_likelihood(without_graph, randn(4, 2), 0.1, 1.0)
    found = log_likelihood(prepared, randn(4, 2), 0.1, 1.0).log_prob
    expected = log_likelihood(lambda x, s: -x / (1 + broadcast(s, x) ** 2), randn(4, 2), 0.1, 1.0).log_prob
    torch.testing.assert_close(found, expected)
