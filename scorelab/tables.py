"""Tables of numbers that are looked up on devices: copied to each once, so that a look costs no synchronisation."""

from __future__ import annotations

import torch

from scorelab.typing import Tensor

__all__ = ["Table"]


class Table:
    """Numbers (N,), kept in float64 on the CPU, and in the dtype and on the device of whoever asks."""

    def __init__(self, values: Tensor) -> None:
        self.values = values.detach().double().cpu()
        self._copies: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def like(self, x: Tensor) -> Tensor:
        """The numbers in x's dtype on x's device."""
        key = x.dtype, x.device
        found = self._copies.get(key)
        if found is None:
            found = self.values.to(device=x.device, dtype=x.dtype)
            # tensors without storage, of tracing, are none to keep
            if type(found) is Tensor:
                self._copies[key] = found
        return found

    def __deepcopy__(self, memo: object) -> Table:
        return self

    def __getstate__(self) -> dict[str, object]:
        return {"values": self.values, "_copies": {}}
