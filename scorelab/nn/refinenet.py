"""RefineNets, the networks of NCSN and NCSNv2: residual levels, the coarsest of them dilated, merged on the way back.

Level 0 has the full size and the next ones half of it each, but for the last two, which keep it and dilate their
convolutions by 2 and 4. On the way back each level takes what the coarser one has made, at its own size.

InstanceNorm++ gives back what instance normalisation takes away, the means mu of the channels: with m and v the mean
and unbiased variance of these over the channels,

    out = gamma (instance_norm(x) + alpha (mu - m)/sqrt(v + 1e-5)) + beta,

where NCSN has rows of gamma, alpha and beta for each noise level, in front of every convolution but the first, and
NCSNv2 one row, on the way down and at the end.

Song and Ermon, Generative Modeling by Estimating Gradients of the Data Distribution, 2019, arXiv:1907.05600; Improved
Techniques for Training Score-Based Generative Models, 2020, arXiv:2006.09011; Lin et al., RefineNet, 2017,
arXiv:1611.06612.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from scorelab.nn.layers import CONV
from scorelab.typing import Tensor

__all__ = ["InstanceNormPlus", "RefineNet"]

_MULTIPLIERS = {4: (1, 2, 2, 2), 5: (1, 2, 2, 4, 4), 6: (1, 2, 2, 2, 4, 4)}
_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}
_AVERAGE = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}
_MOST = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}


class InstanceNormPlus(nn.Module):
    """(x (B, C, *sizes), index (B,) or None) -> like x; ``levels`` rows of gamma, alpha, beta, 0: one, and no index."""

    def __init__(self, channels: int, levels: int = 0) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(max(1, levels), 3 * channels))
        nn.init.normal_(self.table[:, : 2 * channels], 1.0, 0.02)

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        rows = self.table if index is None else functional.embedding(index, self.table)
        # differences of means: in float32 at least
        means = x.mean(tuple(range(2, x.ndim)), dtype=torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(means, 1, keepdim=True)
        gamma, alpha, beta = rows.to(means.dtype).chunk(3, 1)
        shift = gamma * alpha * (means - mean) * torch.rsqrt(var + 1e-5) + beta
        h = functional.instance_norm(x).to(x.dtype)
        shift, gamma = (a.to(x.dtype).reshape(a.shape[0], -1, *(1,) * (x.ndim - 2)) for a in (shift, gamma))
        return torch.addcmul(shift, gamma, h)


class _Same(nn.Module):
    """No norm."""

    def forward(self, x: Tensor, index: Tensor | None) -> Tensor:
        return x


@dataclass(frozen=True)
class _Style:
    """What all blocks share: dimensions, and how many noise levels the norms know."""

    rank: int
    levels: int

    def conv(self, channels: int, out: int, kernel: int = 3, *, dilation: int = 1, bias: bool = True) -> Any:
        """A convolution that keeps the size."""
        padding = dilation * (kernel // 2)
        return CONV[self.rank](channels, out, kernel, padding=padding, dilation=dilation, bias=bias)

    def norm(self, channels: int) -> InstanceNormPlus:
        """A norm of the way down."""
        return InstanceNormPlus(channels, self.levels)

    def norm_back(self, channels: int) -> nn.Module:
        """A norm of the way back, which there is for noise levels only."""
        return self.norm(channels) if self.levels else _Same()


class _Residual(nn.Module):
    """norm, ELU, conv, norm, ELU, conv, and what comes in, by a convolution of its own in the ``first`` of a level.

    Without dilation that one averages every two values (2x2 in images), so comes out at half the size.
    """

    def __init__(self, style: _Style, channels: int, out: int, dilation: int, first: bool) -> None:
        super().__init__()
        self.rank, self.halves = style.rank, first and dilation == 1
        self.norm1, self.conv1 = style.norm(channels), style.conv(channels, channels, dilation=dilation)
        self.norm2, self.conv2 = style.norm(channels), style.conv(channels, out, dilation=dilation)
        self.skip: nn.Module = nn.Identity()
        if first:
            self.skip = style.conv(channels, out, 1 if self.halves else 3, dilation=dilation)

    def forward(self, x: Tensor, index: Tensor | None) -> Tensor:
        h = self.conv1(functional.elu(self.norm1(x, index)))
        h = self.conv2(functional.elu(self.norm2(h, index)))
        if self.halves:
            # a 1x1 convolution of means is the mean of 1x1 convolutions
            h, x = _AVERAGE[self.rank](h, 2), _AVERAGE[self.rank](x, 2)
        out: Tensor = self.skip(x) + h
        return out


class _Level(nn.Module):
    """Two residual blocks of the way down."""

    def __init__(self, style: _Style, channels: int, out: int, dilation: int, first: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [_Residual(style, channels, out, dilation, first), _Residual(style, out, out, dilation, False)]
        )

    def forward(self, x: Tensor, index: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(x, index)
        return x


class _Units(nn.Module):
    """Residual units: twice norm, ELU, conv, and what comes in."""

    def __init__(self, style: _Style, channels: int, count: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([style.norm_back(channels) for _ in range(2 * count)])
        self.convs = nn.ModuleList([style.conv(channels, channels, bias=False) for _ in range(2 * count)])

    def forward(self, x: Tensor, index: Tensor | None) -> Tensor:
        h = x
        for i, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            h = conv(functional.elu(norm(h, index)))
            if i % 2:
                h = x = h + x
        return h


class _Pooled(nn.Module):
    """ELU, then added to it twice over: norm, a pool over 5 values each way, conv, of what was added before.

    NCSN's pools average, with zeros beyond the edges; NCSNv2's take the largest.
    """

    def __init__(self, style: _Style, channels: int) -> None:
        super().__init__()
        self.rank, self.averages = style.rank, style.levels > 0
        self.norms = nn.ModuleList([style.norm_back(channels) for _ in range(2)])
        self.convs = nn.ModuleList([style.conv(channels, channels, bias=False) for _ in range(2)])

    def forward(self, x: Tensor, index: Tensor | None) -> Tensor:
        path = x = functional.elu(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            path = conv(self._pool(norm(path, index)))
            x = x + path
        return x

    def _pool(self, x: Tensor) -> Tensor:
        if not self.averages:
            return _MOST[self.rank](x, 5, 1, 2)
        # padded apart: avg_pool3d refuses sizes below the kernel's, whatever its padding
        return _AVERAGE[self.rank](functional.pad(x, (2, 2) * self.rank), 5, 1)


class _Refine(nn.Module):
    """(x of its level, what the coarser level has made or None, index) -> (B, out, *the level's sizes).

    Both by residual units of their own; then the sum of their convolutions, interpolated to the level's size; the
    pools; and residual units, three at the full size and one else.
    """

    def __init__(self, style: _Style, channels: int, out: int, inputs: int, units: int) -> None:
        super().__init__()
        self.mode = _INTERPOLATION[style.rank]
        self.adapt = nn.ModuleList([_Units(style, channels, 2) for _ in range(inputs)])
        merged = inputs if inputs > 1 else 0
        self.norms = nn.ModuleList([style.norm_back(channels) for _ in range(merged)])
        self.convs = nn.ModuleList([style.conv(channels, out) for _ in range(merged)])
        self.pooled, self.units = _Pooled(style, out), _Units(style, out, units)

    def forward(self, x: Tensor, coarse: Tensor | None, index: Tensor | None) -> Tensor:
        h: Tensor = self.adapt[0](x, index)
        if coarse is not None:
            h = self.convs[0](self.norms[0](h, index))
            made = self.convs[1](self.norms[1](self.adapt[1](coarse, index), index))
            if made.shape != h.shape:
                made = functional.interpolate(made, h.shape[2:], mode=self.mode, align_corners=True)
            h = h + made
        out: Tensor = self.units(self.pooled(h, index), index)
        return out


class RefineNet(nn.Module):
    """net(x, label) -> F like x (B, C, *sizes), by RefineNet; label (B,) whole indices of noise levels, int64.

    data_shape: (C, *sizes) with one to three sizes, multiples of 2^(depth - 3). width: channels at the full size.
    depth: levels: 4 as in NCSN and NCSNv2 (32 px; channels width x (1, 2, 2, 2)), 5 as in NCSNv2Deeper (64 px and more;
    1, 2, 2, 4, 4) or 6 as in NCSNv2Deepest (128 px and more; 1, 2, 2, 2, 4, 4). levels: how many noise levels the norms
    have rows for, by the label; 0, as in NCSNv2: none, and the label is not looked at. zero_to_one: x is data from 0 to
    1 with noise, and 2x - 1 enters.

    NCSN's F is the score. NCSNv2's release divides its output by sigma to get the score, so minus that output, F here,
    is eps. It equals stored outputs of both releases; ``levels`` are known at depth 4 only.

    Raises ValueError for settings that don't fit, for sizes that halving does not divide (the releases fail on them),
    for a condition, and with ``levels`` for labels that are no whole numbers.
    """

    def __init__(
        self,
        data_shape: tuple[int, ...],
        *,
        width: int = 128,
        depth: int = 4,
        levels: int = 0,
        zero_to_one: bool = False,
    ) -> None:
        super().__init__()
        shape = tuple(data_shape)
        if len(shape) - 1 not in CONV or min(shape) < 1:
            raise ValueError(
                f"data_shape is {shape}; expected (C, L), (C, H, W) or (C, D, H, W): points need MLP "
                "(model.net.name='mlp')"
            )
        if depth not in _MULTIPLIERS:
            raise ValueError(f"depth is {depth}; expected 4 (NCSN, NCSNv2), 5 (NCSNv2Deeper) or 6 (NCSNv2Deepest)")
        if width < 2 or levels < 0:
            raise ValueError(f"width = {width}, levels = {levels}; expected width >= 2 and levels >= 0")
        multiple = 2 ** (depth - 3)
        if any(n % multiple for n in shape[1:]):
            raise ValueError(f"data_shape is {shape}; expected sizes that are multiples of {multiple} at depth {depth}")
        if all(n == multiple for n in shape[1:]):
            raise ValueError(
                f"data_shape is {shape}, of which depth {depth} leaves one value a channel, whose instance norm is 0; "
                f"expected a size of {2 * multiple} or more"
            )
        self.config: dict[str, Any] = {
            "data_shape": shape,
            "width": width,
            "depth": depth,
            "levels": levels,
            "zero_to_one": zero_to_one,
        }
        self.zero_to_one, self.activation_checkpointing = zero_to_one, False
        self.integer_labels, self.num_levels = levels > 0, levels or None
        self.wants: dict[str, tuple[str, ...]] = {"label": ("index",)} if levels else {}
        style, widths = _Style(len(shape) - 1, levels), [width * m for m in _MULTIPLIERS[depth]]
        self.first = style.conv(shape[0], width)
        self.down, self.back = nn.ModuleList(), nn.ModuleList()
        for i, to in enumerate(widths):
            dilation = {depth - 2: 2, depth - 1: 4}.get(i, 1)
            self.down.append(_Level(style, widths[max(0, i - 1)], to, dilation, i > 0))
        for i in reversed(range(depth)):
            inputs, units = 1 if i == depth - 1 else 2, 1 if i else 3
            self.back.append(_Refine(style, widths[i], widths[max(0, i - 1)], inputs, units))
        self.norm, self.last = style.norm(width), style.conv(width, shape[0])

    def _run(self, module: nn.Module, *inputs: Tensor | None) -> Tensor:
        """A level; with ``activation_checkpointing`` its activations are computed again in the backward pass."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            found: Tensor = checkpoint(module, *inputs, use_reentrant=False)
            return found
        return module(*inputs)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None:
            raise ValueError("a condition was given to a RefineNet, which takes none: use UNet (model.net.name='unet')")
        index = label if self.integer_labels else None
        if index is not None and index.is_floating_point():
            raise ValueError(
                f"labels are {index.dtype}; expected whole indices of noise levels: build the ScoreModel with "
                "label='index'"
            )
        h: Tensor = self.first(2 * x - 1 if self.zero_to_one else x)
        kept = [h := self._run(level, h, index) for level in self.down]
        made: Tensor | None = None
        for refine in self.back:
            made = self._run(refine, kept.pop(), made, index)
        out: Tensor = self.last(functional.elu(self.norm(made, index)))
        return out
