"""A diffusion is a hierarchical VAE whose inference network is fixed: bounds that are tight, to the last digits.

    log p(x)  >=  E_q [ log p(x | z1) - KL(q(z1 | x, z2) || p(z1 | z2)) ] - KL(q(z2 | x) || p(z2))

with equality where q is the posterior. Both models here are linear and Gaussian, so every term is in closed form.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from problems import F64, generator, randn

from scorelab import sigmas, variational_bound
from scorelab.distributions import Gaussian
from scorelab.likelihood import log_likelihood
from scorelab.losses.variational import gaussian_kl, log_density
from scorelab.samplers import AnalyticVariance, Ancestral

B, C, S1, S0 = 0.8, -1.3, 0.6, 0.4
"""z2 ~ N(0, 1), z1 = B z2 + S1 eps, x = C z1 + S0 eps."""


def conditioned(var: float, slope: float, noise: float) -> tuple[float, float]:
    """Of u ~ N(0, var) given w = slope u + N(0, noise): its mean over w, and its variance."""
    gain = var * slope / (slope**2 * var + noise)
    return gain, var * (1 - gain * slope)


def elbo(x: torch.Tensor, wide2: float = 1.0, wide1: float = 1.0) -> torch.Tensor:
    """The bound (N, 1) of x, with q(z2 | x) and q(z1 | x, z2) so many times as wide as the posteriors; divergences in
    closed form, expectations of what is quadratic by Gauss-Hermite nodes, so without error."""
    gain2, var2 = conditioned(1.0, C * B, C**2 * S1**2 + S0**2)
    gain1, var1 = conditioned(S1**2, C, S0**2)
    std2, std1 = wide2 * math.sqrt(var2), wide1 * math.sqrt(var1)
    nodes, weights = (torch.tensor(v, dtype=F64) for v in np.polynomial.hermite_e.hermegauss(4))
    bound = -gaussian_kl(gain2 * x, std2, 1.0)
    for a, share in zip(nodes, weights / weights.sum(), strict=True):
        z2 = gain2 * x + std2 * a
        shift = gain1 * (x - C * B * z2)
        bound = bound - share * gaussian_kl(shift, std1, S1)
        for b, other in zip(nodes, weights / weights.sum(), strict=True):
            gap = x - C * (B * z2 + shift + std1 * b)
            bound = bound + share * other * log_density(gap, torch.tensor(S0, dtype=F64))
    return bound


def test_a_two_level_vae_is_as_far_from_log_p_as_its_inference_is_from_the_posterior():
    x, var = 1.5 * randn(7, 1), C**2 * (B**2 + S1**2) + S0**2
    exact = log_density(x, torch.tensor(var, dtype=F64).sqrt())
    torch.testing.assert_close(elbo(x), exact, rtol=0, atol=1e-10)
    # KL(q(z2 | x) || p(z2 | x)), and that of z1 given both
    for wide in ({"wide2": 2.0}, {"wide1": 2.0}):
        gap = gaussian_kl(torch.zeros_like(x), 2.0, 1.0)
        torch.testing.assert_close(exact - elbo(x, **wide), gap, rtol=0, atol=1e-10)


def exact_chain(levels: list[float], s: float) -> Ancestral:
    return Ancestral(
        AnalyticVariance(tuple(levels), tuple(1 / (a**-2 + s**-2) for a in levels), (0.0,) * len(levels), s)
    )


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_a_diffusion_of_gaussian_data_is_tight_for_any_number_of_steps(steps):
    """Reverse conditionals of N(0, s^2 I) are Gaussian: with the optimal variance, and a prior as wide as noised data,
    whole chains weigh p(x) exactly, each of them; closed forms average to it; fixed variances leave a gap."""
    s, x0 = 0.5, 0.5 * randn(4000, 3)
    levels = [20.0] if steps == 1 else sigmas.geometric(steps, sigma_min=0.1, sigma_max=20.0).tolist()
    data = Gaussian(torch.zeros(3, dtype=F64), s**2)
    exact = data.log_prob(x0)
    options = {"data_std": s, "generator": generator(1)}
    # p(x0, x_1..x_T) / q(x_1..x_T | x0) = p(x0) for every chain, as p's conditionals are q's
    whole = variational_bound(data.score, x0, levels, exact_chain(levels, s), draws=2, **options).log_prob
    torch.testing.assert_close(whole, exact, rtol=0, atol=1e-10)
    closed = variational_bound(data.score, x0, levels, exact_chain(levels, s), **options)
    gap = (closed.log_prob - exact).double()
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(len(gap)) + 1e-12
    for variance in ("posterior", "forward"):
        fixed = variational_bound(data.score, x0, levels, Ancestral(variance), **options).log_prob
        assert float((exact - fixed).mean()) > 0.1


def test_many_steps_of_a_fixed_variance_tend_to_it():
    """Where steps are small the choice of variance does not matter: the gap falls about as 1/T, for every choice."""
    s, x0 = 0.5, 0.5 * randn(2000, 2)
    data = Gaussian(torch.zeros(2, dtype=F64), s**2)
    gaps = []
    for steps in (50, 200, 800):
        levels = sigmas.geometric(steps, sigma_min=0.02, sigma_max=20.0)
        last = float(levels[-1])
        options = {"data_std": s, "decoder_std": math.sqrt(1 / (last**-2 + s**-2)), "generator": generator(2)}
        bound = variational_bound(data.score, x0, levels, Ancestral(), draws=1, **options).log_prob
        gaps.append(float((data.log_prob(x0) - bound).mean()))
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[0] / gaps[2] == pytest.approx(16, rel=0.6)
    # and so does the ODE's density
    ode = log_likelihood(data.score, x0[:50], 1e-3, 20.0, data_std=s).log_prob
    torch.testing.assert_close(ode, data.log_prob(x0[:50]), rtol=0, atol=1e-3)
