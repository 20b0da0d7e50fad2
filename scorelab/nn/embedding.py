"""Embeddings of a noise label: sines and cosines of it at fixed frequencies."""

from __future__ import annotations

import math

import torch
from torch import nn

from scorelab.checks import widened
from scorelab.typing import Tensor

__all__ = ["FourierEmbedding", "GaussianEmbedding", "PositionalEmbedding"]


class FourierEmbedding(nn.Module):
    """cos and sin of a label (log sigma) at ``width``/2 frequencies from ``low`` to ``high``.

    (B,) -> (B, width), in float32 at least.
    """

    frequencies: Tensor

    def __init__(self, width: int, low: float = 0.25, high: float = 4.0) -> None:
        super().__init__()
        self.ends, self.count, self.width = (math.log(low), math.log(high)), width // 2, width // 2 * 2
        self.register_buffer("frequencies", self._spread(torch.device("cpu")), persistent=False)

    def _spread(self, device: torch.device) -> Tensor:
        return torch.linspace(*self.ends, self.count, device=device).exp()

    def forward(self, label: Tensor) -> Tensor:
        label, frequencies = widened(label), self.frequencies
        if frequencies.dtype != label.dtype:
            # a model in half precision has rounded them: an error of several radians for large labels
            frequencies = self._spread(label.device).to(label.dtype)
        angle = label.unsqueeze(1) * frequencies
        return torch.cat([angle.cos(), angle.sin()], 1)


class PositionalEmbedding(FourierEmbedding):
    """DDPM's embedding of a step index: frequencies from 1 down to 1/10000, Ho et al., 2020, arXiv:2006.11239; without
    ``closed`` the last is the one before that, as in ADM."""

    def __init__(self, width: int, closed: bool = True) -> None:
        count = width // 2
        super().__init__(width, 1.0, 1e-4 if closed else 1e-4 ** ((count - 1) / count))


class GaussianEmbedding(nn.Module):
    """cos and sin of a label (log sigma) at ``width``/2 random frequencies, 2 pi ``scale`` times normal numbers.

    (B,) -> (B, width), in float32 at least. Song et al., 2021, arXiv:2011.13456.
    """

    frequencies: Tensor

    def __init__(self, width: int, scale: float = 16.0) -> None:
        super().__init__()
        self.width = width // 2 * 2
        self.register_buffer("frequencies", scale * torch.randn(width // 2))

    def forward(self, label: Tensor) -> Tensor:
        label = widened(label)
        # large angles: rounded in the order in which the release rounds them
        angle = label.unsqueeze(1) * self.frequencies.to(label.dtype) * (2 * math.pi)
        return torch.cat([angle.cos(), angle.sin()], 1)
