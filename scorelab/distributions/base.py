"""A distribution whose blurred versions p(.; sigma) = p * N(0, sigma^2 I) are known exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from scorelab.checks import broadcast, check_batch, widened
from scorelab.noise import fresh_generator
from scorelab.predictions import denoise_from_score
from scorelab.typing import Shape, Tensor

__all__ = ["CHUNK", "Distribution", "in_chunks"]

CHUNK = 2**23
"""Numbers that an intermediate result may hold at once (32 MiB in float32)."""


class Distribution(ABC):
    """Exact samples, log-densities, scores and denoised samples at every noise level.

    ``score`` is a ScoreFn. x is (B, *data_shape); sigma is () or (B,), unscaled, >= 0. Results have x's dtype and
    device. Errors: ValueError for a shape that does not fit or a negative or non-finite sigma (a tensor is looked at on
    the CPU only, elsewhere that would be a synchronisation).
    """

    data_shape: Shape

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n exact samples, (n, *data_shape)."""
        if n < 0:
            raise ValueError(f"n is {n}; expected a number of samples >= 0")
        return self._sample(n, fresh_generator(self.device) if generator is None else generator)

    def log_prob(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """log p(x; sigma) in nats, (B,)."""
        flat, level = self._enter(x, sigma)
        return in_chunks(self._log_prob, flat, level, self.row_cost).to(x.dtype)

    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """grad_x log p(x; sigma), (B, *data_shape)."""
        flat, level = self._enter(x, sigma)
        return in_chunks(self._score, flat, level, self.row_cost).reshape(x.shape).to(x.dtype)

    def denoise(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x0 | x] = x + sigma^2 score (Tweedie), (B, *data_shape)."""
        return denoise_from_score(self.score(x, sigma), x, sigma)

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the parameters are."""

    @property
    @abstractmethod
    def row_cost(self) -> int:
        """Numbers held for one row while it is evaluated."""

    @abstractmethod
    def _sample(self, n: int, generator: torch.Generator) -> Tensor: ...

    @abstractmethod
    def _log_prob(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x (B, D), sigma () or (B, 1)."""

    @abstractmethod
    def _score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x (B, D), sigma () or (B, 1)."""

    def _enter(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        check_batch(x, shape=self.data_shape)
        flat = widened(x.flatten(1))
        level = broadcast(sigma, flat).to(flat)
        if not isinstance(sigma, Tensor) and not 0 <= sigma < float("inf"):
            raise ValueError(f"sigma is {sigma:g}; expected a finite noise level >= 0")
        # on other devices the look would be a synchronisation
        if level.device.type == "cpu" and not bool(((level >= 0) & torch.isfinite(level)).all()):
            raise ValueError(
                f"sigma spans [{float(level.min()):g}, {float(level.max()):g}]; expected finite levels >= 0"
            )
        return flat, level


def in_chunks(fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: Tensor, row_cost: int) -> Tensor:
    """fn over rows of x, as many at once as memory allows; sigma () or (B, 1)."""
    size = max(1, CHUNK // max(1, row_cost))
    if len(x) <= size:
        return fn(x, sigma)
    starts = range(0, len(x), size)
    return torch.cat([fn(x[i : i + size], sigma[i : i + size] if sigma.ndim else sigma) for i in starts])
