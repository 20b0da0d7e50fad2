"""DDPM's U-Net: residual blocks with group norm, self-attention where asked, one width per resolution.

It takes data of any shape (C, L), (C, H, W) or (C, D, H, W), odd sizes included: going down halves a size rounding up,
and going up returns to the size that was left.

Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv:2006.11239.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from scorelab.nn.classes import Classes, Conditional
from scorelab.nn.dropout import Dropout
from scorelab.nn.embedding import FourierEmbedding, PositionalEmbedding
from scorelab.typing import Tensor

__all__ = ["UNet"]

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


def _norm(channels: int) -> nn.GroupNorm:
    groups = max(g for g in range(1, 33) if channels % g == 0 and channels // g >= min(4, channels))
    return nn.GroupNorm(groups, channels)


def grown(x: Tensor, size: tuple[int, ...], conv: Any) -> Tensor:
    """A convolution (kernel 3, padding 1) of x (B, C, *sizes) enlarged to ``size`` by its nearest neighbours.

    Enlarging to twice the size and then convolving is one transposed convolution of stride 2, whose kernel of 4 is the
    kernel of 3 convolved with (1, 1): in the plane 2.25 times fewer operations, and no enlarged x in memory.
    """
    rank = x.ndim - 2
    if any(n != 2 * m for n, m in zip(size, x.shape[2:], strict=True)):
        found: Tensor = conv(functional.interpolate(x, size=size))
        return found
    kernel: Tensor = conv.weight
    for dim in range(2, 2 + rank):
        zero = torch.zeros_like(kernel.narrow(dim, 0, 1))
        kernel = torch.cat([kernel, zero], dim) + torch.cat([zero, kernel], dim)
    kernel = kernel.flip(tuple(range(2, 2 + rank))).transpose(0, 1)
    made: Tensor = _TRANSPOSED[rank](x, kernel, conv.bias, stride=2, padding=1)
    return made


class _Block(nn.Module):
    """Residual block: norm, SiLU, conv, plus the embedding, norm, SiLU, dropout, conv."""

    def __init__(self, rank: int, channels: int, out: int, embedding: int, dropout: float) -> None:
        super().__init__()
        conv = _CONV[rank]
        self.norm1, self.conv1 = _norm(channels), conv(channels, out, 3, padding=1)
        self.embed = nn.Linear(embedding, out)
        self.norm2, self.dropout, self.conv2 = _norm(out), Dropout(dropout), conv(out, out, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        self.skip = conv(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        h = h + self.embed(embedding).reshape(len(x), -1, *(1,) * (x.ndim - 2))
        out: Tensor = self.skip(x) + self.conv2(self.dropout(functional.silu(self.norm2(h))))
        return out


class _Attention(nn.Module):
    """Self-attention over all positions, with heads of ``head`` channels."""

    def __init__(self, channels: int, head: int) -> None:
        super().__init__()
        self.heads = max(1, channels // head)
        self.norm = _norm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).reshape(b, -1, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, -1, c)
        out: Tensor = x + self.out(mixed).transpose(1, 2).reshape(x.shape)
        return out


class _Stage(nn.Module):
    """A residual block and, where asked, attention."""

    def __init__(self, block: _Block, attention: _Attention | None) -> None:
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h: Tensor = self.block(x, embedding)
        return h if self.attention is None else self.attention(h)


def _check(
    data_shape: tuple[int, ...],
    width: int,
    multipliers: tuple[int, ...],
    blocks: int,
    attention: tuple[int, ...],
    head: int,
    dropout: float,
    embedding: str,
) -> None:
    """Refuse (ValueError) settings of a UNet that don't fit."""
    if len(data_shape) - 1 not in _CONV or min(data_shape) < 1:
        raise ValueError(
            f"data_shape is {data_shape}; expected (C, L), (C, H, W) or (C, D, H, W): points need MLP "
            "(model.net.name='mlp')"
        )
    if embedding not in ("fourier", "positional"):
        raise ValueError(f"embedding is {embedding!r}; expected 'fourier' or 'positional'")
    if width < 2 or width % 2 or min(blocks, head, *multipliers) < 1 or not multipliers:
        raise ValueError(
            f"width = {width}, blocks = {blocks}, head = {head}, multipliers = {multipliers}; expected an even width, "
            "some multipliers, and all of them 1 or more"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout:g}; expected 0 <= dropout < 1")
    if any(a not in range(len(multipliers)) for a in attention):
        raise ValueError(f"attention is {attention}; expected resolutions from 0 to {len(multipliers) - 1}")
    if any(width * m % head and width * m > head for i, m in enumerate(multipliers) if i in attention):
        raise ValueError(f"head = {head} does not divide the attention widths; expected a divisor of {width}")


class UNet(Conditional):
    """net(x, label, condition=None) -> F like x (B, C, *sizes); label (B,) float, condition (B,) class indices.

    data_shape: (C, *sizes) with one to three sizes. width: channels at full resolution; multipliers: one each.
    attention: which resolutions (0 is full) have self-attention. embedding: "fourier" (None) for log sigma,
    "positional" for step indices. num_classes: condition on class labels; null_class: and on none.

    Raises ValueError for settings that don't fit.
    """

    def __init__(
        self,
        data_shape: tuple[int, ...],
        *,
        width: int = 64,
        multipliers: tuple[int, ...] = (1, 2),
        blocks: int = 2,
        attention: tuple[int, ...] = (),
        head: int = 64,
        dropout: float = 0.0,
        embedding: str | None = None,
        num_classes: int | None = None,
        null_class: bool = False,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "data_shape": tuple(data_shape),
            "width": width,
            "multipliers": tuple(multipliers),
            "blocks": blocks,
            "attention": tuple(attention),
            "head": head,
            "dropout": dropout,
            "embedding": embedding or "fourier",
        }
        _check(**self.config)
        self.config |= {"num_classes": num_classes, "null_class": null_class}
        rank, channels = len(data_shape) - 1, data_shape[0]
        conv = _CONV[rank]
        inner = 4 * width
        encode = PositionalEmbedding(width) if embedding == "positional" else FourierEmbedding(width)
        self.embed = nn.Sequential(encode, nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, inner))
        self.classes = None if num_classes is None else Classes(num_classes, inner, null_class)
        self.first = conv(channels, width, 3, padding=1)

        def stage(at: int, into: int, out: int) -> _Stage:
            return _Stage(_Block(rank, into, out, inner, dropout), _Attention(out, head) if at in attention else None)

        self.down, self.shrink, self.up, self.grow = (nn.ModuleList() for _ in range(4))
        now, kept = width, [width]
        for i, m in enumerate(multipliers):
            for _ in range(blocks):
                self.down.append(stage(i, now, width * m))
                now = width * m
                kept.append(now)
            if i < len(multipliers) - 1:
                self.shrink.append(conv(now, now, 3, stride=2, padding=1))
                kept.append(now)
        deepest = len(multipliers) - 1
        self.middle = nn.ModuleList([stage(deepest, now, now), stage(-1, now, now)])
        for i, m in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                self.up.append(stage(i, now + kept.pop(), width * m))
                now = width * m
            if i:
                self.grow.append(conv(now, now, 3, padding=1))
        self.norm, self.last = _norm(now), conv(now, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        self.blocks = blocks
        self.activation_checkpointing = False

    def _run(self, stage: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        """A stage; with ``activation_checkpointing`` its activations are computed again in the backward pass."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            found: Tensor = checkpoint(stage, h, embedding, use_reentrant=False)
            return found
        return stage(h, embedding)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        embedding = self.embed[1:](self.embed[0](label if label.is_floating_point() else label.float()).to(x.dtype))
        if condition is not None:
            embedding = embedding + self.embedded(condition).to(x.dtype)
        embedding = functional.silu(embedding)
        h = self.first(x)
        kept = [h]
        for i, stage in enumerate(self.down):
            h = self._run(stage, h, embedding)
            kept.append(h)
            if (i + 1) % self.blocks == 0 and (i + 1) // self.blocks <= len(self.shrink):
                h = self.shrink[i // self.blocks](h)
                kept.append(h)
        for stage in self.middle:
            h = self._run(stage, h, embedding)
        for i, stage in enumerate(self.up):
            h = self._run(stage, torch.cat([h, kept.pop()], 1), embedding)
            if (i + 1) % (self.blocks + 1) == 0 and kept:
                h = grown(h, tuple(kept[-1].shape[2:]), self.grow[i // (self.blocks + 1)])
        out: Tensor = self.last(functional.silu(self.norm(h)))
        return out
