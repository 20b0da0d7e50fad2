"""Configs, runs and files: what can't work is refused in one line before the work, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_training import small
from torch import nn

from scorelab import VP, ScoreModel, from_eps, log_likelihood, sample
from scorelab.cli import sampling as cli_sampling
from scorelab.cli.main import main
from scorelab.models import Constant, LogSigma
from scorelab.nn import MLP, UNet
from scorelab.precision import check_compiler
from scorelab.predictions import edm
from scorelab.processes import VE, DiscreteVP, linear_betas
from scorelab.samplers import ProbabilityFlow
from scorelab.training import NonFiniteError, Trainer, build, checkpoint, default_config, train
from scorelab.training.evaluations import FixedNoiseLoss, Samples
from scorelab.writing import whole

ROOT = Path(__file__).parent.parent
TINY = (
    "from scorelab.training import default_config\n"
    "def get_config():\n"
    "    c = default_config()\n"
    "    c.model.net.width, c.model.net.blocks, c.model.net.multipliers = 8, 1, (1,)\n"
    "    c.training.steps, c.training.batch_size, c.training.sample_every, c.training.precision = 2, 8, 0, 'fp32'\n"
    "    c.sampling.grid.n = 3\n"
    "    return c\n"
)


# settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__net__name": "mlp", "data__source": "moons", "model__label": "time"}, "model.label is 'time'.*'mlp'"),
        (
            {"model__net__name": "mlp", "data__source": "moons", "model__input_scale": "unit_variance"},
            "model.input_scale",
        ),
        (
            {"model__net__name": "unet", "model__net__depth": 5},
            "model.net.depth is no setting of config.model.net.name='unet' .only of 'mlp', .*_autoencoder'.; did",
        ),
        (
            {"sampling__sampler__name": "heun", "sampling__sampler__eta": 0.5},
            "sampling.sampler.eta is no setting of config.sampling.sampler.name='heun' .only of ",
        ),
        (
            {"sampling__grid__name": "process", "sampling__grid__sigma_min": 0.1},
            "sampling.grid.sigma_min is no setting of .*'process' .only of 'karras', 'geometric', 'log_linear'.",
        ),
        (
            {"process__beta_max": 10.0},
            "process.beta_max is no setting of .*='ve' .only of 'vp', 'subvp'.; did you mean",
        ),
        (
            {"process__name": "vp", "process__sigma_max": 3.0},
            "process.sigma_max is no setting of config.process.name='vp' .only of 've'.",
        ),
        (
            {"optim__schedule__decay_from": 7},
            "decay_from is no setting of .*'constant' .only of 'inverse_sqrt'.; it has",
        ),
        (
            {"optim__learning_rate": 1.0},
            "config.optim.learning_rate is no setting of config.optim.name='adam'; known: beta1, beta2, clip,",
        ),
        ({"training__objective__refernce": 7}, "objective.refernce is no setting .*; did you mean 'reference'?"),
        ({"data__flip": True}, "data.flip is True, which data.source='digits' does not read"),
        ({"data__layout": "channels_last"}, "data.layout"),
        ({"sampling__sampler__step_size": 1e-5}, "sampling.sampler.step_size is no setting of"),
    ],
)
def test_settings_that_nobody_reads_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(small(**changes))


def test_every_setting_is_read_by_something():
    """The table names settings and choices that there are, and the defaults pass."""
    from scorelab.training.settings import _USED

    default = default_config()
    for name, (choice, _) in _USED.items():
        for key in (name, choice):
            part, _, rest = key.partition(".")
            assert rest in default[part]
    build(default)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__weighting__name": "likelihood", "process__name": "ddpm"}, "a fixed sequence has no density"),
        (
            {"sampling__sampler__name": "ancestral", "sampling__sampler__variance": "learned"},
            "sampling.sampler.variance is 'learned', but the network learned none; expected 'posterior'",
        ),
        ({"sampling__sampler__name": "annealed_langevin", "sampling__sampler__step_size": 1.0}, "diverges"),
        ({"sampling__clip": True, "data__source": "arrays", "data__path": "x.npy"}, "sampling.clip is for data scaled"),
    ],
)
def test_what_a_dry_run_accepts_trains_and_what_fails_later_is_refused_at_once(
    tmp_path, monkeypatch, capsys, changes, message
):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.random.default_rng(0).normal(size=(20, 1, 8, 8)))
    (tmp_path / "c.py").write_text(TINY)
    options = [f"--config.{k.replace('__', '.')}={v}" for k, v in changes.items()]
    options += ["--config=c.py", "--config.training.sample_every=1"]
    for more in (["--dry_run"], ["--workdir=w"]):
        assert main(["train", *options, *more]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert re.search(message, error), error
    assert not (tmp_path / "w").exists()


def test_an_evaluation_that_fails_does_not_end_the_run(tmp_path, monkeypatch):
    def broken(*args, **options):
        raise KeyError("a fault of any kind")

    monkeypatch.setattr(Samples, "run", broken)
    monkeypatch.setattr(FixedNoiseLoss, "run", broken)
    with pytest.warns(RuntimeWarning) as caught:
        train(small(4, training__sample_every=2, training__validate_every=2), tmp_path, progress=False)
    said = sorted(str(w.message).partition(":")[0] for w in caught)
    assert said == sorted(f"no {what} at step {n}" for what in ("samples", "validation loss") for n in (2, 4))
    assert checkpoint.last_step(tmp_path) == 4


# the command line and config files


def tiny(folder: Path, text: str = TINY) -> str:
    (folder / "c.py").write_text(text)
    return f"--config={folder / 'c.py'}"


def test_a_home_directory_is_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    tiny(tmp_path)
    assert main(["train", "--config=~/c.py", "--workdir=~/run"]) == 0
    assert main(["sample", "--workdir=~/run", "--n=2", "--out=~/out.npz"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.py", "out.npz", "run"]
    assert f"sample --workdir {tmp_path}/run" in capsys.readouterr().out


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.write_bytes(b"\xef\xbb\xbf" + TINY.encode()),
        lambda p: p.write_bytes(f"# Überschrift\n{TINY}".encode()),
        lambda p: p.write_bytes(f"# -*- coding: latin-1 -*-\n# \xe9\n{TINY}".encode("latin-1")),
        lambda p: (p.with_name("base.py").write_text(TINY), p.write_text("from base import get_config\n")),
        lambda p: (
            p.with_name("base.py").write_text(TINY),
            p.write_text("import base\nget_config = base.get_config\n"),
        ),
        lambda p: p.write_text(TINY + "assert __name__ != '__main__'\n"),
    ],
    ids=["byte order mark", "utf-8", "latin-1", "imported", "assigned", "no main"],
)
def test_config_files_of_any_kind_are_read(tmp_path, write, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "base", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    write(tmp_path / "c.py")
    assert main(["train", f"--config={tmp_path / 'c.py'}", "--dry_run", "--config.training.steps=7"]) == 0
    assert "steps: 7" in capsys.readouterr().out


def test_config_files_are_read_in_a_locale_that_knows_ascii_only(tmp_path):
    (tmp_path / "c.py").write_bytes(f"# Überschrift\n{TINY}".encode())
    command = [sys.executable, "-m", "scorelab.cli", "train", f"--config={tmp_path / 'c.py'}", "--dry_run"]
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    done = subprocess.run([*command, "--config.training.steps=7"], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"steps: 7" in done.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config():\n    return {'seed': 1}\n", "gives dict; expected a function get_config"),
        ("def get_config():\n    pass\n", "has no get_config.. or it returns None"),
        ("get_config = 3\n", "gives int"),
        ("import nothing_of_the_kind\n", "line 1: ModuleNotFoundError"),
        ("def get_config():\n    x = {}\n    return x['lr']\n", "line 3: KeyError: lr"),
        ("def get_config():\n    return 1 / 0\n", "line 2: ZeroDivisionError"),
        ("def get_config(:\n", "is no Python file"),
        ("raise SystemExit('stop')\n", "SystemExit: stop"),
    ],
)
def test_config_files_that_fail_are_one_line(tmp_path, capsys, text, message):
    assert main(["train", tiny(tmp_path, text), f"--workdir={tmp_path / 'w'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_messages_survive_a_locale_without_their_letters(tmp_path):
    folder = tmp_path / "größe"
    command = [sys.executable, "-m", "scorelab.cli", "sample", f"--workdir={folder}"]
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"holds no config.json" in done.stderr


def test_advice_can_be_pasted_and_says_the_step_that_was_reached(tmp_path, capsys):
    run = tmp_path / "my run"
    for steps in (6, 2):
        assert main(["train", tiny(tmp_path), f"--workdir={run}", f"--config.training.steps={steps}"]) == 0
        assert f"trained to step 6; sample with: scorelab sample --workdir '{run}'" in capsys.readouterr().out


def test_after_a_loss_that_is_not_finite_the_advice_works(tmp_path, capsys):
    """The last checkpoint holds a weight so large that the next loss is infinite; the one before does not."""
    run = tmp_path / "run"
    config = tiny(
        tmp_path,
        TINY.replace("sample_every, ", "sample_every, c.training.checkpoint_every, ").replace("8, 0", "8, 0, 2"),
    )
    assert main(["train", config, f"--workdir={run}", "--config.training.steps=4"]) == 0
    config_of = json.loads((run / "config.json").read_text())
    assert config_of["training"]["checkpoint_every"] == 2
    place = run / "checkpoints" / "step_00000004"
    weights, averages, state = checkpoint.read(place)
    model = ScoreModel.load(place)
    broken = {k: v * 1e30 for k, v in weights.items()}
    checkpoint.write(run / "checkpoints", 4, model, broken, averages, state)
    arguments = ["train", config, f"--workdir={run}", "--config.training.steps=8"]
    for _ in range(2):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "not finite" in error
    advice = error.split("to go on from step 2, add ")[1].split()
    assert advice[0] == "--step=2"
    assert main([*arguments, *advice]) == 0
    assert checkpoint.last_step(run) == 8
    assert (run / "checkpoints" / "aside_step_00000004").is_dir()
    assert main([*arguments, "--step=3", "--accept_changes"]) == 2
    assert "no checkpoint of step 3; there: " in capsys.readouterr().err


# output files


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", tiny(folder), f"--workdir={folder / 'run'}"]) == 0
    return folder / "run"


def test_places_that_cannot_be_written_are_found_before_the_work(run, tmp_path, monkeypatch, capsys):
    def work(*args, **options):
        pytest.fail("the work began")

    monkeypatch.setattr(cli_sampling, "sample_model", work)
    (tmp_path / "file").write_text("")
    (tmp_path / "x.png").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "000007.png").write_text("")
    for out, message in (
        (tmp_path / "file" / "x.png", "can't be written"),
        (tmp_path / "file", "is there and not empty"),
        (tmp_path / "x.png", "it is a folder"),
        (tmp_path / "old", "not empty; expected a new directory"),
    ):
        assert main(["sample", f"--workdir={run}", "--n=2", f"--out={out}"]) == 2
        assert message in capsys.readouterr().err
    assert main(["calibrate", f"--workdir={run}", f"--out={tmp_path / 'file' / 'x.json'}"]) == 2
    assert "can't be written" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "old", "x.png"]


@pytest.mark.parametrize("name", ["x.png", "x.npz", "folder"])
def test_a_full_disk_leaves_no_file_and_what_was_there(run, tmp_path, monkeypatch, capsys, name):
    """Every write fails after the first bytes."""

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    if name != "folder":
        (tmp_path / name).write_bytes(b"before")
    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr(np, "savez_compressed", full)
    assert main(["sample", f"--workdir={run}", "--n=2", f"--out={tmp_path / name}"]) == 2
    assert "No space left" in capsys.readouterr().err
    left = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert [p.read_bytes() for p in left] == ([b"before"] if name != "folder" else [])


def test_whole_files_take_their_name_at_the_end(tmp_path):
    path = tmp_path / "x"
    with whole(path) as aside:
        aside.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"

    def half():
        with whole(path) as aside:
            aside.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert [p.read_text() for p in tmp_path.iterdir()] == ["new"]


def test_where_folders_cannot_be_opened_checkpoints_are_written(tmp_path, monkeypatch):
    """As on Windows."""
    opened = os.open

    def refusing(path, flags, *args, **options):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *args, **options)

    monkeypatch.setattr(checkpoint.os, "open", refusing)
    trainer = Trainer(build(small(1)), small(1))
    trainer.advance()
    assert checkpoint.verify(trainer.save(tmp_path)) == 1


def test_without_a_compiler_compiling_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler, and there is no c\+\+ or g\+\+"):
        Trainer(build(small()), small(training__compile=True))
    monkeypatch.setenv("CXX", "nocompiler")
    with pytest.raises(ValueError, match="there is no nocompiler"):
        check_compiler(torch.device("cpu"))


# models


def model(net: nn.Module | None = None, process=None) -> ScoreModel:
    net = MLP((2,), width=16, depth=2) if net is None else net
    return ScoreModel(net, process or VE(), edm(1.0), data_shape=(2,), input_scale=Constant(1.0), label=LogSigma(1.0))


class Tied(nn.Module):
    """A network whose two layers share their weights."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.b = nn.Linear(2, 2)
        self.b.weight = self.a.weight

    def forward(self, x, label):
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.filterwarnings("ignore:the file can't say how")
def test_shared_weights_are_saved_and_loaded(tmp_path):
    before = model(Tied()).eval()
    before.save(tmp_path)
    after = ScoreModel.load(tmp_path, Tied())
    x, sigma = torch.randn(5, 2), torch.tensor(1.0)
    assert torch.equal(before(x, sigma), after(x, sigma))
    assert after.net.a.weight is after.net.b.weight


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda net: torch.compile(nn.DataParallel(net))])
def test_wrapped_networks_are_saved_without_their_wrappers(tmp_path, wrap):
    net = MLP((2,), width=16, depth=2)
    model(wrap(net)).save(tmp_path)
    after = ScoreModel.load(tmp_path)
    x, sigma = torch.randn(5, 2), torch.tensor(1.0)
    assert torch.equal(after(x, sigma), model(net).eval()(x, sigma))
    fresh = MLP((2,), width=16, depth=2)
    loaded = ScoreModel.load(tmp_path, wrap(fresh))
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), net.state_dict().values(), strict=True))
    assert loaded.device.type == "cpu"


@dataclass(frozen=True)
class Mine(VP):
    """A process of the user's own."""


def test_processes_that_nobody_would_find_are_refused_before_anything_is_written(tmp_path):
    process = type("MyDDPM", (DiscreteVP,), {})(linear_betas(100))
    with pytest.raises(ValueError, match="MyDDPM is not one of scorelab's processes and can't be saved"):
        model(process=process).save(tmp_path / "m")
    assert not (tmp_path / "m").exists()
    # one that can be imported is found again
    model(process=Mine(0.02, 30.0)).save(tmp_path / "m")
    assert ScoreModel.load(tmp_path / "m").process == Mine(0.02, 30.0)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.json", lambda t: t[:-30]),
        ("model.json", lambda t: b"[1, 2]"),
        ("model.json", lambda t: t.replace(b'"VE"', b'"Mine"')),
        ("model.json", lambda t: t.replace(b'"prediction"', b'"predictions"')),
        ("model.json", lambda t: t.replace(b'"mlp"', b'"Net"')),
        ("model.json", lambda t: t.replace(b'"width"', b'"breadth"')),
        ("model.json", lambda t: b"\xff\xfe"),
        ("model.safetensors", lambda t: t[:-10]),
        ("model.safetensors", lambda t: b""),
        ("model.safetensors", lambda t: b"no tensors at all"),
    ],
)
def test_damaged_model_files_are_named(tmp_path, name, damage):
    model().save(tmp_path)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=f"{name}.*save the model again"):
        ScoreModel.load(tmp_path)


@pytest.mark.parametrize("convert", [lambda m: m, lambda m: m.double(), lambda m: m.bfloat16()])
def test_another_precision_than_the_weights_is_named(convert):
    m = convert(model().eval())
    own = next(m.parameters()).dtype
    for dtype in (torch.float64, torch.float32):
        x = torch.zeros(3, 2, dtype=dtype)
        if dtype == own:
            assert m(x, torch.tensor(1.0)).dtype == dtype
        else:
            with pytest.raises(TypeError, match=rf"x is {dtype}, the network's weights are {own}.*pass x.to\({own}\)"):
                m(x, torch.tensor(1.0))


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: sample(m, x, [1.0, 0.1, 0.0]),
        lambda m, x: sample(m, x, [1.0, 0.1], ProbabilityFlow(1e-1, 1e-1)),
        lambda m, x: sample(from_eps(m.eps), x, [1.0, 0.1, 0.0]),
        lambda m, x: log_likelihood(m, x, 0.1, 1.0, rtol=0.1, atol=0.1),
    ],
)
def test_a_network_left_in_training_mode_is_warned_of(use):
    """With dropout at work no two evaluations agree."""
    net = UNet((1, 4), width=8, multipliers=(1,), blocks=1, dropout=0.5)
    m = ScoreModel(net, VE(), edm(1.0), data_shape=(1, 4), label="log_sigma")
    x = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0))
    use(m.eval(), x)
    with pytest.warns(RuntimeWarning, match=r"in training mode, so its Dropout is at work; expected model.eval\(\)"):
        use(m.train(), x)


def test_training_mode_alone_is_no_matter():
    sample(model().train(), (2, 2), [1.0, 0.1, 0.0])


def test_a_star_import_leaves_torchs_nn():
    names: dict[str, object] = {}
    exec("from torch import nn\nfrom scorelab import *", names)
    assert names["nn"] is nn
    assert "sample" in names


def test_a_size_that_is_set_is_not_advised(tmp_path):
    for i, x in enumerate((np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.uint8))):
        Image.fromarray(x + i).save(tmp_path / f"{i}.png")
    config = small(data__source="folder", data__path=str(tmp_path), data__size=(4, 4))
    with pytest.raises(ValueError, match=r"those before it are .1, 4, 4.: set data.grayscale\)"):
        build(config)


def test_non_finite_errors_without_a_checkpoint_name_none(tmp_path):
    with pytest.raises(NonFiniteError) as caught:
        train(small(3, optim__lr=1e38, optim__warmup=0, optim__clip=0.0), tmp_path, progress=False)
    assert "--step" not in str(caught.value)
