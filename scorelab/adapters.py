"""Foreign functions as scores.

Everything here takes a callable and returns a ScoreFn in unscaled coordinates. A callable that can be restricted to
rows of a batch (``.rows(index)``) keeps that through every adapter.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from scorelab.checks import broadcast, check_output, rows, widened
from scorelab.processes import Process
from scorelab.typing import ScoreFn, Tensor

__all__ = ["broadcast", "clipped", "from_denoiser", "from_eps", "from_time_score"]


class _Adapted:
    """A score made from another callable by a formula."""

    def __init__(self, fn: ScoreFn, formula: Callable[[ScoreFn, Tensor, Tensor], Tensor]) -> None:
        if not callable(fn):
            raise TypeError(f"got {type(fn).__name__}; expected a callable f(x, sigma)")
        self.fn, self.formula = fn, formula
        if hasattr(fn, "rows"):
            self.rows = self._rows

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.formula(self.fn, x, widened(sigma)).to(x.dtype)

    def __getattr__(self, name: str) -> object:
        if name in ("sigma_range", "device"):
            return getattr(self.fn, name)
        raise AttributeError(name)

    def _rows(self, index: Tensor) -> ScoreFn:
        restricted = rows(self.fn, index)
        assert restricted is not None
        return _Adapted(restricted, self.formula)


def from_eps(
    eps_fn: Callable[[Tensor, Tensor], Tensor],
    process: Process | None = None,
    *,
    label: Callable[[Tensor], Tensor] | None = None,
) -> ScoreFn:
    """A score from a noise predictor: score = -eps / sigma.

    Without a process ``eps_fn(x, sigma)`` takes unscaled x. With one it is called as ``eps_fn(alpha x, label(sigma))``,
    as networks trained on x_t expect; ``label`` is by default the process's time t. For a 1000-step DDPM network pass
    ``DiscreteVP(betas)`` and ``label=lambda s: 1000 * process.time(s) - 1`` (index 0 is the least noise).
    """

    def formula(fn: ScoreFn, x: Tensor, sigma: Tensor) -> Tensor:
        if process is None:
            eps = fn(x, sigma if label is None else label(sigma))
        else:
            t = process.time(sigma)
            eps = fn((broadcast(process.alpha(t), x) * x).to(x.dtype), t if label is None else label(sigma))
        return -check_output(eps, x, sigma) / broadcast(sigma, x)

    return _Adapted(eps_fn, formula)


def from_denoiser(fn: Callable[[Tensor, Tensor], Tensor]) -> ScoreFn:
    """A score from a denoiser x0_hat = fn(x, sigma), unscaled: (x0_hat - x) / sigma^2 (Tweedie)."""

    def formula(fn: ScoreFn, x: Tensor, sigma: Tensor) -> Tensor:
        return (check_output(fn(x, sigma), x, sigma) - x) / broadcast(sigma, x) ** 2

    return _Adapted(fn, formula)


def from_time_score(score_t: Callable[[Tensor, Tensor], Tensor], process: Process) -> ScoreFn:
    """A score from one in scaled coordinates and time, score_t(x_t, t): score(x, sigma) = alpha score_t(alpha x, t)."""

    def formula(fn: ScoreFn, x: Tensor, sigma: Tensor) -> Tensor:
        t = process.time(sigma)
        alpha = broadcast(process.alpha(t), x)
        return alpha * check_output(fn((alpha * x).to(x.dtype), t), x, sigma)

    return _Adapted(score_t, formula)


def clipped(score: ScoreFn, low: float, high: float) -> ScoreFn:
    """The score whose denoised sample x + sigma^2 score is clamped to [low, high].

    For data known to lie in that range (images); it changes the samples, so it is never applied unasked.
    """
    if not low < high:
        raise ValueError(f"low = {low:g}, high = {high:g}; expected low < high, the range of the data")

    def formula(fn: ScoreFn, x: Tensor, sigma: Tensor) -> Tensor:
        var = broadcast(sigma, x) ** 2
        s = fn(x, sigma)
        # where nothing is clamped the score passes through untouched, to the last digit
        bounded = ((x + var * s).clamp(low, high) - x) / var
        inside = (x + var * s - low) * (high - x - var * s) >= 0
        return torch.where(inside, s, bounded)

    return _Adapted(score, formula)
