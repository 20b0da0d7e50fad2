"""A process: how data becomes noise.

    x_t = alpha(t) x0 + std(t) eps,     sigma(t) = std(t) / alpha(t),     t in [0, 1], 0 is data
    dx  = f(t) x dt + g(t) dw           f = d log alpha / dt,   g^2 = d std^2 / dt - 2 f std^2

Times and scales are elementwise functions of tensors of any shape; they are exact in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from scorelab.checks import broadcast
from scorelab.typing import Tensor

__all__ = ["Process"]


class Process(ABC):
    """Base of all processes; ``t_min`` and ``t_max`` bound the times at which sigma is positive and finite.

    Training and likelihoods go down to t_min, grids of samplers only to ``t_sample``: a last interval from there to
    t_min would span many times its noise level.
    """

    t_min: float = 0.0
    t_max: float = 1.0

    @property
    def t_sample(self) -> float:
        """Where sampling ends: 1e-3, published for VP and sub-VP (Song et al., 2021, arXiv:2011.13456, app. C)."""
        return max(self.t_min, 1e-3)

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data at time t."""

    @abstractmethod
    def std(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at time t, in scaled coordinates."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise level std / alpha in unscaled coordinates, without cancellation at small t."""

    @abstractmethod
    def time(self, sigma: Tensor) -> Tensor:
        """Inverse of ``sigma``."""

    @abstractmethod
    def drift(self, t: Tensor) -> Tensor:
        """f(t) of dx = f x dt + g dw."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """g(t) of dx = f x dt + g dw."""

    def perturb(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + std(t) noise for x0 and noise (B, *D), t () or (B,), in scaled coordinates."""
        return (broadcast(self.alpha(t), x0) * x0 + broadcast(self.std(t), x0) * noise).to(x0.dtype)

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and standard deviation of x_t given x_s, s < t, both scaled: N(alpha_ts x_s, std_ts^2 I)."""
        alpha_s, alpha_t = self.alpha(s), self.alpha(t)
        sigma_s, sigma_t = self.sigma(s), self.sigma(t)
        return alpha_t / alpha_s, alpha_t * ((sigma_t - sigma_s) * (sigma_t + sigma_s)).sqrt()

    def sigmas(self, n: int, t_end: float | None = None) -> Tensor:
        """n noise levels, descending, uniform in t from t_max to t_end, by default t_sample; float64 on the CPU."""
        end = self.t_sample if t_end is None else t_end
        # a process of one step has t_min = t_max and one level
        if n < 1 or not (self.t_min <= end < self.t_max or n == 1):
            raise ValueError(
                f"n is {n}, t_end is {end:g}; expected at least one level and {self.t_min:g} <= t_end < {self.t_max:g}"
            )
        with torch.no_grad():
            return self.sigma(torch.linspace(self.t_max, end, n, dtype=torch.float64))

    @property
    def sigma_range(self) -> tuple[float, float]:
        """sigma at t_min and at t_max."""
        with torch.no_grad():
            ends = self.sigma(torch.tensor([self.t_min, self.t_max], dtype=torch.float64))
        return float(ends[0]), float(ends[1])
