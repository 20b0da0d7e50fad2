"""VDM's process and bound: the inverse of a learned schedule, exact densities, and what each part learns from."""

from __future__ import annotations

import math

import pytest
import torch
from ml_collections import ConfigDict
from problems import F64, generator, randn

from scorelab import VE, VP, ScoreModel
from scorelab.cli.sampling import sample_run
from scorelab.losses import Bins, ContinuousBound
from scorelab.nn import MLP
from scorelab.processes import Learned
from scorelab.training import default_config, train
from scorelab.typing import Batch

LEVELS = torch.linspace(0, 1, 41, dtype=F64)


def bent(ends: bool = True) -> Learned:
    """One whose inside is no straight line."""
    made = Learned(-9.0, 6.0, hidden=6, ends=ends)
    with torch.no_grad():
        made.weights.copy_(torch.tensor([2.0, -1.0, 1.0, -4.0, 3.0, 0.5]))
        made.slopes.copy_(torch.tensor([20.0, 5.0, 9.0, 8.0, 30.0, 3.0]))
    return made


@pytest.mark.parametrize("process", [bent(), Learned(-9.0, 6.0, hidden=0)], ids=["bent", "straight"])
def test_a_learned_schedule_rises_between_its_ends_and_is_inverted(process):
    sigma = process.sigma(LEVELS).detach()
    assert bool((sigma[1:] > sigma[:-1]).all())
    ends = torch.tensor([math.exp(-4.5), math.exp(3.0)], dtype=F64)
    torch.testing.assert_close(sigma[[0, -1]], ends, rtol=1e-6, atol=0)
    torch.testing.assert_close(process.time(sigma).detach(), LEVELS, rtol=0, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(process.time(sigma), LEVELS, rtol=0, atol=1e-9)
        torch.testing.assert_close(process.alpha(LEVELS), torch.rsqrt(1 + sigma**2), rtol=1e-9, atol=0)
    # d log alpha / dt and d std^2 / dt by finite differences
    t, h = LEVELS[1:-1], 1e-6
    with torch.no_grad():
        slope = (process.alpha(t + h).log() - process.alpha(t - h).log()) / (2 * h)
        torch.testing.assert_close(process.drift(t), slope, rtol=1e-5, atol=1e-7)
        growth = (process.std(t + h) ** 2 - process.std(t - h) ** 2) / (2 * h)
        expected = growth - 2 * slope * process.std(t) ** 2
        torch.testing.assert_close(process.diffusion(t) ** 2, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("slope", [-3.0, 1e2, 1e4, 1e5, 1e6, 1e8])
def test_schedules_of_any_steepness_are_inverted_to_rounding(slope, dtype):
    """That of t, as steep as r is there, and that of gamma."""
    for hidden, weight in ((1, 0.0), (1, 20.0), (32, -4.0), (32, 20.0)):
        process = Learned(-13.3, 5.0, hidden).to(dtype)
        with torch.no_grad():
            process.slopes.fill_(slope)
            process.weights.fill_(weight)
            process.centres.copy_(torch.rand(hidden, generator=generator()))
            gamma = torch.linspace(-13.3, 5.0, 501, dtype=dtype)[1:-1]
            gamma = torch.cat([gamma, process.gamma(torch.linspace(0, 1, 501, dtype=dtype))])
            t = process.time(torch.exp(gamma / 2))
            assert 0 <= float(t.min()) <= float(t.max()) <= 1
            allowed = torch.finfo(dtype).eps * (20 * process.rise(t)[1] + 200)
            assert bool(((process.gamma(t) - gamma).abs() <= allowed).all())
            assert torch.equal(process.time(torch.exp(gamma[:1] / 2))[0], process.time(torch.exp(gamma[0] / 2)))


def test_derivatives_of_the_inverse_are_those_of_the_inverse_function():
    """What is a function of sigma alone has no derivative in the schedule."""
    process, sigma = bent(), torch.tensor([0.05, 1.0, 9.0], dtype=F64, requires_grad=True)
    alpha = process.alpha(process.time(sigma))
    found = torch.autograd.grad(alpha.sum(), [sigma, *process.parameters()])
    torch.testing.assert_close(found[0], -sigma.detach() * (1 + sigma.detach() ** 2) ** -1.5, rtol=1e-6, atol=1e-9)
    assert max(float(g.abs().max()) for g in found[1:]) < 1e-6


def gaussian(s: float):
    return lambda x, sigma: -x / (s**2 + sigma.reshape(-1, 1) ** 2)


@pytest.mark.parametrize(
    ("process", "prior"), [(Learned(-12.0, 9.0, hidden=0), 1.0), (bent(), 1.0), (VP(), 1.0), (VE(0.01, 60.0), 0.5)]
)
def test_the_bound_of_a_perfect_score_is_the_density(process, prior):
    """-log N(x0; 0, s^2), but for the data's noise at the first level and the prior's mismatch, both known."""
    s, count = 0.5, 200_000
    objective = ContinuousBound(process, 0.5)
    assert objective.prior_std == prior
    x0 = 0.6 * torch.ones(count, 1, dtype=F64)
    noise = torch.stack([randn(count, 1), randn(count, 1, seed=1)], 1)
    u = (torch.arange(count, dtype=F64) + 0.5) / count
    with torch.no_grad():
        found = objective.losses(gaussian(s), Batch(x0), u, noise) * math.log(2)
        sigma = process.sigma(torch.tensor([process.t_min, process.t_max], dtype=F64))
    first, last = sigma.tolist()
    # log p(x0) >= E_q[log N(x0; z_0, sigma_0^2)] - KL(q(z_0 | x0) || p(z_0)): of Gaussians in closed form
    variance, x2 = s**2 + first**2, 0.36

    def kl(own: float, other: float) -> float:
        return 0.5 * ((own + x2) / other - 1 - math.log(own / other))

    exact = 0.5 * math.log(2 * math.pi * first**2) + 0.5 + kl(first**2, variance)
    mismatch = kl(last**2, last**2 + prior**2) - kl(last**2, s**2 + last**2)
    error = float(found.std()) / count**0.5
    assert float(found.mean()) == pytest.approx(exact + mismatch, abs=5 * error + 1e-4)


def test_the_bound_is_the_same_for_all_schedules_between_the_same_ends():
    count = 100_000
    x0, noise = 0.5 * randn(count, 2, seed=2), torch.stack([randn(count, 2), randn(count, 2, seed=1)], 1)
    u = (torch.arange(count, dtype=F64) + 0.5) / count
    with torch.no_grad():
        # not the data's score: a bound that is not tight
        one, other = (
            ContinuousBound(p, 0.5).losses(gaussian(0.8), Batch(x0), u, noise)
            for p in (bent(), Learned(-9.0, 6.0, hidden=0))
        )
    error = math.hypot(float(one.std()), float(other.std())) / count**0.5
    assert float(one.mean()) == pytest.approx(float(other.mean()), abs=5 * error)
    assert abs(float(one.var()) / float(other.var()) - 1) > 0.05


def test_ends_learn_from_the_bound_and_the_inside_from_its_variance():
    """In one backward pass: beside gradients of each, written down apart."""
    process, width = bent(), torch.tensor(0.7, dtype=F64, requires_grad=True)
    objective, count = ContinuousBound(process, 0.5), 64
    x0, noise = 0.5 * randn(count, 2, seed=2), torch.stack([randn(count, 2), randn(count, 2, seed=1)], 1)
    u = (torch.arange(count, dtype=F64) + 0.5) / count

    def score(x, sigma):
        return -x / (width**2 + sigma.reshape(-1, 1) ** 2)

    inside = [process.centres, process.slopes, process.weights]
    outside = [process.low, process.log_span, width]
    found = torch.autograd.grad(objective.losses(score, Batch(x0), u, noise).mean(), outside + inside)

    def terms() -> torch.Tensor:
        low, span = process.ends(u)
        risen, slope = process.rise(u)
        sigma = torch.exp(0.5 * (low + span * risen)).reshape(-1, 1)
        error = sigma * score(x0 + sigma * noise[:, 1], sigma) + noise[:, 1]
        return 0.5 * span * slope * error.square().sum(1) / (2 * math.log(2))

    squares = torch.autograd.grad(terms().square().mean(), inside)
    for ours, expected in zip(found[3:], squares, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-9)
    means = torch.autograd.grad(terms().mean(), [width])
    torch.testing.assert_close(found[2], means[0], rtol=1e-6, atol=1e-9)
    assert all(float(g.abs()) > 0 for g in found[:2])


def test_the_decoder_is_a_distribution_over_the_values():
    objective = ContinuousBound(Learned(-4.0, 5.0), 0.5, Bins(0.5, -1.0, 1.0))
    values, sigma = torch.linspace(-1, 1, 5, dtype=F64), torch.tensor(0.3, dtype=F64)
    # z_0 is the same for all: the noise makes up for x0
    noise = ((0.1 - values) / sigma).unsqueeze(1)
    mass = torch.exp(-objective._decoder(values.unsqueeze(1), noise, sigma))
    assert float(mass.sum()) == pytest.approx(1, rel=1e-9)
    assert int(mass.argmax()) == 2


@pytest.mark.parametrize("sigma", [1e-4, 0.0013, 0.0078, 0.04, 0.3])
def test_the_decoder_looks_as_far_as_any_value_counts(sigma):
    """As by all 256 values written out, and so its gradient, at the ends of the range and between."""
    bins, g = Bins(2 / 255, -1.0, 1.0), generator()
    x0 = (torch.randint(256, (4, 50), generator=g) * (torch.rand(4, 50, generator=g) > 0.5)) / 127.5 - 1
    x0, noise = x0.to(F64), 2 * torch.randn(4, 50, generator=g, dtype=F64)
    values, found = torch.arange(256, dtype=F64) / 127.5 - 1, []
    for whole in (True, False):
        s = torch.tensor(sigma, dtype=F64, requires_grad=True)
        if whole:
            logits = -0.5 * (((x0 + s * noise).unsqueeze(-1) - values) / s).square()
            place = ((x0 + 1) * 127.5).round().long().unsqueeze(-1)
            nats = -logits.log_softmax(-1).gather(-1, place).squeeze(-1).sum(1)
        else:
            nats = ContinuousBound(VE(), 0.5, bins)._decoder(x0, noise, s)
        found += [nats.detach(), torch.autograd.grad(nats.sum(), s)[0]]
    torch.testing.assert_close(found[2], found[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[3], found[1], rtol=1e-9, atol=1e-9)


def vdm(steps: int) -> ConfigDict:
    c = default_config()
    c.data.source, c.model.net.name, c.model.net.width = "ring", "mlp", 16
    c.process.name, c.process.gamma_min, c.process.gamma_max, c.process.hidden = "learned", -8.0, 6.0, 4
    c.model.prediction, c.training.objective.name = "v", "continuous_bound"
    c.training.steps, c.training.checkpoint_every, c.training.sample_every, c.optim.warmup = steps, 3, 0, 0
    return c


def test_a_run_learns_its_schedule_resumes_bit_for_bit_and_is_saved(tmp_path):
    whole = train(vdm(6), tmp_path / "a", progress=False)
    train(vdm(3), tmp_path / "b", progress=False)
    resumed = train(vdm(6), tmp_path / "b", progress=False)
    pairs = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    model = ScoreModel.load(tmp_path / "b", weights="model.safetensors")
    assert isinstance(model.process, Learned)
    before = Learned(-8.0, 6.0, hidden=4)
    moved = [
        float((a - b).detach().abs().max())
        for a, b in zip(model.process.parameters(), before.parameters(), strict=True)
    ]
    assert min(moved) > 0
    assert sample_run(tmp_path / "b", n=4).x.isfinite().all()


def test_wrong_schedules_are_refused():
    with pytest.raises(ValueError, match="gamma_min = 3, gamma_max = 2, hidden = 4; expected"):
        Learned(3.0, 2.0, hidden=4)
    assert ScoreModel(MLP((2,)), bent(), data_shape=(2,)).sigma_range == pytest.approx((math.exp(-4.5), math.exp(3.0)))
