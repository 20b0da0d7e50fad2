"""Classifier guidance: a score and the gradient of what a classifier of noisy samples says of them.

    s = s_1 + scale grad_x log p(y | x, sigma)      scale 1: the score of p(x | y; sigma), 0: the score s_1 alone

x is unscaled here, so the gradient is alpha times that with respect to x_t = alpha x. Where s_1 is a condition's score
itself the classifier sharpens it, and scale 1 is not that condition's law.

Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021, arXiv:2105.05233. Only its DDIM samples follow
this score; its ancestral sampler adds variance times gradient to the mean, which is another first-order rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from scorelab.checks import call, widened
from scorelab.divergence import kernels, leaf
from scorelab.guidance.base import Guided, Interval
from scorelab.scores import Combined
from scorelab.typing import ScoreFn, Tensor

__all__ = ["LogProb", "classifier"]

LogProb = Callable[[Tensor, Tensor], Tensor]
"""``log_prob(x, sigma)``: log p(y | x, sigma) in nats, (B,), of x (B, *D) and sigma () or (B,), both unscaled."""


class _Gradient(Combined):
    """grad_x of a log-probability, a score that knows what the log-probability does."""

    def __init__(self, log_prob: LogProb) -> None:
        super().__init__(lambda x, sigma, gradient: gradient, (log_prob,), None, False)

    def outputs(self, x: Tensor, sigma: Tensor) -> tuple[Any, ...]:
        # who differentiates the whole has the graph of the gradient, too
        keep = torch.is_grad_enabled()
        with torch.enable_grad(), kernels(keep):
            at = x if keep and x.requires_grad else leaf(x)
            found = call(self.scores[0], at, widened(sigma))
            if not isinstance(found, Tensor) or found.shape != x.shape[:1]:
                got = f"{tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(
                    f"log_prob returned {got} for x {tuple(x.shape)}; expected ({len(x)},), log p(y | x, sigma) of "
                    "each sample's class: a ClassifierModel gives it by .conditioned(classes)"
                )
            gradient = None
            if found.requires_grad:
                (gradient,) = torch.autograd.grad(found.sum(), at, create_graph=keep, allow_unused=True)
            if gradient is None:
                raise ValueError(
                    "log_prob(x, sigma) does not depend on x as far as autograd sees; expected operations of PyTorch, "
                    "and neither no_grad nor detach inside"
                )
        return (gradient,)


def classifier(score: ScoreFn, log_prob: LogProb, scale: float = 1.0, *, interval: Interval | None = None) -> ScoreFn:
    """The score + scale grad_x log_prob(x, sigma), for any sampler, likelihood or calibration; x, sigma unscaled.

    ``classifier(model, classifier_model.conditioned(y), scale=4)``, or any ``log_prob(x, sigma) -> (B,)``, in nats and
    each row's own. Of a log_prob with ``rows(index)``, ``sigma_range`` or ``device`` the whole has them. interval:
    (low, high), guide at noise levels low < sigma <= high only; elsewhere it is the score alone. It is itself a score,
    conditional or not, for ``classifier_free``, and takes a guided one.

    Raises TypeError for what is not callable, ValueError for a scale that is not finite, an interval of no levels, or a
    log_prob that is not (B,) or can't be differentiated.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; expected a finite number: 1 is conditional, 0 the score alone")
    for function, said in ((score, "score"), (log_prob, "log_prob")):
        if not callable(function):
            raise TypeError(f"{said} is {type(function).__name__}; expected a callable {said}(x, sigma)")

    def formula(x: Tensor, sigma: Tensor, s: Tensor, gradient: Tensor) -> Tensor:
        return s + scale * gradient

    guided = Guided(formula, (score, _Gradient(log_prob)), interval)
    return score if scale == 0 else guided
