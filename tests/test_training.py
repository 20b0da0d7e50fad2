from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from problems import generator

from scorelab import VE, ScoreModel, losses, sample, sigmas
from scorelab.cli.main import main
from scorelab.data import Arrays, Drawn, Values, digits, load
from scorelab.distributions import target
from scorelab.losses import Denoising
from scorelab.models import UnitVariance
from scorelab.nn import UNet
from scorelab.predictions import edm
from scorelab.training import (
    EMA,
    Experiment,
    NonFiniteError,
    Trainer,
    build,
    build_sampling,
    checkpoint,
    default_config,
    train,
)
from scorelab.training.optim import SCHEDULES, learning_rate
from scorelab.training.watch import TIMINGS

ROOT = Path(__file__).parent.parent


def small(steps: int = 6, **changes):
    c = default_config()
    c.model.net.width, c.model.net.blocks, c.model.net.multipliers, c.model.net.dropout = 8, 1, (1, 2), 0.1
    c.process.sigma_max = 10.0
    c.training.steps, c.training.batch_size = steps, 400  # 1797 digits: epochs end inside batches
    c.training.checkpoint_every, c.training.log_every = 2, 1
    c.training.validate_every = c.training.sample_every = 0
    # what "auto" means differs from machine to machine
    c.training.precision, c.training.channels_last = "fp32", "no"
    for key, value in changes.items():
        *groups, name = key.split("__")
        place = c
        for group in groups:
            place = place[group]
        if name == "name":
            # what a part lacks is refused
            for other in {"model.net": ("blocks", "multipliers", "dropout"), "process": ("sigma_max",)}.get(
                ".".join(groups), ()
            ):
                if other in place:
                    del place[other]
        place[name] = value
    return c


def same_files(a: Path, b: Path) -> None:
    for name in ("model.safetensors", "ema.safetensors", "model.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    one, two = (torch.load(p / "training.pt", weights_only=True) for p in (a, b))
    assert one["step"] == two["step"]
    assert one["averages"] == two["averages"]
    assert torch.equal(one["sums"], two["sums"])
    for key, state in one["optimiser"]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(two["optimiser"]["state"][key][name]))


def rows(workdir: Path) -> list[dict]:
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in found]


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path):
    """Stopped in the middle of an epoch, with dropout, EMA, warm-up and a cosine schedule on."""
    c = small(optim__schedule__name="cosine", optim__warmup=3)
    train(c, tmp_path / "whole", progress=False)
    train(c, tmp_path / "parts", progress=False)
    for step in (4, 6):
        shutil.rmtree(tmp_path / "parts" / "checkpoints" / f"step_{step:08d}")
    train(c, tmp_path / "parts", progress=False)
    for step in (2, 4, 6):
        same_files(*(tmp_path / w / "checkpoints" / f"step_{step:08d}" for w in ("whole", "parts")))
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    assert [r["step"] for r in rows(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]


def test_training_leaves_global_random_state_alone(tmp_path):
    before = torch.random.get_rng_state()
    train(small(2), tmp_path, progress=False)
    assert torch.equal(before, torch.random.get_rng_state())


def test_ema_warms_up_and_never_touches_the_weights():
    weight = torch.nn.Parameter(torch.zeros(1))
    ema, expected, share = EMA([weight], 0.9), 0.0, 1.0
    model = ScoreModel(torch.nn.ParameterList([weight]), VE(), data_shape=(1,))
    for n in range(300):
        weight.data.fill_(n + 1.0)
        ema.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected, share = decay * expected + (1 - decay) * (n + 1), share * decay
        assert float(ema.average[0]) == pytest.approx(expected, rel=1e-5)
        assert float(weight.detach()) == n + 1
    assert ema.decay == 0.9
    assert ema.initial_share == pytest.approx(share)
    assert float(ema.weights(model)["0"]) == pytest.approx(expected, rel=1e-5)
    assert float(weight.detach()) == 300


def test_learning_rate_and_clipping():
    c = small(10, optim__warmup=4, optim__lr=1.0, optim__schedule__name="cosine", optim__clip=1e-3)
    found = []
    for step in range(10):
        found.append(learning_rate(1.0, c.optim.warmup, SCHEDULES["cosine"](10), step))
    assert found == pytest.approx([min(1, (i + 1) / 4) * 0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(10)])


class Broken(Arrays):
    """Digits of which one turns NaN at the third step."""

    def batch(self, seed, step, size, rows=None):
        batch = super().batch(seed, step, size, rows)
        if step == 2:
            batch.x0[5] = math.nan
        return batch


def test_non_finite_losses_stop_before_any_weight_changes():
    c = small()
    parts = build(c)
    data = digits()
    trainer = Trainer(Experiment(Broken((data.reference() + 1) / 2, None, (0.0, 1.0)), parts.model, parts.objective), c)
    trainer.advance()
    trainer.advance()
    kept = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"step 2: the loss is not finite at sigma = "):
        trainer.advance()
    assert all(torch.equal(v, kept[k]) for k, v in trainer.model.state_dict().items())


def test_non_finite_steps_are_left_out_up_to_a_limit():
    """Weights stay what they were, the next step is the one after; past the limit it is an error."""
    config = small(training__skip_nonfinite=2)
    trainer = Trainer(build(config), config)
    trainer.advance()
    before = [p.detach().clone() for p in trainer.parameters]
    objective, losses_of = trainer.experiment.objective, type(trainer.experiment.objective).losses

    def broken(score, batch, u, noise):
        found = losses_of(objective, score, batch, u, noise)
        return found + torch.tensor([math.nan, *[0.0] * (len(found) - 1)])

    object.__setattr__(objective, "losses", broken)
    for step in (1, 2):
        with pytest.warns(RuntimeWarning, match=rf"step {step} is skipped: the loss is not finite at sigma = .*\(1 of"):
            assert trainer.advance() is None
    with pytest.raises(NonFiniteError, match="step 3: .* 2 steps were skipped before"):
        trainer.advance()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    object.__delattr__(objective, "losses")
    assert trainer.advance().step == 4


def test_accumulation_changes_nothing_but_rounding():
    options = {"training__batch_size": 24, "model__net__dropout": 0.0}
    whole, parts = small(**options), small(training__accumulate=4, **options)
    a, b = Trainer(build(whole), whole), Trainer(build(parts), parts)
    for _ in range(3):
        x, y = a.advance(), b.advance()
        assert y.loss == pytest.approx(x.loss, rel=1e-5)
        assert y.gradient_norm == pytest.approx(x.gradient_norm, rel=1e-4)
    with pytest.raises(ValueError, match="accumulate is 5 for a batch_size of 24; expected a divisor"):
        build(small(training__accumulate=5, **options))


def test_old_checkpoints_are_removed(tmp_path):
    options = {"training__checkpoint_every": 1, "training__keep_last": 2, "training__keep_every": 3}
    folder = tmp_path / "checkpoints"
    train(small(8, **options), tmp_path, progress=False)
    assert sorted(p.name[-2:] for p in folder.iterdir()) == ["03", "06", "07", "08"]
    # what a killed process left behind is swept away
    shutil.copytree(folder / "step_00000006", folder / ".removing_step_00000006")
    train(small(9, **options), tmp_path, progress=False)
    assert sorted(p.name[-2:] for p in folder.iterdir()) == ["03", "06", "08", "09"]


def test_who_may_read_a_runs_files_may_read_its_weights(tmp_path):
    """As the umask says, not as a library that writes them does."""
    umask = os.umask(0o027)
    try:
        train(small(2), tmp_path / "run", progress=False)
        ScoreModel.load(tmp_path / "run").save(tmp_path / "saved")
    finally:
        os.umask(umask)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} >= {".safetensors", ".json", ".pt"}
    assert {p.stat().st_mode & 0o777 for p in files} == {0o640}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number, monkeypatch, capsys):
    command = [sys.executable, "-m", "scorelab.cli", "train", "--config", "configs/digits/ncsn.py"]
    command += ["--config.training.steps=100000", "--config.training.log_every=1", "--workdir", str(tmp_path / "run")]
    command += ["--config.training.batch_size=16", "--config.model.net.width=8", "--config.training.sample_every=0"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.05)
    # nobody else trains there meanwhile
    monkeypatch.chdir(ROOT)
    assert main(command[3:]) == 2
    assert "run is being trained by another process; wait for it or stop it" in capsys.readouterr().err
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    step = checkpoint.verify(checkpoint.latest(tmp_path / "run" / "checkpoints"))
    assert step >= 3
    assert f"stopped and saved at step {step}; the same command goes on from there" in said
    assert "Traceback" not in said


def test_where_directories_cannot_be_locked_training_goes_on_with_a_warning(tmp_path, monkeypatch):
    def refused(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.warns(RuntimeWarning, match="can't be locked .*No locks available.*by one process only"):
        train(small(2), tmp_path, progress=False)
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step_00000002"


def test_a_full_disk_costs_no_checkpoint(tmp_path):
    """A limit on the size of files stands for a disk that fills up while a checkpoint is written."""
    train(small(2), tmp_path, progress=False)
    folder = tmp_path / "checkpoints"
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, kept[1]))
        with pytest.raises(OSError, match="checkpoint of step 4 could not be written .*; earlier ones are kept"):
            train(small(4), tmp_path, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
        signal.signal(signal.SIGXFSZ, handler)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    train(small(4), tmp_path, progress=False)
    assert checkpoint.verify(folder / "step_00000004") == 4


def test_no_checkpoint_holds_a_non_finite_weight(tmp_path):
    c = small()
    trainer = Trainer(build(c), c)
    next(trainer.model.parameters()).data[0] = math.inf
    with pytest.raises(ValueError, match="not finite at step 0"):
        trainer.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    """A run with checkpoints of steps 2 and 4, that of step 2 a run's own."""
    folder = tmp_path_factory.mktemp("whole")
    train(small(2), folder / "half", progress=False)
    shutil.copytree(folder / "half", folder / "whole")
    train(small(4), folder / "whole", progress=False)
    return folder


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "manifest", "no manifest"])
def test_damage_costs_the_steps_since_the_checkpoint_before(tmp_path, damage, four_steps):
    """It is set aside, and the run goes on from the one before; without one it is refused and kept."""
    whole = four_steps / "whole"
    shutil.copytree(four_steps / "half", tmp_path / "run")
    tmp_path = tmp_path / "run"
    place = tmp_path / "checkpoints" / "step_00000002"
    file = place / "model.safetensors"
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[:-10])
    elif damage == "flipped":
        file.write_bytes(content[:-10] + bytes(10))
    elif damage == "missing":
        file.unlink()
    elif damage == "manifest":
        (place / "manifest.json").write_text("{")
    else:
        (place / "manifest.json").unlink()
    before = sorted(p.name for p in place.iterdir())
    with pytest.raises(ValueError, match=r"step_00000002.*no earlier one is whole: remove .*checkpoints to begin anew"):
        train(small(4), tmp_path, progress=False)
    assert sorted(p.name for p in place.iterdir()) == before
    place.rename(place.with_name("step_00000003"))
    shutil.copytree(whole / "checkpoints" / "step_00000002", place)
    with pytest.warns(
        RuntimeWarning, match=r"step_00000003.*set aside as damaged_step_00000003, and step_00000002 taken"
    ):
        train(small(4), tmp_path, progress=False)
    assert sorted(p.name for p in (place.parent / "damaged_step_00000003").iterdir()) == before
    same_files(*(p / "checkpoints" / "step_00000004" for p in (tmp_path, whole)))


def test_what_was_being_written_is_never_taken_for_a_checkpoint(tmp_path):
    train(small(2), tmp_path, progress=False)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step_00000002", folder / ".writing_step_00000004")
    assert checkpoint.latest(folder) == folder / "step_00000002"
    train(small(4), tmp_path, progress=False)
    assert checkpoint.verify(folder / "step_00000004") == 4


def test_another_experiments_directory_is_refused_and_left_alone(tmp_path):
    train(small(2), tmp_path, progress=False)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"optim.lr: 0.001 there, 0.1 now"):
        train(small(2, optim__lr=0.1), tmp_path, progress=False)
    assert (tmp_path / "config.json").read_bytes() == before
    train(small(3), tmp_path, progress=False)  # going on for longer is no other experiment
    # nor is a setting that did not exist when the run began, at its default
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["optim"]["warmup"], settings["training"]["fsdp"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    train(small(4), tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"optim.warmup: 100 there, 5 now.*--accept_changes"):
        train(small(5, optim__warmup=5), tmp_path, progress=False)
    train(small(5, optim__lr=0.1), tmp_path, progress=False, accept_changes=True)
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["lr"] == 0.1
    assert rows(tmp_path)[-1]["step"] == 5
    # how samples are drawn may change, but not the levels where they are what the network is told
    options = {"model__label": "index", "training__sigmas__name": "sequence", "training__sigmas__levels": 6}
    indexed = tmp_path.parent / "indexed"
    train(small(2, **options), indexed, progress=False)
    train(small(3, sampling__sampler__name="ddim", sampling__sampler__eta=0.5, **options), indexed, progress=False)
    with pytest.raises(ValueError, match="training.sigmas.levels: 6 there, 7 now"):
        train(small(4, **{**options, "training__sigmas__levels": 7}), indexed, progress=False)
    # what it wrote is not begun over when its checkpoints are gone
    (tmp_path / "checkpoints").rename(tmp_path.parent / "elsewhere")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"metrics up to step 5, but .*checkpoints holds no checkpoint: put them back"
        ):
            train(small(6, optim__lr=0.1), tmp_path, progress=False)
    assert rows(tmp_path)[-1]["step"] == 5
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="not empty"):
        train(small(2), foreign, progress=False)
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("channels", [1, 4])
def test_odd_images_train_and_sample(channels):
    images = torch.rand(50, channels, 7, 5, generator=generator())
    data = Arrays(images, data_range=(0.0, 1.0))
    net = UNet((channels, 7, 5), width=8, multipliers=(1, 2), blocks=1, attention=(1,), head=8)
    model = ScoreModel(
        net, VE(0.1, 10.0), edm(0.5), data_shape=(channels, 7, 5), input_scale=UnitVariance(0.5), label="log_sigma"
    )
    c = small()
    c.training.batch_size = 16
    trainer = Trainer(Experiment(data, model, Denoising(sigmas.LogUniform(0.1, 10.0))), c)
    assert trainer.advance() is not None
    x = sample(
        trainer.averaged(), (3, channels, 7, 5), sigmas.karras(4, sigma_min=0.1, sigma_max=10), generator=generator()
    )
    assert x.shape == (3, channels, 7, 5)


def test_training_learns():
    """200 steps on the two modes: the loss falls from the zero predictor's 1 towards what the true score leaves."""
    c = default_config()
    c.data.source, c.model.net.name, c.model.prediction = "two_modes", "mlp", "edm"
    c.process.sigma_min, c.process.sigma_max = 0.1, 100.0
    c.training.sigmas.name, c.training.batch_size, c.training.steps = "log_uniform", 256, 200
    c.optim.lr, c.training.weighting.name = 5e-3, "sigma2"
    trainer = Trainer(build(c), c)
    for _ in range(200):
        trainer.advance(measure=False)
    data = target("two_modes")
    x0 = data.sample(20_000, generator())
    objective = Denoising(sigmas.LogUniform(0.1, 100.0))
    with torch.no_grad():
        learnt = float(objective(trainer.averaged(), x0, generator(1)).loss.mean())
        best = float(objective(data.score, x0, generator(1)).loss.mean())
    assert best < learnt < best + 0.03
    assert next(iter(losses.WEIGHTINGS)) == c.training.weighting.name


def test_data():
    d = digits()
    assert d.data_shape == (1, 8, 8)
    assert float(d.reference().min()) == -1
    assert float(d.reference().max()) == 1
    assert d.values == Values(0.0, 16.0, 1.0, (0.0, 16.0))
    # an epoch is a permutation: every digit once, in another order the next time
    first = torch.cat([d.batch(0, i, 599).x0 for i in range(3)])
    second = torch.cat([d.batch(0, i, 599).x0 for i in range(3, 6)])
    assert torch.equal(first.flatten(1).sum(1).sort().values, d.reference().flatten(1).sum(1).sort().values)
    assert not torch.equal(first, second)
    assert torch.equal(d.batch(0, 2, 700).x0, d.batch(0, 2, 700).x0)
    points = load("moons")
    assert isinstance(points, Drawn)
    assert torch.equal(points.batch(1, 5, 10).x0, points.batch(1, 5, 10).x0)
    assert not torch.equal(points.batch(1, 5, 10).x0, points.batch(1, 6, 10).x0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Arrays(torch.zeros(0, 2)), "empty"),
        (lambda: Arrays(torch.ones(5, 2)), "constant"),
        (lambda: Arrays(torch.tensor([[0.0], [math.nan]])), "not finite at 1 of 2"),
        (lambda: Arrays(torch.tensor([[0.0], [255.0]]), data_range=(-1, 1)), r"spans \[0, 255\] but .* \[-1, 1\]"),
        (lambda: Arrays(torch.rand(5, 2), torch.zeros(4)), "4 labels for 5"),
        (lambda: load("digit"), "did you mean 'digits'"),
        (lambda: build(small(process__name="vee")), "did you mean 've'"),
        (lambda: build(small(training__steps=0)), "training.steps"),
        (lambda: build(small(training__weighting__name="sigma")), "did you mean 'sigma2'"),
        (lambda: Trainer(build(small()), small(optim__schedule__name="step")), "schedule"),
        (lambda: EMA([], 1.0), "decay"),
        (lambda: build_sampling(small(sampling__grid__name="steps"), build(small()).model), "DDPM"),
        (lambda: build_sampling(small(sampling__sampler__name="eular"), build(small()).model), "did you mean 'euler'"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
