"""Embedded Runge-Kutta pairs with a step size of its own for every sample: Dormand-Prince 5(4), Bogacki-Shampine 3(2).

The ODE dx/dsigma = -sigma score is integrated in u = log sigma, dx/du = -sigma^2 score. Each sample keeps its own u and
step and accepts or rejects by its own error, so a stiff sample does not slow or change the others. The score sees sigma
as (B,).

Dormand and Prince, A family of embedded Runge-Kutta formulae, 1980; Bogacki and Shampine, A 3(2) pair of Runge-Kutta
formulas, 1989; continuous extension of the first: Shampine, Some practical Runge-Kutta formulas, 1986; step control:
Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, 1993, II.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from scorelab.checks import check_finite, level, nearest_name
from scorelab.predictions import denoise_from_score
from scorelab.samplers.base import Context, Sampler, State, StoppedEarly
from scorelab.scores import can_split, restricted
from scorelab.typing import ScoreFn, Tensor

__all__ = [
    "Controller",
    "Integration",
    "ProbabilityFlow",
    "advance",
    "begun",
    "check_broadcasting",
    "integrate",
    "refuse_broken",
    "rms",
]


@dataclass(frozen=True)
class Pair:
    """An embedded pair whose last stage is the next step's first: stage weights, places, error weights, weights of
    theta, theta^2, ... in its continuous extension, and 1/(q + 1) for an error estimate of order q."""

    stages: tuple[tuple[float, ...], ...]
    places: tuple[float, ...]
    error: tuple[float, ...]
    dense: tuple[tuple[float, ...], ...]
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
        (
            (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
            (
                -8048581381 / 2820520608,
                0.0,
                131558114200 / 32700410799,
                -1754552775 / 470086768,
                127303824393 / 49829197408,
                -282668133 / 205662961,
                40617522 / 29380423,
            ),
            (
                8663915743 / 2820520608,
                0.0,
                -68118460800 / 10900136933,
                14199869525 / 1410260304,
                -318862633887 / 49829197408,
                2019193451 / 616988883,
                -110615467 / 29380423,
            ),
            (
                -12715105075 / 11282082432,
                0.0,
                87487479700 / 32700410799,
                -10690763975 / 1880347072,
                701980252875 / 199316789632,
                -1453857185 / 822651844,
                69997945 / 29380423,
            ),
        ),
        1 / 5,
        5,
    ),
    "bosh3": Pair(
        ((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
        (1 / 2, 3 / 4, 1.0),
        (-5 / 72, 1 / 12, 1 / 9, -1 / 8),
        ((1.0, 0.0, 0.0, 0.0), (-4 / 3, 1.0, 4 / 3, -1.0), (5 / 9, -2 / 3, -8 / 9, 1.0)),
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


def rms(error: Tensor) -> Tensor:
    """Root mean square of each row."""
    return error.square().mean(1).sqrt()


@dataclass
class Integration:
    """A solve under way: y (B, N) and its slope at ``done`` (B,), the next step sizes, what was accepted and rejected.

    ``last`` is the step by which each sample passed the wanted point, for ``at``; None before any was wanted.
    """

    y: Tensor
    slope: Tensor
    done: Tensor
    width: Tensor
    accepted: Tensor
    rejected: Tensor
    last: tuple[Tensor, ...] | None = None

    def copy(self) -> Integration:
        """The same in memory of its own."""
        return Integration(
            self.y.clone(),
            self.slope.clone(),
            self.done.clone(),
            self.width.clone(),
            self.accepted.clone(),
            self.rejected.clone(),
            None if self.last is None else tuple(t.clone() for t in self.last),
        )

    def at(self, place: float) -> Tensor:
        """y (B, N) at the distance ``place`` that every sample has reached, inside its last step."""
        if self.last is None or bool((self.done == place).all()):
            return self.y.clone()
        before, done, h, *terms = self.last
        theta = ((place - done) / h).unsqueeze(1)
        inside = before + sum(theta ** (k + 1) * term for k, term in enumerate(terms))
        return torch.where((self.done == place).unsqueeze(1), self.y, inside)


def begun(y: Tensor, slope: Tensor, span: float, width: Tensor | None = None) -> Integration:
    """A solve of length ``span`` before its first step, for y (B, N) with slope (B, N)."""
    wide = torch.full((len(y),), min(0.05, span), dtype=y.dtype, device=y.device) if width is None else width
    none = torch.zeros(len(y), dtype=torch.long, device=y.device)
    return Integration(y.clone(), slope.clone(), none.to(y), wide.clone(), none, none.clone())


def integrate(
    field: Field, y: Tensor, begin: float, end: float, control: Controller, *, norm: Norm = rms, split: bool = False
) -> Integration:
    """Solve dy/du = field from u = begin to end for every row of y (B, N).

    With ``split`` the field is given only the rows that still move; otherwise it always sees the whole batch, and
    finished rows stand still. Raises RuntimeError when a sample needs more than ``control.max_steps`` steps, ValueError
    when its error is not finite.
    """
    slope = field(y, torch.full_like(y[:, 0], begin), torch.arange(len(y), device=y.device))
    run = begun(y, slope, abs(end - begin))
    advance(run, field, begin, end, control, norm=norm, split=split)
    return run


def advance(
    run: Integration,
    field: Field,
    begin: float,
    end: float,
    control: Controller,
    *,
    wanted: float | None = None,
    norm: Norm = rms,
    split: bool = False,
    go: Callable[[], bool] = lambda: True,
) -> bool:
    """Let every sample step on until it is ``wanted`` (by default the whole) away from begin; False if ``go`` said no.

    Steps are cut short by the end only: those that pass ``wanted`` are kept for ``Integration.at``.
    """
    pair, span = PAIRS[control.method], abs(end - begin)
    until, sign = span if wanted is None else wanted, 1.0 if end > begin else -1.0
    everything = torch.arange(len(run.y), device=run.y.device)
    # a step that would leave less than this is stretched to the end, so that rounding leaves no sliver
    sliver = 1e-3 * torch.finfo(run.y.dtype).eps ** 0.5
    for _ in range(control.max_steps):
        moving = (run.done < until).nonzero().flatten()
        if len(moving) == 0:
            return True
        if not go():
            return False
        index = moving if split else everything
        y, slope, done, width = run.y[index], run.slope[index], run.done[index], run.width[index]
        left = span - done
        h = torch.minimum(width, left)
        final = left - h <= sliver * span
        h = torch.where(final, left, h)
        slopes, proposal, error = _stages(pair, field, y, slope, begin + sign * done, sign * h, index)
        # step sizes are not differentiated through
        scale = control.atol + control.rtol * torch.maximum(y.abs(), proposal.abs()).detach()
        size = norm(error.detach() / scale)
        active = done < until
        refuse_broken(size, active, index)
        accept = active & (size <= 1)
        factor = (0.9 * size.clamp_min(1e-10) ** -pair.exponent).clamp(0.2, 5.0)
        factor = torch.where(accept, factor, factor.clamp_max(1.0))
        # a last step is cut short by the end: it says little about the width
        grown = torch.where(accept & final, torch.maximum(h * factor, width), h * factor)
        run.width[index] = torch.where(active, grown, width)
        taken = accept.unsqueeze(1)
        run.y[index] = torch.where(taken, proposal, y)
        run.slope[index] = torch.where(taken, slopes[-1], slope)
        run.done[index] = torch.where(accept, torch.where(final, torch.full_like(left, span), done + h), done)
        run.accepted[index] += accept.long()
        run.rejected[index] += (active & ~accept).long()
        if until < span:
            step = sign * h.unsqueeze(1)
            terms = [step * sum(w * k for w, k in zip(row, slopes, strict=True) if w) for row in pair.dense]
            new = (y, done, torch.where(h > 0, h, 1.0), *terms)
            run.last = tuple(t.clone() for t in new) if run.last is None else run.last
            for kept, value in zip(run.last, new, strict=True):
                kept[index] = torch.where(accept.reshape(-1, *[1] * (value.ndim - 1)), value, kept[index])
    late = (run.done < until).nonzero().flatten()
    if len(late):
        raise RuntimeError(
            f"the adaptive solver needed more than max_steps = {control.max_steps} steps for sample {int(late[0])}, at "
            f"sigma = {math.exp(begin + sign * float(run.done[late[0]])):.4g}: raise max_steps, loosen rtol and atol, "
            "or check the score there"
        )
    return True


def refuse_broken(size: Tensor, active: Tensor, index: Tensor) -> None:
    """ValueError naming the first sample of ``index`` that is active and whose error is not finite."""
    broken = active & ~torch.isfinite(size)
    if bool(broken.any()):
        sample = int(index[broken.nonzero().flatten()[0]])
        raise ValueError(
            f"the score is not finite at sample {sample}; expected finite values: check the score function"
        )


def _stages(
    pair: Pair, field: Field, y: Tensor, slope: Tensor, u: Tensor, h: Tensor, index: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """All slopes of a step (the last at its end), its end, and its error."""
    slopes, step = [slope], h.unsqueeze(1)
    point = y
    for weights, place in zip(pair.stages, pair.places, strict=True):
        point = y + step * sum((w * k for w, k in zip(weights, slopes, strict=True) if w), torch.zeros_like(y))
        slopes.append(field(point, u + place * h, index))
    error = step * sum((w * k for w, k in zip(pair.error, slopes, strict=True) if w), torch.zeros_like(y))
    return slopes, point, error


def check_broadcasting(score: ScoreFn, x: Tensor, sigma: float, other: float) -> Tensor:
    """The score at a 0-dim sigma, after comparing rows at both of two 0-dim levels with those at (B,) levels.

    Of the (B,) levels every second is ``other``, so that a score that reads one level for all, or lets sigma broadcast
    along a wrong axis of the same length, shows. 3 evaluations, of a single sample 2.

    Raises ValueError, naming ``scorelab.broadcast``, where the two forms differ.
    """
    # a score may use the memory of its last output again
    one = score(x, level(sigma, x)).clone()
    check_finite(one, "the score", "check the score function")
    expected = one[:3].detach().clone()
    if len(x) > 1:
        expected[1] = score(x, level(other, x))[1].detach()
    try:
        levels = level(sigma, x).repeat(len(x))
        levels[1::2] = other
        each = score(x, levels)[:3].detach()
    except RuntimeError as error:
        raise ValueError(_BROADCAST.format(f"it failed for sigma of shape ({len(x)},): {error}")) from error
    for mine, whole in zip(each, expected, strict=True):
        if not torch.allclose(whole, mine, rtol=1e-3, atol=1e-3 * float(whole.abs().max()), equal_nan=True):
            raise ValueError(_BROADCAST.format("the two results differ"))
    return one


_BROADCAST = (
    "this solver gives every sample its own noise level, sigma (B,), but the score function treats that differently "
    "from one level for all: {}. Inside the function multiply by scorelab.broadcast(sigma, x) instead of sigma"
)


@dataclass
class _Under:
    """What ProbabilityFlow remembers: the least positive level, evaluations made, and the solve since ``begin``."""

    end: float
    nfe: int = 0
    begin: float = 0.0
    run: Integration | None = None
    x: Tensor | None = None


@dataclass(frozen=True)
class ProbabilityFlow(Sampler):
    """The probability-flow ODE to a tolerance: error control per sample, by ``method`` "dopri5" or "bosh3".

    Steps ignore the grid: its inner levels are reported from the pairs' continuous extensions and change no sample's
    steps, so [sigma_max, sigma_min, 0] does, and a long grid may be left at any level. A step to 0 denoises. ``nfe``
    counts evaluations of the whole batch: it follows the slowest sample on the way to every level.

    max_nfe: stop before an evaluation more than these would be made (a corrector's own are not counted). The last
    ``Step`` then holds every sample where it stands, with ``sigma`` (B,) its levels, and a RuntimeWarning says so.
    max_steps: a sample that tries more steps than these between two levels is a RuntimeError.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 1000
    method: str = "dopri5"
    max_nfe: int | None = None

    def __post_init__(self) -> None:
        Controller(self.rtol, self.atol, self.max_steps, self.method)
        # three to compare the forms of sigma, and a step
        least = 3 + len(PAIRS[self.method].places)
        if self.max_nfe is not None and self.max_nfe < least:
            raise ValueError(f"max_nfe is {self.max_nfe}; expected None or at least {least}: a start and one step")

    @property
    def order(self) -> int:  # type: ignore[override]
        """That of the pair's solution: 5 or 3."""
        return PAIRS[self.method].order

    def init(self, x: Tensor, sigmas: list[float]) -> State:
        return _Under([s for s in sigmas if s > 0][-1])

    def step(self, at: Context) -> tuple[Tensor, State]:
        score, x, sigma, sigma_next, state, _ = at
        known, most = replace(state), math.inf if self.max_nfe is None else self.max_nfe
        known.run = None if known.run is None else known.run.copy()
        if sigma_next == 0:
            if known.nfe + 1 > most:
                raise StoppedEarly(x, torch.full_like(x.flatten(1)[:, 0], sigma))
            return denoise_from_score(score(x, level(sigma, x)), x, sigma), state
        split = can_split(score)

        def field(y: Tensor, u: Tensor, index: Tensor) -> Tensor:
            part = restricted(score, index) if split and len(index) < len(x) else score
            assert part is not None
            sigmas = u.exp()
            known.nfe += 1
            return -(sigmas.unsqueeze(1) ** 2) * part(y.reshape(-1, *x.shape[1:]), sigmas).flatten(1)

        if known.x is not x:
            # the first step, or x was changed since (by a corrector): from here anew
            known.begin, span = sigma, math.log(sigma / known.end)
            if known.run is None:
                known.nfe += 3 if len(x) > 1 else 2
                first = check_broadcasting(score, x, sigma, math.sqrt(sigma * sigma_next))
                known.run = begun(x.flatten(1), -(sigma**2) * first.flatten(1), span)
            elif known.nfe + 1 > most:
                raise StoppedEarly(x, torch.full_like(x.flatten(1)[:, 0], sigma))
            else:
                y = x.flatten(1)
                slope = field(y, torch.full_like(y[:, 0], math.log(sigma)), torch.arange(len(y), device=y.device))
                known.run = begun(y, slope, span, known.run.width)
        assert known.run is not None
        begin, end = math.log(known.begin), math.log(known.end)
        wanted = begin - end if sigma_next == known.end else math.log(known.begin / sigma_next)
        arrived = advance(
            known.run,
            field,
            begin,
            end,
            Controller(self.rtol, self.atol, self.max_steps, self.method),
            wanted=wanted,
            split=split,
            go=lambda: known.nfe + len(PAIRS[self.method].places) <= most,
        )
        if not arrived:
            raise StoppedEarly(known.run.y.reshape(x.shape), known.begin * torch.exp(-known.run.done))
        known.x = known.run.at(wanted).reshape(x.shape)
        return known.x, known
