"""What U-Nets are made of: group norm, a residual block, self-attention, and changes of resolution.

For one, two and three dimensions alike. FIR resampling is a depthwise convolution: the outer product of a kernel k with
itself, of sum 1, before every second value is taken, or after zeros are put between them (then of sum 2^dimensions).
Zhang, Making Convolutional Networks Shift-Invariant Again, 2019, arXiv:1904.11486.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from scorelab.nn.dropout import Dropout
from scorelab.typing import Tensor

__all__ = ["CONV", "Attention", "Resampled", "Residual", "Style", "given", "group_norm", "grown", "halved", "resampled"]

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
_PLAIN = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_POOLED = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


@dataclass(frozen=True)
class Style:
    """What all blocks of a network share.

    embedding: its width, 0 for none. adaptive: time scales and shifts after the second norm, (1 + a) h + b, else it is
    added before it. rescaled: sums of two branches are divided by sqrt(2). group: the least channels in a group of the
    norms, of which there are 32 at most; eps: theirs. fir: the kernel of resampling; () pools and repeats. project: a
    block that resamples has a convolution in its skip also where the channels stay. code: the width of what comes
    behind the embedding, which scales after it, times (1 + c).
    """

    rank: int
    embedding: int
    dropout: float = 0.0
    adaptive: bool = False
    rescaled: bool = False
    group: int = 4
    eps: float = 1e-5
    fir: tuple[float, ...] = ()
    project: bool = False
    code: int = 0

    def conv(self, channels: int, out: int, kernel: int = 3) -> Any:
        """A convolution that keeps the size."""
        return CONV[self.rank](channels, out, kernel, padding=kernel // 2)

    def norm(self, channels: int) -> nn.GroupNorm:
        """A group norm."""
        return group_norm(channels, self.group, self.eps)

    def sum(self, x: Tensor, y: Tensor) -> Tensor:
        """Of two branches."""
        return (x + y) * 0.5**0.5 if self.rescaled else x + y


def given(scope: dict[str, Any]) -> dict[str, Any]:
    """What a constructor was called with, of its ``locals()``, as a network's ``config`` holds it."""
    known = {k: v for k, v in scope.items() if k not in ("self", "__class__")}
    return {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in known.items()}


def group_norm(channels: int, least: int = 4, eps: float = 1e-5) -> nn.GroupNorm:
    """As many groups as divide the channels, 32 at most, of ``least`` channels each or more where there are so many."""
    groups = max(g for g in range(1, 33) if channels % g == 0 and channels // g >= min(least, channels))
    return nn.GroupNorm(groups, channels, eps)


def _kernel(taps: tuple[float, ...], x: Tensor, gain: float = 1.0) -> Tensor:
    """The outer product of the taps, of sum ``gain``, for each of x's channels."""
    one = torch.tensor(taps, dtype=torch.float64)
    one = one / one.sum()
    found = one
    for _ in range(x.ndim - 3):
        found = found.unsqueeze(-1) * one
    return (gain * found).to(x).expand(x.shape[1], 1, *found.shape).contiguous()


def resampled(x: Tensor, up: bool, taps: tuple[float, ...] = ()) -> Tensor:
    """x (B, C, *sizes) at twice or half its sizes: by its nearest neighbours and averages, or by a FIR filter."""
    rank = x.ndim - 2
    if not taps:
        found: Tensor = functional.interpolate(x, scale_factor=2.0) if up else _POOLED[rank](x, 2)
        return found
    pad = (len(taps) - 1) // 2
    if up:
        return _TRANSPOSED[rank](x, _kernel(taps, x, 2.0**rank), stride=2, padding=pad, groups=x.shape[1])
    return _PLAIN[rank](x, _kernel(taps, x), stride=2, padding=pad, groups=x.shape[1])


def halved(x: Tensor, conv: Any, taps: tuple[float, ...]) -> Tensor:
    """A convolution (kernel 3) of x that takes every second value, after a FIR filter.

    Without taps the place of the kernel is that of TensorFlow's padding "same": one zero behind, none before.
    """
    rank = x.ndim - 2
    if taps:
        pad = (len(taps) - 2) // 2 + 1
        x = _PLAIN[rank](x, _kernel(taps, x), padding=pad, groups=x.shape[1])
    else:
        x = functional.pad(x, (0, 1) * rank)
    return _PLAIN[rank](x, conv.weight, conv.bias, stride=2)


def grown(x: Tensor, size: tuple[int, ...], conv: Any, taps: tuple[float, ...] = ()) -> Tensor:
    """A convolution (kernel 3, padding 1) of x (B, C, *sizes) enlarged to ``size``, by its nearest neighbours or a FIR
    filter.

    Enlarging to twice the size and then convolving is one transposed convolution of stride 2, whose kernel of 4 is the
    kernel of 3 convolved with (1, 1): in the plane 2.25 times fewer operations, and no enlarged x in memory.
    """
    rank = x.ndim - 2
    if taps:
        # the filter comes after the convolution: where the kernel hangs over the edge that is not the same
        flat = conv.weight.flip(tuple(range(2, 2 + rank))).transpose(0, 1)
        wide = _TRANSPOSED[rank](x, flat, stride=2)
        kernel = _kernel(taps, wide, 2.0**rank)
        made: Tensor = _PLAIN[rank](wide, kernel, padding=len(taps) // 2 - 1, groups=wide.shape[1])
        made = made + conv.bias.reshape(-1, *(1,) * rank)
        return made
    if any(n != 2 * m for n, m in zip(size, x.shape[2:], strict=True)):
        found: Tensor = conv(functional.interpolate(x, size=size))
        return found
    kernel = conv.weight
    for dim in range(2, 2 + rank):
        zero = torch.zeros_like(kernel.narrow(dim, 0, 1))
        kernel = torch.cat([kernel, zero], dim) + torch.cat([zero, kernel], dim)
    kernel = kernel.flip(tuple(range(2, 2 + rank))).transpose(0, 1)
    doubled: Tensor = _TRANSPOSED[rank](x, kernel, conv.bias, stride=2, padding=1)
    return doubled


class Resampled(nn.Module):
    """A convolution at half or twice the size."""

    def __init__(self, style: Style, channels: int, out: int, up: bool) -> None:
        super().__init__()
        self.conv, self.up, self.fir = style.conv(channels, out), up, style.fir

    def forward(self, x: Tensor) -> Tensor:
        if not self.up:
            return halved(x, self.conv, self.fir)
        return grown(x, tuple(2 * n for n in x.shape[2:]), self.conv, self.fir)


class Residual(nn.Module):
    """norm, SiLU, conv, time, norm, SiLU, dropout, conv, and what comes in; ``up``: at twice the size, or at half."""

    def __init__(self, style: Style, channels: int, out: int, up: bool | None = None) -> None:
        super().__init__()
        self.style, self.up = style, up
        self.norm1, self.conv1 = style.norm(channels), style.conv(channels, out)
        self.embed = nn.Linear(style.embedding, (1 + style.adaptive) * out) if style.embedding else None
        self.scale = nn.Linear(style.code, out) if style.code else None
        self.norm2, self.dropout, self.conv2 = style.norm(out), Dropout(style.dropout), style.conv(out, out)
        nn.init.zeros_(self.conv2.weight)
        projected = channels != out or (up is not None and style.project)
        self.skip = style.conv(channels, out, 1) if projected else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h = functional.silu(self.norm1(x))
        if self.up is not None:
            h, x = resampled(h, self.up, self.style.fir), resampled(x, self.up, self.style.fir)
        h = self.conv1(h)
        if self.embed is None:
            h = self.norm2(h)
        else:
            assert embedding is not None
            time, code = embedding.tensor_split([self.style.embedding], 1)
            time = self.embed(time).reshape(x.shape[0], -1, *(1,) * (x.ndim - 2))
            if self.style.adaptive:
                scale, shift = time.chunk(2, 1)
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(h + time)
            if self.scale is not None:
                h = h * (1 + self.scale(code).reshape(x.shape[0], -1, *(1,) * (x.ndim - 2)))
        return self.style.sum(self.skip(x), self.conv2(self.dropout(functional.silu(h))))


class Attention(nn.Module):
    """Self-attention over all positions, with so many ``heads``, or as many as have ``head`` channels (0: one head)."""

    def __init__(self, style: Style, channels: int, head: int, heads: int = 0) -> None:
        super().__init__()
        self.style, self.heads = style, heads or (max(1, channels // head) if head else 1)
        self.norm = style.norm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).reshape(b, -1, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, -1, c)
        return self.style.sum(x, self.out(mixed).transpose(1, 2).reshape(x.shape))
