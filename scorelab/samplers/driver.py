"""The public entrance to all samplers: ``trajectory`` yields every step, ``sample`` returns the last."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from tqdm.auto import tqdm

from scorelab.checks import check_finite, rows
from scorelab.noise import PerSampleNoise, fresh_generator
from scorelab.samplers.base import Sampler, Step, check_shape, drive
from scorelab.samplers.ode import Heun
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
) -> Tensor:
    """Samples (B, *D) from a score function, unscaled, at the last noise level.

    score: any callable score(x, sigma) -> (B, *D); sigma arrives as a 0-dim tensor (per sample, (B,), from adaptive
    solvers). x: a tensor (B, *D) at noise level sigmas[0], or a shape, then drawn from
    N(0, (sigmas[0]^2 + data_std^2) I). sigmas: strictly descending levels; a final 0 ends on the denoised sample; None
    only for a sampler that brings its own (Calibrated). generator: source of all randomness, freshly seeded if None; a
    PerSampleNoise makes sample i depend on (seed, i) alone. callback: called with every Step. differentiable:
    keep the graph. debug: look for NaN at every step instead of once at the end. batch_size: run the request in parts
    of this many rows, so that memory stays bounded; a score with ``rows(index)`` is restricted to each part, any other
    must not be bound to the rows of a batch. Parts see other noise than a whole batch does, but from PerSampleNoise.

    Raises ValueError or TypeError for shapes, levels, dtypes or a score output that don't fit, for levels outside the
    score's ``sigma_range``, and for samples that are not finite (which are named).
    """
    options = {"data_std": data_std, "dtype": dtype, "device": device, "differentiable": differentiable, "debug": debug}
    if batch_size is None:
        found = _last(score, x, sigmas, sampler, generator, progress, callback, options)
    elif batch_size < 1 or callback is not None:
        raise ValueError(
            f"batch_size = {batch_size} with callback = {callback}; expected batch_size >= 1, and no callback: it "
            "would see parts of the batch"
        )
    else:
        bar = tqdm(_parts(score, x, generator, batch_size), disable=not progress, desc="sampling", unit="part")
        found = torch.cat([_last(s, part, sigmas, sampler, g, False, None, options) for s, part, g in bar])
    check_finite(found, "the sample", "check the score function there; debug=True names the first noise level")
    return found


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
    last = next(steps)
    for last in tqdm(steps, disable=not progress, desc="sampling", unit="step"):
        if callback is not None:
            callback(last)
    return last.x


def _parts(
    score: ScoreFn, x: Tensor | Shape, generator: torch.Generator | PerSampleNoise | None, size: int
) -> list[tuple[ScoreFn, Tensor | Shape, torch.Generator | PerSampleNoise | None]]:
    """What each part of a large request is sampled from: its score, its start and its noise."""
    if not isinstance(x, Tensor):
        check_shape(x)
    count = len(x) if isinstance(x, Tensor) else next(iter(x))
    generator = fresh_generator() if generator is None else generator
    parts: list[tuple[ScoreFn, Tensor | Shape, torch.Generator | PerSampleNoise | None]] = []
    for first in range(0, max(count, 1), size):
        last = min(first + size, count)
        bound = rows(score, torch.arange(first, last, device=getattr(score, "device", None)))
        begin = x[first:last] if isinstance(x, Tensor) else (last - first, *tuple(x)[1:])
        noise = generator.rows(first) if isinstance(generator, PerSampleNoise) else generator
        parts.append((score if bound is None else bound, begin, noise))
    return parts
