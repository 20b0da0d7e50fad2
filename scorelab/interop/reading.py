"""Files of releases, of which nothing is ever executed: tensors and settings are kept, everything else is refused.

PyTorch's own files are read with ``weights_only``. NVIDIA's are pickles of whole networks whose classes bring their
source code; of these only what they hold is taken, by an unpickler that knows tensors, arrays and containers, and turns
every module into a plain record.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from scorelab.typing import Tensor

__all__ = ["Reader", "Record", "State", "read_file", "state_of"]

State = dict[str, Tensor]


class Record:
    """A module as a pickle holds it: its attributes, by name, and of NVIDIA's the name of its class."""

    def __init__(self, *_: object) -> None:
        self.fields: dict[str, Any] = {}
        self.kind = ""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.fields = state


def _persistent(meta: dict[str, Any], *_: object) -> Record:
    """What NVIDIA's ``persistence`` module would make by running ``meta["module_src"]``, which is left alone."""
    made = Record()
    made.fields, made.kind = meta.get("state") or {}, str(meta.get("class_name", ""))
    return made


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")


def _parameter(data: Tensor, requires_grad: bool, hooks: object) -> Tensor:
    return data


class _Settings(dict[str, Any]):
    """dnnlib's EasyDict."""


_KNOWN: dict[tuple[str, str], Any] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("dnnlib.util", "EasyDict"): _Settings,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
_ARRAYS = ("numpy.core.multiarray", "numpy._core.multiarray")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module in _ARRAYS and name in ("_reconstruct", "scalar"):
            return getattr(np._core.multiarray, name)  # type: ignore[attr-defined]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module.startswith("torch.nn.modules."):
            return Record
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of weights needs")


def _unpickled(path: Path) -> Any:
    with path.open("rb") as file:
        return _Unpickler(file).load()


def read_file(path: str | Path) -> Any:
    """What a .safetensors, .pt, .pth, .ckpt, .bin or .pkl file holds, in memory of the CPU.

    Raises ValueError for a file that is not there, damaged, or holds anything but tensors and settings.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a file of weights: release='diffusers' reads folders")
    if not path.is_file():
        raise ValueError(f"there is no file {path}; expected one of weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".pkl":
            return _unpickled(path)
        if zipfile.is_zipfile(path) and (bad := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"its part {bad} is not as it was written")
        return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is damaged, or holds more than weights and settings: {_first_line(error)}") from error
    except _DAMAGE as error:
        raise ValueError(f"{path} is damaged or no file of weights: {_first_line(error)}") from error


_DAMAGE = (
    *(RuntimeError, EOFError, OSError, SafetensorError, ValueError, TypeError, AttributeError, KeyError),
    *(MemoryError, OverflowError, zipfile.BadZipFile),
)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def state_of(found: object, prefix: str = "") -> State:
    """All tensors of a record of a module, or of a dict of tensors, by the names of a state dict."""
    if isinstance(found, dict):
        return {prefix + str(k): v for k, v in found.items() if isinstance(v, Tensor)}
    if not isinstance(found, Record):
        raise ValueError(f"got {type(found).__name__}; expected a module, or tensors by their names")
    state: State = {}
    for group in ("_parameters", "_buffers"):
        state |= {prefix + k: v for k, v in found.fields.get(group, {}).items() if v is not None}
    for name, inner in found.fields.get("_modules", {}).items():
        if inner is not None:
            state |= state_of(inner, f"{prefix}{name}.")
    return state


class Reader:
    """Takes a release's weights one by one, so that what is left over is known."""

    def __init__(self, net: nn.Module, state: State) -> None:
        self.net, self.left, self.found = net, dict(state), State()
        self.own = net.state_dict()

    def take(self, name: str) -> Tensor:
        """A tensor of the release; ValueError if there is none of this name."""
        if name not in self.left:
            raise ValueError(f"there are no weights {name!r}; expected those of this release, and of this size")
        return self.left.pop(name)

    def put(self, name: str, value: Tensor) -> None:
        """As our weights of this name; ValueError if there are more or fewer numbers."""
        own = self.own[name].shape
        # a convolution of kernel 1 is a matrix
        if [n for n in value.shape if n > 1] != [n for n in own if n > 1]:
            raise ValueError(f"the weights for {name} are {tuple(value.shape)}; expected {tuple(own)}: another size")
        self.found[name] = value.reshape(own)

    def leaf(self, ours: str, theirs: str) -> None:
        """A convolution, matrix or norm."""
        for kind in ("weight", "bias"):
            self.put(f"{ours}.{kind}", self.take(f"{theirs}.{kind}"))

    def ended(self) -> State:
        """All that was taken; ValueError if there is more."""
        lacking = [k for k in self.own if k not in self.found]
        if self.left or lacking:
            raise ValueError(
                f"these weights are of another network: {len(self.left)} are not known "
                f"({', '.join([*self.left][:3])}), and {len(lacking)} are missing ({', '.join(lacking[:3])})"
            )
        return self.found
