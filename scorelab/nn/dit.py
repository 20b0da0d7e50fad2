"""DiT: a transformer on patches, for signals, images and volumes.

Of each block, with shift a, scale b and gate g linear in silu(time + class), for attention and for the MLP:

    h <- h + g f((1 + b) LayerNorm(h) + a)

All of these start at 0 (adaLN-zero), so that blocks begin as identities, and F at 0.

Peebles and Xie, Scalable Diffusion Models with Transformers, 2022, arXiv:2212.09748.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from scorelab.nn.classes import Classes, Conditional
from scorelab.nn.embedding import PositionalEmbedding
from scorelab.nn.layers import CONV, given
from scorelab.typing import Tensor

__all__ = ["SIZES", "DiT"]

SIZES: dict[str, dict[str, int]] = {
    "S": {"depth": 12, "width": 384, "heads": 6},
    "B": {"depth": 12, "width": 768, "heads": 12},
    "L": {"depth": 24, "width": 1024, "heads": 16},
    "XL": {"depth": 28, "width": 1152, "heads": 16},
}
"""The published ones, whose names end in the patch, as DiT-XL/2: ``DiT((4, 32, 32), patch=2, **SIZES["XL"])``."""

_ENCODED = 256


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def _modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """h (B, tokens, width) by a scale and a shift (B, width)."""
    return h * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class _Block(nn.Module):
    """(B, tokens, width) and the embedding (B, width) -> (B, tokens, width)."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = _norm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2 = _norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU("tanh"), nn.Linear(inner, width))
        self.modulation = nn.Linear(width, 6 * width)

    def _attended(self, h: Tensor) -> Tensor:
        b, tokens, width = h.shape
        q, k, v = self.qkv(h).reshape(b, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, tokens, width)
        found: Tensor = self.out(mixed)
        return found

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(embedding).chunk(6, 1)
        h = h + gate1.unsqueeze(1) * self._attended(_modulated(self.norm1(h), shift1, scale1))
        made: Tensor = h + gate2.unsqueeze(1) * self.mlp(_modulated(self.norm2(h), shift2, scale2))
        return made


def _positions(grid: tuple[int, ...], width: int) -> Tensor:
    """(1, tokens, width): sines and cosines of a patch's place in each dimension, the last dimension first.

    Each dimension has an equal part of the width, of frequencies 10000^(-i/n), i from 0 to n - 1.
    """
    count = width // (2 * len(grid))
    frequencies = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    places = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [place.flatten().unsqueeze(1) * frequencies for place in reversed(places)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1).float().unsqueeze(0)


def _check(config: dict[str, Any]) -> None:
    """Refuse (ValueError) settings of a DiT that don't fit."""
    shape, patch, width, heads = (config[k] for k in ("data_shape", "patch", "width", "heads"))
    depth, mlp = config["depth"], config["mlp"]
    if len(shape) - 1 not in CONV or min(shape) < 1:
        raise ValueError(
            f"data_shape is {shape}; expected (C, L), (C, H, W) or (C, D, H, W): points need MLP (model.net.name='mlp')"
        )
    if min(patch, width, depth, heads) < 1 or not int(mlp * width) >= 1:
        raise ValueError(
            f"patch = {patch}, width = {width}, depth = {depth}, heads = {heads}, mlp = {mlp:g}; expected 1 or more of "
            "each, and an mlp whose width, mlp * width, is at least 1"
        )
    if width % heads:
        raise ValueError(
            f"heads = {heads} does not divide width = {width}; expected a divisor: choose width a multiple of heads"
        )
    multiple = 2 * (len(shape) - 1)
    if width % multiple:
        raise ValueError(
            f"width = {width} has no equal parts for the sines and cosines of {len(shape) - 1} dimensions; expected a "
            f"multiple of {multiple}"
        )
    if any(n % patch for n in shape[1:]):
        raise ValueError(
            f"data_shape is {shape}; expected sizes that are multiples of patch = {patch}: choose a patch that divides "
            "them, or crop or pad the data"
        )


class DiT(Conditional):
    """net(x, label, condition=None) -> F like x (B, C, *sizes); label (B,), condition (B,) class indices.

    data_shape: (C, *sizes) with one to three sizes, multiples of ``patch``. width: channels of a patch, a multiple of
    twice the dimensions; depth: blocks; heads: of the attention; mlp: the inner width of the blocks' MLP over
    ``width``; ``SIZES`` has the published ones. variance: twice the channels come out, F and the variance between its
    bounds (then ``ScoreModel`` has to know, variance=True). num_classes: condition on class labels; null_class: and on
    none, the table's last row.

    The label is encoded as the steps 0 to 999 are in the release. Weights start as there. Raises ValueError for
    settings that don't fit, and for x of another shape.
    """

    positions: Tensor

    def __init__(
        self,
        data_shape: tuple[int, ...],
        *,
        patch: int = 2,
        width: int = 1152,
        depth: int = 28,
        heads: int = 16,
        mlp: float = 4.0,
        variance: bool = False,
        num_classes: int | None = None,
        null_class: bool = False,
    ) -> None:
        config = given(locals())
        super().__init__()
        self.config = config
        _check(config)
        rank, channels = len(data_shape) - 1, data_shape[0]
        self.data_shape, self.patch, self.activation_checkpointing = tuple(data_shape), patch, False
        self.grid = tuple(n // patch for n in data_shape[1:])
        self.first = CONV[rank](channels, width, patch, stride=patch)
        self.register_buffer("positions", _positions(self.grid, width), persistent=False)
        encode = PositionalEmbedding(_ENCODED, closed=False)
        self.embed = nn.Sequential(encode, nn.Linear(_ENCODED, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = None if num_classes is None else Classes(num_classes, width, null_class)
        self.blocks = nn.ModuleList([_Block(width, heads, int(mlp * width)) for _ in range(depth)])
        self.norm, self.modulation = _norm(width), nn.Linear(width, 2 * width)
        self.last = nn.Linear(width, patch**rank * channels * (1 + variance))
        self._initialise()

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                continue
            if name == "last" or name.endswith("modulation"):
                nn.init.zeros_(module.weight)
            elif name.startswith("embed"):
                nn.init.normal_(module.weight, std=0.02)
            else:
                # the convolution as the matrix that it is for a patch
                nn.init.xavier_uniform_(module.weight.detach().flatten(1))
            assert module.bias is not None
            nn.init.zeros_(module.bias)
        if self.classes is not None:
            nn.init.normal_(self.classes.weight, std=0.02)

    def _embedded(self, x: Tensor, label: Tensor, condition: Tensor | None) -> Tensor:
        encoded = self.embed[0](label if label.is_floating_point() else label.float()).to(x.dtype)
        time = self.embed[1:](encoded)
        return functional.silu(time if condition is None else time + self.embedded(condition).to(x.dtype))

    def _whole(self, h: Tensor) -> Tensor:
        """x's channels and sizes, of what each patch has: (B, tokens, patch, ..., channels)."""
        rank = len(self.grid)
        h = h.reshape(h.shape[0], *self.grid, *(self.patch,) * rank, -1)
        order = [axis for d in range(rank) for axis in (1 + d, 1 + rank + d)]
        return h.permute(0, 2 * rank + 1, *order).reshape(h.shape[0], -1, *self.data_shape[1:])

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        if x.shape[1:] != self.data_shape:
            raise ValueError(
                f"x is {tuple(x.shape)}; expected (B, {', '.join(map(str, self.data_shape))}), for which this DiT has "
                "positions: build another for other sizes"
            )
        embedding = self._embedded(x, label, condition)
        h = self.first(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                # activations are computed again in the backward pass
                h = checkpoint(block, h, embedding, use_reentrant=False)
            else:
                h = block(h, embedding)
        shift, scale = self.modulation(embedding).chunk(2, 1)
        return self._whole(self.last(_modulated(self.norm(h), shift, scale)))
