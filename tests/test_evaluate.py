"""``scorelab evaluate``: what its record says is what was compared."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from test_training import small

from scorelab import parallel
from scorelab.cli import evaluating
from scorelab.cli.evaluating import evaluate_run
from scorelab.cli.main import main
from scorelab.cli.sampling import sample_run
from scorelab.data import Values, digits
from scorelab.evaluation import compared, kernel_distance
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
    assert record["data"] == {"source": "digits", "against": "held_out", "count": 300}
    assert (record["features"], record["rounding"], record["seed"]) == ("pixels", "to the data's values", 0)
    assert record["sampler"]["grid"]["n"] == 3
    (kept,) = cache.iterdir()
    before = kept.stat().st_mtime_ns
    assert main(command) == 0
    assert [p.stat().st_mtime_ns for p in cache.iterdir()] == [before]
    assert numbers(json.loads((cache.parent / "r.json").read_text())) == numbers(record)


def test_batches_and_processes_change_nothing(runs, monkeypatch):
    options = {"n": 50, "few": True, "against": "train"}
    whole = evaluate_run(runs / "held", **options)
    assert whole["data"]["count"] == 1797 - 300
    monkeypatch.setattr(evaluating, "_AT_ONCE", 7)
    assert numbers(evaluate_run(runs / "held", **options)) == pytest.approx(numbers(whole), rel=1e-6, abs=1e-9)
    place, together, found = threading.local(), threading.Barrier(2), {}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setattr(parallel, "world", lambda: (place.rank, 2))
    monkeypatch.setattr(parallel, "wait", together.wait)

    def run(rank):
        place.rank = rank
        found[rank] = evaluate_run(runs / "held", **options, seed=0)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert numbers(found[0]) == numbers(found[1])
    assert numbers(found[0]) == pytest.approx(numbers(whole), rel=1e-6, abs=1e-9)


def test_classes_and_features_of_ones_own_are_told(runs, tmp_path, monkeypatch):
    (tmp_path / "own_features.py").write_text(
        "import torch\nclass Half(torch.nn.Module):\n    def forward(self, x):\n        return x[:, :, ::2, ::2]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    record = evaluate_run(runs / "all", n=48, few=True, features="own_features:Half")
    assert record["features"] == "own_features:Half"
    assert record["data"]["against"] == "train"
    assert len(record["checksum"]) == 64


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
        (["--few", "--n=9", "--nfe=0"], "--nfe is 0"),
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
