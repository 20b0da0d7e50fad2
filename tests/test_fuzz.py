"""Arbitrary settings and damaged files: an answer or a message, never a bare traceback."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image
from test_training import small

from scorelab.cli.main import main
from scorelab.cli.report import report_run
from scorelab.cli.runs import load_run
from scorelab.data import Files, load
from scorelab.training import default_config, train

# without shrinking: a failure is found in seconds, and said as it is
QUIET = settings(
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ROOT = Path(__file__).parent.parent


def keys(config: ConfigDict, prefix: str = "") -> list[str]:
    return [
        name
        for key, value in config.items()
        for name in (keys(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [f"{prefix}{key}"])
    ]


WORDS = ["adam", "bf16", "fp32", "auto", "cosine", "inverse_sqrt", "vp", "ddpm", "flow", "mlp", "unet", "moons", "yes"]
WORDS += ["edm", "v", "index", "time", "tapered", "sequence", "likelihood", "ancestral", "ddim", "geometric", "steps"]
VALUES = st.one_of(
    st.integers(-3, 24).map(str),
    st.floats(-2, 200).map(str),
    st.sampled_from(
        ["nan", "inf", "1e-300", "1e30", "None", "True", "False", "", "()", "(1,)", "(1, 2)", "(0.5, 0.9)"]
    ),
    st.sampled_from(WORDS),
    st.text(max_size=6),
)
OVERRIDES = st.dictionaries(st.sampled_from(keys(default_config())), VALUES, max_size=4)


@settings(QUIET, max_examples=80)
@given(overrides=OVERRIDES)
def test_any_override_trains_or_is_refused_with_a_message(tmp_path, capsys, overrides):
    """One step of a small network, samples and all: exit code 0, or 2 and one line."""
    chosen = {
        "model.net.width": "8",
        "model.net.blocks": "1",
        "training.batch_size": "8",
        "sampling.grid.n": "3",
        "sampling.samples": "2",
        "sampling.sampler.steps": "1",
        **overrides,
        "training.steps": "1",
        "training.compile": "False",
    }
    workdir = tmp_path / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    arguments = ["train", "--config", str(ROOT / "configs/digits/ncsn.py"), "--workdir", str(workdir)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main([*arguments, *(f"--config.{k}={v}" for k, v in chosen.items())])
    said = capsys.readouterr().err.replace("\r", "\n")
    assert code in (0, 2), chosen
    if code:
        assert said.strip().splitlines()[-1].startswith("scorelab: "), said
        assert len(said.strip().splitlines()[-1]) > len("scorelab: ")


def picture(seed: int) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, "PNG" if seed % 2 else "JPEG")
    return data.getvalue()


def idx() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (4, 3, 3), dtype=np.uint8)
    return struct.pack(">HBBIII", 0, 8, 3, 4, 3, 3) + pixels.tobytes()


def saved(**arrays) -> bytes:
    data = io.BytesIO()
    np.savez(data, **arrays)
    return data.getvalue()


def zipped() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for i in range(3):
            archive.writestr(f"{i}.png", picture(2 * i + 1))
        archive.writestr("dataset.json", json.dumps({"labels": [[f"{i}.png", i] for i in range(3)]}))
    return data.getvalue()


FILES = {
    ("idx", "images-idx3-ubyte"): idx(),
    ("idx", "images-idx3-ubyte.gz"): gzip.compress(idx()),
    ("cifar10", "data_batch_1.bin"): np.random.default_rng(0).integers(0, 9, 2 * 3073, dtype=np.uint8).tobytes(),
    ("arrays", "x.npz"): saved(images=np.random.default_rng(0).integers(0, 9, (4, 3, 3), dtype=np.uint8)),
    ("zip", "x.zip"): zipped(),
    ("folder", "1.png"): picture(1),
    ("folder", "2.jpg"): picture(2),
}
DAMAGE = st.lists(
    st.tuples(st.sampled_from(["cut", "flip", "insert", "zero"]), st.integers(0, 10_000), st.binary(max_size=8)),
    min_size=1,
    max_size=3,
)


def damaged(content: bytes, damage: list[tuple[str, int, bytes]]) -> bytes:
    for kind, where, extra in damage:
        at = where % (len(content) + 1)
        if kind == "cut":
            content = content[:at]
        elif kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]
        elif kind == "insert":
            content = content[:at] + extra + content[at:]
        elif kind == "zero":
            content = content[:at] + bytes(min(16, len(content) - at)) + content[at + 16 :]
    return content


@settings(QUIET, max_examples=300)
@given(which=st.sampled_from(list(FILES)), damage=DAMAGE, skip=st.booleans())
def test_damaged_data_loads_or_names_the_file(tmp_path, which, damage, skip):
    source, name = which
    folder = tmp_path / "data"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = folder / name
    path.write_bytes(damaged(FILES[which], damage))
    if source == "folder":
        (folder / "3.png").write_bytes(picture(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            data = load(source, Files(str(folder if source == "folder" else path), skip_bad=skip))
            assert data.batch(0, 0, 2).x0.isfinite().all()
        except ValueError as error:
            assert name in str(error) or str(folder) in str(error)  # noqa: PT017


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "run"
    train(small(2, training__batch_size=16), workdir, progress=False)
    return workdir


@settings(QUIET, max_examples=10)
@given(where=st.integers(0, 100), damage=DAMAGE)
def test_damaged_runs_are_read_or_refused(tmp_path, run, where, damage):
    """Any file of a run directory: sampling, the report and going on answer, or say what is wrong."""
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    files = sorted(p for p in copy.rglob("*") if p.is_file() and "events" not in p.name)
    path = files[where % len(files)]
    path.write_bytes(damaged(path.read_bytes(), damage))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for use in (
            lambda: load_run(copy),
            lambda: report_run(copy),
            lambda: train(small(3, training__batch_size=16), copy, progress=False),
        ):
            try:
                use()
            except (ValueError, OSError) as error:
                assert str(copy) in str(error)  # noqa: PT017
