"""Error against NFE: scorelab's solvers, the calibrated sampler and other libraries' samplers, in one run.

    gmm2d    8 equal Gaussians of std 0.08 on the unit circle; 4,096 starts 80 randn
    digits   Gaussians of std 0.15 at scikit-learn's 1,797 digits scaled to [-1, 1] (D = 64); 1,024 starts
    trained  a network that learnt the two moons, as in the gallery, between its own noise levels; 1,024 starts

The measure is the root mean square over dimensions between a sample and the ODE's solution from the same start (sigma
80 to 0.002, then denoised; 400 steps of RK4), averaged over starts. NFE counts evaluations of the score.

Run by ``make bench`` in an environment of its own, or ``python -m benchmarks.solvers --problem gmm2d``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.peers import Denoiser, peers
from scorelab import ScoreFn, sample, sigmas
from scorelab.data import digits
from scorelab.distributions import GaussianMixture
from scorelab.plotting import figure
from scorelab.samplers import (
    RK4,
    AdamsBashforth,
    DPMSolverMultistep,
    DPMSolverSinglestep,
    Euler,
    Heun,
    Midpoint,
    Sampler,
    UniPC,
    calibrate,
)
from scorelab.training import Trainer, build
from toy.common import config_for

LOW, HIGH = 0.002, 80.0
NFE = (5, 8, 10, 12, 15, 20, 30, 50)
CALIBRATED_NFE = (5, 8, 10, 15, 20)
RESULTS = Path(__file__).parent / "results"
PROBLEMS = ("gmm2d", "digits", "trained")
Solver = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """A score with its denoiser, the levels between which the ODE is solved, and how the calibrated sampler is fitted:
    to how many starts, with how many grids tried and steps of descent. ``cheap``: run the solvers that are never best
    with few evaluations, too."""

    score: ScoreFn
    denoise: Denoiser
    dims: int
    count: int
    effort: tuple[int, int, int]
    low: float = LOW
    high: float = HIGH
    cheap: bool = True

    def starts(self, count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return self.high * torch.randn(count, self.dims, dtype=torch.float64, generator=generator)


def exact(name: str) -> GaussianMixture:
    """The target of an exact problem."""
    if name == "gmm2d":
        angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
        return GaussianMixture(torch.stack([angle.cos(), angle.sin()], 1), 0.08)
    return GaussianMixture(digits().reference().double().reshape(-1, 64), 0.15)


def problem(name: str) -> Problem:
    """A problem by its name."""
    if name == "trained":
        config = config_for("moons", 2800)
        trainer = Trainer(build(config), config)
        for _ in tqdm(range(config.training.steps), desc="training moons", unit="step"):
            trainer.advance(measure=False)
        # in double precision, so that errors are the solvers' own
        model = trainer.averaged().double()

        @torch.no_grad()
        def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
            return model.denoise(x, torch.tensor(sigma, dtype=x.dtype))

        return Problem(model, denoise, 2, 1024, (512, 80, 60), *model.sigma_range, cheap=False)
    d = exact(name)
    if name == "gmm2d":
        return Problem(d.score, d.denoise, 2, 4096, (512, 200, 200))
    return Problem(d.score, d.denoise, 64, 1024, (960, 80, 60), cheap=False)


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return float((x - exact).square().mean(1).sqrt().mean())


def grids(low: float, high: float) -> dict[str, Callable[[int], torch.Tensor]]:
    """Karras's and log-linear levels, down to ``low`` and to ten times that (the last step denoises from there)."""
    found: dict[str, Callable[[int], torch.Tensor]] = {}
    for end, text in ((low, ""), (10 * low, f" from {10 * low:g}")):
        for rho in (7, 15):
            found[f"karras {rho}{text}"] = lambda n, e=end, r=rho: sigmas.karras(n, sigma_min=e, sigma_max=high, rho=r)
        found[f"log-linear{text}"] = lambda n, e=end: sigmas.log_linear(n, sigma_min=e, sigma_max=high)
    return found


def ours(p: Problem) -> Iterator[tuple[str, Solver]]:
    """scorelab's fixed solvers with every grid; a solver of k evaluations a step takes (NFE - 1) // k steps."""
    solvers: list[tuple[str, Sampler, int]] = [
        (f"Adams-Bashforth {k}, {on}", AdamsBashforth(k, on), 1) for on in ("eps", "x0") for k in (2, 3, 4)
    ]
    solvers += [(f"DPM-Solver++ {k}M", DPMSolverMultistep(k), 1) for k in (2, 3)]
    solvers += [(f"UniPC-{k}", UniPC(k), 1) for k in (1, 2, 3)]
    if p.cheap:
        solvers += [("Euler", Euler(), 1), ("Heun", Heun(), 2), ("midpoint", Midpoint(), 2), ("RK4", RK4(), 4)]
        solvers += [(f"Adams-Bashforth {k}, sigma", AdamsBashforth(k, "sigma"), 1) for k in (2, 3, 4)]
        solvers += [(f"DPM-Solver++ {k}S", DPMSolverSinglestep(k), k) for k in (2, 3)]
    for name, sampler, cost in solvers:
        for grid_name, grid in grids(p.low, p.high).items():

            def run(x: torch.Tensor, nfe: int, sampler=sampler, cost=cost, grid=grid) -> torch.Tensor:
                return sample(p.score, x, grid((nfe - 1) // cost + 1), sampler)

            yield f"scorelab {name}, {grid_name}", run


def theirs(p: Problem) -> Iterator[tuple[str, Solver]]:
    """The peers' rows that are installed."""
    for name, peer in peers().items():
        yield name, lambda x, nfe, peer=peer: peer(p.denoise, x, nfe, p.low, p.high)


def measure(name: str) -> Iterator[dict[str, dict[str, float]]]:
    """Every row's error at every NFE, as far as it is known, again after each part of the work."""
    p = problem(name)
    x = p.starts(p.count, 0)
    end = sample(p.score, x, sigmas.log_linear(400, sigma_min=p.low, sigma_max=p.high), RK4(), progress=True)
    solvers = {**dict(ours(p)), **dict(theirs(p))}
    rows = {
        row: {str(n): error(run(x, n), end) for n in NFE} for row, run in tqdm(solvers.items(), desc=name, unit="row")
    }
    yield rows
    known, trials, iterations = p.effort
    for method in ("least_squares", "gradient"):
        found = rows.setdefault(f"scorelab calibrated, {method}", {})
        for n in tqdm(CALIBRATED_NFE, desc=f"{name}, calibrated by {method}", unit="NFE"):
            sampler = calibrate(
                p.score,
                p.starts(known, 1),
                nfe=n,
                sigma_min=p.low,
                sigma_max=p.high,
                method=method,
                trials=trials,
                iterations=iterations,
            )
            found[str(n)] = error(sample(p.score, x, sampler=sampler), end)
            found[f"{n} seconds"] = sampler.report["seconds"]
            yield rows


def best(rows: dict[str, dict[str, float]], nfe: int, *, peer: bool) -> tuple[float, str]:
    """Least error at an NFE of the peers or of scorelab's uncalibrated solvers."""
    mine = {k: v for k, v in rows.items() if k.startswith("scorelab") != peer and "calibrated" not in k}
    return min((v[str(nfe)], k) for k, v in mine.items())


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown: best peer, best uncalibrated and calibrated errors at every NFE, with ratios to the best peer."""
    lines = [
        "| NFE | best peer | | best uncalibrated | | ratio | least squares | ratio | gradient | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for n in NFE:
        peer, peer_name = best(rows, n, peer=True)
        own, own_name = best(rows, n, peer=False)
        cells = [f"{peer:.3g}", peer_name, f"{own:.3g}", own_name.removeprefix("scorelab "), f"{own / peer:.2f}"]
        for method in ("least_squares", "gradient"):
            value = rows.get(f"scorelab calibrated, {method}", {}).get(str(n))
            cells += ["", ""] if value is None else [f"{value:.3g}", f"{value / peer:.2f}"]
        lines.append(f"| {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, dict[str, float]]]) -> None:
    made, axes = figure(len(results), size=4.4)
    for ax, (name, rows) in zip(axes.ravel(), results.items(), strict=True):
        for label, peer in (("best peer", True), ("scorelab, best uncalibrated", False)):
            ax.loglog(NFE, [best(rows, n, peer=peer)[0] for n in NFE], "o-", label=label)
        for method in ("least_squares", "gradient"):
            found = rows[f"scorelab calibrated, {method}"]
            known = [n for n in CALIBRATED_NFE if str(n) in found]
            ax.loglog(
                known, [found[str(n)] for n in known], "s--", label=f"scorelab, calibrated ({method.replace('_', ' ')})"
            )
        ax.set(title=name, xlabel="NFE", ylabel="RMS error against the exact ODE")
        ax.set_xticks(NFE, [str(n) for n in NFE])
        ax.minorticks_off()
        ax.legend(fontsize=7)
    made.savefig(RESULTS / "solvers.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problem", action="append", choices=list(PROBLEMS))
    names = parser.parse_args().problem or list(PROBLEMS)
    path = RESULTS / "solvers.json"
    kept = json.loads(path.read_text())["results"] if path.is_file() and len(names) < len(PROBLEMS) else {}
    results, about = dict(kept), {"python": platform.python_version(), "torch": torch.__version__}
    for name in names:
        for rows in measure(name):
            results[name] = rows
            path.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    if len(results) == len(PROBLEMS):
        plot(results)
    print("\n\n".join(f"{name}\n{table(rows)}" for name, rows in results.items()))


if __name__ == "__main__":
    main()
