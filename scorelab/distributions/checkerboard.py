"""The uniform distribution on the dark squares of a checkerboard.

Blurred by Gaussian noise, one interval [a, b] has the mass function

    M(x) = Phi(u) - Phi(l),    u = (b - x) / sigma,  l = (a - x) / sigma,

and the density is the mean over dark squares of M_x M_y / area. Far outside, Phi(u) - Phi(l) underflows, so there the
scaled complementary error function is used: for 0 < l < u

    M = 1/2 exp(-l^2/2) [erfcx(l/sqrt 2) - exp(-(u-l)(u+l)/2) erfcx(u/sqrt 2)].

Where an interval is narrow against sigma both are differences of nearly equal numbers; there, with centre c and half of
the width h, in units of sigma, and Hermite's polynomials,

    M = 2 h phi(c) S,   S = sum_k He_2k(c) h^2k / (2k + 1)!,    -d log M / dc = c exp(-h^2/2) sinh(c h) / (c h S).
"""

from __future__ import annotations

import math

import torch

from scorelab.distributions.base import Distribution
from scorelab.typing import Tensor

__all__ = ["Checkerboard"]

_ROOT2 = math.sqrt(2)
_NARROW = 0.5


class Checkerboard(Distribution):
    """``squares`` by ``squares`` over [-extent, extent]^2, the lower left one dark; points are (B, 2)."""

    def __init__(self, squares: int = 4, extent: float = 2.0, *, dtype: torch.dtype = torch.float32) -> None:
        if squares < 2 or squares % 2 or not 0 < extent < math.inf:
            raise ValueError(f"squares = {squares}, extent = {extent:g}; expected an even number >= 2, extent > 0")
        self.data_shape = (2,)
        self.side = 2 * extent / squares
        self.edges = torch.linspace(-extent, extent, squares + 1, dtype=dtype)[:-1]
        dark = [(i, j) for i in range(squares) for j in range(squares) if (i + j) % 2 == 0]
        self.columns, self.lines = torch.tensor(dark).T

    @property
    def device(self) -> torch.device:
        return self.edges.device

    @property
    def row_cost(self) -> int:
        return 8 * len(self.columns)

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        place = generator.device
        pick = torch.randint(len(self.columns), (n,), generator=generator, device=place).to(self.device)
        corner = torch.stack([self.edges[self.columns[pick]], self.edges[self.lines[pick]]], 1)
        inside = torch.rand(n, 2, generator=generator, dtype=self.edges.dtype, device=place).to(self.device)
        return corner + self.side * inside

    def _parts(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log M and d log M / dx for each coordinate and interval, (B, 2, n); log responsibilities of the squares."""
        log_mass, slope = _interval(x[:, :, None], self.edges.to(x), self.side, sigma.reshape(-1, 1, 1))
        columns, lines = self.columns.to(x.device), self.lines.to(x.device)
        joint = log_mass[:, 0, columns] + log_mass[:, 1, lines]
        return log_mass, torch.stack([slope[:, 0, columns], slope[:, 1, lines]], 1), joint

    def _log_prob(self, x: Tensor, sigma: Tensor) -> Tensor:
        area = math.log(len(self.columns)) + 2 * math.log(self.side)
        sharp = (sigma == 0).reshape(-1)
        if not bool(sharp.any()):
            return torch.logsumexp(self._parts(x, sigma)[2], 1) - area
        relative = (x.unsqueeze(2) - self.edges.to(x)) / self.side
        inside = (relative >= 0) & (relative <= 1)
        dark = (inside[:, 0, self.columns.to(x.device)] & inside[:, 1, self.lines.to(x.device)]).any(1)
        exact = torch.full_like(x[:, 0], -math.inf).masked_fill(dark, -area)
        blurred = torch.logsumexp(self._parts(x, torch.where(sigma == 0, torch.ones_like(sigma), sigma))[2], 1) - area
        return torch.where(sharp, exact, blurred)

    def _score(self, x: Tensor, sigma: Tensor) -> Tensor:
        if not bool((sigma > 0).all()):
            raise ValueError("a checkerboard has no score at sigma = 0 (its density jumps); expected sigma > 0")
        _, slopes, joint = self._parts(x, sigma)
        return (torch.softmax(joint, 1)[:, None] * slopes).sum(-1)


def _interval(x: Tensor, left: Tensor, width: float, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """log[Phi(u) - Phi(l)] and its derivative in x, for the interval [left, left + width]."""
    centre = (left - x) / sigma + 0.5 * width / sigma
    side = torch.where(centre >= 0, 1.0, -1.0).to(x)
    half = 0.5 * width / sigma
    # reflected so that the interval lies to the right: |l| <= u
    lower, upper = side * centre - half, side * centre + half
    outside = lower > 0
    far = torch.where(outside, lower, torch.ones_like(lower))
    falloff = torch.exp(-half * 2 * torch.where(outside, side * centre, torch.ones_like(lower)))
    tail = torch.special.erfcx(far / _ROOT2) - falloff * torch.special.erfcx((far + 2 * half) / _ROOT2)
    log_far = -0.5 * far**2 + torch.log(0.5 * tail)
    slope_far = math.sqrt(2 / math.pi) * (1 - falloff) / tail / sigma
    near = torch.where(outside, -torch.ones_like(lower), lower)
    mass = 0.5 * (torch.erf(upper / _ROOT2) - torch.erf(near / _ROOT2))
    density = (torch.exp(-0.5 * near**2) - torch.exp(-0.5 * upper**2)) / math.sqrt(2 * math.pi)
    log_mass = torch.where(outside, log_far, torch.log(mass))
    slope = side * torch.where(outside, slope_far, density / mass / sigma)
    narrow = (half < _NARROW) & (half * centre.abs() < _NARROW)
    log_narrow, slope_narrow = _narrow(torch.where(narrow, centre, 0.0), torch.where(narrow, half, _NARROW))
    return torch.where(narrow, log_narrow, log_mass), torch.where(narrow, slope_narrow / sigma, slope)


def _narrow(centre: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """log[Phi(c + h) - Phi(c - h)] and minus its derivative in c, for small h and h c: no differences."""
    product, square = centre * half, half**2
    # He_n(c) h^n
    before, now, total, factorial = torch.ones_like(product), product, torch.ones_like(product), 1.0
    for n in range(1, 14):
        before, now = now, product * now - n * square * before
        factorial *= n + 1
        if n % 2:
            total = total + now / (factorial * (n + 2))
    # sinh(y)/y
    y2, ratio = product**2, torch.ones_like(product)
    for n in (12, 10, 8, 6, 4, 2):
        ratio = 1 + ratio * y2 / (n * (n + 1))
    log_mass = torch.log(2 * half * total) - 0.5 * (centre**2 + math.log(2 * math.pi))
    return log_mass, centre * torch.exp(-0.5 * square) * ratio / total
