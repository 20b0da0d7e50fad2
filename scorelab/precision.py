"""How a model's network computes: in single precision or bfloat16, channels first or last, eagerly or compiled.

``prepare`` is the only place that decides; training, evaluation and the command line use it. The network runs in what
was chosen; x, noise levels, labels and coefficients are float32 at least, for a model changes precision at the
network's door.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from scorelab.checks import nearest_name
from scorelab.saved import Model

__all__ = ["check_compiler", "multiplies_in_bf16", "prepare", "settled_precision", "unsafe_convolution"]

_NAMES = ("auto", "fp32", "bf16")

_CONVOLUTIONS = {
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d),
}


def multiplies_in_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for it: a GPU that says so, a CPU with AVX512-BF16, AMX or Arm's."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def settled_precision(name: str, model: Model) -> str:
    """ "fp32" or "bf16", the only place that decides. "auto" is bf16 for convolutional networks where the device has
    instructions for it and computes every gradient right, else fp32.

    A CPU without such instructions makes 2 images a second in bf16 where fp32 makes 33 (28x28, 4 million weights, AVX2,
    2 cores). On CPUs with them oneDNN reads unwritten memory in the weight gradients of convolutions over images that
    are 1 or 2 long in some direction (relative errors from 7 to infinity, where fp32 has 1e-7): conv3d at depth 2,
    stride 2 at a last size of 1. Of 4,464 small convolutions on a CPU with AMX (PyTorch 2.13) 244 results were wrong,
    some in outputs or gradients of x, all at a size of 1. "auto" is fp32 there, and "bf16" a ValueError.
    """
    if name not in _NAMES:
        raise ValueError(f"precision is {name!r}; {nearest_name(name, _NAMES)}")
    device = model.device
    if name == "fp32" or (name == "auto" and (len(model.data_shape) == 1 or not multiplies_in_bf16(device))):
        return "fp32"
    if device.type not in ("cpu", "cuda"):
        return "bf16"
    if not multiplies_in_bf16(device):
        raise ValueError(f"precision is 'bf16', but this {device.type} has no bf16 instructions; use 'fp32'")
    unsafe = unsafe_convolution(model) if device.type == "cpu" else ""
    if unsafe and name == "bf16":
        raise ValueError(
            f"precision is 'bf16', but the network has a convolution from {unsafe}, whose weight gradients a "
            "CPU gets wrong in bf16 (a size of 1 or 2); use 'fp32'"
        )
    return "fp32" if unsafe else "bf16"


class _Convolutions(TorchFunctionMode):
    """Notes the sizes of each convolution: kernel, what goes in, what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[torch.Size, torch.Size, torch.Size]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _CONVOLUTIONS:
            x, weight = (kwargs.get(k, args[i] if i < len(args) else None) for i, k in enumerate(("input", "weight")))
            self.found.append((weight.shape[2:], x.shape[2:], out.shape[2:]))
        return out


def unsafe_convolution(model: Model) -> str:
    """The sizes of the first convolution whose bf16 weight gradients a CPU may get wrong, "" if there is none.

    That is known of kernels of 3 at sizes of 1 and 2; here it is any kernel but that of a plain matrix product, at any
    size of 1 or 2, or shorter than half of the kernel. The network runs once, on one row of zeros.
    """
    training = model.net.training
    with torch.no_grad(), _Convolutions() as seen:
        model.eval().rehearse(torch.zeros(1, *model.data_shape, device=model.device))
    model.train(training)
    for kernel, before, after in seen.found:
        for k, n, m in zip(kernel, before, after, strict=True):
            if (k > 1 or n != m) and min(n, m) <= max(2, k // 2):
                return f"{tuple(before)} to {tuple(after)}"
    return ""


def check_compiler(device: torch.device) -> None:
    """Refuse (ValueError) to compile where there is no compiler for the code that torch.compile writes."""
    names = ("c++", "g++", "clang++") if device.type == "cpu" else ("cc", "gcc", "clang")
    named = os.environ.get("CXX" if device.type == "cpu" else "CC")
    if os.name == "posix" and not any(shutil.which(n) for n in ((named,) if named else names)):
        kind = "C++" if device.type == "cpu" else "C"
        raise ValueError(
            f"compile needs a {kind} compiler, and there is no {named or ' or '.join(names)}; install one, "
            "g++ for example, or leave it False"
        )


def prepare(
    model: Model,
    precision: str = "auto",
    *,
    compile: bool = False,
    channels_last: str = "auto",
    graphs: bool = True,
) -> Model:
    """The model itself, its network set to compute as chosen where the model now is.

    precision: "fp32", "bf16" or "auto" (see ``settled_precision``). compile: by torch.compile, at the next call.
    graphs: on a GPU a compiled network is replayed as CUDA graphs, too; not for gradients that are summed over several
    calls, whose memory the next call overwrites. channels_last: "yes", "no" or "auto": on a GPU where the network is
    compiled, in fp32 on a CPU with AVX-512, else first. Measured on an H200 with DDPM's CIFAR-10 network, batch 128,
    bf16, images/s: eager channels first 2,329, last 1,863 to 2,192 (group norm is slow there), compiled channels last
    3,761, first 2,443. On an H100 beside a slower CPU, whole training steps: eager 1,832, compiled 1,788, with graphs
    2,308, and 3,635 with batches made ahead. Elsewhere on a CPU channels first was measured faster.

    Raises ValueError for names that are not known, a precision that the device has not or computes wrong, and where
    there is no compiler.
    """
    if channels_last not in ("auto", "yes", "no"):
        raise ValueError(f"channels_last is {channels_last!r}; expected 'auto', 'yes' or 'no'")
    model.precision = settled_precision(precision, model)
    faster = compile
    if model.device.type == "cpu":
        faster = model.precision == "fp32" and torch.backends.cpu.get_cpu_capability() == "AVX512"
    last = channels_last == "yes" or (channels_last == "auto" and faster)
    formats = {3: torch.channels_last, 4: torch.channels_last_3d}
    if last and len(model.data_shape) in formats:
        model.to(memory_format=formats[len(model.data_shape)])  # type: ignore[call-overload]
    if compile:
        check_compiler(model.device)
        model.net.compile(mode="reduce-overhead" if graphs and model.device.type == "cuda" else None)
    return model
