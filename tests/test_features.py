"""Features of images: whose they are, how they are kept, and that nothing but the images decides them."""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import as_processes
from torch import nn

from scorelab import parallel
from scorelab.classifiers import ClassifierModel
from scorelab.evaluation import FromClassifier, FromModule, Inception, Moments, Pixels, collected, features
from scorelab.nn import Classifier
from scorelab.processes import VE


def images(n=50, channels=1):
    return torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Counted(Pixels):
    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return super().__call__(x)


@pytest.mark.parametrize("size", [1, 7, 50, 256])
def test_they_are_kept_whatever_the_batches(tmp_path, size):
    x, seen = images(), Counted()
    for known, calls in (({"data": "a"}, 1), ({"data": "a"}, 1), ({"data": "b"}, 2), (None, 3), (None, 4)):
        found = collected(seen, lambda rows: x[list(rows)], 50, place=tmp_path, known=known, size=size)
        assert torch.equal(found, x.flatten(1))
        assert seen.calls == calls * math.ceil(50 / size)
    assert len(list(tmp_path.iterdir())) == 3
    # mapped from the file: changing them changes no file
    found += 1
    again = collected(seen, lambda rows: x[list(rows)], 50, place=tmp_path, known={"data": "a"})
    assert torch.equal(again, x.flatten(1))
    torch.testing.assert_close(Moments.of(again).mean, x.flatten(1).double().mean(0))


def test_processes_make_their_shares(tmp_path, monkeypatch):
    x = images()

    def run(rank):
        mine = []
        found = collected(Pixels(), lambda rows: mine.extend(rows) or x[list(rows)], 50, place=tmp_path, size=8)
        assert mine == list(parallel.shard(50))
        return found

    for found in as_processes(monkeypatch, 3, run):
        torch.testing.assert_close(found, x.flatten(1), rtol=0, atol=0)
    assert len(list(tmp_path.iterdir())) == 1


def test_two_jobs_at_once_do_not_meet(tmp_path, monkeypatch):
    """The second begins and ends while the first, of another process, is at its second part."""
    x, pids, inside = images(), itertools.count(7), []
    monkeypatch.setattr(features.os, "getpid", lambda: next(pids))

    def seen(rows):
        if rows.start == 8 and not inside:
            inside.append(None)
            inside[0] = collected(Pixels(), seen, 50, place=tmp_path, known={"of": "x"}, size=8)
        return x[list(rows)]

    found = collected(Pixels(), seen, 50, place=tmp_path, known={"of": "x"}, size=8)
    torch.testing.assert_close(found, x.flatten(1), rtol=0, atol=0)
    torch.testing.assert_close(inside[0], x.flatten(1), rtol=0, atol=0)
    assert len(list(tmp_path.iterdir())) == 1


def test_what_fails_in_one_process_fails_in_all(tmp_path, monkeypatch):
    x = images()
    x[33, 0, 2, 2] = math.nan
    first, second, third = as_processes(
        monkeypatch, 3, lambda rank: collected(Pixels(), lambda rows: x[list(rows)], 50, place=tmp_path, size=8)
    )
    assert "features of image 33 are not finite" in str(third)
    assert str(first) == str(second) == "another process failed, and says why"
    assert list(tmp_path.iterdir()) == []


def test_damaged_images_leave_no_file(tmp_path):
    x = images()
    x[33, 0, 2, 2] = math.nan
    with pytest.raises(ValueError, match="features of image 33 are not finite"):
        collected(Pixels(), lambda rows: x[list(rows)], 50, place=tmp_path, known={"data": "a"}, size=7)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="count is 0"):
        collected(Pixels(), lambda rows: x, 0, place=tmp_path)


def test_a_module_of_ones_own():
    """Maps are averaged over their sizes, dropout is off, and weights are part of the checksum."""
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Dropout(0.5))
    seen, x = FromModule(net, "mine"), images()
    assert torch.equal(seen(x), net[0](x).mean((2, 3)))
    before = seen.about()
    assert before["features"] == "mine"
    assert seen.about() == before
    with torch.no_grad():
        net[0].bias[0] += 1
    assert seen.about()["checksum"] != before["checksum"]
    with pytest.raises(ValueError, match=r"Sums returned \(50,\) for 50 images; expected a tensor"):
        FromModule(Sums())(x)
    with pytest.raises(ValueError, match="FromModule has no classes"):
        seen.logits(x)


def test_networks_follow_the_images_to_their_device():
    """On another device, which holds no numbers, mixing would raise."""
    assert FromModule(nn.Conv2d(1, 3, 3))(images().to("meta")).device.type == "meta"


class Sums(nn.Module):
    def forward(self, x):
        return x.sum((1, 2, 3))


def test_a_classifier_gives_what_its_last_layer_sees():
    net = Classifier((1, 8, 8), 10, width=8, multipliers=(1, 2), blocks=1, attention=(1,), head=4)
    model = ClassifierModel(net, VE(sigma_min=0.02), data_shape=(1, 8, 8), label="log_sigma")
    seen, x = FromClassifier(model), images()
    found, logits = seen.both(x)
    assert found.shape == (50, 16)
    torch.testing.assert_close(net.pool.out(found), logits)
    torch.testing.assert_close(model(x, torch.tensor(0.02)), logits)
    torch.testing.assert_close(torch.cat([seen(x[:7]), seen(x[7:])]), found, rtol=1e-4, atol=1e-5)
    assert not net.pool.out._forward_pre_hooks
    model.net = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="Linear has no layer to take"):
        FromClassifier(model)


def test_inception_weights_are_asked_for_and_checked(tmp_path):
    with pytest.raises(ValueError, match="expected Inception's weights, weights-inception-2015-12-05-6726825d.pth"):
        Inception(tmp_path / "none.pth")
    (tmp_path / "other.pth").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"has the SHA-256 d9298a10...; expected 6726825d"):
        Inception(tmp_path / "other.pth")


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
def test_inception_by_a_file_of_weights(tmp_path, monkeypatch):
    """Random ones, in the published layout: bytes, gray images as three equal channels."""
    made = features._inception()
    monkeypatch.setattr(torch, "load", lambda *a, **k: {})
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *a, **k: None)
    state = made("inception", ["2048"], feature_extractor_weights_path="none").state_dict()
    monkeypatch.undo()
    torch.save(state, tmp_path / "weights.pth")
    digest = features.hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()
    monkeypatch.setattr(features, "_INCEPTION", digest[:8])
    seen, x = Inception(tmp_path / "weights.pth"), images(2)
    found = seen(x)
    assert (found.shape, seen.logits(x).shape) == ((2, 2048), (2, 1008))
    assert torch.equal(seen(x.expand(-1, 3, -1, -1)), found)
    levels = ((x + 1) * 127.5).round()
    assert torch.equal(seen(levels / 127.5 - 1), found)
    assert seen.about()["checksum"] == digest
    with pytest.raises(ValueError, match="expected .B, 1 or 3, H, W."):
        seen(torch.zeros(2, 2, 8, 8))


def test_files_are_arrays_that_numpy_reads(tmp_path):
    x = images()
    collected(Pixels(), lambda rows: x[list(rows)], 50, place=tmp_path, known={"data": "a"})
    (file,) = tmp_path.iterdir()
    np.testing.assert_array_equal(np.load(file), x.flatten(1).numpy())


def test_the_page_of_distances_runs_as_it_stands(capsys):
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.S)[0]
    exec(compile(code, "evaluation.md", "exec"), {})
    energy, interval, coverage = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"-?[\d.e-]+ ± [\d.e-]+", energy)
    assert re.fullmatch(r"\(-?[\d.e-]+, [\d.e-]+\)", interval)
    assert re.fullmatch(r"0\.\d+ ± [\d.e-]+", coverage)
