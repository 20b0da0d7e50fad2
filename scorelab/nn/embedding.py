"""Embeddings of a noise label: sines and cosines of it at fixed frequencies."""

from __future__ import annotations

import math

import torch
from torch import nn

from scorelab.checks import widened
from scorelab.typing import Tensor

__all__ = ["FourierEmbedding", "PositionalEmbedding"]


class FourierEmbedding(nn.Module):
    """cos and sin of a label (log sigma) at ``width``/2 frequencies from ``low`` to ``high``.

    (B,) -> (B, width), in float32 at least.
    """

    frequencies: Tensor

    def __init__(self, width: int, low: float = 0.25, high: float = 4.0) -> None:
        super().__init__()
        self.ends, self.count = (math.log(low), math.log(high)), width // 2
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
    """DDPM's embedding of a step index: frequencies from 1 down to 1/10000; Ho et al., 2020, arXiv:2006.11239."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1.0, 1e-4)
