"""ADM's classifier of noisy images: the way down of its U-Net, and attention that pools.

Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021, arXiv:2105.05233, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from scorelab.nn.layers import given
from scorelab.nn.unet import ADM, UNet
from scorelab.typing import Tensor

__all__ = ["Classifier"]


class AttentionPool(nn.Module):
    """(B, C, *sizes) -> (B, out): what a query at the mean of all positions attends to, each with a learned place.

    Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021, arXiv:2103.00020.
    """

    def __init__(self, channels: int, sizes: tuple[int, ...], head: int, out: int) -> None:
        super().__init__()
        self.heads = max(1, channels // head)
        self.positions = nn.Parameter(torch.randn(1 + math.prod(sizes), channels) / channels**0.5)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, out)

    def forward(self, h: Tensor) -> Tensor:
        tokens = h.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + self.positions
        b, n, c = tokens.shape
        q, k, v = self.qkv(tokens).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        # of the mean alone
        mixed = functional.scaled_dot_product_attention(q[:, :, :1], k, v)
        found: Tensor = self.out(mixed.reshape(b, c))
        return found


class Classifier(UNet):
    """net(x, label) -> logits (B, num_classes) of x (B, C, *sizes); label (B,), steps as ADM's network is told.

    The settings are those of ``UNet``; published are blocks=2, at 64 px 4, with attention at sizes 32, 16 and 8. Raises
    ValueError for settings that don't fit, and for sizes that its resolutions don't divide.
    """

    classifies: ClassVar[bool] = True

    def __init__(
        self,
        data_shape: tuple[int, ...],
        num_classes: int,
        *,
        width: int = 128,
        multipliers: tuple[float, ...] = (1, 2, 3, 4),
        blocks: int = 4,
        attention: tuple[int, ...] = (1, 2, 3),
        head: int = 64,
        dropout: float = 0.0,
        embedding: str = "positional_open",
    ) -> None:
        made_with = given(locals())
        super().__init__(
            data_shape,
            width=width,
            multipliers=multipliers,
            blocks=blocks,
            attention=attention,
            head=head,
            dropout=dropout,
            group=1,
            first=multipliers[0] if multipliers else 1,
            **{**ADM, "embedding": embedding},
        )
        # its config is that of the U-Net
        self.made_with, self._count = made_with, num_classes
        last = int(width * multipliers[-1])
        if num_classes < 1 or head < 1 or (last % head and last > head):
            raise ValueError(
                f"num_classes is {num_classes}, head is {head}; expected at least 1 of each, and a divisor of {last}"
            )
        channels, sizes = last, tuple(n >> (len(multipliers) - 1) for n in data_shape[1:])
        self.norm, self.pool = self.style.norm(channels), AttentionPool(channels, sizes, head, num_classes)

    @property
    def num_classes(self) -> int:
        """How many classes it tells apart."""
        return self._count

    def _build_up(self, now: int, kept: list[int], stage: Callable[..., nn.Module]) -> None:
        """Nothing goes up."""

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        if x.shape[1:] != self.config["data_shape"]:
            raise ValueError(f"x is {tuple(x.shape)}; expected (B, {', '.join(map(str, self.config['data_shape']))})")
        h, _ = self._descended(x, self._embedded(x, label, condition))
        logits: Tensor = self.pool(functional.silu(self.norm(h)))
        return logits
