"""VDM's process, whose schedule is learned: alpha^2 = sigmoid(-gamma), std^2 = sigmoid(gamma), sigma = e^(gamma/2).

    gamma(t) = gamma_0 + (gamma_1 - gamma_0) r(t),     r rises from r(0) = 0 to r(1) = 1

Kingma, Salimans, Poole and Ho, Variational Diffusion Models, 2021, arXiv:2107.00630, whose network does not keep its
end points: here r is one of sigmoids with positive weights, normalised to them.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from scorelab.processes.base import Process
from scorelab.typing import Tensor

__all__ = ["Learned"]

_REACH, _PLACES = 36.0, 41
"""How far a sigmoid is followed, beyond which it is constant in double precision, and at how many places."""


class Learned(nn.Module, Process):
    """The process of gamma from ``gamma_min`` to ``gamma_max``, between which training begins near a straight line.

    ends: whether the two are learned. hidden: how many sigmoids r is made of; 0: r(t) = t, which is not learned.
    Raises ValueError for ends that do not ascend.
    """

    t_min, t_max = 0.0, 1.0

    def __init__(self, gamma_min: float = -13.3, gamma_max: float = 5.0, hidden: int = 32, ends: bool = True) -> None:
        super().__init__()
        if not (-80 < gamma_min < gamma_max < 80 and hidden >= 0):
            raise ValueError(
                f"gamma_min = {gamma_min:g}, gamma_max = {gamma_max:g}, hidden = {hidden}; expected -80 < gamma_min < "
                "gamma_max < 80, logarithms of sigma^2, and hidden >= 0"
            )
        self.config = {"gamma_min": gamma_min, "gamma_max": gamma_max, "hidden": hidden, "ends": ends}
        self.low = nn.Parameter(torch.tensor(float(gamma_min)), requires_grad=ends)
        # the logarithm of the distance: the ends never cross
        self.log_span = nn.Parameter(torch.tensor(math.log(gamma_max - gamma_min)), requires_grad=ends)
        # sigmoids of slope 8 from 0 to 1, whose weights are softplus of these
        self.centres = nn.Parameter(torch.linspace(0.0, 1.0, hidden)) if hidden else None
        self.slopes = nn.Parameter(torch.full((hidden,), 8.0)) if hidden else None
        self.weights = nn.Parameter(torch.full((hidden,), -4.0)) if hidden else None

    def __hash__(self) -> int:
        return id(self)

    @property
    def t_sample(self) -> float:
        """0: sampling ends where the bound does."""
        return 0.0

    def rise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """r(t) and its derivative, like t."""
        if self.centres is None or self.slopes is None or self.weights is None:
            return t, torch.ones_like(t)
        c, w = self.centres.to(t), functional.softplus(self.weights.to(t))
        k = functional.softplus(self.slopes.to(t))
        ends = torch.sigmoid(k * (torch.tensor([[0.0], [1.0]], dtype=t.dtype, device=t.device) - c))
        inside = torch.sigmoid(k * (t.unsqueeze(-1) - c))
        whole = 1 + (w * (ends[1] - ends[0])).sum()
        risen = t + (w * (inside - ends[0])).sum(-1)
        slope = 1 + (w * k * inside * (1 - inside)).sum(-1)
        return risen / whole, slope / whole

    def ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """gamma_0 and gamma_1 - gamma_0, in the dtype and on the device of a tensor."""
        return self.low.to(like), self.log_span.to(like).exp()

    def gamma(self, t: Tensor) -> Tensor:
        """log sigma^2 at time t."""
        low, span = self.ends(t)
        return low + span * self.rise(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return torch.exp(0.5 * self.gamma(t))

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-self.gamma(t)).sqrt()

    def std(self, t: Tensor) -> Tensor:
        return torch.sigmoid(self.gamma(t)).sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        wanted = 2 * sigma.log()
        with torch.no_grad():
            low, span = self.ends(wanted)
            share = ((wanted - low) / span).clamp(0, 1)
            t = share if self.centres is None else self._placed(share)
        if not torch.is_grad_enabled():
            return t
        # its derivatives are those of the inverse function
        (low, span), (risen, slope) = self.ends(wanted), self.rise(t)
        return t + ((wanted - low) / span - risen) / slope.detach()

    def _placed(self, share: Tensor) -> Tensor:
        """Where r is ``share``: between places of a table, by Newton's method.

        The places are those of each sigmoid's bend, however steep it is, so that r is smooth between two of them.
        """
        assert self.centres is not None
        assert self.slopes is not None
        steps = torch.linspace(-_REACH, _REACH, _PLACES, dtype=share.dtype, device=share.device).unsqueeze(1)
        bends = self.centres.to(share) + steps / functional.softplus(self.slopes.to(share))
        places = torch.cat([steps.new_tensor([0.0, 1.0]), bends.flatten().clamp(0, 1)]).sort().values
        table = self.rise(places)[0]
        right = torch.searchsorted(table, share.contiguous(), right=True).clamp(1, len(places) - 1)
        low, high, below = places[right - 1], places[right], table[right - 1]
        t = low + (high - low) * (share - below) / (table[right] - below).clamp_min(torch.finfo(share.dtype).tiny)
        for _ in range(5):
            t = torch.minimum(torch.maximum(t, low), high)
            risen, slope = self.rise(t)
            t = t + (share - risen) / slope
        return torch.minimum(torch.maximum(t, low), high)

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * self._beta(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return self._beta(t).sqrt()

    def _beta(self, t: Tensor) -> Tensor:
        low, span = self.ends(t)
        risen, slope = self.rise(t)
        return torch.sigmoid(low + span * risen) * span * slope
