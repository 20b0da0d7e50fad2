"""What a new user meets in the first hour: settings left at their defaults, own data, own choices of sampling."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from PIL import Image

from scorelab import (
    VP,
    PerSampleNoise,
    ScoreModel,
    broadcast,
    check_score,
    from_eps,
    from_time_score,
    log_likelihood,
    predictions,
    sample,
    sigmas,
    trajectory,
)
from scorelab.cli.main import main
from scorelab.cli.reference import reference
from scorelab.cli.runs import load_run
from scorelab.cli.sampling import RunSamples, write_samples
from scorelab.data import Values
from scorelab.distributions import target
from scorelab.nn import MLP, UNet, fitting
from scorelab.plotting import density, figure
from scorelab.plotting.pictures import scatter, tiled
from scorelab.processes import Cosine
from scorelab.samplers import Langevin, Sampler
from scorelab.training import Trainer, build, build_sampling, default_config, train, with_nfe
from scorelab.training.config import scales_of
from scorelab.training.evaluations import Samples
from scorelab.training.settings import PARTS

ROOT = Path(__file__).parent.parent


def spiral(count: int = 2000) -> np.ndarray:
    """A spiral in millimetres, off the origin."""
    rng = np.random.default_rng(0)
    t = 4 * math.pi * np.sqrt(rng.uniform(0.05, 1, count))
    return 8 * np.stack([t * np.cos(t), t * np.sin(t)], 1) + rng.normal(size=(count, 2)) + [98, -20]


def defaults(tmp_path, data: np.ndarray, **changes):
    np.save(tmp_path / "x.npy", data)
    c = default_config()
    c.data.source, c.data.path = "arrays", str(tmp_path / "x.npy")
    for key, value in changes.items():
        c.training[key] = value
    return c


def test_vectors_in_any_unit_are_learnt_with_the_defaults(tmp_path, capsys):
    """Mean and spread of 1,000 samples within a tenth of the data's."""
    data = spiral()
    c = defaults(tmp_path, data, steps=600, sample_every=0, validate_every=0)
    model = train(c, tmp_path / "run")
    said = capsys.readouterr().err
    assert "2000 samples of shape (2,)" in said
    assert "as codes by Standardise" in said
    assert type(model.net) is MLP
    out = tmp_path / "x.npz"
    assert main(["sample", f"--workdir={tmp_path / 'run'}", "--n=1000", f"--out={out}"]) == 0
    x = np.load(out)["samples"]
    np.testing.assert_allclose(x.std(0), data.std(0), rtol=0.1)
    np.testing.assert_allclose(x.mean(0), data.mean(0), rtol=0, atol=0.1 * data.std())


def test_what_is_left_open_follows_from_the_data_and_is_kept(tmp_path):
    x = 3 * torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    found = scales_of(x)
    assert found.sigma_data == pytest.approx(float(x.square().mean().sqrt()))
    assert found.sigma_min == pytest.approx(found.sigma_data / 250)
    assert found.sigma_max == pytest.approx(max(float(torch.pdist(x).max()), 20 * found.sigma_data))
    # in many dimensions the distances decide
    wide = torch.randn(300, 3, 24, 20, generator=torch.Generator().manual_seed(0))
    assert scales_of(wide).sigma_max == pytest.approx(float(torch.pdist(wide.flatten(1)).max()), rel=1e-5)
    c = defaults(tmp_path, spiral(200), steps=2, sample_every=0, validate_every=0)
    train(c, tmp_path / "run", progress=False)
    known = json.loads((tmp_path / "run" / "data.json").read_text())
    assert known["sigma_max"] == pytest.approx(20, rel=1e-2)
    # with other data the run goes on with the levels that its network knows
    np.save(tmp_path / "x.npy", 9 * spiral(300))
    c.training.steps = 3
    model = train(c, tmp_path / "run", progress=False, accept_changes=True)
    assert model.sigma_range == pytest.approx((known["sigma_min"], known["sigma_max"]))
    c.process.sigma_max = 7.0
    assert build(c).model.sigma_range == pytest.approx((known["sigma_min"], 7.0), rel=1e-2)


def test_the_network_fits_the_shape():
    assert type(fitting((5,), width=8)) is MLP
    for shape, multipliers in (
        ((1, 8, 8), (1, 2)),
        ((3, 20, 24), (1, 2, 2)),
        ((3, 64, 64), (1, 2, 2, 2)),
        ((2, 16), (1, 2)),
    ):
        net = fitting(shape, width=8)
        assert type(net) is UNet
        assert net.config["multipliers"] == multipliers
    with pytest.raises(ValueError, match=r"model.net.blocks is 2, but data of shape \(5,\) gets model.net.name='mlp'"):
        fitting((5,), blocks=2)


@pytest.mark.parametrize(
    ("mean", "std", "said"),
    [
        (0.0, 1.0, None),
        (0.1, 1.3, None),
        (1.0, 1.0, "mean 1 and deviation 1"),
        (0.0, 3.0, "safe choice"),
        (0, 0.3, "0.3"),
    ],
)
def test_samples_far_from_the_data_are_warned_of(mean, std, said, recwarn):
    evaluation = Samples()
    evaluation._of_data = {"data_mean": [0.0, 0.0], "data_std": [1.0, 1.0]}
    evaluation._warn([0.0, mean], [1.0, std], 400, 1000)
    assert len(recwarn) == (said is not None)
    if said:
        assert said in str(recwarn[0].message)
        assert "in channel 1" in str(recwarn[0].message)


def test_inputs_that_grow_with_the_noise_are_warned_of(tmp_path):
    c = defaults(tmp_path, np.random.default_rng(0).normal(size=(40, 1, 8, 8)))
    c.model.prediction, c.process.sigma_max = "eps", 50.0
    with pytest.warns(RuntimeWarning, match=r"inputs grow with the noise, up to 50, .* expected model.input_scale"):
        build(c)
    c.model.prediction = "edm"
    build(c)


def test_a_dry_run_says_what_it_will_cost(tmp_path, capsys):
    np.savez(tmp_path / "x.npz", x0=spiral(50), labels=np.arange(50) % 3)
    (tmp_path / "c.py").write_text(
        "from scorelab.training import default_config\n"
        "def get_config():\n"
        "    c = default_config()\n"
        f"    c.data.source, c.data.path = 'arrays', {str(tmp_path / 'x.npz')!r}\n"
        "    return c\n"
    )
    assert main(["train", f"--config={tmp_path / 'c.py'}", "--dry_run"]) == 0
    said = capsys.readouterr().out
    for part in ("50 samples of shape (2,), 3 classes", "beside a root mean square of", "in fp32", "s a step on this"):
        assert part in said


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """A run on 2-D points."""
    folder = tmp_path_factory.mktemp("points")
    c = defaults(folder, spiral(300), steps=20, sample_every=0, validate_every=0)
    train(c, folder / "run", progress=False)
    return folder / "run"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sampler=dpm2m", "--nfe=9"], ""),
        (["--sampler=ddim", "--config.sampling.sampler.eta=0.5", "--grid=log_linear", "--batch_size=2"], ""),
        (["--sampler=annealed_langevin", "--config.sampling.sampler.steps=2", "--nfe=20"], ""),
        (["--sampler=ode", "--nfe=9"], "chooses its steps itself; expected its tolerances"),
        (["--sampler=nope"], "config.sampling.sampler.name is 'nope'; did you mean"),
        (["--config.training.steps=9"], "can't be changed after training; expected --config.sampling.KEY"),
        (["--config.sampling.sampler.etta=1"], "unknown config key 'sampling.sampler.etta'"),
        (["--sampler=annealed_langevin", "--nfe=3"], "takes 101 for one noise level"),
        (["--device=gpu"], "device is 'gpu'; expected 'cpu', 'cuda'"),
        (["--device=meta"], "device is 'meta', but PyTorch"),
        (["--device=vulkan"], "device is 'vulkan', but PyTorch"),
    ],
)
def test_a_run_is_sampled_as_one_likes(points, tmp_path, capsys, options, said):
    """And its own config stays as it was."""
    before = (points / "config.json").read_bytes()
    out = tmp_path / "x.npz"
    assert main(["sample", f"--workdir={points}", "--n=5", f"--out={out}", *options]) == (2 if said else 0)
    assert said in capsys.readouterr().err
    assert out.is_file() != bool(said)
    assert (points / "config.json").read_bytes() == before


def test_so_many_levels_as_take_so_many_evaluations(points):
    config, model, _ = load_run(points)
    for name, nfe, levels in (("heun", 19, 10), ("heun", 18, 9), ("euler", 18, 18), ("dpm2m", 20, 20)):
        config.sampling.sampler = ConfigDict({"name": name})
        grid, sampler = build_sampling(with_nfe(config, model, nfe), model)
        steps = list(trajectory(model, (1, 2), grid, sampler))
        assert len(grid) == levels + 1
        assert steps[-1].nfe <= nfe


def test_vectors_become_a_scatter_plot_and_names_stay(points, tmp_path, capsys):
    kept = tmp_path / "s.npz"
    kept.write_bytes(b"mine")
    assert main(["sample", f"--workdir={points}", "--n=5", f"--out={tmp_path / 's.png'}"]) == 0
    assert kept.read_bytes() == b"mine"
    with Image.open(tmp_path / "s.png") as picture:
        assert min(picture.size) > 300
    assert main(["sample", f"--workdir={points}", "--n=5", f"--out={tmp_path / 'folder'}"]) == 2
    assert "are no images" in capsys.readouterr().err
    for dims in (1, 3, 9):
        assert len(scatter(torch.randn(20, dims)).axes) == {1: 1, 3: 3, 9: 6}[dims]


def test_a_directory_of_a_run_is_a_model_and_says_how_it_is_sampled(points):
    model = ScoreModel.load(points)
    ema = ScoreModel.load(points / "checkpoints" / "step_00000020", weights="ema.safetensors")
    x, sigma = torch.randn(3, 2), torch.tensor(1.0)
    assert torch.equal(model(x, sigma), ema(x, sigma))
    low, high = model.sigma_range
    grid = sigmas.karras(18, sigma_min=low, sigma_max=high)
    alone, told = (sample(model, (4, 2), levels, generator=PerSampleNoise(0)) for levels in (None, grid))
    assert torch.equal(alone, told)
    assert sample(model.double(), (4, 2)).dtype == torch.float64
    with pytest.raises(ValueError, match="neither the sampler nor the score says"):
        sample(lambda x, s: -x, (4, 2))
    (points.parent / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="is a run without a checkpoint"):
        ScoreModel.load(points.parent / "empty")


def test_bytes_are_written_as_tools_take_them_and_grids_have_gaps(tmp_path):
    x = torch.rand(5, 3, 6, 4) * 2 - 1
    for channels in (1, 3):
        run = RunSamples(x[:, :channels], Values(0, 255, 1, (0, 255)), None, 1)  # type: ignore[arg-type]
        write_samples(run, tmp_path / f"{channels}.npz")
        found = np.load(tmp_path / f"{channels}.npz")["samples"]
        assert (found.dtype, found.shape) == (np.uint8, (5, 6, 4, channels))
        np.testing.assert_array_equal(found[2, 3, 1], ((x[2, :channels, 3, 1] + 1) * 127.5).round())
    page = tiled(x, Values(0, 255, 1, (0, 255)), 3)
    # 8 times as large, and a gap of 2 between
    assert page.shape == (2 * 48 + 2, 3 * 32 + 4, 3)
    assert (page[48:50] == 255).all()
    assert (page[:48, :32] == page[:48, :32][::8, ::8].repeat(8, 0).repeat(8, 1)).all()


MOONS = target("moons")


def eps(x, sigma):
    return -broadcast(sigma, x) * MOONS.score(x, sigma)


def timed(x, t, process, last=lambda t: t):
    """The same of (alpha x, t)."""
    sigma = process.sigma(last(t))
    return eps(x / broadcast(process.alpha(last(t)), x), sigma)


def v(x, sigma):
    s, e = broadcast(sigma, x), eps(x, sigma)
    return (e - s * (x - s * e)) / torch.sqrt(1 + s**2)


@pytest.mark.parametrize(
    ("fn", "best", "called"),
    [
        (v, "v", ""),
        (lambda x, s: eps(x, s) - x + broadcast(s, x) * eps(x, s), "flow, eps - x0", ""),
        (lambda x, t: timed(x, t, VP()), "eps", "alpha x, t of VP"),
        (lambda x, t: timed(x, t, VP(), lambda t: t / 999), "eps", "alpha x, 999 t of VP"),
        (lambda x, t: timed(x, t, Cosine(), lambda t: 1 - t), "eps", "alpha x, 1 - t of Cosine"),
        (lambda x, s: eps(x * torch.sqrt(1 + s**2), s), "eps", "x / sqrt(1 + sigma^2), sigma"),
        (lambda x, s: eps(x, (4 * s).exp()), "eps", "x, log(sigma)/4"),
        (lambda x, s: torch.zeros_like(x), "", ""),
        (lambda x, s: 3 * torch.ones_like(x), "", ""),
    ],
)
def test_check_score_knows_the_usual_conventions(fn, best, called):
    data = MOONS.sample(1000, torch.Generator().manual_seed(0))
    found = check_score(fn, data, sigma_min=0.05, sigma_max=10.0)
    assert (found.best, found.called, found.ok) == (best, called, False)
    assert ("none of these" in str(found)) == (best == "")


def test_a_ddpm_network_as_such_are_written(tmp_path):
    """Its labels are (B,), and the levels that its process knows are kept."""

    def net(x, label):
        assert label.shape == (len(x),)
        return x * label[:, None] * 0

    score = from_eps(net, VP())
    assert score.sigma_range == VP().sigma_range
    assert sample(score, (3, 2)).shape == (3, 2)
    with pytest.raises(ValueError, match="but this score knows"):
        sample(score, (3, 2), [1000.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="but this score knows"):
        sample(from_time_score(net, VP()), (3, 2), [1000.0, 1.0, 0.0])


class Mine(Sampler):
    """Euler's method with noise, as in the documentation."""

    def step(self, at):
        gap = at.sigma**2 - at.sigma_next**2
        x = at.x + gap * at.score(at.x, at.sigma)
        return (x + gap**0.5 * at.noise(x) if at.sigma_next else x), at.state


class Only(Sampler):
    def step(self, at):
        return at.x


def test_mistakes_with_samplers_are_one_line_each():
    noise = torch.Generator().manual_seed(0)
    x = sample(MOONS.score, (2000, 2), sigmas.karras(60, sigma_min=0.01, sigma_max=10), Mine(), generator=noise)
    assert float(x.std()) == pytest.approx(float(MOONS.sample(2000, noise).std()), rel=0.05)
    with pytest.raises(TypeError, match=r"Only.step returned Tensor; expected \(x, state\)"):
        sample(MOONS.score, (2, 2), [1.0, 0.0], Only())
    with pytest.raises(ValueError, match=r"sigmas is 20, a number; .* scorelab.sigmas.karras\(20"):
        sample(MOONS.score, (2, 2), 20)
    with pytest.raises(ValueError, match="lower the step_size of Langevin"):
        sample(MOONS.score, (2, 2), [0.1], Langevin(steps=400, step_size=1e3))
    labels = torch.arange(6)
    with pytest.raises(ValueError, match=r"failed on 4 of 6 samples .* rows\(index\)"):
        sample(lambda x, s: -x * labels[:, None], (6, 2), [1.0, 0.0], batch_size=4)


def test_a_model_is_pickled(tmp_path, points):
    model = ScoreModel.load(points)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    x, sigma = torch.randn(3, 2), torch.tensor(1.0)
    assert torch.equal(model(x, sigma), again(x, sigma))
    for prediction in predictions.PREDICTIONS.values():
        assert pickle.loads(pickle.dumps(prediction)) is prediction
    own = predictions.Prediction(torch.zeros_like, torch.ones_like)
    assert pickle.loads(pickle.dumps(own)) == own


def pictures(folder, count: int = 12):
    rng = np.random.default_rng(0)
    for i in range(count):
        place = folder / ("cat", "dog")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (10, 8, 3), dtype=np.uint8)).save(place / f"{i}.png")


def test_new_writes_a_config_that_trains(tmp_path, capsys):
    pictures(tmp_path / "pets")
    config = tmp_path / "runs" / "my.py"
    asked = ["new", "images", str(config), f"--path={tmp_path / 'pets'}"]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "12 samples of shape (3, 10, 8), 2 classes (cat, dog)" in said
    assert f"scorelab train --config {config} --workdir {config.with_suffix('')}" in said
    run = tmp_path / "run"
    small = ["--config.training.steps=2", "--config.model.net.width=8", "--config.training.batch_size=4"]
    small += ["--config.sampling.samples=2"]
    assert main(["train", f"--config={config}", f"--workdir={run}", *small]) == 0
    assert main(["sample", f"--workdir={run}", "--condition=dog", "--n=2", f"--out={tmp_path / 'x.npz'}"]) == 0
    assert np.load(tmp_path / "x.npz")["samples"].shape == (2, 10, 8, 3)
    # nothing is overwritten, and what does not fit is said
    before = config.read_bytes()
    assert main(asked) == 2
    assert config.read_bytes() == before
    np.save(tmp_path / "x.npy", spiral(60))
    for kind, path, why in (
        ("points", tmp_path / "pets", "holds samples of shape 3x10x8; expected points, or scorelab new images"),
        ("images", tmp_path / "x.npy", "expected images, or scorelab new points"),
        ("songs", tmp_path / "x.npy", "expected images or points"),
        ("points", tmp_path / "none.npy", "there is no"),
    ):
        capsys.readouterr()
        assert main(["new", kind, str(tmp_path / "other.py"), f"--path={path}"]) == 2
        assert why in capsys.readouterr().err
    assert main(["new", "images"]) == 2
    assert main(["new", "points", str(tmp_path / "points.py"), f"--path={tmp_path / 'x.npy'}"]) == 0
    assert main(["train", f"--config={tmp_path / 'points.py'}", "--dry_run"]) == 0


def test_a_density_is_drawn_in_the_units_of_the_data(points, tmp_path, capsys):
    assert main(["density", f"--workdir={points}", "--n=24", f"--out={tmp_path / 'd.png'}"]) == 0
    whole = float(capsys.readouterr().out.split("integrate to ")[1].split()[0])
    # a density of points that are millimetres apart; after 20 steps some of it lies outside of the picture
    assert 0.5 < whole < 1.1
    with Image.open(tmp_path / "d.png") as picture:
        assert picture.width > 2 * picture.height
    assert main(["density", f"--workdir={points}", f"--out={tmp_path / 'd.pdf'}"]) == 2
    assert main(["density", f"--workdir={tmp_path}"]) == 2


def test_the_page_of_settings_is_that_of_the_code():
    """scorelab settings > docs/settings.md brings it up to date."""
    text = reference()
    assert (ROOT / "docs" / "settings.md").read_text() == text
    for path, kind in PARTS.items():
        assert f"\n## {path}\n" in text
        assert all(f"\n| `{name}` |" in text for name in kind.table)


def test_reports_of_vectors_show_scatter_plots_and_what_losses_are(tmp_path):
    c = defaults(tmp_path, spiral(200), steps=4, sample_every=2, validate_every=2, batch_size=16, log_every=1)
    c.training.objective.reference = 32
    c.sampling.samples = 20
    train(c, tmp_path / "run", progress=False)
    assert sorted(p.suffix for p in (tmp_path / "run" / "samples").iterdir()) == [".npz", ".npz", ".png", ".png"]
    assert main(["report", f"--workdir={tmp_path / 'run'}"]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert 'alt=""' not in page
    assert page.count("<img ") == 5


def test_a_figure_keeps_its_titles_and_ticks_when_it_is_saved():
    drawn, axes = figure(3)
    for ax in axes.flat:
        density(ax, torch.zeros(100), (-100.0, 100.0, -100.0, 100.0), "a title of some length, as densities have")
    drawn.draw_without_rendering()
    page = drawn.bbox
    for ax in axes.flat:
        for text in (ax.title, *ax.get_yticklabels()):
            box = text.get_window_extent()
            assert page.x0 - 1 <= box.x0
            assert box.x1 <= page.x1 + 1
            assert box.y1 <= page.y1 + 1


class Narrow(Sampler):
    def step(self, at):
        return at.x[:, :1], at.state


def test_what_would_be_silently_wrong_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"Narrow.step returned x of .*; expected the shape that it was given"):
        sample(MOONS.score, (5, 2), [1.0, 0.0], Narrow())
    # classes that are called by numbers are not counted, and guidance needs a model that has seen no class
    for name in ("0", "2", "3"):
        (tmp_path / "numbers" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (8, 8), 20 * int(name) + i).save(tmp_path / "numbers" / name / f"{i}.png")
    c = default_config()
    c.data.source, c.data.path, c.model.conditional = "folder", str(tmp_path / "numbers"), True
    c.model.net.width, c.training.steps, c.training.batch_size = 8, 1, 4
    c.training.sample_every = c.training.validate_every = 0
    run = tmp_path / "run"
    train(c, run, progress=False)
    for options, said in (
        (["--condition=1"], "--condition is '1'"),
        (["--condition=2", "--guidance=2"], "trained with training.label_dropout=0"),
    ):
        assert main(["sample", f"--workdir={run}", "--n=2", *options]) == 2
        assert said in capsys.readouterr().err
    model = ScoreModel.load(run)
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor(1.0)
    few = model.conditioned(torch.tensor([1, 2], dtype=torch.uint8))
    assert torch.equal(few(x, sigma), model.conditioned(torch.tensor([1, 2]))(x, sigma))


def test_the_command_line_chooses_how_threads_wait_before_pytorch_starts(tmp_path):
    """And what the user has set stands; of a small network one thread is enough."""
    (tmp_path / "told.py").write_text(
        "import json, os, sys\nimport scorelab\nearly = 'torch' in sys.modules\n"
        "from scorelab.cli import run\nsys.argv = ['scorelab', 'settings']\nrun()\n"
        "print(json.dumps([early, os.environ.get('GOMP_SPINCOUNT')]))\n"
    )
    known = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    cases = (({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None))
    for own, expected in cases:
        ended = subprocess.run(
            [sys.executable, str(tmp_path / "told.py")],
            env={**known, **own},
            cwd=ROOT,
            check=True,
            text=True,
            capture_output=True,
        )
        assert json.loads(ended.stdout.splitlines()[-1]) == [False, expected]


@pytest.mark.parametrize(("width", "spare", "expected"), [(128, True, 1), (128, False, 2), (512, True, 2)])
def test_a_small_network_trains_in_one_thread(tmp_path, monkeypatch, width, spare, expected):
    c = defaults(tmp_path, spiral(200), steps=1, sample_every=0, validate_every=0)
    c.model.net.name, c.model.net.width = "mlp", width
    seen, before = [], torch.get_num_threads()
    advance = Trainer.advance
    monkeypatch.setattr(Trainer, "advance", lambda *a, **k: seen.append(torch.get_num_threads()) or advance(*a, **k))
    torch.set_num_threads(2)
    try:
        train(c, tmp_path / "run", progress=False, spare_threads=spare)
        assert (seen, torch.get_num_threads()) == ([expected], 2)
    finally:
        torch.set_num_threads(before)


def test_names_are_imported_when_they_are_asked_for():
    told = (
        "import sys, scorelab\nassert 'torch' not in sys.modules\n"
        "import scorelab.training, scorelab.evaluation, scorelab.cli.sampling\n"
        "slow = {'matplotlib', 'sympy', 'scipy.optimize', 'scipy.stats', 'torch.distributed.tensor'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\nfrom scorelab import *\n"
        "assert 'nn' not in globals() and 'data' not in globals()\n"
        "assert scorelab.sample is sample and scorelab.training.train and scorelab.nn.MLP\n"
        "assert set(scorelab.__all__) <= set(dir(scorelab)) and all(hasattr(scorelab, n) for n in dir(scorelab))\n"
    )
    subprocess.run([sys.executable, "-c", told], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("c.training.steps = '100'", "line 4: steps is 100 (str); expected a whole number"),
        ("c.data.size = 32", "line 4: size is 32 (int); expected a tuple: (32, 32)"),
        ("c.optim.ema = 0.999", "line 4: ema is 0.999 (float); expected a tuple: (0.999,)"),
        ("c.training.step = 100", "line 4: there is no setting 'step'; did you mean 'steps'?"),
        ("c.training.ema = 1", "line 4: there is no setting 'ema'; did you mean c.optim.ema?"),
        ("c.training.sample_evry = 1", "line 4: there is no setting 'sample_evry'; did you mean 'sample_every'?"),
    ],
)
def test_what_a_config_file_sets_wrongly_is_said_in_our_words(line, said, tmp_path, capsys):
    text = f"from scorelab.training import default_config\ndef get_config():\n    c = default_config()\n    {line}\n"
    (tmp_path / "c.py").write_text(text + "    return c\n")
    assert main(["train", f"--config={tmp_path / 'c.py'}", "--dry_run"]) == 2
    found = capsys.readouterr().err
    assert said in found
    assert (found.count("\n"), found.count("line 4")) == (1, 1)


def test_a_density_of_points_of_ones_own_is_that_of_their_codes(tmp_path):
    """model.encode, and the codec's log_scale, as the how-to has it: it integrates to 1 in the data's units."""
    c = defaults(tmp_path, spiral(), steps=1, sample_every=0, validate_every=0)
    train(c, tmp_path / "run", progress=False)
    model, points = ScoreModel.load(tmp_path / "run"), torch.from_numpy(spiral()).float()
    torch.testing.assert_close(model.decode(model.encode(points)), points, rtol=0, atol=1e-3)
    assert model.encode(points).std(0).tolist() == pytest.approx([1, 1], rel=1e-3)
    # an untrained network is about the identity's score, so a density near N(mean, cov) of the data
    exact = torch.distributions.Normal(points.mean(0), points.std(0)).log_prob(points[:50]).sum(1)
    low, high = model.sigma_range
    found = log_likelihood(model, model.encode(points[:50]), low, high, rtol=1e-3, atol=1e-3).log_prob
    assert float((found - model.codec.log_scale - exact).mean()) == pytest.approx(0, abs=0.5)
    # of points in their own units it is none
    assert float(log_likelihood(model, points[:5], low, high, rtol=1e-2, atol=1e-2).log_prob.max()) < -100


def test_data_that_lies_on_its_side_is_warned_of(tmp_path):
    with pytest.warns(RuntimeWarning, match="2 samples of 500 dimensions are fewer than dimensions; .* transposed"):
        build(defaults(tmp_path, spiral(500).T.copy(), batch_size=2))
