"""The public entrance to all samplers: ``trajectory`` yields every step, ``sample`` returns the last."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from tqdm.auto import tqdm

from scorelab import parallel
from scorelab.checks import check_finite
from scorelab.noise import PerSampleNoise, fresh_generator
from scorelab.samplers.base import Sampler, Step, check_held, check_shape, drive, grid_of
from scorelab.samplers.ode import Heun
from scorelab.scores import can_split, device_of, restricted
from scorelab.typing import ScoreFn, Shape, Tensor

__all__ = ["sample", "trajectory"]


def trajectory(
    score: ScoreFn,
    x: Tensor | Shape,
    sigmas: Tensor | Iterable[float] | None = None,
    sampler: Sampler = Heun(),  # noqa: B008
    *,
    generator: torch.Generator | PerSampleNoise | None = None,
    data_std: float = 0.0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    differentiable: bool = False,
    debug: bool = False,
) -> Iterator[Step]:
    """The start and every step of a sampler, as ``Step(x, x0_hat, sigma, nfe)``.

    Arguments and errors are those of ``sample``; inputs are checked before the first item is asked for.
    """
    return drive(
        score,
        x,
        sigmas,
        sampler,
        generator=generator,
        data_std=data_std,
        dtype=dtype,
        device=device,
        differentiable=differentiable,
        debug=debug,
        denoised=True,
    )


def sample(
    score: ScoreFn,
    x: Tensor | Shape,
    sigmas: Tensor | Iterable[float] | None = None,
    sampler: Sampler = Heun(),  # noqa: B008
    *,
    generator: torch.Generator | PerSampleNoise | None = None,
    data_std: float = 0.0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    callback: Callable[[Step], None] | None = None,
    differentiable: bool = False,
    debug: bool = False,
    batch_size: int | None = None,
    memory: int | None = None,
    sharded: bool = False,
) -> Tensor:
    """Samples (B, *D) from a score function, unscaled, at the last noise level.

    score: any callable score(x, sigma) -> (B, *D); sigma arrives as a 0-dim tensor (per sample, (B,), from adaptive
    solvers). x: a tensor (B, *D) at noise level sigmas[0], or a shape, then drawn from N(m, (sigmas[0]^2 + data_std^2)
    I), m the score's ``data_mean``, as models have it, or 0. sigmas: strictly descending levels; a final 0 ends on the
    denoised sample; None for those of a sampler that brings its own (Calibrated), else for EDM's 18 over all that the
    score knows, as models do. device, dtype: of a shape's samples, by default those of the score's weights. generator:
    source of all randomness, freshly seeded if None; a PerSampleNoise makes sample i depend on (seed, i) alone.
    callback: called with every Step. differentiable: keep the graph. debug: look for NaN at every step instead of once
    at the end. batch_size: run the request in parts of this many rows, so that memory stays bounded; memory: in parts
    that take about this many bytes, found by the tensors of the sampler's first step with 4 and with 8 rows. sharded:
    under torchrun, after ``parallel.join()``, every process makes its share of the rows and returns all; the noise must
    be a PerSampleNoise's. A score with ``rows(index)`` is restricted to each part, any other must not be bound to the
    rows of a batch. Parts see other noise than a whole batch does, but from PerSampleNoise.

    Raises ValueError or TypeError for shapes, levels, dtypes or a score output that don't fit, for levels outside the
    score's ``sigma_range``, and for samples that are not finite (which are named); RuntimeWarning for samples that have
    grown to a thousand times the noise they began from.
    """
    options: dict[str, Any] = {
        "data_std": data_std,
        "dtype": dtype,
        "device": device,
        "differentiable": differentiable,
        "debug": debug,
    }
    whole = batch_size is None and memory is None and (not sharded or parallel.world()[1] == 1)
    if whole:
        found = _last(score, x, sigmas, sampler, generator, progress, callback, options)
    else:
        if callback is not None:
            raise ValueError(
                "callback with batch_size, memory or sharded; expected none: it would see parts of a batch"
            )
        found = _in_parts(score, x, sigmas, sampler, generator, progress, options, batch_size, memory, sharded)
    remedy = "check the score function there; debug=True names the first noise level"
    if hasattr(sampler, "step_size"):
        remedy = f"lower the step_size of {type(sampler).__name__}, or {remedy}"
    check_finite(found, "the sample", remedy)
    return found


def _in_parts(
    score: ScoreFn,
    x: Tensor | Shape,
    sigmas: Tensor | Iterable[float] | None,
    sampler: Sampler,
    generator: torch.Generator | PerSampleNoise | None,
    progress: bool,
    options: dict[str, Any],
    batch_size: int | None,
    memory: int | None,
    sharded: bool,
) -> Tensor:
    """The ends of a large request's parts, this process's or, with ``sharded``, all."""
    if options["differentiable"] and (memory is not None or sharded):
        raise ValueError(
            "differentiable with memory or sharded; expected batch_size alone: a graph grows with every step and "
            "can't be gathered"
        )
    count = len(x) if isinstance(x, Tensor) else check_shape(x)[0]
    if not isinstance(x, Tensor):
        check_held(x)
    mine = parallel.shard(count) if sharded else range(count)
    if sharded and parallel.world()[1] > 1 and not isinstance(generator, PerSampleNoise):
        raise ValueError(
            f"sharded with generator = {generator}; expected a scorelab.PerSampleNoise(seed): with any other the "
            "processes would draw the same noise, or noise that depends on their number"
        )

    def tried(rows: int) -> None:
        few = x[:rows] if isinstance(x, Tensor) else (rows, *tuple(x)[1:])
        noise = generator if isinstance(generator, PerSampleNoise) else None
        bound = _restricted(score, range(rows))
        for _ in islice(drive(bound, few, sigmas, sampler, generator=noise, denoised=False, **options), 2):
            pass

    size = max(count, 1) if batch_size is None else batch_size
    if memory is not None and count > 8:
        beside = generator.stream_bytes if isinstance(generator, PerSampleNoise) else 0
        # what kernels use inside themselves and what the allocator keeps of freed memory was measured to double it
        size = min(size, parallel.rows_within(memory // 2, tried, beside))
    if size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    bar = tqdm(_parts(score, x, generator, mine, size), disable=not progress, desc="sampling", unit="part")

    def made() -> Tensor:
        try:
            return torch.cat([_last(s, part, sigmas, sampler, g, False, None, options) for s, part, g in bar])
        except (RuntimeError, ValueError) as error:
            if can_split(score) or size >= count:
                raise
            raise ValueError(
                f"the score failed on {size} of {count} samples ({error}); it does not say how it is restricted to "
                "some rows of a batch: expected one bound to no rows, one with rows(index), as model.conditioned(y) "
                "has, or no batch_size"
            ) from error

    return parallel.gather(parallel.together(made), count) if sharded else made()


def _last(
    score: ScoreFn,
    x: Tensor | Shape,
    sigmas: Tensor | Iterable[float] | None,
    sampler: Sampler,
    generator: torch.Generator | PerSampleNoise | None,
    progress: bool,
    callback: Callable[[Step], None] | None,
    options: dict[str, Any],
) -> Tensor:
    """The end of one drive."""
    steps = drive(score, x, sigmas, sampler, generator=generator, denoised=callback is not None, **options)
    # a callback may differentiate; without one, once for all steps is cheaper than at each
    with nullcontext() if options["differentiable"] or callback is not None else torch.no_grad():
        first = last = next(steps)
        total = len(grid_of(score, sigmas, sampler)) - 1 if progress else 0
        for last in tqdm(steps, desc="sampling", unit="step", total=total) if progress else steps:
            if callback is not None:
                callback(last)
    if len(last.x):
        _check_grown(first, last, sampler)
    return last.x


_GROWN = 1e3
"""Times the noise that samples begin from: what has grown more came from steps that are too long."""


def _check_grown(first: Step, last: Step, sampler: Sampler) -> None:
    """RuntimeWarning of samples that have grown far beyond what they began from."""
    begun, ended = (float(torch.linalg.vector_norm(step.x.detach().float(), math.inf)) for step in (first, last))
    if _GROWN * max(begun, float(torch.as_tensor(first.sigma).max())) < ended < math.inf:
        warnings.warn(
            f"samples have grown to {ended:.3g} from noise of {begun:.3g} at most: steps of {type(sampler).__name__} "
            "are too long for this score; take more noise levels, or check the score function",
            RuntimeWarning,
            stacklevel=4,
        )


def _restricted(score: ScoreFn, index: range) -> ScoreFn:
    """The score for these rows of the request: itself if it does not say how to restrict it."""
    bound = restricted(score, torch.arange(index.start, index.stop, device=device_of(score)))
    return score if bound is None else bound


def _parts(
    score: ScoreFn,
    x: Tensor | Shape,
    generator: torch.Generator | PerSampleNoise | None,
    mine: range,
    size: int,
) -> list[tuple[ScoreFn, Tensor | Shape, torch.Generator | PerSampleNoise | None]]:
    """What each part of a large request is sampled from: its score, its start and its noise."""
    generator = fresh_generator() if generator is None else generator
    parts: list[tuple[ScoreFn, Tensor | Shape, torch.Generator | PerSampleNoise | None]] = []
    for first in range(mine.start, max(mine.stop, mine.start + 1), size):
        index = range(first, min(first + size, mine.stop))
        begin = x[index.start : index.stop] if isinstance(x, Tensor) else (len(index), *tuple(x)[1:])
        noise = generator.rows(first) if isinstance(generator, PerSampleNoise) else generator
        parts.append((_restricted(score, index), begin, noise))
    return parts
