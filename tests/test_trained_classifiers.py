"""Classifiers of noisy samples that are trained from configs, and guide by the command line."""

from __future__ import annotations

import math
import runpy
import shutil
from dataclasses import replace

import pytest
import torch
from problems import F64, generator, randn
from test_distributed import ROOT
from test_training import same_files, small

from scorelab import ClassifierModel, PerSampleNoise, ScoreModel, sample
from scorelab.cli.main import main
from scorelab.cli.runs import load_run
from scorelab.cli.sampling import sample_run
from scorelab.cli.steering import Steering
from scorelab.guidance import classifier
from scorelab.losses import CrossEntropy
from scorelab.sigmas import LogUniform
from scorelab.training import build, build_sampling, train
from scorelab.training.evaluations import evaluations
from scorelab.training.settings import resolve
from scorelab.typing import Batch


class Same(torch.nn.Module):
    def forward(self, x, label):
        return x


def config(steps: int = 4):
    c = runpy.run_path(str(ROOT / "configs" / "digits" / "classifier.py"))["get_config"]()
    c.model.net.width, c.model.net.head, c.data.validation = 8, 8, 40
    c.training.steps, c.training.batch_size, c.training.checkpoint_every = steps, 16, 2
    c.training.log_every = c.training.validate_every = 2
    c.training.precision, c.training.channels_last = "fp32", "no"
    return c


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A classifier's run and those of scores: without classes, with them, and with them but not without."""
    folder = tmp_path_factory.mktemp("runs")
    train(config(), folder / "classifier", progress=False)
    changes = {"model__conditional": True, "training__label_dropout": 0.0}
    for name, more in {"free": {}, "always": changes, "both": {**changes, "training__label_dropout": 0.2}}.items():
        c = small(1, training__batch_size=16, sampling__grid__n=4, process__sigma_min=0.02, **more)
        train(c, folder / name, progress=False)
    return folder


def test_the_loss_is_minus_the_log_of_the_share_of_the_right_class():
    """With logits W x + log sigma c, by hand; all classes alike cost log K."""
    objective = CrossEntropy(LogUniform(0.1, 10.0), 3)
    weight, u = randn(3, 5, seed=1), torch.tensor([0.2, 0.5, 0.9, 0.95], dtype=F64)
    x0, noise, classes = randn(4, 5, seed=2), randn(4, 5, seed=3), torch.tensor([0, 2, 1, 2])
    sigma = 0.1 * 100**u
    torch.testing.assert_close(objective.levels(u), sigma)

    def model(x, s):
        return x @ weight.T + s.log().unsqueeze(1) * torch.arange(3)

    logits = model(x0 + sigma.unsqueeze(1) * noise, sigma)
    expected = [
        math.log(sum(math.exp(a - row[k]) for a in row)) for row, k in zip(logits.tolist(), classes, strict=True)
    ]
    batch = Batch(x0, classes)
    torch.testing.assert_close(objective.losses(model, batch, u, noise), torch.tensor(expected, dtype=F64))
    assert objective.zero(batch, u, noise).tolist() == pytest.approx([math.log(3)] * 4)
    right = [float(max(range(3), key=row.__getitem__) == k) for row, k in zip(logits.tolist(), classes, strict=True)]
    assert objective.right(model, batch, u, noise).tolist() == right
    with pytest.raises(ValueError, match="the batch has none"):
        objective.losses(model, Batch(x0), u, noise)


def test_a_run_resumes_bit_for_bit_and_is_loaded(runs, tmp_path):
    shutil.copytree(runs / "classifier", tmp_path / "cut")
    train(config(), tmp_path / "cut", progress=False, step=2)
    name = "checkpoints/step_00000004"
    same_files(runs / "classifier" / name, tmp_path / "cut" / name)
    model = ClassifierModel.load(runs / "classifier")
    x, sigma = randn(3, 1, 8, 8).float(), torch.tensor([0.1, 1.0, 9.0])
    assert model(x, sigma).shape == (3, 10)
    model.save(tmp_path / "saved")
    again = ClassifierModel.load(tmp_path / "saved")
    assert torch.equal(again(x, sigma), model(x, sigma))
    assert again.num_classes == 10
    assert "10 classes" in repr(again)
    # by the steps of its process, the least noise first
    seen = []
    again.net.register_forward_pre_hook(lambda net, given: seen.append(given[1]))
    again(x, again.process.step_sigmas[[0, 400, 999]].float())
    torch.testing.assert_close(seen[0], torch.tensor([0.0, 400.0, 999.0]), rtol=1e-4, atol=1e-2)
    rows = (runs / "classifier" / "metrics.jsonl").read_text()
    assert '"accuracy"' in rows
    assert '"sample_mean"' not in rows
    assert [e.what for e in evaluations(resolve(config()))] == ["validation loss", "accuracy"]


@pytest.mark.parametrize("name", ["free", "always", "both"])
def test_it_guides_what_knows_classes_and_what_does_not(name, runs):
    """Without the class where the score can be had without it; one that has it always is sharpened."""
    steering = Steering(condition="each", guidance=2.0, classifier=str(runs / "classifier"))
    found = sample_run(runs / name, n=4, steering=steering)
    settings, model, _ = load_run(runs / name)
    labels = torch.arange(4)
    log_prob = ClassifierModel.load(runs / "classifier").conditioned(labels)
    score = classifier(model.conditioned(labels) if name == "always" else model, log_prob, 2.0)
    levels, sampler = build_sampling(settings, model)
    expected = sample(score, (4, 1, 8, 8), levels, sampler, generator=PerSampleNoise(0))
    torch.testing.assert_close(found.x, expected, rtol=1e-4, atol=1e-4)
    assert found.labels.tolist() == [0, 1, 2, 3]
    assert main(["sample", f"--workdir={runs / name}", "--n=2", f"--classifier={runs / 'classifier'}"]) == 0
    assert (runs / name / "samples" / "drawn_00000001_by_classifier.png").is_file()


def test_it_guides_at_the_levels_that_it_knows_only():
    """A score that goes further down is left alone there, and the whole knows what the score does."""

    class Known:
        sigma_range = (0.01, 5.0)

        def __call__(self, x, sigma):
            return -x

    class Told:
        sigma_range = (0.1, 10.0)

        def __call__(self, x, sigma):
            return x.flatten(1).sum(1)

    whole, inside = classifier(Known(), Told()), classifier(Known(), Told(), interval=(0.1, 10.0))
    assert whole.sigma_range == (0.1, 5.0)
    assert inside.sigma_range == (0.01, 5.0)
    x = randn(2, 3)
    assert torch.equal(inside(x, torch.tensor(0.05)), -x)
    torch.testing.assert_close(inside(x, torch.tensor(0.5)), 1 - x)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sample", "--workdir={runs}/classifier"], "it holds a classifier model and no score model"),
        (["sample", "--workdir={runs}/free", "--classifier={runs}/both"], "it holds a score model and no classifier"),
        (["sample", "--workdir={runs}/free", "--classifier={runs}/none"], "there is no directory"),
        (
            ["sample", "--workdir={runs}/free", "--classifier={runs}/classifier", "--condition=none"],
            "--classifier guides to a class, and --condition is none",
        ),
        (["sample", "--workdir={runs}/free", "--classifier={runs}/classifier", "--condition=cat"], "known: 0, 1, 2"),
        (
            ["sample", "--workdir={runs}/free", "--classifier={runs}/classifier", "--autoguidance=1"],
            "expected one of them",
        ),
        (
            ["sample", "--workdir={runs}/free", "--classifier={runs}/classifier", "--guidance_rescale=0.5"],
            "guidance_rescale is 0.5, which a classifier does not know",
        ),
        (
            ["sample", "--model=fashion_mnist", "--classifier={runs}/classifier"],
            "is of data (1, 8, 8) from (0.0, 16.0)",
        ),
        (["train", "--config.model.conditional=False"], "learns classes; expected model.conditional=True"),
        (["train", "--config.training.objective.name=denoising"], "expected training.objective.name='cross_entropy'"),
        (["train", "--config.training.label_dropout=0.1"], "the network has no null_condition"),
    ],
)
def test_what_does_not_go_together_is_said_in_a_line(arguments, said, runs, capsys):
    if arguments[0] == "train":
        arguments = [*arguments, f"--config={ROOT}/configs/digits/classifier.py", "--dry_run"]
    assert main([a.format(runs=runs) for a in arguments]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_other_classes_are_refused_and_other_levels_told(runs, tmp_path):
    model = ScoreModel.load(runs / "both")
    other = ClassifierModel.load(runs / "classifier")
    narrow = Steering(classifier=str(tmp_path / "narrow"))
    made = ClassifierModel(other.net, model.process, data_shape=(1, 8, 8), data_range=other.data_range)
    made.process = type(model.process)(1.0, 5.0)
    made.save(tmp_path / "narrow")
    with pytest.warns(RuntimeWarning, match="knows noise levels from 1 to 5 and guides at those only") as told:
        assert sample_run(runs / "free", n=2, steering=narrow).x.isfinite().all()
    assert sum("knows noise levels" in str(w.message) for w in told) == 1
    # all that is asked for is known, or nothing
    assert sample_run(runs / "free", n=2, steering=replace(narrow, guidance_interval="1.5,3")).x.isfinite().all()
    with pytest.raises(ValueError, match="from 1 to 5, and is to guide from 6 to 9; expected some of its own among"):
        sample_run(runs / "free", n=2, steering=replace(narrow, guidance_interval="6,9"))
    with pytest.raises(
        ValueError, match="guidance_interval has a scale of 0, which is none; expected --guidance, such"
    ):
        sample_run(runs / "free", n=2, steering=replace(narrow, guidance=0.0, guidance_interval="2,3"))
    six = type(other.net)((1, 8, 8), 6, width=8, multipliers=(1, 2), blocks=1, attention=(1,), head=8)
    ClassifierModel(six, other.process, data_shape=(1, 8, 8), data_range=other.data_range).save(tmp_path / "six")
    with pytest.raises(ValueError, match="tells 6 classes apart, and the model knows 10"):
        sample_run(runs / "both", n=2, steering=Steering(classifier=str(tmp_path / "six")))
    with pytest.raises(ValueError, match=r"returned shape \(2, 1, 8, 8\) for 2 samples; expected \(B, classes\)"):
        ClassifierModel(Same(), other.process, data_shape=(1, 8, 8))(
            torch.randn(2, 1, 8, 8, generator=generator()), torch.tensor(1.0)
        )


def test_a_classifier_of_hardly_noised_images_is_no_mistake(recwarn):
    """Nothing begins at its largest noise, as samples do."""
    c = runpy.run_path(str(ROOT / "configs" / "digits" / "features.py"))["get_config"]()
    model = build(c).model
    assert model.sigma_range == pytest.approx((0.01, 0.1))
    assert [w for w in recwarn if "would begin far" in str(w.message)] == []
