"""Codecs: what stands between the data and the space that a model lives in.

Training and scores live in codes, z = encode(x0); whatever shows, writes or evaluates samples decodes them.
"""

from __future__ import annotations

import torch
from torch import nn

from scorelab.typing import Shape, Tensor

__all__ = ["CODECS", "Codec", "Standardise"]


class Codec(nn.Module):
    """Base of codecs: ``encode`` and ``decode`` take batches, and are identities here.

    ``stochastic``: encode draws from its generator; then a batch is always encoded whole, so that several processes see
    the same codes. A codec is not trained with the model, and is saved with it.
    """

    stochastic: bool = False

    def fit(self, x0: Tensor) -> None:
        """Adapt to data (N, *D), once, before a model is made."""

    def encode(self, x0: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Codes of data (B, *D)."""
        return x0

    def decode(self, z: Tensor) -> Tensor:
        """Data (B, *D) of codes."""
        return z


class Standardise(Codec):
    """Codes of mean 0 and standard deviation 1 in every channel (or dimension): for numbers of any unit and offset."""

    mean: Tensor
    std: Tensor

    def __init__(self, data_shape: Shape) -> None:
        super().__init__()
        shape = (1, data_shape[0], *(1,) * (len(data_shape) - 1))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))
        self.config = {"data_shape": tuple(data_shape)}

    def fit(self, x0: Tensor) -> None:
        channels = x0.double().transpose(0, 1).flatten(1)
        std = channels.std(1)
        if not bool((std > 0).all()):
            raise ValueError(
                f"channel {int((std == 0).nonzero()[0])} of the data is constant, so it has no standard deviation to "
                "divide by; expected data that varies in all: leave that channel out"
            )
        self.mean.copy_(channels.mean(1).reshape(self.mean.shape))
        self.std.copy_(std.reshape(self.std.shape))

    def encode(self, x0: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return (x0 - self.mean.to(x0)) / self.std.to(x0)

    def decode(self, z: Tensor) -> Tensor:
        return z * self.std.to(z) + self.mean.to(z)


CODECS: dict[str, type[Codec]] = {"identity": Codec, "standardise": Standardise}
"""Codecs by the names that configs have for them."""
