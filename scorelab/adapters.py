"""Foreign functions as scores, in unscaled coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from scorelab.checks import broadcast
from scorelab.processes import Process
from scorelab.scores import combined
from scorelab.typing import ScoreFn, Tensor

__all__ = ["broadcast", "clipped", "from_denoiser", "from_eps", "from_time_score"]


def from_eps(
    eps_fn: Callable[[Tensor, Tensor], Tensor],
    process: Process | None = None,
    *,
    label: Callable[[Tensor], Tensor] | None = None,
) -> ScoreFn:
    """A score from a noise predictor: score = -eps / sigma.

    Without a process ``eps_fn(x, sigma)`` takes unscaled x. With one it is called as ``eps_fn(alpha x, label(sigma))``,
    as networks trained on x_t expect, with a label for each sample, (B,), and knows the process's noise levels;
    ``label`` is by default the process's time t. For a 1000-step DDPM network pass ``DiscreteVP(betas)`` and
    ``label=lambda s: 1000 * process.time(s) - 1`` (index 0 is the least noise).
    """

    def inputs(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        if process is None:
            return x, sigma if label is None else label(sigma)
        t = process.time(sigma)
        return (broadcast(process.alpha(t), x) * x).to(x.dtype), (t if label is None else label(sigma)).expand(len(x))

    known = (0.0, math.inf) if process is None else process.sigma_range
    return combined(lambda x, sigma, eps: -eps / broadcast(sigma, x), eps_fn, inputs=inputs, known=known)


def from_denoiser(fn: Callable[[Tensor, Tensor], Tensor]) -> ScoreFn:
    """A score from a denoiser x0_hat = fn(x, sigma), unscaled: (x0_hat - x) / sigma^2 (Tweedie)."""

    return combined(lambda x, sigma, x0_hat: (x0_hat - x) / broadcast(sigma, x) ** 2, fn)


def from_time_score(score_t: Callable[[Tensor, Tensor], Tensor], process: Process) -> ScoreFn:
    """A score from one in scaled coordinates and time: score(x, sigma) = alpha score_t(alpha x, t), t (B,).

    It knows the process's noise levels.
    """

    def inputs(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        t = process.time(sigma)
        return (broadcast(process.alpha(t), x) * x).to(x.dtype), t.expand(len(x))

    def formula(x: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        return broadcast(process.alpha(process.time(sigma)), x) * output

    return combined(formula, score_t, inputs=inputs, known=process.sigma_range)


def clipped(score: ScoreFn, low: float, high: float) -> ScoreFn:
    """The score whose denoised sample x + sigma^2 score is clamped to [low, high].

    For data known to lie in that range (images); it changes the samples, so it is never applied unasked.
    """
    if not low < high:
        raise ValueError(f"low = {low:g}, high = {high:g}; expected low < high, the range of the data")

    def formula(x: Tensor, sigma: Tensor, s: Tensor) -> Tensor:
        var = broadcast(sigma, x) ** 2
        # where nothing is clamped the score passes through untouched, to the last digit
        bounded = ((x + var * s).clamp(low, high) - x) / var
        inside = (x + var * s - low) * (high - x - var * s) >= 0
        return torch.where(inside, s, bounded)

    return combined(formula, score, variance=True)
