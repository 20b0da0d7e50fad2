"""Quality against cost: which samplers are judged, what is kept of an interrupted sweep, which none beats."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from test_training import small

from scorelab import sigmas
from scorelab.cli.cost import front
from scorelab.cli.evaluating import JudgedRun
from scorelab.cli.main import main
from scorelab.models import ScoreModel
from scorelab.samplers import Calibrated
from scorelab.training import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs") / "held"
    train(small(2, data__validation=300), place, progress=False)
    return place


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_sweep_goes_on_where_it_was_interrupted(run, tmp_path, monkeypatch, capsys):
    """A calibrated sampler whose weights are 1 is Euler's; of Heun's method 4 evaluations are 3."""
    command = ["evaluate", f"--workdir={run}", "--n=44", "--few", "--samplers=euler,calibrated", "--nfe=3"]
    assert main(command) == 2
    said = (
        f"there is no calibrated sampler {run}/sampler_3.json; make it with: scorelab calibrate --workdir {run} --nfe 3"
    )
    assert said in capsys.readouterr().err
    low, high = ScoreModel.load(run / "checkpoints" / "step_00000002").sigma_range
    levels = sigmas.karras(3, sigma_min=low, sigma_max=high).tolist()
    Calibrated(tuple(levels), ((1.0,),) * 3).save(run / "sampler_3.json")
    assert main(command) == 0
    told = capsys.readouterr().out
    found = json.loads((run / "cost.json").read_text())
    euler, calibrated = found["records"]
    assert (euler["name"], euler["evaluations"], calibrated["name"]) == ("euler", 3, "calibrated")
    for name in ("kernel_energy", "sliced_wasserstein"):
        assert calibrated["distances"][name]["value"] == pytest.approx(euler["distances"][name]["value"], rel=1e-4)
    floor = found["floor"]["distances"]["kernel_energy"]
    assert abs(floor["value"]) < 5 * floor["stderr"]
    assert f"train beside held_out: {floor['value']:.4g}" in told
    with Image.open(run / "cost.png") as picture:
        assert 700 < picture.width < 900
    drawn, record = [], JudgedRun.record

    def interrupted(self, *options):
        drawn.append(1)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return record(self, *options)

    monkeypatch.setattr(JudgedRun, "record", interrupted)
    command[-2:] = ["--samplers=euler,heun", "--nfe=3,4"]
    assert main(command) == 130
    assert main(command) == 0
    # four, less Euler's of 3 that was there, and the interrupted one again
    assert len(drawn) == 4 - 1 + 1
    found = json.loads((run / "cost.json").read_text())
    evaluations = {(r["name"], r["nfe"]): r["evaluations"] for r in found["records"]}
    assert evaluations[("heun", 4)] == 3
    assert len(evaluations) == len(found["records"]) == 5
    before = len(drawn)
    assert main(command) == 0
    assert len(drawn) == before
    assert main([*command, "--n=45"]) == 2
    assert "cost.json holds records of other settings: of is '44 samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--samplers=heum", "--nfe=5"], "--samplers has 'heum'; did you mean 'heun'?"),
        (["--samplers=heun,annealed_langevin", "--nfe=5"], "--samplers has 'annealed_langevin': --nfe=5, but"),
        (["--samplers=ode", "--nfe=5"], "--samplers has 'ode': --nfe=5, but"),
        (["--samplers=heun"], "--samplers asks for several samplers; expected no --sampler, and --nfe"),
        (["--samplers=heun", "--nfe=5,x"], "--nfe is '5,x'; expected a whole number, in digits"),
        (["--nfe=5,10"], "expected one number, or --samplers"),
        (["--samplers=heun", "--nfe=5", "--out={}/held/config.json"], "holds no records of --samplers"),
    ],
)
def test_a_sweep_that_can_not_be_is_refused_before_anything_is_drawn(run, options, said, monkeypatch, capsys):
    monkeypatch.setattr(JudgedRun, "record", None)
    options = [o.format(run.parent) for o in options]
    assert main(["evaluate", f"--workdir={run}", "--few", "--n=44", *options]) == 2
    assert said in capsys.readouterr().err


def test_the_front_is_what_none_beats_at_as_few():
    def record(evaluations, value):
        return {"evaluations": evaluations, "distances": {"d": {"value": value}}}

    rng = np.random.default_rng(0)
    records = [record(int(n), float(v)) for n, v in zip(rng.integers(1, 9, 40), rng.normal(size=40), strict=True)]
    found = front(records, "d")
    for r in records:
        n, v = r["evaluations"], r["distances"]["d"]["value"]
        beaten = [o for o in records if o["evaluations"] <= n and o["distances"]["d"]["value"] < v]
        assert (r in found) == (not beaten)
