"""The classic 2-D targets, each with exact samples, densities and scores at every noise level.

Curves are dense mixtures: their centres lie closer than half a standard deviation, so the density along a curve is
smooth. Standard deviations stand in one table.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from scorelab.checks import nearest_name
from scorelab.distributions.base import Distribution
from scorelab.distributions.checkerboard import Checkerboard
from scorelab.distributions.labelled import Labelled
from scorelab.distributions.mixture import GaussianMixture
from scorelab.typing import Tensor

__all__ = ["LABELLED", "STD", "TARGETS", "target"]

STD = {
    "two_modes": 1.0,  # modes at (5, 5) and (-5, -5)
    "ring": 0.08,  # 8 modes on the unit circle
    "labelled_ring": 0.08,  # the same, of 4 labels
    "grid": 0.1,  # 25 modes at integer points
    "moons": 0.08,  # extent 3
    "swiss_roll": 0.05,  # extent 2
    "pinwheel": 0.05,  # extent 2
    "rings": 0.04,  # extent 2
    "spirals": 0.04,  # extent 2
}
"""Standard deviation of the Gaussians that make up a target (the checkerboard has sharp edges and none)."""


def _polar(radius: Tensor | float, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def _line(n: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return torch.linspace(low, high, n, dtype=torch.float64)


def _circle(n: int) -> Tensor:
    return 2 * math.pi * torch.arange(n, dtype=torch.float64) / n


def _two_modes() -> Tensor:
    return torch.tensor([[5.0, 5.0], [-5.0, -5.0]])


def _ring() -> Tensor:
    return _polar(1.0, _circle(8))


def _grid() -> Tensor:
    return torch.cartesian_prod(_line(5, -2, 2), _line(5, -2, 2))


def _moons() -> Tensor:
    upper = _polar(1.0, _line(200, 0, math.pi)) - torch.tensor([0.5, 0.25])
    return torch.cat([upper, -upper])


def _swiss_roll() -> Tensor:
    # equal steps of the angle, as scikit-learn's make_swiss_roll
    angle = _line(600, 1.5 * math.pi, 4.5 * math.pi)
    return _polar(angle / (4.5 * math.pi), angle)


def _pinwheel() -> Tensor:
    radius = _line(60, 0.2, 1.0)
    return torch.cat([_polar(radius, 2 * math.pi * k / 5 + 0.9 * radius.log()) for k in range(5)])


def _rings() -> Tensor:
    return torch.cat([_polar(radius, _circle(320)) for radius in (1 / 3, 2 / 3, 1.0)])


def _spirals() -> Tensor:
    angle = 3 * math.pi * _line(400).sqrt()
    arm = _polar(angle / (3 * math.pi), angle)
    return torch.cat([arm, -arm])


_CENTRES: dict[str, Callable[[], Tensor]] = {
    "two_modes": _two_modes,
    "ring": _ring,
    "grid": _grid,
    "moons": _moons,
    "swiss_roll": _swiss_roll,
    "pinwheel": _pinwheel,
    "rings": _rings,
    "spirals": _spirals,
}

TARGETS = (*_CENTRES, "checkerboard")
"""Names that ``target`` knows."""

LABELLED = ("labelled_ring",)
"""Targets with labels, which it knows, too."""


def target(name: str, *, dtype: torch.dtype = torch.float32) -> Distribution:
    """A 2-D target by name (see ``TARGETS`` and ``LABELLED``); ValueError with the nearest name for another."""
    if name == "labelled_ring":
        # modes that lie opposite share a label
        pairs = _ring().to(dtype).reshape(2, 4, 2).unbind(1)
        inside = torch.tensor([0.7, 0.3], dtype=dtype)
        parts = [GaussianMixture(pair, STD[name], inside) for pair in pairs]
        return Labelled(parts, torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=dtype))
    if name == "checkerboard":
        return Checkerboard(dtype=dtype)
    if name not in _CENTRES:
        raise ValueError(f"unknown target {name!r}; {nearest_name(name, (*TARGETS, *LABELLED))}")
    weights = torch.tensor([0.8, 0.2], dtype=dtype) if name == "two_modes" else None
    return GaussianMixture(_CENTRES[name]().to(dtype), STD[name], weights)
