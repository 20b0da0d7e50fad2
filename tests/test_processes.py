from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from problems import F64, PROCESSES, REFERENCE, generator

from scorelab import VE, VP, Cosine, DiscreteVP, Flow, SubVP
from scorelab.likelihood import normal_log_prob
from scorelab.processes import cosine_betas, linear_betas


@pytest.mark.parametrize("name", PROCESSES)
def test_time_inverts_sigma(name):
    p = PROCESSES[name]
    t = torch.cat([torch.linspace(p.t_min, p.t_max, 4001, dtype=F64), p.t_min + torch.logspace(-7, -2, 50, dtype=F64)])
    sigma = p.sigma(t)
    assert bool((sigma > 0).all())
    assert bool(torch.isfinite(sigma).all())
    torch.testing.assert_close(p.time(sigma), t, rtol=1e-6, atol=0)
    torch.testing.assert_close(p.sigma(p.time(sigma)), sigma, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", PROCESSES)
def test_sigma_is_std_over_alpha_and_increases(name):
    p = PROCESSES[name]
    t = torch.linspace(p.t_min, p.t_max, 2001, dtype=F64)
    torch.testing.assert_close(p.sigma(t), p.std(t) / p.alpha(t), rtol=1e-9, atol=0)
    assert bool((p.sigma(t).diff() > 0).all())


@pytest.mark.parametrize("name", PROCESSES)
def test_drift_and_diffusion_have_these_scales(name):
    """The moment equations m' = f m, v' = 2 f v + g^2, integrated by fine steps, must give alpha and std."""
    p = PROCESSES[name]
    # DiscreteVP has kinks: 20 midpoint steps in each of its segments from 0.001 to 0.98
    n = 979 * 20
    t = torch.linspace(p.t_min, min(p.t_max, 0.98), n + 1, dtype=F64)
    middle, dt = (t[1:] + t[:-1]) / 2, t.diff()
    f, g2 = p.drift(middle), p.diffusion(middle) ** 2
    log_alpha = (f * dt).cumsum(0)
    torch.testing.assert_close((p.alpha(t[1:]) / p.alpha(t[0])).log(), log_alpha, rtol=2e-3, atol=2e-3)
    # d(std^2 / alpha^2)/dt = g^2 / alpha^2
    sigma2 = p.sigma(t[0]) ** 2 + (g2 / p.alpha(middle) ** 2 * dt).cumsum(0)
    torch.testing.assert_close(p.sigma(t[1:]) ** 2, sigma2, rtol=5e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["vp", "subvp", "ve", "flow", "cosine"])
def test_simulated_sde_has_these_scales(name):
    """Euler-Maruyama paths from x0 = 1.5, compared at four standard errors; misses a factor 2 in no coefficient."""
    p = PROCESSES[name]
    count, n, end = 20_000, 1000, 0.6
    ts = torch.linspace(p.t_min, end, n + 1, dtype=F64)
    noise = generator(3)
    x = torch.full((count,), 1.5, dtype=F64) * p.alpha(ts[0])
    x = x + p.std(ts[0]) * torch.randn(count, dtype=F64, generator=noise)
    for a, b in zip(ts[:-1], ts[1:], strict=True):
        dt = b - a
        middle = (a + b) / 2
        x = (
            x
            + p.drift(middle) * x * dt
            + p.diffusion(middle) * dt.sqrt() * torch.randn(count, dtype=F64, generator=noise)
        )
    mean, std = 1.5 * float(p.alpha(ts[-1])), float(p.std(ts[-1]))
    assert abs(float(x.mean()) - mean) < 4 * std / math.sqrt(count) + 2e-3
    assert abs(float(x.std()) / std - 1) < 4 / math.sqrt(2 * count) + 3e-3


def test_perturb_has_matching_moments_with_one_time_a_sample():
    p, t = VP(), torch.tensor([0.2, 0.7], dtype=F64)
    x0, noise = torch.ones(2, 3, 4, dtype=F64), torch.full((2, 3, 4), 2.0, dtype=F64)
    expected = (p.alpha(t) + 2 * p.std(t))[:, None, None].expand(2, 3, 4)
    torch.testing.assert_close(p.perturb(x0, t, noise), expected)


def test_sigmas_are_uniform_in_time():
    for p in PROCESSES.values():
        for levels, end in (
            (p.sigmas(7), max(p.t_min, 0 if isinstance(p, VE) else 1e-3)),
            (p.sigmas(7, p.t_min), p.t_min),
        ):
            times = torch.linspace(p.t_max, end, 7, dtype=F64)
            torch.testing.assert_close(p.time(levels), times, rtol=1e-6, atol=1e-9)
        with pytest.raises(ValueError, match="expected at least one level and"):
            p.sigmas(7, 1.0)
        assert p.sigmas(1).tolist() == pytest.approx([p.sigma_range[1]])
    assert DiscreteVP([0.5]).sigmas(1).tolist() == pytest.approx([1.0])
    assert float(DiscreteVP([0.5]).sigma(torch.tensor(1.0))) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["ve", "vp", "subvp"])
def test_score_sde_marginals(name):
    ref = np.load(REFERENCE / "score_sde_sdes.npz")
    p = {"ve": VE(0.01, 50.0), "vp": VP(), "subvp": SubVP()}[name]
    t, x = torch.tensor(ref["t"], dtype=F64), torch.tensor(ref["x"], dtype=F64)
    close = {"rtol": 1e-5, "atol": 1e-5}
    shape = (4, 1, 1, 1)
    torch.testing.assert_close(
        p.alpha(t).reshape(shape) * x, torch.tensor(ref[f"{name}/marginal_mean"], dtype=F64), **close
    )
    # the release computes 1 - exp(...) in float32, which costs sub-VP four digits at t = 0.001: compare absolutely
    torch.testing.assert_close(p.std(t), torch.tensor(ref[f"{name}/marginal_std"], dtype=F64), **close)
    torch.testing.assert_close(p.drift(t).reshape(shape) * x, torch.tensor(ref[f"{name}/drift"], dtype=F64), **close)
    torch.testing.assert_close(p.diffusion(t), torch.tensor(ref[f"{name}/diffusion"], dtype=F64), **close)
    prior = 50.0 if name == "ve" else 1.0
    torch.testing.assert_close(normal_log_prob(x, prior), torch.tensor(ref[f"{name}/prior_logp"], dtype=F64), **close)


def test_score_sde_discretisations():
    ref = np.load(REFERENCE / "score_sde_sdes.npz")
    x, steps = torch.tensor(ref["x"], dtype=F64), 1000
    index = torch.tensor((ref["t"] * (steps - 1)).astype(int))
    # VP: the release's betas are linear from 0.1/N to 20/N; a step is the transition from i/N to (i+1)/N
    vp = DiscreteVP(torch.linspace(0.1 / steps, 20 / steps, steps, dtype=F64))
    t = (index + 1).to(F64) / steps
    a, b = vp.transition((t - 1 / steps).clamp_min(0), t)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close((a - 1).reshape(4, 1, 1, 1) * x, torch.tensor(ref["vp/discrete_f"], dtype=F64), **close)
    torch.testing.assert_close(b, torch.tensor(ref["vp/discrete_G"], dtype=F64), **close)
    # VE: N geometric levels, below the first of them 0
    ve = VE(0.01, 50.0)
    t = index.to(F64) / (steps - 1)
    _, b = ve.transition(t - 1 / (steps - 1), t)
    b = torch.where(index == 0, ve.sigma(t), b)
    torch.testing.assert_close(b, torch.tensor(ref["ve/discrete_G"], dtype=F64), **close)
    assert not np.any(ref["ve/discrete_f"])
    # sub-VP has no discrete form of its own: an Euler step of 1/N
    sub, t = SubVP(), torch.tensor(ref["t"], dtype=F64)
    torch.testing.assert_close(
        sub.drift(t).reshape(4, 1, 1, 1) * x / steps, torch.tensor(ref["subvp/discrete_f"], dtype=F64), **close
    )
    torch.testing.assert_close(
        sub.diffusion(t) / math.sqrt(steps), torch.tensor(ref["subvp/discrete_G"], dtype=F64), **close
    )


@pytest.mark.parametrize("name", ["linear1000", "linear4000", "cosine1000", "cosine4000"])
def test_guided_diffusion_betas(name):
    ref = np.load(REFERENCE / "guided_diffusion_gaussian.npz")
    betas = (linear_betas if name.startswith("linear") else cosine_betas)(int(name[-4:]))
    np.testing.assert_allclose(betas.numpy(), ref[f"{name}/betas"], rtol=1e-10)


@pytest.mark.parametrize("name", ["linear1000", "cosine1000"])
def test_guided_diffusion_marginals(name):
    ref = np.load(REFERENCE / "guided_diffusion_gaussian.npz")
    p = DiscreteVP(ref[f"{name}/betas"].tolist())
    t = torch.arange(1, 1001, dtype=F64) / 1000
    np.testing.assert_allclose(1 / p.alpha(t), ref[f"{name}/sqrt_recip_alphas_cumprod"], rtol=1e-10)
    np.testing.assert_allclose(p.sigma(t), ref[f"{name}/sqrt_recipm1_alphas_cumprod"], rtol=1e-10)


def test_any_start_tends_to_a_normal_distribution():
    """x <- sqrt(1-p) x + sqrt(p) u with p = 0.01: 1000 steps leave alpha = 0.0066 of the start."""
    p = DiscreteVP([0.01] * 1000)
    assert float(p.alpha(torch.tensor(1.0, dtype=F64))) == pytest.approx(0.99**500, rel=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: VE(1.0, 0.5),
        lambda: VP(beta_min=-1.0),
        lambda: Cosine(s=0.0),
        lambda: Flow(t_max=1.0),
        lambda: DiscreteVP([0.5, 1.0]),
        lambda: DiscreteVP([]),
        lambda: linear_betas(0),
        lambda: linear_betas(10),
        lambda: VP().sigmas(0),
    ],
)
def test_bad_settings_are_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()
