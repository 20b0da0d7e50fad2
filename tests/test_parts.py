"""Parts chosen by name, of the library's and of one's own, with settings that stand beside their code."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from test_training import small

from scorelab import ScoreModel, losses, processes, samplers, sigmas
from scorelab.cli.dry_run import activation_bytes
from scorelab.cli.main import main
from scorelab.cli.runs import load_run
from scorelab.cli.sampling import sample_run
from scorelab.codecs import Codec
from scorelab.data import Coded, digits
from scorelab.parts import Kind, fits
from scorelab.training import Trainer, build, build_sampling, checkpoint, default_config, resolve, train
from scorelab.training.optim import OPTIMISERS, SCHEDULES
from scorelab.training.sampling import check_sampling
from scorelab.training.settings import PARTS, part
from scorelab.training.upgrading import upgraded
from scorelab.training.watch import Watch

ROOT = Path(__file__).parent.parent

OWN = '''
import math
import torch
from torch import nn
from scorelab.losses import Denoising
from scorelab.processes import VE, Process as Process_
from scorelab.samplers import Sampler, Wrapper
from scorelab.samplers.base import evaluate
from scorelab.sigmas import LogNormal


class Net(nn.Module):
    """Fifteen lines: x (B, *data_shape) and a label (B,) to something like x."""

    def __init__(self, data_shape: tuple[int, ...], width: int = 16):
        super().__init__()
        self.shape, count = data_shape, torch.Size(data_shape).numel()
        self.layers = nn.Sequential(nn.Linear(count + 1, width), nn.SiLU(), nn.Linear(width, count))

    def forward(self, x, label):
        h = torch.cat([x.flatten(1), label.unsqueeze(1).to(x.dtype)], 1)
        return self.layers(h).reshape(x.shape)


class Process(VE):
    """A process of one's own."""


class Learned(nn.Module, Process_):
    """A process with a largest level that is learnt."""

    t_min, t_max = 0.0, 1.0

    def __init__(self, sigma_min: float = 0.05, sigma_max: float = 8.0):
        super().__init__()
        self.low, self.high = math.log(sigma_min), nn.Parameter(torch.tensor(math.log(sigma_max)))

    def alpha(self, t):
        return torch.ones_like(t)

    def std(self, t):
        return torch.exp(self.low + t * (self.high - self.low))

    sigma = std

    def time(self, sigma):
        return (sigma.log() - self.low) / (self.high - self.low)

    def drift(self, t):
        return torch.zeros_like(t)

    def diffusion(self, t):
        return self.std(t) * (2 * (self.high - self.low)).sqrt()


class Levels(LogNormal):
    """Levels of one's own."""


class Objective(Denoising):
    """Twice the loss."""

    def losses(self, score, batch, u, noise):
        return 2 * super().losses(score, batch, u, noise)


class Steps(Sampler):
    """Euler's steps, shortened."""

    def __init__(self, share: float = 1.0):
        self.share = share

    def step(self, at):
        score, x, sigma, sigma_next, state, _ = at
        return x + self.share * (sigma - sigma_next) * sigma * evaluate(score, x, sigma), state


class Around(Wrapper):
    """A wrapper with an inner part."""

    def __init__(self, inner: Sampler):
        self.within = inner

    @property
    def inner(self):
        return self.within


class Descent(torch.optim.SGD):
    def __init__(self, params, lr: float = 0.1):
        super().__init__(params, lr)


def grid(sigma_min: float, sigma_max: float, n: int = 5):
    return torch.linspace(sigma_max, sigma_min, n, dtype=torch.float64)


def weight(power: float = 0.0):
    return lambda s: s**power


def falling(steps: int):
    return lambda step: 1 - step / steps
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module with a part of every kind."""
    (tmp_path / "own_parts.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_parts"
    sys.modules.pop("own_parts", None)


def test_every_part_is_in_a_table():
    """Samplers, processes, objectives and levels that can be chosen, and the few that a config can't make."""
    known = {v for v in vars(samplers).values() if isinstance(v, type) and issubclass(v, samplers.Sampler)}
    apart = {samplers.Sampler, samplers.Wrapper, samplers.MetropolisLangevin, samplers.Calibrated}
    assert set(samplers.SAMPLERS.values()) == known - apart
    correctors = {v for v in vars(samplers).values() if isinstance(v, type) and issubclass(v, samplers.Corrector)}
    assert set(samplers.CORRECTORS.values()) == correctors - {samplers.Corrector}
    made = {v for v in vars(processes).values() if isinstance(v, type) and issubclass(v, processes.Process)}
    ends = {"sigma_min": 0.1, "sigma_max": 9.0}
    assert {type(make(**ends) if name == "ve" else make()) for name, make in processes.PROCESSES.items()} == made - {
        processes.Process
    }
    objectives = {v for v in vars(losses).values() if isinstance(v, type) and issubclass(v, losses.Objective)}
    assert set(losses.OBJECTIVES.values()) == objectives - {losses.Objective}
    for kind in PARTS.values():
        for name in kind.table:
            assert kind.settings(kind.maker(name, "config.x")) is not None


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_every_sampler_is_reached_from_a_config(name):
    config = small(sampling__sampler__name=name, sampling__grid__n=4)
    if name == "predictor_corrector":
        config.sampling.sampler.predictor = ConfigDict({"name": "reverse_diffusion"})
        config.sampling.sampler.corrector = ConfigDict({"name": "langevin", "snr": 0.1})
    model = build(config).model
    levels, sampler = build_sampling(config, model)
    assert type(sampler) is samplers.SAMPLERS[name]
    assert float(levels[0]) == pytest.approx(model.sigma_range[1])
    if name == "predictor_corrector":
        assert sampler == samplers.PredictorCorrector(
            samplers.ReverseDiffusion(model.process), samplers.LangevinCorrector(0.1)
        )
    with pytest.warns(RuntimeWarning) if name in ("reverse_diffusion", "predictor_corrector") else _nothing():
        check_sampling(config, model)


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


@pytest.mark.parametrize("name", sigmas.GRIDS)
def test_every_grid_is_reached_from_a_config(name):
    c = small(sampling__grid__name=name, process__name="ddpm" if name == "steps" else "vp")
    c.sampling.grid["steps" if name == "steps" else "n"] = 7
    levels, _ = build_sampling(c, build(c).model)
    assert len(levels) == (7 if name == "geometric" else 8)


@pytest.mark.parametrize("name", sigmas.LEVELS)
def test_every_distribution_of_levels_trains(name, tmp_path):
    train(small(1, training__sigmas__name=name, training__batch_size=8), tmp_path, progress=False)
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    # in the parts of equal probability, from the least noise on but for a sequence, which descends
    seen = [s for s in row["sigma_bins"] if s is not None]
    assert sorted(seen, reverse=name == "sequence") == seen
    assert len(set(seen)) > 2


@pytest.mark.parametrize("weighting", losses.WEIGHTINGS)
@pytest.mark.parametrize("process", ["ve", "subvp"])
def test_every_weighting_and_process_is_reached(weighting, process):
    config = small(process__name=process, training__weighting__name=weighting, training__sigmas__name="log_uniform")
    parts = build(config)
    known = {"sigma2": 1.0, "snr": 1.0, "x0": 0.25, "min_snr": 1.0, "edm": 1 + 0.25 / parts.sigma_data**2}
    # the squared error of what edm predicts
    known["output"] = known["edm"]
    low, high = parts.model.sigma_range
    expected = known.get(weighting, torch.tensor(high / low).log())
    assert float(parts.objective.weight(torch.tensor([0.5]))) == pytest.approx(float(expected), rel=1e-5)


def test_settings_have_the_defaults_of_their_parts():
    config = resolve(small())
    assert config.process.to_dict() == {"name": "ve", "sigma_min": None, "sigma_max": 10.0}
    assert config.optim.lr == 1e-3
    assert config.sampling.grid.to_dict() == {
        "name": "karras",
        "n": 18,
        "sigma_min": None,
        "sigma_max": None,
        "rho": 7.0,
    }
    assert config.training.objective.to_dict() == {"name": "denoising", "reference": 0}
    # a network that is told indices embeds them by their place
    index = build(small(model__label="index", training__sigmas__name="sequence")).model.net
    assert [build(small()).model.net.config["embedding"], index.config["embedding"]] == ["fourier", "positional"]
    assert resolve(config) == config
    # what is asked of the default is not changed by it
    assert "lr" not in default_config().optim


def test_parts_of_ones_own_are_named_by_their_import_path(own, tmp_path):
    c = small(4, training__batch_size=16, training__sample_every=4, sampling__samples=4)
    c.model.net = ConfigDict({"name": f"{own}:Net", "width": 12}).unlock()
    c.process = ConfigDict({"name": f"{own}:Process", "sigma_max": 7.0})
    c.training.sigmas = ConfigDict({"name": f"{own}:Levels", "mean": -1.0})
    c.training.objective = ConfigDict({"name": f"{own}:Objective"})
    c.training.weighting = ConfigDict({"name": f"{own}:weight", "power": 0.5})
    c.optim.name = f"{own}:Descent"
    c.optim.schedule = ConfigDict({"name": f"{own}:falling"})
    c.sampling.grid = ConfigDict({"name": f"{own}:grid", "n": 5})
    c.sampling.sampler = ConfigDict({"name": f"{own}:Around", "inner": {"name": f"{own}:Steps", "share": 0.9}})
    parts = build(c)
    module = sys.modules[own]
    assert type(parts.model.net) is module.Net
    assert parts.model.net.layers[0].out_features == 12
    assert parts.model.process == module.Process(0.01, 7.0)
    assert parts.objective.sigmas == module.Levels(-1.0)
    assert float(parts.objective.weight(torch.tensor(4.0))) == 2
    levels, sampler = build_sampling(c, parts.model)
    assert levels.tolist() == pytest.approx(torch.linspace(7.0, 0.01, 5, dtype=torch.float64).tolist())
    assert sampler.within.share == 0.9
    train(c, tmp_path / "run", progress=False)
    # the run says it all: its model is made again from it, and goes on
    model = ScoreModel.load(tmp_path / "run" / "checkpoints" / "step_00000004")
    assert type(model.net) is module.Net
    assert sample_run(tmp_path / "run", n=3).x.shape == (3, 1, 8, 8)
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["model"]["net"] == {"name": f"{own}:Net", "width": 12}
    c.training.steps = 5
    with pytest.raises(ValueError, match="training.steps: 4 there, 5 now; the own_parts:falling schedule ends at"):
        train(c, tmp_path / "run", progress=False)


def test_a_process_is_learned_saved_averaged_and_goes_on(own, tmp_path):
    """Its weights are the model's: in checkpoints, averages, saved models and resumed runs, bit for bit."""
    c = small(4, training__checkpoint_every=2, training__batch_size=32, optim__lr=0.05, optim__warmup=0)
    c.process = ConfigDict({"name": f"{own}:Learned", "sigma_max": 6.0})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    averaged = train(c, whole, progress=False)
    c.training.steps = 2
    train(c, parts, progress=False)
    c.training.steps = 4
    train(c, parts, progress=False)
    place = whole / "checkpoints" / "step_00000004"
    for name in ("model.safetensors", "ema.safetensors"):
        assert (place / name).read_bytes() == (parts / "checkpoints" / place.name / name).read_bytes()
    raw, ema = (ScoreModel.load(place, weights=f"{w}.safetensors") for w in ("model", "ema"))
    high = torch.tensor(6.0).log()
    assert abs(float(raw.process.high.detach() - high)) > 0.01
    assert torch.equal(ema.process.high, averaged.process.high)
    assert abs(float(ema.process.high.detach() - raw.process.high.detach())) > 1e-4
    assert raw.sigma_range[1] == pytest.approx(float(raw.process.high.detach().exp()))
    raw.save(tmp_path / "saved")
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor(1.0)
    assert torch.equal(ScoreModel.load(tmp_path / "saved")(x, sigma), raw(x, sigma))
    assert sample_run(whole, n=2).x.isfinite().all()


def blocks() -> list[str]:
    """The Python blocks of docs/extending.md."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)


@pytest.mark.filterwarnings("ignore:the file can't say how")
def test_the_documented_model_in_code_alone_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(blocks()[3], found)
    assert torch.equal(found["again"](found["x"], torch.tensor(1.0)), found["model"](found["x"], torch.tensor(1.0)))


def test_the_documented_network_trains_is_killed_and_goes_on(tmp_path):
    """Through the command line, from a config file beside it: bit for bit the run that was not killed."""
    net, config, *_ = blocks()
    assert len([line for line in net.splitlines() if line.strip()]) <= 15
    (tmp_path / "own.py").write_text(net)
    (tmp_path / "config.py").write_text(config)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    options = {"cwd": tmp_path, "env": environment}
    base = [sys.executable, "-m", "scorelab.cli"]
    train = [
        *base,
        "train",
        "--config=config.py",
        "--config.training.steps=80",
        "--config.training.checkpoint_every=10",
    ]
    train += ["--config.training.sample_every=0", "--config.training.precision=fp32", "--config.training.batch_size=32"]

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, check=False, **options)

    assert run([*train, "--workdir=whole"]).returncode == 0
    with subprocess.Popen([*train, "--workdir=killed"], stderr=subprocess.DEVNULL, **options) as child:
        while checkpoint.last_step(tmp_path / "killed") < 20 and child.poll() is None:
            time.sleep(0.01)
        child.kill()
    assert 20 <= checkpoint.last_step(tmp_path / "killed") < 80
    done = run([*train, "--workdir=killed"])
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "ema.safetensors"):
        files = [tmp_path / w / "checkpoints" / "step_00000080" / name for w in ("whole", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes()
    script = str(Path(sys.executable).parent / "scorelab")
    for command in (["sample", "--workdir=killed", "--n=4"], ["report", "--workdir=killed"]):
        done = run([script, *command])
        assert done.returncode == 0, done.stderr


def test_the_documented_sampler_and_objective_work(tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text(blocks()[2])
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("own_parts", None)
    c = small(2, training__objective__name="own_parts:Robust", training__batch_size=16, sampling__grid__n=4)
    c.sampling.sampler = ConfigDict({"name": "own_parts:Halved", "inner": {"name": "euler"}})
    plain = small(2, training__batch_size=16)
    a, b = Trainer(build(c), c), Trainer(build(plain), plain)
    draw = a.batches.at(0)
    torch.testing.assert_close(
        a.experiment.objective.losses(a.model.eval(), *draw) ** 2, b.experiment.objective.losses(b.model.eval(), *draw)
    )
    levels, sampler = build_sampling(c, a.model)
    # two half steps of Euler are Euler on a grid of twice the levels
    x, score = torch.randn(3, 1, 8, 8) * levels[0].float(), a.model
    finer = torch.stack([levels[:-1], 0.5 * (levels[:-1] + levels[1:])], 1).flatten()
    # all steps but that to 0
    twice = samplers.sample(score, x, [*finer[:-1].tolist(), 0.0], samplers.Euler())
    torch.testing.assert_close(samplers.sample(score, x, levels, sampler), twice)
    sys.modules.pop("own_parts", None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model__net__name": "unnet"},
            "config.model.net.name is 'unnet'; did you mean 'unet'. One of your own is named package.module:Class",
        ),
        ({"model__net__name": "nowhere:Net"}, "No module named 'nowhere'; expected an importable"),
        ({"model__net__name": "own_parts:Nett"}, "has no attribute 'Nett'; expected an importable"),
        ({"model__net__name": "own_parts:Steps"}, "expected a subclass of torch.nn.modules.module.Module"),
        ({"model__net__name": "os:system"}, "expected a subclass of torch.nn.modules.module.Module"),
        ({"sampling__sampler__name": "own_parts:Net"}, "expected a subclass of scorelab.samplers.base.Sampler"),
        (
            {"sampling__sampler__name": "predictor_corrector"},
            "config.sampling.sampler.predictor.name is not set; expected one of adams_bashforth,",
        ),
        ({"process__sigma_min": "low"}, "config.process.sigma_min is 'low'; expected a finite number"),
        ({"model__net__head": 1.5}, "config.model.net.head is 1.5; expected a whole number"),
        ({"model__net__attention": (0.5,)}, r"config.model.net.attention is \(0.5,\); expected a tuple"),
        ({"training__sigmas__name": "tapered", "training__sigmas__share": True}, "share is True; expected a finite"),
    ],
)
def test_parts_that_are_none_are_refused(own, changes, said):
    changes = {"model__net__name": "unet", **changes}
    with pytest.raises(ValueError, match=said):
        resolve(small(**changes))


def test_optimisers_of_torch_are_named_by_their_import_path():
    c = small(1, training__batch_size=8, optim__name="torch.optim:RMSprop", optim__lr=0.5, optim__alpha=0.9)
    made = Trainer(build(c), c).optimiser
    assert type(made) is torch.optim.RMSprop
    assert (made.defaults["lr"], made.defaults["alpha"]) == (0.5, 0.9)
    with pytest.raises(ValueError, match="config.optim.lr is 'high'; expected a finite number$"):
        resolve(small(optim__name="torch.optim:SGD", optim__lr="high"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("c.model.net = 'mlp'", "line 4: .*; a part is chosen by its name, as in c.model.net.name"),
        ("c.model.width = 32", "line 4: .*width.*; a part has that key: c.model.net.width"),
        ("c.training.stable = 3", "line 4: .*stable"),
    ],
)
def test_config_files_of_before_are_told_where_a_setting_is_now(line, said, tmp_path, capsys):
    text = "from scorelab.training import default_config\ndef get_config():\n    c = default_config()\n"
    (tmp_path / "c.py").write_text(f"{text}    {line}\n    return c\n")
    assert main(["train", f"--config={tmp_path / 'c.py'}", "--dry_run"]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_what_a_part_needs_and_a_config_cannot_give_is_named():
    def needs(network: torch.nn.Module, width: int = 3) -> int:
        return width

    kind = Kind("thing", {"needs": needs})
    assert list(kind.settings(needs)) == ["width"]
    with pytest.raises(ValueError, match="config.x: 'needs' needs network, which a config can't give"):
        kind.make({"name": "needs", "width": 4}, "config.x", {})
    assert kind.make({"name": "needs", "width": 4}, "config.x", {"network": torch.nn.Identity()}) == 4


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, True),
        (True, float, False),
        (True, int, False),
        (1.0, int, False),
        (float("nan"), float, False),
        (None, float | None, True),
        ("10", int | str | None, True),
        ([1, 2], tuple[int, ...], True),
        ((1, 2.5), tuple[int, ...], False),
        ((1, "a"), tuple[int, str], True),
        ((1,), tuple[int, str], False),
    ],
)
def test_plain_types(value, hint, expected):
    assert fits(value, hint) is expected


def test_the_command_line_takes_a_part_with_its_settings(tmp_path, capsys):
    command = ["train", f"--config={ROOT}/configs/digits/ncsn.py", "--dry_run"]
    more = ["--config.process.sigma_max=30", "--config.sampling.grid.sigma_max=None", "--config.sampling.grid.rho=5"]
    more += ["--config.sampling.sampler.name=predictor_corrector", "--config.sampling.sampler.predictor.name=euler"]
    more += ["--config.sampling.sampler.corrector.name=langevin", "--config.sampling.sampler.corrector.snr=0.2"]
    more += ["--config.sampling.grid.name=karras", "--config.sampling.sampler.corrector_first=True"]
    assert main([*command, *more]) == 0
    found = capsys.readouterr().out
    for line in ("sigma_max: 30.0", "rho: 5.0", "snr: 0.2", "corrector_first: true", "name: predictor_corrector"):
        assert line in found
    # naming a part takes its own defaults, and naming the same one changes nothing
    assert main([*command, "--config.sampling.sampler.name=annealed_langevin"]) == 0
    assert "step_size: 0.0007" in capsys.readouterr().out
    assert main([*command, "--config.optim.name=adamw"]) == 0
    found = capsys.readouterr().out
    assert "lr: 0.001" in found
    assert "name: cosine" in found
    for argument, said in [
        (
            "--config.sampling.sampler.eta=1",
            "unknown config key 'sampling.sampler.eta'; known: denoise, name, step_size, steps",
        ),
        ("--config.process.name=vpp", "config.process.name is 'vpp'; did you mean 'vp'"),
        ("--config.sampling.grid.sigma_max=high", "config.sampling.grid.sigma_max is 'high'; expected a finite number"),
        ("--config.model.net.name=mlp", "images need UNet"),
    ]:
        assert main([*command, argument]) == 2, argument
        assert said in capsys.readouterr().err, argument


OLD = {
    "seed": 3,
    "data": {"source": "digits"},
    "model": {
        "net": "unet",
        "prediction": "edm",
        "label": "log_sigma",
        "input_scale": "unit_variance",
        "width": 8,
        "multipliers": [1, 2],
        "blocks": 1,
        "attention": [],
        "head": 64,
        "dropout": 0.1,
        "depth": 3,
        "features": 32,
    },
    "process": {
        **{"name": "ve", "sigma_min": 0.05, "sigma_max": 12.0, "beta_min": 0.1, "beta_max": 20.0, "steps": 1000},
    },
    "optim": {"name": "adam", "lr": 2e-3, "schedule": "inverse_sqrt", "decay_from": 50, "ema": [0.99], "warmup": 5},
    "training": {"steps": 2, "batch_size": 16, "sigmas": "sequence", "weighting": "edm", "stable_target": 32},
    "sampling": {
        "sampler": "annealed_langevin",
        "levels": 20,
        "grid": "geometric",
        "sigma_min": 0.0,
        "sigma_max": 10.0,
        "steps": 10,
        "step_size": 0.0,
        "eta": 0.0,
        "variance": "posterior",
        "clip": False,
        "samples": 8,
    },
}


def test_configs_of_before_are_read():
    found = upgraded(OLD)
    config = default_config().unlock()
    with config.ignore_type():
        config.update(found)
    config = resolve(config)
    # what came later has its default
    assert config.model.net.to_dict() == {
        **resolve(small(model__net__name="unet")).model.net.to_dict(),
        **{"name": "unet", "width": 8, "multipliers": [1, 2], "blocks": 1, "attention": [], "head": 64, "dropout": 0.1},
        "embedding": None,
    }
    assert config.process.to_dict() == {"name": "ve", "sigma_min": 0.05, "sigma_max": 12.0}
    assert config.optim.schedule.to_dict() == {"name": "inverse_sqrt", "decay_from": 50}
    assert config.training.sigmas.to_dict() == {"name": "sequence", "sigma_min": None, "sigma_max": None, "levels": 20}
    assert config.training.objective.reference == 32
    assert config.sampling.grid.to_dict() == {"name": "geometric", "n": 20, "sigma_min": None, "sigma_max": 10.0}
    sampler = config.sampling.sampler
    assert (sampler.name, sampler.steps, sampler.step_size) == ("annealed_langevin", 10, None)
    assert upgraded(found) == found
    ddpm = {**OLD, "process": {**OLD["process"], "name": "ddpm"}, "model": {**OLD["model"], "label": "index"}}
    ddpm |= {"sampling": {**OLD["sampling"], "grid": "steps", "sampler": "ancestral"}}
    ddpm |= {"training": {**OLD["training"], "sigmas": "process"}}
    found = upgraded(ddpm)
    assert found["process"] == {"name": "ddpm", "steps": 1000}
    assert found["sampling"]["grid"] == {"name": "steps", "steps": 20}
    assert found["sampling"]["sampler"] == {"name": "ancestral", "variance": "posterior"}
    points = {**OLD, "model": {**OLD["model"], "net": "mlp", "input_scale": "process"}}
    assert upgraded(points)["model"]["net"] == {"name": "mlp", "width": 8, "depth": 3, "features": 32}
    assert upgraded(points)["model"]["label"] == ""


def test_runs_and_models_of_before_go_on_and_are_sampled(tmp_path):
    """A run whose config and model.json are rewritten as an earlier version wrote them."""
    config = default_config().unlock()
    with config.ignore_type():
        config.update(upgraded(OLD))
    config.training.sample_every = config.training.validate_every = 0
    config.training.precision, config.training.channels_last = "fp32", "no"
    train(config, tmp_path, progress=False)
    recorded = json.loads((tmp_path / "config.json").read_text())
    old = {group: {**recorded[group], **OLD[group]} if isinstance(OLD[group], dict) else OLD[group] for group in OLD}
    old["data"] = recorded["data"]
    for group, key in (("training", "objective"), ("training", "label_dropout"), ("model", "conditional")):
        old[group].pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(old))
    place = tmp_path / "checkpoints" / "step_00000002"
    model = json.loads((place / "model.json").read_text())
    model["net"]["name"] = "UNet"
    (place / "model.json").write_text(json.dumps(model))
    manifest = json.loads((place / "manifest.json").read_text())
    import hashlib

    text = (place / "model.json").read_bytes()
    manifest["files"]["model.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (place / "manifest.json").write_text(json.dumps(manifest))
    assert load_run(tmp_path)[0].process.sigma_max == 12.0
    assert sample_run(tmp_path, n=2).x.shape == (2, 1, 8, 8)
    with config.unlocked():
        config.training.steps = 3
    train(config, tmp_path, progress=False)
    assert checkpoint.last_step(tmp_path) == 3
    config.process.sigma_max = 13.0
    with pytest.raises(ValueError, match="process.sigma_max: 12.0 there, 13.0 now"):
        train(config, tmp_path, progress=False)


def test_optimisers_and_schedules_are_made_from_their_settings():
    assert set(OPTIMISERS) == {"adam", "adamw"}
    assert set(SCHEDULES) == {"constant", "cosine", "inverse_sqrt"}
    config = resolve(small(optim__beta1=0.5, optim__lr=0.25))
    weight = torch.nn.Parameter(torch.zeros(2))
    made = part(config, "optim", parameters=[weight])
    assert made.defaults["betas"] == (0.5, 0.999)
    assert made.defaults["lr"] == 0.25


EVALUATION = '''
import torch
from scorelab.training.evaluations import Evaluation, Found


class Largest(Evaluation):
    """The largest weight, and a picture; it fails at its second turn."""

    key, what = "largest_weight", "largest weight"

    def __init__(self, every: int = 2, scale: float = 1.0):
        super().__init__(every)
        self.scale = scale

    def run(self, model, trainer):
        if trainer.step == 4:
            raise RuntimeError("no luck")
        largest = max(float(p.detach().abs().max()) for p in model.parameters())
        return Found({self.key: self.scale * largest}, torch.zeros(4, 1, 8, 8))
'''


def test_evaluations_of_ones_own_are_measured_and_never_end_a_run(tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text(EVALUATION)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("own_parts", None)
    c = small(7, training__batch_size=16, training__checkpoint_every=3)
    c.evaluation.mine = {"name": "own_parts:Largest", "scale": 2.0}
    with pytest.warns(RuntimeWarning, match="no largest weight at step 4: RuntimeError: no luck"):
        train(c, tmp_path / "run", progress=False)
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = {row["step"]: row["largest_weight"] for row in found if "largest_weight" in row}
    # at its period and at the end
    assert list(measured) == [2, 6, 7]
    model = ScoreModel.load(tmp_path / "run" / "checkpoints" / "step_00000006", weights="ema.safetensors")
    assert measured[6] == pytest.approx(2 * max(float(p.detach().abs().max()) for p in model.net.parameters()))
    assert (tmp_path / "run" / "samples" / "largest_weight_00000006.png").is_file()
    c.evaluation.mine.sclae = 1.0
    with pytest.raises(ValueError, match="config.evaluation.mine.sclae is no setting of .*; did you mean 'scale'"):
        resolve(c)
    c.evaluation = {"mine": {"name": "json:JSONDecoder"}}
    with pytest.raises(ValueError, match="expected a subclass of scorelab.training.measures.Evaluation"):
        Watch(Trainer(build(c), c), tmp_path / "other", False)
    sys.modules.pop("own_parts", None)


def test_a_codec_stands_between_the_data_and_the_model(tmp_path, capsys):
    """Training sees codes; samples, their files, moments and the run that goes on are in the data's own numbers."""
    rng = np.random.default_rng(0)
    data = np.array([300.0, -20.0]) + np.array([5.0, 0.01]) * rng.normal(size=(500, 2))
    np.save(tmp_path / "x.npy", data)
    c = default_config()
    c.data.source, c.data.path, c.model.net.name = "arrays", str(tmp_path / "x.npy"), "mlp"
    c.model.codec.name, c.model.prediction = "standardise", "edm"
    c.process.sigma_max, c.training.sigmas.name = 20.0, "log_uniform"
    c.training.steps, c.training.batch_size, c.optim.lr, c.training.checkpoint_every = 300, 256, 1e-2, 150
    c.training.sample_every, c.training.precision, c.sampling.samples = 150, "fp32", 400
    parts = build(c)
    codes = parts.data.batch(0, 0, 500).x0
    torch.testing.assert_close(codes.mean(0), torch.zeros(2), rtol=0, atol=1e-2)
    torch.testing.assert_close(codes.std(0), torch.ones(2), rtol=1e-2, atol=0)
    torch.testing.assert_close(
        parts.model.decode(codes).double().mean(0), torch.tensor(data.mean(0)), rtol=1e-5, atol=0
    )
    assert parts.sigma_data == pytest.approx(1, rel=1e-2)
    run = tmp_path / "run"
    train(c, run, progress=False)
    drawn = sample_run(run, n=400).x
    assert torch.equal(drawn, sample_run(run, n=400).x)
    np.testing.assert_allclose(drawn.mean(0), data.mean(0), rtol=0, atol=1.0)
    np.testing.assert_allclose(drawn.std(0), data.std(0), rtol=0.2)
    row = next(r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "sample_mean" in r)
    np.testing.assert_allclose(row["data_mean"], data.mean(0), rtol=1e-5)
    np.testing.assert_allclose(
        np.load(run / "samples" / "step_00000300.npz")["samples"].mean(0), data.mean(0), atol=1.0
    )
    model = ScoreModel.load(run / "checkpoints" / "step_00000300", weights="ema.safetensors")
    torch.testing.assert_close(model.decode(codes), parts.model.decode(codes))
    assert not any(p.requires_grad for p in model.codec.parameters())
    c.training.steps = 301
    train(c, run, progress=False)
    assert checkpoint.last_step(run) == 301
    capsys.readouterr()
    assert main(["likelihood", f"--workdir={run}", "--n=60", "--divergence=exact"]) == 0
    # of the data in its own units: that of a normal distribution with these deviations
    found = json.loads(capsys.readouterr().out)["log_prob"]["mean"]
    assert found == pytest.approx(-math.log(2 * math.pi * math.e * 5.0 * 0.01), abs=0.5)
    assert main(["likelihood", f"--workdir={run}", "--n=4", "--levels=3"]) == 2
    # a dimension without any deviation is 0
    np.save(tmp_path / "x.npy", np.stack([data[:, 0], np.ones(500)], 1))
    codes = build(c).data.batch(0, 0, 10).x0
    assert codes[:, 1].abs().max() == 0
    assert codes[:, 0].abs().max() > 0


def test_stochastic_codes_do_not_depend_on_the_number_of_processes():
    class Noisy(Codec):
        def moments(self, x0):
            return x0, torch.ones_like(x0)

    source = Coded(digits(), Noisy())
    whole = source.batch(3, 5, 40)
    assert torch.equal(whole.x0[10:25], source.batch(3, 5, 40, range(10, 25)).x0)
    assert torch.equal(whole.condition[10:25], source.batch(3, 5, 40, range(10, 25)).condition)
    assert not torch.equal(whole.x0, digits().batch(3, 5, 40).x0)
    assert not torch.equal(whole.x0, source.batch(3, 6, 40).x0)


ODD = """
from __future__ import annotations
from typing import TYPE_CHECKING
import torch
from torch import nn
from scorelab.training.evaluations import Evaluation, Found
if TYPE_CHECKING:
    from torch import Tensor


class Base(nn.Module):
    def __init__(self, data_shape: tuple[int, ...], width=16):
        super().__init__()
        self.config = {"hidden": width}  # its own business
        self.layers = nn.Sequential(nn.Linear(64, width), nn.Linear(width, 64))

    def forward(self, x, label):
        return self.layers(x.flatten(1)).reshape(x.shape)


class Conditional(Base):
    num_classes, null_condition = 10, 9

    def forward(self, x, label, condition):
        return super().forward(x, label) + condition.reshape(-1, 1, 1, 1)


class Several(Base):
    def forward(self, x, label):
        return super().forward(x, label), label


class Wrong(Base):
    def forward(self, x, label):
        return self.layers(x)


class Hidden(Base):
    def __init__(self, data_shape, scale: Tensor | None = None):
        super().__init__(data_shape)


def column(power: float = 0.0):
    return lambda s: s.unsqueeze(1) ** power


class Silent(Evaluation):
    what = "nothing"

    def __init__(self):
        pass

    def run(self, model, trainer):
        return Found({})
"""


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """Parts that other people may have."""
    (tmp_path / "odd_parts.py").write_text(ODD)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "odd_parts"
    sys.modules.pop("odd_parts", None)


@pytest.mark.filterwarnings("ignore:the file can't say how")
def test_a_config_of_a_network_of_ones_own_is_its_own(odd, tmp_path):
    """It is made again by what it was made with; a parameter without a type is set by its default's."""
    c = small(2, training__batch_size=8, model__net__name=f"{odd}:Base", model__net__width=12)
    train(c, tmp_path / "run", progress=False)
    model = ScoreModel.load(tmp_path / "run")
    assert model.net.config == {"hidden": 12}
    model.save(tmp_path / "saved")
    again, x = ScoreModel.load(tmp_path / "saved"), torch.ones(2, 1, 8, 8)
    assert torch.equal(again(x, torch.tensor(1.0)), model(x, torch.tensor(1.0)))
    # one that was made by hand: its config is no arguments, so it is asked for
    made = sys.modules[odd].Base((1, 8, 8))
    ScoreModel(made, processes.VE(0.01, 10.0), data_shape=(1, 8, 8)).save(tmp_path / "by_hand")
    with pytest.raises(ValueError, match="a network of your own, without a config"):
        ScoreModel.load(tmp_path / "by_hand")
    assert ScoreModel.load(tmp_path / "by_hand", net=made).net is made


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("c.model.net.name = 'odd_parts:Several'", "the network returned tuple; expected a tensor"),
        ("c.model.net.name = 'odd_parts:Wrong'", "RuntimeError: mat1 and mat2 .* [(].*odd_parts.py, line 35[)]"),
        ("c.model.net.name = 'odd_parts:Hidden'", "types of Hidden.__init__|types of Hidden's .* under TYPE_CHECKING"),
        (
            "c.training.weighting.name = 'odd_parts:column'",
            r"training.objective gives \(2, 2\) for 2 samples; expected",
        ),
        ("c.evaluation.mine = 'odd_parts:Silent'", "config.evaluation.mine is 'odd_parts:Silent'; expected {'name'"),
        ("c.evaluation.mine = {'name': 'odd_parts:Silent'}", "config.evaluation.mine: Silent has no key; expected"),
    ],
)
def test_what_is_wrong_with_a_part_of_ones_own_is_said_in_a_line(odd, lines, said, tmp_path, capsys):
    head = "from scorelab.training import default_config\nget_config = default_config\nc = default_config()\n"
    (tmp_path / "c.py").write_text(head + lines + "\nget_config = lambda: c\n")
    assert main(["train", f"--config={tmp_path / 'c.py'}", "--dry_run"]) == 2
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1
    assert re.search(said, captured), captured


def test_a_dry_run_takes_a_network_that_needs_its_condition(odd, tmp_path, capsys):
    head = "from scorelab.training import default_config\nc = default_config()\nc.model.conditional = True\n"
    (tmp_path / "c.py").write_text(head + "c.model.net.name = 'odd_parts:Conditional'\nget_config = lambda: c\n")
    assert main(["train", f"--config={tmp_path / 'c.py'}", "--dry_run"]) == 0
    assert "activations about" in capsys.readouterr().out


@pytest.mark.parametrize("accumulate", [1, 4])
def test_activations_are_those_of_a_whole_batch(accumulate):
    """What is said from two rows is what autograd keeps for all of them."""
    c = small(1, training__batch_size=32)
    trainer = Trainer(build(c), c)
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        losses = trainer.experiment.objective.losses(
            trainer.model, *trainer.batches.at(0).part(slice(32 // accumulate))
        )
    assert losses.shape == (32 // accumulate,)
    whole = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)
    assert activation_bytes(trainer, 32 // accumulate) == pytest.approx(whole, rel=0.02)
