from __future__ import annotations

import math

import pytest
import torch
from problems import F64, generator, mixture, randn, ring
from scipy.integrate import RK23, RK45, solve_ivp

from scorelab import sample, trajectory
from scorelab.samplers import Context, ProbabilityFlow
from scorelab.samplers.adaptive import PAIRS, Controller, integrate


def scipy_flow(d, x: torch.Tensor, high: float, low: float) -> torch.Tensor:
    """The probability-flow ODE in sigma by SciPy's DOP853 at 1e-12."""
    out = []
    for row in x:
        run = solve_ivp(
            lambda s, y: (-s * d.score(torch.tensor(y)[None], float(s))[0]).numpy(),
            (high, low),
            row.numpy(),
            method="DOP853",
            rtol=1e-12,
            atol=1e-12,
        )
        out.append(torch.tensor(run.y[:, -1]))
    return torch.stack(out)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("problem", [ring, mixture])
def test_meets_its_tolerance_against_scipy(problem, tolerance):
    d = problem()
    x = 10 * randn(6, 2)
    exact = scipy_flow(d, x, 10.0, 0.05)
    found = sample(d.score, x, [10.0, 0.05], ProbabilityFlow(tolerance, tolerance))
    # local errors of `tolerance`, in a flow that contracts: 100 times that is generous for the global error
    assert float((found - exact).abs().max()) < 100 * tolerance


def test_reported_points_do_not_change_the_end_beyond_tolerance():
    x = 10 * randn(6, 2)
    once = sample(ring().score, x, [10.0, 0.05, 0.0], ProbabilityFlow(1e-7, 1e-7))
    often = sample(ring().score, x, [10.0, 3.0, 1.0, 0.3, 0.05, 0.0], ProbabilityFlow(1e-7, 1e-7))
    torch.testing.assert_close(once, often, rtol=1e-4, atol=1e-4)


def accepted(d, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sampler = ProbabilityFlow(1e-6, 1e-6)
    y, state = sampler.step(Context(d, x, 10.0, 0.05, sampler.init(x, [10.0, 0.05]), torch.zeros_like))
    return y, state.run.accepted


def test_one_stiff_sample_leaves_the_others_steps_unchanged():
    d = ring()

    def score(x, sigma):
        s = sigma.reshape(-1, 1) if sigma.ndim else sigma
        stiff = (x[:, :1] > 500).to(x)
        # the marked sample oscillates fast in log sigma
        kick = torch.cat(
            [torch.zeros_like(x[:, :1]), 100 * torch.sin(40 * s.log() * torch.ones_like(x[:, :1])) / s**2], 1
        )
        return torch.where(stiff > 0, kick, d.score(x, sigma))

    x = 10 * randn(100, 2)
    with_stiff = x.clone()
    with_stiff[37] = 1000.0
    plain, steps = accepted(score, x)
    mixed, mixed_steps = accepted(score, with_stiff)
    others = torch.arange(100) != 37
    assert torch.equal(steps[others], mixed_steps[others])
    assert torch.equal(plain[others], mixed[others])
    assert mixed_steps[37] > 3 * steps.max()


def test_scores_that_can_be_split_get_only_the_rows_that_move():
    d, sizes = ring(), []

    class Splitting:
        def __init__(self, index=None):
            self.index = index

        def __call__(self, x, sigma):
            sizes.append(len(x))
            assert self.index is None or len(self.index) == len(x)
            return d.score(x, sigma)

        def rows(self, index):
            return Splitting(index)

    x = 10 * randn(50, 2)
    steps = list(trajectory(Splitting(), x, [10.0, 0.05, 0.0], ProbabilityFlow()))
    assert steps[-1].nfe == len(sizes)
    assert min(sizes) < 50
    whole = sample(lambda y, s: d.score(y, s), x, [10.0, 0.05, 0.0], ProbabilityFlow())
    torch.testing.assert_close(steps[-1].x, whole)


def test_a_score_that_does_not_broadcast_is_named():
    with pytest.raises(ValueError, match="scorelab.broadcast"):
        sample(lambda x, s: -x / (1 + s**2), 10 * randn(5, 2), [10.0, 0.1, 0.0], ProbabilityFlow())
    with pytest.raises(ValueError, match="scorelab.broadcast"):
        sample(lambda x, s: -x / (1 + 50 * s.ndim), randn(2, 2), [10.0, 0.1], ProbabilityFlow())


def test_a_square_batch_that_broadcasts_along_the_wrong_axis_is_named():
    """(2, 2) points: sigma**2 of shape (2,) multiplies columns without any error of torch's."""
    with pytest.raises(ValueError, match="scorelab.broadcast"):
        sample(lambda x, s: -x / (0.01 + s**2), randn(2, 2), [10.0, 0.1], ProbabilityFlow())


def test_gradients_do_not_run_through_step_sizes():
    x = 3 * randn(4, 2)
    x[0] = 0.0
    x.requires_grad_()
    out = sample(mixture().score, x, [5.0, 1.0, 0.1, 0.0], ProbabilityFlow(1e-6, 1e-6), differentiable=True)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    shift = torch.zeros_like(x)
    shift[:, 0] = 1e-4
    ends = [
        sample(mixture().score, x.detach() + k * shift, [5.0, 1.0, 0.1, 0.0], ProbabilityFlow(1e-8, 1e-8))
        for k in (1, -1)
    ]
    torch.testing.assert_close(gradient[:, 0], (ends[0] - ends[1]).sum(1) / 2e-4, rtol=1e-3, atol=1e-3)


def test_images_and_empty_batches():
    def score(x, s):
        return -x / (1 + s.reshape(-1, 1, 1, 1) ** 2)

    x = sample(score, (3, 2, 4, 4), [5.0, 0.1, 0.0], ProbabilityFlow(), generator=generator(), dtype=F64)
    assert x.shape == (3, 2, 4, 4)
    assert sample(score, (0, 2, 4, 4), [5.0, 0.1, 0.0], ProbabilityFlow()).shape == (0, 2, 4, 4)


def test_limits_and_broken_scores_are_reported():
    with pytest.raises(RuntimeError, match=r"max_steps = 3 .*sigma ="):
        sample(ring().score, 10 * randn(4, 2), [10.0, 0.01], ProbabilityFlow(max_steps=3))

    def score(x, sigma):
        s = ring().score(x, sigma)
        return torch.where((torch.arange(len(x)) == 2)[:, None] & (sigma.reshape(-1)[0] < 5), math.nan, s)

    with pytest.raises(ValueError, match="sample 2"):
        sample(score, 10 * randn(4, 2), [10.0, 0.01], ProbabilityFlow())
    with pytest.raises(ValueError, match="tolerances"):
        ProbabilityFlow(0.0, 0.0)


def test_integrate_runs_in_both_directions():
    """dy/du = -y, exact exp(-u)."""
    y = torch.ones(3, 1, dtype=F64)
    there = integrate(lambda v, u, i: -v, y, 0.0, 2.0, Controller(1e-10, 1e-10)).y
    back = integrate(lambda v, u, i: -v, there, 2.0, 0.0, Controller(1e-10, 1e-10)).y
    torch.testing.assert_close(there, y * math.exp(-2), rtol=1e-8, atol=0)
    torch.testing.assert_close(back, y, rtol=1e-8, atol=0)


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_inner_levels_change_no_steps_and_meet_the_tolerance(method):
    d, x, grid = ring(), 10 * randn(6, 2), [10.0, 7.0, 3.0, 1.0, 0.4, 0.2, 0.1, 0.05]
    sampler = ProbabilityFlow(1e-6, 1e-6, method=method)
    few = list(trajectory(d.score, x, [10.0, 0.05, 0.0], sampler))
    many = list(trajectory(d.score, x, [*grid, 0.0], sampler))
    # samples wait for one another at every level, one alone does not
    assert many[-1].nfe <= 1.15 * few[-1].nfe
    alone = [list(trajectory(d.score, x[:1], levels, sampler))[-1].nfe for levels in ([10.0, 0.05], grid)]
    assert alone[0] == alone[1]
    assert torch.equal(many[-1].x, few[-1].x)
    assert [step.sigma for step in many] == [*grid, 0.0]
    for step in many[2:-1:2]:
        assert float((step.x[:2] - scipy_flow(d, x[:2], 10.0, step.sigma)).abs().max()) < 1e-4


@pytest.mark.parametrize(("method", "scipys"), [("dopri5", RK45), ("bosh3", RK23)])
def test_continuous_extensions_are_scipys(method, scipys):
    found = torch.tensor(PAIRS[method].dense, dtype=F64)
    torch.testing.assert_close(found.T, torch.tensor(scipys.P), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("budget", [9, 20, 21, 50])
def test_a_budget_of_evaluations_is_kept_and_the_state_returned(budget):
    d, x = ring(), 10 * randn(6, 2)
    sampler = ProbabilityFlow(1e-6, 1e-6, max_nfe=budget)
    with pytest.warns(RuntimeWarning, match="stopped early"):
        steps = list(trajectory(d.score, x, [10.0, 1.0, 0.05, 0.0], sampler))
    last = steps[-1]
    assert budget - 6 < last.nfe <= budget
    assert last.sigma.shape == (6,)
    for i in range(6):
        exact = scipy_flow(d, x[i : i + 1], 10.0, float(last.sigma[i]))
        assert float((last.x[i] - exact).abs().max()) < 1e-4
    with pytest.warns(RuntimeWarning, match="stopped early"):
        assert torch.equal(sample(d.score, x, [10.0, 1.0, 0.05, 0.0], sampler), last.x)


def test_a_run_that_stops_early_leaves_gradients_on():
    steps = trajectory(ring().score, randn(2, 2), [10.0, 0.05], ProbabilityFlow(1e-6, 1e-6, max_nfe=9))
    next(steps)
    with pytest.warns(RuntimeWarning, match="stopped early"):
        last = next(steps)
    assert last.sigma.shape == (2,)
    assert torch.is_grad_enabled()


def test_a_step_leaves_the_state_it_got():
    sampler, x = ProbabilityFlow(1e-6, 1e-6), 10 * randn(4, 2)
    y, state = sampler.step(Context(ring().score, x, 10.0, 3.0, sampler.init(x, [10.0, 3.0, 0.05]), torch.zeros_like))
    ends = [sampler.step(Context(ring().score, y, 3.0, 0.05, state, torch.zeros_like))[0] for _ in range(2)]
    assert torch.equal(ends[0], ends[1])


def test_a_budget_that_suffices_changes_nothing():
    d, x = ring(), 10 * randn(6, 2)
    free = list(trajectory(d.score, x, [10.0, 0.05, 0.0], ProbabilityFlow()))[-1]
    kept = list(trajectory(d.score, x, [10.0, 0.05, 0.0], ProbabilityFlow(max_nfe=free.nfe)))[-1]
    assert torch.equal(free.x, kept.x)
    with pytest.warns(RuntimeWarning, match="stopped early"):
        short = list(trajectory(d.score, x, [10.0, 0.05, 0.0], ProbabilityFlow(max_nfe=free.nfe - 1)))[-1]
    torch.testing.assert_close(short.sigma, torch.full((6,), 0.05, dtype=F64))
    with pytest.raises(ValueError, match="max_nfe is 8"):
        ProbabilityFlow(max_nfe=8)
