"""Guidance on an interval, step by step: orders kept across its ends, and EDM2's loop by the number of a step."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import F64, randn
from test_guidance import LABELLED, network

from scorelab import clipped, sample, samplers, sigmas, trajectory
from scorelab.guidance import ByStep, autoguidance, classifier_free, snapped
from scorelab.inverse import DPS, Inpainting, Measurement

LOW, HIGH = 0.37, 3.1
NUMBERS = (20, 28, 40, 56, 80)
LABELS = torch.arange(8) % 4
CONDITIONAL, FREE = LABELLED.conditioned(LABELS), LABELLED.score
GUIDED = classifier_free(CONDITIONAL, FREE, 3.0, interval=(LOW, HIGH))
FULL = classifier_free(CONDITIONAL, FREE, 3.0)


def grid(n: int) -> torch.Tensor:
    return sigmas.geometric(n + 1, sigma_min=0.1, sigma_max=20.0)


@pytest.fixture(scope="module")
def exact() -> tuple[torch.Tensor, torch.Tensor]:
    """A start at 20, and where the ODE takes it to at 0.1: piece by piece, each of a smooth field."""
    x = start = 20 * randn(8, 2)
    for score, high, low in ((CONDITIONAL, 20.0, HIGH), (FULL, HIGH, LOW), (CONDITIONAL, LOW, 0.1)):
        x = sample(score, x, sigmas.geometric(100, sigma_min=low, sigma_max=high), samplers.RK4())
    return start, x


def errors(exact, sampler, snap: bool, numbers=NUMBERS) -> np.ndarray:
    start, end = exact
    grids = [snapped(grid(n), (LOW, HIGH)) if snap else grid(n) for n in numbers]
    return np.array([float((sample(GUIDED, start, g, sampler) - end).square().mean().sqrt()) for g in grids])


def order(found: np.ndarray, numbers=NUMBERS) -> float:
    return float(-np.polyfit(np.log(numbers), np.log(found), 1)[0])


def test_solvers_keep_their_order_where_steps_end_on_the_interval(exact):
    """Heun's and RK4's by regression; of multistep methods, which begin anew at each end, at least 1.7."""
    for sampler, least, most in ((samplers.Heun(), 1.85, 2.3), (samplers.DPMSolverMultistep(), 1.7, 2.3)):
        assert least < order(errors(exact, ByStep(sampler), True)) < most
    numbers = (20, 28, 40, 56)
    assert 3.6 < order(errors(exact, ByStep(samplers.RK4()), True, numbers), numbers) < 4.6


def test_the_order_drops_where_they_do_not(exact):
    """Without levels on the ends, and without steps that keep to one side."""
    both = errors(exact, ByStep(), True)
    for sampler, snap in ((samplers.Heun(), False), (samplers.Heun(), True), (ByStep(), False)):
        found = errors(exact, sampler, snap)
        assert order(found) < 1.75
        assert np.log(found / both).mean() > np.log(2)


def test_grids_are_snapped_by_moving_the_nearest_levels():
    found = snapped([80.0, 10.0, 4.0, 2.0, 0.5, 0.1, 0.0], (0.4, 3.0))
    assert found.tolist() == [80.0, 10.0, 3.0, 2.0, 0.4, 0.1, 0.0]
    assert found.dtype == F64
    # both ends between two levels; ends beside the first and the last; none inside; ends that are levels
    for levels, interval, expected in [
        ([80.0, 10.0, 1.0, 0.1], (2.0, 5.0), [80.0, 5.0, 2.0, 0.1]),
        ([80.0, 10.0, 1.0, 0.1], (2.0, 2.5), [80.0, 10.0, 2.5, 2.0, 0.1]),
        ([80.0, 1.0, 0.0], (2.0, 70.0), [80.0, 70.0, 2.0, 1.0, 0.0]),
        ([80.0, 10.0, 1.0], (0.0, float("inf")), [80.0, 10.0, 1.0]),
        ([80.0, 10.0, 1.0, 0.0], (0.5, 90.0), [80.0, 10.0, 1.0, 0.0]),
        ([80.0, 10.0, 1.0, 0.0], (1.0, 10.0), [80.0, 10.0, 1.0, 0.0]),
    ]:
        assert snapped(levels, interval).tolist() == expected
    for n in range(2, 40):
        levels = sigmas.karras(n, sigma_min=0.002, sigma_max=80.0)
        found = snapped(levels, (0.28, 5.42)).tolist()
        assert all(a > b for a, b in pairwise(found))
        assert {0.28, 5.42} <= set(found)
        assert len(found) <= n + 3
        assert n < 8 or len(found) == n + 1
    with pytest.raises(ValueError, match="sigmas has 1 levels"):
        snapped([1.0], (0.5, 2.0))


def test_edm2s_loop_by_the_number_of_a_step():
    """Guided in steps 3 to 7, the corrector as its step: the release's loop written out, to rounding."""
    levels = sigmas.karras(12, sigma_min=0.05, sigma_max=20.0)
    x = start = 20 * randn(8, 2)

    def denoise(x: torch.Tensor, sigma: torch.Tensor, is_guided: bool) -> torch.Tensor:
        with_class = x + sigma**2 * CONDITIONAL(x, sigma)
        return FREE.__self__.denoise(x, sigma).lerp(with_class, 3.0) if is_guided else with_class

    for i, (now, after) in enumerate(pairwise(levels)):
        is_guided = 3 <= i <= 7
        slope = (x - denoise(x, now, is_guided)) / now
        ahead = x + (after - now) * slope
        if i < 11:
            ahead = x + (after - now) * 0.5 * (slope + (ahead - denoise(ahead, after, is_guided)) / after)
        x = ahead
    *_, last = trajectory(FULL, start, levels, ByStep(samplers.Heun(), (3, 7)))
    torch.testing.assert_close(last.x, x, rtol=1e-12, atol=1e-12)
    assert last.nfe == 23
    # steps go before an interval, and what is around a guided score is kept
    torch.testing.assert_close(
        sample(GUIDED, start, levels, ByStep(samplers.Heun(), (3, 7))), x, rtol=1e-12, atol=1e-12
    )
    wide = clipped(autoguidance(FULL, FREE, 1.0), -1e9, 1e9)
    torch.testing.assert_close(sample(wide, start, levels, ByStep(samplers.Heun(), (3, 7))), x, rtol=1e-9, atol=1e-9)


def test_all_steps_are_guidance_and_none_the_condition():
    levels, start = grid(12), 20 * randn(8, 2)
    for sampler in (
        samplers.Heun(),
        samplers.UniPC(),
        samplers.Ancestral(),
        samplers.PredictorCorrector(samplers.Euler()),
    ):
        noise = {"generator": torch.Generator().manual_seed(0)}
        whole = sample(FULL, start, levels, ByStep(sampler, (0, 11)), **noise)
        noise = {"generator": torch.Generator().manual_seed(0)}
        torch.testing.assert_close(whole, sample(FULL, start, levels, sampler, **noise))
    none = classifier_free(CONDITIONAL, FREE, 3.0, interval=(30.0, 40.0))
    torch.testing.assert_close(sample(none, start, levels, ByStep()), sample(CONDITIONAL, start, levels))
    # adaptive solvers take a stretch between two levels for a step, and parts of a batch their own conditions
    solver, ends = samplers.ProbabilityFlow(1e-7, 1e-7), [20.0, HIGH, LOW, 0.1]
    found = sample(GUIDED, start, ends, ByStep(solver))
    torch.testing.assert_close(
        found, sample(GUIDED, start, snapped(grid(120), (LOW, HIGH)), ByStep(samplers.RK4())), rtol=1e-4, atol=1e-4
    )
    model = network()
    parts = classifier_free(model.conditioned(LABELS), model.conditioned(None), 2.0, interval=(0.5, 4.0))
    begin = start.float()
    whole = sample(parts, begin, levels, ByStep())
    torch.testing.assert_close(sample(parts, begin, levels, ByStep(), batch_size=3), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [(0, 10), (3, 5), None])
def test_steps_are_guided_inside_of_a_sampler_that_differentiates_the_score(steps):
    """As around it, and counted as often."""
    m = Measurement(Inpainting(torch.tensor([True, False])), torch.zeros(1, 1, dtype=F64))
    levels, start = grid(11), 20 * randn(8, 2)
    (*_, outside), (*_, inside) = (
        trajectory(GUIDED, start, levels, sampler)
        for sampler in (ByStep(DPS(m, 0.3, samplers.Heun()), steps), DPS(m, 0.3, ByStep(samplers.Heun(), steps)))
    )
    torch.testing.assert_close(inside.x, outside.x, rtol=1e-12, atol=1e-12)
    assert inside.nfe == outside.nfe == 22


def test_steps_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"steps is \(3, 2\); expected \(first, last\)"):
        ByStep(samplers.Heun(), (3, 2))
    with pytest.raises(ValueError, match=r"steps is \(3,\); expected \(first, last\)"):
        ByStep(samplers.Heun(), (3,))
    for interval in ((HIGH, LOW), (float("nan"), HIGH), (LOW,)):
        with pytest.raises(ValueError, match=r"interval is .*; expected noise levels \(low, high\)"):
            snapped(grid(12), interval)
    with pytest.raises(TypeError, match="sampler is 'heun'; expected a sampler"):
        ByStep("heun")
    with pytest.raises(ValueError, match=r"steps is \(3, 12\), and 13 levels make 12 steps; expected some of 0 to 11"):
        sample(FULL, (8, 2), grid(12), ByStep(samplers.Heun(), (3, 12)), dtype=F64)
    with pytest.raises(ValueError, match="the score is not guided, as far as it shows"):
        sample(lambda x, s: FULL(x, s), (8, 2), grid(12), ByStep(), dtype=F64)
