"""``scorelab evaluate``: what its record says is what was compared."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import as_processes
from test_training import small

from scorelab.cli import evaluating
from scorelab.cli.evaluating import JudgedRun, evaluate_samples
from scorelab.cli.main import main
from scorelab.cli.runs import run_config
from scorelab.cli.sampling import sample_run, write_samples
from scorelab.cli.steering import Steering
from scorelab.data import Values, digits, read_samples
from scorelab.evaluation import compared, inception_score, kernel_distance
from scorelab.evaluation.comparison import varied
from scorelab.plotting.pictures import picture_bytes
from scorelab.training import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, held in (("all", 0), ("held", 300)):
        train(small(2, data__validation=held, sampling__grid__n=3), folder / name, progress=False)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "scorelab" / "features"


def numbers(record):
    found = record["distances"]
    return [found[k]["value"] for k in found if "value" in found[k]] + [found[k].get("stderr", 0) for k in found]


def test_a_record_is_of_the_samples_that_are_drawn_and_of_the_data(runs, cache, capsys):
    """Rounded to the gray levels of the data; a second evaluation finds the data's features."""
    command = ["evaluate", f"--workdir={runs / 'held'}", "--n=60", "--few", f"--out={cache.parent / 'r.json'}"]
    assert main(command) == 0
    told = capsys.readouterr().out
    record = json.loads((cache.parent / "r.json").read_text())
    x = sample_run(runs / "held", n=60).x
    levels = (((x.clamp(-1, 1) + 1) * 8).round() / 8 - 1).flatten(1)
    data = digits()
    held = data.hold_out(300).x0.flatten(1)
    right = kernel_distance(levels, held)
    found = record["distances"]["kernel_cubic"]
    assert (found["value"], found["stderr"]) == pytest.approx(right, rel=1e-4)
    assert f"kernel_cubic         {found['value']:.4g} ± {found['stderr']:.2g}" in told
    content = data.fingerprint()["content"]
    assert record["data"] == {"source": "digits", "against": "held_out", "count": 300, "content": content}
    assert (record["features"], record["rounding"], record["seed"]) == ("pixels", "to the data's values", 0)
    assert record["sampler"]["grid"]["n"] == 3
    # Heun's two a step, but for the last, which ends at 0
    assert record["sampler"]["sampler"]["name"] == "heun"
    assert record["network_evaluations"] == 2 * 3 - 1
    (kept,) = cache.iterdir()
    before = kept.stat().st_mtime_ns
    assert main(command) == 0
    assert [p.stat().st_mtime_ns for p in cache.iterdir()] == [before]
    assert numbers(json.loads((cache.parent / "r.json").read_text())) == numbers(record)


def test_batches_and_processes_change_nothing(runs, monkeypatch):
    options = {"n": 50, "few": True, "against": "train"}
    whole = JudgedRun(runs / "held", **options).record()
    assert whole["data"]["count"] == 1797 - 300
    monkeypatch.setattr(evaluating, "_AT_ONCE", 7)
    assert numbers(JudgedRun(runs / "held", **options).record()) == pytest.approx(numbers(whole), rel=1e-6, abs=1e-9)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    found = as_processes(monkeypatch, 2, lambda rank: JudgedRun(runs / "held", **options, seed=0).record())
    assert numbers(found[0]) == numbers(found[1])
    assert numbers(found[0]) == pytest.approx(numbers(whole), rel=1e-6, abs=1e-9)


def test_classes_are_drawn_as_often_as_the_data_has_them(tmp_path):
    """And not each in turn, of which an equal number is no independent draw: as ``--condition=data`` draws them, by
    what was not held out."""
    data = digits()
    x = data.take(torch.arange(1797)).numpy()
    np.savez(tmp_path / "data.npz", data=x, labels=data.labels)
    np.savez(tmp_path / "plain.npz", data=x)
    c = small(30, data__validation=300, sampling__grid__n=3, model__conditional=True, training__batch_size=64)
    c.data.source, c.data.path, c.optim.lr = "arrays", str(tmp_path / "data.npz"), 0.02
    options = {"n": 60, "few": True, "seed": 4, "weights": "model"}
    train(c, tmp_path / "run", progress=False)
    record = JudgedRun(tmp_path / "run", **options).record()
    run = sample_run(tmp_path / "run", n=60, seed=4, weights="model", steering=Steering("data"))
    write_samples(run, tmp_path / "x.npz")
    found = evaluate_samples(tmp_path / "x.npz", run_config(tmp_path / "run"), few=True)
    assert numbers(found) == pytest.approx(numbers(record), rel=1e-6, abs=1e-9)
    assert record["steering"] == {"condition": "data"}
    data.hold_out(300)
    assert torch.equal(run.labels, data.drawn_classes(60, seed=4))
    each = JudgedRun(tmp_path / "run", **options, steering=Steering("each")).record()
    assert numbers(each) != numbers(record)
    other = run_config(tmp_path / "run")
    other.data.path = str(tmp_path / "plain.npz")
    with pytest.raises(ValueError, match="10 classes as often as the data has them, and it has 0 classes"):
        JudgedRun(tmp_path / "run", n=60, few=True, data=other)


def test_classes_and_features_of_ones_own_are_told(runs, tmp_path, monkeypatch):
    (tmp_path / "own_features.py").write_text(
        "import torch\nclass Half(torch.nn.Module):\n    def forward(self, x):\n        return x[:, :, ::2, ::2]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    record = JudgedRun(runs / "all", n=48, few=True, features="own_features:Half").record()
    assert record["features"] == "own_features:Half"
    assert record["data"]["against"] == "train"
    assert len(record["checksum"]) == 64


def test_variety_is_told_beside_the_data_s(runs, written, tmp_path, monkeypatch):
    """Directions of equal shares count as many kinds, and certain classes likewise; logits are of the same samples."""
    eye = torch.eye(7).repeat(200, 1)
    found = varied(eye[:, :5][eye[:, :5].sum(1) > 0], eye, 100 * eye)
    assert found["vendi_score"]["value"] == pytest.approx(5, abs=0.05)
    assert found["vendi_score"]["of_data"]["value"] == pytest.approx(7, abs=0.05)
    assert found["inception_score"]["value"] == pytest.approx(7, abs=0.15)
    assert "expected at least 40" in varied(eye[:30], eye)["vendi_score"]["left_out"]
    assert "expected at most 2,048" in varied(torch.ones(40, 2049), torch.ones(40, 2049))["vendi_score"]["left_out"]
    (tmp_path / "own_classes.py").write_text(
        "from scorelab.evaluation import Pixels\nclass Ten(Pixels):\n    classifies = True\n"
        "    def both(self, x):\n        return self(x), x.flatten(1)[:, 10:20]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    record = evaluate_samples(written / "x.npz", run_config(runs / "all"), few=True, features="own_classes:Ten")
    plain = evaluate_samples(written / "x.npz", run_config(runs / "all"), few=True)
    assert numbers(record) == numbers(plain)
    with np.load(written / "x.npz") as archive:
        x = torch.from_numpy(archive["samples"].round() / 8 - 1).flatten(1)[:, 10:20]
    right = inception_score(x)
    found = record["variety"]["inception_score"]
    assert (found["value"], found["stderr"]) == pytest.approx(right, rel=1e-5)
    assert "inception_score" not in plain["variety"]


def test_small_sets_leave_the_frechet_distance_out_and_say_why():
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"there are 60 samples and 60 data; expected at least 2,048 of each"):
        compared(x, x)
    found = compared(x[:30], x[30:], few=True)
    assert found["frechet"]["plain"] > found["frechet"]["value"]
    assert found["frechet"]["name"] == "FD-30, extrapolated"
    wide = torch.randn(60, 30, generator=torch.Generator().manual_seed(0))
    assert "60 rows of 30 features" in compared(wide, wide + 1, few=True)["frechet"]["left_out"]


@pytest.mark.parametrize(
    "values", [Values(0, 255, 1, (0, 255)), Values(0, 255, 1, (-0.5, 255.5)), Values(0, 16, 1, (0, 16))]
)
def test_rounding_leaves_data_as_it_is(values):
    k = torch.arange(values.most + 1, dtype=torch.float64)
    torch.testing.assert_close(values.rounded(values.inside(k.clone())), values.inside(k.clone()))
    off = values.inside(
        (k + 0.4 * torch.rand(len(k), generator=torch.Generator().manual_seed(0))).clamp_max(values.most)
    )
    torch.testing.assert_close(values.rounded(off), values.inside(k.clone()))
    free = Values(-3.0, 5.0)
    assert torch.equal(free.rounded(off * 99), off * 99)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "there are 10,000 samples and 1,797 data; expected at least 2,048 of each"),
        (["--few", "--n=0"], "--n is 0"),
        (["--few", "--n=9", "--against=held_out"], "--against is 'held_out'; known: train"),
        (["--few", "--n=9", "--features=pixel"], "--features is 'pixel'; did you mean 'pixels'?"),
        (["--few", "--n=9", "--features=torch.nn:ReLUU"], "expected an importable package.module:Class"),
        (
            ["--few", "--n=9", "--features=collections:Counter"],
            "makes a Counter; expected a torch.nn.Module or",
        ),
        (["--few", "--n=9", "--features=inception:none.pth"], "there is no none.pth; expected Inception's weights"),
        (["--few", "--n=9", "--features=classifier:none"], "none"),
        (["--few", "--n=1"], "x has 1 row; expected at least 2"),
        (["--few", "--n=9", "--nfe=0"], "--nfe is '0'"),
        (["--few", "--n=9", "--nfe=5", "--sampler=s.json"], "expected nfe > 0, and no other settings beside a file's"),
        (["--few", "--n=9", "--guidance=2"], "--guidance needs a class"),
        (["--few", "--n=9", "--out=/proc/x.json"], "can't be written"),
    ],
)
def test_what_can_not_be_evaluated_is_said_in_a_line(runs, options, said, capsys, cache):
    assert main(["evaluate", f"--workdir={runs / 'all'}", *options]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("scorelab: ")
    assert said in told
    assert not [p for p in cache.glob(".*")]


def test_data_that_is_drawn_afresh_has_no_features(tmp_path, capsys):
    data = tmp_path / "points.py"
    data.write_text(
        "from scorelab.training import default_config\ndef get_config():\n    c = default_config()\n"
        "    c.data.source = 'ring'\n    return c\n"
    )
    assert main(["evaluate", "--model=digits", f"--config={data}", "--n=9", "--few"]) == 2
    assert "expected the same: --config names a config with data of the model" in capsys.readouterr().err


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    """60 samples of a run of digits, in the data's own values and as pictures."""
    folder, run = tmp_path_factory.mktemp("written"), sample_run(runs / "all", n=60)
    write_samples(run, folder / "x.npz")
    # pictures round to 256 levels, so that what lies between the data's would be rounded twice
    write_samples(replace(run, x=run.values.rounded(run.x)), folder / "x")
    return folder


def test_samples_in_files_are_judged_as_those_that_are_drawn(runs, written, tmp_path, capsys):
    drawn = JudgedRun(runs / "all", n=60, few=True).record()
    out = tmp_path / "r.json"
    assert (
        main(["evaluate", f"--samples={written / 'x.npz'}", f"--workdir={runs / 'all'}", "--few", f"--out={out}"]) == 0
    )
    record = json.loads(out.read_text())
    assert numbers(record) == pytest.approx(numbers(drawn), rel=1e-6, abs=1e-9)
    digest = hashlib.sha256((written / "x.npz").read_bytes()).hexdigest()
    assert record["file"] == {"path": str(written / "x.npz"), "sha256": digest}
    assert not {"seed", "sampler", "weights"} & set(record)
    # pictures have 256 levels, from which the data's 17 are found again
    pictures = evaluate_samples(written / "x", run_config(runs / "all"), few=True)
    assert numbers(pictures) == pytest.approx(numbers(drawn), rel=1e-6, abs=1e-9)
    with np.load(written / "x.npz") as archive:
        x = archive["samples"].round()
    # as the release of ADM writes them, channels last, and arrays without channels
    for array in (x[:, 0, :, :, None].astype(np.uint8), x[:, 0]):
        np.savez(tmp_path / "y.npz", arr_0=array)
        other = evaluate_samples(tmp_path / "y.npz", run_config(runs / "all"), few=True)
        assert numbers(other) == pytest.approx(numbers(drawn), rel=1e-6, abs=1e-9)


def test_bytes_are_read_as_they_were_written(tmp_path):
    """Colour images, channels last in the file; black and white at the ends of their range."""
    pixels = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    for values in (Values(0, 255, 1, (0, 255)), Values(0, 255, 1, (-0.5, 255.5))):
        x = values.inside(pixels.float())
        np.savez(tmp_path / "x.npz", samples=picture_bytes(x, values))
        found = read_samples(tmp_path / "x.npz", (3, 4, 4), values)
        assert len(found) == 2
        torch.testing.assert_close(found.take(range(1, 2)), x[1:])


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda x: {"samples": x[:, :, :4]}, "holds float32 (60, 1, 4, 8); expected numbers ('N', 1, 8, 8)"),
        (lambda x: {"samples": x.repeat(3, 1)}, "holds float32 (60, 3, 8, 8); expected numbers ('N', 1, 8, 8)"),
        (lambda x: {"samples": x * 16}, "of the data's [0, 16]; expected the data's own values"),
        (lambda x: {"samples": x, "labels": np.arange(59)}, "60 samples and labels (59,); expected one label each"),
        (lambda x: {"samples": np.where(x == x.max(), np.nan, x)}, "is not finite at sample"),
        (lambda x: {"pictures": x}, "it holds pictures; expected the data under images, samples"),
        (lambda x: {"samples": x[:0]}, "holds float32 (0, 1, 8, 8); expected numbers"),
    ],
)
def test_files_of_other_samples_are_refused(written, runs, tmp_path, made, said, capsys):
    with np.load(written / "x.npz") as archive:
        np.savez(tmp_path / "y.npz", **made(archive["samples"]))
    assert main(["evaluate", f"--samples={tmp_path / 'y.npz'}", f"--workdir={runs / 'all'}", "--few"]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert said in told


def test_samples_that_are_there_are_not_drawn(written, runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for options, said in [
        ([f"--samples={tmp_path / 'empty'}"], "empty holds no images; expected files such as .png or .jpg"),
        ([f"--samples={tmp_path / 'none'}"], "none; expected samples: a .npz, a .npy or a folder of images"),
        ([f"--samples={written / 'x.npz'}", "--nfe=5"], "expected no --nfe, which draws some"),
        ([f"--samples={written / 'x.npz'}"], "there are 60 samples and 1,797 data; expected at least 2,048"),
    ]:
        assert main(["evaluate", f"--workdir={runs / 'all'}", *options]) == 2
        assert said in capsys.readouterr().err
    with np.load(written / "x.npz") as archive:
        np.savez(tmp_path / "y.npz", samples=archive["samples"] / 16)
    with pytest.warns(RuntimeWarning, match=r"of the data's \[0, 16\]: are they scaled otherwise"):
        read_samples(tmp_path / "y.npz", (1, 8, 8), Values(0, 16, 1, (0, 16)))
