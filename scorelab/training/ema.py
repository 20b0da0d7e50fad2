"""Averages of weights along training: exponential ones, and EDM2's power functions, which can be changed afterwards.

Exponential: the decay is warmed up, min(decay, (1 + n)/(10 + n)) at update n. Without that the random start would weigh
decay^n in the average: 14 % after 20,000 steps at 0.9999.

Power function: the average after t updates weighs update tau by (gamma + 1) tau^gamma / t^(gamma + 1), so its width is
a fixed share of the run, named by its standard deviation relative to t: 0.05 is narrow, 0.1 usual, 0.2 wide. Averages
of other widths are linear combinations of stored ones (``reconstruct``).

Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, 2024, arXiv:2312.02696, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from scorelab.saved import Model
from scorelab.training.sharding import full_state, like
from scorelab.typing import Tensor

__all__ = ["EMA", "Snapshot", "averages_of", "power_exponent", "reconstruct"]


def power_exponent(relative_std: float) -> float:
    """gamma of the power function of standard deviation ``relative_std``; ValueError outside (0, 0.28].

    std^2 = (gamma + 1)/((gamma + 2)^2 (gamma + 3)), which falls with gamma from 1/12 at gamma = 0.
    """
    if not 0 < relative_std <= 0.28:
        raise ValueError(f"the relative width of an average is {relative_std:g}; expected 0 < width <= 0.28, e.g. 0.1")
    inverse = relative_std**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class EMA:
    """One average of a module's parameters: exponential with ``decay``, or a power function of ``relative_std``.

    ``name`` tells averages apart; ``count`` updates so far, ``initial_share`` of the start left in it.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], decay: float = 0.0, *, relative_std: float | None = None
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"an EMA decay (optim.ema) is {decay:g}; expected 0 <= decay < 1 (0 follows the weights)")
        self.parameters = list(parameters)
        self.average = [p.detach().clone() for p in self.parameters]
        self.decay, self.count, self.initial_share = decay, 0, 1.0
        self.exponent = None if relative_std is None else power_exponent(relative_std)
        self.name = f"ema_{decay:g}" if relative_std is None else f"ema_power_{relative_std:g}"

    def update(self) -> None:
        """Move the average towards the parameters as they are now."""
        n = self.count
        decay = min(self.decay, (1 + n) / (10 + n)) if self.exponent is None else (n / (n + 1)) ** (self.exponent + 1)
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        self.count += 1
        self.initial_share *= decay

    def weights(self, model: Model) -> dict[str, Tensor]:
        """The model's weights with averages in place of its parameters; the model itself is not touched.

        Of parameters spread over processes the averages are whole, and all processes must call.
        """
        state = {k: v.detach().clone() for k, v in model.weights().items()}
        for name, average in self._named(model):
            state[name] = average.clone()
        return full_state(state)

    def load(self, model: Model, state: dict[str, Tensor]) -> None:
        """Take the averages from weights of the model."""
        for name, average in self._named(model):
            average.copy_(like(state[name], average))

    def _named(self, model: Model) -> Iterator[tuple[str, Tensor]]:
        """Every name of a parameter in the model, of a shared one all, and its average."""
        averages = {id(p): a for p, a in zip(self.parameters, self.average, strict=True)}
        for name, parameter in model.named_weights():
            yield name, averages[id(parameter)]


def averages_of(parameters: list[nn.Parameter], decays: Sequence[float], widths: Sequence[float]) -> list[EMA]:
    """One average for every decay, then one for every relative width; ValueError where two are the same or none is."""
    found = [EMA(parameters, d) for d in decays] + [EMA(parameters, relative_std=w) for w in widths]
    names = [a.name for a in found]
    if not decays or len(set(names)) < len(names):
        raise ValueError(
            f"the averages are {', '.join(names) or 'none'}; expected a decay in optim.ema at least, all different"
        )
    return found


class Snapshot(NamedTuple):
    """A stored power-function average: updates behind it, its relative standard deviation, and its weights."""

    updates: int
    relative_std: float
    weights: dict[str, Tensor]


def _products(t: np.ndarray, g: np.ndarray, t_other: np.ndarray, g_other: np.ndarray) -> np.ndarray:
    """Integrals of products of power functions, (n, m)."""
    a, b, ga, gb = t[:, None], t_other[None], g[:, None], g_other[None]
    # the shorter function ends first: (shorter/longer)^(exponent of the longer)
    ratio = np.where(a < b, (a / b) ** gb, (b / a) ** ga)
    return np.asarray((ga + 1) * (gb + 1) / (ga + gb + 1) * ratio / np.maximum(a, b))


def reconstruct(
    snapshots: Sequence[Snapshot], relative_std: float, count: int | None = None
) -> tuple[dict[str, Tensor], float]:
    """The average of another width after ``count`` updates (by default those of the last stored), from stored ones.

    Also the relative error of its weighting: the L2 distance of the fitted function of time to the wanted one over the
    norm of that. Least squares over all stored functions, with shares that sum to 1. Raises ValueError without any.
    """
    if not snapshots:
        raise ValueError("there are no stored power-function averages; set optim.ema_power and training.keep_every")
    order = sorted(snapshots, key=lambda s: s.updates)
    t = np.array([float(s.updates) for s in order])
    g = np.array([power_exponent(s.relative_std) for s in order])
    at, wanted = np.array([t[-1] if count is None else float(count)]), np.array([power_exponent(relative_std)])
    between, cross = _products(t, g, t, g), _products(t, g, at, wanted)
    # as in the paper, but shares that sum to 1 (Lagrange's conditions): networks do not ignore their weights' scale
    scale, ones = float(np.abs(between).max()), np.ones((len(t), 1))
    rows = np.block([[between / scale, ones], [ones.T, np.zeros((1, 1))]])
    share = np.linalg.lstsq(rows, np.vstack([cross / scale, [[1.0]]]), rcond=1e-14)[0][:-1]
    norm = float(_products(at, wanted, at, wanted)[0, 0])
    error = max(0.0, float((share.T @ between @ share - 2 * share.T @ cross)[0, 0]) + norm)
    found: dict[str, Tensor] = {}
    for name, last in order[-1].weights.items():
        total = torch.zeros_like(last, dtype=torch.float64)
        for snapshot, weight in zip(order, share[:, 0].tolist(), strict=True):
            total += weight * snapshot.weights[name].double()
        found[name] = total.to(last.dtype)
    return found, (error / norm) ** 0.5
