"""Codecs: what stands between the data and the space that a model lives in.

Training and scores live in codes, z = encode(x0); whatever shows, writes or evaluates samples decodes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from scorelab.typing import Shape, Tensor

__all__ = ["CODECS", "Codec", "Standardise"]


class Codec(nn.Module):
    """Base of codecs: ``encode`` and ``decode`` take batches, and are identities here.

    A codec is not trained with the model, and is saved with it. ``fingerprint`` tells those that were trained apart.
    """

    fingerprint: str = ""

    log_scale: float | None = 0.0
    """log |det dx/dz|: what a log-density of codes exceeds that of the data by; None where it is not one number."""

    def fit(self, x0: Tensor) -> None:
        """Adapt to data (N, *D), once, before a model is made."""

    def encode(self, x0: Tensor) -> Tensor:
        """Codes of data (B, *D); of a codec that draws them, their means."""
        return x0

    def moments(self, x0: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation of the normal distributions that training draws codes of data (B, *D) from; no deviation
        for a codec that draws nothing."""
        return self.encode(x0), None

    def decode(self, z: Tensor) -> Tensor:
        """Data (B, *D) of codes."""
        return z


class Standardise(Codec):
    """Codes of mean 0 and standard deviation 1 in every channel (or dimension): for numbers of any unit and offset.

    A channel that is constant is 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, data_shape: Shape) -> None:
        super().__init__()
        shape = (1, data_shape[0], *(1,) * (len(data_shape) - 1))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))
        self.config = {"data_shape": tuple(data_shape)}

    @property
    def log_scale(self) -> float:  # type: ignore[override]
        """The sum of the logarithms of all deviations."""
        shape = self.config["data_shape"]
        return float(self.std.double().log().sum()) * math.prod(shape[1:])

    def fit(self, x0: Tensor) -> None:
        channels = x0.double().transpose(0, 1).flatten(1)
        mean, std = channels.mean(1), channels.std(1)
        # of constant channels only rounding is left
        std = torch.where(std > 1e-6 * mean.abs(), std, torch.ones_like(std))
        self.mean.copy_(mean.reshape(self.mean.shape))
        self.std.copy_(std.reshape(self.std.shape))

    def encode(self, x0: Tensor) -> Tensor:
        return (x0 - self.mean.to(x0)) / self.std.to(x0)

    def decode(self, z: Tensor) -> Tensor:
        return z * self.std.to(z) + self.mean.to(z)


def fitting(data_shape: Shape, scaled: bool) -> Codec:
    """Nothing for data that is ``scaled`` already, as images are and exact targets; else ``Standardise``."""
    return Codec() if scaled else Standardise(data_shape)


CODECS: dict[str, Callable[..., Codec]] = {"auto": fitting, "identity": Codec, "standardise": Standardise}
"""Codecs by the names that configs have for them."""
