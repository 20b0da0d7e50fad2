from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from problems import generator
from test_training import small

from scorelab import VE, ScoreModel
from scorelab.cli.main import main
from scorelab.cli.runs import load_run
from scorelab.training import EMA, Snapshot, reconstruct, train
from scorelab.training.ema import averages_of, power_exponent


def parameter(value: float = 0.0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full((1,), value, dtype=torch.float64))


def test_widths_and_exponents():
    """The paper's pairs, and the standard deviation of the power function by quadrature."""
    assert power_exponent(0.10) == pytest.approx(6.94, abs=0.005)
    assert power_exponent(0.05) == pytest.approx(16.97, abs=0.005)
    for width in (0.02, 0.13, 0.25):
        g = power_exponent(width)
        tau = (np.arange(1_000_000) + 0.5) / 1_000_000
        weight = (g + 1) * tau**g / 1_000_000
        mean = float((weight * tau).sum())
        assert math.sqrt(float((weight * (tau - mean) ** 2).sum())) == pytest.approx(width, rel=1e-4)
    for bad in (0.0, 0.3, -0.1):
        with pytest.raises(ValueError, match="0 < width <= 0.28"):
            power_exponent(bad)


def test_a_power_average_weighs_updates_by_its_power():
    """After t updates, update i weighs (i/t)^(gamma + 1) - ((i - 1)/t)^(gamma + 1), the start nothing."""
    weight, g, values = parameter(1e6), power_exponent(0.1), torch.randn(200, generator=generator()).tolist()
    average = EMA([weight], relative_std=0.1)
    for value in values:
        weight.data.fill_(value)
        average.update()
    i = np.arange(1, 201)
    shares = (i / 200) ** (g + 1) - ((i - 1) / 200) ** (g + 1)
    assert float(average.average[0]) == pytest.approx(float((shares * values).sum()), abs=1e-6)
    assert average.initial_share == 0
    assert average.name == "ema_power_0.1"


def test_averages_of_other_widths_are_made_afterwards():
    """Reconstructed from snapshots of two widths along a random walk, beside the same average taken directly."""
    weight, steps = parameter(), 1024
    model = ScoreModel(torch.nn.ParameterList([weight]), VE(), data_shape=(1,))
    stored = [EMA([weight], relative_std=w) for w in (0.05, 0.1)]
    direct = {w: EMA([weight], relative_std=w) for w in (0.07, 0.15)}
    walk = torch.randn(steps, generator=generator(), dtype=torch.float64).cumsum(0)
    snapshots = []
    for n, value in enumerate(walk.tolist(), 1):
        weight.data.fill_(value)
        for average in [*stored, *direct.values()]:
            average.update()
        if n % 64 == 0:
            snapshots += [Snapshot(n, w, a.weights(model)) for w, a in zip((0.05, 0.1), stored, strict=True)]
    for width, average in direct.items():
        found, error = reconstruct(snapshots, width)
        assert error < 0.02
        assert float(found["0"]) == pytest.approx(float(average.average[0]), abs=0.02 * float(walk.std()))
    # a stored one is itself
    found, error = reconstruct(snapshots, 0.1)
    assert float(found["0"]) == pytest.approx(float(stored[1].average[0]), abs=1e-6)
    assert error < 1e-5
    # one snapshot of another width can't, but it is not scaled
    found, error = reconstruct(snapshots[-2:-1], 0.25)
    assert error > 0.3
    assert float(found["0"]) == pytest.approx(float(snapshots[-2].weights["0"]), rel=1e-6)
    with pytest.raises(ValueError, match="no stored power-function averages"):
        reconstruct([], 0.1)


def test_shares_are_the_least_squares_that_sum_to_1():
    """Of two stored functions the best s f + (1 - s) g is found by quadrature over many s."""
    tau = (np.arange(200_000) + 0.5) / 200_000

    def function(width: float) -> np.ndarray:
        g = power_exponent(width)
        return (g + 1) * tau**g

    f, g, wanted = function(0.05), function(0.1), function(0.2)
    errors = [float(np.square(s * f + (1 - s) * g - wanted).mean()) for s in np.linspace(-3, 3, 601)]
    best = int(np.argmin(errors))
    stored = [Snapshot(1000, w, {"w": torch.tensor([v])}) for w, v in ((0.05, 1.0), (0.1, 0.0))]
    found, error = reconstruct(stored, 0.2)
    assert float(found["w"]) == pytest.approx(np.linspace(-3, 3, 601)[best], abs=0.01)
    assert error == pytest.approx(math.sqrt(errors[best] / float(np.square(wanted).mean())), rel=1e-3)


def test_shared_weights_are_averaged_under_all_their_names():
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
            self.two.weight = self.one.weight

    module = Tied()
    average = EMA(module.parameters(), 0.5)
    before = module.one.weight.detach().clone()
    module.one.weight.data.add_(1)
    average.update()
    state = average.weights(ScoreModel(module, VE(), data_shape=(2,)))
    # the warm-up takes 1/10 of what was there
    torch.testing.assert_close(state["one.weight"], before + 0.9)
    assert torch.equal(state["one.weight"], state["two.weight"])


def test_names_are_different():
    with pytest.raises(ValueError, match="all different"):
        averages_of([parameter()], (0.9, 0.9), ())
    with pytest.raises(ValueError, match="expected a decay in optim.ema at least"):
        averages_of([parameter()], (), (0.1,))


def test_every_average_can_be_sampled_from(tmp_path, capsys):
    options = {"optim__ema": (0.2, 0.9), "optim__ema_power": (0.05, 0.1), "training__keep_last": 0}
    train(small(6, **options), tmp_path, progress=False)
    weights = {}
    for name in ("model", "ema", "ema_0.9", "ema_power_0.05", "ema_power_0.1", "ema_power_0.08"):
        weights[name] = torch.cat([p.flatten() for p in load_run(tmp_path, weights=name)[1].parameters()])
    values = list(weights.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    # the first average goes by its own name, too
    same = torch.cat([p.flatten() for p in load_run(tmp_path, weights="ema_0.2")[1].parameters()])
    assert torch.equal(same, weights["ema"])
    with pytest.raises(ValueError, match=r"holds no weights 'emma'; expected ema, ema_0.9, ema_power_0.05"):
        load_run(tmp_path, weights="emma")
    with pytest.raises(ValueError, match="expected a number such as ema_power_0.1"):
        load_run(tmp_path, weights="ema_power_x")
    assert main(["sample", "--workdir", str(tmp_path), "--n=4", "--weights=ema_0.9"]) == 0
    assert "4 samples of step 6" in capsys.readouterr().out
