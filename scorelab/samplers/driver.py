"""The public entrance to all samplers: ``trajectory`` yields every step, ``sample`` returns the last."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from tqdm.auto import tqdm

from scorelab.checks import check_finite
from scorelab.noise import PerSampleNoise
from scorelab.samplers.base import Sampler, Step, drive
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
) -> Tensor:
    """Samples (B, *D) from a score function, unscaled, at the last noise level.

    score: any callable score(x, sigma) -> (B, *D); sigma arrives as a 0-dim tensor (per sample, (B,), from adaptive
    solvers). x: a tensor (B, *D) at noise level sigmas[0], or a shape, then drawn from
    N(0, (sigmas[0]^2 + data_std^2) I). sigmas: strictly descending levels; a final 0 ends on the denoised sample; None
    only for a sampler that brings its own (Calibrated). generator: source of all randomness, freshly seeded if None; a
    PerSampleNoise makes sample i depend on (seed, i) alone. callback: called with every Step. differentiable:
    keep the graph. debug: look for NaN at every step instead of once at the end.

    Raises ValueError or TypeError for shapes, levels, dtypes or a score output that don't fit, for levels outside the
    score's ``sigma_range``, and for samples that are not finite (which are named).
    """
    steps = drive(
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
        denoised=callback is not None,
    )
    last = next(steps)
    for last in tqdm(steps, disable=not progress, desc="sampling", unit="step"):
        if callback is not None:
            callback(last)
    check_finite(last.x, "the sample")
    return last.x
