from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from problems import F64, generator, mixture, randn

from scorelab import VP, losses, sigmas
from scorelab.distributions import Empirical
from scorelab.divergence import rademacher
from scorelab.losses import Denoising, denoising_loss, implicit_loss, sliced_loss, weighting
from scorelab.losses.denoising import posterior_mean
from scorelab.nn import UNet
from scorelab.predictions import V

STD, SIGMA, N = 1.5, 0.8, 40_000
VAR = STD**2 + SIGMA**2
SIG = torch.tensor(SIGMA, dtype=F64)


def linear(slope: torch.Tensor, shift: torch.Tensor):
    """s(x) = -slope x + shift, a family that holds the true score of N(0, VAR): slope = 1/VAR, shift = 0."""
    return lambda x, sigma: -slope * x + shift


def minimiser(loss) -> tuple[float, float]:
    """The minimum of a loss that is quadratic in (slope, shift), by one Newton step."""
    theta = torch.tensor([0.1, 0.2], dtype=F64)

    def value(t):
        return loss(linear(t[0], t[1])).mean()

    gradient = torch.autograd.functional.jacobian(value, theta)
    hessian = torch.autograd.functional.hessian(value, theta)
    best = theta - torch.linalg.solve(hessian, gradient)
    return float(best[0]), float(best[1])


X0 = STD * randn(N, 2, seed=1)
EPS = randn(N, 2, seed=2)
X = X0 + SIGMA * EPS
PROBES = rademacher((1, N, 2), X, generator(3))
LOSSES = {
    "denoising": lambda s: denoising_loss(s, X0, SIG, EPS),
    "implicit": lambda s: implicit_loss(s, X, SIG),
    "hutchinson": lambda s: implicit_loss(s, X, SIG, probes=PROBES),
    "sliced": lambda s: sliced_loss(s, X, SIG, PROBES),
    "sliced plain": lambda s: sliced_loss(s, X, SIG, PROBES, variance_reduced=False),
}


@pytest.mark.parametrize("name", LOSSES)
def test_minimised_by_the_true_score_of_a_gaussian(name):
    slope, shift = minimiser(LOSSES[name])
    assert slope == pytest.approx(1 / VAR, rel=0.03)
    assert abs(shift) < 0.02


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "denoising"])
def test_all_agree_up_to_the_known_constants(name):
    """1/2 E||s - s*||^2 = implicit + 1/2 E||s*||^2 = D/(2 sigma^2) denoising - 1/2 E[tr Cov(eps|x)] / sigma^2."""
    for slope in (0.2, 1 / VAR, 0.6):
        s = linear(torch.tensor(slope, dtype=F64), torch.tensor(0.1, dtype=F64))
        explicit = 0.5 * float((s(X, SIG) + X / VAR).square().sum(1).mean())
        half_norm = 0.5 * 2 / VAR
        assert float(LOSSES[name](s).detach().mean()) + half_norm == pytest.approx(explicit, abs=0.03)
        # Cov(eps | x) = STD^2 / VAR in each of 2 dimensions
        constant = 0.5 * 2 * (STD**2 / VAR) / SIGMA**2
        denoising = 2 / (2 * SIGMA**2) * float(LOSSES["denoising"](s).mean())
        assert denoising - constant == pytest.approx(explicit, abs=0.03)


def test_denoising_target_and_sign():
    """The loss is zero exactly for s = -eps / sigma, and 1 on average for the zero score."""
    exact = denoising_loss(lambda x, s: -EPS / SIGMA, X0, SIG, EPS)
    torch.testing.assert_close(exact, torch.zeros(N, dtype=F64))
    zero = denoising_loss(lambda x, s: torch.zeros_like(x), X0, SIG, EPS)
    assert float(zero.mean()) == pytest.approx(1, abs=4 / math.sqrt(N))


@pytest.mark.filterwarnings("ignore:the likelihood weighting has an effective sample size")
@pytest.mark.parametrize("sigma", [0.05, 0.9, 7.0])
def test_weightings_by_their_definitions(sigma):
    """Each weighting, stated on the error of x0_hat, against the loss computed from x0_hat directly."""
    s = torch.full((100,), sigma, dtype=F64)
    x0, eps = X0[:100], EPS[:100]
    score = mixture().score
    error = (mixture().denoise(x0 + sigma * eps, sigma) - x0).square().mean(1)
    sd = 0.7
    on_x0 = {
        "sigma2": 1 / sigma**2,
        "snr": 1 / sigma**2,
        "output": (1 + sigma**2) / sigma**2,  # of v, whose out is sigma/sqrt(1 + sigma^2)
        "x0": 1.0,
        "edm": (sigma**2 + sd**2) / (sigma * sd) ** 2,
        "min_snr": min(1 / sigma**2, 5.0),
        "likelihood": VP().diffusion(VP().time(s))[0] ** 2
        / VP().alpha(VP().time(s))[0] ** 2
        / 2
        / sigma**4
        * (1 - 1e-5),
    }
    for name in losses.WEIGHTINGS:
        w = weighting(name, sigma_data=sd, sigmas=sigmas.FromProcess(VP()), prediction=V)
        found = denoising_loss(score, x0, s, eps, w)
        torch.testing.assert_close(found, error * float(on_x0[name]), rtol=1e-9, atol=0)


def test_stratified_levels_cover_the_distribution():
    objective = Denoising(sigmas.LogUniform(0.1, 10.0))
    found = objective(mixture().score, X0[:64], generator())
    u = (found.sigma.log() - math.log(0.1)) / math.log(100)
    assert bool((u.sort().values * 64 // 1 == torch.arange(64)).all())
    assert torch.equal(found.loss, objective(mixture().score, X0[:64], generator()).loss)


@pytest.mark.parametrize(("count", "dims"), [(300, 2), (300, 40), (2000, 12)])
@pytest.mark.parametrize("offset", [0.0, 30.0, -500.0])
def test_posterior_means_keep_their_digits_far_from_the_origin(count, dims, offset):
    """Beside weights from differences in float64, of the same float32 numbers: few and many centres and dimensions."""
    data = (offset + 0.3 * randn(count, dims)).float()
    x = data[:50] + 0.1 * randn(50, dims, seed=1).float()
    sigma = torch.linspace(0.05, 0.5, 50)
    d2 = (x.double().unsqueeze(1) - data.double()).square().sum(2)
    weight = torch.softmax(-d2 / (2 * sigma.double().square().unsqueeze(1)), 1)
    right = weight @ data.double()
    # a rounding of x itself shifts the mean by a few roundings
    near = 2e-5 * sigma.unsqueeze(1) + 4e-7 * abs(offset)
    assert ((posterior_mean(x, sigma, data) - right).abs() < near).all()
    score = (right - x.double()) / sigma.double().unsqueeze(1) ** 2
    assert ((Empirical(data).score(x, sigma) - score).abs() < near / sigma.unsqueeze(1) ** 2).all()


def test_stable_target_is_the_posterior_mean_and_lowers_the_variance():
    d = mixture()
    data = d.sample(3000, generator(1))
    x, sigma = d.sample(50, generator(2)) + 0.5 * randn(50, 2), torch.full((50,), 0.5, dtype=F64)
    w = torch.softmax(-torch.cdist(x, data).square() / (2 * 0.25), 1)
    torch.testing.assert_close(posterior_mean(x, sigma, data), w @ data)
    assert float((w @ data - d.denoise(x, 0.5)).abs().mean()) < 0.05
    # the true score's loss is what cannot be predicted: far less of it is left with the stable target
    level = sigmas.FromSigmas([0.5])
    plain = Denoising(level)(d.score, data, generator(), 256).loss.mean()
    stable = Denoising(level, reference=3000)(d.score, data, generator(), 256).loss.mean()
    assert float(stable) < 0.1 * float(plain)


def test_likelihood_weights_that_leave_few_samples_in_effect_are_warned_of():
    """Two parts of weights a/s and b/(1 - s), visited with probability s and 1 - s: (a + b)^2 / (a^2/s + b^2/(1-s))."""
    low, high = math.log(2), math.log(2500)
    for share, warned in ((0.05, True), (0.2, False)):
        effective = (low + high) ** 2 / (high**2 / share + low**2 / (1 - share))
        distribution = sigmas.Tapered(0.01, 0.02, 50.0, share)
        assert (effective < 0.1) == warned
        with pytest.warns(RuntimeWarning, match=f"size of {effective:.2%} with") if warned else nullcontext():
            weighting("likelihood", sigmas=distribution)
    for distribution in (sigmas.LogNormal(), sigmas.FromProcess(VP())):
        with pytest.warns(RuntimeWarning, match=r"effective sample size of [01]\.\d+%"):
            weighting("likelihood", sigmas=distribution)
    weighting("likelihood", sigmas=sigmas.LogUniform(0.01, 50.0))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="did you mean 'min_snr'"):
        weighting("min-snr")
    with pytest.raises(ValueError, match="sigma has shape"):
        denoising_loss(mixture().score, X0[:4], torch.ones(3, dtype=F64), EPS[:4])
    with pytest.raises(ValueError, match="LogUniform"):
        weighting("likelihood")


@pytest.mark.parametrize("name", ["exact", "probes", "sliced"])
def test_networks_with_attention_learn_by_their_own_derivatives(name):
    """Fused kernels of attention can be differentiated once only; the slope is that of differences, in float64."""
    net = UNet((1, 4, 4), width=4, multipliers=(1,), blocks=1, attention=(0,), head=4).double().eval()
    torch.nn.init.normal_(net.last.weight, std=0.3, generator=generator())
    x, sigma, probes = randn(2, 1, 4, 4), torch.tensor(0.7, dtype=F64), randn(1, 2, 1, 4, 4, seed=5)
    score = lambda y, s: net(y, s.expand(len(y)))  # noqa: E731

    def loss():
        if name == "sliced":
            return sliced_loss(score, x, sigma, probes).sum()
        return implicit_loss(score, x, sigma, probes=probes if name == "probes" else None).sum()

    weight = net.middle[0].attention.qkv.weight
    (slope,) = torch.autograd.grad(loss(), weight)
    move = 1e-5 * randn(*weight.shape, seed=6)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * move
        ends.append(float(loss().detach()))
        with torch.no_grad():
            weight -= sign * move
    assert float((slope * move).sum()) == pytest.approx((ends[0] - ends[1]) / 2, rel=1e-4)
