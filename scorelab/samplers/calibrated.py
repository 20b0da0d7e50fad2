"""Samplers fitted to one score function: noise levels and multistep coefficients that land where the exact ODE lands.

With e_i = -sigma_i score(x_i, sigma_i) the sampler is

    x_{i+1} = x_i + (sigma_{i+1} - sigma_i) sum_j w_ij e_{i-j},      i = 0 .. nfe - 1,   sigma_nfe = 0

and sigma_1 .. sigma_{nfe-1} and all w_ij are free. ``calibrate`` solves the ODE precisely from some starts and chooses
them so that the end points agree, in root mean square over dimensions, averaged over starts.

    least_squares   weights step by step by linear least squares along the reference trajectories, levels by a pattern
                    search; the score is only evaluated
    gradient        from there, levels and weights together by L-BFGS through the whole sampler; the score must be
                    differentiable

Related: Watson et al., Learning Fast Samplers for Diffusion Models, 2022, arXiv:2202.05830.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from scorelab import sigmas as levels_of
from scorelab.checks import check_batch, check_finite, check_sigmas, level
from scorelab.samplers.base import Context, Counted, Sampler, State, evaluate
from scorelab.samplers.fingerprint import Fingerprint
from scorelab.samplers.multistep import adams_weights, combine
from scorelab.samplers.ode import RK4
from scorelab.scores import check_known, restricted
from scorelab.typing import ScoreFn, Tensor
from scorelab.writing import save_json

__all__ = ["Calibrated", "calibrate", "evaluations_taken"]

_FORMAT = "scorelab.calibrated.1"
Weights = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Calibrated(Sampler):
    """A sampler with noise levels and weights of its own: ``sample(score, x, sampler=Calibrated.load(path))``.

    sigmas: nfe levels and a final 0; weights: row i holds w_i0, w_i1, ... (newest first, at most i + 1); report: how it
    was fitted and its errors; fingerprint: of the score it was fitted to: ``sample`` warns of another one.
    """

    sigmas: tuple[float, ...]
    weights: Weights
    report: dict[str, Any] = field(default_factory=dict, compare=False)
    fingerprint: Fingerprint | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        grid = check_sigmas(self.sigmas, at_least=2)
        if grid[-1] != 0 or len(self.weights) != len(grid) - 1:
            raise ValueError(
                f"{len(self.weights)} rows of weights for {len(grid)} levels ending at {grid[-1]:g}; expected levels "
                "with a final 0 and a row for each of the others"
            )
        for i, row in enumerate(self.weights):
            if not 1 <= len(row) <= i + 1 or not all(math.isfinite(w) for w in row):
                raise ValueError(f"row {i} of the weights is {row}; expected 1 to {i + 1} finite numbers")

    def verify(self, score: ScoreFn, x: Tensor) -> None:
        if self.fingerprint is not None:
            self.fingerprint.verify(score, x)

    def init(self, x: Tensor, sigmas: list[float]) -> State:
        return 0, ()

    def step(self, at: Context) -> tuple[Tensor, State]:
        score, x, sigma, sigma_next, state, _ = at
        i, values = state
        row = self.weights[i]
        # -e_i = sigma score, so the width is turned around
        values = (evaluate(score, x, sigma, scaled=True), *values)
        width = sigma - sigma_next
        x = combine(x, 1.0, values[: len(row)], tuple(width * w for w in row))
        kept = max((len(r) for r in self.weights[i + 1 :]), default=1) - 1
        return x, (i + 1, values[:kept])

    def save(self, path: str | Path) -> None:
        """Write one JSON file."""
        mark = None if self.fingerprint is None else self.fingerprint.text()
        text = {"format": _FORMAT, "sigmas": self.sigmas, "weights": self.weights, "report": self.report}
        save_json({**text, "fingerprint": mark}, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Calibrated:
        """Read what ``save`` wrote; ValueError, naming the file, for anything else."""
        try:
            found = json.loads(Path(path).read_text())
            if found.get("format") != _FORMAT:
                raise ValueError(f"its format is {found.get('format')!r}, not {_FORMAT!r}")
            weights = tuple(tuple(float(w) for w in row) for row in found["weights"])
            kept = found.get("fingerprint")
            mark = None if kept is None else Fingerprint.parse(kept)
            made = cls(tuple(float(s) for s in found["sigmas"]), weights, found["report"], mark)
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no calibrated sampler ({error}); make one with scorelab calibrate") from error
        if "fingerprint" not in found:
            warnings.warn(
                f"{path} does not say to which score it was fitted, so that can't be checked: calibrate again",
                RuntimeWarning,
                stacklevel=2,
            )
        return made


@dataclass(frozen=True)
class _Reference:
    """The ODE's solution at ascending log sigma ``u`` (n,): x and dx/du, (n, B, *D), and the denoised end (B, *D)."""

    u: np.ndarray
    x: Tensor
    slope: Tensor
    end: Tensor

    def at(self, sigma: float) -> Tensor:
        """x (B, *D) at a level, by cubic Hermite interpolation."""
        u = math.log(sigma)
        k = int(np.clip(np.searchsorted(self.u, u) - 1, 0, len(self.u) - 2))
        h = float(self.u[k + 1] - self.u[k])
        p = (u - float(self.u[k])) / h
        bend, bend_next = p * (1 - p) ** 2 * h, p * p * (p - 1) * h
        rest = p * p * (3 - 2 * p)
        return (1 - rest) * self.x[k] + rest * self.x[k + 1] + bend * self.slope[k] + bend_next * self.slope[k + 1]

    def rows(self, rows: slice) -> _Reference:
        return _Reference(self.u, self.x[:, rows], self.slope[:, rows], self.end[rows])


def _solve(score: ScoreFn, x: Tensor, sigma_min: float, sigma_max: float, steps: int, progress: bool) -> _Reference:
    grid = levels_of.log_linear(steps + 1, sigma_min=sigma_min, sigma_max=sigma_max).tolist()
    method, xs, slopes = RK4(), [], []
    for a, b in tqdm(list(pairwise(grid)), desc="reference", unit="step", disable=not progress):
        outputs: list[Tensor] = []

        def noting(y: Tensor, sigma: Tensor, outputs: list[Tensor] = outputs) -> Tensor:
            outputs.append(score(y, sigma).clone())
            return outputs[-1]

        xs.append(x)
        x, _ = method.step(Context(noting, x, a, b, None, torch.zeros_like))
        slopes.append(-(a**2) * outputs[0])
    check_finite(x, "the reference solution")
    u = np.log(np.array(grid[:-1]))
    return _Reference(u[::-1].copy(), torch.stack(xs[::-1]), torch.stack(slopes[::-1]), x)


def _error(x: Tensor, end: Tensor) -> Tensor:
    """Root mean square over dimensions, averaged over samples."""
    # the norm has a gradient of 0 at 0, where a root of a mean has none
    norms: Tensor = torch.linalg.vector_norm((x - end).flatten(1), dim=1)
    return norms.mean() / math.sqrt(x[0].numel())


def _finite(error: Tensor) -> float:
    """The error, infinite where it is not a number."""
    found = float(error)
    return found if math.isfinite(found) else math.inf


def _initial(grid: list[float], i: int, history: int) -> list[float]:
    """Weights of exponential Adams-Bashforth on eps, of order at most 3, over the step's width; Euler's to 0."""
    count = min(history, i + 1)
    if grid[i + 1] == 0:
        return [1.0] + [0.0] * (count - 1)
    past = tuple(grid[j] for j in range(i, max(-1, i - min(3, history)), -1))
    found = [w / (grid[i] - grid[i + 1]) for w in adams_weights("eps", past, grid[i + 1])]
    return found + [0.0] * (count - len(found))


def _least_squares(
    score: ScoreFn, x: Tensor, reference: _Reference, grid: list[float], history: int
) -> tuple[Weights, float]:
    """Weights that bring the sampler's own x nearest to the reference at each level, step by step, and the error."""
    values: list[Tensor] = []
    rows = []
    for i, (a, b) in enumerate(pairwise(grid)):
        values.insert(0, score(x, level(a, x)) * -a)
        prior = torch.tensor(_initial(grid, i, history), dtype=torch.float64)
        used = values[: len(prior)]
        wanted = (reference.end if b == 0 else reference.at(b)) - x
        base = torch.stack([v.flatten().cpu().double() for v in used], 1) * (b - a)
        rest = wanted.flatten().cpu().double() - base @ prior
        gram = base.T @ base
        # a ridge towards the classical weights: a ten-thousandth of a sample's weight
        ridge = 1e-7 * gram.diagonal().mean() * torch.eye(len(prior), dtype=torch.float64)
        row = prior + torch.linalg.solve(gram + ridge, base.T @ rest)
        rows.append(tuple(row.tolist()))
        x = combine(x, 1.0, tuple(used), tuple((b - a) * w for w in rows[-1]))
        del values[history:]
    return tuple(rows), _finite(_error(x, reference.end))


def _run(score: ScoreFn, x: Tensor, sampler: Calibrated) -> Tensor:
    state = sampler.init(x, [])
    for a, b in pairwise(sampler.sigmas):
        x, state = sampler.step(Context(score, x, a, b, state, torch.zeros_like))
    return x


def _search(
    fit: Callable[[list[float]], float], grids: list[list[float]], sigma_min: float, trials: int, progress: bool
) -> list[float]:
    """The best grid (first level and final 0 fixed) after ``trials`` fits: of the given, then by pattern search."""
    scored = [(fit(g), g) for g in grids[:trials]]
    best, grid = min(scored, key=lambda pair: pair[0])
    left, reach = trials - len(scored), 0.4
    with tqdm(total=max(0, left), desc="levels", unit="fit", disable=not progress) as bar:
        while left > 0 and reach > 0.01 and len(grid) > 2:
            improved = False
            for i in range(1, len(grid) - 1):
                for sign in (1, -1):
                    if left == 0:
                        break
                    below = math.log(max(grid[i + 1], sigma_min))
                    u, above = math.log(grid[i]), math.log(grid[i - 1])
                    moved = list(grid)
                    moved[i] = math.exp(u + reach * ((above - u) if sign > 0 else (below - u)))
                    left -= 1
                    bar.update()
                    error = fit(moved)
                    if error < best:
                        best, grid, improved = error, moved, True
                        break
            if not improved:
                reach /= 2
    return grid


class _Parameters:
    """Levels and weights as one vector: log shares of log(sigma_max/sigma_min) between levels, then all weights."""

    def __init__(self, grid: list[float], weights: Weights, sigma_min: float) -> None:
        self.sigma_max, self.span = grid[0], math.log(grid[0] / sigma_min)
        self.lengths = [len(row) for row in weights]
        u = [math.log(s) for s in grid[:-1]]
        gaps = [a - b for a, b in pairwise([*u, math.log(sigma_min)])]
        shares = [math.log(max(g, 1e-6 * self.span) / self.span) for g in gaps]
        self.start = np.array([*shares, *(w for row in weights for w in row)])

    def split(self, vector: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Levels with a final 0, (nfe + 1,), and the rows of weights, in float64."""
        n = len(self.lengths)
        fallen = self.span * torch.softmax(vector[:n], 0).cumsum(0)[:-1]
        sigmas = torch.cat([fallen.new_zeros(1), fallen]).neg().exp() * self.sigma_max
        return torch.cat([sigmas, sigmas.new_zeros(1)]), list(torch.split(vector[n:], self.lengths))

    def sampler(self, vector: np.ndarray) -> Calibrated:
        sigmas, rows = self.split(torch.as_tensor(vector))
        return Calibrated(tuple(sigmas.tolist()), tuple(tuple(row.tolist()) for row in rows))


def _descend(
    score: ScoreFn,
    x: Tensor,
    end: Tensor,
    begin: _Parameters,
    iterations: int,
    judge: Callable[[Calibrated], float],
    progress: bool,
) -> Calibrated:
    """L-BFGS from ``begin``; of the iterates the one that ``judge`` finds best."""
    best = begin.sampler(begin.start)
    best_error = judge(best)

    def loss(vector: np.ndarray) -> tuple[float, np.ndarray]:
        free = torch.from_numpy(vector.copy()).requires_grad_(True)
        with torch.enable_grad():
            grid, rows = begin.split(free)
            here = x
            values: list[Tensor] = []
            grid_here = grid.to(x)
            for i, row in enumerate(rows):
                # kept for the gradient by the level, so in memory of its own
                values.insert(0, -grid_here[i] * score(here, grid_here[i]).clone())
                weights = ((grid[i + 1] - grid[i]) * row).to(x)
                here = here + torch.tensordot(weights, torch.stack(values[: len(row)]), 1)
                del values[max(begin.lengths) :]
            error = _error(here, end)
            (gradient,) = torch.autograd.grad(error, free)
        # the log keeps steps of a size that does not depend on how small the error is
        value = max(float(error.detach()), 1e-300)
        return math.log(value), gradient.cpu().double().numpy() / value

    with tqdm(total=iterations, desc="descent", unit="step", disable=not progress) as bar:

        def watch(vector: np.ndarray) -> None:
            nonlocal best, best_error
            bar.update()
            now = begin.sampler(vector)
            error = judge(now)
            if error < best_error:
                best, best_error = now, error

        options = {"maxiter": iterations, "maxcor": 50, "maxfun": 2 * iterations, "ftol": 0.0, "gtol": 0.0}
        from scipy.optimize import minimize

        minimize(loss, begin.start, jac=True, method="L-BFGS-B", callback=watch, options=options)
    return best


def _grids(nfe: int, sigma_min: float, sigma_max: float) -> list[list[float]]:
    """Grids to begin the search from: Karras's of several rho and of smallest levels above sigma_min."""
    if nfe == 1:
        return [[sigma_max, 0.0]]
    ends = [sigma_min * (sigma_max / sigma_min) ** part for part in (0.03, 0.15, 0.3)]
    found = [levels_of.karras(nfe, sigma_min=low, sigma_max=sigma_max, rho=rho) for low in ends for rho in (3, 7, 20)]
    return [g.tolist() for g in found]


def evaluations_taken(
    nfe: int, method: str, trials: int = 200, iterations: int = 300, reference_steps: int = 128
) -> float:
    """About what ``calibrate`` takes, in evaluations of all starts at once; those with a gradient count thrice."""
    fits = 0.6 * trials * nfe
    descent = 0.6 * 3.3 * iterations * nfe if method == "gradient" else 0.0
    return 4 * (reference_steps + 1) + fits + descent


def calibrate(
    score: ScoreFn,
    x_calibration: Tensor,
    *,
    nfe: int,
    sigma_min: float,
    sigma_max: float,
    method: str = "gradient",
    history: int = 4,
    trials: int = 200,
    iterations: int = 300,
    reference_steps: int = 128,
    progress: bool = False,
) -> Calibrated:
    """A sampler of ``nfe`` evaluations fitted to this score function.

    x_calibration: starts (B, *D) at sigma_max, B >= 16, to whose rows the score may be bound, as to conditions; 512 for
    a few dimensions, 64 for images are enough. Three fifths are fitted to, one fifth decides when to stop, and the last
    fifth only measures: ``report`` of the result holds its error (held_out_error) beside that of exponential
    Adams-Bashforth of order 3 on Karras's grid. method: "gradient" or "least_squares" (see the module). history:
    evaluations combined in a step; memory grows with it. trials: grids tried by least squares. iterations: of L-BFGS.
    reference_steps: RK4 steps of the reference solution, which costs four times as many evaluations of the whole batch.

    Raises ValueError for shapes, levels or counts that don't fit and for a score that is not finite.
    """
    check_batch(x_calibration, "x_calibration")
    check_finite(x_calibration, "x_calibration")
    check_sigmas([sigma_max, sigma_min])
    if len(x_calibration) < 16:
        raise ValueError(f"x_calibration has {len(x_calibration)} starts; expected at least 16, better hundreds")
    if method not in ("gradient", "least_squares"):
        raise ValueError(f"method is {method!r}; expected 'gradient' or 'least_squares'")
    for name, value in (("nfe", nfe), ("history", history), ("trials", trials), ("reference_steps", reference_steps)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    if sigma_min <= 0:
        raise ValueError(f"sigma_min is {sigma_min:g}; expected a positive noise level")
    check_known(score, sigma_min, sigma_max)
    began, score = time.perf_counter(), Counted(score)
    x = x_calibration.detach()
    train, stop = 3 * len(x) // 5, 4 * len(x) // 5
    fitted, judged, held = slice(0, train), slice(train, stop), slice(stop, len(x))
    with torch.no_grad():
        reference = _solve(score, x, sigma_min, sigma_max, reference_steps, progress)
        known = reference.rows(fitted)

        def of(rows: slice) -> ScoreFn:
            # a score that is bound to the starts is so to these
            return restricted(score, torch.arange(len(x), device=x.device)[rows]) or score

        def fit(grid: list[float]) -> float:
            return _least_squares(of(fitted), x[fitted], known, grid, history)[1]

        def judge(sampler: Calibrated, rows: slice = judged) -> float:
            return _finite(_error(_run(of(rows), x[rows], sampler), reference.end[rows]))

        grid = _search(fit, _grids(nfe, sigma_min, sigma_max), sigma_min, trials, progress)
        weights, _ = _least_squares(of(fitted), x[fitted], known, grid, history)
        found = Calibrated(tuple(grid), weights)
        if method == "gradient":
            begin = _Parameters(grid, weights, sigma_min)
            found = _descend(of(fitted), x[fitted], reference.end[fitted], begin, iterations, judge, progress)
        usual = levels_of.karras(nfe, sigma_min=sigma_min, sigma_max=sigma_max).tolist() if nfe > 1 else grid
        plain = Calibrated(tuple(usual), tuple(tuple(_initial(usual, i, 3)) for i in range(nfe)))
        report = {
            "method": method,
            "nfe": nfe,
            "sigma_min": sigma_min,
            "sigma_max": sigma_max,
            "starts": len(x),
            "fit_error": judge(found, fitted),
            "held_out_error": judge(found, held),
            "uncalibrated_held_out_error": judge(plain, held),
            "seconds": time.perf_counter() - began,
        }
        middle = math.sqrt(sigma_min * sigma_max)
        mark = Fingerprint.of(score, middle, float(reference.at(middle).square().mean().sqrt()), x)
    return Calibrated(found.sigmas, found.weights, report, mark)
