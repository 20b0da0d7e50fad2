"""Encoding, inversion, interpolation and SDEdit against maps and laws in closed form."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from problems import F64, correlated, generator, mixture, randn

from scorelab import PerSampleNoise, sample, sigmas
from scorelab.distributions import Gaussian, Labelled
from scorelab.inverse import encode, sdedit, slerp, swapped
from scorelab.samplers import DDIM, RK4, Ancestral, Churn, DPMSolverMultistep, Euler, Heun, Midpoint

HIGH = 20.0
DIAGONAL = Gaussian(torch.tensor([1.0, -2.0, 0.5], dtype=F64), torch.tensor([0.3, 1.0, 2.0], dtype=F64))


def grid(n, low=0.01):
    return sigmas.karras(n, sigma_min=low, sigma_max=HIGH)


@pytest.mark.parametrize("sampler", [Euler(), DDIM(), Heun(), Midpoint(), RK4()], ids=lambda s: type(s).__name__)
def test_exact_inversion_goes_round_to_rounding(sampler):
    d = mixture()
    x0, levels = d.sample(20, generator()), grid(20)
    latent = encode(d.score, x0, levels, sampler)
    torch.testing.assert_close(sample(d.score, latent, levels, sampler), x0, rtol=0, atol=1e-11)
    # the other way round, too: what a latent decodes to is encoded as that latent
    start = HIGH * randn(20, 2, seed=3)
    again = encode(d.score, sample(d.score, start, levels, sampler), levels, sampler)
    torch.testing.assert_close(again, start, rtol=1e-5, atol=1e-5)


def test_single_precision_goes_round_to_its_rounding():
    d = mixture()
    x0, levels = d.sample(20, generator()).float(), grid(40)
    latent = encode(d.score, x0, levels)
    torch.testing.assert_close(sample(d.score, latent, levels, Euler()), x0, rtol=0, atol=1e-3)
    assert latent.dtype == torch.float32


def test_encodings_of_gaussians_are_the_odes():
    """x(sigma) = m + sqrt((c + sigma^2)/(c + low^2)) (x - m) for variances c."""
    c, low = DIAGONAL.variances, 0.01
    x0 = DIAGONAL.sample(5, generator())
    expected = DIAGONAL.mean + ((c + HIGH**2) / (c + low**2)).sqrt() * (x0 - DIAGONAL.mean)
    for exact in (False, True):
        found = encode(DIAGONAL.score, x0, grid(80)[:-1], RK4(), exact=exact)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    # upwards a final 0 is left out: the score has no value there
    upwards = encode(DIAGONAL.score, x0, grid(80), RK4(), exact=False)
    torch.testing.assert_close(upwards, encode(DIAGONAL.score, x0, grid(80)[:-1], RK4(), exact=False))


def test_published_ddim_inversion_is_first_order_and_no_inverse():
    d = correlated()
    x0, errors = d.sample(10, generator()), []
    for n in (40, 80, 160):
        levels = grid(n)[:-1]
        latent = encode(d.score, x0, levels, DDIM(), exact=False)
        errors.append(float((sample(d.score, latent, levels, DDIM()) - x0).norm()))
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.3)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.2)


def test_samples_converge_by_themselves():
    d = mixture()
    x0, levels = d.sample(64, generator()), grid(15)
    whole = encode(d.score, x0, levels, Heun())
    for rows in (slice(0, 1), slice(5, 8)):
        torch.testing.assert_close(encode(d.score, x0[rows], levels, Heun()), whole[rows], rtol=1e-9, atol=1e-9)


def test_an_inversion_that_does_not_converge_says_so():
    d = mixture()
    with pytest.warns(RuntimeWarning, match="a step was inverted to .* of x after 3 iterations; expected"):
        encode(d.score, d.sample(4, generator()), [HIGH, 1.0, 0.0], iterations=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(d.score, d.sample(4, generator()), grid(15), tol=1e-3, iterations=60)


def test_swapped_conditions_move_one_gaussian_to_the_other():
    """Encoded under N(m, c), decoded under N(m', c'): both ODEs are affine in closed form."""
    parts = [DIAGONAL, Gaussian(torch.tensor([-3.0, 0.0, 4.0], dtype=F64), torch.tensor([1.0, 0.2, 0.7], dtype=F64))]
    labelled = Labelled(parts)
    a, b = (labelled.conditioned(torch.full((6,), k)) for k in (0, 1))
    x0, low = parts[0].sample(6, generator()), 0.01

    def growth(d):
        return ((d.variances + HIGH**2) / (d.variances + low**2)).sqrt()

    latent = parts[0].mean + growth(parts[0]) * (x0 - parts[0].mean)
    expected = parts[1].mean + (latent - parts[1].mean) / growth(parts[1])
    for exact in (True, False):
        found = swapped(a, b, x0, grid(60)[:-1], RK4(), exact=exact)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(swapped(a, a, x0, grid(30), Heun()), x0, rtol=0, atol=1e-11)


def test_slerp_walks_along_the_arc():
    """In the plane the angle grows evenly and the norm stays."""
    a, b = torch.tensor([[1.0, 0.0]], dtype=F64), torch.tensor([[0.0, 1.0]], dtype=F64)
    w = torch.linspace(0, 1, 11, dtype=F64)
    found = slerp(a, b, w)
    angle = w * math.pi / 2
    torch.testing.assert_close(found, torch.stack([angle.cos(), angle.sin()], 1))
    x, y = randn(4, 2, 3, 3), randn(4, 2, 3, 3, seed=1)
    torch.testing.assert_close(slerp(x, y, 0.0), x)
    torch.testing.assert_close(slerp(x, y, 1.0), y)
    torch.testing.assert_close(slerp(x, y, 0.3)[2:3], slerp(x[2:3], y[2:3], 0.3))
    # latents of equal norm keep it; alike ones, too
    same = x / x.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    other = y / y.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(slerp(same, other, 0.7).flatten(1).norm(dim=1), torch.ones(4, dtype=F64))
    torch.testing.assert_close(slerp(x, x, 0.7), x)
    # near to each other it is the straight line
    torch.testing.assert_close(slerp(x, x + 1e-7 * y, 0.5), x + 5e-8 * y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("repeats", [1, 3])
def test_sdedit_has_its_law_on_gaussians(repeats):
    """x -> m + k (x + sigma eps - m) + sqrt(k) sigma z, k = c/(c + sigma^2), as the reverse process gives back."""
    sigma, c, n = 1.0, DIAGONAL.variances, 4000
    x0 = DIAGONAL.mean + torch.tensor([2.0, -3.0, 1.0], dtype=F64)
    levels = sigmas.karras(150, sigma_min=0.01, sigma_max=sigma)
    found = sdedit(DIAGONAL.score, x0.expand(n, 3), levels, repeats=repeats, generator=generator())
    k = c / (c + sigma**2)
    var = sum(k ** (2 * j) * (k**2 + k) * sigma**2 for j in range(repeats))
    mean = DIAGONAL.mean + k**repeats * (x0 - DIAGONAL.mean)
    assert bool(((found.mean(0) - mean).abs() < 5 * (var / n).sqrt() + 0.01).all())
    assert bool(((found.var(0) / var - 1).abs() < 5 * math.sqrt(2 / n) + 0.02).all())


def test_sdedit_keeps_what_is_known():
    d, known = DIAGONAL, torch.tensor([True, False, True])
    x0, seen = d.sample(8, generator()), []

    def score(x, sigma):
        seen.append(((x - x0) / sigma)[:, known])
        return d.score(x, sigma)

    found = sdedit(score, x0, [3.0, 1.0, 0.2, 0.0], known=known, repeats=2, generator=generator())
    assert torch.equal(found[:, known], x0[:, known])
    assert not torch.isclose(found[:, ~known], x0[:, ~known]).any()
    # the same eps at all levels of a repeat, another in the next
    torch.testing.assert_close(seen[1], seen[0])
    torch.testing.assert_close(seen[2], seen[0])
    torch.testing.assert_close(seen[4], seen[3])
    assert not torch.isclose(seen[3], seen[0]).any()


@pytest.mark.parametrize("known", [None, torch.tensor([True, False])])
def test_sdedit_is_one_thing_for_a_sample_and_a_batch(known):
    d = mixture()
    x0 = d.sample(64, generator())
    whole = sdedit(d.score, x0, grid(8), Churn(), repeats=2, known=known, generator=PerSampleNoise(0))
    for first, count in ((0, 1), (9, 3)):
        noise = PerSampleNoise(0, first)
        few = sdedit(d.score, x0[first : first + count], grid(8), Churn(), repeats=2, known=known, generator=noise)
        torch.testing.assert_close(few, whole[first : first + count], rtol=1e-9, atol=1e-9)
    # the noise that x0 gets is not the sampler's first
    eps = []

    def score(x, sigma):
        eps.append(x)
        return torch.zeros_like(x)

    out = sdedit(score, torch.zeros(5, 2, dtype=F64), [1.0, 0.5], Ancestral(), generator=PerSampleNoise(0))
    assert not torch.isclose((out - eps[0]) / math.sqrt(0.1875), eps[0]).any()


@pytest.mark.parametrize(
    ("made", "error", "said"),
    [
        (lambda s, x: encode(s, x, grid(5), Ancestral()), ValueError, "has noise or memory; expected Euler"),
        (lambda s, x: encode(s, x, grid(5), DPMSolverMultistep(2)), ValueError, "has noise or memory; expected Euler"),
        (lambda s, x: encode(s, x, grid(5), None), TypeError, "sampler is None; expected a sampler object"),
        (lambda s, x: encode(s, x, grid(5), tol=2.0), ValueError, "tol = 2.0, iterations = 200; expected 0 < tol < 1"),
        (lambda s, x: encode(s, x / 0, grid(5)), ValueError, "x0 is not finite"),
        (lambda s, x: encode(s, x, [0.1, 1.0]), ValueError, "expected strictly descending levels"),
        (lambda s, x: slerp(x, x[:, :1], 0.5), ValueError, r"b has shape \(4, 1\); expected \(B, 2\)"),
        (lambda s, x: slerp(x, x[:3], 0.5), ValueError, "a has 4 rows, b 3; expected as many, or one"),
        (lambda s, x: slerp(x, -x, 0.5), ValueError, "a and b are opposite, so no shortest arc joins them"),
        (lambda s, x: slerp(x, 2 + x, torch.ones(3)), ValueError, r"weight has shape \(3,\) for 4 latents"),
        (lambda s, x: slerp(x, 2 + x, torch.ones(4, 4)), ValueError, r"weight has shape \(4, 4\) for 4 latents"),
        (lambda s, x: slerp(x, 2 + x, math.nan), ValueError, "weight is not finite"),
        (lambda s, x: slerp(x, 0 * x, 0.5), ValueError, "b holds latents of length 0, which have no direction"),
        (lambda s, x: slerp(x / 0, x, 0.5), ValueError, "a is not finite"),
        (lambda s, x: sdedit(s, x, grid(5), known=torch.ones(3) > 0), ValueError, r"known has shape \(3,\); expected"),
        (lambda s, x: sdedit(s, x, grid(5), repeats=0), ValueError, "repeats is 0; expected at least 1"),
        (lambda s, x: sdedit(s, x, grid(5), known=torch.ones(2)), TypeError, "known has dtype torch.float32; expected"),
    ],
)
def test_what_can_not_be_edited_is_refused(made, error, said):
    d = mixture()
    with pytest.raises(error, match=said):
        made(d.score, 1 + d.sample(4, generator()))


@pytest.mark.parametrize("exact", [False, True])
def test_latents_in_half_precision_are_those_of_single(exact):
    d = mixture()
    x0 = d.sample(4, generator()).half()
    found = encode(d.score, x0, grid(8), exact=exact)
    assert found.dtype == torch.half
    torch.testing.assert_close(found, encode(d.score, x0.float(), grid(8), exact=exact).half(), rtol=0.02, atol=0.02)
