"""What is measured of scores and samples, on laws whose answer is known, and that the verdict names what was spoilt."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_training import small

from scorelab import load, sigmas
from scorelab.cli.main import main
from scorelab.data import digits
from scorelab.distributions import Empirical, GaussianMixture
from scorelab.evaluation import nearest_distances
from scorelab.health import copies, derivatives, judged, lag, level_health, level_told, sample_health
from scorelab.training import train
from scorelab.typing import Batch

D = 12


def gaussian(x, sigma):
    """The score of N(0, I)."""
    return -x / (1 + sigma**2)


@pytest.fixture(scope="module")
def law():
    """Eight clusters in 12 dimensions."""
    generator = torch.Generator().manual_seed(0)
    return GaussianMixture(2 * torch.randn(8, D, generator=generator), 0.15)


@pytest.fixture(scope="module")
def sets(law):
    """Training and held-out data."""
    generator = torch.Generator().manual_seed(1)
    return law.sample(600, generator), law.sample(400, generator)


class Known:
    """A score that says which noise levels it knows, and which are its own."""

    sigma_range = (0.02, 20.0)

    def __init__(self, fn, levels=None):
        self.fn, self.levels = fn, levels

    def __call__(self, x, sigma):
        return self.fn(x, sigma)


def measured(score, held, train=None, **options):
    return list(level_health(score, held, train, **{"points": 300, "differentiated": 0, **options}))


def names(levels, samples=None, lags=None):
    return [f.fault for f in judged(levels, samples, lags).findings]


def test_losses_of_a_gaussian():
    """Of N(0, I) the least loss is 1/(1 + sigma^2), a linear denoiser's; its slope is 1 and it is best told sigma."""
    x = torch.randn(4000, D, generator=torch.Generator().manual_seed(0))
    for level in measured(Known(gaussian), x[:2000], x[2000:], count=4, points=2000):
        least = 1 / (1 + level.sigma**2)
        assert level.loss.value == pytest.approx(least, abs=4 * level.loss.stderr)
        assert level.linear == pytest.approx(least, rel=0.03)
        assert level.slope.value == pytest.approx(1, abs=4.5 * level.slope.stderr)
        assert abs(level.offset.value) < 4.5 * level.offset.stderr
        assert level.fisher is None


def test_the_least_loss_on_training_data_is_the_empirical_scores(law, sets):
    """By the formula of the posterior mean over the training points, written out; and what learnt them is at 1."""
    train, held = sets
    some = train[:60]
    for level in measured(Known(Empirical(some).score), held, some, count=5):
        assert level.train_loss.value == pytest.approx(level.best.value, rel=1e-4, abs=1e-9)
        assert level.memorised is None or level.memorised.value == pytest.approx(1, abs=1e-5)
    level = measured(Known(law.score), held, some, count=2, sigma_min=1.0, sigma_max=2.0, points=60)[0]
    generator, x0 = torch.Generator().manual_seed(0), some.double()
    errors = []
    for _ in range(200):
        eps = torch.randn(60, D, generator=generator, dtype=torch.float64)
        x = x0 + level.sigma * eps
        weights = torch.softmax(-torch.cdist(x, x0).square() / (2 * level.sigma**2), 1)
        errors.append(((x - weights @ x0) / level.sigma - eps).square().mean())
    assert level.best.value == pytest.approx(float(torch.stack(errors).mean()), abs=5 * level.best.stderr)


def test_the_law_itself_has_memorised_nothing(law, sets):
    train, held = sets
    found = measured(Known(law.score), held, train, truth=law)
    assert all(level.fisher.value < 1e-9 for level in found)
    known = [level.memorised for level in found if level.memorised is not None]
    assert known
    assert all(abs(m.value) < 4.5 * m.stderr for m in known)
    assert names(found) == []


def test_derivatives_of_linear_scores():
    """s = -a x + B x, B antisymmetric: J = (1 - sigma^2 a) I + sigma^2 B."""
    generator, sigma, a = torch.Generator().manual_seed(0), 0.7, 0.4
    b = torch.randn(D, D, generator=generator)
    b = b - b.T
    x = torch.randn(400, D, generator=generator)
    found = derivatives(lambda x, s: -a * x + x @ b.T, x, x, sigma, between=False, generator=generator)
    c = 1 - sigma**2 * a
    assert float(found.trace.mean()) == pytest.approx(D * c, rel=0.02)
    size = math.sqrt(D * c**2 + sigma**4 * float(b.square().sum()))
    assert found.asymmetry == pytest.approx(sigma**2 * float(b.norm()) / size, rel=0.02)
    assert found.fokker_planck is None


@pytest.mark.parametrize("c", [1.0, 0.5, 2.0])
def test_the_residual_of_a_gaussian_with_a_wrong_heat_equation(c):
    """s = -x/(1 + c sigma^2): the residual is (1 - c)/c of the left side."""
    x = torch.randn(300, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"between": True, "generator": torch.Generator().manual_seed(1)}
    found = derivatives(lambda x, s: -x / (1 + c * s**2), x, x, 0.8, **options)
    assert found.fokker_planck == pytest.approx(abs(1 - c) / c, rel=1e-3, abs=1e-3)


def test_dimension_of_data_on_a_subspace():
    """Of N(0, I) on 3 of 12 dimensions, at x: 3/(1 + sigma^2) + sigma^2 |x|^2/(1 + sigma^2)^2."""
    sigma, flat = 0.05, torch.zeros(500, D, dtype=torch.float64)
    flat[:, :3] = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variance = torch.tensor([1.0] * 3 + [0.0] * (D - 3), dtype=torch.float64)
    options = {"between": False, "generator": torch.Generator().manual_seed(1)}
    found = derivatives(lambda x, s: -x / (variance + s**2), flat, flat, sigma, **options)
    known = 3 / (1 + sigma**2) + sigma**2 * float(flat.square().sum(1).mean()) / (1 + sigma**2) ** 2
    assert found.dimension.value == pytest.approx(known, abs=1e-6)


def test_a_score_that_autograd_cannot_follow_has_no_derivatives(law):
    x = law.sample(8, torch.Generator().manual_seed(0))
    blind = lambda x, s: law.score(x.detach(), s).detach()  # noqa: E731
    assert derivatives(blind, x, x, 1.0, between=True, generator=torch.Generator().manual_seed(0)) is None


def off_by(law, steps):
    """A score with levels of its own that takes another of them, eps_hat staying what it is there."""
    levels = sigmas.geometric(40, sigma_min=0.02, sigma_max=20.0)
    levels = levels[levels > 0].flip(0).double()

    def fn(x, sigma):
        place = int((levels - float(sigma.flatten()[0])).abs().argmin()) + steps
        told = levels[min(max(place, 0), len(levels) - 1)].to(x)
        return law.score(x, told) * told / sigma.reshape(-1, *[1] * (x.ndim - 1))

    return Known(fn, levels)


SPOILT = {
    "sign": lambda law: Known(lambda x, s: -law.score(x, s)),
    "scale": lambda law: Known(lambda x, s: 0.8 * law.score(x, s)),
    "level": lambda law: Known(lambda x, s: law.score(x, 1.3 * s)),
    "time": lambda law: off_by(law, 1),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_what_a_score_was_spoilt_by_is_named_first(law, sets, fault):
    train, held = sets
    assert names(measured(SPOILT[fault](law), held, train))[0] == fault


@pytest.mark.parametrize("steps", [-1, 1])
def test_of_how_many_of_its_levels_a_score_is_off(law, sets, steps):
    told = level_told(measured(off_by(law, steps), sets[1]))
    assert told.value == pytest.approx(-steps, abs=0.35)


def test_a_memorising_score_and_its_samples(law, sets):
    train, held = sets
    levels = measured(Known(Empirical(train).score), held, train)
    assert names(levels)[0] == "memorised"
    generator = torch.Generator().manual_seed(3)
    copied = train[torch.randint(len(train), (500,), generator=generator)] + 0.01 * torch.randn(
        500, D, generator=generator
    )
    assert names(measured(Known(law.score), held, train), sample_health(copied, train, held)) == ["memorised"]


def test_weights_that_lag(law, sets):
    """An average that is half the score of another law, beside weights that are the score."""
    held = sets[1]
    slow = Known(lambda x, s: 0.5 * (law.score(x, s) + gaussian(x, s)))
    late = lag(slow, Known(law.score), held)
    assert names([], lags={"the raw weights": late}) == ["average"]
    assert names([], lags={"the raw weights": lag(Known(law.score), slow, held)}) == []


def images(labels, generator, bright=1.0):
    """Bars of 6 x 6 pixels, at a place that is their class, from -1 to bright, with some noise."""
    x = -torch.ones(len(labels), 1, 6, 6)
    for i, k in enumerate(labels.tolist()):
        x[i, 0, k] = bright
    return (x + 0.1 * torch.randn(x.shape, generator=generator)).clamp(-1, max(1.0, bright))


@pytest.fixture(scope="module")
def bars():
    generator = torch.Generator().manual_seed(0)
    made = [Batch(images(k, generator), k) for k in (torch.arange(n) % 6 for n in (300, 200))]
    return generator, *made


def test_good_samples_have_no_fault(bars):
    generator, train, held = bars
    assert names([], sample_health(images(torch.arange(300) % 6, generator), train, held)) == []


def test_a_missing_class_is_named(bars):
    generator, train, held = bars
    found = sample_health(images(torch.arange(300) % 5, generator), train, held)
    assert found.p_classes < 1e-6
    assert names([], found) == ["class"]
    assert "class 5" in str(judged([], found))
    # asked for, and something else came
    asked = torch.arange(300) % 6
    found = sample_health(images(torch.where(asked == 2, 3, asked), generator), train, held, asked=asked)
    assert found.p_classes is None
    assert "of samples asked to be of class 2, 0.0% look like it" in str(judged([], found))


def test_clipped_samples_and_paler_ones(bars):
    generator, train, held = bars
    labels = torch.arange(300) % 6
    assert names([], sample_health(images(labels, generator).clamp(-0.5, 0.5), train, held))[0] == "clipped"
    pale = images(labels, generator)
    pale[:290] = pale[:290] * 0.6 - 0.4
    assert names([], sample_health(pale, train, held)) == ["contrast"]
    assert names([], sample_health((images(labels, generator) + 0.4), train, held))[0] in ("clipped", "brightness")


def drawn(law, generator, share, count=300):
    """Samples of which a share are copies of training data."""
    train, held, x = (law.sample(n, generator) for n in (200, 60, count))
    copied = torch.rand(count, generator=generator) < share
    near = train[torch.randint(len(train), (count,), generator=generator)]
    return torch.where(copied[:, None], near + 0.01 * torch.randn(near.shape, generator=generator), x), train, held


def test_size_and_power_of_the_test_of_copies(law):
    """p is uniform for the law's own samples, whatever their number; half of copies are found."""
    generator = torch.Generator().manual_seed(5)
    p = torch.tensor([copies(*drawn(law, generator, 0.0)).p for _ in range(200)])
    # a share of 200 at 5 %, four standard errors
    assert float((p < 0.05).double().mean()) == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 200))
    assert float((p < 0.5).double().mean()) == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 200))
    found = [copies(*drawn(law, generator, 0.5)) for _ in range(20)]
    assert sum(c.p < 0.01 for c in found) >= 18
    assert sum(c.share.value for c in found) / 20 == pytest.approx(0.5, abs=0.15)


def test_authenticity_and_what_is_known_already(law):
    """By the distances of all pairs; distances that are passed in give the same."""
    generator = torch.Generator().manual_seed(8)
    train, held, x = (law.sample(n, generator).double() for n in (80, 40, 50))
    apart = torch.cdist(train, train).fill_diagonal_(math.inf).min(1).values
    right = [(d.min(1).values > apart[d.argmin(1)]).double().mean() for d in (torch.cdist(z, train) for z in (x, held))]
    found = copies(x, train, held)
    assert (found.authentic.value, found.authentic_held.value) == pytest.approx([float(r) for r in right])
    known = {"of_samples": nearest_distances(x, train), "of_held": nearest_distances(held, train)}
    assert copies(x, train, held, **known) == found


def test_of_as_many_samples_for_every_datum_none_is_in_excess(law):
    x = law.sample(60, torch.Generator().manual_seed(9))
    found = copies(x, x[:40], x[40:])
    assert (found.p, found.share.value) == (0.5, 0.0)


def test_smooth_samples_are_no_copies(law):
    """Cluster means are nearer to training data than held-out data are, so C_T takes them for copies."""
    generator = torch.Generator().manual_seed(6)
    smooth = GaussianMixture(law.means, 0.05)
    found = copies(smooth.sample(400, generator), law.sample(400, generator), law.sample(200, generator))
    assert found.p > 1e-3
    assert found.c_t < -3


def test_copies_of_a_datum_do_not_count_as_independent(law):
    """All samples at one held-out and one training datum: with two lots nothing is certain."""
    generator = torch.Generator().manual_seed(7)
    train, held = law.sample(50, generator), law.sample(50, generator)
    x = torch.cat([train[:1].expand(90, D), held[:1].expand(10, D)])
    assert copies(x, train, held).p > 0.1


def test_the_packaged_digits_are_healthy():
    """As far as it can be told: no data was held out of their training."""
    data = digits()
    batch = Batch(data.take(torch.arange(len(data))), data.labels)
    levels = measured(load("digits"), batch, batch, count=4, points=48, differentiated=4)
    assert names(levels) == []
    assert all(level.asymmetry < 0.4 for level in levels)


@pytest.mark.parametrize(
    ("held", "train", "said"),
    [
        (torch.zeros(4, D), None, "held has 4 samples; expected at least 8"),
        (torch.zeros(20, D), torch.zeros(20, 3), "train"),
        (torch.full((20, D), math.nan), None, "held"),
    ],
)
def test_data_that_does_not_fit_is_refused(held, train, said):
    with pytest.raises(ValueError, match=said):
        measured(Known(gaussian), held, train)


def test_classes_that_were_asked_for_are_one_for_each_sample(bars):
    generator, train, held = bars
    with pytest.raises(ValueError, match=r"asked is \(3,\) for 12 samples"):
        sample_health(images(torch.arange(12) % 6, generator), train, held, asked=torch.arange(3))


def test_a_score_that_does_not_say_its_levels_is_asked_for_them():
    x = torch.randn(20, D)
    with pytest.raises(ValueError, match="expected sigma_min and sigma_max"):
        measured(gaussian, x)
    assert len(measured(gaussian, x, sigma_min=0.1, sigma_max=10.0, count=3)) == 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of training, after which a network knows next to nothing."""
    folder = tmp_path_factory.mktemp("runs") / "x"
    train(small(2, data__validation=300, sampling__grid__n=3), folder, progress=False)
    return folder


def test_the_command_says_what_is_wrong_and_what_is_normal(run, tmp_path, capsys):
    options = ["--levels=3", "--points=32", "--n=40", f"--out={tmp_path / 'health.json'}"]
    assert main(["health", f"--workdir={run}", *options]) == 0
    told = capsys.readouterr().out
    record = json.loads((tmp_path / "health.json").read_text())
    assert record["data"] == {"source": "digits", "training": 1497, "held_out": 300}
    assert record["findings"]
    assert told.splitlines()[0] == f"{run}, step 2, ema: {record['verdict']}"
    for name in ("loss", "memorised", "slope", "asymmetry"):
        assert f"  {name}: normal is " in told
    assert "copies: " in told
    assert "classes of the samples" in told
    # what the scheme predicts of an untrained network: the least error of each level is far below
    assert all(level["train_loss"]["value"] > level["best"]["value"] for level in record["levels"])
    assert [c["share"]["value"] for c in record["samples"]["classes"]] != []
    assert sum(c["share"]["value"] for c in record["samples"]["classes"]) == pytest.approx(1)


def test_data_of_a_known_law_is_fresh_and_the_truth_is_known(tmp_path, capsys):
    c = small(2, data__source="checkerboard", model__net__name="mlp", sampling__grid__n=3)
    train(c, tmp_path / "p", progress=False)
    out = tmp_path / "health.json"
    assert main(["health", f"--workdir={tmp_path / 'p'}", "--levels=3", "--points=200", "--n=100", f"--out={out}"]) == 0
    record = json.loads(out.read_text())
    for level in record["levels"]:
        # the error of eps is what cannot be known plus what the score is off
        assert level["loss"]["value"] > level["fisher"]["value"] - 4 * level["fisher"]["stderr"]
        assert level["train_loss"] is None
    assert record["samples"]["copies"] is None


def test_without_held_out_data_it_says_what_cannot_be_told(tmp_path, capsys):
    train(small(2, sampling__grid__n=3), tmp_path / "all", progress=False)
    assert main(["health", f"--workdir={tmp_path / 'all'}", "--levels=3", "--points=16", "--n=0"]) == 0
    said = capsys.readouterr()
    assert "no data was held out" in said.err
    assert "copies:" not in said.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--levels=1"], "--levels 1"),
        (["--points=2"], "--points 2"),
        (["--sampler=x.json"], "--sampler is a file"),
        (["--weights=ema_0.5"], "holds no weights"),
    ],
)
def test_a_command_that_cannot_be_done_is_refused(run, options, said, capsys):
    assert main(["health", f"--workdir={run}", *options]) == 2
    assert said in capsys.readouterr().err


def test_scores_of_normal_data_of_one_variance_tell_nothing_of_their_level():
    """The loss by the best multiple of eps_hat is the same whatever level the score is told."""
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    found = level_health(lambda x, s: -x / (1 + s**2), x, None, count=6, points=400, sigma_min=0.01, sigma_max=20.0)
    assert level_told(list(found)) is None
