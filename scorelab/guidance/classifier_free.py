"""Classifier-free guidance: a score that moves from the unconditional towards the conditional one, and past it.

    s = s_uncond + scale (s_cond - s_uncond)        scale 1: conditional, 0: unconditional, above 1: extrapolates

At each noise level it is the score of p(x; sigma) p(y | x; sigma)^scale. These are not blurred versions of one
distribution, so for other scales than 0 and 1 samplers that differ in noise and steps tend to different samples.

Ho and Salimans, Classifier-Free Diffusion Guidance, 2022, arXiv:2207.12598, whose w is scale - 1; intervals:
Kynkaanniemi et al., Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
Models, 2024, arXiv:2404.07724.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from scorelab.checks import broadcast, check_output, level_of
from scorelab.scores import Combined
from scorelab.typing import ScoreFn, Tensor

__all__ = ["classifier_free"]


class _ClassifierFree(Combined):
    """What ``classifier_free`` makes; outside of the interval only the conditional score is evaluated."""

    def __init__(
        self, scores: tuple[ScoreFn, ScoreFn], scale: float, low: float, high: float, together: bool | None
    ) -> None:
        super().__init__(self._guided, scores, None, True)
        self.scale, self.low, self.high, self.together = scale, low, high, together

    def outputs(self, x: Tensor, sigma: Tensor) -> tuple[Any, ...]:
        known = level_of(sigma)
        if known is not None and not self.low < _single(known) <= self.high:
            return check_output(self.scores[0](x, sigma), x, sigma), None
        pair = getattr(self.scores[0], "together", None)
        if pair is not None and (_faster(x) if self.together is None else self.together):
            both = pair(self.scores[1], x, sigma)
            if both is not None:
                return tuple(check_output(s, x, sigma) for s in both)
        return super().outputs(x, sigma)

    def _guided(self, x: Tensor, sigma: Tensor, conditional: Tensor, unconditional: Tensor | None) -> Tensor:
        if unconditional is None:
            return conditional
        guided = torch.lerp(unconditional, conditional, self.scale)
        if level_of(sigma) is not None or (self.low == 0 and self.high == math.inf):
            return guided
        # in single precision, as a level that is one of the ends may come
        inside = (sigma.float() > self.low) & (sigma.float() <= self.high)
        return torch.where(inside if sigma.ndim == 0 else broadcast(inside, x), guided, conditional)


def _faster(x: Tensor) -> bool:
    """Whether one evaluation of twice the batch takes less than two: on GPUs, and on CPUs for little data.

    With 2 CPU cores it took .55 to .93 of the time for up to 16,384 numbers, 1.02 to 1.35 for more, or for many points;
    on an H100 .46 for up to 16 images of 32x32, .66 for 64, .93 for 256.
    """
    return x.device.type != "cpu" or (x.numel() <= 2**14 and len(x) <= 1024)


def classifier_free(
    conditional: ScoreFn,
    unconditional: ScoreFn,
    scale: float = 1.0,
    *,
    interval: tuple[float, float] | None = None,
    together: bool | None = None,
) -> ScoreFn:
    """The score unconditional + scale (conditional - unconditional), for any sampler, likelihood or calibration.

    ``classifier_free(model.conditioned(y), model.conditioned(None), scale=2)``. interval: (low, high), guide at noise
    levels low < sigma <= high only; elsewhere the score is the conditional one, and only that is evaluated. together:
    evaluate both conditions of one model as one batch of twice the size; None: where that was measured to be faster.

    Raises TypeError for what is not callable, ValueError for a scale that is not finite or an interval of no levels.
    """
    low, high = (0.0, math.inf) if interval is None else interval
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; expected a finite number: 1 is conditional, 0 unconditional")
    if not 0 <= low < high:
        raise ValueError(f"interval is {interval}; expected noise levels (low, high), 0 <= low < high")
    for score in (conditional, unconditional):
        if not callable(score):
            raise TypeError(f"got {type(score).__name__}; expected two scores, such as model.conditioned(None)")
    if scale == 1:
        return conditional
    return _ClassifierFree((conditional, unconditional), float(scale), _single(low), _single(high), together)


def _single(value: float) -> float:
    """The nearest number in single precision."""
    return float(np.float32(value))
