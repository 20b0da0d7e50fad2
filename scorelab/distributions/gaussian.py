"""Gaussians of any covariance: p(.; sigma) = N(mean, cov + sigma^2 I), in the eigenbasis of cov."""

from __future__ import annotations

import math

import torch

from scorelab.distributions.base import Distribution
from scorelab.noise import randn
from scorelab.typing import Tensor

__all__ = ["Gaussian"]


class Gaussian(Distribution):
    """N(mean, cov); mean (*D), cov a variance (), variances (*D) or a matrix (n, n), n = prod(D).

    Raises ValueError for shapes that don't fit or a covariance that is not symmetric positive semi-definite.
    """

    def __init__(self, mean: Tensor, cov: Tensor | float = 1.0) -> None:
        if not mean.is_floating_point() or mean.ndim < 1:
            raise ValueError(f"mean has shape {tuple(mean.shape)}, {mean.dtype}; expected a float tensor (*D)")
        self.data_shape = tuple(mean.shape)
        self.mean = mean.reshape(-1)
        n = len(self.mean)
        cov = torch.as_tensor(cov, dtype=mean.dtype, device=mean.device)
        if cov.ndim == 0 or cov.shape == mean.shape:
            self.variances, self.basis = cov.expand(mean.shape).reshape(-1), None
        elif cov.shape == (n, n):
            if not torch.allclose(cov, cov.T, atol=1e-6 * float(cov.abs().max())):
                raise ValueError("cov is not symmetric; expected a covariance matrix: try (cov + cov.T) / 2")
            self.variances, self.basis = torch.linalg.eigh(cov)
        else:
            raise ValueError(
                f"cov has shape {tuple(cov.shape)} for mean {tuple(mean.shape)}; expected (), {tuple(mean.shape)} or "
                f"({n}, {n})"
            )
        if float(self.variances.min()) < -1e-6 * float(self.variances.abs().max()):
            raise ValueError(f"cov has eigenvalue {float(self.variances.min()):.3g}; expected none below 0")
        # rounding leaves of an eigenvalue of 0 a little on either side
        rounding = 0.0 if self.basis is None else n * torch.finfo(cov.dtype).eps * float(self.variances.abs().max())
        zero = self.variances <= rounding
        self.variances = self.variances.masked_fill(zero, 0.0)
        self._is_singular = bool(zero.any())

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def row_cost(self) -> int:
        return len(self.mean)

    def _to_basis(self, x: Tensor) -> Tensor:
        return x if self.basis is None else x @ self.basis.to(x)

    def _from_basis(self, z: Tensor) -> Tensor:
        return z if self.basis is None else z @ self.basis.to(z).T

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        z = randn((n, len(self.mean)), self.mean, generator)
        return (self.mean + self._from_basis(self.variances.sqrt() * z)).reshape(n, *self.data_shape)

    def _log_prob(self, x: Tensor, sigma: Tensor) -> Tensor:
        var = self._blurred(x, sigma)
        z = self._to_basis(x - self.mean.to(x))
        return -0.5 * (z**2 / var + torch.log(2 * math.pi * var)).sum(1)

    def _score(self, x: Tensor, sigma: Tensor) -> Tensor:
        z = self._to_basis(x - self.mean.to(x))
        return -self._from_basis(z / self._blurred(x, sigma))

    def _blurred(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Variances of the blurred Gaussian in its eigenbasis; ValueError where there is no density."""
        if self._is_singular and not bool((sigma > 0).all()):
            zeros = int((self.variances == 0).sum())
            raise ValueError(f"a Gaussian with {zeros} variances of 0 has no density at sigma = 0; expected sigma > 0")
        return self.variances.to(x) + sigma**2
