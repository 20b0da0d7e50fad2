from __future__ import annotations

import json

import pytest
import torch
from problems import F64, correlated, generator, mixture, randn, ring

from scorelab import ScoreModel, sample, sigmas, trajectory
from scorelab.models import Constant, LogSigma
from scorelab.nn import MLP
from scorelab.predictions import edm
from scorelab.processes import VE
from scorelab.samplers import RK4, AdamsBashforth, Calibrated, Euler, PredictorCorrector, calibrate

LOW, HIGH = 0.01, 40.0


def starts(count: int, seed: int) -> torch.Tensor:
    return HIGH * randn(count, 2, seed=seed)


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return float((x - exact).square().mean(1).sqrt().mean())


@pytest.mark.parametrize("method", ["least_squares", "gradient"])
def test_it_lands_nearer_than_the_best_multistep_solver(method):
    """On starts it never saw: a third of exponential Adams-Bashforth's error at most, and of the error it reports."""
    d = ring()
    x = starts(500, 1)
    exact = sample(d.score, x, sigmas.log_linear(300, sigma_min=LOW, sigma_max=HIGH), RK4())
    options = {"method": method, "trials": 40, "iterations": 30, "reference_steps": 64}
    found = calibrate(d.score, starts(800, 2), nfe=6, sigma_min=LOW, sigma_max=HIGH, **options)
    calls = []

    def score(y, sigma):
        calls.append((len(y), float(sigma)))
        return d.score(y, sigma)

    mine = error(sample(score, x, sampler=found), exact)
    plain = error(sample(d.score, x, sigmas.karras(6, sigma_min=LOW, sigma_max=HIGH), AdamsBashforth(3)), exact)
    # first it is known again by four points
    assert [rows for rows, _ in calls] == [4] + 6 * [500]
    assert [sigma for _, sigma in calls[1:]] == pytest.approx(found.sigmas[:-1])
    assert mine < plain / 3
    assert found.report["held_out_error"] == pytest.approx(mine, rel=0.6)
    assert found.report["uncalibrated_held_out_error"] == pytest.approx(plain, rel=0.5)
    assert found.report["nfe"] == 6


def test_a_linear_score_is_solved_exactly():
    """On one Gaussian every trajectory is affine in its start, so one weight a step makes any grid exact."""
    found = calibrate(
        lambda x, s: -x / (1 + s**2),
        starts(32, 0),
        nfe=3,
        sigma_min=LOW,
        sigma_max=HIGH,
        method="least_squares",
        trials=9,
    )
    x = starts(10, 5)
    # the ODE keeps x / sqrt(1 + sigma^2); then Tweedie
    exact = x * ((1 + LOW**2) / (1 + HIGH**2)) ** 0.5 / (1 + LOW**2)
    torch.testing.assert_close(sample(lambda x, s: -x / (1 + s**2), x, sampler=found), exact, rtol=1e-4, atol=1e-6)


def test_one_evaluation():
    found = calibrate(
        mixture().score, starts(20, 0), nfe=1, sigma_min=LOW, sigma_max=HIGH, method="gradient", trials=2, iterations=2
    )
    assert found.sigmas == (HIGH, 0.0)
    assert sample(mixture().score, (3, 2), sampler=found, dtype=F64, generator=generator()).shape == (3, 2)


def test_a_network_in_float32_is_calibrated_both_ways():
    process = VE(0.05, 20.0)
    model = ScoreModel(
        MLP((2,), width=16, depth=1, features=4),
        process,
        edm(1.0),
        data_shape=(2,),
        input_scale=Constant(1.0),
        label=LogSigma(1.0),
    ).eval()
    for method in ("least_squares", "gradient"):
        x = 20 * torch.randn(32, 2, generator=generator())
        options = {"method": method, "trials": 10, "iterations": 5, "reference_steps": 20}
        found = calibrate(model, x, nfe=4, sigma_min=0.05, sigma_max=20.0, **options)
        assert found.report["held_out_error"] <= found.report["uncalibrated_held_out_error"] * 1.5
        assert sample(model, (5, 2), sampler=found, generator=generator()).dtype == torch.float32


def test_saved_and_loaded(tmp_path):
    found = Calibrated((2.0, 1.0, 0.0), ((1.0,), (1.25, -0.25)), {"nfe": 2})
    found.save(tmp_path / "s.json")
    again = Calibrated.load(tmp_path / "s.json")
    assert again == found
    assert again.report == {"nfe": 2}
    x = randn(4, 2)
    assert torch.equal(sample(mixture().score, x, sampler=again), sample(mixture().score, x, [2.0, 1.0, 0.0], found))
    with pytest.raises(ValueError, match="its own 3 noise levels"):
        sample(mixture().score, x, [2.0, 0.5, 0.0], again)
    with pytest.raises(ValueError, match="neither the sampler nor the score says"):
        sample(mixture().score, x, sampler=Euler())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "scorelab.calibrated.1"}', "cut"])
def test_damaged_files_are_named(tmp_path, text):
    path = tmp_path / "damaged.json"
    if text == "cut":
        Calibrated((2.0, 0.0), ((1.0,),)).save(path)
        text = path.read_text()[:-20]
    path.write_text(text)
    with pytest.raises(ValueError, match="damaged.json is no calibrated sampler"):
        Calibrated.load(path)
    with pytest.raises(ValueError, match="missing.json"):
        Calibrated.load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigmas": (2.0, 1.0)}, "final 0"),
        ({"weights": ((1.0,),)}, "1 rows of weights for 3 levels"),
        ({"weights": ((1.0, 2.0), (1.0,))}, "row 0"),
        ({"weights": ((1.0,), (float("nan"),))}, "row 1"),
    ],
)
def test_inconsistent_parts_are_refused(change, message):
    good = {"sigmas": (2.0, 1.0, 0.0), "weights": ((1.0,), (1.0,))}
    with pytest.raises(ValueError, match=message):
        Calibrated(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_calibration": torch.zeros(4, 2)}, "at least 16"),
        ({"method": "newton"}, "least_squares"),
        ({"nfe": 0}, "nfe is 0"),
        ({"sigma_min": 0.0}, "sigma_min is 0"),
        ({"sigma_min": 50.0}, "strictly descending"),
        ({"x_calibration": torch.full((20, 2), float("nan"))}, "not finite"),
    ],
)
def test_bad_input(change, message):
    good = {"x_calibration": torch.zeros(20, 2), "nfe": 2, "sigma_min": 0.1, "sigma_max": 1.0}
    with pytest.raises(ValueError, match=message):
        calibrate(lambda x, s: -x, **{**good, **change})


def test_report_is_plain_json(tmp_path):
    found = calibrate(
        mixture().score, starts(20, 0), nfe=2, sigma_min=LOW, sigma_max=HIGH, method="least_squares", trials=2
    )
    found.save(tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["report"] == found.report


FEW = {"sigma_min": LOW, "sigma_max": HIGH, "method": "least_squares", "trials": 2, "reference_steps": 16}


@pytest.fixture(scope="module")
def fitted():
    return calibrate(mixture().score, starts(20, 0), nfe=3, **FEW)


def bound(rows):
    """A score that takes batches of this many rows only."""
    shift = torch.zeros(rows, 2, dtype=torch.float64)
    return lambda x, s: mixture().score(x + shift, s)


@pytest.mark.parametrize(
    ("same", "rows"),
    [
        (mixture().score, 11),
        (lambda x, s: mixture().score(x, s) * 1.01, 1),
        (lambda x, s: mixture().score(x.bfloat16().double(), s), 11),
        (bound(3), 3),
        (bound(11), 11),
    ],
)
def test_the_score_it_was_fitted_to_passes_in_any_precision(fitted, tmp_path, same, rows):
    """Warnings are errors here; the check is not counted as evaluations."""
    fitted.save(tmp_path / "s.json")
    for sampler in (fitted, Calibrated.load(tmp_path / "s.json"), PredictorCorrector(fitted)):
        last = list(trajectory(same, starts(rows, 1), sampler=sampler, generator=generator()))[-1]
        # a correction after each step but the last
        assert last.nfe == (5 if isinstance(sampler, PredictorCorrector) else 3)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (ring().score, "another score"),
        (lambda x, s: 2 * mixture().score(x, s), "another score"),
        (lambda x, s: -mixture().score(x, s), "another score"),
        (lambda x, s: mixture().score(x, 1.5 * s), "another score"),
        (lambda x, s: -x, "another score"),
        (correlated().score, r"for data of shape \(2,\), not \(3,\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:samples have grown")
def test_another_score_is_warned_of_through_files_and_wrappers(fitted, tmp_path, other, message):
    fitted.save(tmp_path / "s.json")
    x = HIGH * randn(9, 3 if "shape" in message else 2)
    for sampler in (fitted, Calibrated.load(tmp_path / "s.json"), PredictorCorrector(fitted)):
        with pytest.warns(RuntimeWarning, match=message):
            sample(other, x, sampler=sampler, generator=generator())


def test_a_file_that_names_no_score_is_warned_of(fitted, tmp_path):
    fitted.save(tmp_path / "s.json")
    text = json.loads((tmp_path / "s.json").read_text())
    del text["fingerprint"]
    (tmp_path / "s.json").write_text(json.dumps(text))
    with pytest.warns(RuntimeWarning, match="does not say to which score"):
        assert Calibrated.load(tmp_path / "s.json") == fitted
