"""``make gallery``: trains, draws, says what failed, and does nothing twice."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from benchmarks import gallery, minutes
from scorelab.plotting.page import write_page


def test_every_config_of_a_score_model_is_in_it():
    names = gallery.names_of("digits")
    assert names[-1] == "digits/edm"
    assert {"digits/vdm", "digits/ncsn"} < set(names)
    assert not {"digits/classifier", "digits/features"} & set(names)


def test_steps_in_a_time_and_the_time_of_all_starts(tmp_path):
    """A clock that tells half a second more each time it is read: 20 steps in 10 s, however few were tried."""
    for tried in (1, 12):
        told = iter(range(1000))
        assert minutes.steps_in(10, lambda: None, tried, lambda told=told: next(told) / 2) == (20, 0.5)
    assert minutes.steps_in(0.1, lambda: None, 6, lambda told=told: next(told))[0] == 1
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"seconds": {s}}}\n' for s in (1, 2, 5.5, 0.5, 2.5, 1)))
    assert minutes.spent(tmp_path) == 5.5 + 2.5 + 1


def test_a_family_is_trained_and_its_sheets_are_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "SHEET", 10)
    # on a slow machine one step may be all that fits, after which no class matters yet
    monkeypatch.setattr(gallery, "steps_in", lambda seconds, step, tried: (4, seconds / 4))
    config = gallery.config_of("digits/conditional")
    config.sampling.grid.n = 4
    monkeypatch.setattr(gallery, "config_of", lambda name: config)
    place = tmp_path / "digits-conditional"
    gallery.work(gallery.family, ("digits/conditional", 1), place)
    found = gallery.done(place)
    assert found["steps"] == 4
    assert found["training, s"] > 0
    assert {f"guidance {w}, s" for w in (0, 1, 2, 4)} < found.keys()
    sheets = [np.asarray(Image.open(place / f"guidance_{w}.png")) for w in (0, 1, 2, 4)]
    assert all(x.shape == (50 - 2, 10 * 50 - 2) for x in sheets)
    assert len({x.tobytes() for x in sheets}) == 4
    # the run is there: going on takes no step more
    before = (place / "run" / "metrics.jsonl").read_text()
    assert gallery.trained("digits/conditional", 60, place / "run") is not None
    assert (place / "run" / "metrics.jsonl").read_text() == before
    names = ["digits/conditional", "digits/ddpm"]
    odd = ("a < b", "by ``--data x<y``", [], None)
    page = write_page(tmp_path / "index.html", "gallery", [odd, *gallery.sections(names, [], tmp_path)]).read_text()
    assert "<h2>a &lt; b</h2><p>by <code>--data x&lt;y</code></p>" in page
    assert page.count("<img") == 4
    assert re.search(r"4 steps in \d+ s; 10 samples: guidance 0 \d+ s, guidance 1", page)
    assert "not done yet" in page


def test_what_fails_is_said_and_done_again(tmp_path, capsys):
    def part(source, out):
        if source == "bad":
            raise ValueError("no such data")
        return {"seconds": 1.0}

    gallery.work(part, ("bad",), tmp_path / "x")
    assert "x failed: no such data" in capsys.readouterr().err
    assert gallery.done(tmp_path / "x") is None
    assert "no such data" in gallery.section("X", "what it is.", tmp_path / "x")[1]
    gallery.work(part, ("good",), tmp_path / "x")
    assert gallery.done(tmp_path / "x") == {"seconds": 1.0}
    assert not (tmp_path / "x" / "failed.txt").exists()


@pytest.mark.slow
def test_the_pictures_are_drawn(tmp_path, monkeypatch):
    """By an EDM of a few seconds; interpolations end at the images, restored pixels that are known are those."""
    monkeypatch.setattr(gallery, "names_of", lambda source: ["digits/edm"])
    monkeypatch.setitem(gallery.JUDGED, "digits", 60)
    monkeypatch.setattr(gallery, "COSTS", {"samplers": ["heun"], "nfe": [5]})
    gallery.work(gallery.family, ("digits/edm", 0.05), tmp_path / "digits-edm")
    for key in ("costs", "restored", "interpolated", "schedules"):
        gallery.work(gallery.EXTRAS[key][0], ("digits",), tmp_path / f"digits-{key}")
        assert gallery.done(tmp_path / f"digits-{key}"), (tmp_path / f"digits-{key}" / "failed.txt").read_text()
    assert gallery.done(tmp_path / "digits-interpolated")["ends off the images by (RMS)"] < 0.05
    assert len(json.loads((tmp_path / "digits-costs" / "cost.json").read_text())["records"]) == 1
    assert len(list((tmp_path / "digits-restored").glob("*.png"))) == 3
