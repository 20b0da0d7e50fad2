"""Numbers of training: single precision or bfloat16, and how images lie in memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from scorelab.checks import nearest_name
from scorelab.models import ScoreModel

__all__ = ["autocast", "lay_out", "settled_precision"]

_NAMES = ("auto", "fp32", "bf16")


def settled_precision(name: str, model: ScoreModel) -> str:
    """ "fp32" or "bf16" for "auto": bf16 for convolutional networks where the device multiplies in it, else fp32."""
    if name not in _NAMES:
        raise ValueError(f"training.precision is {name!r}; {nearest_name(name, _NAMES)}")
    if name != "auto":
        return name
    device = model.device.type
    if len(model.data_shape) == 1:
        return "fp32"
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fast = device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bf16" if fast else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The context in which a network runs."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def lay_out(model: ScoreModel, precision: str, channels_last: str) -> None:
    """Put convolutions' weights channels first or last.

    "auto": last on a GPU, and in fp32 on a CPU with AVX-512. Elsewhere on a CPU channels first was measured faster.
    """
    if channels_last not in ("auto", "yes", "no"):
        raise ValueError(f"training.channels_last is {channels_last!r}; expected 'auto', 'yes' or 'no'")
    cpu = model.device.type == "cpu"
    faster = not cpu or (precision == "fp32" and torch.cpu._is_avx512_supported())
    last = channels_last == "yes" or (channels_last == "auto" and faster)
    formats = {3: torch.channels_last, 4: torch.channels_last_3d}
    if last and len(model.data_shape) in formats:
        model.to(memory_format=formats[len(model.data_shape)])  # type: ignore[call-overload]
