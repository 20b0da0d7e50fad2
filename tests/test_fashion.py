"""The benchmark beside a diffusers loop: what is counted, what is kept, and how the sampler is chosen."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

fashion = pytest.importorskip("benchmarks.fashion")


def test_drawing_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion, "AT_ONCE", 4)
    asked = []

    def draw(first, n):
        asked.append((first, n))
        if first == 8 and len(asked) == 3:
            raise KeyboardInterrupt
        return torch.full((n, *fashion.SHAPE), first / 10 - 1)

    place = tmp_path / "row" / "sampler"
    with pytest.raises(KeyboardInterrupt):
        fashion.samples_of(place, draw, 10)
    found = np.load(fashion.samples_of(place, draw, 10))["samples"]
    assert asked == [(0, 4), (4, 4), (8, 2), (8, 2)]
    assert found.shape == (10, *fashion.SHAPE)
    assert found.dtype == np.uint8
    assert found[:, 0, 0, 0].tolist() == [0] * 4 + [51] * 4 + [102] * 2


def test_a_row_takes_its_nearer_sampler_and_measures_once(tmp_path, monkeypatch):
    class Kind:
        place, trained = tmp_path / "row", 0

        def train(self, minutes):
            self.trained += 1
            return {"steps": 1}

        def samplers(self):
            return {name: lambda first, n, at=at: torch.full((n, *fashion.SHAPE), at) for name, at in tried.items()}

    tried, kind = {"far, 1 step": 0.9, "near, 2 steps": 0.1}, Kind()
    monkeypatch.setattr(fashion, "FIRST", 2)
    monkeypatch.setattr(fashion, "distance", lambda file, data: {"value": float(np.load(file)["samples"].mean())})
    for _ in range(2):
        found = fashion.row(kind, tmp_path, 3.0, 6)
    assert (found["sampler"], found["minutes"], kind.trained) == ("near, 2 steps", 3.0, 1)
    with pytest.raises(ValueError, match="trained for 3 minutes, not 20"):
        fashion.row(kind, tmp_path, 20.0, 6)
    assert json.loads((kind.place / "near_2_steps" / "distance_6.json").read_text()) == found["distance"]


def test_the_peer_learns():
    torch.manual_seed(0)
    kind = fashion.Diffusers(None, None, 1e-3, 8)
    net, average, step = kind.stepping(torch.rand(16, *fashion.SHAPE), 600)
    before = [p.detach().clone() for p in net.parameters()]
    for _ in range(2):
        step()
    assert any(not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert average.optimization_step == 2
