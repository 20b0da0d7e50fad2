"""Conditions and guidance: exact on a labelled mixture, through every sampler, and in training."""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import F64, generator, randn

from scorelab import (
    VE,
    PerSampleNoise,
    ScoreModel,
    broadcast,
    classifier_free,
    clipped,
    log_likelihood,
    sample,
    samplers,
    sigmas,
)
from scorelab.checks import level
from scorelab.distributions import GaussianMixture, Labelled, target
from scorelab.evaluation import energy_distance
from scorelab.guidance import Projected, autoguidance, classifier
from scorelab.inverse import Inpainting, Measurement, moment_matching, pseudo_inverse
from scorelab.models import Constant, LogSigma
from scorelab.nn import MLP, UNet
from scorelab.predictions import edm

LOW, HIGH = 0.1, 20.0


def eight() -> tuple[Labelled, GaussianMixture]:
    """Eight components of different widths with four labels of unequal weights; with labels, and written out."""
    means, std = 2 * randn(4, 2, 2, seed=5), torch.linspace(0.2, 0.5, 8, dtype=F64).reshape(4, 2)
    inside = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.3, 0.7], [0.6, 0.4]], dtype=F64)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    parts = [GaussianMixture(m, s, w) for m, s, w in zip(means, std, inside, strict=True)]
    whole = GaussianMixture(means.reshape(8, 2), std.reshape(8), (weights.unsqueeze(1) * inside).reshape(8))
    return Labelled(parts, weights), whole


LABELLED, WHOLE = eight()


@pytest.mark.parametrize("sigma", [0.0, 0.3, 5.0])
def test_a_labelled_distribution_is_the_mixture_of_its_parts(sigma):
    x = 3 * randn(50, 2)
    torch.testing.assert_close(LABELLED.log_prob(x, sigma), WHOLE.log_prob(x, sigma))
    torch.testing.assert_close(LABELLED.score(x, sigma), WHOLE.score(x, sigma))
    torch.testing.assert_close(LABELLED.denoise(x, sigma), WHOLE.denoise(x, sigma))


def test_labelled_samples_have_their_labels_distribution():
    x, labels = LABELLED.sample_labelled(20_000, generator())
    share = torch.bincount(labels) / 20_000
    assert float((share - LABELLED.weights).abs().max()) < 5 * math.sqrt(0.25 / 20_000)
    for k, part in enumerate(LABELLED.parts):
        mine = x[labels == k][:2000]
        assert energy_distance(mine, part.sample(2000, generator(9))) < 0.02
    # in random order: the first half is like the second
    assert abs(float(labels[:10_000].double().mean() - labels[10_000:].double().mean())) < 5 * math.sqrt(2 / 10_000)
    one = Labelled(LABELLED.parts[:2], torch.tensor([1.0, 0.0], dtype=F64))
    assert int(one.sample_labelled(100, generator())[1].max()) == 0
    assert one.sample_labelled(0, generator())[0].shape == (0, 2)
    with pytest.raises(ValueError, match="the parts have shapes"):
        Labelled([LABELLED.parts[0], GaussianMixture(torch.zeros(1, 3), 1.0)])
    with pytest.raises(ValueError, match=r"weights has shape \(3,\)"):
        Labelled(LABELLED.parts, torch.ones(3))


@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.7, 1.0, 2.0, 7.5])
@pytest.mark.parametrize("sigma", [torch.tensor(0.4, dtype=F64), torch.linspace(0.05, 9.0, 40, dtype=F64)])
def test_classifier_free_is_its_closed_form(scale, sigma):
    x, labels = 3 * randn(40, 2), torch.arange(40) % 4
    conditional = LABELLED.conditioned(labels)
    # the conditional score, a component at a time
    expected = torch.stack(
        [
            LABELLED.parts[int(y)].score(x[i : i + 1], sigma if sigma.ndim == 0 else sigma[i : i + 1])[0]
            for i, y in enumerate(labels)
        ]
    )
    torch.testing.assert_close(conditional(x, sigma), expected)
    unconditional = WHOLE.score(x, sigma)
    found = classifier_free(conditional, LABELLED.score, scale)(x, sigma)
    torch.testing.assert_close(found, unconditional + scale * (expected - unconditional))


def test_guided_scores_are_split_as_their_conditions_are():
    labels = torch.arange(10) % 4
    model = network()
    guided = classifier_free(model.conditioned(labels), model.conditioned(None), 3.0, interval=(0.3, 6.0))
    x, index = randn(10, 2).float(), torch.tensor([7, 2, 3])
    for sigma in (torch.tensor(0.2), torch.tensor(2.0), torch.linspace(0.1, 9, 10)):
        part = sigma if sigma.ndim == 0 else sigma[index]
        torch.testing.assert_close(guided.rows(index)(x[index], part), guided(x, sigma)[index], rtol=1e-5, atol=1e-6)
    assert guided.sigma_range == model.sigma_range
    levels = sigmas.karras(6, sigma_min=LOW, sigma_max=HIGH)
    whole = sample(guided, (10, 2), levels, generator=PerSampleNoise(0))
    parts = sample(guided, (10, 2), levels, generator=PerSampleNoise(0), batch_size=3)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def network(null: bool = True, classes: int = 4) -> ScoreModel:
    """A conditional model with random weights in 2-D."""
    torch.manual_seed(0)
    net = MLP((2,), width=16, depth=2, features=4, num_classes=classes, null_class=null)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return ScoreModel(
        net, VE(LOW, HIGH), edm(1.0), data_shape=(2,), input_scale=Constant(1.0), label=LogSigma(1.0)
    ).eval()


class Asked:
    """A model that notes the sizes of the batches its network was asked for."""

    def __init__(self, model: ScoreModel) -> None:
        self.model, self.sizes = model, []
        model.net.register_forward_pre_hook(lambda net, given: self.sizes.append(len(given[0])))


def test_an_interval_saves_evaluations_and_is_exact():
    model = network()
    asked, x = Asked(model), randn(6, 2).float()
    conditional, free = model.conditioned(torch.tensor([2])), model.conditioned(None)
    for together, sizes in ((False, [6, 6]), (True, [12])):
        guided = classifier_free(conditional, free, 2.5, interval=(0.5, 4.0), together=together)
        for sigma, inside in ((0.5, False), (0.500001, True), (4.0, True), (4.1, False)):
            at = torch.tensor(sigma)
            full = classifier_free(conditional, free, 2.5, together=False)(x, at)
            asked.sizes.clear()
            found = guided(x, at)
            assert asked.sizes == (sizes if inside else [6])
            torch.testing.assert_close(found, full if inside else conditional(x, at), rtol=1e-5, atol=1e-6)
    # ends that single precision rounds: alike as floats and as tensors, on a CPU and elsewhere
    ends = classifier_free(conditional, free, 2.5, interval=(0.3, 2.7))
    for sigma, inside in ((0.3, False), (2.7, True)):
        expected = classifier_free(conditional, free, 2.5)(x, torch.tensor(sigma)) if inside else None
        for at in (level(sigma, x), torch.tensor(sigma), torch.full((6,), sigma), torch.tensor(sigma).double()):
            wanted = conditional(x, torch.tensor(sigma)) if expected is None else expected
            torch.testing.assert_close(ends(x, at).float(), wanted, rtol=1e-5, atol=1e-6)
    # a level for each sample: each has what it would have alone
    levels = torch.tensor([0.2, 0.5, 0.6, 3.9, 4.0, 9.0])
    alone = torch.cat([guided(x[i : i + 1], s.reshape(())) for i, s in enumerate(levels)])
    torch.testing.assert_close(guided(x, levels), alone, rtol=1e-5, atol=1e-6)
    # NFE counts the guided score, and a solver sees the interval by its levels alone
    grid = [20.0, 4.5, 3.0, 0.4, 0.0]
    asked.sizes.clear()
    *_, last = samplers.trajectory(guided, x * 20, grid, samplers.Euler())
    assert last.nfe == 4
    assert asked.sizes == [6, 6, 12, 6]


def test_scale_one_is_the_conditional_score_and_costs_as_much():
    model = network()
    conditional = model.conditioned(torch.tensor([1]))
    assert classifier_free(conditional, model.conditioned(None), 1.0) is conditional
    assert classifier_free(conditional, model.conditioned(None), 1) is conditional


@pytest.mark.parametrize("sigma", [0.3, 3, np.float32(3.0)])
def test_steered_scores_take_what_every_score_takes(sigma):
    """Numbers for noise levels, by arithmetic on N(0, 1) and N(0, 2); rows of single numbers are refused in words."""
    x, var = randn(3, 2), float(sigma) ** 2
    one, two = (lambda x, s, v=v: -x / (v + broadcast(s, x) ** 2) for v in (1.0, 2.0))
    a, b = -x / (1 + var), -x / (2 + var)
    log_prob = lambda x, s: -x.square().sum(1) / (1 + broadcast(s, x).flatten() ** 2)  # noqa: E731
    m = Measurement(Inpainting(torch.tensor([True, False])), torch.zeros(1, 1), 0.5)
    # of 0 in the first number, seen with .25 of variance
    slope = -x * torch.tensor([1.0, 0.0]) / (1 + var) ** 2 / (var / (1 + var) + 0.25)
    for score, expected in (
        (classifier_free(one, two, 2.0, rescale=0.0), 2 * a - b),
        (classifier_free(one, two, 2.0, interval=(1.0, 5.0)), 2 * a - b if sigma > 1 else a),
        (classifier_free(one, two, 2.0, projected=Projected(eta=1.0)), 2 * a - b),
        (autoguidance(one, two, 3.0), 3 * a - 2 * b),
        (classifier(one, log_prob, 2.0), a - 4 * x / (1 + var)),
        (clipped(one, -1e9, 1e9), a),
        (pseudo_inverse(one, m, 1.0), a + slope),
        (moment_matching(one, m), a + slope),
    ):
        torch.testing.assert_close(score(x, sigma), expected, rtol=1e-6, atol=1e-6)
        with pytest.raises(ValueError, match=r"x has shape \(3,\); expected a batch \(B, \*D\)"):
            score(x[:, 0], sigma)


def test_guidance_refuses_what_is_none():
    model = network()
    y, none = model.conditioned(torch.tensor([1])), model.conditioned(None)
    with pytest.raises(ValueError, match="scale is nan; expected a finite number"):
        classifier_free(y, none, math.nan)
    for interval in ((2.0, 1.0), (-1.0, 1.0), (1.0, 1.0), (1.0,), (1.0, 2.0, 3.0)):
        with pytest.raises(ValueError, match="interval is .*; expected noise levels"):
            classifier_free(y, none, 2.0, interval=interval)
    with pytest.raises(TypeError, match="got NoneType; expected two scores"):
        classifier_free(y, None, 2.0)
    with pytest.raises(TypeError, match="projected is 2.5; expected None or one such as Projected"):
        classifier_free(y, none, 2.0, projected=2.5)
    with pytest.raises(TypeError, match="threshold is True; expected None or one such as Thresholded"):
        classifier_free(y, none, 2.0, threshold=True)


def test_the_null_condition_is_refused_where_the_network_knows_none():
    model, x, sigma = network(null=False), randn(3, 2).float(), torch.tensor(1.0)
    with pytest.raises(ValueError, match="none that stands for no class"):
        model.conditioned(None)
    with pytest.raises(ValueError, match="none that stands for no class"):
        model(x, sigma)
    known = network()
    assert torch.equal(known(x, sigma), known.conditioned(None)(x, sigma))
    assert not torch.equal(known(x, sigma), known.conditioned(torch.tensor([0]))(x, sigma))


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        (torch.tensor([4]), "classes from 4 to 4; expected 0 to 3"),
        (torch.tensor([-1, 2]), "classes from -1 to 2; expected 0 to 3"),
        (torch.tensor([1.0]), "float32 .*; expected classes, whole numbers"),
        (torch.tensor([[1]]), r"\(1, 1\); expected classes"),
        (torch.tensor(1), "one row a sample"),
        (7, "classes from 7 to 7; expected 0 to 3"),
    ],
)
def test_classes_that_are_none_are_refused(condition, said):
    with pytest.raises(ValueError, match=said):
        network().conditioned(condition)


def test_a_class_is_given_by_its_number():
    known, x, sigma = network(), torch.ones(3, 2), torch.tensor(1.0)
    assert torch.equal(known.conditioned(2)(x, sigma), known.conditioned(torch.tensor([2]))(x, sigma))


@pytest.mark.parametrize("null", [False, True])
def test_conditional_networks_are_saved_and_found_again(tmp_path, null):
    model = network(null)
    model.save(tmp_path)
    again = ScoreModel.load(tmp_path)
    x, sigma, y = randn(3, 2).float(), torch.tensor(1.0), torch.tensor([3, 0, 1])
    assert torch.equal(again.conditioned(y)(x, sigma), model.conditioned(y)(x, sigma))
    assert (again.num_classes, again.conditional) == (4, True)
    assert (again.null_condition is None) == (not null)


def test_models_without_conditions_are_what_they_were():
    net = UNet((1, 4, 4), width=8, multipliers=(1,), blocks=1)
    model = ScoreModel(net, VE(LOW, HIGH), data_shape=(1, 4, 4), label="log_sigma")
    assert (model.num_classes, model.null_condition, model.conditional) == (None, None, False)
    with pytest.raises(ValueError, match="this model knows no conditions, as one whose network has num_classes"):
        model.conditioned(torch.tensor([1]))(torch.zeros(2, 1, 4, 4), torch.tensor(1.0))


def _cases() -> dict[str, tuple[object, object]]:
    """Every sampler with levels that are enough for it."""

    def karras(n: int) -> torch.Tensor:
        return sigmas.karras(n, sigma_min=LOW, sigma_max=HIGH)

    long, s = sigmas.geometric(100, sigma_min=LOW, sigma_max=HIGH), samplers
    found: dict[str, tuple[object, object]] = {}
    for name in ("AdamsBashforth", "DPMSolverMultistep", "DPMSolverSinglestep", "Heun", "Midpoint", "RK4", "UniPC"):
        found[name] = (vars(s)[name](), karras(25))
    for name in ("Ancestral", "Churn", "DDIM", "Euler", "ReverseSDE", "SDEDPMSolver", "StochasticHeun"):
        found[name] = (vars(s)[name](), karras(80))
    for name in ("ProbabilityFlow", "AdaptiveReverseSDE"):
        found[name] = (vars(s)[name](), [HIGH, LOW, 0.0])
    found["ReverseDiffusion"] = (s.ReverseDiffusion(VE(LOW, HIGH)), long)
    found["PredictorCorrector"] = (s.PredictorCorrector(s.Heun(), s.AnnealedCorrector(0.1)), long)
    found["AnnealedLangevin"] = (s.AnnealedLangevin(10), long)
    found["UnderdampedLangevin"] = (s.UnderdampedLangevin(10), long)
    found["ConsistentLangevin"] = (s.ConsistentLangevin(), long)
    found["Langevin"] = (s.Langevin(200, 5e-3), [0.3])
    found["MetropolisLangevin"] = (None, long)
    found["Calibrated"] = (None, None)
    return found


CASES = _cases()
LABELS = torch.arange(1200) % 4


def _marked(x: torch.Tensor) -> torch.Tensor:
    """Points with their labels beside them, so that a point with another's label is far away."""
    return torch.cat([x, 3.0 * torch.nn.functional.one_hot(LABELS, 4)], 1)


def _exact(seed: int, sigma: float = 0.0) -> torch.Tensor:
    drawn = torch.empty(len(LABELS), 2, dtype=F64)
    for k, part in enumerate(LABELLED.parts):
        drawn[k::4] = part.sample(len(LABELS) // 4, generator(100 * seed + k))
    return drawn + sigma * torch.randn(drawn.shape, dtype=F64, generator=generator(seed + 50))


def test_every_sampler_is_among_the_cases():
    known = {k for k, v in vars(samplers).items() if isinstance(v, type) and issubclass(v, samplers.Sampler)}
    assert set(CASES) == known - {"Sampler", "Wrapper"}


@pytest.mark.parametrize("name", CASES)
def test_conditional_samples_have_the_conditional_law(name):
    """Energy distance with labels beside the points: within 5 deviations of 30 pairs of exact sets."""
    score = classifier_free(LABELLED.conditioned(LABELS), LABELLED.score, 1.0)
    sampler, levels = CASES[name]
    x = HIGH * randn(len(LABELS), 2, seed=3)
    if name == "MetropolisLangevin":

        def log_prob(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            each = torch.stack([part.log_prob(x, sigma) for part in LABELLED.parts])
            return each[LABELS, torch.arange(len(x))]

        sampler = samplers.MetropolisLangevin(log_prob=log_prob, steps=5)
    if name == "Calibrated":
        index = torch.arange(64)
        starts = HIGH * randn(64, 2, seed=4)
        sampler = samplers.calibrate(
            score.rows(index), starts, nfe=12, sigma_min=LOW, sigma_max=HIGH, method="least_squares", trials=20
        )
    if name == "Langevin":
        # at one level it keeps the law that it starts from, and joins no modes
        x = _exact(7, 0.3)
    found = sample(score, x, levels, sampler, generator=generator(2))
    # Langevin dynamics ends on x itself at its level, Metropolis's at the smallest
    left = {"Langevin": 0.3, "MetropolisLangevin": LOW, "ReverseDiffusion": LOW, "PredictorCorrector": LOW}.get(
        name, 0.0
    )
    mean, deviation = _between(left)
    assert energy_distance(_marked(found), _marked(_exact(200, left))) < mean + 5 * deviation


@cache
def _between(left: float) -> tuple[float, float]:
    """Mean and deviation of the distance of exact sets; below 0, for both have as many of each label."""
    pairs = [energy_distance(_marked(_exact(i, left)), _marked(_exact(60 + i, left))) for i in range(30)]
    return float(np.mean(pairs)), float(np.std(pairs))


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_law_tells_other_scales_apart(scale):
    """What passes above would not with other guidance."""
    guided = classifier_free(LABELLED.conditioned(LABELS), LABELLED.score, scale)
    sampler, levels = CASES["Heun"]
    found = sample(guided, HIGH * randn(len(LABELS), 2, seed=3), levels, sampler)
    mean, deviation = _between(0.0)
    assert energy_distance(_marked(found), _marked(_exact(200))) > mean + 10 * deviation


def test_guided_likelihoods_and_clipping():
    """Scale 1 of classes is their own density; a guided score has one, too, and can be clipped."""
    labels = torch.tensor([0, 1, 2, 3])
    x = torch.stack([part.sample(1, generator(k))[0] for k, part in enumerate(LABELLED.parts)])
    guided = classifier_free(LABELLED.conditioned(labels), LABELLED.score, 1.0)
    found = log_likelihood(guided, x, 0.05, 8000.0, rtol=1e-7, atol=1e-7).log_prob
    expected = torch.stack([LABELLED.parts[k].log_prob(x[k : k + 1], 0.05)[0] for k in range(4)])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    # sharper than either: guidance at scale 2 raises the density of what it draws
    two = classifier_free(LABELLED.conditioned(labels), LABELLED.score, 2.0)
    ends = sample(two, HIGH * randn(4, 2), sigmas.karras(30, sigma_min=LOW, sigma_max=HIGH))
    assert ends.isfinite().all()
    bounded = sample(clipped(two, -1, 1), HIGH * randn(4, 2), sigmas.karras(30, sigma_min=LOW, sigma_max=HIGH))
    assert float(bounded.abs().max()) <= 1 + 1e-12


def test_labelled_targets_are_known_by_name():
    d = target("labelled_ring")
    assert isinstance(d, Labelled)
    x, labels = d.sample_labelled(4000, generator())
    # opposite modes share a label: twice the angle tells it
    angle = torch.atan2(x[:, 1], x[:, 0]) * 4 / math.pi
    assert torch.equal(angle.round().long() % 4, labels)
    torch.testing.assert_close(
        torch.bincount(labels) / 4000, torch.tensor([0.4, 0.3, 0.2, 0.1]), rtol=0, atol=5 * math.sqrt(0.25 / 4000)
    )
    assert broadcast(torch.tensor(1.0), x).ndim == 0


def test_the_example_of_the_page_runs():
    text = (Path(__file__).parent.parent / "docs" / "howto.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    made: dict[str, object] = {}
    exec(compile(block, "docs/howto.md", "exec"), made)
    x = made["x"]
    assert isinstance(x, torch.Tensor)
    # N((0, 2), 0.09): 5 standard errors of 4,000 samples, and the offset that the first level leaves
    torch.testing.assert_close(x.mean(0), torch.tensor([0.0, 2.0]), atol=0.03, rtol=0)
    torch.testing.assert_close(x.std(0), torch.tensor([0.3, 0.3]), atol=0.02, rtol=0)
