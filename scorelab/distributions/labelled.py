"""A distribution with labels: p(x, y) = w_y p_y(x). Blurred, it is the mixture of its blurred parts, and its score

sum_y r_y(x) score_y(x),    r = softmax_y [log w_y + log p_y(x; sigma)]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from scorelab.distributions.base import Distribution
from scorelab.distributions.mixture import picks
from scorelab.typing import ScoreFn, Tensor

__all__ = ["Labelled"]


class Labelled(Distribution):
    """One distribution for each label 0, 1, ..., with weights (K,), by default equal; itself their mixture.

    Weights are normalised. Raises ValueError for parts of different shapes or weights that don't fit.
    """

    def __init__(self, parts: Sequence[Distribution], weights: Tensor | None = None) -> None:
        shapes = {part.data_shape for part in parts}
        if len(shapes) != 1:
            raise ValueError(f"the parts have shapes {sorted(shapes)}; expected one shape, of one part at least")
        if weights is None:
            weights = torch.ones(len(parts), dtype=torch.float64)
        if weights.shape != (len(parts),) or not bool((weights >= 0).all()) or not float(weights.sum()) > 0:
            raise ValueError(f"weights has shape {tuple(weights.shape)}; expected ({len(parts)},), >= 0, positive sum")
        self.parts, self.data_shape = tuple(parts), shapes.pop()
        self.weights = weights / weights.sum()

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def row_cost(self) -> int:
        return max(part.row_cost for part in self.parts)

    def sample_labelled(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n samples (n, *data_shape) and their labels (n,)."""
        labels = picks(self.weights, n, generator)
        # as many of each part as have its label, in the order of the labels
        counts = torch.bincount(labels, minlength=len(self.parts)).tolist()
        drawn = torch.cat([p.sample(c, generator) for p, c in zip(self.parts, counts, strict=True)])
        places = labels.argsort(stable=True)
        return torch.empty_like(drawn).index_copy_(0, places.to(drawn.device), drawn), labels.to(drawn.device)

    def conditioned(self, labels: Tensor) -> ScoreFn:
        """The score of x given its label: labels (B,), one for each sample, or (1,)."""
        return _Given(self, labels)

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.sample_labelled(n, generator)[0]

    def _logits(self, x: Tensor, sigma: Tensor) -> Tensor:
        logs = torch.stack([part._log_prob(x, sigma) for part in self.parts], 1)
        return logs + self.weights.to(x).log()

    def _log_prob(self, x: Tensor, sigma: Tensor) -> Tensor:
        return torch.logsumexp(self._logits(x, sigma), 1)

    def _score(self, x: Tensor, sigma: Tensor) -> Tensor:
        share = torch.softmax(self._logits(x, sigma), 1)
        scores = torch.stack([part._score(x, sigma) for part in self.parts], 2)
        return (scores * share.unsqueeze(1)).sum(2)


class _Given:
    """The score of the part that each sample's label names."""

    def __init__(self, distribution: Labelled, labels: Tensor) -> None:
        self.distribution, self.labels = distribution, labels

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        scores = torch.stack([part.score(x, sigma) for part in self.distribution.parts])
        return scores[self.labels.to(x.device).expand(len(x)), torch.arange(len(x), device=x.device)]

    def rows(self, index: Tensor) -> ScoreFn:
        return self if len(self.labels) == 1 else _Given(self.distribution, self.labels[index])
