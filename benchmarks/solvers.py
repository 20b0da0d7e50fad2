"""Error against NFE on two exact problems: scorelab's solvers, the calibrated sampler, azula and diffusers, in one run.

    gmm2d    8 equal Gaussians of std 0.08 on the unit circle; 4,096 starts 80 randn
    digits   Gaussians of std 0.15 at scikit-learn's 1,797 digits scaled to [-1, 1] (D = 64); 1,024 starts

The measure is the root mean square over dimensions between a sample and the exact ODE's solution from the same start
(sigma 80 to 0.002, then denoised), averaged over starts. NFE counts evaluations of the score.

Run by ``make bench`` in an environment of its own, or ``python -m benchmarks.solvers --problem gmm2d``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm

from scorelab import sample, sigmas
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

LOW, HIGH = 0.002, 80.0
NFE = (5, 8, 10, 12, 15, 20, 30, 50)
CALIBRATED_NFE = (5, 8, 10, 15, 20)
RESULTS = Path(__file__).parent / "results"
Solver = Callable[[torch.Tensor, int], torch.Tensor]
# how many starts the calibrated sampler is fitted to, grids tried, and steps of descent
EFFORT = {"gmm2d": (512, 200, 200), "digits": (960, 80, 60)}


def problem(name: str) -> tuple[GaussianMixture, int]:
    """The target and its number of starts."""
    if name == "gmm2d":
        angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
        return GaussianMixture(torch.stack([angle.cos(), angle.sin()], 1), 0.08), 4096
    return GaussianMixture(digits().x0.double().reshape(-1, 64), 0.15), 1024


def starts(d: GaussianMixture, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return HIGH * torch.randn(count, d.data_shape[0], dtype=torch.float64, generator=generator)


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return float((x - exact).square().mean(1).sqrt().mean())


def grids() -> dict[str, Callable[[int], torch.Tensor]]:
    return {
        "karras 7": lambda n: sigmas.karras(n, sigma_min=LOW, sigma_max=HIGH),
        "karras 15": lambda n: sigmas.karras(n, sigma_min=LOW, sigma_max=HIGH, rho=15),
        "log-linear": lambda n: sigmas.log_linear(n, sigma_min=LOW, sigma_max=HIGH),
        "karras 7 from 0.02": lambda n: sigmas.karras(n, sigma_min=0.02, sigma_max=HIGH),
        "karras 15 from 0.02": lambda n: sigmas.karras(n, sigma_min=0.02, sigma_max=HIGH, rho=15),
        "log-linear from 0.02": lambda n: sigmas.log_linear(n, sigma_min=0.02, sigma_max=HIGH),
    }


def ours(d: GaussianMixture) -> Iterator[tuple[str, Solver]]:
    """scorelab's fixed solvers with every grid; a solver of k evaluations a step takes (NFE - 1) // k steps."""
    solvers: list[tuple[str, Sampler, int]] = [
        (f"Adams-Bashforth {k}, {on}", AdamsBashforth(k, on), 1) for on in ("eps", "x0") for k in (2, 3, 4)
    ]
    solvers += [(f"DPM-Solver++ {k}M", DPMSolverMultistep(k), 1) for k in (2, 3)]
    solvers += [(f"UniPC-{k}", UniPC(k), 1) for k in (1, 2, 3)]
    if len(d.means) < 100:
        # where an evaluation is cheap, those too that are never best with so few
        solvers += [("Euler", Euler(), 1), ("Heun", Heun(), 2), ("midpoint", Midpoint(), 2), ("RK4", RK4(), 4)]
        solvers += [(f"Adams-Bashforth {k}, sigma", AdamsBashforth(k, "sigma"), 1) for k in (2, 3, 4)]
        solvers += [(f"DPM-Solver++ {k}S", DPMSolverSinglestep(k), k) for k in (2, 3)]
    for name, sampler, cost in solvers:
        for grid_name, grid in grids().items():

            def run(x: torch.Tensor, nfe: int, sampler=sampler, cost=cost, grid=grid) -> torch.Tensor:
                return sample(d.score, x, grid((nfe - 1) // cost + 1), sampler)

            yield f"scorelab {name}, {grid_name}", run


def azula(d: GaussianMixture) -> Iterator[tuple[str, Solver]]:
    from azula.denoise import Denoiser, DiracPosterior
    from azula.noise import Schedule, VESchedule
    from azula.sample import REABSampler, vABSampler, xEABSampler, zEABSampler

    class Karras(Schedule):  # type: ignore[misc]
        def __call__(self, t):
            rho = 1 / 7
            return torch.ones_like(t), (LOW**rho + t * (HIGH**rho - LOW**rho)) ** 7

    class Exact(Denoiser):  # type: ignore[misc]
        def __init__(self, schedule):
            super().__init__()
            self.schedule = schedule

        def forward(self, x, t):
            return DiracPosterior(mean=d.denoise(x, self.schedule(t)[1]))

    schedules = {"karras 7": Karras(), "log-linear": VESchedule(LOW, HIGH)}
    for kind in (vABSampler, zEABSampler, xEABSampler, REABSampler):
        for order in (2, 3):
            for name, schedule in schedules.items():

                def run(x: torch.Tensor, nfe: int, kind=kind, order=order, schedule=schedule) -> torch.Tensor:
                    sampler = kind(Exact(schedule), order=order, steps=nfe - 1, silent=True, dtype=torch.float64)
                    return d.denoise(sampler(x), LOW)

                yield f"azula {kind.__name__.removesuffix('Sampler')}-{order}, {name}", run


def diffusers(d: GaussianMixture) -> Iterator[tuple[str, Solver]]:
    from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

    def run(x: torch.Tensor, nfe: int, make: Callable[[], object]) -> torch.Tensor:
        scheduler = make()
        scheduler.set_timesteps(nfe)
        x = x / HIGH * float(scheduler.init_noise_sigma)
        for i, t in enumerate(scheduler.timesteps):
            s = float(scheduler.sigmas[i])
            scheduler.scale_model_input(x, t)
            # what a network with EDM's preconditioning returns
            skip, out = 0.25 / (s**2 + 0.25), s * 0.5 / math.sqrt(s**2 + 0.25)
            x = scheduler.step((d.denoise(x, s) - skip * x) / out, t, x).prev_sample
        return x

    common = {"sigma_min": LOW, "sigma_max": HIGH, "sigma_data": 0.5}
    for schedule in ("karras", "exponential"):
        yield (
            f"diffusers EDM Euler, {schedule}",
            lambda x, n, s=schedule: run(x, n, lambda: EDMEulerScheduler(**common, sigma_schedule=s)),
        )
        for order in (2, 3):
            yield (
                f"diffusers EDM DPM++ {order}M, {schedule}",
                lambda x, n, s=schedule, k=order: run(
                    x, n, lambda: EDMDPMSolverMultistepScheduler(**common, sigma_schedule=s, solver_order=k)
                ),
            )


def measure(name: str) -> Iterator[dict[str, dict[str, float]]]:
    """Every row's error at every NFE, as far as it is known, again after each part of the work."""
    d, count = problem(name)
    x = starts(d, count, 0)
    exact = sample(d.score, x, sigmas.log_linear(400, sigma_min=LOW, sigma_max=HIGH), RK4(), progress=True)
    solvers = dict(ours(d))
    for peer, module in ((azula, "azula"), (diffusers, "diffusers")):
        if importlib.util.find_spec(module) is None:
            print(f"{module} is not installed: its rows are left out", flush=True)
        else:
            solvers.update(peer(d))
    rows = {
        row: {str(n): error(run(x, n), exact) for n in NFE} for row, run in tqdm(solvers.items(), desc=name, unit="row")
    }
    yield rows
    known, trials, iterations = EFFORT[name]
    for method in ("least_squares", "gradient"):
        found = rows.setdefault(f"scorelab calibrated, {method}", {})
        for n in tqdm(CALIBRATED_NFE, desc=f"{name}, calibrated by {method}", unit="NFE"):
            sampler = calibrate(
                d.score,
                starts(d, known, 1),
                nfe=n,
                sigma_min=LOW,
                sigma_max=HIGH,
                method=method,
                trials=trials,
                iterations=iterations,
            )
            found[str(n)] = error(sample(d.score, x, sampler=sampler), exact)
            found[f"{n} seconds"] = sampler.report["seconds"]
            yield rows


def best(rows: dict[str, dict[str, float]], nfe: int, *, peer: bool) -> tuple[float, str]:
    """Least error at an NFE of the peers or of scorelab's uncalibrated solvers."""
    mine = {k: v for k, v in rows.items() if k.startswith("scorelab") != peer and "calibrated" not in k}
    return min((v[str(nfe)], k) for k, v in mine.items())


def table(name: str, rows: dict[str, dict[str, float]]) -> str:
    """Markdown: best peer, best uncalibrated and calibrated errors at every NFE, with ratios to the best peer."""
    lines = [
        f"### {name}",
        "",
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
        ax.legend(fontsize=7)
    made.savefig(RESULTS / "solvers.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problem", action="append", choices=list(EFFORT))
    names = parser.parse_args().problem or list(EFFORT)
    path = RESULTS / "solvers.json"
    kept = json.loads(path.read_text())["results"] if path.is_file() and len(names) < len(EFFORT) else {}
    results, about = dict(kept), {"python": platform.python_version(), "torch": torch.__version__}
    for name in names:
        for rows in measure(name):
            results[name] = rows
            path.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    if len(results) == len(EFFORT):
        plot(results)
    print("\n\n".join(table(name, rows) for name, rows in results.items()))


if __name__ == "__main__":
    main()
