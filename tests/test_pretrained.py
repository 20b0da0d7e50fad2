"""The models that come with the package: there, small, and good for the first exercise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from digits_quality import classify
from PIL import Image

import scorelab
from scorelab import PerSampleNoise, ScoreModel, classifier_free, sample, sigmas
from scorelab.cli.main import main
from scorelab.data import digits
from scorelab.evaluation.features import features_of
from scorelab.interop import PRETRAINED
from scorelab.interop.loading import FEATURES, pretrained
from scorelab.samplers import Heun

ROOT = Path(scorelab.__file__).parent / "pretrained"


def drawn(name: str, count: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples of each class in turn, and their classes."""
    model = scorelab.load(name)
    labels = torch.arange(count) % model.num_classes
    low, high = model.sigma_range
    levels = sigmas.karras(12, sigma_min=low, sigma_max=high)
    score = model.conditioned(labels)
    if scale != 1:
        score = classifier_free(score, model.conditioned(None), scale)
    return sample(score, (count, *model.data_shape), levels, Heun(), generator=PerSampleNoise(0)), labels


def test_they_are_small_and_have_cards():
    assert sum(f.stat().st_size for f in ROOT.rglob("*") if f.is_file()) <= 6 * 2**20
    assert sorted(p.name for p in ROOT.iterdir()) == sorted(PRETRAINED + FEATURES)
    for name in PRETRAINED:
        card = (ROOT / name / "card.md").read_text()
        for word in ("config", "seed", "training", "machine", "right class", "make models"):
            assert word in card
        model = scorelab.load(name)
        assert not model.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())


def test_feature_classifiers_know_images_and_have_cards():
    data = digits()
    x, labels = data.take(torch.arange(0, 1797, 9)), data.labels[::9]
    for name in FEATURES:
        card = (ROOT / name / "card.md").read_text()
        for word in ("config", "seed", "training", "machine", "right class", "make models"):
            assert word in card
    seen = features_of("digits")
    assert seen(x).shape == (200, 64)
    # most of these it learnt from; of those that it had not seen it knew .987
    assert float((seen.logits(x).argmax(1) == labels).float().mean()) > 0.97
    assert seen.about()["features"] == "digits"


def test_digits_are_of_the_class_that_is_asked_for():
    """The judge, which learnt from other digits, agrees with .967 of those that it has not seen."""
    x, labels = drawn("digits", 100)
    assert (classify(x) == labels.numpy()).mean() > 0.92
    assert float(x.std()) == pytest.approx(0.752, rel=0.05)


def test_guidance_makes_digits_clearer():
    x, labels = drawn("digits", 100, scale=2.0)
    assert (classify(x) == labels.numpy()).mean() > 0.96


def test_a_name_that_is_a_directory_is_the_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pretrained("digits") == ROOT / "digits"
    scorelab.load("digits").save(tmp_path / "digits", dtype=torch.float64)
    assert pretrained("digits") == Path("digits")
    again, x = ScoreModel.load(tmp_path / "digits"), torch.randn(2, 1, 8, 8)
    assert torch.equal(again(x, torch.tensor(1.0)), scorelab.load(ROOT / "digits")(x, torch.tensor(1.0)))


def test_the_command_line_samples_them_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["sample", "--model", "digits", "--n", "4", "--config.sampling.grid.n=3"]
    assert main(command) == 0
    assert "4 samples: samples/digits/drawn.png" in capsys.readouterr().out
    assert np.asarray(Image.open("samples/digits/drawn.png")).size > 0
    assert main([*command, "--condition", "10"]) == 2
    assert "--condition is '10'" in capsys.readouterr().err
    assert main(["sample", "--model", "digit"]) == 2
    assert "--model is 'digit', no directory of a saved model; did you mean 'digits'?" in capsys.readouterr().err
    assert main(["sample", "--model", "digits", "--workdir", "runs/x"]) == 2
    assert "got --model and --workdir; expected one of them" in capsys.readouterr().err


def test_what_can_not_be_loaded_is_said_in_a_line(tmp_path):
    with pytest.raises(ValueError, match=r"cifar is no directory of a model, nor one that comes with scorelab"):
        scorelab.load("cifar")
    with pytest.raises(ValueError, match="options image_size are a release's; expected release=..., one of score_sde"):
        scorelab.load("digits", image_size=32)


def test_training_goes_on_from_a_saved_model(tmp_path, capsys):
    """With its network, process and weights, and another objective; a run of its own in all else."""
    scorelab.load("digits").save(tmp_path / "digits")
    (tmp_path / "mine.py").write_text(
        "from scorelab.training import default_config\n\n\ndef get_config():\n    c = default_config()\n"
        f"    c.model.saved, c.model.conditional, c.training.label_dropout = {str(tmp_path / 'digits')!r}, True, 0.1\n"
        "    c.training.steps, c.training.sample_every, c.optim.lr = 3, 0, 1e-4\n    return c\n"
    )
    command = ["train", "--config", str(tmp_path / "mine.py"), "--workdir", str(tmp_path / "run")]
    assert main(command) == 0
    told = "with its process and prediction, whatever the config's, 749,089 parameters"
    assert f"UNet of {tmp_path / 'digits'}, {told}" in capsys.readouterr().err
    tuned, before = ScoreModel.load(tmp_path / "run"), scorelab.load("digits")
    assert tuned.sigma_range == before.sigma_range
    moved = [float((a - b).detach().abs().max()) for a, b in zip(tuned.parameters(), before.parameters(), strict=True)]
    assert 0 < max(moved) < 1e-2
    # it goes on, and is sampled from
    assert main([*command, "--config.training.steps=4"]) == 0
    assert main(["sample", "--workdir", str(tmp_path / "run"), "--n", "2", "--config.sampling.grid.n=3"]) == 0
    for changes, message in (
        (["--config.data.source=ring"], "model.saved is of data (1, 8, 8), and the data has (2,)"),
        ([f"--config.model.saved={tmp_path / 'none'}"], "model.saved: there is no directory"),
    ):
        assert main([*command[:-1], str(tmp_path / "other"), *changes]) == 2
        assert message in capsys.readouterr().err


def test_a_config_of_another_network_trains_a_saved_model_on(tmp_path, capsys):
    """Its data, loss and sampling are the config's, its network, process and prediction the model's."""
    command = ["train", "--config", "configs/digits/score_sde_subvp.py", "--workdir", str(tmp_path / "run")]
    command += ["--config.model.saved=digits", "--config.model.conditional=True", "--config.training.steps=1"]
    assert main([*command, "--config.training.sample_every=0"]) == 0
    tuned, before = ScoreModel.load(tmp_path / "run"), scorelab.load("digits")
    assert (tuned.sigma_range, tuned.prediction.name) == (before.sigma_range, before.prediction.name)
    assert main([*command, "--dry_run"]) == 0
    assert "subvp" not in capsys.readouterr().out.split("sampling:")[0]


@pytest.mark.parametrize("method", [["--method=bound", "--steps=8"], ["--tolerance=.1"]])
def test_a_saved_model_has_a_likelihood_of_the_data_of_a_config(method, tmp_path, capsys):
    scorelab.load("digits").save(tmp_path / "digits")
    command = ["likelihood", "--workdir", str(tmp_path / "digits"), "--n=3", "--bits", *method]
    command += [f"--out={tmp_path / 'x.png'}"] * (len(method) == 2)
    assert main(command) == 2
    assert "this is a saved model, which has no data; expected" in capsys.readouterr().err
    assert main([*command, "--config=configs/digits/edm.py"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["of"], found["given"]) == (3, "training data", "its class")
    (tmp_path / "ring.py").write_text(
        "from scorelab.training import default_config\n\n\ndef get_config():\n    c = default_config()\n"
        "    c.data.source = 'ring'\n    return c\n"
    )
    assert main([*command, f"--config={tmp_path / 'ring.py'}"]) == 2
    assert "the data is (2,), with None scaled to [-1, 1], and the model's is (1, 8, 8)" in capsys.readouterr().err


def test_fashion_mnist_has_the_brightness_of_the_data():
    """Its images' mean is -0.43 and their deviation 0.71, of which 20 images differ by some hundredths."""
    x, _ = drawn("fashion_mnist", 20)
    assert float(x.mean()) == pytest.approx(-0.43, abs=0.12)
    assert float(x.std()) == pytest.approx(0.705, rel=0.12)
