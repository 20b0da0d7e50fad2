"""Embedded Runge-Kutta pairs with a step size of its own for every sample: Dormand-Prince 5(4), Bogacki-Shampine 3(2).

The ODE dx/dsigma = -sigma score is integrated in u = log sigma, dx/du = -sigma^2 score. Each sample keeps its own u and
step and accepts or rejects by its own error, so a stiff sample does not slow or change the others. The score sees sigma
as (B,).

Dormand and Prince, A family of embedded Runge-Kutta formulae, 1980; Bogacki and Shampine, A 3(2) pair of Runge-Kutta
formulas, 1989; step control: Hairer, Norsett and Wanner, Solving
Ordinary Differential Equations I, 1993, II.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from scorelab.checks import check_finite, level, nearest_name, rows
from scorelab.predictions import denoise_from_score
from scorelab.samplers.base import Sampler, State
from scorelab.typing import ScoreFn, Tensor

__all__ = ["Controller", "Integration", "ProbabilityFlow", "check_broadcasting", "integrate"]


@dataclass(frozen=True)
class Pair:
    """An embedded pair whose last stage is the next step's first: stage weights, places, error weights, and 1/(q + 1)
    for an error estimate of order q."""

    stages: tuple[tuple[float, ...], ...]
    places: tuple[float, ...]
    error: tuple[float, ...]
    exponent: float
    order: int


PAIRS = {
    "dopri5": Pair(
        (
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
        (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
        1 / 5,
        5,
    ),
    "bosh3": Pair(
        ((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
        (1 / 2, 3 / 4, 1.0),
        (-5 / 72, 1 / 12, 1 / 9, -1 / 8),
        1 / 3,
        3,
    ),
}

Field = Callable[[Tensor, Tensor, Tensor], Tensor]
"""dy/du = field(y (b, N), u (b,), index (b,)): ``index`` names the rows of the batch that are passed."""
Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Controller:
    """Error tolerance rtol |y| + atol in root mean square; ``max_steps`` bounds the tried steps of any sample.

    ``method`` names the pair, "dopri5" or "bosh3".
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 1000
    method: str = "dopri5"

    def __post_init__(self) -> None:
        if not (self.rtol >= 0 and self.atol >= 0 and self.rtol + self.atol > 0) or self.max_steps < 1:
            raise ValueError(
                f"rtol = {self.rtol:g}, atol = {self.atol:g}, max_steps = {self.max_steps}; expected tolerances >= 0, "
                "not both 0, and max_steps >= 1"
            )
        if self.method not in PAIRS:
            raise ValueError(f"method is {self.method!r}; {nearest_name(self.method, PAIRS)}")


@dataclass
class Integration:
    """y (B, N) at the end, each sample's next step size, and how many steps it accepted and rejected, all (B,)."""

    y: Tensor
    width: Tensor
    accepted: Tensor
    rejected: Tensor


def rms(error: Tensor) -> Tensor:
    """Root mean square of each row."""
    return error.square().mean(1).sqrt()


def integrate(
    field: Field,
    y: Tensor,
    begin: float,
    end: float,
    control: Controller,
    *,
    width: Tensor | None = None,
    first: Tensor | None = None,
    norm: Norm = rms,
    split: bool = False,
) -> Integration:
    """Solve dy/du = field from u = begin to end for every row of y (B, N).

    ``width`` are step sizes to begin with, ``first`` the field at begin if known. With ``split`` the field is given
    only the rows that still move; otherwise it always sees the whole batch, and finished rows stand still.
    Raises RuntimeError when a sample needs more than ``control.max_steps`` steps, ValueError when its
    error is not finite.
    """
    pair, count, span = PAIRS[control.method], len(y), abs(end - begin)
    sign = 1.0 if end > begin else -1.0
    result = Integration(
        y.clone(),
        torch.full((count,), min(0.05, span), dtype=y.dtype, device=y.device) if width is None else width.clone(),
        torch.zeros(count, dtype=torch.long, device=y.device),
        torch.zeros(count, dtype=torch.long, device=y.device),
    )
    done = torch.zeros(count, dtype=y.dtype, device=y.device)
    everything = torch.arange(count, device=y.device)
    slope = field(y, torch.full_like(done, begin), everything) if first is None else first.clone()
    # a step that would leave less than this is stretched to the end, so that rounding leaves no sliver
    sliver = 1e-3 * torch.finfo(y.dtype).eps ** 0.5
    for _ in range(control.max_steps):
        moving = (done < span).nonzero().flatten()
        if len(moving) == 0:
            return result
        index = moving if split else everything
        left = span - done[index]
        h = torch.minimum(result.width[index], left)
        last = left - h <= sliver * span
        h = torch.where(last, left, h)
        proposal, error, end_slope = _stages(
            pair, field, result.y[index], slope[index], begin + sign * done[index], sign * h, index
        )
        # step sizes are not differentiated through
        scale = control.atol + control.rtol * torch.maximum(result.y[index].abs(), proposal.abs()).detach()
        size = norm(error.detach() / scale)
        active = left > 0
        _refuse_broken(size, active, index)
        accept = active & (size <= 1)
        factor = (0.9 * size.clamp_min(1e-10) ** -pair.exponent).clamp(0.2, 5.0)
        factor = torch.where(accept, factor, factor.clamp_max(1.0))
        # the last step is cut short by the end: it must not shrink the next interval's first step
        grown = torch.where(accept & last, torch.maximum(h * factor, result.width[index]), h * factor)
        result.width[index] = torch.where(active, grown, result.width[index])
        result.y[index] = torch.where(accept.unsqueeze(1), proposal, result.y[index])
        slope[index] = torch.where(accept.unsqueeze(1), end_slope, slope[index])
        ended = torch.where(last, torch.full_like(left, span), done[index] + h)
        done[index] = torch.where(accept, ended, done[index])
        result.accepted[index] += accept.long()
        result.rejected[index] += (active & ~accept).long()
    late = int((done < span).nonzero().flatten()[0]) if bool((done < span).any()) else -1
    if late >= 0:
        raise RuntimeError(
            f"the adaptive solver needed more than max_steps = {control.max_steps} steps for sample {late}, at "
            f"sigma = {math.exp(begin + sign * float(done[late])):.4g}: raise max_steps, loosen rtol and atol, or "
            "check the score there"
        )
    return result


def _refuse_broken(size: Tensor, active: Tensor, index: Tensor) -> None:
    broken = active & ~torch.isfinite(size)
    if bool(broken.any()):
        sample = int(index[broken.nonzero().flatten()[0]])
        raise ValueError(
            f"the score is not finite at sample {sample}; expected finite values: check the score function"
        )


def _stages(
    pair: Pair, field: Field, y: Tensor, slope: Tensor, u: Tensor, h: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    slopes, step = [slope], h.unsqueeze(1)
    point = y
    for weights, place in zip(pair.stages, pair.places, strict=True):
        point = y + step * sum((w * k for w, k in zip(weights, slopes, strict=True) if w), torch.zeros_like(y))
        slopes.append(field(point, u + place * h, index))
    error = step * sum((w * k for w, k in zip(pair.error, slopes, strict=True) if w), torch.zeros_like(y))
    return point, error, slopes[-1]


def check_broadcasting(score: ScoreFn, x: Tensor, sigma: float, other: float) -> Tensor:
    """The score at a 0-dim sigma, after comparing its first three rows with those at (B,) levels (2 evaluations).

    Every second of the (B,) levels is ``other``: a sigma that broadcasts along a wrong axis of the same length shows.

    Raises ValueError, naming ``scorelab.broadcast``, where the two forms differ.
    """
    one = score(x, level(sigma, x))
    check_finite(one, "the score", "check the score function")
    try:
        levels = level(sigma, x).repeat(len(x))
        levels[1::2] = other
        each = score(x, levels)
    except RuntimeError as error:
        raise ValueError(_BROADCAST.format(f"it failed for sigma of shape ({len(x)},): {error}")) from error
    some = one[:3:2].detach()
    if not torch.allclose(some, each[:3:2].detach(), rtol=1e-3, atol=1e-3 * float(some.abs().max()), equal_nan=True):
        raise ValueError(_BROADCAST.format("the two results differ"))
    return one


_BROADCAST = (
    "this solver gives every sample its own noise level, sigma (B,), but the score function treats that differently "
    "from one level for all: {}. Inside the function multiply by scorelab.broadcast(sigma, x) instead of sigma"
)


@dataclass(frozen=True)
class ProbabilityFlow(Sampler):
    """The probability-flow ODE to a tolerance: error control per sample, by ``method`` "dopri5" or "bosh3".

    The grid gives only the points that are reported: [sigma_max, sigma_min, 0] will do. ``nfe`` counts evaluations of
    the whole batch: it follows the sample that needs the most. A step to 0 denoises.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 1000
    method: str = "dopri5"

    def __post_init__(self) -> None:
        Controller(self.rtol, self.atol, self.max_steps, self.method)

    @property
    def order(self) -> int:  # type: ignore[override]
        """That of the pair's solution: 5 or 3."""
        return PAIRS[self.method].order

    def step(
        self,
        score: ScoreFn,
        x: Tensor,
        sigma: float,
        sigma_next: float,
        state: State,
        noise: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, State]:
        if sigma_next == 0:
            return denoise_from_score(score(x, level(sigma, x)), x, sigma), state
        if state is None:
            slope, width = (
                (-(sigma**2) * check_broadcasting(score, x, sigma, math.sqrt(sigma * sigma_next))).flatten(1),
                None,
            )
        else:
            slope, width = None, state.width
        split = hasattr(score, "rows")

        def field(y: Tensor, u: Tensor, index: Tensor) -> Tensor:
            part = rows(score, index) if split and len(index) < len(x) else score
            assert part is not None
            sigmas = u.exp()
            return -(sigmas.unsqueeze(1) ** 2) * part(y.reshape(-1, *x.shape[1:]), sigmas).flatten(1)

        control = Controller(self.rtol, self.atol, self.max_steps, self.method)
        result = integrate(
            field,
            x.flatten(1),
            math.log(sigma),
            math.log(sigma_next),
            control,
            width=width,
            first=slope,
            split=split,
        )
        return result.y.reshape(x.shape), result
