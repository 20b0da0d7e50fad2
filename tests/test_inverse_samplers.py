"""Posterior samplers: their steps by hand, their laws against posteriors in closed form, rows, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from problems import F64, generator, randn
from torch._subclasses.fake_tensor import FakeTensorMode

from scorelab import VE, VP, PerSampleNoise, broadcast, sample, sigmas, trajectory
from scorelab.distributions import Gaussian, GaussianMixture
from scorelab.guidance import ByStep, classifier_free
from scorelab.inverse import (
    DAPS,
    DDRM,
    DPS,
    Blur,
    Colourisation,
    Inpainting,
    LinearFunction,
    Matrix,
    Measurement,
    NonlinearFunction,
    PhaseRetrieval,
    RePaint,
    Replacement,
    SuperResolution,
    dps,
    exact_posterior,
    moment_matching,
    pseudo_inverse,
)
from scorelab.samplers import DDIM, Ancestral, AnnealedLangevin, Churn, Context, DPMSolverMultistep, Heun

KNOWN = torch.tensor([True, False, True, True, False, False])
_A = randn(6, 6, seed=12)
FULL = Gaussian(randn(6, seed=11), _A @ _A.T / 6)
DIAGONAL = Gaussian(randn(6, seed=11), torch.linspace(0.05, 2, 6, dtype=F64))
ROUND = Gaussian(randn(6, seed=11), 0.49)
MIX = GaussianMixture(randn(4, 6, seed=13), torch.tensor([0.3, 0.5, 0.4, 0.2], dtype=F64))


def measured(prior, operator, noise_std, rows=1, seed=3):
    y = operator(prior.sample(rows, generator(seed)))
    return Measurement(operator, y + noise_std * torch.randn(y.shape, dtype=F64, generator=generator(50)), noise_std)


def starts(exact, sigma, rows, seed=1):
    return exact.sample(rows, generator(seed)) + sigma * randn(rows, *exact.data_shape, seed=seed + 1)


def assert_law(x, exact, bias=0.0):
    """Mean and covariance within 5 standard errors, and ``bias`` of the largest deviation or variance."""
    n, (x, e) = len(x), (x.flatten(1), exact.sample(200_000, generator(99)).flatten(1))
    cov, found = e.T.cov(), x.T.cov()
    scale = cov.diagonal().clamp_min(0).sqrt()
    off = (x.mean(0) - e.mean(0)).abs()
    assert bool((off <= 5.5 * scale / math.sqrt(n) + bias * scale.max() + 1e-6).all())
    allowed = 5.5 * math.sqrt(2 / n) * scale[:, None] * scale + bias * scale.max() ** 2 + 1e-6
    assert bool(((found - cov).abs() <= allowed).all())


LONG = sigmas.karras(300, sigma_min=0.005, sigma_max=30.0)


def test_known_pixels_come_back_exactly():
    m = measured(FULL, Inpainting(KNOWN), 0.0, rows=7)
    for inner in (Ancestral(), Heun(), Churn(), AnnealedLangevin(2)):
        grid = sigmas.karras(9, sigma_min=0.1, sigma_max=30.0)[: 10 if inner.every_level else None]
        found = sample(FULL.score, (7, 6), grid, Replacement(m, inner), generator=generator(), dtype=F64)
        assert torch.equal(found[:, KNOWN], m.y)
    found = sample(FULL.score, (7, 6), LONG[::20], RePaint(m, jump=2, resample=3), generator=generator(), dtype=F64)
    assert torch.equal(found[:, KNOWN], m.y)
    single = Measurement(m.operator, m.y.float())
    assert torch.equal(sample(FULL.score, (7, 6), LONG[::20], Replacement(single))[:, KNOWN], m.y.float())


def test_a_measurement_of_other_rows_is_refused_at_the_start():
    m = measured(FULL, Inpainting(KNOWN), 0.1, rows=7)
    for sampler in (Replacement(m), RePaint(m), DPS(m), DDRM(m), DAPS(m)):
        with pytest.raises(ValueError, match="y has 7 rows for 5 samples; expected 1, or one for each sample"):
            sample(FULL.score, (5, 6), LONG, sampler, dtype=F64)


@pytest.mark.parametrize("noise_std", [0.0, 0.4])
def test_replacement_is_exact_where_parts_are_independent(noise_std):
    m = measured(DIAGONAL, Inpainting(KNOWN), noise_std)
    exact = exact_posterior(DIAGONAL, m)
    x = sample(DIAGONAL.score, starts(exact, 30.0, 4000), LONG, Replacement(m), generator=generator())
    assert_law(x, exact, bias=0.02)


def test_the_known_part_has_its_noise_level_before_a_step():
    """A score that notes what it sees: mean y and deviation sigma in the known part."""
    m = measured(DIAGONAL, Inpainting(KNOWN), 0.2)
    seen = {}

    def score(x, sigma):
        seen[float(sigma)] = x[:, KNOWN]
        return DIAGONAL.score(x, sigma)

    sample(score, (20_000, 6), [10.0, 3.0, 0.5, 0.0], Replacement(m), generator=generator(), dtype=F64)
    for sigma, x in seen.items():
        # y has 0.2 of it
        lacks = math.sqrt(sigma**2 - 0.04)
        assert float((x.mean(0) - m.y).abs().max()) < 5 * lacks / math.sqrt(20_000)
        assert float((x.std(0) / lacks - 1).abs().max()) < 5 / math.sqrt(40_000)


def published_schedule(steps, jump, resample):
    """get_schedule_jump of the release, arXiv:2201.09865: the levels visited, counted from the lowest; -1 is clean."""
    left = {j: resample - 1 for j in range(0, steps - jump, jump)}
    t, visited = steps, []
    while t >= 1:
        t -= 1
        visited.append(t)
        if left.get(t, 0) > 0:
            left[t] -= 1
            for _ in range(jump):
                t += 1
                visited.append(t)
    return [*visited, -1]


@pytest.mark.parametrize(("steps", "jump", "resample"), [(250, 10, 10), (20, 3, 4), (7, 10, 2), (12, 4, 1)])
def test_repaint_visits_the_published_levels(steps, jump, resample):
    m = Measurement(Inpainting(torch.tensor([True, False])), torch.zeros(1, 1))
    grid = sigmas.karras(steps, sigma_min=0.01, sigma_max=50.0).tolist()
    visited = []

    def score(x, sigma):
        visited.append(steps - 1 - min(range(steps), key=lambda i: abs(grid[i] - float(sigma))))
        return -x / (1 + sigma**2)

    *_, last = trajectory(score, (1, 2), grid, RePaint(m, jump=jump, resample=resample), generator=generator())
    expected = published_schedule(steps, jump, resample)
    pairs = list(zip(expected[:-1], expected[1:], strict=True))
    assert visited == [a for a, b in pairs if b < a]
    # of each level that is evaluated, the one it arrived at lies one below the last
    up = sum(b - (a - 1) for a, b in zip(visited[:-1], visited[1:], strict=True))
    assert up == sum(b > a for a, b in pairs)
    if steps == 250:
        assert (last.nfe, up) == (2410, 2160)


@pytest.mark.parametrize("steps", [(0, 1), (3, 5), (6, 7)])
def test_steps_keep_their_numbers_where_repaint_goes_back(steps):
    """Guidance by step and churn, a share of all steps, in RePaint: what the published order says of 8 levels."""
    m = Measurement(Inpainting(torch.tensor([True, False])), torch.zeros(1, 1))
    levels = [2.0 ** (4 - k) for k in range(8)]
    order = published_schedule(8, 2, 3)
    down = [7 - a for a, b in zip(order[:-1], order[1:], strict=True) if b < a]
    seen, guided = [], []

    def score(x, sigma):
        seen.append(round(4 - math.log2(float(sigma)), 6))
        return -x / (1 + sigma**2)

    def other(x, sigma):
        guided.append(seen[-1])
        return score(x, sigma)

    pair = classifier_free(score, other, 2.0, together=False)
    sample(pair, (1, 2), [*levels, 0.0], RePaint(m, ByStep(Ancestral(), steps), 2, 3), generator=generator())
    assert guided == [k for k in down if steps[0] <= k <= steps[1]]
    seen.clear()
    sample(score, (1, 2), [*levels, 0.0], RePaint(m, Churn(s_churn=1.6), 2, 3), generator=generator())
    # gamma = 1.6/8, but for the highest level; Heun's corrector stands at the next one
    raised = {k - (math.log2(1.2) if k else 0) for k in range(8)}
    assert sorted(set(seen)) == pytest.approx(sorted(raised | set(range(1, 8))), abs=1e-5)


def test_repaint_agrees_with_the_known_part_better_than_replacement():
    m = measured(FULL, Inpainting(KNOWN), 0.0)
    exact = exact_posterior(FULL, m)
    truth = exact.sample(100_000, generator(9)).mean(0)
    grid = sigmas.karras(60, sigma_min=0.01, sigma_max=30.0)
    off = {}
    for sampler in (Replacement(m), RePaint(m, jump=5, resample=10)):
        x = sample(FULL.score, starts(exact, 30.0, 4000), grid, sampler, generator=generator())
        off[type(sampler)] = float((x.mean(0) - truth).norm())
    assert off[RePaint] < 0.3 * off[Replacement]


@pytest.mark.parametrize("process", [None, VP(), VE(0.01, 50.0)])
def test_dps_is_the_published_rule(process):
    """In scaled coordinates x_t = alpha x: the mean of DDPM's step, minus zeta grad_(x_t) ||y - A x0_hat||."""
    m, a = measured(FULL, Matrix(randn(3, 6, seed=14)), 0.1, rows=5), randn(3, 6, seed=14)
    x, sigma, r, zeta = 3 * randn(5, 6, seed=4), 2.0, 0.7, 0.3

    def alpha(s):
        return 1.0 if isinstance(process, VE) else 1 / math.sqrt(1 + s**2)

    x_t = (alpha(sigma) * x).requires_grad_(True)
    x0_hat = FULL.denoise(x_t / alpha(sigma), sigma)
    norms = (m.y - x0_hat @ a.T).norm(dim=1)
    (slope,) = torch.autograd.grad(norms.sum(), x_t)
    ancestral = x0_hat + (r / sigma) ** 2 * (x - x0_hat)
    z = PerSampleNoise(0)(x)
    ancestral = ancestral + r * math.sqrt(1 - (r / sigma) ** 2) * z
    expected = (alpha(r) * ancestral - zeta * slope) / alpha(r)
    steps = trajectory(FULL.score, x, [sigma, r], DPS(m, zeta, process=process), generator=PerSampleNoise(0))
    *_, last = steps
    torch.testing.assert_close(last.x, expected.detach(), rtol=1e-9, atol=1e-9)
    # no graph is left in a step, and one evaluation serves both
    assert last.x0_hat is not None
    assert not last.x0_hat.requires_grad
    assert last.nfe == 1
    torch.testing.assert_close(last.x0_hat, x0_hat.detach())


class WithVariance:
    """The score with a learned variance of v = 0.3."""

    def __call__(self, x, sigma):
        return FULL.score(x, sigma)

    def score_and_variance(self, x, sigma):
        return FULL.score(x, sigma), torch.full_like(x, 0.3)


def test_dps_keeps_learned_variance_and_gradients():
    m = measured(FULL, Matrix(randn(3, 6, seed=14)), 0.1)
    x, grid = randn(2, 6), [2.0, 0.7, 0.0]
    inner = Ancestral(variance="learned")
    plain = sample(WithVariance(), x, grid, inner, generator=PerSampleNoise(0))
    torch.testing.assert_close(sample(WithVariance(), x, grid, DPS(m, 0.0, inner), generator=PerSampleNoise(0)), plain)
    x.requires_grad_(True)
    for sampler in (DPS(m, 0.3), DDRM(m), DAPS(m, data_std=1.0), DAPS(m, steps=2)):

        def end(x, sampler=sampler):
            return sample(FULL.score, x, grid, sampler, generator=PerSampleNoise(0), differentiable=True)

        assert torch.autograd.gradcheck(end, (x,))


def test_phases_are_retrieved_up_to_their_symmetries():
    """A narrow prior around one image tells it from its mirror images; residuals fall to the noise."""
    image = randn(1, 4, 4, seed=21)
    prior, operator = Gaussian(image, 0.04), PhaseRetrieval((1, 4, 4), 2.0)
    m = measured(prior, operator, 0.01)
    grid = sigmas.karras(100, sigma_min=0.01, sigma_max=20.0)
    prior_off = m.residual(prior.sample(50, generator())).flatten(1).norm(dim=1).mean()
    for sampler in (DPS(m, 0.1), DAPS(m, data_std=0.2, steps=50, step_size=0.3)):
        x = sample(prior.score, (50, 1, 4, 4), grid, sampler, generator=generator(), dtype=F64)
        assert float(m.residual(x).flatten(1).norm(dim=1).mean()) < 0.15 * float(prior_off)


IMAGE = Gaussian(randn(3, 2, 4), 0.3)
SPECTRAL = {
    "inpainting": Inpainting(torch.tensor([True, False, True, False]), (3, 2, 4)),
    "colourisation": Colourisation((3, 2, 4)),
    "super-resolution": SuperResolution((3, 2, 4), 2),
    "blur": Blur(torch.tensor([[0.6, 0.2, 0.1]], dtype=F64), (3, 2, 4)),
    "matrix": Matrix(randn(5, 24), (3, 2, 4)),
}


@pytest.mark.parametrize("name", SPECTRAL)
def test_ddrm_and_daps_end_on_what_was_measured_without_noise(name):
    m = measured(IMAGE, SPECTRAL[name], 0.0)
    for sampler in (DDRM(m), DAPS(m)):
        x = sample(IMAGE.score, (5, 3, 2, 4), LONG[::20], sampler, generator=generator(), dtype=F64)
        assert float(m.residual(x).abs().max()) < 1e-9


def test_ddrm_is_its_formulas():
    """Inpainting, s = 1: unknown numbers are DDIM's, known ones y's at level r, or pulled where y is noisier than r."""
    m = measured(FULL, Inpainting(KNOWN), 0.5)
    x, z = starts(FULL, 2.0, 4), PerSampleNoise(0)(randn(4, 6))
    for r in (1.0, 0.2):
        found = sample(FULL.score, x, [2.0, r], DDRM(m, eta=0.0), generator=PerSampleNoise(0))
        torch.testing.assert_close(found[:, ~KNOWN], sample(FULL.score, x, [2.0, r], DDIM(0.0))[:, ~KNOWN])
        found = sample(FULL.score, x, [2.0, r], DDRM(m, eta=0.6), generator=PerSampleNoise(0))
        x0_hat = FULL.denoise(x, 2.0)[:, KNOWN]
        clear = m.y + math.sqrt(max(0.0, r**2 - 0.25)) * z[:, KNOWN]
        noisy = x0_hat + 0.8 * r * (m.y - x0_hat) / 0.5 + 0.6 * r * z[:, KNOWN]
        torch.testing.assert_close(found[:, KNOWN], clear if r > 0.5 else noisy)


@pytest.mark.parametrize("noise_std", [0.0, 0.3])
@pytest.mark.parametrize("name", SPECTRAL)
def test_daps_is_exact_on_round_gaussians_with_few_levels(name, noise_std):
    m = measured(IMAGE, SPECTRAL[name], noise_std)
    exact = exact_posterior(IMAGE, m)
    sampler = DAPS(m, data_std=math.sqrt(0.3))
    assert_law(
        sample(IMAGE.score, starts(exact, 5.0, 4000), [5.0, 1.0, 0.3, 0.0], sampler, generator=generator()), exact
    )


def test_langevin_steps_tend_to_the_exact_draw():
    m = measured(ROUND, Matrix(randn(3, 6, seed=14)), 0.3)
    exact = exact_posterior(ROUND, m)
    sampler = DAPS(m, data_std=0.7, steps=400, step_size=0.1)
    x = sample(ROUND.score, starts(exact, 5.0, 3000), [5.0, 0.5, 0.0], sampler, generator=generator())
    assert_law(x, exact, bias=0.05)


@pytest.mark.parametrize("noise_std", [0.05, 0.5])
def test_posterior_scores_sample_gaussians(noise_std):
    """Moment matching through an ODE and an SDE on a correlated Gaussian, pseudo-inverse guidance on a round one."""
    for prior, made in ((FULL, moment_matching), (ROUND, lambda s, m: pseudo_inverse(s, m, 0.7))):
        m = measured(prior, Matrix(randn(3, 6, seed=14)), noise_std)
        exact = exact_posterior(prior, m)
        for sampler, grid in ((DPMSolverMultistep(2), LONG[::6]), (Ancestral(), LONG)):
            grid = grid if grid[-1] == 0 else torch.cat([grid, grid.new_zeros(1)])
            x = sample(made(prior.score, m), starts(exact, 30.0, 2000), grid, sampler, generator=generator())
            assert_law(x, exact, bias=0.03)


def samplers_of(m):
    return {
        "Replacement": Replacement(m) if isinstance(m.operator, Inpainting) else None,
        "RePaint": RePaint(m, jump=2, resample=3) if isinstance(m.operator, Inpainting) else None,
        "DPS": DPS(m, 0.1),
        "DDRM": DDRM(m),
        "DAPS": DAPS(m, ode_steps=3),
        "DAPS, Langevin": DAPS(m, steps=5),
    }


@pytest.mark.parametrize("each", [False, True], ids=["one y", "a y for each"])
@pytest.mark.parametrize("name", samplers_of(measured(MIX, Inpainting(KNOWN), 0.1)))
def test_rows_are_rows(name, each):
    grid = sigmas.karras(8, sigma_min=0.05, sigma_max=20.0)
    for operator in (Inpainting(KNOWN), Matrix(randn(3, 6, seed=14))):
        m = measured(MIX, operator, 0.1, rows=64 if each else 1)
        if samplers_of(m)[name] is None:
            continue
        whole = sample(MIX.score, (64, 6), grid, samplers_of(m)[name], generator=PerSampleNoise(0), dtype=F64)
        for first, count in ((0, 1), (7, 1), (40, 3)):
            part = samplers_of(m.rows(torch.arange(first, first + count)))[name]
            few = sample(MIX.score, (count, 6), grid, part, generator=PerSampleNoise(0, first), dtype=F64)
            torch.testing.assert_close(few, whole[first : first + count], rtol=1e-8, atol=1e-8)


def linear_score(x, sigma):
    return -x / (1 + broadcast(sigma, x) ** 2)


def stepped(sampler, x):
    levels = [2.0, 1.0, 0.5, 0.25, 0.0]
    state = sampler.init(x, levels)
    for a, b in zip(levels[:-1], levels[1:], strict=True):
        x, state = sampler.step(Context(linear_score, x, a, b, state, torch.randn_like))
    return x


@pytest.mark.parametrize("name", SPECTRAL)
def test_devices_without_synchronisation(name):
    """Fake "cuda" tensors; "meta" ones, which have gradients in a CPU build, where a method differentiates."""
    operator = SPECTRAL[name]
    m = Measurement(operator, operator(randn(1, 3, 2, 4)).float(), 0.1)
    there = [DDRM(m), DAPS(m), DAPS(m, steps=2)]
    if isinstance(operator, Inpainting):
        there += [Replacement(m), RePaint(m, jump=1, resample=2)]
    for sampler in there:
        stepped(sampler, torch.randn(3, 3, 2, 4))
        with FakeTensorMode(allow_non_fake_inputs=True):
            x = stepped(sampler, torch.randn(3, 3, 2, 4, device="cuda"))
            assert (x.device.type, x.dtype) == ("cuda", torch.float32)
    meta = torch.empty(3, 3, 2, 4, device="meta")
    assert stepped(DPS(m, 0.1), meta).device.type == "meta"
    for score in (dps(linear_score, m), pseudo_inverse(linear_score, m, 1.0)):
        for sigma in (torch.empty((), device="meta"), torch.empty(3, device="meta")):
            assert score(meta, sigma).device.type == "meta"


def hidden():
    return NonlinearFunction(torch.no_grad()(torch.abs), randn(1, 6))


def no_svd():
    return Measurement(LinearFunction(lambda x: x.cumsum(1), randn(1, 6)), randn(1, 6), 0.1)


@pytest.mark.parametrize(
    ("made", "error", "said"),
    [
        (lambda: Replacement(no_svd()), TypeError, "got LinearFunction; expected a Measurement of an Inpainting"),
        (lambda: Replacement(None), TypeError, "got NoneType; expected a Measurement of an Inpainting"),
        (
            lambda: Replacement(measured(FULL, Inpainting(KNOWN), 0.0), None),
            TypeError,
            "inner is None; expected a samp",
        ),
        (lambda: RePaint(measured(FULL, Inpainting(KNOWN), 0.0), jump=0), ValueError, "jump = 0, resample = 10"),
        (
            lambda: RePaint(measured(FULL, Inpainting(KNOWN), 0.0), AnnealedLangevin()),
            TypeError,
            "inner is AnnealedLangevin, which walks at each level",
        ),
        (lambda: DPS(no_svd(), -1.0), ValueError, "zeta is -1; expected a finite number >= 0"),
        (lambda: DPS(no_svd(), inner=None), TypeError, "inner is None; expected a sampler"),
        *((lambda m=m: m(None), TypeError, "measurement is NoneType; expected Measurement") for m in (DPS, DDRM, DAPS)),
        (
            lambda: sample(torch.no_grad()(FULL.score), (2, 6), [2.0, 1.0], DPS(no_svd()), dtype=F64),
            ValueError,
            "the score's output carries no gradient",
        ),
        (
            lambda: sample(FULL.score, (2, 6), [2.0, 1.0], DPS(Measurement(hidden(), randn(1, 6))), dtype=F64),
            ValueError,
            "the operator's output carries no gradient",
        ),
        (lambda: DDRM(no_svd()), ValueError, "the operator, LinearFunction, has no singular values at hand; expected"),
        (lambda: DDRM(no_svd(), eta=1.1), ValueError, "eta = 1.1, eta_b = 1; expected numbers from 0 to 1"),
        (lambda: DAPS(no_svd()), ValueError, "the operator, LinearFunction, has no singular values at hand; expected"),
        (lambda: DAPS(no_svd(), steps=5), ValueError, "does not say how steep it is; expected one with lipschitz"),
        (lambda: DAPS(no_svd(), steps=0), ValueError, "ode_steps = 1, steps = 0, step_size = 0.1; expected"),
        (lambda: DAPS(no_svd(), data_std=0.0), ValueError, "data_std is 0; expected a positive number, or None"),
        (
            lambda: DAPS(measured(FULL, Inpainting(KNOWN), 0.0), steps=5),
            ValueError,
            "noise_std is 0, and this method divides by it",
        ),
        (
            lambda: DDRM(Measurement(PhaseRetrieval((1, 4)), torch.ones(1, 1, 8), 0.1)),
            TypeError,
            "the operator, PhaseRetrieval, has no adjoint and this method needs one",
        ),
    ],
)
def test_settings_that_are_none_are_refused(made, error, said):
    with pytest.raises(error, match=said):
        made()
