"""What a new user meets in the first hour: settings left at their defaults, own data, own choices of sampling."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from scorelab.cli.main import main
from scorelab.nn import MLP, UNet, fitting
from scorelab.training import build, default_config, train
from scorelab.training.config import scales_of
from scorelab.training.evaluations import Samples


def spiral(count: int = 2000) -> np.ndarray:
    """A spiral in millimetres, off the origin."""
    rng = np.random.default_rng(0)
    t = 4 * math.pi * np.sqrt(rng.uniform(0.05, 1, count))
    return 8 * np.stack([t * np.cos(t), t * np.sin(t)], 1) + rng.normal(size=(count, 2)) + [98, -20]


def defaults(tmp_path, data: np.ndarray, **changes):
    np.save(tmp_path / "x.npy", data)
    c = default_config()
    c.data.source, c.data.path = "arrays", str(tmp_path / "x.npy")
    for key, value in changes.items():
        c.training[key] = value
    return c


def test_vectors_in_any_unit_are_learnt_with_the_defaults(tmp_path, capsys):
    """Mean and spread of 1,000 samples within a tenth of the data's."""
    data = spiral()
    c = defaults(tmp_path, data, steps=600, sample_every=0, validate_every=0)
    model = train(c, tmp_path / "run")
    said = capsys.readouterr().err
    assert "2000 samples of shape (2,)" in said
    assert "as codes by Standardise" in said
    assert type(model.net) is MLP
    out = tmp_path / "x.npz"
    assert main(["sample", f"--workdir={tmp_path / 'run'}", "--n=1000", f"--out={out}"]) == 0
    x = np.load(out)["samples"]
    np.testing.assert_allclose(x.std(0), data.std(0), rtol=0.1)
    np.testing.assert_allclose(x.mean(0), data.mean(0), rtol=0, atol=0.1 * data.std())


def test_what_is_left_open_follows_from_the_data_and_is_kept(tmp_path):
    x = 3 * torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    found = scales_of(x)
    assert found.sigma_data == pytest.approx(float(x.square().mean().sqrt()))
    assert found.sigma_min == pytest.approx(found.sigma_data / 250)
    assert found.sigma_max == pytest.approx(max(float(torch.pdist(x).max()), 20 * found.sigma_data))
    # in many dimensions the distances decide
    wide = torch.randn(300, 3, 24, 20, generator=torch.Generator().manual_seed(0))
    assert scales_of(wide).sigma_max == pytest.approx(float(torch.pdist(wide.flatten(1)).max()), rel=1e-5)
    c = defaults(tmp_path, spiral(200), steps=2, sample_every=0, validate_every=0)
    train(c, tmp_path / "run", progress=False)
    known = json.loads((tmp_path / "run" / "data.json").read_text())
    assert known["sigma_max"] == pytest.approx(20, rel=1e-2)
    # with other data the run goes on with the levels that its network knows
    np.save(tmp_path / "x.npy", 9 * spiral(300))
    c.training.steps = 3
    model = train(c, tmp_path / "run", progress=False, accept_changes=True)
    assert model.sigma_range == pytest.approx((known["sigma_min"], known["sigma_max"]))
    c.process.sigma_max = 7.0
    assert build(c).model.sigma_range == pytest.approx((known["sigma_min"], 7.0), rel=1e-2)


def test_the_network_fits_the_shape():
    assert type(fitting((5,), width=8)) is MLP
    for shape, multipliers in (
        ((1, 8, 8), (1, 2)),
        ((3, 20, 24), (1, 2, 2)),
        ((3, 64, 64), (1, 2, 2, 2)),
        ((2, 16), (1, 2)),
    ):
        net = fitting(shape, width=8)
        assert type(net) is UNet
        assert net.config["multipliers"] == multipliers
    with pytest.raises(ValueError, match=r"model.net.blocks is 2, but data of shape \(5,\) gets model.net.name='mlp'"):
        fitting((5,), blocks=2)


@pytest.mark.parametrize(
    ("mean", "std", "said"),
    [
        (0.0, 1.0, None),
        (0.1, 1.3, None),
        (1.0, 1.0, "mean 1 and deviation 1"),
        (0.0, 3.0, "safe choice"),
        (0, 0.3, "0.3"),
    ],
)
def test_samples_far_from_the_data_are_warned_of(mean, std, said, recwarn):
    evaluation = Samples()
    evaluation._of_data = {"data_mean": [0.0, 0.0], "data_std": [1.0, 1.0]}
    evaluation._warn([0.0, mean], [1.0, std], 400, 1000)
    assert len(recwarn) == (said is not None)
    if said:
        assert said in str(recwarn[0].message)
        assert "in channel 1" in str(recwarn[0].message)


def test_inputs_that_grow_with_the_noise_are_warned_of(tmp_path):
    c = defaults(tmp_path, np.random.default_rng(0).normal(size=(40, 1, 8, 8)))
    c.model.prediction, c.process.sigma_max = "eps", 50.0
    with pytest.warns(RuntimeWarning, match=r"inputs grow with the noise, up to 50, .* expected model.input_scale"):
        build(c)
    c.model.prediction = "edm"
    build(c)


def test_a_dry_run_says_what_it_will_cost(tmp_path, capsys):
    np.savez(tmp_path / "x.npz", x0=spiral(50), labels=np.arange(50) % 3)
    (tmp_path / "c.py").write_text(
        "from scorelab.training import default_config\n"
        "def get_config():\n"
        "    c = default_config()\n"
        f"    c.data.source, c.data.path = 'arrays', {str(tmp_path / 'x.npz')!r}\n"
        "    return c\n"
    )
    assert main(["train", f"--config={tmp_path / 'c.py'}", "--dry_run"]) == 0
    said = capsys.readouterr().out
    for part in ("50 samples of shape (2,), 3 classes", "beside a root mean square of", "in fp32", "s a step on this"):
        assert part in said
