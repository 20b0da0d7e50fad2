"""What a training step needs, made ahead by threads where that helps: samples, conditions, uniform numbers, noise.

All of it follows from (seed, step, place in the batch), so it does not matter who makes it, or when.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from scorelab.data import Source
from scorelab.losses import Objective
from scorelab.noise import counted
from scorelab.typing import Batch, Shape, Tensor

__all__ = ["Batches", "Draw", "stratified"]

_AHEAD = 2


class Draw(NamedTuple):
    """What an objective is given: a batch, u (B,) and noise (B, ..., *D)."""

    batch: Batch
    u: Tensor
    noise: Tensor

    def part(self, rows: slice) -> Draw:
        """Some of the samples."""
        return Draw(self.batch.part(rows), self.u[rows], self.noise[rows])

    def mapped(self, fn: Callable[[Tensor], Tensor]) -> Draw:
        """The same with all tensors mapped."""
        return Draw(self.batch.mapped(fn), fn(self.u), fn(self.noise))


def stratified(size: int, within: Tensor) -> Tensor:
    """One number in each of ``size`` equal parts of (0, 1), ascending, which leaves means unchanged and lowers their
    variance; ``within`` (size,), uniform, are the places in the parts."""
    # not 1, to which the sum is rounded once in a while
    return ((torch.arange(size) + within) / size).clamp_max(1 - 2**-24)


class Batches:
    """``at(step)`` is this process's ``rows`` of a batch, on ``device``; ``waited`` the seconds spent in it.

    null: what stands for "no condition", in place of the share ``dropout`` of them; None for a model without
    conditions, which then gets none. semantic: the condition is the sample itself. With ``workers`` threads the next
    batches are made while a step runs; with 0, when they are asked for.
    """

    def __init__(
        self,
        data: Source,
        objective: Objective,
        *,
        seed: int,
        size: int,
        rows: range,
        device: torch.device,
        workers: int = 0,
        conditional: bool = False,
        null: Tensor | None = None,
        dropout: float = 0.0,
        semantic: bool = False,
    ) -> None:
        self.data, self.objective, self.seed, self.size, self.rows = data, objective, seed, size, rows
        self.conditional, self.null, self.dropout, self.semantic = conditional, null, dropout, semantic
        if conditional and dropout and null is None:
            raise ValueError(
                f"training.label_dropout is {dropout:g}, but the network has no null_condition in place of labels; "
                "expected one that has (see scorelab.nn.classes), or label_dropout=0"
            )
        self.device, self.waited = device, 0.0
        self.workers = workers
        self._threads = ThreadPoolExecutor(workers, "scorelab-data") if workers else None
        self._coming: dict[int, Future[Draw]] = {}

    def at(self, step: int) -> Draw:
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
        found = found.mapped(lambda t: t.to(self.device, non_blocking=True))
        self.waited += time.perf_counter() - began
        return found

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def _make(self, step: int) -> Draw:
        o, rows = self.objective, self.rows
        u = stratified(self.size, counted("uniform", (), range(self.size), self.seed, step, 4))[rows.start : rows.stop]
        if o.reference:
            whole = self.known(self.data.batch(self.seed, step, o.count(self.size)))
            batch = whole.part(slice(rows.start, rows.stop))._replace(reference=whole)
        else:
            batch = self.known(self.data.batch(self.seed, step, self.size, rows))
        if batch.condition is not None and self.dropout:
            drop = counted("uniform", (), rows, self.seed, step, 11) < self.dropout
            assert self.null is not None
            drop = drop.reshape(-1, *(1,) * (batch.condition.ndim - 1))
            batch = batch._replace(condition=torch.where(drop, self.null, batch.condition))
        noise = counted("normal", self.noise_shape(batch), rows, self.seed, step, 9).to(batch.x0)
        found = Draw(batch, u, noise)
        return found.mapped(Tensor.pin_memory) if self.device.type == "cuda" else found

    def known(self, batch: Batch) -> Batch:
        """The batch with as much of its condition as the model takes, or with itself as its condition."""
        if self.semantic:
            return batch._replace(condition=batch.x0)
        return batch if self.conditional else batch._replace(condition=None)

    def noise_shape(self, batch: Batch) -> Shape:
        """That of the noise which the objective takes for one sample."""
        shape, draws = tuple(batch.x0.shape[1:]), self.objective.draws
        return shape if draws == 1 else (draws, *shape)
