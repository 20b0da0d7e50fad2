"""The variational bound: the release's terms, exact densities from below, and its own estimators against each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from problems import F64, REFERENCE, generator, mixture, randn
from scipy import stats

from scorelab import VE, DiscreteVP, clipped, sigmas, variational_bound
from scorelab.distributions import Gaussian
from scorelab.likelihood import log_likelihood
from scorelab.likelihood.bound import _Chain
from scorelab.losses.variational import gaussian_kl, log_bin_mass
from scorelab.noise import Noise
from scorelab.samplers import DDIM, Ancestral
from scorelab.samplers.base import Counted

LOG2 = math.log(2)


def close_to_float32(found: torch.Tensor, expected: np.ndarray, absolute: float) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=F64), rtol=1e-5, atol=absolute)


class Released:
    """The release's output at one step: eps and the variance's interpolation, x0_hat clipped."""

    def __init__(self, output: torch.Tensor) -> None:
        eps, v = output.chunk(2, dim=1)
        self.v = (v + 1) / 2
        self.score = clipped(lambda x, sigma: -eps / sigma, -1, 1)

    def __call__(self, x, sigma):
        return self.score(x, sigma)

    def score_and_variance(self, x, sigma):
        return self.score(x, sigma), self.v


@pytest.mark.parametrize("kind", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_terms_equal_guided_diffusion(schedule, kind):
    """bits/dim of each step's divergence; at the last step the release's approximate decoder on our Gaussian."""
    ref = np.load(REFERENCE / "guided_diffusion_gaussian.npz")
    process = DiscreteVP(ref[f"{schedule}1000/betas"].tolist())
    sampler = Ancestral({"FIXED_SMALL": "posterior", "FIXED_LARGE": "forward", "LEARNED_RANGE": "learned"}[kind])
    x0 = torch.tensor(ref["x"], dtype=F64)
    for row, t in enumerate(ref["t"].tolist()):
        this = slice(row, row + 1)
        score = Released(torch.tensor(ref["model_output"][this], dtype=F64))
        times = torch.tensor([t + 1, t, 2], dtype=F64) / 1000
        alpha, (sigma, sigma_next, second) = process.alpha(times), process.sigma(times).tolist()
        x = torch.tensor(ref["xt"][this], dtype=F64) / alpha[0]
        if t > 0:
            mean, std = sampler.transition(score, x, sigma, sigma_next)
            true = x0[this] + (sigma_next / sigma) ** 2 * (x - x0[this])
            nats = gaussian_kl(true - mean, math.sqrt(sampler.variances(sigma, sigma_next)[0]), std)
            # float32 of the release: rounding of its means, in units of the step's deviation, and of 1 - 1
            absolute = 2e-6 if t < 700 else 2e-7
            expected = ref[f"{schedule}/{kind}/vb_bpd"][this]
            assert float(nats.mean() / LOG2) == pytest.approx(float(expected[0]), rel=1e-5, abs=absolute)
            continue
        least = float(sampler.variances(second, sigma)[0]) / (1 + sigma**2)
        mean, std = sampler.transition(score, x, sigma, 0.0, least)
        if kind != "LEARNED_RANGE":
            std = torch.full_like(mean, math.sqrt(ref[f"{schedule}1000/posterior_variance"][1]))
            assert least == pytest.approx(float(std.max()) ** 2, rel=1e-9)

        def cdf(z):
            # in single precision, whose differences near 1 are 0 where the release's are
            z = z.float()
            return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

        upper = cdf((x0[this] - mean + 1 / 255) / std)
        lower = cdf((x0[this] - mean - 1 / 255) / std)
        mass = torch.where(x0[this] < -0.999, upper, torch.where(x0[this] > 0.999, 1 - lower, upper - lower))
        found = -mass.clamp_min(1e-12).log().mean() / LOG2
        assert float(found) == pytest.approx(float(ref[f"{schedule}/{kind}/vb_bpd"][row]), rel=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_prior_term_equals_guided_diffusion(schedule):
    ref = np.load(REFERENCE / "guided_diffusion_gaussian.npz")
    process = DiscreteVP(ref[f"{schedule}1000/betas"].tolist())
    x0 = torch.tensor(ref["x"], dtype=F64)
    found = variational_bound(
        lambda x, s: -x / (1 + s**2), x0, process.step_sigmas.flip(0)[:1], data_std=1.0, generator=generator()
    )
    # the release subtracts 1 - 1 in float32
    close_to_float32(found.prior / (x0[0].numel() * LOG2), ref[f"{schedule}/prior_bpd"], 3e-8)


def test_bin_masses_equal_scipy():
    """Also far out, where a difference of distribution functions is 0 in float64."""
    gap = torch.tensor([0.0, 0.3, -0.3, 4.0, -4.0, 30.0, -30.0], dtype=F64)
    no = torch.zeros(7, dtype=torch.bool)
    found = log_bin_mass(gap, 0.7, 0.2, no, no)
    left = -gap.abs().numpy()
    upper, lower = (left + 0.1) / 0.7, (left - 0.1) / 0.7
    expected = stats.norm.logcdf(upper) + np.log1p(-np.exp(stats.norm.logcdf(lower) - stats.norm.logcdf(upper)))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-10, atol=0)
    # open ends: with all values the masses add up to 1
    values = torch.linspace(-1, 1, 11, dtype=F64)
    total = log_bin_mass(values - 0.37, 0.7, 0.2, values <= -0.95, values >= 0.95).exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-12)


def test_it_is_exact_where_every_step_is_gaussian():
    """One Gaussian: p(x_{i-1} | x_i) is Gaussian, and of the posterior's mean; with its own variance the bound's gap
    is the sum of divergences that are known in closed form."""
    s2, levels = 0.49, sigmas.geometric(60, sigma_min=0.05, sigma_max=20.0).tolist()
    d, x0 = Gaussian(torch.zeros(1, dtype=F64), s2), 0.7 * randn(80_000, 1)
    decoder = math.sqrt(s2 * levels[-1] ** 2 / (s2 + levels[-1] ** 2))
    found = variational_bound(d.score, x0, levels, data_std=0.7, decoder_std=decoder, generator=generator(1))
    gap = 0.0
    for a, b in zip(levels, levels[1:], strict=False):
        # E KL: the true variance of x_b given x_a exceeds the posterior's by (1 - b^2/a^2)^2 Var(x0 | x_a)
        posterior = b**2 * (1 - b**2 / a**2)
        gap += 0.5 * (1 - b**2 / a**2) ** 2 * s2 * a**2 / (s2 + a**2) / posterior
        true = posterior + (1 - b**2 / a**2) ** 2 * s2 * a**2 / (s2 + a**2)
        gap -= 0.5 * math.log(true / posterior)
    difference = d.log_prob(x0, 0.0) - found.log_prob
    error = float(difference.std()) / math.sqrt(len(x0))
    assert float(difference.mean()) == pytest.approx(gap, abs=4 * error)
    assert error < 0.01 < gap


def test_more_draws_tighten_it_towards_the_exact_density():
    """On a mixture in the plane: one draw < 20 draws < exact, on average, and near it with many levels."""
    d = mixture()
    x0 = d.sample(500, generator(3))
    exact = float(d.log_prob(x0, 0.0).mean())
    levels = sigmas.geometric(150, sigma_min=0.02, sigma_max=40.0)
    options = {"data_std": 1.5, "sampler": Ancestral("forward", VE())}
    one = variational_bound(d.score, x0, levels, generator=generator(4), **options)
    many = variational_bound(d.score, x0, levels, draws=20, generator=generator(5), **options)
    ode = log_likelihood(d.score, x0, 0.005, 40.0, data_std=1.5).log_prob.mean()
    assert float(ode) == pytest.approx(exact, abs=0.02)
    assert one.nfe == 150
    assert many.nfe == 20 * 150
    assert float(one.log_prob.mean()) < float(many.log_prob.mean()) < exact + 0.005
    assert exact - float(many.log_prob.mean()) < 0.05
    torch.testing.assert_close(one.log_prob, -(one.prior + one.steps.sum(0) + one.decoder))


@pytest.mark.parametrize("variance", ["posterior", "forward"])
def test_whole_chains_weigh_what_the_closed_forms_average(variance):
    """The mean log weight of single chains is the bound; both are unbiased."""
    d = mixture()
    x0, levels = d.sample(1, generator(3)).expand(20_000, 2), sigmas.geometric(12, sigma_min=0.1, sigma_max=10.0)
    options = {"data_std": 1.0, "sampler": Ancestral(variance)}
    closed = variational_bound(d.score, x0, levels, generator=generator(1), **options).log_prob
    chain = _Chain(
        Counted(d.score), x0, levels.tolist(), options["sampler"], Noise(generator(2)), math.hypot(10.0, 1.0)
    )
    single = chain.log_weight - chain.decode(None, None, (-1, 1))
    error = math.hypot(float(closed.std()), float(single.std())) / math.sqrt(len(x0))
    assert float(closed.mean() - single.mean()) == pytest.approx(0.0, abs=4 * error)


def test_bits_of_values_in_bins():
    """Data that takes two values: the bound on their probability 1/2 each is met to a hundredth of a nat."""
    values = torch.tensor([[-1.0], [1.0]], dtype=F64)

    def score(x, sigma):
        return (torch.tanh(x / sigma**2) - x) / sigma**2

    levels = sigmas.geometric(200, sigma_min=0.1, sigma_max=30.0)
    x0 = values.repeat(500, 1)
    found = variational_bound(score, x0, levels, data_std=1.0, spacing=2.0, generator=generator(1))
    assert float(found.log_prob.mean()) == pytest.approx(math.log(0.5), abs=0.03)
    assert float(found.log_prob.mean()) < math.log(0.5) + 3 * float(found.log_prob.std()) / math.sqrt(1000)


def test_learned_variance_decodes_between_both():
    """v = 1 is the forward variance, v = 0 the posterior variance of the step before, scaled to where x0 lives."""
    d, levels = mixture(), sigmas.geometric(9, sigma_min=0.1, sigma_max=10.0).tolist()
    x0 = d.sample(50, generator(3))

    class Learned:
        def __init__(self, v: float) -> None:
            self.v = v

        def __call__(self, x, sigma):
            return d.score(x, sigma)

        def score_and_variance(self, x, sigma):
            return d.score(x, sigma), torch.full_like(x, self.v)

    def bound(score, variance, **options):
        return variational_bound(score, x0, levels, Ancestral(variance), generator=generator(1), **options).log_prob

    torch.testing.assert_close(bound(Learned(1.0), "learned"), bound(d.score, "forward"))
    a, b = levels[-2], levels[-1]
    # beta tilde of the second step: alpha_1^2 times the unscaled variance
    std = math.sqrt(b**2 * (1 - b**2 / a**2) / (1 + b**2))
    torch.testing.assert_close(bound(Learned(0.0), "learned"), bound(d.score, "posterior", decoder_std=std))


def test_divergences_of_very_unequal_gaussians_in_single_precision():
    for ratio in (1e-6, 1e-3, 0.999, 1.0, 1e3):
        exact = math.expm1(2 * math.log(ratio)) / 2 - math.log(ratio) + 0.5 * (0.3 / 2.0) ** 2
        difference = torch.tensor(0.3)
        for std in (2.0 * ratio, torch.tensor(2.0 * ratio)):
            assert float(gaussian_kl(difference, std, 2.0)) == pytest.approx(exact, rel=2e-6)


def test_no_rows():
    assert variational_bound(mixture().score, torch.zeros(0, 2, dtype=F64), [2.0, 1.0]).log_prob.shape == (0,)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"draws": 0}, ValueError, "draws is 0"),
        ({"draws": 2.5}, ValueError, "draws is 2.5"),
        ({"spacing": -1.0}, ValueError, "spacing is -1"),
        ({"decoder_std": 0.0}, ValueError, "decoder_std is 0"),
        ({"data_std": math.nan}, ValueError, "data_std is nan"),
        ({"sigmas": [1.0, 2.0]}, ValueError, "strictly descending"),
        ({"x0": torch.full((3, 2), math.nan)}, ValueError, "x0 is not finite at 3 of 3"),
        ({"x0": torch.zeros(3, 2).half()}, TypeError, "off by nats"),
        ({"x0": torch.full((3, 2), 200.0), "spacing": 1.0}, ValueError, r"x0 spans \[200, 200\] but .* \[-1, 1\]"),
        ({"spacing": 1.0, "data_range": (1.0, -1.0)}, ValueError, "expected .low, high."),
        ({"sampler": Ancestral("learned")}, TypeError, "score_and_variance"),
        ({"sampler": DDIM()}, TypeError, "expected scorelab.samplers.Ancestral"),
        ({"generator": 3}, TypeError, "generator is int"),
        ({"score": lambda x, s: x * math.nan}, ValueError, "the bound is not finite at 3 of 3"),
    ],
)
def test_bad_input_is_refused(options, error, message):
    given = {"score": mixture().score, "x0": torch.zeros(3, 2, dtype=F64), "sigmas": [2.0, 1.0], **options}
    with pytest.raises(error, match=message):
        variational_bound(**given)


def test_levels_that_the_score_does_not_know_are_refused():
    class Known:
        sigma_range = (0.5, 2.0)

        def __call__(self, x, sigma):
            return -x

    with pytest.raises(ValueError, match="sigma_range"):
        variational_bound(Known(), torch.zeros(3, 2), [5.0, 1.0])
