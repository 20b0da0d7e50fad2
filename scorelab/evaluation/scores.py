"""Is this function the score of this data?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from scorelab.checks import call, check_batch, check_finite, check_output, check_sigmas, level
from scorelab.distributions.mixture import squared_distances
from scorelab.processes import VP, Cosine, Flow, Process
from scorelab.typing import ScoreFn, Tensor

__all__ = ["Report", "check_score"]

_MOST = 1000
"""Points of the data that are noised, and compared with each other."""
_FLOOR = 0.05
"""An error of eps, as a share of the zero predictor's, that is no fault: at large sigma far less can be achieved."""
_UNLIKE = 3.0
"""A relative error above which an output is none of these."""
_GAIN = 0.95
"""How far below that of an output of 0 the error of a reading lies that is taken for one."""
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError)
Inputs = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_READINGS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "score": lambda out, x, sigma: -sigma * out,
    "minus the score": lambda out, x, sigma: sigma * out,
    "eps": lambda out, x, sigma: out,
    "minus eps": lambda out, x, sigma: -out,
    "the denoised sample x0_hat": lambda out, x, sigma: (x - out) / sigma,
    "sigma^2 * score": lambda out, x, sigma: -out / sigma,
    "v": lambda out, x, sigma: (sigma * x + math.hypot(1, sigma) * out) / (1 + sigma**2),
    "minus v": lambda out, x, sigma: (sigma * x - math.hypot(1, sigma) * out) / (1 + sigma**2),
    "flow, eps - x0": lambda out, x, sigma: (x + out) / (1 + sigma),
    "flow, x0 - eps": lambda out, x, sigma: (x - out) / (1 + sigma),
}
"""eps_hat if the output is what the name says."""
_REMEDIES = {
    "minus the score": "lambda x, sigma: -fn(x, sigma)",
    "eps": "lambda x, sigma: -fn(x, sigma) / scorelab.broadcast(sigma, x)",
    "minus eps": "lambda x, sigma: fn(x, sigma) / scorelab.broadcast(sigma, x)",
    "the denoised sample x0_hat": "scorelab.from_denoiser(fn)",
    "sigma^2 * score": "lambda x, sigma: fn(x, sigma) / scorelab.broadcast(sigma, x) ** 2",
}


def _inputs() -> dict[str, Inputs]:
    """What a function that is no score of (x, sigma) may have been made for."""
    found: dict[str, Inputs] = {
        "x / sqrt(1 + sigma^2), sigma": lambda x, s: (x * torch.rsqrt(1 + s**2), s),
        "x, log(sigma)": lambda x, s: (x, s.log()),
        "x, log(sigma)/4": lambda x, s: (x, s.log() / 4),
    }
    for name, process in (("VP", VP()), ("Cosine", Cosine()), ("Flow", Flow())):

        def scaled(
            x: Tensor, s: Tensor, to: Callable[[Tensor], Tensor], process: Process = process
        ) -> tuple[Tensor, Tensor]:
            t = process.time(s).clamp(process.t_min, process.t_max)
            return process.alpha(t) * x, to(t).expand(len(x))

        found[f"alpha x, t of {name}"] = partial(scaled, to=lambda t: t)
        found[f"alpha x, 999 t of {name}"] = partial(scaled, to=lambda t: 999 * t)
        found[f"alpha x, 1 - t of {name}"] = partial(scaled, to=lambda t: 1 - t)
    return found


@dataclass(frozen=True)
class Report:
    """What ``check_score`` found: the relative error of each reading (1: as good as can be), the best of them ("" if it
    is none), and why it is not the score, in words, at noise levels where it is not. called: the inputs with which it
    is that reading, "" for (x, sigma).
    """

    errors: dict[str, float]
    best: str
    ok: bool
    faults: dict[float, str] = field(default_factory=dict)
    called: str = ""

    def __str__(self) -> str:
        verdict = f"it looks like {self.best}" if self.best != "score" else "it is not the score of this data"
        if not self.best:
            verdict = (
                "it is none of these: check what it takes, its scale, and that this is the data it was trained on (of "
                "a model with a codec, model.encode(data))"
            )
        elif self.best in _REMEDIES and not self.called:
            verdict += f": {_REMEDIES[self.best]} makes it a score"
        if self.called:
            verdict += f" where it is called with ({self.called}): see scorelab.from_eps, from_time_score, ScoreModel"
        lines = [f"check_score: {'it is the score' if self.ok else verdict}"]
        lines += [f"  {name:<28} relative error {error:.3g}" for name, error in self.errors.items()]
        lines += ["  (about 1 is the least error that can be reached on these points, 0 is never reached)"]
        # of another reading they would be faults of a score that it is not
        faults = self.faults if self.best in ("score", "") and not self.called else {}
        return "\n".join([*lines, *(f"  at sigma = {sigma:.3g} {said}" for sigma, said in faults.items())])


def check_score(
    fn: ScoreFn,
    x0: Tensor,
    *,
    sigma_min: float,
    sigma_max: float,
    tolerance: float = 0.5,
    generator: torch.Generator | None = None,
) -> Report:
    """Compare a function with what a score of the data x0 (N, *D) must return, and name what it returns instead.

    At 8 noise levels from sigma_min to sigma_max at most 1,000 points of the data are noised, x = x0 + sigma eps, and
    the output is read in several ways as a prediction of eps. For the score two things hold at every level, however
    little of eps can be predicted there: its squared error is the least possible, so not above that of the optimal
    denoiser of the other points, and E[eps eps_hat] = E[eps_hat^2], so eps over eps_hat has the slope 1. ``errors`` are
    relative to the former. ``ok`` says that "score" is the best reading and that at no level the error or,
    significantly, the slope is off by more than ``tolerance``. A function that is nothing known is also called with
    scaled inputs, with times of VP, cosine and flow processes, reversed and times 999, and with logarithms of sigma.

    Raises ValueError or TypeError for data, levels and outputs that don't fit.
    """
    check_batch(x0, "x0")
    check_finite(x0, "x0")
    check_sigmas([sigma_max, sigma_min])
    if len(x0) < 2:
        raise ValueError(f"x0 has {len(x0)} points; expected at least 2, better hundreds")
    generator = torch.Generator(x0.device).manual_seed(0) if generator is None else generator
    if len(x0) > _MOST:
        x0 = x0[torch.randperm(len(x0), generator=generator, device=generator.device)[:_MOST].to(x0.device)]
    points = []
    for i in range(8):
        sigma = sigma_min * (sigma_max / sigma_min) ** (i / 7)
        eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=generator.device).to(x0.device)
        x = x0 + sigma * eps
        points.append((sigma, eps, x, min(1.0, _error(eps, _from_others(x, x0, sigma)))))

    def outputs(inputs: Inputs) -> list[Tensor]:
        found = []
        for sigma, _, x, _ in points:
            with torch.no_grad():
                at, label = inputs(x, level(sigma, x))
                found.append(check_output(call(fn, at, label), x, label))
        return found

    def errors(found: list[Tensor]) -> dict[str, float]:
        return {
            name: sum(
                (_error(eps, read(out, x, sigma)) + _FLOOR) / (achievable + _FLOOR) / 8
                for out, (sigma, eps, x, achievable) in zip(found, points, strict=True)
            )
            for name, read in _READINGS.items()
        }

    refused: Exception | None = None
    plain, totals, called = [], dict.fromkeys(_READINGS, math.inf), ""
    try:
        plain = outputs(lambda x, s: (x, s))
        totals = errors(plain)
    except _REFUSALS as error:
        refused = error
    # by some readings an output of 0 is not bad: of a small output that says nothing
    empty = errors([torch.zeros_like(x) for _, _, x, _ in points])
    best = min(totals, key=lambda name: totals[name])
    faults = {}
    for out, (sigma, eps, _, achievable) in zip(plain, points, strict=False):
        if said := _fault(eps, -sigma * out, achievable, tolerance):
            faults[sigma] = said
    if not totals[best] < min(_UNLIKE, _GAIN * empty[best]):
        best = ""
        for name, inputs in _inputs().items():
            try:
                others = errors(outputs(inputs))
            except _REFUSALS:
                # it does not take such
                continue
            nearest = min(others, key=lambda reading: others[reading])
            if others[nearest] < min(_UNLIKE, _GAIN * empty[nearest], totals.get(best, math.inf)):
                totals, best, called = others, nearest, name
    if refused is not None and not best:
        raise refused
    return Report(totals, best, best == "score" and not faults and not called, faults, called)


def _error(eps: Tensor, eps_hat: Tensor) -> float:
    """Mean squared, infinite where it is not a number."""
    found = float((eps_hat - eps).square().mean())
    return found if math.isfinite(found) else math.inf


def _from_others(x: Tensor, x0: Tensor, sigma: float) -> Tensor:
    """eps_hat of x (N, *D), each by the optimal denoiser of all points of x0 but its own."""
    logits = -squared_distances(x.flatten(1), x0.flatten(1)) / (2 * sigma**2)
    weights = torch.softmax(logits.fill_diagonal_(-math.inf), 1)
    centre = x0.flatten(1).mean(0)
    return (x - (centre + weights @ (x0.flatten(1) - centre)).reshape(x.shape)) / sigma


def _fault(eps: Tensor, eps_hat: Tensor, achievable: float, tolerance: float) -> str:
    """What is wrong with eps_hat at a level, in words; nothing if nothing is."""
    error = _error(eps, eps_hat)
    if error + _FLOOR > (1 + tolerance) * (achievable + _FLOOR):
        return f"its error in eps is {error:.3g} where {achievable:.3g} can be reached"
    products, squares = ((a * eps_hat).flatten(1).double().sum(1) for a in (eps, eps_hat))
    gap = products - squares
    slope = float(products.sum() / squares.sum().clamp_min(1e-300))
    significant = abs(float(gap.sum())) > 4 * float(gap.std()) * math.sqrt(len(gap))
    if significant and not 1 / (1 + tolerance) < slope < 1 + tolerance:
        return f"eps is {slope:.3g} times what it predicts"
    return ""
