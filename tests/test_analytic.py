"""The optimal variance of ancestral steps: Gaussians in closed form, a mixture by numerical integration."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from problems import F64, generator, randn
from scipy.integrate import quad

from scorelab import PerSampleNoise, sample, variational_bound
from scorelab.cli.main import main
from scorelab.cli.runs import load_run
from scorelab.cli.sampling import sample_run
from scorelab.distributions import Gaussian, GaussianMixture
from scorelab.inverse import Inpainting, Measurement
from scorelab.samplers import AnalyticVariance, Ancestral, analytic_variance
from scorelab.samplers.base import Context
from scorelab.training import build_sampling, default_config, load_data, posterior_samples, train, with_statistics

S = 0.5
GAUSSIAN = Gaussian(torch.zeros(2, dtype=F64), S**2)


def exact(levels: list[float], s: float = S) -> AnalyticVariance:
    """That of N(0, s^2 I)."""
    return AnalyticVariance(tuple(levels), tuple(s**2 * a**2 / (s**2 + a**2) for a in levels), (0.0,) * len(levels))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_few_steps_keep_the_variance_of_gaussian_data(steps):
    """The moments of N(0, s^2 + sigma^2) are met to the last digit at every level; both fixed choices miss them."""
    levels = torch.logspace(math.log10(20), math.log10(0.3), steps + 1, dtype=F64).tolist()

    def variance_of(sampler: Ancestral) -> float:
        var = S**2 + levels[0] ** 2
        for a, b in zip(levels, levels[1:], strict=False):
            noise = torch.ones_like
            one, zero = (
                float(sampler.step(Context(GAUSSIAN.score, x, a, b, None, noise))[0][0, 0])
                for x in (torch.ones(1, 2, dtype=F64), torch.zeros(1, 2, dtype=F64))
            )
            var = (one - zero) ** 2 * var + zero**2
        return var

    wanted = S**2 + levels[-1] ** 2
    assert variance_of(Ancestral(exact(levels))) == pytest.approx(wanted, rel=1e-12)
    # by closed form the posterior variance is short of it, and forward, of DDPM's process, too large for s < 1
    assert variance_of(Ancestral()) < 0.99 * wanted
    assert variance_of(Ancestral("forward")) > 1.01 * wanted


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_one_number_a_step_moves_variance_from_wide_directions_to_narrow_ones(steps):
    """Of variances l it is exact in their sum, for one step: what wide directions lack is not made up afterwards."""
    variances = torch.tensor([3.0, 0.5, 0.01], dtype=F64)
    data = Gaussian(torch.zeros(3, dtype=F64), variances)
    levels = torch.logspace(1.5, -2, steps + 1, dtype=F64).tolist()
    means = tuple(float((variances * a**2 / (variances + a**2)).mean()) for a in levels)
    analytic, found = AnalyticVariance(tuple(levels), means, (0.0,) * len(levels)), {}
    for variance in (analytic, "posterior", "forward"):
        # a step is affine in x and in the noise
        left, zero, one = variances + levels[0] ** 2, torch.zeros(1, 3, dtype=F64), torch.ones(1, 3, dtype=F64)
        for a, b in zip(levels, levels[1:], strict=False):
            scale, noise = (
                Ancestral(variance).step(Context(data.score, x, a, b, None, lambda x, z=z: z.clone()))[0][0]
                for x, z in ((one, zero), (zero, one))
            )
            left = scale**2 * left + noise**2
        found[variance] = left / (variances + levels[-1] ** 2)
    wanted = variances + levels[-1] ** 2
    short = float((found[analytic] * wanted).sum() / wanted.sum())
    assert short == pytest.approx(1, rel=1e-12) if steps == 1 else short < 0.999
    assert found[analytic][0] < 1 < found[analytic][2]
    assert bool((found["posterior"] < 1).all())
    # forward's is right for deviation 1
    assert found["forward"][0] < 1 < found["forward"][1] < found["forward"][2]


def test_samples_of_estimated_variances():
    """4 steps from the data's own statistics: 20,000 samples have the data's variance, to 4 standard errors."""
    levels = [20.0, 4.0, 1.0, 0.3, 0.02]
    found = analytic_variance(GAUSSIAN.score, GAUSSIAN.sample(20_000, generator()), levels, generator=generator(1))
    for c, error, right in zip(found.denoised, found.errors, exact(levels).denoised, strict=True):
        assert c == pytest.approx(right, abs=4 * error)
        assert error < 0.02 * right
    wanted, count = S**2 + 0.02**2, 40_000
    for variance in (found, "posterior", "forward"):
        x = sample(
            GAUSSIAN.score, (count, 2), levels, Ancestral(variance), data_std=S, dtype=F64, generator=generator(2)
        )
        off = float(x.square().mean()) / wanted - 1
        within = 4 * math.sqrt(2 / (2 * count)) + 0.01
        assert abs(off) < within if isinstance(variance, AnalyticVariance) else abs(off) > within


def test_a_mixture_by_numerical_integration():
    """E Var(x_r | x) of two components in one dimension, both methods, and E||score||^2."""
    d = GaussianMixture(
        torch.tensor([[-1.0], [1.5]], dtype=F64), torch.tensor([0.2, 0.5], dtype=F64), torch.tensor([0.4, 0.6])
    )
    levels, w, m, s = [3.0, 0.8, 0.3], np.array([0.4, 0.6]), np.array([-1.0, 1.5]), np.array([0.2, 0.5])

    def parts(x: float, a: float) -> tuple[float, np.ndarray, np.ndarray]:
        """Density at x, and mean and variance of x0 given x."""
        var = s**2 + a**2
        p = w * np.exp(-0.5 * (x - m) ** 2 / var) / np.sqrt(2 * np.pi * var)
        mean, inner = m + s**2 / var * (x - m), s**2 * a**2 / var
        first = (p * mean).sum() / p.sum()
        return p.sum(), first, (p * (inner + mean**2)).sum() / p.sum() - first**2

    def integral(f) -> float:
        return quad(f, -25, 25, points=[-1, 1.5], limit=400)[0]

    x0 = d.sample(100_000, generator(3))
    found = {k: analytic_variance(d.score, x0, levels, method=k, generator=generator(4)) for k in ("error", "norm")}
    for i, (a, r) in enumerate([(3.0, 0.8), (0.8, 0.3)]):
        posterior = Ancestral().variances(a, r)[0]
        # the variance of x_r given x, from that of x0
        share = 1 - r**2 / a**2
        right = integral(lambda x, a=a, p=posterior, k=share: parts(x, a)[0] * (p + k**2 * parts(x, a)[2]))
        norm = integral(lambda x, a=a: parts(x, a)[0] * ((parts(x, a)[1] - x) / a**2) ** 2)
        for v in found.values():
            error = share**2 * v.errors[i]
            assert posterior + v.beyond(a, r) == pytest.approx(right, abs=4 * error)
            assert v.norms[i] == pytest.approx(norm, abs=4 * v.errors[i] / a**4)
    # by far less noise where sigma is large
    assert found["error"].errors[0] < 0.5 * found["norm"].errors[0]


def test_it_stays_within_its_bounds():
    """No less than nothing, and no more than the best linear denoiser leaves, whatever was estimated."""
    v = AnalyticVariance((2.0, 1.0), (50.0, -3.0), (0.1, 0.1), data_std=0.5)
    assert v.at(2.0) == pytest.approx(0.25 * 4 / 4.25)
    assert v.at(1.0) == 0
    posterior, _ = Ancestral().variances(1.0, 0.5)
    _, std = Ancestral(v).transition(GAUSSIAN.score, torch.zeros(1, 2, dtype=F64), 1.0, 0.5)
    assert std == pytest.approx(math.sqrt(posterior))
    # and the norm's estimate of Gaussian data lies on the upper one, however noisy
    x0 = GAUSSIAN.sample(5000, generator())
    found = analytic_variance(GAUSSIAN.score, x0, [40.0, 1.0], method="norm", generator=generator(1))
    assert found.data_std == pytest.approx(S, rel=0.05)
    assert found.errors[0] > 10
    assert 0 <= found.at(40.0) <= 0.26
    # what a wrong mean adds is not cut off
    wrong = analytic_variance(lambda x, s: GAUSSIAN.score(x, s) + 2, x0, [1.0], generator=generator(1))
    assert wrong.at(1.0) == pytest.approx(0.2 + 4, rel=0.05)


def test_values_in_bins_are_decoded_by_the_forward_variance():
    """That of x0 given x is best for a density, which a few numbers that are far off would widen."""
    levels, x0 = [2.0, 0.5], torch.round(4 * GAUSSIAN.sample(20, generator())).clamp(-4, 4) / 4
    found = [
        variational_bound(GAUSSIAN.score, x0, levels, Ancestral(v), spacing=0.25, generator=generator(1))
        for v in (exact(levels), "forward")
    ]
    assert torch.equal(found[0].decoder, found[1].decoder)
    assert not torch.equal(found[0].steps, found[1].steps)


def test_rows_of_a_bound_score_are_evaluated_in_parts():
    class Bound:
        most = 0

        def __init__(self, mean):
            self.mean = mean

        def __call__(self, x, sigma):
            Bound.most = max(Bound.most, len(x))
            return -(x - self.mean) / (S**2 + sigma**2)

        def rows(self, index):
            return Bound(self.mean[index])

    mean = randn(600, 3)
    x0 = mean + S * randn(600, 3, seed=1)
    found = analytic_variance(Bound(mean), x0, [1.0], batch_size=100, generator=generator())
    assert Bound.most == 100
    assert found.denoised[0] == pytest.approx(0.2, abs=4 * found.errors[0])


def test_a_run_samples_and_has_its_bound_with_it(tmp_path, capsys):
    """By the command line, and from the config before training; held-out data takes no part in the estimate."""
    c = default_config()
    c.data.source, c.data.validation, c.process.name = "digits", 100, "ddpm"
    c.model.prediction, c.model.label = "eps", "index"
    c.model.net.width, c.model.net.multipliers, c.model.net.blocks = 4, (1, 1), 1
    c.training.steps, c.training.checkpoint_every, c.training.sample_every, c.training.batch_size = 2, 2, 1, 16
    c.sampling.sampler.name, c.sampling.sampler.variance = "ancestral", "analytic"
    c.sampling.grid.name, c.sampling.grid.steps, c.sampling.samples = "steps", 3, 2
    train(c, tmp_path / "a", progress=False)
    x = sample_run(tmp_path / "a", n=3).x
    # as made by hand
    model = load_run(tmp_path / "a")[1]
    source = load_data(c)
    held = source.hold_out(100).x0
    x0 = source.batch(c.seed, 0, 512).x0
    assert not (x0[:, None] == held).flatten(2).all(2).any()
    levels, _ = build_sampling(c, model)
    v = analytic_variance(model, x0, levels, generator=PerSampleNoise(c.seed))
    torch.testing.assert_close(
        sample(model, (3, 1, 8, 8), levels, Ancestral(v, model.process), generator=PerSampleNoise(0)), x
    )
    # a posterior score is sampled with it, too
    operator = Inpainting(torch.arange(64).reshape(1, 8, 8) < 32)
    known = Measurement(operator, operator(torch.zeros(1, 1, 8, 8)))
    with warnings.catch_warnings():
        # an untrained network's samples may grow
        warnings.filterwarnings("ignore", "samples have grown")
        assert bool(posterior_samples(model, c, known, 2, method="pseudo_inverse").isfinite().all())
    # the estimate is without guidance, and leaves the run's own as it was
    c.sampling.guidance = 2.0
    with_statistics(Ancestral("analytic", model.process), model, c, levels)
    assert c.sampling.guidance == 2
    command = ["likelihood", f"--workdir={tmp_path / 'a'}", "--method=bound", "--bits", "--n=20", "--steps=4"]
    bits = {}
    for kind in ("analytic", "forward"):
        assert main([*command, f"--variance={kind}"]) == 0
        bits[kind] = json.loads(capsys.readouterr().out)["bound"]["mean"]
    assert bits["analytic"] < bits["forward"]
    assert main([*command, "--variance=learned"]) == 2
    assert "the network learned none" in capsys.readouterr().err
    assert main(["likelihood", f"--workdir={tmp_path / 'a'}", "--variance=forward"]) == 2
    assert "expected none with --method=ode" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: analytic_variance(GAUSSIAN.score, torch.zeros(1, 2), [1.0]), "1 samples"),
        (lambda: analytic_variance(GAUSSIAN.score, torch.zeros(3, 2), [1.0], method="nrom"), "did you mean 'norm'"),
        (lambda: analytic_variance(lambda x, s: x * math.nan, torch.zeros(3, 2), [1.0]), "at sigma = 1 is not finite"),
        (lambda: exact([2.0, 1.0]).at(1.5), "1.5 is none of them"),
        (lambda: Ancestral("bogus"), "expected 'posterior', 'forward', 'learned'"),
        (lambda: sample(GAUSSIAN.score, (2, 2), [1.0, 0.5], Ancestral("analytic"), dtype=F64), "expected one of data"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
