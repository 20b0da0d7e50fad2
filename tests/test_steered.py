"""Classifier guidance, autoguidance and what may be done to an update, on labelled mixtures whose scores are exact."""

from __future__ import annotations

import pytest
import torch
from problems import F64, generator, randn
from test_guidance import HIGH, LABELLED, LOW, network

from scorelab import PerSampleNoise, broadcast, classifier_free, log_likelihood, sample, sigmas
from scorelab.classifiers import ClassifierModel
from scorelab.guidance import classifier
from scorelab.nn import Classifier
from scorelab.processes import DiscreteVP, linear_betas

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
    model = ClassifierModel(Linear(), DiscreteVP(linear_betas()))
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
        Classifier((1, 8, 8), 3, width=8, multipliers=(1, 2), blocks=1, attention=(), head=4), model.process
    )
    pulled = classifier(lambda x, s: torch.zeros_like(x), images.eval().conditioned(torch.tensor([0, 2])))
    assert pulled(torch.randn(2, 1, 8, 8, generator=generator()), torch.tensor(1.0)).abs().max() > 0


def test_what_is_no_classifier_of_these_classes_is_refused():
    model, x = ClassifierModel(Linear(), DiscreteVP(linear_betas())), randn(3, 2)
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
    with pytest.raises(TypeError, match="log_prob is Tensor; expected a callable"):
        guided(x)
    with pytest.raises(ValueError, match="scale is inf; expected a finite number: 1 is conditional"):
        classifier(model, model.conditioned(1), float("inf"))
