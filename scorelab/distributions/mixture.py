"""Mixtures of isotropic Gaussians, and the empirical distribution of a data set as the mixture of std 0.

    p(x; sigma) = sum_k w_k N(x; m_k, v_k I),    v_k = std_k^2 + sigma^2
    score = sum_k r_k (m_k - x) / v_k,           r = softmax_k [log w_k - n/2 log v_k - ||x - m_k||^2 / (2 v_k)]

Means are taken of what remains after subtracting the mean of the centres, so that no digits are lost to data that
lies far from the origin.
"""

from __future__ import annotations

import functools
import math

import torch

from scorelab.distributions.base import Distribution
from scorelab.noise import randn
from scorelab.typing import Tensor

__all__ = ["Empirical", "GaussianMixture", "picks", "squared_distances"]

_REFINED = 16
_VANISHED = 70.0


def squared_distances(x: Tensor, centres: Tensor) -> Tensor:
    """||x_i - c_k||^2, (B, K), of x (B, D) and centres (K, D).

    Differences squared, dimension by dimension, where that is affordable. For many centres of high dimension they come
    from one matrix product around the centres' mean, and those of the nearest centres are recomputed by differences:
    there the product's rounding, 1e-7 of the squared distance to that mean, would be felt once divided by a variance.
    """
    if _is_direct(centres):
        # an axis for the dimensions would be a pass over memory D times as large
        pairs = zip(x.unbind(1), centres.unbind(1), strict=True)
        squares = ((a.unsqueeze(1) - b).square() for a, b in pairs)
        return functools.reduce(torch.add, squares)
    centre = centres.mean(0)
    y, m = x - centre, centres - centre
    d2 = torch.addmm(m.square().sum(1), y, m.T, alpha=-2) + y.square().sum(1, keepdim=True)
    near = d2.detach().topk(min(_REFINED, len(m)), largest=False).indices
    exact = (y.unsqueeze(1) - m[near]).square().sum(-1)
    return d2.scatter(1, near, exact)


def picks(weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n indices (n,), also none, each drawn with the probabilities ``weights``, on the generator's device."""
    # multinomial refuses to draw none
    return torch.multinomial(weights.to(generator.device), max(n, 1), replacement=True, generator=generator)[:n]


def _is_direct(centres: Tensor) -> bool:
    return centres.numel() <= (2**18 if centres.shape[1] <= 8 else 2**13)


class GaussianMixture(Distribution):
    """sum_k weights_k N(means_k, std_k^2 I); means (K, *D), std a number or (K,), weights (K,), by default equal.

    Weights are normalised. Raises ValueError for shapes that don't fit, a negative std or weight.
    """

    def __init__(self, means: Tensor, std: Tensor | float, weights: Tensor | None = None) -> None:
        if not isinstance(means, Tensor) or not means.is_floating_point() or means.ndim < 2 or len(means) == 0:
            got = f"{tuple(means.shape)}, {means.dtype}" if isinstance(means, Tensor) else type(means).__name__
            raise ValueError(f"means is {got}; expected a float tensor (K, *D) with K >= 1")
        if not bool(torch.isfinite(means).all()):
            raise ValueError("means holds NaN or infinity; expected finite numbers")
        count = len(means)
        self.data_shape = tuple(means.shape[1:])
        self.means = means.reshape(count, -1)
        std = torch.as_tensor(std, dtype=means.dtype, device=means.device)
        if std.shape not in ((), (count,)) or not bool((std >= 0).all()):
            raise ValueError(f"std has shape {tuple(std.shape)}; expected a number or ({count},), nowhere negative")
        self.std = std
        self._is_pointed = not bool((std > 0).all())
        if weights is None:
            weights = torch.ones(count, dtype=means.dtype, device=means.device)
        if weights.shape != (count,) or not bool((weights >= 0).all()) or not float(weights.sum()) > 0:
            raise ValueError(f"weights has shape {tuple(weights.shape)}; expected ({count},), >= 0, with positive sum")
        self.weights = weights.to(means) / weights.to(means).sum()

    @property
    def device(self) -> torch.device:
        return self.means.device

    @property
    def row_cost(self) -> int:
        return 4 * len(self.means)

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        pick = picks(self.weights, n, generator).to(self.device)
        std = self.std if self.std.ndim == 0 else self.std[pick][:, None]
        noise = randn((n, self.means.shape[1]), self.means, generator)
        return (self.means[pick] + std * noise).reshape(n, *self.data_shape)

    def _parts(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Unnormalised log responsibilities (B, K), and v, () or (B, K)-broadcastable."""
        if self._is_pointed and not bool((sigma > 0).all()):
            raise ValueError("a mixture of std 0 (a data set) has no density at sigma = 0; expected sigma > 0")
        var = self.std.to(x) ** 2 + sigma**2
        d2 = squared_distances(x, self.means.to(x))
        logits = self.weights.to(x).log() - d2 / (2 * var)
        if self.std.ndim:
            logits = logits - 0.5 * x.shape[1] * torch.log(var)
        # nothing is below e^-70 of the largest: no sum notices, and denormal numbers would slow all that follows
        return torch.maximum(logits, logits.detach().amax(1, keepdim=True) - _VANISHED), var

    def _log_prob(self, x: Tensor, sigma: Tensor) -> Tensor:
        logits, var = self._parts(x, sigma)
        log_var = var.log().reshape(-1) if self.std.ndim == 0 else var.new_zeros(())
        return torch.logsumexp(logits, 1) - 0.5 * x.shape[1] * (log_var + math.log(2 * math.pi))

    def _score(self, x: Tensor, sigma: Tensor) -> Tensor:
        logits, var = self._parts(x, sigma)
        weight, means = torch.softmax(logits, 1), self.means.to(x)
        centre = means.mean(0)
        if self.std.ndim:
            weight = weight / var
            return weight @ (means - centre) - weight.sum(1, keepdim=True) * (x - centre)
        return (weight @ (means - centre) - (x - centre)) / var


class Empirical(GaussianMixture):
    """The distribution of a data set (N, *D): each point with probability 1/N.

    Its density exists for sigma > 0 only; its optimal denoiser is what a network with unlimited capacity learns.
    """

    def __init__(self, data: Tensor) -> None:
        super().__init__(data, 0.0)
