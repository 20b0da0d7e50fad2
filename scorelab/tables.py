"""Tables of numbers that are looked up on devices: copied to each once, so that a look costs no synchronisation."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from scorelab.typing import Tensor

__all__ = ["Table"]


class Table:
    """Numbers (N,), kept in float64 on the CPU, and in the dtype and on the device of whoever asks."""

    def __init__(self, values: Tensor) -> None:
        with torch.inference_mode(False):
            self.values = values.detach().to("cpu", torch.float64, copy=True)
        self._copies: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def like(self, x: Tensor) -> Tensor:
        """The numbers in x's dtype on x's device."""
        key = x.dtype, x.device
        found = self._copies.get(key)
        if found is None:
            # kept for later, where gradients may be asked for
            with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
                found = self.values.to(device=x.device, dtype=x.dtype)
            # tensors without storage, of tracing, are none to keep
            if type(found) is Tensor:
                self._copies[key] = found
        return found

    def segment(self, x: Tensor) -> Tensor:
        """Where the interval between two neighbours begins in which x is, of any shape, or to which it is nearest: a
        place, int64 like x, from 0 to N - 2. The numbers must ascend."""
        table, x = self.like(x), x.detach()
        if torch.compiler.is_exporting():
            # ONNX has no search
            below = (table <= x.unsqueeze(-1)).sum(-1)
        else:
            below = torch.searchsorted(table, x.contiguous(), right=True)
        return (below - 1).clamp(0, len(table) - 2)

    def __deepcopy__(self, memo: object) -> Table:
        return self

    def __getstate__(self) -> dict[str, object]:
        return {"values": self.values, "_copies": {}}
