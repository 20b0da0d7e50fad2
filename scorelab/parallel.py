"""Several processes, and requests that are larger than memory: shards, gathering, and how many rows fit a budget.

Started by ``torchrun``, each process calls ``join`` once. Without it everything here is one process's own.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scorelab.typing import Tensor

T = TypeVar("T")

__all__ = ["gather", "join", "most", "rows_within", "shard", "together", "wait", "world"]


def join() -> torch.device:
    """Join the processes that ``torchrun`` started, and say which device is this one's: its GPU, or the CPU.

    Without torchrun, and when called again, nothing is done.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if "WORLD_SIZE" in os.environ and not distributed.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(distributed.destroy_process_group)
    return device


def world() -> tuple[int, int]:
    """This process's rank and the number of processes: (0, 1) if there is only one."""
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def shard(count: int) -> range:
    """The rows of ``count`` that are this process's: consecutive, and as many as the others' to within one."""
    rank, size = world()
    return range(count * rank // size, count * (rank + 1) // size)


def gather(x: Tensor, count: int) -> Tensor:
    """All ``count`` rows in every process, from the part (n, *D) that each made of its ``shard(count)``."""
    _, size = world()
    if size == 1:
        return x
    most = -(-count // size)
    padded = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(size)]
    distributed.all_gather(parts, padded)
    return torch.cat([p[: count * (i + 1) // size - count * i // size] for i, p in enumerate(parts)])


def together(part: Callable[[], T]) -> T:
    """``part()``, which sends nothing itself. Where it fails in one process it fails in all, in the others with a
    RuntimeError, so that none waits for what is never sent.
    """
    failed: Exception | None = None
    try:
        found = part()
    except Exception as error:
        failed = error
    if most(float(failed is not None))[0]:
        raise failed or RuntimeError("another process failed, and says why")
    return found


def wait() -> None:
    """Until every process is here."""
    if world()[1] > 1:
        distributed.barrier()


def most(*values: float) -> list[float]:
    """The largest of every process's value, for each value; by way of the CPU."""
    if world()[1] == 1:
        return list(values)
    found = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return found.tolist()


class _Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made inside and still alive; ``peak`` is the most at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # a view of what was there before is nothing new
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._alive and key not in given:
                    self._alive[key] = weakref.finalize(storage, self._free, key, size)
                    self.now += size
                    self.peak = max(self.peak, self.now)
        return found

    def _free(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


def rows_within(budget: int, run: Callable[[int], object], beside: int = 0) -> int:
    """How many rows at once keep the tensors of ``run(rows)`` within ``budget`` bytes, at least 1.

    ``run`` is called with 4 rows (twice) and with 8, and its memory taken to grow linearly; ``beside``: bytes that a
    row takes beside tensors. What kernels use inside themselves is not seen.
    """
    peaks: list[int] = []
    # whatever is made once and kept
    run(4)
    for rows in (4, 8):
        with _Peak() as counted:
            run(rows)
        peaks.append(counted.peak)
    each = max(1, (peaks[1] - peaks[0]) // 4)
    return max(1, (budget - max(0, peaks[0] - 4 * each)) // (each + beside))
