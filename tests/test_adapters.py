from __future__ import annotations

import pytest
import torch
from problems import F64, PROCESSES, mixture, randn, ring

from scorelab import VP, DiscreteVP, broadcast, clipped, from_denoiser, from_eps, from_time_score
from scorelab.processes import linear_betas

X, SIGMA = 3 * randn(6, 2), torch.tensor(0.7, dtype=F64)


@pytest.mark.parametrize("sigma", [SIGMA, SIGMA.expand(6)])
def test_from_eps_and_from_denoiser(sigma):
    d = mixture()
    eps = from_eps(lambda x, s: -broadcast(s, x) * d.score(x, s))
    torch.testing.assert_close(eps(X, sigma), d.score(X, sigma))
    torch.testing.assert_close(from_denoiser(d.denoise)(X, sigma), d.score(X, sigma))


@pytest.mark.parametrize("name", PROCESSES)
def test_scaled_functions_of_time(name):
    """A score and an eps network in scaled coordinates and native time, written out from the definitions."""
    p, d = PROCESSES[name], mixture()

    def score_t(x_t, t):
        alpha = broadcast(p.alpha(t), x_t)
        return d.score(x_t / alpha, p.sigma(t)) / alpha

    def eps_t(x_t, t):
        return -broadcast(p.std(t), x_t) * score_t(x_t, t)

    for sigma in (SIGMA, SIGMA.expand(6)):
        torch.testing.assert_close(from_time_score(score_t, p)(X, sigma), d.score(X, sigma), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(from_eps(eps_t, p)(X, sigma), d.score(X, sigma), rtol=1e-6, atol=1e-6)


def test_ddpm_networks_get_their_step_index():
    p, seen = DiscreteVP(linear_betas()), []
    score = from_eps(lambda x, i: seen.append(float(i)) or torch.zeros_like(x), p, label=lambda s: 1000 * p.time(s) - 1)
    score(X, p.step_sigmas[0])
    score(X, p.step_sigmas[999])
    assert seen == pytest.approx([0, 999], abs=1e-9)


def test_clipped_bounds_the_denoised_sample_and_leaves_the_rest_untouched():
    d = ring()
    score = clipped(d.score, -0.5, 0.5)
    found = X + SIGMA**2 * score(X, SIGMA)
    torch.testing.assert_close(found, d.denoise(X, SIGMA).clamp(-0.5, 0.5))
    wide = clipped(d.score, -100, 100)
    assert torch.equal(wide(X, SIGMA), d.score(X, SIGMA))


def test_adapters_pass_rows_on():
    class Rows:
        def __init__(self, values):
            self.values = values

        def __call__(self, x, sigma):
            return self.values * x

        def rows(self, index):
            return Rows(self.values[index])

    values, index = torch.arange(1, 7, dtype=F64)[:, None], torch.tensor([4, 1])
    whole = clipped(from_eps(Rows(values)), -9, 9)
    torch.testing.assert_close(whole.rows(index)(X[index], SIGMA), whole(X, SIGMA)[index])
    assert not hasattr(from_eps(lambda x, s: x), "rows")


def test_broadcast_has_one_rule():
    x = torch.zeros(3, 1, 2, 2)
    assert broadcast(0.5, x).shape == ()
    assert broadcast(torch.ones(3), x).shape == (3, 1, 1, 1)
    with pytest.raises(ValueError, match=r"sigma has shape \(2,\)"):
        broadcast(torch.ones(2), x)
    with pytest.raises(ValueError, match=r"sigma has shape \(3, 1\)"):
        broadcast(torch.ones(3, 1), x)


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="callable"):
        from_eps(3)
    with pytest.raises(ValueError, match="low < high"):
        clipped(ring().score, 1, -1)
    with pytest.raises(ValueError, match="scorelab.broadcast"):
        from_denoiser(lambda x, s: x[:, :1])(X, SIGMA)
    with pytest.raises(ValueError, match="sigma has shape"):
        from_time_score(lambda x, t: x, VP())(X, torch.ones(2, dtype=F64))
