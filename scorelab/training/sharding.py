"""Weights that are spread over the processes (FSDP), for networks whose optimiser does not fit one device.

What it takes of torch is imported where it is used: that is a quarter of all that training imports.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from scorelab.typing import Tensor

__all__ = ["full", "full_state", "like", "spread"]


def spread(net: nn.Module, device: torch.device, processes: int) -> None:
    """Spread a network's parameters: a group for every block in its module lists, and one for the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes,))
    for modules in net.children():
        for module in modules if isinstance(modules, nn.ModuleList) else []:
            # single layers stay with the rest: a network may use their weights without calling them
            if any(True for _ in module.children()):
                fully_shard(module, mesh=mesh)
    fully_shard(net, mesh=mesh)


def full(value: Any) -> Any:
    """A spread tensor whole, on the CPU; all processes must call. Anything else as it is."""
    return value.full_tensor().cpu() if _is_spread(value) else value


def _is_spread(value: Any) -> bool:
    """Whether it is a DTensor."""
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def full_state(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict, nested or not, with whole tensors."""
    return {k: full_state(v) if isinstance(v, dict) else full(v) for k, v in state.items()}


def like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor, spread as ``target`` is."""
    if not _is_spread(target):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
