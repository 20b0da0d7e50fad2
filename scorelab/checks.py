"""Input checks, made once at public entrances: each error says what came, what was expected, what to do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch

from scorelab.typing import Tensor

__all__ = [
    "broadcast",
    "call",
    "check_batch",
    "check_finite",
    "check_output",
    "check_range",
    "check_sigmas",
    "checked_device",
    "doubled",
    "explained",
    "level",
    "level_of",
    "marked",
    "nearest_name",
    "widened",
]


_HALF = (torch.float16, torch.bfloat16)


def broadcast(sigma: Tensor | float, x: Tensor) -> Tensor:
    """Give sigma, () or (B,), the shape that multiplies x (B, *D) sample by sample: () or (B, 1, ..., 1).

    For x in half precision it is float32 with all of x's dimensions: products are then made in float32, where sigma^2
    neither overflows nor is rounded to three digits.

    Raises ValueError for a sigma of any other shape, TypeError for an x that is not floating point.
    """
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; expected a floating-point tensor: convert it with x.float()")
    if not isinstance(sigma, Tensor):
        sigma = level(sigma, x)
    if sigma.ndim == 0:
        return sigma if x.dtype not in _HALF else sigma.float().reshape((1,) * x.ndim)
    if sigma.shape != x.shape[:1]:
        raise ValueError(
            f"sigma has shape {tuple(sigma.shape)} for x of shape {tuple(x.shape)}; expected () or "
            f"({x.shape[0] if x.ndim else 'B'},): pass one noise level, or one a sample"
        )
    sigma = sigma.reshape(-1, *(1,) * (x.ndim - 1))
    return sigma if x.dtype not in _HALF else sigma.float()


def checked_device(device: torch.device | str) -> torch.device:
    """A device that is there; ValueError for any other."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; expected 'cpu', 'cuda', 'cuda:1' or 'mps'") from error
    try:
        # numbers are put there and read: "meta" has none
        torch.zeros((), device=found).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device is {str(device)!r}, but PyTorch {torch.__version__} finds none here; expected 'cpu', or a PyTorch "
            "that is built for the GPU, and its driver"
        ) from error
    return found


def level(sigma: float, x: Tensor) -> Tensor:
    """A noise level, 0-dim, in x's dtype (float32 at least) on x's device, made there (no synchronisation)."""
    return marked(torch.full((), sigma, dtype=torch.float32 if x.dtype in _HALF else x.dtype, device=x.device), sigma)


def marked(sigma: Tensor, value: float) -> Tensor:
    """A 0-dim noise level that says its value, for ``level_of``."""
    sigma.scorelab_level = value  # type: ignore[attr-defined]
    return sigma


def level_of(sigma: Tensor) -> float | None:
    """The value of one noise level for all, where that takes no synchronisation; else None."""
    if sigma.ndim:
        return None
    known: float | None = getattr(sigma, "scorelab_level", None)
    return float(sigma) if known is None and sigma.device.type == "cpu" else known


def widened(x: Tensor) -> Tensor:
    """x in float32 if it is in half precision."""
    return x.float() if x.dtype in _HALF else x


def doubled(x: Tensor) -> Tensor:
    """x in double precision, on the CPU where its device has none (Apple's GPUs)."""
    return x.to("cpu" if x.device.type == "mps" else x.device).double()


def check_batch(x: Tensor, what: str = "x", shape: Sequence[int] | None = None) -> None:
    """Refuse what is not a floating-point batch (B, *D), or not of the given data shape."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{what} is {type(x).__name__}; expected a torch.Tensor: wrap it with torch.as_tensor")
    if not x.is_floating_point():
        raise TypeError(f"{what} has dtype {x.dtype}; expected floating point: convert it with {what}.float()")
    if x.ndim < 2:
        raise ValueError(
            f"{what} has shape {tuple(x.shape)}; expected a batch (B, *D): add a dimension, e.g. {what}[None]"
        )
    if shape is not None and tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(
            f"{what} has shape {tuple(x.shape)}; expected (B, {', '.join(map(str, shape))}): "
            "reshape the data or build the model for this data_shape"
        )


def check_finite(x: Tensor, what: str, remedy: str = "remove or repair these") -> None:
    """Refuse NaN and infinity, naming the samples (costs one reduction and a synchronisation)."""
    # one reduction: infinity and NaN stay what they are in a sum
    if x.numel() == 0 or math.isfinite(float(x.detach().sum())):
        return
    bad = ~torch.isfinite(x.detach()).reshape(len(x), -1).all(1)
    if bad.any():
        index = bad.nonzero().flatten().tolist()
        raise ValueError(
            f"{what} is not finite at {len(index)} of {len(x)} samples (first: sample {index[0]}); "
            f"expected finite numbers: {remedy}"
        )


def check_range(x: Tensor, data_range: tuple[float, float], what: str = "data") -> None:
    """Refuse values outside the declared range; the message shows their minimum and maximum."""
    low, high = data_range
    least, most = float(x.min()), float(x.max())
    slack = 1e-4 * (high - low)
    if not (least >= low - slack and most <= high + slack):
        raise ValueError(
            f"{what} spans [{least:.4g}, {most:.4g}] but the declared data_range is [{low:g}, {high:g}]: "
            "rescale the data or declare its true range"
        )


def check_sigmas(sigmas: Tensor | Iterable[float], at_least: int = 1) -> list[float]:
    """Noise levels as Python floats: finite, strictly descending, positive but for a final 0.

    Raises ValueError for anything else, naming the first offending pair.
    """
    if isinstance(sigmas, Tensor):
        if sigmas.ndim != 1:
            raise ValueError(f"sigmas has shape {tuple(sigmas.shape)}; expected one dimension: a sequence of levels")
        grid = [float(s) for s in sigmas.detach().tolist()]
    elif isinstance(sigmas, (int, float)):
        raise ValueError(
            f"sigmas is {sigmas!r}, a number; expected a sequence of noise levels, such as "
            f"scorelab.sigmas.karras({max(1, round(sigmas))}, sigma_min=0.002, sigma_max=80)"
        )
    else:
        grid = [float(s) for s in sigmas]
    if len(grid) < at_least:
        raise ValueError(f"sigmas has {len(grid)} levels; expected at least {at_least}: see scorelab.sigmas")
    for s in grid:
        if not math.isfinite(s) or s < 0:
            raise ValueError(f"sigmas holds {s:g}; expected finite levels >= 0: see scorelab.sigmas")
    for i, (a, b) in enumerate(pairwise(grid)):
        if b >= a:
            raise ValueError(
                f"sigmas[{i}] = {a:g} is followed by {b:g}; expected strictly descending levels: "
                "sort them, drop repeats, or use scorelab.sigmas.geometric or karras"
            )
    if grid[0] == 0:
        raise ValueError("sigmas starts at 0; expected a positive first level: 0 may only come last")
    return grid


def call(fn: Callable[[Tensor, Tensor], Any], x: Tensor, sigma: Tensor) -> Any:
    """fn(x, sigma), with its errors explained."""
    try:
        return fn(x, sigma)
    except RuntimeError as error:
        if (said := explained(error)) is not None:
            raise said from error
        raise


def explained(error: RuntimeError) -> ValueError | None:
    """What to add to a score that differentiates inside where gradients are off; None for any other error."""
    if torch.is_grad_enabled() or "require grad" not in str(error):
        return None
    return ValueError(
        "the score differentiates inside, but gradients are off here; expected 'with torch.enable_grad(): "
        "x = x.detach().requires_grad_(True)' inside the function, around what it differentiates"
    )


def check_output(output: object, x: Tensor, sigma: Tensor | float) -> Tensor:
    """Refuse what a score function returned if it is no tensor of x's shape, dtype and device."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the score function returned {type(output).__name__}; expected a tensor of shape {tuple(x.shape)}: "
            "a network that returns more, or an object, needs an adapter (scorelab.from_eps, from_denoiser)"
        )
    if output.shape != x.shape:
        shape = tuple(sigma.shape) if isinstance(sigma, Tensor) else ()
        raise ValueError(
            f"the score function returned shape {tuple(output.shape)} for x {tuple(x.shape)} and sigma {shape}; "
            "expected the shape of x: inside the function use scorelab.broadcast(sigma, x) to give sigma x's "
            "dimensions"
        )
    if output.dtype != x.dtype and not (x.dtype in _HALF and output.dtype == torch.float32):
        raise TypeError(
            f"the score function returned {output.dtype} for x of {x.dtype}; expected the dtype of x: "
            "convert its output with .to(x.dtype), or start from x in its precision"
        )
    if output.device != x.device:
        raise ValueError(
            f"the score function returned a tensor on {output.device} for x on {x.device}; expected the device of x: "
            "move its output with .to(x.device), or give samples its device, device='cuda' for example"
        )
    return output


def nearest_name(name: str, names: Iterable[str]) -> str:
    """', did you mean ...?' with the closest known name, or the list of them."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known[:20])}" + (f", ... ({len(known)} in all)" if len(known) > 20 else "")
