"""Numbers of training: single precision or bfloat16, and how images lie in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from scorelab.checks import nearest_name
from scorelab.models import ScoreModel

__all__ = ["autocast", "lay_out", "settled_precision"]

_NAMES = ("auto", "fp32", "bf16")

# what autocast multiplies in bf16
_PRODUCTS = {
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    *(functional.linear, functional.scaled_dot_product_attention),
    *(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__),
    *(torch.mm, torch.Tensor.mm, torch.bmm, torch.Tensor.bmm, torch.addmm, torch.baddbmm),
}


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


class RoundedProducts(TorchFunctionMode):
    """Products of autocast to bf16 on a CPU, made by its fp32 instructions.

    Operands are rounded to bf16, multiplied and summed in fp32, and the result is rounded: what bf16 instructions do,
    up to the order of sums. For the gradient operands are kept in bf16, which they are exact in. The products are
    PyTorch's own where other hooks say what is kept (activation checkpointing runs again outside of this mode), in
    functorch's transforms, for sparse tensors and with ``out=``.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or "out" in kwargs or not self._applies(args, kwargs):
            return func(*args, **kwargs)
        operands: set[int] = set()

        def rounded(x: Tensor) -> Tensor:
            if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                return x
            wide = x.bfloat16().float()
            operands.add(wide.data_ptr())
            return wide

        def keep(x: Tensor) -> Tensor:
            return x.bfloat16() if x.data_ptr() in operands else x

        args, kwargs = tree_map_only(Tensor, rounded, (args, kwargs))
        with torch.autocast("cpu", enabled=False), saved_tensors_hooks(keep, _wide):
            out = func(*args, **kwargs)
            return out.bfloat16() if out.dtype == torch.float32 else out

    @staticmethod
    def _applies(args: Any, kwargs: Any) -> bool:
        return (
            torch.is_autocast_enabled("cpu")
            and torch.get_autocast_dtype("cpu") == torch.bfloat16
            and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
            and torch._C._functorch.peek_interpreter_stack() is None
            and all(x.layout == torch.strided for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        )


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


@contextmanager
def autocast(device: torch.device, precision: str, *, compiled: bool = False) -> Iterator[None]:
    """The context in which a network runs forward.

    In bf16 on a CPU without AVX-512 products are made by fp32 instructions: PyTorch's own take ten times as long. Of a
    compiled network they are PyTorch's own.
    """
    if precision != "bf16":
        yield
        return
    onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    fast = device.type != "cpu" or (onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    with torch.autocast(device.type, torch.bfloat16), nullcontext() if fast or compiled else RoundedProducts():
        yield


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
