"""Scores of other people's making: those that use their output memory again, and those that differentiate inside."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from problems import F64, correlated, generator, mixture, randn, ring

from scorelab import (
    PerSampleNoise,
    ScoreModel,
    bits_per_dim,
    check_score,
    clipped,
    combined,
    log_likelihood,
    sample,
    sample_log_prob,
    samplers,
    sigmas,
)
from scorelab.checks import broadcast
from scorelab.distributions import Empirical, Gaussian, target
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
from scorelab.training import build, default_config

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
        if inspect.isclass(item) and issubclass(item, samplers.Sampler) and not inspect.isabstract(item)
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


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (lambda x, s: mixture().score(x, s), "score"),
        (lambda x, s: -mixture().score(x, s), "minus the score"),
        (lambda x, s: -s * mixture().score(x, s), "eps"),
        (lambda x, s: mixture().denoise(x, s), "the denoised sample x0_hat"),
        (lambda x, s: s**2 * mixture().score(x, s), "sigma^2 * score"),
    ],
)
def test_check_score_names_what_a_function_returns(wrong, name):
    data = mixture().sample(2000, torch.Generator().manual_seed(0))
    report = check_score(wrong, data, sigma_min=0.3, sigma_max=10.0)
    assert report.best == name
    assert report.ok == (name == "score")
    assert name in str(report) or report.ok


def gaussian(dims):
    return Gaussian(torch.zeros(dims, dtype=F64), torch.eye(dims, dtype=F64))


EXACT = {
    "normal in 1-D": (gaussian(1), 0.01, 10.0),
    "normal in 2-D": (gaussian(2), 0.01, 10.0),
    "normal in 100-D": (gaussian(100), 0.01, 10.0),
    "normal, large levels": (gaussian(2), 5.0, 200.0),
    "ring": (ring(), 0.002, 0.1),
    "checkerboard": (target("checkerboard", dtype=F64), 0.002, 80.0),
    "correlated": (correlated(), 0.05, 20.0),
    "ten points": (Empirical(randn(10, 64)), 0.02, 20.0),
}
MENDED = {
    "exact": lambda score: score,
    "1 % off": lambda score: lambda x, s: 1.01 * score(x, s),
}
BROKEN = {
    "twice": lambda score: lambda x, s: 2 * score(x, s),
    "half": lambda score: lambda x, s: 0.5 * score(x, s),
    "zero": lambda score: lambda x, s: 0 * x,
    "minus": lambda score: lambda x, s: -score(x, s),
    "eps": lambda score: lambda x, s: -s * score(x, s),
    "of twice sigma": lambda score: lambda x, s: score(x, 2 * s),
    "of half sigma": lambda score: lambda x, s: score(x, 0.5 * s),
    "shifted": lambda score: lambda x, s: score(x + 3.0, s),
    "not finite": lambda score: lambda x, s: score(x, s) / 0,
}


@pytest.mark.parametrize("count", [50, 3000])
@pytest.mark.parametrize("change", MENDED.values(), ids=MENDED)
@pytest.mark.parametrize(("d", "low", "high"), EXACT.values(), ids=EXACT)
def test_check_score_accepts_exact_scores(d, low, high, change, count):
    """Whatever of eps can be predicted at these levels: nearly nothing of N(0, I) at sigma = 0.01."""
    report = check_score(change(d.score), d.sample(count, generator(3)), sigma_min=low, sigma_max=high)
    assert report.ok, str(report)
    assert "it is the score" in str(report)


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize(("d", "low", "high"), EXACT.values(), ids=EXACT)
def test_check_score_refuses_wrong_scores(d, low, high, change):
    report = check_score(change(d.score), d.sample(1000, generator(3)), sigma_min=low, sigma_max=high)
    assert not report.ok, str(report)


def test_check_score_refuses_the_score_of_other_data():
    """The ring's on the checkerboard's points, each exact for its own."""
    data = target("checkerboard", dtype=F64).sample(1000, generator())
    report = check_score(ring().score, data, sigma_min=0.05, sigma_max=10.0)
    assert not report.ok
    assert "at sigma = " in str(report)


def test_check_score_names_bad_input():
    with pytest.raises(ValueError, match="1 points"):
        check_score(ring().score, randn(1, 2), sigma_min=0.1, sigma_max=1.0)
    with pytest.raises(ValueError, match="strictly descending"):
        check_score(ring().score, randn(9, 2), sigma_min=1.0, sigma_max=0.1)
    with pytest.raises(ValueError, match="not finite"):
        check_score(ring().score, 0 * randn(9, 2) / 0, sigma_min=0.1, sigma_max=1.0)


class Offset:
    """N(m, cov) in 64 dimensions with a coherent direction, as the brightness of an image is, far off the origin."""

    def __init__(self, data_mean: torch.Tensor | None) -> None:
        self.data_mean = data_mean
        self.mean, self.shared, self.own = torch.full((64,), 0.6, dtype=F64), 0.3**2 * 64, 0.1**2

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        gap, var = x - self.mean, self.own + broadcast(sigma, x) ** 2
        along = gap.mean(1, keepdim=True)
        return -(gap - along) / var - along / (var + self.shared)

    def log_prob(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        cov = (self.own + sigma**2) * torch.eye(64, dtype=F64) + self.shared * torch.full((64, 64), 1 / 64, dtype=F64)
        return torch.distributions.MultivariateNormal(self.mean, cov).log_prob(x)


def test_samples_begin_around_the_mean_of_the_data_and_densities_end_there():
    """From N(0, sigma^2 I) an offset m comes out as m (1 - s/sqrt(s^2 + sigma^2)), s the deviation along it."""
    grid, high = sigmas.karras(60, sigma_min=0.002, sigma_max=20.0), 20.0
    along = (Offset(None).shared + Offset(None).own) ** 0.5
    for mean, expected in ((None, 0.6 * (1 - along / math.hypot(along, high))), (torch.full((64,), 0.6), 0.6)):
        score = Offset(mean)
        for s in (score, combined(lambda x, sigma, out: out, score)):
            x = sample(s, (1000, 64), grid, generator=generator(), dtype=F64)
            # its standard error is .3/sqrt(1000)
            assert float(x.mean()) == pytest.approx(expected, abs=0.03)
        x = score.mean + 0.05 * randn(5, 64)
        found = log_likelihood(score, x, 0.05, high, rtol=1e-5, atol=1e-5).log_prob - score.log_prob(x, 0.05)
        # a prior that is too narrow along one direction, and one that besides stands |m|^2/(2 sigma^2) = 0.03 off
        narrow = 0.5 * math.log1p(along**2 / high**2)
        off = 0.0 if mean is None else narrow
        assert float(found.mean()) == pytest.approx(off if mean is not None else narrow - 0.0288, abs=0.004)


def test_a_model_knows_the_mean_of_its_data(tmp_path):
    net = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"data_mean is \(0.1,\); expected a number for each of 3 channels"):
        ScoreModel(net, VE(), data_shape=(3, 4, 4), data_mean=(0.1,))
    x = torch.rand(200, 1, 8, 8)
    np.save(tmp_path / "x.npy", (255 * x**0.3).round().numpy().astype(np.uint8))
    c = default_config()
    c.data.source, c.data.path, c.model.net.width = "arrays", str(tmp_path / "x.npy"), 8
    model = build(c).model
    model.save(tmp_path / "saved")
    again = ScoreModel.load(tmp_path / "saved")
    wanted = np.load(tmp_path / "x.npy").mean() / 127.5 - 1
    assert again.data_mean.shape == (1, 1, 1)
    assert float(again.data_mean) == pytest.approx(wanted, abs=1e-5)
    assert again.conditioned is not None
    assert float(clipped(again, -1, 1).data_mean) == float(again.data_mean)
    # another shape is refused as by any model: the mean does not broadcast it into shape
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 8, 8\); expected \(B, 1, 8, 8\)"):
        sample(again, (2, 3, 8, 8))
    colour = ScoreModel(model.net, VE(), data_shape=(3, 8, 8), data_mean=(0.1, 0.2, 0.3))
    for shape in ((2, 1, 8, 8), (5, 1), (2, 8, 8, 3)):
        with pytest.raises(ValueError, match=r"expected \(B, 3, 8, 8\)"):
            sample(colour, shape)
