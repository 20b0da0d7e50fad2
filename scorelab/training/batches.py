"""What a training step needs, made ahead by threads where that helps: samples, their noise levels, and noise.

All of it follows from (seed, step, place in the batch), so it does not matter who makes it, or when.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from scorelab.data import Source
from scorelab.losses import Denoising
from scorelab.losses.denoising import Noised
from scorelab.noise import counted

__all__ = ["Batches"]

_AHEAD = 2


class Batches:
    """``at(step)`` is this process's ``rows`` of a batch, on ``device``; ``waited`` the seconds spent in it.

    With ``workers`` threads the next batches are made while a step runs; with 0, when they are asked for.
    """

    def __init__(
        self,
        data: Source,
        objective: Denoising,
        *,
        seed: int,
        size: int,
        rows: range,
        device: torch.device,
        workers: int = 0,
    ) -> None:
        self.data, self.objective, self.seed, self.size, self.rows = data, objective, seed, size, rows
        self.device, self.waited = device, 0.0
        self.workers = workers
        self._threads = ThreadPoolExecutor(workers, "scorelab-data") if workers else None
        self._coming: dict[int, Future[Noised]] = {}

    def at(self, step: int) -> Noised:
        """The rows of a step's batch."""
        began = time.perf_counter()
        if self._threads is None:
            found = self._make(step)
        else:
            self._coming = {k: v for k, v in self._coming.items() if k >= step}
            for ahead in range(step, step + self.workers + _AHEAD):
                if ahead not in self._coming:
                    self._coming[ahead] = self._threads.submit(self._make, ahead)
            found = self._coming.pop(step).result()
        found = Noised(*(t.to(self.device, non_blocking=True) for t in found))
        self.waited += time.perf_counter() - began
        return found

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def _make(self, step: int) -> Noised:
        o, rows = self.objective, self.rows
        sigma = o.levels(counted("uniform", (), range(self.size), self.seed, step, 4))[rows.start : rows.stop]
        if o.reference:
            whole = self.data.batch(self.seed, step, o.count(self.size))
            clean = whole[rows.start : rows.stop]
        else:
            whole = clean = self.data.batch(self.seed, step, self.size, rows)
        noise = counted("normal", tuple(clean.shape[1:]), rows, self.seed, step, 9).to(clean)
        found = o.noised(clean, sigma.to(clean), noise, whole)
        return Noised(*(t.pin_memory() for t in found)) if self.device.type == "cuda" else found
