"""Processes with closed forms in continuous time.

VE, VP and sub-VP: Song et al., Score-Based Generative Modeling through SDEs, 2021, arXiv:2011.13456. Cosine: Nichol and
Dhariwal, Improved Denoising Diffusion Probabilistic Models, 2021, arXiv:2102.09672. Flow: Liu et al., Flow Straight and
Fast, 2022, arXiv:2209.03003.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from scorelab.processes.base import Process
from scorelab.typing import Tensor

__all__ = ["VE", "VP", "Cosine", "Flow", "SubVP"]


def _check_times(t_min: float, t_max: float) -> None:
    if not 0 <= t_min < t_max <= 1:
        raise ValueError(f"t_min = {t_min:g}, t_max = {t_max:g}; expected 0 <= t_min < t_max <= 1")


@dataclass(frozen=True)
class VE(Process):
    """Variance exploding: alpha = 1, std = sigma_min (sigma_max / sigma_min)^t."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"VE got sigma_min = {self.sigma_min:g}, sigma_max = {self.sigma_max:g}; "
                "expected 0 < sigma_min < sigma_max"
            )

    @property
    def t_sample(self) -> float:
        """t_min: sigma is sigma_min there."""
        return self.t_min

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def std(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(t * self._log_ratio)

    sigma = std

    def time(self, sigma: Tensor) -> Tensor:
        return (sigma / self.sigma_min).log() / self._log_ratio

    def drift(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.std(t) * math.sqrt(2 * self._log_ratio)


@dataclass(frozen=True)
class _LinearBeta(Process):
    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _check_times(self.t_min, self.t_max)
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise ValueError(
                f"{type(self).__name__} got beta_min = {self.beta_min:g}, beta_max = {self.beta_max:g}; "
                "expected 0 < beta_min <= beta_max"
            )

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _integral(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def _integral_inverse(self, b: Tensor) -> Tensor:
        return 2 * b / (self.beta_min + (self.beta_min**2 + 2 * b * (self.beta_max - self.beta_min)).sqrt())

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self._integral(t))

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * self._beta(t)


@dataclass(frozen=True)
class VP(_LinearBeta):
    """Variance preserving, beta linear in t: alpha^2 = exp(-int beta), std^2 = 1 - alpha^2."""

    def std(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-self._integral(t))).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.expm1(self._integral(t)).sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        return self._integral_inverse(torch.log1p(sigma**2))

    def diffusion(self, t: Tensor) -> Tensor:
        return self._beta(t).sqrt()


@dataclass(frozen=True)
class SubVP(_LinearBeta):
    """Sub-variance preserving: alpha of VP, std = 1 - alpha^2, so sigma = 2 sinh(int beta / 2)."""

    def std(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self._integral(t))

    def sigma(self, t: Tensor) -> Tensor:
        return 2 * torch.sinh(0.5 * self._integral(t))

    def time(self, sigma: Tensor) -> Tensor:
        return self._integral_inverse(2 * torch.asinh(0.5 * sigma))

    def diffusion(self, t: Tensor) -> Tensor:
        return (self._beta(t) * -torch.expm1(-2 * self._integral(t))).sqrt()


@dataclass(frozen=True)
class Cosine(Process):
    """alpha^2 = cos^2(a(t)) / cos^2(a(0)), a(t) = pi/2 (t + s) / (1 + s), variance preserving.

    sigma is infinite at t = 1; t_max = 0.999 stops at sigma = 640.
    """

    s: float = 0.008
    t_min: float = 1e-5
    t_max: float = 0.999

    def __post_init__(self) -> None:
        _check_times(self.t_min, self.t_max)
        if not 0 < self.s < math.inf or self.t_max >= 1:
            raise ValueError(f"Cosine got s = {self.s:g}, t_max = {self.t_max:g}; expected s > 0 and t_max < 1")

    @property
    def _rate(self) -> float:
        return 0.5 * math.pi / (1 + self.s)

    def _angle(self, t: Tensor) -> Tensor:
        return self._rate * (t + self.s)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(self._angle(t)) / math.cos(self._rate * self.s)

    def std(self, t: Tensor) -> Tensor:
        # 1 - cos^2 a / cos^2 b = sin(a + b) sin(a - b) / cos^2 b, b = a(0)
        b = self._rate * self.s
        return (torch.sin(self._angle(t) + b) * torch.sin(self._rate * t)).sqrt() / math.cos(b)

    def sigma(self, t: Tensor) -> Tensor:
        a, b = self._angle(t), self._rate * self.s
        return (torch.sin(a + b) * torch.sin(self._rate * t)).sqrt() / torch.cos(a)

    def time(self, sigma: Tensor) -> Tensor:
        # tan^2 a = tan^2 b + sigma^2 / cos^2 b, and a - b from the tangent's subtraction formula
        b = self._rate * self.s
        gain = (sigma / math.cos(b)) ** 2
        tan_a, tan_b = (math.tan(b) ** 2 + gain).sqrt(), math.tan(b)
        return torch.atan2(gain / (tan_a + tan_b), 1 + tan_a * tan_b) / self._rate

    def drift(self, t: Tensor) -> Tensor:
        return -self._rate * torch.tan(self._angle(t))

    def diffusion(self, t: Tensor) -> Tensor:
        return (-2 * self.drift(t)).sqrt()


@dataclass(frozen=True)
class Flow(Process):
    """Rectified flow: x_t = (1 - t) x0 + t eps, sigma = t / (1 - t); infinite at t = 1."""

    t_min: float = 1e-4
    t_max: float = 0.999

    def __post_init__(self) -> None:
        _check_times(self.t_min, self.t_max)
        if self.t_max >= 1:
            raise ValueError(f"Flow got t_max = {self.t_max:g}; expected t_max < 1, where sigma is finite")

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def std(self, t: Tensor) -> Tensor:
        return t.clone()

    def sigma(self, t: Tensor) -> Tensor:
        return t / (1 - t)

    def time(self, sigma: Tensor) -> Tensor:
        return sigma / (1 + sigma)

    def drift(self, t: Tensor) -> Tensor:
        return -1 / (1 - t)

    def diffusion(self, t: Tensor) -> Tensor:
        return (2 * t / (1 - t)).sqrt()
