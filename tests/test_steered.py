"""Classifier guidance, autoguidance and what may be done to an update, on labelled mixtures whose scores are exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import F64, generator, randn
from test_guidance import HIGH, LABELLED, LOW, network

from scorelab import PerSampleNoise, ScoreFn, broadcast, classifier_free, log_likelihood, sample, sigmas
from scorelab.classifiers import ClassifierModel
from scorelab.distributions import Gaussian
from scorelab.guidance import Projected, Thresholded, autoguidance, classifier
from scorelab.nn import Classifier
from scorelab.processes import VE, DiscreteVP, linear_betas

LEVELS = [torch.tensor(0.4, dtype=F64), torch.linspace(0.05, 9.0, 12, dtype=F64)]
LABELS = torch.arange(12) % 4


class Posterior:
    """log p(y | x, sigma) of the labelled mixture, by Bayes."""

    def __init__(self, labels: torch.Tensor, known: tuple[float, float] = (0.0, float("inf"))) -> None:
        self.labels, self.sigma_range = labels, known

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        each = torch.stack([part.log_prob(x, sigma) for part in LABELLED.parts], 1) + LABELLED.weights.log()
        return each.log_softmax(1).gather(1, self.labels.expand(len(x)).unsqueeze(1)).squeeze(1)

    def rows(self, index: torch.Tensor) -> Posterior:
        return Posterior(self.labels[index])


@pytest.mark.parametrize("sigma", LEVELS)
def test_a_classifier_is_bayes(sigma):
    """score + grad log p(y | x) is the conditional score; scale times it, classifier-free guidance of that scale."""
    x, conditional = 3 * randn(12, 2), LABELLED.conditioned(LABELS)
    pulled = classifier(LABELLED.score, Posterior(LABELS))(x, sigma)
    torch.testing.assert_close(pulled.detach(), conditional(x, sigma))
    for scale in (-0.5, 0.3, 4.0):
        found = classifier(LABELLED.score, Posterior(LABELS), scale)
        expected = classifier_free(conditional, LABELLED.score, scale)(x, sigma)
        torch.testing.assert_close(found(x, sigma).detach(), expected, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            torch.testing.assert_close(found(x, sigma), expected, rtol=1e-9, atol=1e-9)
            assert not found(x, sigma).requires_grad
    assert classifier(conditional, Posterior(LABELS), 0) is conditional


@torch.no_grad()
@pytest.mark.parametrize("sigma", LEVELS)
def test_a_classifier_goes_with_classifier_free_in_both_orders(sigma):
    """With g = conditional - unconditional: u + 2 g + 3 g, and u + b g + w (c + a g - u - b g)."""
    x, c, u = 3 * randn(12, 2), LABELLED.conditioned(LABELS), LABELLED.score
    gap = c(x, sigma) - u(x, sigma)
    outside = classifier(classifier_free(c, u, 2.0), Posterior(LABELS), 3.0)
    torch.testing.assert_close(outside(x, sigma), u(x, sigma) + 5 * gap)
    inside = classifier_free(classifier(c, Posterior(LABELS), 0.5), classifier(u, Posterior(LABELS), 0.25), 3.0)
    torch.testing.assert_close(inside(x, sigma), u(x, sigma) + (0.25 + 3 * 1.25) * gap)


@torch.no_grad()
def test_an_interval_leaves_the_classifier_out():
    asked = []

    def log_prob(x, sigma):
        asked.append(sigma)
        return Posterior(LABELS)(x, sigma)

    x, guided = randn(12, 2), classifier(LABELLED.score, log_prob, 2.0, interval=(0.5, 4.0))
    for level, inside in ((0.5, False), (0.6, True), (4.0, True), (4.1, False)):
        asked.clear()
        sigma = torch.tensor(level, dtype=F64)
        full = classifier(LABELLED.score, Posterior(LABELS), 2.0)(x, sigma)
        assert torch.equal(guided(x, sigma), full if inside else LABELLED.score(x, sigma))
        assert len(asked) == inside


@torch.no_grad()
def test_what_is_known_of_a_classifier_is_known_of_the_whole():
    guided = classifier(LABELLED.conditioned(LABELS), Posterior(LABELS, (0.2, 30.0)), 2.0)
    assert guided.sigma_range == (0.2, 30.0)
    x, index = randn(12, 2), torch.tensor([7, 2, 3])
    for sigma in LEVELS:
        part = sigma if sigma.ndim == 0 else sigma[index]
        torch.testing.assert_close(guided.rows(index)(x[index], part), guided(x, sigma)[index])
    # a bare function is bound to its batch
    assert not hasattr(classifier(LABELLED.conditioned(LABELS), lambda x, s: x.sum(1)), "rows")
    levels = sigmas.karras(6, sigma_min=LOW, sigma_max=HIGH)
    guided = classifier(LABELLED.conditioned(LABELS), Posterior(LABELS), 2.0)
    whole = sample(guided, (12, 2), levels, generator=PerSampleNoise(0), dtype=F64)
    parts = sample(guided, (12, 2), levels, generator=PerSampleNoise(0), dtype=F64, batch_size=5)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)


def test_a_classifiers_gradient_is_differentiated_where_it_is_asked_for():
    """Densities need the score's divergence, and a graph through samples the gradient's own."""
    x = torch.stack([part.sample(1, generator(k))[0] for k, part in enumerate(LABELLED.parts)])
    guided = classifier(LABELLED.score, Posterior(torch.arange(4)))
    found = log_likelihood(guided, x, 0.05, 8000.0, rtol=1e-6, atol=1e-6).log_prob
    expected = torch.cat([part.log_prob(x[k : k + 1], 0.05) for k, part in enumerate(LABELLED.parts)])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    # of a network with attention, whose fused kernels have one derivative only
    net = Classifier((1, 8, 8), 3, width=8, multipliers=(1, 2), blocks=1, attention=(1,), head=4).eval()
    images = ClassifierModel(net, VE(0.1, 10.0), data_shape=(1, 8, 8), label="log_sigma").conditioned(1)
    guided = classifier(lambda x, s: -x / (1 + broadcast(s, x) ** 2), images)
    options = {"divergence": "hutchinson", "generator": generator(), "rtol": 0.1, "atol": 0.1}
    assert log_likelihood(guided, randn(2, 1, 8, 8).float(), 0.1, 10.0, **options).log_prob.isfinite().all()
    # of -a x^2/2 beside the score -x/(1 + s^2): Euler's step from s to 0 is x + s^2 (score - 2 a x)
    a = torch.tensor(0.3, dtype=F64, requires_grad=True)
    at = randn(3, 2)
    pulled = classifier(lambda x, s: -x / (1 + broadcast(s, x) ** 2), lambda x, s: -a * x.square().sum(1) / 2, 2.0)
    (slope,) = torch.autograd.grad(sample(pulled, at, [0.5, 0.0], differentiable=True).sum(), a)
    torch.testing.assert_close(slope, -0.5 * at.sum())


class Linear(torch.nn.Module):
    """Logits W x_t."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(randn(4, 2, seed=3))

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        assert label.shape == (len(x),)
        return x @ self.weight.T


def test_a_classifier_model_knows_unscaled_samples():
    """Of logits W x_t the gradient by unscaled x is alpha W' (onehot - softmax)."""
    model = ClassifierModel(Linear(), DiscreteVP(linear_betas()), data_shape=(2,), label="index")
    x, sigma = randn(5, 2), torch.tensor([0.1, 0.5, 1.0, 3.0, 20.0], dtype=F64)
    labels, alpha = torch.tensor([0, 3, 1, 2, 3]), (1 / (1 + sigma**2).sqrt()).unsqueeze(1)
    share = torch.softmax(alpha * x @ model.net.weight.T, 1)
    expected = alpha * ((torch.nn.functional.one_hot(labels, 4) - share) @ model.net.weight)
    guided = classifier(lambda x, s: torch.zeros_like(x), model.conditioned(labels), 2.0)
    torch.testing.assert_close(guided(x, sigma).detach(), 2 * expected.detach(), rtol=1e-6, atol=1e-6)
    assert guided.sigma_range == model.process.sigma_range
    assert guided.device == torch.device("cpu")
    index = torch.tensor([4, 1])
    restricted = classifier(network().rows(index), model.conditioned(labels).rows(index))
    assert restricted.scores[1].scores[0].classes.tolist() == [3, 3]
    # one class for all, and samples of a network under the driver
    one = classifier(lambda x, s: -x / broadcast(s, x) ** 2, model.conditioned(2))
    assert sample(one, (3, 2), [2.0, 1.0, 0.0], dtype=F64).shape == (3, 2)
    images = ClassifierModel(
        Classifier((1, 8, 8), 3, width=8, multipliers=(1, 2), blocks=1, attention=(), head=4),
        model.process,
        data_shape=(1, 8, 8),
        label="index",
    )
    pulled = classifier(lambda x, s: torch.zeros_like(x), images.eval().conditioned(torch.tensor([0, 2])))
    assert pulled(torch.randn(2, 1, 8, 8, generator=generator()), torch.tensor(1.0)).abs().max() > 0


def test_what_is_no_classifier_of_these_classes_is_refused():
    model, x = ClassifierModel(Linear(), DiscreteVP(linear_betas()), data_shape=(2,), label="index"), randn(3, 2)
    sigma = torch.tensor(1.0, dtype=F64)

    def guided(log_prob):
        return classifier(lambda x, s: -x, log_prob)(x, sigma)

    with pytest.raises(ValueError, match="classes go from 1 to 4, and this classifier tells 0 to 3 apart"):
        guided(model.conditioned(torch.tensor([1, 4, 2])))
    with pytest.raises(ValueError, match="2 classes for a batch of 3; expected one each"):
        guided(model.conditioned(torch.tensor([1, 2])))
    for classes in (torch.tensor([1.0]), torch.tensor(1), torch.tensor([True])):
        with pytest.raises(ValueError, match="expected whole numbers"):
            model.conditioned(classes)
    with pytest.raises(ValueError, match=r"log_prob returned \(3, 4\) for x \(3, 2\); expected \(3,\)"):
        guided(model)
    with pytest.raises(ValueError, match="does not depend on x as far as autograd sees"):
        guided(lambda x, s: x.detach().sum(1))
    with pytest.raises(ValueError, match="does not depend on x as far as autograd sees"):
        guided(lambda x, s: torch.zeros(3, requires_grad=True))
    with pytest.raises(TypeError, match="log_prob is Tensor; expected a callable"):
        guided(x)
    with pytest.raises(ValueError, match="scale is inf; expected a finite number: 1 is conditional"):
        classifier(model, model.conditioned(1), float("inf"))


def two(x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Conditional and unconditional denoised samples."""
    return x + sigma**2 * LABELLED.conditioned(LABELS)(x, sigma), LABELLED.denoise(x, sigma)


def guided(scale: float, **options) -> ScoreFn:
    return classifier_free(LABELLED.conditioned(LABELS), LABELLED.score, scale, **options)


def test_scale_one_is_the_conditional_score_whatever_is_done_to_updates():
    options = {"rescale": 0.7, "projected": Projected(0.0, 0.1), "threshold": Thresholded(0.5, 0.1)}
    conditional = LABELLED.conditioned(LABELS)
    assert classifier_free(conditional, LABELLED.score, 1.0, **options) is conditional
    assert autoguidance(conditional, LABELLED.score, 1, **options) is conditional
    # and near it, but for thresholds, which may move any sample
    x, sigma = 3 * randn(12, 2), torch.tensor(0.7, dtype=F64)
    del options["threshold"]
    near = guided(1 + 1e-9, **options)(x, sigma)
    torch.testing.assert_close(near, conditional(x, sigma), rtol=1e-6, atol=1e-6)


def test_autoguidance_moves_away_from_the_bad_one():
    """Of Gaussians of variance 1 and 1 + b scale w has -x (w/(1 + s^2) + (1 - w)/(1 + b + s^2))."""
    x, sigma = randn(5, 2), torch.linspace(0.1, 4, 5, dtype=F64)
    good, bad = Gaussian(torch.zeros(2, dtype=F64), 1.0), Gaussian(torch.zeros(2, dtype=F64), 1.5)
    found = autoguidance(good.score, bad.score, 2.0)(x, sigma)
    s = sigma.unsqueeze(1) ** 2
    torch.testing.assert_close(found, -x * (2 / (1 + s) - 1 / (1.5 + s)))
    inside = autoguidance(good.score, bad.score, 2.0, interval=(1.0, 2.0))(x, sigma)
    torch.testing.assert_close(inside, torch.where((s > 1) & (s <= 4), found, good.score(x, sigma)))
    with pytest.raises(TypeError, match="got NoneType; expected two scores, such as ScoreModel.load"):
        autoguidance(good.score, None, 2.0)
    with pytest.raises(ValueError, match="scale is nan; expected a finite number: 1 is the score itself"):
        autoguidance(good.score, bad.score, float("nan"))


def test_a_negative_condition_stands_for_none():
    x, sigma = randn(12, 2), torch.tensor(0.7, dtype=F64)
    yes, no = LABELLED.conditioned(LABELS), LABELLED.conditioned((LABELS + 1) % 4)
    found = classifier_free(yes, no, 3.0)
    torch.testing.assert_close(found(x, sigma), 3 * yes(x, sigma) - 2 * no(x, sigma))
    model = network()
    both = [model.conditioned(torch.tensor([y])) for y in (2, 0)]
    x, sigma = x.float(), sigma.float()
    for together in (True, False):
        found = classifier_free(*both, 3.0, together=together)(x, sigma)
        torch.testing.assert_close(found, 3 * both[0](x, sigma) - 2 * both[1](x, sigma), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("level", [0.05, 0.7, 5.0])
def test_rescaling_keeps_the_deviation_of_the_conditional_sample(level):
    x, sigma = 3 * randn(12, 2), torch.tensor(level, dtype=F64)
    conditional, unconditional = two(x, sigma)
    plain = unconditional + 4 * (conditional - unconditional)
    for phi in (0.3, 1.0):
        ratio = torch.stack(
            [a.numpy().std() / torch.tensor(b.numpy().std()) for a, b in zip(conditional, plain, strict=True)]
        )
        expected = phi * plain * ratio.unsqueeze(1) + (1 - phi) * plain
        found = x + sigma**2 * guided(4.0, rescale=phi)(x, sigma)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.std(1), conditional.std(1))


@pytest.mark.parametrize("level", [0.05, 0.7, 5.0])
def test_projected_guidance_is_its_definition(level):
    """Sample by sample; eta 1 without a bound is plain guidance."""
    x, sigma = 3 * randn(12, 2), torch.tensor(level, dtype=F64)
    conditional, unconditional = two(x, sigma)
    for eta, norm in ((0.0, 0.05), (0.5, 0.3), (1.0, float("inf")), (0.0, float("inf"))):
        expected = []
        for c, u in zip(conditional, unconditional, strict=True):
            d = (c - u) * min(1.0, norm / max(float((c - u).norm()), 1e-300))
            parallel = (d @ c) / (c @ c) * c
            expected.append(c + 3 * (d - parallel + eta * parallel))
        found = x + sigma**2 * guided(4.0, projected=Projected(eta, norm))(x, sigma)
        torch.testing.assert_close(found, torch.stack(expected))
    plain = guided(4.0)(x, sigma)
    torch.testing.assert_close(guided(4.0, projected=Projected(1.0))(x, sigma), plain)
    for eta, norm in ((float("nan"), 1.0), (0.0, 0.0), (0.0, -1.0)):
        with pytest.raises(ValueError, match="expected a finite eta and a positive norm"):
            Projected(eta, norm)


@pytest.mark.parametrize("level", [0.05, 0.7, 5.0])
def test_thresholds_bound_each_sample(level):
    x, sigma = 3 * randn(12, 2), torch.tensor(level, dtype=F64)
    conditional, unconditional = two(x, sigma)
    plain = (unconditional + 4 * (conditional - unconditional)).numpy()
    static = x + sigma**2 * guided(4.0, threshold=Thresholded(None, 1.5))(x, sigma)
    torch.testing.assert_close(static, torch.as_tensor(plain.clip(-1.5, 1.5)))
    bounds = [max(1.5, np.quantile(abs(row), 0.8)) for row in plain]
    expected = np.stack([row.clip(-s, s) / s * 1.5 for row, s in zip(plain, bounds, strict=True)])
    dynamic = x + sigma**2 * guided(4.0, threshold=Thresholded(0.8, 1.5))(x, sigma)
    torch.testing.assert_close(dynamic, torch.as_tensor(expected))
    # what stays inside is not touched, to the last digit but two
    torch.testing.assert_close(guided(4.0, threshold=Thresholded(None, 99.0))(x, sigma), guided(4.0)(x, sigma))
    for percentile, limit in ((0.0, 1.0), (99.5, 1.0), (0.9, 0.0)):
        with pytest.raises(ValueError, match="expected 0 < percentile <= 1"):
            Thresholded(percentile, limit)
    none = classifier_free(lambda x, s: -x, lambda x, s: x, 4.0, rescale=0.7, threshold=Thresholded(0.8, 1.5))
    assert none(x[:0], sigma).shape == (0, *x.shape[1:])
    with pytest.raises(ValueError, match="rescale is 1.5; expected a share phi"):
        guided(2.0, rescale=1.5)


def test_what_is_done_to_updates_is_done_to_each_sample_by_itself():
    x, options = (
        3 * randn(12, 2),
        {"rescale": 0.7, "projected": Projected(0.2, 1.0), "threshold": Thresholded(0.9, 2.0)},
    )
    index = torch.tensor([7, 2, 3])
    conditions = LABELLED.conditioned(LABELS), LABELLED.conditioned((LABELS + 1) % 4)
    whole = classifier_free(*conditions, 4.0, interval=(0.2, 6.0), **options)
    for sigma in LEVELS:
        part = sigma if sigma.ndim == 0 else sigma[index]
        torch.testing.assert_close(whole.rows(index)(x[index], part), whole(x, sigma)[index])
    # one number a sample has no deviation to keep, and images are flattened
    one = classifier_free(lambda x, s: -x, lambda x, s: -2 * x, 3.0, rescale=1.0)
    torch.testing.assert_close(one(x[:, :1], LEVELS[0]), 1.0 * x[:, :1])
    image = classifier_free(lambda x, s: -x, lambda x, s: -x.abs(), 3.0, **options)
    tall, flat = x.reshape(3, 2, 2, 2), x.reshape(3, 8)
    torch.testing.assert_close(image(tall, LEVELS[0]).reshape(3, 8), image(flat, LEVELS[0]))
