"""Dropout that is cheap on a CPU, where drawing a number for every element is what dropout costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from scorelab.typing import Tensor

__all__ = ["Dropout"]


class _Masked(torch.autograd.Function):
    """x keep scale, keeping one byte an element for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return x.mul(keep).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return grads[0].mul(keep).mul_(ctx.scale), None, None


class Dropout(nn.Dropout):
    """torch's dropout; in training on a CPU its mask comes from 16 random bits an element, four of one draw.

    p is rounded to a multiple of 2^-16 there, and what is kept is scaled by the probability so rounded: the expectation
    is exact. Random bits are torch's global ones, as dropout's always are.
    """

    def forward(self, x: Tensor) -> Tensor:
        dropped = round(self.p * 2**16)
        if not self.training or dropped in (0, 2**16) or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        # dense in whatever order x lies in memory: a mask in another order would be slow to multiply by
        keep = torch.empty_like(x, dtype=torch.bool)
        flat = torch.as_strided(keep, (x.numel(),), (1,))
        torch.ge(bits[: x.numel()], dropped - 2**15, out=flat)
        found: Tensor = _Masked.apply(x, keep, 2**16 / (2**16 - dropped))  # type: ignore[no-untyped-call]
        return found
