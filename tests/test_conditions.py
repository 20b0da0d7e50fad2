"""Conditions in data, training, run directories and the command line; objectives from a config."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from problems import F64, generator, mixture, randn
from test_distributed import ROOT, rows
from test_files import idx
from test_training import small

from scorelab import PerSampleNoise, ScoreModel, sample, sigmas
from scorelab.cli.main import main
from scorelab.cli.runs import load_run
from scorelab.cli.sampling import sample_run
from scorelab.cli.steering import Steering
from scorelab.data import Arrays, Drawn, Images, digits
from scorelab.distributions import target
from scorelab.losses import Denoising, Implicit, Objective, Sliced
from scorelab.losses.denoising import posterior_mean
from scorelab.training import Trainer, build, build_sampling, own_score, train
from scorelab.training.batches import Batches
from scorelab.training.sampling import check_sampling
from scorelab.typing import Batch


def conditional(steps: int = 6, **changes):
    return small(steps, **{"model__conditional": True, "training__label_dropout": 0.25, **changes})


def batches(data, rows=range(40), size=40, **options) -> Batches:
    objective = Denoising(sigmas.LogUniform(0.1, 10.0), reference=options.pop("reference", 0))
    device = torch.device("cpu")
    return Batches(data, objective, seed=3, size=size, rows=rows, device=device, **options)


def labelled(n: int = 200) -> Arrays:
    """Samples that say their own label."""
    labels = torch.arange(n) % 7
    return Arrays(labels.float().unsqueeze(1) + torch.rand(n, 3, generator=generator()) / 2, labels)


def test_classes_are_drawn_as_often_as_the_data_has_them():
    """Independently, of those alone that are not held out, and each by its seed and place."""
    data = Arrays(torch.rand(1000, 3), torch.tensor([0] * 500 + [1] * 300 + [3] * 200), classes="abcd")
    held = data.hold_out(400)
    counts = torch.bincount(data.labels, minlength=4) - torch.bincount(held.condition, minlength=4)
    assert torch.equal(data.class_shares(), counts.double() / 600)
    drawn = torch.stack([data.drawn_classes(100, seed) for seed in range(300)])
    assert torch.equal(drawn[7, :30], data.drawn_classes(30, 7))
    of_class = (drawn.unsqueeze(-1) == torch.arange(4)).double().sum(1)
    p, n = data.class_shares(), 100
    error = (p * (1 - p) / (300 * n)).sqrt()
    assert bool(((of_class.mean(0) / n - p).abs() <= 4 * error).all())
    assert float(of_class[:, 2].sum()) == 0
    # the counts vary as a multinomial's do, not as those of classes in turn, which are all the same
    variance = (of_class - n * p).square().mean(0)[[0, 1, 3]]
    assert torch.allclose(variance, (n * p * (1 - p))[[0, 1, 3]], rtol=4 * (2 / 300) ** 0.5)
    law = Drawn(target("labelled_ring"))
    shares = torch.bincount(law.drawn_classes(4000, 1)).double() / 4000
    assert torch.allclose(shares, torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=F64), atol=0.03)
    with pytest.raises(ValueError, match="the data has no classes"):
        Arrays(torch.rand(10, 3)).drawn_classes(4, 0)


@pytest.mark.parametrize("reference", [0, 90])
def test_labels_stay_with_their_samples(reference):
    made = batches(labelled(), conditional=True, reference=reference)
    for step in range(8):
        batch = made.at(step).batch
        assert torch.equal(batch.x0[:, 0].floor().long(), batch.condition)
        if reference:
            assert len(batch.reference.x0) == 90
            assert torch.equal(batch.reference.x0[:, 0].floor().long(), batch.reference.condition)
    assert batches(labelled()).at(0).batch.condition is None


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("source", ["stored", "drawn"])
def test_dropped_labels_follow_from_seed_step_and_place(workers, source):
    data = labelled() if source == "stored" else Drawn(target("labelled_ring"))
    options = {"conditional": True, "null": torch.tensor(9), "dropout": 0.3}
    whole = batches(data, **options)
    part = batches(data, range(13, 29), workers=workers, **options)
    dropped = 0
    for step in (0, 5, 1, 0, 200):
        a, b = whole.at(step), part.at(step)
        assert torch.equal(a.batch.condition[13:29], b.batch.condition)
        assert torch.equal(a.batch.x0[13:29], b.batch.x0)
        assert torch.equal(a.noise[13:29], b.noise)
        assert torch.equal(a.u[13:29], b.u)
        dropped += int((a.batch.condition == 9).sum())
    part.close()
    assert 0 < dropped < 200
    share = torch.cat([whole.at(step).batch.condition for step in range(100)]) == 9
    assert abs(float(share.float().mean()) - 0.3) < 5 * (0.21 / 4000) ** 0.5
    # the same samples and noise as without dropout
    plain = batches(data, conditional=True).at(5)
    kept = whole.at(5).batch.condition != 9
    assert torch.equal(plain.batch.condition[kept], whole.at(5).batch.condition[kept])
    assert torch.equal(plain.batch.x0, whole.at(5).batch.x0)


def test_conditions_of_any_shape_are_dropped_whole():
    class Described(Arrays):
        def batch(self, seed, step, size, rows=None):
            x0 = super().batch(seed, step, size, rows).x0
            return Batch(x0, x0.unsqueeze(2).expand(-1, -1, 5))

    data, null = Described(1 + torch.rand(50, 3, generator=generator())), torch.zeros(3, 5)
    found = batches(data, conditional=True, null=null, dropout=0.5).at(0).batch.condition.flatten(1)
    none = (found == 0).all(1)
    assert 5 < int(none.sum()) < 35
    assert not (found[~none] == 0).any()


def test_classes_are_named_by_folders(tmp_path):
    for k, name in enumerate(("cat", "dog", "newt")):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.fromarray(np.full((8, 8), 60 * k + i, np.uint8)).save(tmp_path / name / f"{i}.png")
    c = conditional(2, data__source="folder", data__path=str(tmp_path), training__batch_size=6)
    parts = build(c)
    assert parts.data.classes == ("cat", "dog", "newt")
    assert parts.model.num_classes == 3
    run = tmp_path.parent / "named"
    train(c, run, progress=False)
    assert json.loads((run / "data.json").read_text())["classes"] == ["cat", "dog", "newt"]
    assert main(["sample", f"--workdir={run}", "--condition=newt", "--n=3", f"--out={run}/x.npz"]) == 0
    assert np.load(run / "x.npz")["labels"].tolist() == [2, 2, 2]
    assert torch.equal(
        sample_run(run, n=3, steering=Steering(condition="newt")).x,
        sample_run(run, n=3, steering=Steering(condition="2")).x,
    )


def test_the_command_line_refuses_unknown_classes(tmp_path, capsys):
    train(conditional(2), tmp_path / "with", progress=False)
    train(conditional(2, training__label_dropout=0.0), tmp_path / "all", progress=False)
    train(small(2), tmp_path / "without", progress=False)
    for run, arguments, said in [
        ("with", ["--condition=10"], "--condition is '10'; known: 0, 1, 2,"),
        ("with", ["--condition=cat"], "--condition is 'cat'; known: 0, 1, 2,"),
        ("with", ["--condition=nnone"], "did you mean 'none'?"),
        ("with", ["--guidance=x"], "--guidance=x: expected a number"),
        ("with", ["--guidance=2", "--guidance_interval=3"], "--guidance_interval is '3'; expected two noise levels"),
        ("with", ["--guidance=2", "--guidance_interval=3,1"], "is '3,1'; expected the lower noise level first"),
        ("with", ["--condition=none", "--guidance=2"], "--guidance needs a class to guide to"),
        ("with", ["--guidance=2", "--guidance_rescale=2"], "--guidance_rescale is 2; expected a share from 0"),
        (
            "with",
            ["--guidance=2", "--autoguidance=2"],
            "--autoguidance is 2; expected an earlier step than that of the",
        ),
        ("with", ["--guidance=2", "--autoguidance=1"], "has no checkpoint of step 1; steps there: 2"),
        ("with", ["--autoguidance=1"], "--autoguidance=1 has a scale of 1, which is none; expected --guidance"),
        ("without", ["--guidance_rescale=0.5"], "--guidance needs a class to guide to"),
        ("with", ["--guidance=2", "--guidance_interval=1e4,1e5"], "the model's noise levels go from"),
        ("with", ["--config.sampling.sampler.name=ancestral", "--config.sampling.sampler.variance=learned"], "none;"),
        ("with", ["--guidance_interval=0.2,5"], "--guidance_interval has a scale of 1, which is none"),
        ("with", ["--guidance_rescale=0.5"], "--guidance_rescale has a scale of 1, which is none"),
        ("all", ["--condition=none"], "none that stands for no class; expected a condition"),
        ("all", ["--guidance=2"], "trained with training.label_dropout=0"),
        ("without", ["--condition=1"], "--condition is '1', but this model has no classes"),
        ("without", ["--guidance=2"], "--guidance needs a class to guide to"),
    ]:
        assert main(["sample", f"--workdir={tmp_path / run}", "--n=2", *arguments]) == 2, arguments
        assert said in capsys.readouterr().err, arguments


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def test_samples_of_classes_are_drawn_each_in_turn_and_guided(tmp_path, capsys):
    c = conditional(
        2, sampling__samples=27, training__sample_every=2, sampling__grid__n=4, optim__lr=0.1, training__batch_size=16
    )
    c.optim.warmup = 0
    train(c, tmp_path, progress=False)
    run = sample_run(tmp_path)
    assert run.labels.tolist() == list(range(10)) * 2
    assert run.columns == 10
    # every class in turn while training, too: 27 as they were asked for, six times as large with gaps of 2
    assert size(tmp_path / "samples" / "step_00000002.png") == (5 * 50 - 2, 6 * 50 - 2)
    assert main(["sample", f"--workdir={tmp_path}", "--condition=each", "--guidance=2"]) == 0
    assert size(tmp_path / "samples" / "drawn_00000002_each_guided_2.png") == (10 * 50 - 2, 2 * 50 - 2)
    # rows are rows: one class of the grid alone, and any part of it
    three = sample_run(tmp_path, n=20, steering=Steering(condition="3", guidance=2.0)).x
    each = sample_run(tmp_path, n=20, steering=Steering(guidance=2.0)).x
    torch.testing.assert_close(three[3::10], each[3::10], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(three[4], each[4], atol=1e-3)
    # scale 1 is the conditional score; 0 forgets the class
    assert torch.equal(sample_run(tmp_path, n=4).x, sample_run(tmp_path, n=4, steering=Steering(guidance=1.0)).x)
    torch.testing.assert_close(
        sample_run(tmp_path, n=4, steering=Steering(condition="5", guidance=0.0)).x,
        sample_run(tmp_path, n=4, steering=Steering(condition="none")).x,
    )
    # the experiment's own guidance
    _, model, _ = load_run(tmp_path)
    assert model.conditional
    assert main(["calibrate", f"--workdir={tmp_path}", "--nfe=3", "--starts=16", "--condition=3", "--guidance=2"]) == 0
    # it is a file of its own, and its advice samples with it as it was fitted
    said = capsys.readouterr().out.partition("use it with: scorelab ")[2]
    assert "sampler_3_3_guided_2.json --condition=3 --guidance=2.0" in said
    assert main([*shlex.split(said), "--n=2"]) == 0
    assert main(["likelihood", f"--workdir={tmp_path}", "--n=2"]) == 0


@pytest.mark.parametrize("classes", [True, False])
def test_a_run_is_guided_away_from_its_own_earlier_checkpoint(classes, tmp_path, capsys):
    """With classes and without: early + 2 (late - early), rescaled where that is asked for; calibrated alike."""
    options = {"training__checkpoint_every": 3, "sampling__grid__n": 4, "optim__warmup": 0, "optim__lr": 0.1}
    options["training__batch_size"] = 16
    points = {"data__source": "moons", "model__net__name": "mlp"}
    train(conditional(6, **options) if classes else small(6, **options, **points), tmp_path, progress=False)
    asked = ["--guidance=2", "--autoguidance=3", "--n=4"]
    assert main(["sample", f"--workdir={tmp_path}", *asked]) == 0
    assert (tmp_path / "samples" / f"drawn_00000006_guided_2_from_3.{'png' if classes else 'npz'}").is_file()
    config, late, _ = load_run(tmp_path)
    early = load_run(tmp_path, step=3)[1]
    labels = torch.arange(4) if classes else None
    found = sample_run(tmp_path, n=4, steering=Steering(guidance=2.0, autoguidance=3))
    config.sampling.guidance = 2.0
    score = own_score(late, config, labels, early)
    x, sigma = torch.randn(4, *late.data_shape, generator=generator()), torch.tensor(0.8)
    first, second = (m if labels is None else m.conditioned(labels) for m in (late, early))
    torch.testing.assert_close(score(x, sigma), 2 * first(x, sigma) - second(x, sigma), rtol=1e-4, atol=1e-4)
    levels, sampler = build_sampling(config, late)
    expected = sample(score, (4, *late.data_shape), levels, sampler, generator=PerSampleNoise(0))
    torch.testing.assert_close(found.x, expected, rtol=1e-4, atol=1e-4)
    # all of the deviation is brought back at the first level
    again = sample_run(tmp_path, n=4, steering=Steering(guidance=2.0, autoguidance=3, guidance_rescale=1.0)).x
    assert not torch.allclose(again, found.x, atol=1e-3)
    config.sampling.guidance_rescale = 1.0
    ends = x + sigma**2 * own_score(late, config, labels, early)(x, sigma)
    wanted = (x + sigma**2 * first(x, sigma)).flatten(1).std(1)
    torch.testing.assert_close(ends.flatten(1).std(1), wanted, rtol=1e-4, atol=1e-4)
    if classes:
        return
    capsys.readouterr()
    options = ["--nfe=3", "--starts=16", "--guidance=2", "--autoguidance=3", "--guidance_rescale=0.5"]
    assert main(["calibrate", f"--workdir={tmp_path}", *options]) == 0
    said = capsys.readouterr().out.partition("use it with: scorelab ")[2]
    assert "--guidance=2.0 --guidance_rescale=0.5 --autoguidance=3" in said
    assert main([*shlex.split(said), "--n=2"]) == 0


def test_conditional_settings_that_do_not_fit_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", randn(20, 2).numpy())
    np.savez(tmp_path / "unknown.npz", x0=randn(20, 2).numpy(), labels=np.arange(20) - 1)
    mlp = {"data__source": "arrays", "model__net__name": "mlp", "training__batch_size": 8}
    for name, said in (("x.npy", "none; expected whole numbers from 0"), ("unknown.npz", "labels from -1 to 18")):
        with pytest.raises(ValueError, match=f"needs a class for every sample, and the data has {said}"):
            build(conditional(**mlp, data__path=str(tmp_path / name)))
    with pytest.raises(ValueError, match="training.label_dropout is 1; expected 0 <= share < 1"):
        build(conditional(training__label_dropout=1.0))
    with pytest.raises(ValueError, match="training.label_dropout is 0.1, which model.conditional=False does not read"):
        build(small(training__label_dropout=0.1))
    for interval in ((1.0,), (5.0, 0.2), (-1.0, 2.0)):
        with pytest.raises(ValueError, match="sampling.guidance_interval is .*; expected noise levels .low, high.,"):
            build(conditional(sampling__guidance_interval=interval))
    nothing = {"sampling__guidance_interval": (0.2, 5.0)}, {"sampling__guidance_rescale": 0.5}
    for settings, said in (
        (nothing[0], r"sampling.guidance_interval has a scale of 1, which is none; expected sampling.guidance, such"),
        (nothing[1], r"sampling.guidance_rescale has a scale of 1, which is none; expected sampling.guidance, such"),
        ({"sampling__guidance_rescale": 2.0}, r"sampling.guidance_rescale is 2; expected a share from 0 \(none\) to 1"),
        (
            {"sampling__guidance": 2.0, "sampling__guidance_interval": (1e4, 1e5)},
            r"guidance_interval is \(10000.0, 100000.0\), and the model's .* levels go from .*; expected some of them",
        ),
    ):
        config = conditional(**settings)
        with pytest.raises(ValueError, match=said):
            check_sampling(config, build(config).model)
    for settings in nothing:
        config = conditional(**settings, sampling__guidance=2.0)
        check_sampling(config, build(config).model)
    for name, labels in (("gap", np.arange(20) % 3 + 1), ("far", 1000 * (np.arange(20) % 2))):
        np.savez(tmp_path / f"{name}.npz", x0=randn(20, 2).numpy(), labels=labels)
    with pytest.warns(RuntimeWarning, match=r"of 4 classes 1 have no sample \(0\), .* expected labels 0, 1, ..."):
        build(conditional(**mlp, data__path=str(tmp_path / "gap.npz")))
    with pytest.raises(ValueError, match=r"of 1001 classes 999 have no sample \(1, 2, 3, ...\)"):
        build(conditional(**mlp, data__path=str(tmp_path / "far.npz")))
    with pytest.raises(ValueError, match="labels go up to 3, for 2 names"):
        Images(torch.arange(4 * 4, dtype=torch.uint8).reshape(4, 1, 2, 2), torch.arange(4), classes=("a", "b"))


def test_levels_of_training_beyond_the_processs_are_told():
    """All of them are refused, a part is warned of; a normal distribution's tails are not."""
    log_uniform = {"training__sigmas__name": "log_uniform", "process__sigma_min": 0.1}
    with pytest.raises(ValueError, match=r"goes from 20\S* to 49\S*, 100% of it beyond the process's \[0.1, 10\]"):
        build(small(**log_uniform, training__sigmas__sigma_min=20.0, training__sigmas__sigma_max=50.0))
    with pytest.warns(RuntimeWarning, match="26% of it beyond the process's"):
        build(small(**log_uniform, training__sigmas__sigma_max=50.0))
    build(small(training__sigmas__name="log_normal", process__sigma_min=0.01))


def test_a_conditional_run_goes_on_bit_for_bit(tmp_path):
    """Stopped and resumed with workers, dropout of labels and of activations, and a stable target."""
    options = {"data__workers": 2, "training__objective__reference": 900, "training__validate_every": 2}
    options |= {"data__validation": 40}
    train(conditional(6, **options), tmp_path / "whole", progress=False)
    train(conditional(4, **options), tmp_path / "parts", progress=False)
    train(conditional(6, **options), tmp_path / "parts", progress=False)
    for file in sorted((tmp_path / "whole" / "checkpoints" / "step_00000006").glob("*.safetensors")):
        other = tmp_path / "parts" / "checkpoints" / "step_00000006" / file.name
        assert file.read_bytes() == other.read_bytes(), file.name
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*/conditional.py")), ids=lambda p: p.parent.name)
def test_the_conditional_experiments_are_whole(path, tmp_path, capsys):
    if path.parent.name == "fashion_mnist":
        images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
        (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx((np.arange(40) % 10).astype(np.uint8)))
    more = [] if path.parent.name == "digits" else [f"--config.data.path={tmp_path}", "--config.data.validation=10"]
    assert main(["train", f"--config={path}", "--dry_run", *more]) == 0
    assert "conditional: true" in capsys.readouterr().out


def test_stable_targets_average_over_the_same_class():
    """Written out: of each row the softmax over the reference's samples of its class, over all if it has none."""
    x0, labels = 2 * randn(30, 2), torch.arange(30) % 3
    batch = Batch(x0[:6], torch.tensor([0, 1, 2, 0, 7, 1]), Batch(x0, labels))
    seen: list[torch.Tensor] = []

    def score(x, sigma, condition):
        seen.extend([x, sigma])
        return torch.zeros_like(x)

    u, noise = torch.linspace(0.1, 0.9, 6, dtype=F64), randn(6, 2, seed=8)
    losses = Denoising(sigmas.LogUniform(0.5, 5.0), reference=30).losses(score, batch, u, noise)
    x, sigma = seen
    for i, label in enumerate(batch.condition.tolist()):
        among = x0[labels == label] if label < 3 else x0
        weight = torch.softmax(-(x[i] - among).square().sum(1) / (2 * sigma[i] ** 2), 0)
        eps = (x[i] - weight @ among) / sigma[i]
        torch.testing.assert_close(losses[i], eps.square().mean())
    nobody = torch.zeros(6, 30, dtype=torch.bool)
    assert torch.equal(posterior_mean(x, sigma, x0, nobody), posterior_mean(x, sigma, x0))
    with pytest.raises(ValueError, match=r"averages over samples of the same class, and conditions are \(6, 4\)"):
        Denoising(sigmas.LogUniform(0.5, 5.0), reference=30).losses(
            score, Batch(x0[:6], torch.zeros(6, 4), Batch(x0, torch.zeros(30, 4))), u, noise
        )


OBJECTIVES: dict[str, Objective] = {
    "implicit": Implicit(sigmas.LogUniform(0.5, 5.0)),
    "sliced": Sliced(sigmas.LogUniform(0.5, 5.0), probes=2),
    "sliced, both squared": Sliced(sigmas.LogUniform(0.5, 5.0), probes=2, variance_reduced=False),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_other_objectives_are_denoising_but_for_a_constant(name):
    """In expectation: their difference of two scores is denoising score matching's, at the same noise and levels."""
    d, objective = mixture(), OBJECTIVES[name]
    n = 40_000
    u = (torch.arange(n) + 0.5) / n
    batch = Batch(d.sample(n, generator()))

    def wrong(x, sigma):
        return 0.8 * d.score(x, sigma) + 0.1

    noise = randn(n, 2, seed=1) if objective.draws == 1 else randn(n, objective.draws, 2, seed=1)
    found = objective.losses(wrong, batch, u, noise) - objective.losses(d.score, batch, u, noise)
    plain = Denoising(objective.sigmas)
    first = noise if objective.draws == 1 else noise[:, 0]
    expected = plain.losses(wrong, batch, u, first) - plain.losses(d.score, batch, u, first)
    gap = (found - expected).detach()
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / n**0.5
    assert float(expected.mean()) > 10 * float(expected.std()) / n**0.5
    assert objective.zero(batch, u, noise).abs().max() == 0


@pytest.mark.parametrize("name", ["implicit", "sliced"])
def test_other_objectives_train_from_a_config(name, tmp_path, capsys):
    c = small(4, data__source="moons", model__net__name="mlp", training__objective__name=name, training__batch_size=64)
    c.model.prediction = "eps"
    train(c, tmp_path, progress=False)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert found[0]["loss"] == 0  # the network begins as the score of N(0, sigma^2 + sd^2), or 0
    assert found[-1]["loss"] < 0
    assert main(["report", f"--workdir={tmp_path}"]) == 0
    # images by their exact trace, and in several parts
    options = {"training__objective__name": name, "training__batch_size": 2, "model__net__dropout": 0.0}
    options["model__net__width"] = 8
    c, whole = small(2, training__accumulate=2, **options), small(2, **options)
    a, b = Trainer(build(c), c), Trainer(build(whole), whole)
    for _ in range(2):
        x, y = a.advance(), b.advance()
        assert x.loss == pytest.approx(y.loss, rel=1e-4)
        assert x.gradient_norm == pytest.approx(y.gradient_norm, rel=1e-4)


def test_an_average_of_a_conditional_network_is_found_again(tmp_path):
    model = train(conditional(4), tmp_path, progress=False)
    again = ScoreModel.load(tmp_path / "checkpoints" / "step_00000004", weights="ema.safetensors")
    x, sigma, y = digits().reference()[:3], torch.tensor(1.0), torch.tensor([9, 0, 4])
    assert torch.equal(again.conditioned(y)(x, sigma), model.conditioned(y)(x, sigma))
    assert Path(tmp_path / "checkpoints").is_dir()
