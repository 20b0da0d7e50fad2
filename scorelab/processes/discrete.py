"""DDPM's process of T steps, in continuous time.

q(x_i | x_{i-1}) = N(sqrt(1 - beta_i) x_{i-1}, beta_i I), t = i / T; abar_i = prod_{j <= i} (1 - beta_j), abar_0 = 1.
Between the steps i >= 1 log sigma is interpolated linearly in t; below the first step sigma is linear from 0.

Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv:2006.11239; the cosine betas: Nichol and Dhariwal,
2021, arXiv:2102.09672.
"""

from __future__ import annotations

import math

import torch

from scorelab.processes.base import Process
from scorelab.tables import Table
from scorelab.typing import Tensor

__all__ = ["DiscreteVP", "cosine_betas", "ddpm", "ddpm_cosine", "linear_betas"]


def linear_betas(steps: int = 1000) -> Tensor:
    """Betas from 1e-4 to 0.02 for 1000 steps, scaled by 1000 / T for others; float64 (T,)."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")
    scale = 1000 / steps
    betas = torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)
    if betas[-1] >= 1:
        raise ValueError(f"linear betas for {steps} steps reach {float(betas[-1]):g}; expected below 1: use more steps")
    return betas


def cosine_betas(steps: int = 1000, s: float = 0.008, most: float = 0.999) -> Tensor:
    """beta_i = min(1 - abar(i/T) / abar((i-1)/T), most), abar the squared cosine; float64 (T,)."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")
    abar = [math.cos((i / steps + s) / (1 + s) * math.pi / 2) ** 2 for i in range(steps + 1)]
    return torch.tensor([min(1 - abar[i + 1] / abar[i], most) for i in range(steps)], dtype=torch.float64)


class DiscreteVP(Process):
    """The process of given betas (T,); raises ValueError unless they lie in (0, 1)."""

    def __init__(self, betas: Tensor | list[float]) -> None:
        betas = torch.as_tensor(betas, dtype=torch.float64).cpu()
        if betas.ndim != 1 or len(betas) == 0 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"betas has shape {tuple(betas.shape)}; expected (T,) with every value in (0, 1)")
        self.betas = betas
        self.steps = len(betas)
        log_abar = torch.log1p(-betas).cumsum(0)
        self.alphas_cumprod = log_abar.exp()
        self.step_sigmas = torch.expm1(-log_abar).sqrt()
        self._log_sigmas = Table(self.step_sigmas.log())
        self.t_min, self.t_max = 1 / self.steps, 1.0
        self._least = float(self.step_sigmas[0])
        self._hash = hash(tuple(betas.tolist()))

    def __repr__(self) -> str:
        return f"DiscreteVP({self.steps} betas from {float(self.betas[0]):g} to {float(self.betas[-1]):g})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DiscreteVP) and torch.equal(self.betas, other.betas)

    def __hash__(self) -> int:
        return self._hash

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log sigma at the left end of t's segment, its slope in t, and t's distance from that end."""
        table = self._log_sigmas.like(t)
        if self.steps == 1:
            return table[0].expand(t.shape), torch.zeros_like(t), torch.zeros_like(t)
        position = t * self.steps - 1
        left = position.detach().floor().long().clamp(0, self.steps - 2)
        low = table.take(left)
        return low, (table.take(left + 1) - low) * self.steps, (position - left) / self.steps

    def sigma(self, t: Tensor) -> Tensor:
        low, slope, offset = self._segment(t)
        first = t < self.t_min
        inside = torch.exp(low + slope * torch.where(first, 0.0, offset))
        return torch.where(first, inside * t * self.steps, inside)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.rsqrt(1 + self.sigma(t) ** 2)

    def std(self, t: Tensor) -> Tensor:
        sigma = self.sigma(t)
        return sigma * torch.rsqrt(1 + sigma**2)

    def time(self, sigma: Tensor) -> Tensor:
        table = self._log_sigmas.like(sigma)
        below = sigma < self._least
        linear = sigma / self._least / self.steps
        if self.steps == 1:
            return torch.where(below, linear, 1.0)
        log = sigma.clamp_min(self._least).log()
        left = self._log_sigmas.segment(log)
        low = table.take(left)
        inside = (left + 1 + (log - low) / (table.take(left + 1) - low)) / self.steps
        return torch.where(below, linear, inside)

    def drift(self, t: Tensor) -> Tensor:
        # f = d log alpha / dt = -sigma sigma' / (1 + sigma^2)
        sigma = self.sigma(t)
        _, slope, _ = self._segment(t)
        derivative = torch.where(t < self.t_min, self._least * self.steps, sigma * slope)
        return -sigma * derivative / (1 + sigma**2)

    def diffusion(self, t: Tensor) -> Tensor:
        return (-2 * self.drift(t)).sqrt()


def ddpm(steps: int = 1000) -> DiscreteVP:
    """DDPM's process of linear betas."""
    return DiscreteVP(linear_betas(steps))


def ddpm_cosine(steps: int = 1000, s: float = 0.008, most: float = 0.999) -> DiscreteVP:
    """Improved DDPM's process of cosine betas."""
    return DiscreteVP(cosine_betas(steps, s, most))
