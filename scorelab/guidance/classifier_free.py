"""Classifier-free guidance: a score that moves from the unconditional towards the conditional one, and past it.

    s = s_uncond + scale (s_cond - s_uncond)        scale 1: conditional, 0: unconditional, above 1: extrapolates

At each noise level it is the score of p(x; sigma) p(y | x; sigma)^scale. These are not blurred versions of one
distribution, so for other scales than 0 and 1 samplers that differ in noise and steps tend to different samples.

Ho and Salimans, Classifier-Free Diffusion Guidance, 2022, arXiv:2207.12598, whose w is scale - 1; intervals:
Kynkaanniemi et al., Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
Models, 2024, arXiv:2404.07724.
"""

from __future__ import annotations

from scorelab.guidance.base import Guided, Interval, check_scores
from scorelab.guidance.updates import Projected, Thresholded, contrasted
from scorelab.typing import ScoreFn

__all__ = ["classifier_free"]


def classifier_free(
    conditional: ScoreFn,
    unconditional: ScoreFn,
    scale: float = 1.0,
    *,
    interval: Interval | None = None,
    together: bool | None = None,
    rescale: float = 0.0,
    projected: Projected | None = None,
    threshold: Thresholded | None = None,
) -> ScoreFn:
    """The score unconditional + scale (conditional - unconditional), for any sampler, likelihood or calibration.

    ``classifier_free(model.conditioned(y), model.conditioned(None), scale=2)``. Instead of the unconditional score that
    of a negative condition may be given: what samples move away from. interval: (low, high), guide at noise levels
    low < sigma <= high only; elsewhere the score is the conditional one, and only that is evaluated. together: evaluate
    both conditions of one model as one batch of twice the size; None: where that was measured to be faster.

    rescale (phi, 0 to 1), projected, threshold: what is done to denoised samples where it guides, in this order (see
    scorelab.guidance.updates). Scale 1 is the conditional score, whatever they are.

    Raises TypeError for what is not callable, ValueError for a scale that is not finite, an interval of no levels, or a
    rescale that is no share.
    """
    steer = contrasted(scale, rescale, projected, threshold)
    check_scores((conditional, unconditional), "model.conditioned(None)")
    guided = Guided(steer, (conditional, unconditional), interval, together)
    return conditional if scale == 1 else guided
