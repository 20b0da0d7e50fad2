"""Distance of distributions against NFE for stochastic samplers, on the exact scores of the two problems.

Energy distance (unbiased, so about 0 and at times negative for exact samples) between samples and as many exact ones,
averaged over 4 seeds; "exact samples" is that of exact samples, whose spread says what can be told apart. Every sampler
gets a Karras grid from 80 to 0.002 and a final 0 (azula's: log-linear).

    python -m benchmarks.stochastic
"""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Callable

import torch
from tqdm.auto import tqdm

from benchmarks.peers import submodule
from benchmarks.solvers import HIGH, LOW, RESULTS, exact
from scorelab import VE, sample, sigmas
from scorelab.distributions import GaussianMixture
from scorelab.evaluation import energy_distance
from scorelab.plotting import figure
from scorelab.samplers import DDIM, Churn, Euler, ReverseSDE, Sampler, SDEDPMSolver, StochasticHeun

NFE = (5, 10, 20, 40, 80)
COUNTS, SEEDS = {"gmm2d": 4096, "digits": 512}, 4
Run = Callable[[torch.Tensor, int, int], torch.Tensor]
# evaluations a step
SAMPLERS: dict[str, tuple[Sampler, int]] = {
    "Euler (deterministic)": (Euler(), 1),
    "DDIM, eta = 0.5": (DDIM(0.5), 1),
    "ancestral": (DDIM(1.0), 1),
    "reverse SDE, Euler-Maruyama": (ReverseSDE(VE(LOW, HIGH), explicit=True), 1),
    "stochastic Heun": (StochasticHeun(VE(LOW, HIGH), explicit=True), 2),
    "EDM churn 10": (Churn(10.0), 2),
    "SDE-DPM-Solver++ 2M": (SDEDPMSolver(), 1),
    "SDE-DPM-Solver++ 2M, eta = 0.5": (SDEDPMSolver(0.5), 1),
}


def ours(d: GaussianMixture, sampler: Sampler, cost: int) -> Run:
    def run(x: torch.Tensor, nfe: int, seed: int) -> torch.Tensor:
        levels = sigmas.karras((nfe - 1) // cost + 1, sigma_min=LOW, sigma_max=HIGH)
        return sample(d.score, x, levels, sampler, generator=torch.Generator().manual_seed(seed))

    return run


def azula_rows(d: GaussianMixture) -> dict[str, Run]:
    from azula.denoise import Denoiser, DiracPosterior
    from azula.noise import VESchedule
    from azula.sample import DDIMSampler, DDPMSampler, ItoSampler

    class Exact(Denoiser):  # type: ignore[misc]
        def __init__(self):
            super().__init__()
            self.schedule = VESchedule(LOW, HIGH)

        def forward(self, x, t):
            return DiracPosterior(mean=d.denoise(x, self.schedule(t)[1]))

    def runner(make: Callable[..., Callable[[torch.Tensor], torch.Tensor]]) -> Run:
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


def k_diffusion_rows(d: GaussianMixture) -> dict[str, Run]:
    k = submodule("k_diffusion", "sampling")

    def runner(method: Callable[..., torch.Tensor]) -> Run:
        def run(x: torch.Tensor, nfe: int, seed: int) -> torch.Tensor:
            torch.manual_seed(seed)
            levels = k.get_sigmas_karras(nfe, LOW, HIGH).double()
            levels[0] = HIGH
            # noise of its own kind needs a tree of intervals over more levels than these
            noise = lambda a, b: torch.randn_like(x)  # noqa: E731
            return method(lambda y, s: d.denoise(y, float(s[0])), x, levels, disable=True, noise_sampler=noise)

        return run

    return {
        "k-diffusion Euler ancestral": runner(k.sample_euler_ancestral),
        "k-diffusion DPM++ 2M SDE": runner(k.sample_dpmpp_2m_sde),
        "k-diffusion DPM++ 3M SDE": runner(k.sample_dpmpp_3m_sde),
    }


def measure(name: str) -> dict[str, dict[str, float]]:
    """Every sampler's distance and its standard error at every NFE."""
    d, count = exact(name), COUNTS[name]
    runs = {f"scorelab {label}": ours(d, *row) for label, row in SAMPLERS.items()}
    for module, peer in (("azula", azula_rows), ("k_diffusion", k_diffusion_rows)):
        if importlib.util.find_spec(module) is not None:
            runs |= peer(d)
    runs["exact samples"] = lambda x, nfe, seed: d.sample(len(x), torch.Generator().manual_seed(100 + seed))
    rows: dict[str, dict[str, float]] = {}
    for label, run in tqdm(runs.items(), desc=name, unit="row"):
        rows[label] = {}
        for nfe in NFE:
            found = []
            for seed in range(SEEDS):
                g = torch.Generator().manual_seed(1000 * nfe + seed)
                noise = torch.randn(count, *d.data_shape, dtype=torch.float64, generator=g)
                x = d.sample(count, g) + HIGH * noise
                found.append(energy_distance(run(x, nfe, seed + 10 * nfe), d.sample(count, g)))
            rows[label][str(nfe)] = statistics.mean(found)
            rows[label][f"{nfe} standard error"] = statistics.stdev(found) / SEEDS**0.5
    return rows


def plot(results: dict[str, dict[str, dict[str, float]]]) -> None:
    """stochastic.png; what is less than the spread of exact samples is drawn at its size."""
    made, axes = figure(len(results), size=5.0)
    for ax, (name, rows) in zip(axes.ravel(), results.items(), strict=True):
        exact_rows = rows["exact samples"]
        floor = max(exact_rows[f"{n} standard error"] for n in NFE)
        for label, row in rows.items():
            style = "k:" if label == "exact samples" else "o-" if label.startswith("scorelab") else "o--"
            ax.loglog(NFE, [max(row[str(n)], floor) for n in NFE], style, label=label, markersize=3)
        ax.set(
            xlabel="NFE", ylabel=f"energy distance to the data, or {floor:.1g}", title=f"stochastic samplers, {name}"
        )
        ax.set_xticks(NFE, [str(n) for n in NFE])
        ax.minorticks_off()
        ax.legend(fontsize=6)
    made.savefig(RESULTS / "stochastic.png")


def main() -> None:
    results = {}
    for name in COUNTS:
        results[name] = measure(name)
        (RESULTS / "stochastic.json").write_text(json.dumps(results, indent=1) + "\n")
        plot(results)


if __name__ == "__main__":
    main()
