from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scorelab.cli.commands import COMMANDS
from scorelab.cli.main import _PAGES, main

ROOT = Path(__file__).parent.parent
CONFIG = str(ROOT / "configs/digits/ncsn.py")
SMALL = [
    "--config.model.net.width=8",
    "--config.training.steps=3",
    "--config.training.batch_size=16",
    "--config.sampling.grid.n=3",
    "--config.sampling.sampler.steps=2",
    "--config.optim.lr=1e-3",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["train", "--config", CONFIG, *SMALL, f"--workdir={workdir}"]) == 0
    return workdir


def test_train_writes_a_run(run):
    settings = json.loads((run / "config.json").read_text())
    assert settings["optim"]["lr"] == 1e-3
    assert settings["model"]["net"]["multipliers"] == [1, 2]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == [3]
    assert (run / "checkpoints" / "step_00000003" / "manifest.json").is_file()


def test_sample_writes_a_grid_single_images_and_arrays_in_the_data_range(run, tmp_path, capsys):
    assert main(["sample", "--workdir", str(run), "--n=5"]) == 0
    assert "samples/drawn_00000003.png" in capsys.readouterr().out
    with Image.open(run / "samples" / "drawn_00000003.png") as grid:
        # six times as large, with gaps of 2
        assert grid.size == (2 * 50 - 2, 3 * 50 - 2)
    assert main(["sample", f"--workdir={run}", "--n=3", f"--out={tmp_path / 'x.npz'}"]) == 0
    values = np.load(tmp_path / "x.npz")["samples"]
    assert values.shape == (3, 1, 8, 8)
    assert values.min() >= 0
    assert 1 < values.max() <= 16
    assert main(["sample", f"--workdir={run}", "--n=3", f"--out={tmp_path / 'single'}"]) == 0
    assert main(["sample", f"--workdir={run}", "--n=0"]) == 2
    with Image.open(tmp_path / "single" / "000002.png") as image:
        expected = np.round(values[2, 0] / 16 * 255)
        assert np.abs(np.asarray(image) - expected).max() <= 1


def test_sample_i_is_the_same_for_any_number_of_samples(run, tmp_path):
    for n in (2, 5):
        assert main(["sample", f"--workdir={run}", f"--n={n}", "--seed=3", f"--out={tmp_path / f'{n}.npz'}"]) == 0
    two, five = (np.load(tmp_path / f"{n}.npz")["samples"] for n in (2, 5))
    np.testing.assert_allclose(two, five[:2], rtol=1e-4, atol=1e-4)


def test_calibrate_then_sample_with_it(run, tmp_path, capsys):
    place = tmp_path / "new" / "sampler.json"
    options = ["--nfe=3", "--starts=16", "--method=least_squares", f"--out={place}"]
    assert main(["calibrate", f"--workdir={run}", *options]) == 0
    assert "held-out error" in capsys.readouterr().out
    assert main(["sample", f"--workdir={run}", "--n=2", f"--sampler={place}", f"--out={tmp_path / 'x.npz'}"]) == 0
    assert np.load(tmp_path / "x.npz")["samples"].shape == (2, 1, 8, 8)
    place.write_text("{}")
    assert main(["sample", f"--workdir={run}", "--n=2", f"--sampler={place}"]) == 2
    assert "sampler.json is no calibrated sampler" in capsys.readouterr().err


def test_likelihood_states_what_it_is(run, capsys):
    assert main(["likelihood", f"--workdir={run}", "--n=2", "--levels=17", "--tolerance=1e-2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 2
    assert "bins of width 0.125" in found["statement"]
    mean, error, unit = found["bits_per_dim"].values()
    assert unit == "bits per dimension"
    assert error > 0
    assert 0 < mean < 20
    assert main(["likelihood", f"--workdir={run}", "--n=2", "--tolerance=1e-2"]) == 0
    assert json.loads(capsys.readouterr().out)["log_prob"]["unit"] == "nats"
    assert main(["likelihood", f"--workdir={run}", "--n=0"]) == 2


def test_runs_from_before_a_setting_there_is_now_are_read(run, tmp_path, capsys):
    old = shutil.copytree(run, tmp_path / "old")
    settings = json.loads((old / "config.json").read_text())
    for group, key in (
        ("data", "background"),
        ("data", "layout"),
        ("sampling", "guidance"),
        ("training", "precision"),
    ):
        del settings[group][key]
    del settings["sampling"]["sampler"]["step_size"]
    (old / "config.json").write_text(json.dumps(settings))
    (old / "data.json").unlink()
    assert main(["likelihood", f"--workdir={old}", "--n=2", "--levels=17", "--tolerance=1e-1"]) == 0
    assert main(["sample", f"--workdir={old}", "--n=2", f"--out={tmp_path / 'x.png'}"]) == 0


def test_points_are_trained_and_written_as_arrays(tmp_path):
    config = tmp_path / "points.py"
    config.write_text(
        "from scorelab.training import default_config\n"
        "def get_config():\n"
        "    c = default_config()\n"
        "    c.data.source, c.model.net.name = 'ring', 'mlp'\n"
        "    c.process.sigma_max, c.training.steps, c.sampling.grid.n = 20.0, 3, 4\n"
        "    return c\n"
    )
    assert main(["train", "--config", str(config), "--workdir", str(tmp_path / "run")]) == 0
    assert main(["sample", "--workdir", str(tmp_path / "run"), "--n=7"]) == 0
    assert np.load(tmp_path / "run" / "samples" / "drawn_00000003.npz")["samples"].shape == (7, 2)


def test_a_dry_run_of_what_does_not_fit_says_so(monkeypatch, capsys):
    monkeypatch.setattr("scorelab.cli.dry_run.free_bytes", lambda device: 2**20)
    assert main(["train", "--config", CONFIG, "--dry-run"]) == 0
    *_, memory, time = capsys.readouterr().out.splitlines()
    assert "activations about" in memory
    assert time.startswith("time: not measured, for 1 MiB are free on this machine's cpu")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["source=cifar10"], "images of noise (3, 32, 32), of 10 classes, stand for cifar10's"),
        (
            ["source=folder", "size=8,12", "grayscale=True"],
            "images of noise (1, 8, 12), of 1,000 classes, stand for folder's",
        ),
    ],
)
def test_a_dry_run_without_the_images_takes_noise(settings, said, capsys):
    small = [f"--config.{x}" for x in ("model.net.width=32", "model.net.blocks=1", "training.batch_size=2")]
    data = [f"--config.data.{x}" for x in (*settings, "path=", "validation=0")]
    assert main(["train", "--config", CONFIG, "--dry_run", *small, *data]) == 0
    first, *_, seconds = capsys.readouterr().out.splitlines()
    assert first == f"data.path is empty: {said}"
    assert seconds.startswith("time: ")


def test_dry_run_prints_the_experiment_and_writes_nothing(tmp_path, capsys):
    assert main(["train", "--config", CONFIG, "--dry_run", "--workdir", str(tmp_path / "x")]) == 0
    printed = capsys.readouterr().out
    for word in ("lr: 0.002", "parameters", "MiB", "sigma from"):
        assert word in printed
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", CONFIG, "--workdir=w", "--config.optim.lrr=1"], "did you mean 'optim.lr'"),
        (
            ["train", "--config", CONFIG, "--workdir=w", "--config.optim.lr=fast"],
            "optim.lr=fast: expected a number",
        ),
        (["train", "--config", CONFIG, "--workdir=w", "--config.model.net.multipliers=x"], "multipliers"),
        (["train", "--config", CONFIG, "--workdir=w", "--config.process.name=vee"], "did you mean 've'"),
        (["train", "--config", CONFIG, "--workdir=w", "--config.process.sigma_min=90."], "sigma_min"),
        (["train", "--config", "nowhere.py", "--workdir=w"], "nowhere.py"),
        (["train", "--workdir=w"], "--config is missing"),
        (["train", "--config", CONFIG], "--workdir is missing"),
        (["train", "--config", CONFIG, "--workdir=w", "--stepz=3"], "stepz"),
        (["train", "--config", CONFIG, "--workdir=w", "loose"], "loose"),
        (["sample", "--workdir=w"], "no config.json"),
        (["train", "--config", CONFIG, "--workdir=w", "--config.data.flip=yes"], "expected True or False"),
        (["sample", "--workdir=w", "--n=few"], "--n=few: expected a whole number, in digits"),
        (["sample", "--workdir=w", "--weight=model"], "unknown option --weight; did you mean 'weights'"),
        (["sample"], "--workdir is missing"),
        (
            ["train", "--config", CONFIG, "--workdir=w", "--steps=9"],
            "unknown option --steps; did you mean --config.training.",
        ),
        (
            ["train", "--config", CONFIG, "--config.steps=9"],
            "unknown config key 'steps'; did you mean 'training.steps'",
        ),
        (["train", "--config", CONFIG, "--config.training.steps=1e4"], "steps=1e4: expected a whole number, in digits"),
        (["sample", "--workdir=w", "--steps=9"], "unknown option --steps; did you mean --nfe"),
        (["trian"], "did you mean 'train'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_config_files_with_unknown_keys_are_refused(tmp_path, capsys):
    config = tmp_path / "wrong.py"
    config.write_text(
        "from scorelab.training import default_config\n"
        "def get_config():\n"
        "    c = default_config()\n"
        "    c.optim.learning_rate = 1\n"
        "    return c\n"
    )
    assert main(["train", "--config", str(config), "--workdir", str(tmp_path / "w")]) == 2
    assert "learning_rate" in capsys.readouterr().err


def test_missing_checkpoints_and_steps_are_named(run, capsys):
    assert main(["sample", f"--workdir={run}", "--step=2"]) == 2
    assert "no checkpoint of step 2; steps there: 3" in capsys.readouterr().err
    assert main(["sample", f"--workdir={run}", "--n=2", "--out=x.jpg"]) == 2
    assert ".jpg" in capsys.readouterr().err
    assert main(["sample", f"--workdir={run}", "--n=-2"]) == 2


def test_as_a_process_there_is_no_traceback(tmp_path):
    command = [sys.executable, "-m", "scorelab.cli", "train", "--config", CONFIG, "--workdir", str(tmp_path)]
    (tmp_path / "mine.txt").write_text("precious")
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert "not empty" in found.stderr
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_config_files_that_are_none_and_other_early_refusals(run, tmp_path, capsys):
    assert main(["sample", "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: scorelab sample --workdir")
    assert "scorelab calibrate" not in said
    assert main(["--help"]) == 0
    assert "scorelab calibrate" in capsys.readouterr().out
    assert set(_PAGES) == set(COMMANDS)
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        first, *_, last = capsys.readouterr().out.splitlines()
        assert first.split()[:3] == ["usage:", "scorelab", command]
        pages = re.findall(r"docs/\w+\.md", last)
        assert pages
        assert all((ROOT / page).is_file() for page in pages)
    bare = tmp_path / "bare.py"
    bare.write_text("x = 1\n")
    cases = {
        str(ROOT / "README.md"): "is no Python file",
        str(tmp_path / "missing.py"): "there is no file",
        str(bare): "has no get_config() or it returns None",
    }
    for path, message in cases.items():
        assert main(["train", "--config", path, f"--workdir={tmp_path / 'r'}"]) == 2
        assert message in capsys.readouterr().err
    assert main(["sample", f"--workdir={run}", "--out=a.txt"]) == 2
    assert "a.txt" in capsys.readouterr().err
