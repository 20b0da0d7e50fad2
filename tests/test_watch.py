"""What a run shows of itself: metrics, samples, TensorBoard, the report."""

from __future__ import annotations

import io
import json
import math
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from test_training import small

from scorelab.cli.main import main
from scorelab.cli.report import report_run
from scorelab.cli.sampling import sample_run
from scorelab.data import Arrays, Drawn, digits
from scorelab.distributions import target
from scorelab.evaluation import kernel_distance
from scorelab.training import Trainer, build, train
from scorelab.training import watch as watch_module
from scorelab.training.engine import BINS
from scorelab.training.watch import Watch


def rows(workdir, key):
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if key in row]


def test_losses_by_noise_level_beside_the_zero_predictor():
    """A fresh network says 0: its loss is the zero predictor's in every part of the levels, which ascend."""
    c = small(
        model__net__dropout=0.0, model__prediction="eps", training__sigmas__name="process", process__sigma_min=0.01
    )
    found = Trainer(build(c), c).advance()
    for loss, zero in zip(found.loss_bins, found.zero_bins, strict=True):
        assert loss == pytest.approx(zero, rel=1e-3)
        # 140 samples of 64 pixels: five standard errors of a mean of squared normals
        assert zero == pytest.approx(1, abs=5 * math.sqrt(2 / (140 * 64)))
    assert found.sigma_bins == sorted(found.sigma_bins)
    low, high = 0.01, 10.0
    expected = [low ** (1 - (i + 0.5) / BINS) * high ** ((i + 0.5) / BINS) for i in range(BINS)]
    assert found.sigma_bins == pytest.approx(expected, rel=0.05)
    assert found.loss == pytest.approx(sum(found.loss_bins) / BINS)


def test_a_row_is_the_mean_since_the_last(tmp_path):
    """Also when a checkpoint, from which the run goes on, lies between two rows."""
    train(small(7), tmp_path / "each", progress=False)
    train(small(7, training__log_every=3), tmp_path / "three", progress=False)
    train(small(4, training__log_every=3), tmp_path / "parts", progress=False)
    # a row is written at the last step: going on, the run writes that of step 6 anew
    train(small(7, training__log_every=3), tmp_path / "parts", progress=False)
    each = [r["loss"] for r in rows(tmp_path / "each", "loss")]
    three = {r["step"]: r["loss"] for r in rows(tmp_path / "three", "loss")}
    assert three == pytest.approx({3: np.mean(each[:3]), 6: np.mean(each[3:6]), 7: each[6]}, rel=1e-6)


def test_samples_and_losses_at_fixed_noise(tmp_path):
    options = {"training__sample_every": 3, "training__validate_every": 2, "data__validation": 100}
    train(small(4, sampling__grid__n=4, sampling__samples=9, **options), tmp_path, progress=False)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step_00000003.png", "step_00000004.png"]
    with Image.open(tmp_path / "samples" / "step_00000003.png") as picture:
        assert picture.size == (3 * 50 - 2, 3 * 50 - 2)
    drew = rows(tmp_path, "sample_mean")
    assert [r["step"] for r in drew] == [3, 4]
    data = digits().reference().double()
    assert drew[0]["data_mean"] == pytest.approx([float(data.mean())])
    assert drew[0]["data_std"] == pytest.approx([float(data.std())])
    with Image.open(tmp_path / "samples" / "step_00000004.png") as picture:
        shown = torch.tensor(np.array(picture), dtype=torch.float64) / 127.5 - 1
    # the picture is clamped and rounded
    assert abs(float(shown.mean()) - drew[1]["sample_mean"][0]) < 0.3
    validated = rows(tmp_path, "validation_loss")
    assert [r["step"] for r in validated] == [2, 4]
    assert validated[0]["validation_loss"] == pytest.approx(np.mean(validated[0]["validation_bins"]))
    assert len(validated[0]["validation_bins"]) == BINS


def test_points_are_written_as_arrays(tmp_path):
    c = small(2, data__source="moons", model__net__name="mlp", training__sample_every=2)
    c.sampling.grid.n, c.sampling.samples = 4, 10
    train(c, tmp_path, progress=False)
    assert np.load(tmp_path / "samples" / "step_00000002.npz")["samples"].shape == (10, 2)
    assert len(rows(tmp_path, "sample_std")[0]["sample_std"]) == 2


def test_what_is_held_out_is_never_trained_on():
    data = Arrays(torch.arange(100.0)[:, None])
    held = set(data.hold_out(30).x0.flatten().tolist())
    assert len(held) == 30
    seen = {v for step in range(20) for v in data.batch(0, step, 13).x0.flatten().tolist()}
    assert seen == set(range(100)) - held
    # an epoch still holds every other once
    assert sorted(data.indices(0, 0, 70).tolist()) == sorted(set(range(100)) - {int(v) for v in held})
    with pytest.raises(ValueError, match="data.validation is 100 of 100"):
        Arrays(torch.arange(100.0)[:, None]).hold_out(100)
    with pytest.raises(ValueError, match="fresh samples at every step"):
        Drawn(target("moons")).hold_out(5)


def test_tensorboard(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(small(3, training__sample_every=3, sampling__grid__n=4, sampling__samples=4), tmp_path, progress=False)
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([r["loss"] for r in rows(tmp_path, "loss")])
    assert [e.value for e in events.Scalars("loss_bins/0")] == pytest.approx(
        [r["loss_bins"][0] for r in rows(tmp_path, "loss")]
    )
    assert events.Images("samples")[0].step == 3


def test_batches_with_fewer_samples_than_parts_of_the_noise_levels_are_watched(tmp_path):
    train(small(2, training__batch_size=3), tmp_path, progress=False)
    for key in ("loss_bins", "zero_bins", "sigma_bins"):
        assert [v is None for v in rows(tmp_path, "loss")[-1][key]] == [False, False, True, False, True]
    assert main(["report", f"--workdir={tmp_path}"]) == 0
    assert (tmp_path / "report.html").read_text().count("sigma about") == 3


class Slow(Arrays):
    seconds = 0.2

    def batch(self, seed, step, size, rows=None):
        time.sleep(self.seconds)
        return super().batch(seed, step, size, rows)


def test_slow_data_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(watch_module, "_WORTH_TELLING", 0.0)
    c = small(3)
    parts = build(c)
    parts.data = Slow(digits().reference())
    trainer = Trainer(parts, c)
    # slow beside this machine's steps, whatever else runs on it
    began = time.perf_counter()
    trainer.advance()
    parts.data.seconds = 2 * (time.perf_counter() - began)
    watch = Watch(trainer, tmp_path, progress=True)
    for _ in range(2):
        began = time.perf_counter()
        row = trainer.advance(measure=True)
        watch.stepped(None, 0.0)
        watch.stepped(row, time.perf_counter() - began)
    watch.close()
    assert rows(tmp_path, "loss")[1]["data_share"] > 0.25
    said = capsys.readouterr()
    assert "of the time: raise data.workers, or read from a faster disk" in said.out + said.err


def test_report(tmp_path, capsys):
    options = {"training__sample_every": 2, "training__validate_every": 2}
    train(small(4, sampling__grid__n=4, sampling__samples=4, **options), tmp_path, progress=False)
    assert main(["report", "--workdir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    # losses, health, moments, and two pictures of samples
    assert page.count("data:image/png;base64,") == 5
    assert "step_00000002" in page
    assert "http" not in page
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("{")
    with pytest.raises(ValueError, match="metrics.jsonl, line 9 is no row of metrics"):
        report_run(tmp_path)
    assert main(["report", "--workdir", str(tmp_path / "none")]) == 2
    assert "holds no metrics.jsonl; expected the directory of a run" in capsys.readouterr().err


class _Closed:
    """A terminal that is closed once it has shown something."""

    def __init__(self):
        self.shown = self.refused = 0

    def write(self, text):
        self.shown += 1
        if self.shown > 2:
            self.refused += 1
            raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        pass


def test_a_run_outlives_the_terminal_that_shows_it(tmp_path, monkeypatch):
    """A bar that can't be written any more is not worth a run: the last checkpoint is there."""
    closed, bar = _Closed(), watch_module.tqdm
    monkeypatch.setattr(watch_module, "tqdm", lambda **options: bar(file=closed, mininterval=0, **options))
    train(small(training__steps=3, training__checkpoint_every=3, training__sample_every=0), tmp_path / "x")
    assert closed.refused
    other = threading.Thread(target=lambda: bar(total=1, file=io.StringIO()).close(), daemon=True)
    other.start()
    other.join(20)
    assert not other.is_alive()
    assert (tmp_path / "x" / "checkpoints" / "step_00000003").is_dir()


def measured(steps, **changes):
    """A run that measures the distance of its samples at every step."""
    c = small(steps, data__validation=300, sampling__grid__n=3, **changes)
    c.evaluation.pixels = {"name": "distance", "every": 1, "n": 40}
    return c


def test_the_distance_of_samples_is_measured_as_training_goes(tmp_path, capsys):
    """Of the samples that scorelab sample draws from the checkpoint, and of a run that goes on as of one that never
    stopped; the report marks the least."""
    train(measured(4, training__keep_last=1), tmp_path / "run", progress=False)
    train(measured(2), tmp_path / "parts", progress=False)
    train(measured(4), tmp_path / "parts", progress=False)
    found = {r["step"]: r for r in rows(tmp_path / "run", "pixels_distance")}
    assert list(found) == [1, 2, 3, 4]
    for row in rows(tmp_path / "parts", "pixels_distance"):
        for key in ("pixels_distance", "pixels_distance_stderr"):
            assert row[key] == found[row["step"]][key]
    drawn, data = sample_run(tmp_path / "run", n=40), digits()
    right = kernel_distance(data.values.rounded(drawn.x), data.hold_out(300).x0[:40], "energy")
    assert (found[4]["pixels_distance"], found[4]["pixels_distance_stderr"]) == pytest.approx(right, rel=1e-4)
    assert main(["report", "--workdir", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    best = min(found, key=lambda step: found[step]["pixels_distance"])
    assert f"Least at step {best}: {found[best]['pixels_distance']:.4g}" in page
    last = f"{found[4]['pixels_distance']:.4g} ± {found[4]['pixels_distance_stderr']:.2g}"
    on_disk = "the nearest is --step 4, the least --step 4: " + last
    assert ("Its checkpoint is on disk: --step 4." if best == 4 else on_disk) in page


def test_a_distance_that_can_not_be_measured_is_refused_or_only_warned_of(tmp_path):
    for changes, said in [
        ({"distance": "frechett"}, "config.evaluation.pixels.distance is 'frechett'; did you mean 'frechet'?"),
        ({"features": "pixel"}, "config.evaluation.pixels.features is 'pixel'; did you mean 'pixels'?"),
        ({"n": 1}, "config.evaluation.pixels.n is 1; expected at least 2"),
        ({"evry": 1}, "config.evaluation.pixels.evry is no setting .*did you mean 'every'?"),
    ]:
        c = measured(1)
        c.evaluation.pixels.update(changes)
        with pytest.raises(ValueError, match=said):
            train(c, tmp_path / "refused", progress=False)
    c = measured(1)
    c.evaluation.pixels.distance = "frechet"
    with pytest.warns(RuntimeWarning, match="no distance pixels at step 1: ValueError: x has 40 rows of 64 features"):
        train(c, tmp_path / "run", progress=False)
