"""Distance of distributions against NFE for stochastic samplers, on the exact score of 8 Gaussians on a circle.

Energy distance (unbiased, so about 0 and at times negative for exact samples) between 4,096 samples and as many exact
ones, averaged over 4 seeds; "exact samples" is that of exact samples, whose spread says what can be told apart. Every
sampler gets a Karras grid from 80 to 0.002 and a final 0. azula's rows run where azula is installed.

    python -m benchmarks.stochastic
"""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Callable

import torch
from tqdm.auto import tqdm

from benchmarks.solvers import HIGH, LOW, RESULTS, exact
from scorelab import VE, sample, sigmas
from scorelab.distributions import GaussianMixture
from scorelab.evaluation import energy_distance
from scorelab.plotting import figure
from scorelab.samplers import DDIM, Churn, Euler, ReverseSDE, Sampler, SDEDPMSolver, StochasticHeun

NFE = (5, 10, 20, 40, 80)
COUNT, SEEDS = 4096, 4
# evaluations a step
SAMPLERS: dict[str, tuple[Sampler, int]] = {
    "Euler (deterministic)": (Euler(), 1),
    "DDIM, eta = 0.5": (DDIM(0.5), 1),
    "ancestral": (DDIM(1.0), 1),
    "reverse SDE, Euler-Maruyama": (ReverseSDE(VE(LOW, HIGH)), 1),
    "stochastic Heun": (StochasticHeun(VE(LOW, HIGH)), 2),
    "EDM churn 10": (Churn(10.0), 2),
    "SDE-DPM-Solver++ 2M": (SDEDPMSolver(), 1),
    "SDE-DPM-Solver++ 2M, eta = 0.5": (SDEDPMSolver(0.5), 1),
}


def azula_rows(d: GaussianMixture) -> dict[str, Callable[[torch.Tensor, int, int], torch.Tensor]]:
    from azula.denoise import Denoiser, DiracPosterior
    from azula.noise import VESchedule
    from azula.sample import DDIMSampler, DDPMSampler, ItoSampler

    class Exact(Denoiser):  # type: ignore[misc]
        def __init__(self):
            super().__init__()
            self.schedule = VESchedule(LOW, HIGH)

        def forward(self, x, t):
            return DiracPosterior(mean=d.denoise(x, self.schedule(t)[1]))

    def runner(make: Callable[..., Callable[[torch.Tensor], torch.Tensor]]):
        def run(x: torch.Tensor, nfe: int, seed: int) -> torch.Tensor:
            torch.manual_seed(seed)
            return d.denoise(make(Exact(), steps=nfe - 1, silent=True, dtype=torch.float64)(x), LOW)

        return run

    return {
        "azula DDPM, log-linear": runner(DDPMSampler),
        # its eta is the square of the paper's
        "azula DDIM, eta = 0.5, log-linear": runner(lambda *a, **k: DDIMSampler(*a, eta=0.25, **k)),
        "azula Ito, log-linear": runner(ItoSampler),
    }


def main() -> None:
    d = exact("gmm2d")

    def runner(sampler: Sampler, cost: int) -> Callable[[torch.Tensor, int, int], torch.Tensor]:
        def run(x: torch.Tensor, nfe: int, seed: int) -> torch.Tensor:
            levels = sigmas.karras((nfe - 1) // cost + 1, sigma_min=LOW, sigma_max=HIGH)
            return sample(d.score, x, levels, sampler, generator=torch.Generator().manual_seed(seed))

        return run

    runs = {f"scorelab {name}": runner(*row) for name, row in SAMPLERS.items()}
    if importlib.util.find_spec("azula") is not None:
        runs |= azula_rows(d)
    runs["exact samples"] = lambda x, nfe, seed: d.sample(len(x), torch.Generator().manual_seed(100 + seed))
    rows: dict[str, dict[str, float]] = {}
    for name, run in tqdm(runs.items(), unit="row"):
        rows[name] = {}
        for nfe in NFE:
            found = []
            for seed in range(SEEDS):
                g = torch.Generator().manual_seed(1000 * nfe + seed)
                x = d.sample(COUNT, g) + HIGH * torch.randn(COUNT, 2, dtype=torch.float64, generator=g)
                found.append(energy_distance(run(x, nfe, seed + 10 * nfe), d.sample(COUNT, g)))
            rows[name][str(nfe)] = statistics.mean(found)
            rows[name][f"{nfe} standard error"] = statistics.stdev(found) / SEEDS**0.5
    (RESULTS / "stochastic.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows)
    print("| sampler | " + " | ".join(map(str, NFE)) + " |\n|---|" + "---|" * len(NFE))
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row[str(n)]:.2g} ± {row[f'{n} standard error']:.1g}" for n in NFE) + " |")


def plot(rows: dict[str, dict[str, float]]) -> None:
    """stochastic.png; what is less than the spread of exact samples is drawn at its size."""
    made, axes = figure(1, size=5.0)
    ax = axes.ravel()[0]
    for name, row in rows.items():
        style = "k:" if name == "exact samples" else "o--" if name.startswith("azula") else "o-"
        ax.loglog(NFE, [max(row[str(n)], 3e-4) for n in NFE], style, label=name, markersize=3)
    ax.set(xlabel="NFE", ylabel="energy distance to the data, or 3e-4", title="stochastic samplers, 8 Gaussians")
    ax.set_xticks(NFE, [str(n) for n in NFE])
    ax.minorticks_off()
    ax.legend(fontsize=6)
    made.savefig(RESULTS / "stochastic.png")


if __name__ == "__main__":
    main()
