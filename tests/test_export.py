"""Exported denoisers, sampled outside: by ONNX Runtime and NumPy, and by PyTorch in a process without scorelab."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import scorelab
from scorelab import VE, VP, DiscreteVP, Flow, ScoreModel, export, sample, sigmas
from scorelab.cli.main import main
from scorelab.models import Constant, LogSigma, UnitVariance
from scorelab.nn import EDM2, MLP, DiT, RefineNet, UNet, adm, ncsnpp
from scorelab.predictions import EPS, FLOW, SCORE, X0, V, edm
from scorelab.processes.discrete import cosine_betas
from scorelab.samplers import Euler, Heun

ROOT = Path(__file__).parent.parent
SAME = 1e-4
IMAGE, CLASSES = (1, 8, 8), {"num_classes": 3, "null_class": True}


def rough(net: nn.Module) -> nn.Module:
    """With noise on all weights: no part of it is one that starts at 0."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn(p.shape) / max(1, p[0].numel()) ** 0.5)
    return net.eval()


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def mlp(**classes) -> ScoreModel:
    net = rough(MLP((2,), width=16, depth=1, **classes))
    scaled = {"input_scale": Constant(2.0), "label": LogSigma(0.5), "label_scale": 1.0}
    return ScoreModel(net, VE(), EPS, data_shape=(2,), **scaled)


def ddpm(multipliers: tuple[int, ...] = (1,)) -> ScoreModel:
    """Labels between the steps of a table, scaled; odd sizes; F and a variance."""
    net = UNet((1, 5, 5), width=4, multipliers=multipliers, blocks=1, embedding="positional", variance=True)
    process = DiscreteVP(cosine_betas(40))
    settings = {"label": "index", "label_scale": 25.0, "variance": True}
    return ScoreModel(rough(net), process, EPS, data_shape=(1, 5, 5), **settings)


def filtered(**more) -> ScoreModel:
    net = rough(ncsnpp(IMAGE, width=4, multipliers=(1, 2), blocks=1, attention=(), **more))
    return ScoreModel(net, VE(), SCORE, data_shape=IMAGE, input_scale=Constant(1.0), label="log_sigma")


def adaptive(**more) -> ScoreModel:
    net = adm(IMAGE, width=4, multipliers=(1, 2), blocks=1, attention=(1,), head=4, num_classes=3)
    if more:
        net = UNet(**{**net.config, "attention": (), **more})
    return ScoreModel(rough(net), VP(), V, data_shape=IMAGE, label="time", label_scale=1000.0)


def edm2(multipliers: tuple[int, ...] = (1,)) -> ScoreModel:
    attention = () if multipliers == (1,) else (0,)
    net = rough(EDM2(IMAGE, width=8, multipliers=multipliers, blocks=1, attention=attention, head=4, **CLASSES))
    with torch.no_grad():
        net.gain.fill_(1.0)
    scaled = {"input_scale": UnitVariance(0.5), "label": "log_sigma", "label_scale": 0.25}
    return ScoreModel(net, VE(0.002, 80.0), edm(0.5), data_shape=IMAGE, **scaled)


def dit() -> ScoreModel:
    net = rough(DiT(IMAGE, patch=4, width=8, depth=1, heads=2, **CLASSES))
    return ScoreModel(net, Flow(), FLOW, data_shape=IMAGE, label="time", label_scale=1000.0)


class Indexed(nn.Module):
    """A network of whole indices, as small as they come."""

    integer_labels, num_levels = True, 10

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.last = nn.Embedding(10, 4), nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 1)

    def forward(self, x, label):
        return self.last(nn.functional.silu(self.first(x) * self.table(label)[..., None, None]))


def indexed(net: nn.Module) -> ScoreModel:
    grid = sigmas.geometric(10, sigma_min=0.01, sigma_max=1.0)
    settings = {"label": "index", "levels": grid, "index_order": "descending", "input_scale": Constant(1.0)}
    return ScoreModel(net, VE(0.01, 1.0), SCORE, data_shape=(1, 4, 4), **settings)


def ncsnv2() -> ScoreModel:
    net = rough(RefineNet((1, 4, 4), width=2))
    return ScoreModel(net, VE(), EPS, data_shape=(1, 4, 4), input_scale=Constant(1.0))


def volume() -> ScoreModel:
    net = UNet((2, 4, 4, 4), width=4, multipliers=(1, 2), blocks=1, attention=(1,))
    return ScoreModel(rough(net), scorelab.Cosine(), X0, data_shape=(2, 4, 4, 4), label="time")


MODELS = {
    "mlp": mlp,
    "mlp with classes": lambda: mlp(**CLASSES),
    "unet": ddpm,
    # what is ADM's and what is NCSN++'s in one network
    "adm with filters": lambda: adaptive(fir=(1, 3, 3, 1), inputs="residual", rescaled=True, classes_first=True),
    "edm2": edm2,
    "dit": dit,
}
LARGE = {
    "ncsnpp": filtered,
    "adm": adaptive,
    "ncsnv2": ncsnv2,
    "ncsn, whole indices": lambda: indexed(rough(RefineNet((1, 4, 4), width=2, levels=10))),
    "pyramids": lambda: filtered(inputs="skip", outputs="residual", combine="cat", num_classes=3),
    "edm2, two resolutions": lambda: edm2((1, 2)),
    "volumes": volume,
    "unet, two resolutions": lambda: ddpm((1, 2)),
}


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options)


def heun(denoise, x: np.ndarray, levels: list[float]) -> np.ndarray:
    """Karras et al., 2022, arXiv:2206.00364, algorithm 1 without noise."""
    for sigma, following in pairwise(levels):
        first = (x - denoise(x, sigma)) / sigma
        end = x + (following - sigma) * first
        if following:
            first = (first + (end - denoise(end, following)) / following) / 2
        x = x + (following - sigma) * first
    return x


def karras(n: int, low: float, high: float) -> list[float]:
    levels = [(high ** (1 / 7) + i / (n - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(n)]
    return [*levels, 0.0]


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.dtype == expected.dtype == np.float32
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_onnx_runtime_and_numpy_sample_as_scorelab_does(name, tmp_path):
    model = (MODELS | LARGE)[name]().eval()
    export(model, tmp_path / "model.onnx")
    run = session(tmp_path / "model.onnx").run
    levels = [*sigmas.geometric(10, sigma_min=0.01, sigma_max=1.0).tolist(), 0.0]
    levels = levels if "whole" in name else karras(6, 0.1, 10.0)
    # what the sampler gives for F = 0 is something else: the network is seen in the result
    bare = copy.deepcopy(model)
    for p in bare.parameters():
        nn.init.zeros_(p)
    for count in (1, 2, 5):
        x = levels[0] * np.random.default_rng(count).standard_normal((count, *model.data_shape), dtype=np.float32)
        classes = np.arange(count) % 3
        given = {"condition": classes} if model.conditional else {}
        made = heun(
            lambda x, s, g=given: run(None, {"x": x, "sigma": np.full(len(x), s, np.float32), **g})[0], x, levels
        )
        scores = [m.conditioned(torch.from_numpy(classes)) if m.conditional else m for m in (model, bare)]
        expected, nothing = (sample(s, torch.from_numpy(x), torch.tensor(levels), Heun()).numpy() for s in scores)
        assert relative(made, expected) < SAME
        assert relative(nothing, expected) > 0.01


SEPARATE = """
import json, sys
from itertools import pairwise
import torch

extra = {"scorelab.json": ""}
denoise = torch.export.load("model.pt2", extra_files=extra).module()
about = json.loads(extra["scorelab.json"])
levels, made = torch.load("levels.pt"), []
for x in torch.load("x.pt"):
    for sigma, following in pairwise(levels):
        x = x + (following - sigma) / sigma * (x - denoise(x, torch.full((len(x),), sigma)))
    made.append(x)
torch.save(made, "made.pt")
assert about["data_shape"] == [1, 4, 4] and about["num_classes"] is None
assert "scorelab" not in sys.modules
"""


def test_another_process_samples_with_pytorch_alone(tmp_path):
    model = ncsnv2()
    export(model, tmp_path / "model.pt2")
    levels = karras(6, 0.1, 10.0)
    xs = [10 * torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(n)) for n in (1, 2, 5)]
    torch.save(levels, tmp_path / "levels.pt")
    torch.save(xs, tmp_path / "x.pt")
    run = subprocess.run([sys.executable, "-c", SEPARATE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for x, made in zip(xs, torch.load(tmp_path / "made.pt"), strict=True):
        assert relative(made.numpy(), sample(model, x, torch.tensor(levels), Euler()).numpy()) < SAME


def test_a_network_of_whole_indices_makes_nothing_up_at_other_levels(tmp_path):
    model = indexed(rough(Indexed()))
    export(model, tmp_path / "model.onnx")
    made = session(tmp_path / "model.onnx")
    levels = json.loads(made.get_modelmeta().custom_metadata_map["levels"])
    np.testing.assert_allclose(levels, np.geomspace(1, 0.01, 10), rtol=1e-12)
    sigma = np.float32([levels[1], 0.5, levels[9]])
    (x0_hat,) = made.run(None, {"x": np.ones((3, 1, 4, 4), np.float32), "sigma": sigma})
    expected = model.denoise(torch.ones(2, 1, 4, 4), torch.from_numpy(sigma[[0, 2]]))
    assert relative(x0_hat[[0, 2]], expected.detach().numpy()) < SAME
    assert np.isnan(x0_hat[1]).all()


def test_the_documented_code_samples_without_pytorch(tmp_path, capsys):
    net = rough(MLP((2,), width=16, depth=1, **CLASSES))
    settings = {"data_range": (0.0, 16.0), "data_mean": (0.5, -1.0), "label": LogSigma(0.5)}
    model = ScoreModel(net, VE(0.01, 20.0), EPS, data_shape=(2,), input_scale=Constant(2.0), **settings)
    model.save(tmp_path / "saved")
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "digits.onnx")]) == 0
    assert "x (batch, 2), sigma (batch,) and condition (batch,)" in capsys.readouterr().out
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.S)
    (code,) = [block for block in blocks if "Inf" in block]
    code += "\nimport sys\nassert not {'torch', 'scorelab'} & set(sys.modules)\nnp.savez('made', x=x, **about)\n"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = np.load(tmp_path / "made.npz")
    noise = np.random.default_rng(0).standard_normal((10, 2), dtype=np.float32)
    x = np.float32([0.5, -1.0]) + 20 * noise
    score, grid = model.conditioned(torch.arange(10) % 3), sigmas.karras(18, sigma_min=0.01, sigma_max=20.0)
    expected = sample(score, torch.from_numpy(x), grid, Heun())
    assert relative(found["x"], (expected.clamp(-1, 1) * 8 + 8).numpy()) < SAME
    assert found["null_condition"] == 3
    assert found["scorelab"] == scorelab.__version__
    # and the other file, here
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "digits.pt2")]) == 0
    (code,) = [
        c for c in re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.S) if ".pt2" in c
    ]
    own: dict[str, Any] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(code.replace("digits.pt2", str(tmp_path / "digits.pt2")), own)
        torch.manual_seed(0)
        x = 20 * torch.randn(10, 2) + torch.tensor([0.5, -1.0])
    expected = sample(score, x, sigmas.karras(30, sigma_min=0.01, sigma_max=20.0), Euler())
    assert relative(own["x"].numpy(), expected.numpy()) < SAME


def test_runs_are_exported_with_averaged_weights(tmp_path):
    changes = ["--config.data.source=checkerboard", "--config.model.net.name=mlp", "--config.training.steps=2"]
    (tmp_path / "config.py").write_text("from scorelab.training import default_config as get_config\n")
    run, out = tmp_path / "run", tmp_path / "new" / "model.pt2"
    assert main(["train", f"--config={tmp_path / 'config.py'}", f"--workdir={run}", *changes]) == 0
    x, sigma = torch.ones(3, 2), torch.tensor([0.1, 0.5, 1.0])
    for weights, options in (("ema.safetensors", []), ("model.safetensors", ["--weights", "model", "--step=2"])):
        assert main(["export", *options, str(run), str(out)]) == 0
        made = torch.export.load(out).module()(x, sigma)
        expected = ScoreModel.load(run, weights=weights).denoise(x, sigma)
        assert torch.equal(made, expected)
    raw, averaged = (ScoreModel.load(run, weights=f"{name}.safetensors").denoise(x, sigma) for name in ("model", "ema"))
    assert not torch.equal(raw, averaged)


def test_half_precision_training_mode_and_compilation_are_left_behind(tmp_path):
    plain = mlp().eval()
    model = copy.deepcopy(plain).double().train()
    model.precision = "bf16"
    model.net.compile(backend="eager")
    export(model, tmp_path / "model.pt2")
    x, sigma = torch.ones(3, 2), torch.tensor([0.1, 0.5, 1.0])
    made = torch.export.load(tmp_path / "model.pt2").module()(x, sigma)
    assert torch.equal(made, plain.denoise(x, sigma))
    assert model.training
    assert model.precision == "bf16"
    assert model.net.last.weight.dtype == torch.float64


class Branching(nn.Linear):
    def forward(self, x, label):
        return super().forward(x) if label.mean() > 0 else x


class Fixed(nn.Linear):
    def forward(self, x, label):
        return super().forward(x).reshape(len(x), -1)


class Eigenvalues(nn.Linear):
    def forward(self, x, label):
        return torch.linalg.eigvals(self.weight).real * x


def test_what_cannot_be_exported_says_why_in_a_line(tmp_path, monkeypatch, capfd):
    for net, suffix, said in (
        (Branching(2, 2), "pt2", "Branching can't be exported .*data-dependent.*: expected a network without branches"),
        (Fixed(2, 2), "onnx", r"Fixed can't be exported .*batch.*: expected .* by x.shape\[0\] and not len\(x\)"),
        (Eigenvalues(2, 2), "onnx", "this model can't be written as ONNX .*linalg_eig"),
        (Eigenvalues(2, 2), "pth", "expected a name that ends in .pt2"),
    ):
        with pytest.raises(ValueError, match=said) as refused:
            export(ScoreModel(net, VE(), data_shape=(2,)), tmp_path / f"model.{suffix}")
        assert "\n" not in str(refused.value)
    with pytest.raises(TypeError, match="expected a ScoreModel"):
        export(mlp(**CLASSES).conditioned(torch.tensor([1])), tmp_path / "model.pt2")
    monkeypatch.setattr("scorelab.interop.exporting.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"onnx and onnxscript: pip install 'scorelab\[interop\]'"):
        export(mlp(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")
    assert main(["export", str(tmp_path)]) == 2
    assert "expected scorelab export RUN_OR_SAVED_MODEL FILE.onnx" in capfd.readouterr().err


def test_a_table_says_where_between_its_numbers_something_is():
    """The same when a graph is exported, where comparisons stand for the search."""
    table = scorelab.tables.Table(torch.tensor([-1.0, 0.0, 2.0, 5.0]))
    x = torch.tensor([[-3.0, -1.0, -0.5], [0.0, 2.0, 5.0], [1.9, 4.9, 9.0]])

    class Segment(nn.Module):
        def forward(self, x):
            return table.segment(x)

    expected = torch.tensor([[0, 0, 0], [1, 2, 2], [1, 2, 2]])
    assert torch.equal(table.segment(x), expected)
    assert torch.equal(torch.export.export(Segment(), (x,)).module()(x), expected)
