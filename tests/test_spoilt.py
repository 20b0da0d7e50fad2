"""Networks trained on digits, one as it should be and others spoilt on purpose: the verdict names what was done."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scorelab import PerSampleNoise, sigmas
from scorelab.cli.health import health_run, health_table
from scorelab.cli.runs import load_run
from scorelab.data import digits
from scorelab.health import judged, lag, level_health, sample_health
from scorelab.training import default_config, sample_model, train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:samples at step")]
HELD = 297


def experiment(steps=800, **data):
    c = default_config()
    c.data.source, c.data.validation = "digits", HELD
    c.model.net.width, c.model.net.multipliers, c.model.net.blocks, c.model.net.dropout = 24, (1, 2), 1, 0.0
    c.training.steps, c.training.batch_size = steps, 64
    c.training.checkpoint_every, c.training.sample_every, c.training.validate_every = steps, 0, 0
    c.optim.lr, c.optim.warmup, c.optim.schedule.name, c.optim.ema = 2e-3, 50, "cosine", (0.99,)
    for key, value in data.items():
        c.data[key] = value
    return c


def file_of(path, x, labels):
    """Images as a file has them, gray levels 0 to 16 as fractions of 255, with labels."""
    np.savez(path, images=((x[:, 0] + 1) * 127.5).round().byte().numpy(), labels=labels.numpy())
    return {"source": "arrays", "path": str(path), "validation": HELD}


@pytest.fixture(scope="module")
def sets():
    """Training and held-out digits of the run of the unspoilt network."""
    data = digits()
    held = data.hold_out(HELD)
    return data.labelled(data.take(data.trained), data.trained), held


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "x"
    train(experiment(), folder, progress=False)
    return folder


def fault(levels, samples=None):
    found = judged(levels, samples)
    print(found.verdict)
    return found.findings[0].fault if found.findings else None


def test_a_good_network_has_no_fault(good):
    found, record = health_run(good, n=500, nfe=30)
    print(health_table(record))
    assert found.findings == []


class Spoilt:
    """A score made of a model's."""

    def __init__(self, model, fn, levels=None):
        self.sigma_range, self.fn, self.levels = model.sigma_range, fn, levels

    def __call__(self, x, sigma):
        return self.fn(x, sigma)


def sign(model):
    return Spoilt(model, lambda x, s: -model(x, s))


def scale(model):
    return Spoilt(model, lambda x, s: 0.85 * model(x, s))


def time(model):
    """The level after its own of a ladder of 40, for the label alone."""
    low, high = model.sigma_range
    levels = sigmas.geometric(40, sigma_min=low, sigma_max=high)
    levels = levels[levels > 0].flip(0).double()

    def fn(x, sigma):
        place = int((levels.log() - float(sigma.flatten()[0].log())).abs().argmin())
        told = levels[min(place + 1, len(levels) - 1)].clamp(low, high).to(x)
        return model(x, told) * told / sigma.reshape(-1, *[1] * (x.ndim - 1))

    return Spoilt(model, fn, levels)


@pytest.mark.parametrize("spoil", [sign, scale, time])
def test_a_score_that_is_read_wrongly(good, sets, spoil):
    model = load_run(good)[1]
    train, held = sets
    assert fault(list(level_health(spoil(model), held, train, points=297, differentiated=0))) == spoil.__name__


def test_an_average_that_lags(tmp_path, good, sets):
    """Weights of an eighth of the training, as an average without a warm-up would hold for long."""
    training, held = sets
    train(experiment(100), tmp_path / "x", progress=False)
    early, late = load_run(tmp_path / "x")[1], load_run(good, weights="model")[1]
    levels = list(level_health(early, held, training, points=297, differentiated=0))
    found = judged(levels, lags={"the raw weights": lag(early, late, held)})
    print(found.verdict)
    assert found.findings[0].fault == "average"


def test_a_network_that_knows_its_few_data_by_heart(tmp_path):
    data = digits()
    some = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[: HELD + 40]
    c = experiment(2500, **file_of(tmp_path / "few.npz", data.take(some), data.labels[some]))
    train(c, tmp_path / "x", progress=False)
    found, record = health_run(tmp_path / "x", n=500, nfe=30)
    print(health_table(record))
    assert found.findings[0].fault == "memorised"


def samples_of(folder):
    config, model, _ = load_run(folder)
    return sample_model(model, config, 500, PerSampleNoise(0), condition=None, progress=False)


def test_a_network_that_never_saw_a_class(tmp_path, sets):
    data = digits()
    kept = (data.labels != 4).nonzero().flatten()
    train(
        experiment(**file_of(tmp_path / "nine.npz", data.take(kept), data.labels[kept])), tmp_path / "x", progress=False
    )
    found = judged([], sample_health(samples_of(tmp_path / "x"), *sets))
    print(found.verdict)
    assert found.findings[0].fault == "class"
    assert "class 4" in found.findings[0].seen


def test_a_network_that_learnt_clipped_data(tmp_path, sets):
    data = digits()
    every = torch.arange(len(data))
    c = experiment(**file_of(tmp_path / "dark.npz", data.take(every).clamp(max=0.2), data.labels))
    train(c, tmp_path / "x", progress=False)
    training, held = sets
    levels = list(level_health(load_run(tmp_path / "x")[1], held, training, points=297, differentiated=0))
    assert fault(levels, sample_health(samples_of(tmp_path / "x"), training, held)) == "clipped"
