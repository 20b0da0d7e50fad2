"""The samples of the README's first screen run as they stand there."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
PYTHON = [code for language, code in BLOCKS if language == "python"]


def test_there_are_three_samples_of_at_most_ten_lines():
    samples = [*PYTHON, *(code for language, code in BLOCKS if language == "bash" and "scorelab train" in code)]
    assert len(samples) == 3
    assert all(len(code.strip().splitlines()) <= 10 for code in samples)


@pytest.mark.parametrize("code", PYTHON)
def test_python_samples_run(code, tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("command", ["scorelab train", "scorelab sample --model"])
def test_the_command_line_samples_run(command, tmp_path):
    (code,) = [code for language, code in BLOCKS if language == "bash" and command in code]
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    # the same commands on a run of five steps, and with fewer samples
    code = code.replace(
        "--workdir runs/digits\n",
        "--workdir runs/digits --config.training.steps=5 --config.model.net.width=8 --config.sampling.samples=20\n",
        1,
    ).replace("--n 64", "--n 2 --nfe 3")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        ["bash", "-ec", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": path},
    )
    assert run.returncode == 0, run.stderr
    assert list(tmp_path.rglob("samples/**/*.png"))


@pytest.mark.parametrize("path", sorted((ROOT / "toy").glob("[!_]*.py")), ids=lambda p: p.stem)
def test_every_figure_of_the_gallery_is_drawn_alone(path, monkeypatch, capsys):
    """By ``python -m toy.NAME``, as far as its options; a slow test and ``make demo`` draw."""
    if path.stem == "common":
        return
    monkeypatch.setattr(sys, "argv", ["toy", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    assert "usage" in capsys.readouterr().out
