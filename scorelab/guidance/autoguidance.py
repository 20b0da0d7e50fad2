"""Autoguidance: a score that moves away from a worse version of itself.

    s = s_bad + scale (s - s_bad)       scale 1: the score, above 1: away from what the bad one gets wrong

The bad one is smaller, or less trained, or both, and has the same condition: so samples get better without getting
more alike, and no condition is needed.

Karras et al., Guiding a Diffusion Model with a Bad Version of Itself, 2024, arXiv:2406.02507.
"""

from __future__ import annotations

from scorelab.guidance.base import Guided, Interval, check_scores
from scorelab.guidance.updates import Projected, Thresholded, contrasted
from scorelab.typing import ScoreFn

__all__ = ["autoguidance"]


def autoguidance(
    score: ScoreFn,
    bad: ScoreFn,
    scale: float,
    *,
    interval: Interval | None = None,
    rescale: float = 0.0,
    projected: Projected | None = None,
    threshold: Thresholded | None = None,
) -> ScoreFn:
    """The score bad + scale (score - bad), for any sampler, likelihood or calibration.

    ``autoguidance(model.conditioned(y), early.conditioned(y), scale=2)``: published are 2.1 for ImageNet at 512 px and
    1.7 at 64 px, with a smaller network trained an eighth to a quarter as long. The other options are those of
    ``classifier_free``, and so are the errors raised.
    """
    steer = contrasted(scale, rescale, projected, threshold)
    check_scores((score, bad), "ScoreModel.load(run) and one of an earlier checkpoint")
    guided = Guided(steer, (score, bad), interval)
    return score if scale == 1 else guided
