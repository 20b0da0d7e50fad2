from __future__ import annotations

import pytest
import torch
from problems import F64, PROCESSES, mixture, randn, ring

from scorelab import VP, DiscreteVP, broadcast, clipped, combined, from_denoiser, from_eps, from_time_score, sample
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
    score = from_eps(
        lambda x, i: seen.append(float(i[0])) or torch.zeros_like(x), p, label=lambda s: 1000 * p.time(s) - 1
    )
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


class Bound:
    """A score bound to the rows of a batch, row i of which is N(shift_i, 1), with all that may be known of a score."""

    def __init__(self, shift: torch.Tensor, low: float = 0.1, high: float = 10.0, device: str = "cpu") -> None:
        self.shift, self.sigma_range, self.device = shift, (low, high), torch.device(device)
        self.calls: list[int] = []

    def __call__(self, x, sigma):
        self.calls.append(len(x))
        return -(x - self.shift) / (1 + broadcast(sigma, x) ** 2)

    def rows(self, index):
        return Bound(self.shift[index], *self.sigma_range)

    def score_and_variance(self, x, sigma):
        return self(x, sigma), torch.full_like(x, 0.25)


def test_a_score_of_scores_keeps_what_is_known_of_its_parts():
    first, second = Bound(randn(6, 2), 0.1, 10.0), Bound(randn(6, 2, seed=1), 0.02, 4.0)
    score = combined(lambda x, sigma, a, b: a + 2 * (b - a), first, second, variance=True)
    x, sigma = randn(6, 2, seed=2), torch.tensor(0.7, dtype=F64)
    a, b = first(x, sigma), second(x, sigma)
    assert torch.equal(score(x, sigma), a + 2 * (b - a))
    assert score.sigma_range == (0.1, 4.0)
    assert score.device == torch.device("cpu")
    index = torch.tensor([4, 1])
    assert torch.equal(score.rows(index)(x[index], sigma), score(x, sigma)[index])
    assert score.rows(index).rows(torch.tensor([1])).sigma_range == (0.1, 4.0)
    # the variance comes from the evaluation of the first part, and is nowhere unasked
    first.calls.clear()
    value, v = score.score_and_variance(x, sigma)
    assert first.calls == [6]
    assert torch.equal(value, score(x, sigma))
    assert torch.equal(v, torch.full_like(x, 0.25))
    assert not hasattr(combined(lambda x, s, a: a, first), "score_and_variance")
    assert not hasattr(combined(lambda x, s, a: a, lambda x, s: x, variance=True), "score_and_variance")
    # one part that may be bound to its rows and does not say so, and the whole is never split
    assert not hasattr(combined(lambda x, s, a, b: a + b, first, lambda x, s: -x), "rows")
    with pytest.raises(TypeError, match="got int; expected a callable"):
        combined(lambda x, s, a, b: a + b, first, 3)
    with pytest.raises(ValueError, match="choose levels inside"):
        sample(score, x, [5.0, 1.0, 0.0])


def test_a_score_of_scores_is_split_and_found_in_training():
    """In parts of a batch each row keeps its own part of the condition, in half precision and through clipping, too."""
    shift = 3 * randn(7, 2).float()
    score = clipped(combined(lambda x, s, a: a, Bound(shift)), -50, 50)
    x = 4 * randn(7, 2, seed=3).float()
    levels = [4.0, 1.0, 0.2, 0.0]
    whole = sample(score, x, levels)
    assert torch.equal(whole, sample(score, x, levels, batch_size=3))
    half = sample(score, x.bfloat16(), levels, batch_size=3)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), whole, rtol=0.02, atol=0.1)
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
    with pytest.warns(RuntimeWarning, match="training mode, so its Dropout"):
        sample(combined(lambda x, s, a, b: a, Bound(shift), from_eps(net_score(net))), x, levels)


def net_score(net: torch.nn.Module):
    class Adapter:
        def __init__(self) -> None:
            self.model = net

        def __call__(self, x, sigma):
            return self.model(x)

    return Adapter()
