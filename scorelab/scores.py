"""Scores made of scores, and the one place that reads what is known of a score besides its values.

A bare callable is a score. It may also say, by attributes:

    sigma_range            (low, high), the noise levels it knows
    data_mean              the mean of what it scores, which broadcasts with a sample; samples begin around it
    device, dtype          where its weights are, and of what type
    rows(index)            the score for some samples of the batch it is bound to; without it a batch is never split
    score_and_variance     (x, sigma) -> (score, v): a learned variance, from the same evaluation

``combined`` makes a score that keeps all of it, so adapters, clipping, conditions and guidance are formulas.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from scorelab.checks import check_batch, check_output, level, widened
from scorelab.typing import ScoreFn, Tensor

__all__ = [
    "Combined",
    "can_split",
    "check_known",
    "combined",
    "data_mean",
    "device_of",
    "dtype_of",
    "networks",
    "restricted",
    "sigma_range",
]

Formula = Callable[..., Tensor]
Inputs = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def sigma_range(score: ScoreFn) -> tuple[float, float]:
    """The noise levels that a score knows; all, if it does not say."""
    low, high = getattr(score, "sigma_range", (0.0, float("inf")))
    return low, high


def data_mean(score: ScoreFn, like: Tensor) -> Tensor | float:
    """The mean of what it scores, as a tensor that broadcasts with ``like`` (B, *D); 0, if it does not say.

    Where the largest noise begins at N(0, sigma^2 I), an offset m of the data comes out too small by m s/sigma in
    directions of deviation s: for the common brightness of D pixels s is sqrt(D) times that of an image's mean.
    """
    found: Tensor | None = getattr(score, "data_mean", None)
    # samples of a wrong shape are left to the score, which refuses them
    fits = found is not None and found.ndim == like.ndim - 1 and len(found) == like.shape[1]
    return found.to(like) if found is not None and fits else 0.0


def device_of(score: ScoreFn) -> torch.device | None:
    """Where a score's weights are, None if it does not say."""
    return getattr(score, "device", None)


def dtype_of(score: ScoreFn) -> torch.dtype | None:
    """The type of a score's weights, None if it does not say."""
    return getattr(score, "dtype", None)


def can_split(score: ScoreFn) -> bool:
    """Whether the score says how it is restricted to some samples of a batch."""
    return hasattr(score, "rows")


def restricted(score: ScoreFn, index: Tensor) -> ScoreFn | None:
    """The score for some samples of the batch, None if it does not say how."""
    return score.rows(index) if hasattr(score, "rows") else None


def networks(score: object) -> Iterator[nn.Module]:
    """The modules that a score is made of, as far as it shows: of parts, of a bound method's object."""
    if isinstance(score, nn.Module):
        yield score
    elif isinstance(score, Combined):
        for part in score.scores:
            yield from networks(part)
    elif (inner := getattr(score, "__self__", None) or getattr(score, "model", None)) is not None:
        yield from networks(inner)


def check_known(score: ScoreFn, least: float, most: float) -> None:
    """Refuse noise levels that the score does not know."""
    low, high = sigma_range(score)
    if most > high * (1 + 1e-4) or least < low * (1 - 1e-4):
        raise ValueError(
            f"sigmas span [{least:g}, {most:g}] but this score knows [{low:g}, {high:g}] (its sigma_range): "
            "choose levels inside"
        )


class Combined:
    """What ``combined`` makes."""

    def __init__(
        self,
        formula: Formula,
        scores: tuple[ScoreFn, ...],
        inputs: Inputs | None,
        variance: bool,
        known: tuple[float, float] = (0.0, math.inf),
    ) -> None:
        for score in scores:
            if not callable(score):
                raise TypeError(f"got {type(score).__name__}; expected a callable f(x, sigma)")
        self.formula, self.scores, self.inputs, self._passes, self._known = formula, scores, inputs, variance, known

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The formula's value, in x's dtype; sigma may be a number. ValueError, TypeError for an x that is no batch."""
        check_batch(x)
        sigma = sigma if isinstance(sigma, Tensor) else level(sigma, x)
        return self._finished(x, sigma, self.outputs(x, sigma))

    def outputs(self, x: Tensor, sigma: Tensor) -> tuple[Any, ...]:
        """What the parts return, checked."""
        at, level = (x, widened(sigma)) if self.inputs is None else self.inputs(x, widened(sigma))
        found = [check_output(score(at, level), at, level).clone() for score in self.scores[:-1]]
        # kept in memory of their own, for the next evaluation may overwrite them
        return (*found, check_output(self.scores[-1](at, level), at, level))

    def _finished(self, x: Tensor, sigma: Tensor, outputs: tuple[Any, ...]) -> Tensor:
        return self.formula(x, widened(sigma), *outputs).to(x.dtype)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The levels that all parts know."""
        lows, highs = zip(self._known, *map(sigma_range, self.scores), strict=True)
        return max(lows), min(highs)

    @property
    def device(self) -> torch.device | None:
        """Where the first part that says so has its weights."""
        return next((d for d in map(device_of, self.scores) if d is not None), None)

    @property
    def data_mean(self) -> Tensor | None:
        """That of the first part that says so."""
        return next((m for m in (getattr(s, "data_mean", None) for s in self.scores) if m is not None), None)

    @property
    def dtype(self) -> torch.dtype | None:
        """That of the first part that says so."""
        return next((d for d in map(dtype_of, self.scores) if d is not None), None)

    def __getattr__(self, name: str) -> Any:
        # there only if the parts have it
        if name == "rows" and all(map(can_split, self.scores)):
            return self._rows
        if name == "score_and_variance" and self._passes and hasattr(self.scores[0], name):
            return self._score_and_variance
        raise AttributeError(name)

    def _rows(self, index: Tensor) -> Combined:
        made = copy.copy(self)
        made.scores = tuple(score.rows(index) for score in self.scores)  # type: ignore[attr-defined]
        return made

    def _score_and_variance(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []

        def first(x: Tensor, sigma: Tensor) -> Tensor:
            output, v = self.scores[0].score_and_variance(x, sigma)  # type: ignore[attr-defined]
            seen.append(check_output(v, x, sigma).to(x.dtype))
            return output  # type: ignore[no-any-return]

        made = copy.copy(self)
        made.scores = (first, *self.scores[1:])
        return made(x, sigma), seen[0]


def combined(
    formula: Formula,
    *scores: ScoreFn,
    inputs: Inputs | None = None,
    variance: bool = False,
    known: tuple[float, float] = (0.0, math.inf),
) -> Combined:
    """A score from others: ``formula(x, sigma, *outputs)``, x (B, *D), sigma () or (B,), outputs like x.

    It knows the levels that all of them know, is where they are, and is restricted to rows if each of them can be.
    inputs: what they are called with, (x, sigma) -> (x', sigma'), for functions of other coordinates or labels.
    variance: the learned variance of the first is also that of the whole. known: the noise levels that the formula
    knows, such as a process's.

    Raises TypeError for what is not callable, and as ``check_output`` for outputs that don't fit.
    """
    return Combined(formula, scores, inputs, variance, known)
