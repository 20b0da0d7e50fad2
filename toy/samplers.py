"""One model, every sampler: samples, NFE, seconds, energy distance to the data; and solvers' errors by evaluations."""

from __future__ import annotations

import math
import time

import torch
from tqdm.auto import tqdm

from scorelab import VE, VP, sample, sigmas
from scorelab.distributions import Distribution
from scorelab.evaluation import energy_distance
from scorelab.plotting import extent_of, figure, points
from scorelab.samplers import (
    DDIM,
    RK4,
    AdamsBashforth,
    Ancestral,
    AnnealedCorrector,
    AnnealedLangevin,
    Calibrated,
    Churn,
    DPMSolverMultistep,
    Euler,
    Heun,
    Langevin,
    LangevinCorrector,
    PredictorCorrector,
    ProbabilityFlow,
    ReverseDiffusion,
    ReverseSDE,
    Sampler,
    Step,
    UniPC,
    calibrate,
    trajectory,
)
from toy.common import Gallery, Trained, options, parse

DEFAULT = ("ring",)
COUNT, SEED, REPEATS = 2000, 0, 100
TICKS = (5, 10, 20, 40, 80)


def settings(trained: Trained, quick: bool) -> dict[str, tuple[torch.Tensor | None, Sampler]]:
    """Every sampler with noise levels that are enough for it (the quick gallery anneals in half the steps)."""
    low, high = trained.sigma_min, trained.sigma_max
    ve = VE(low, high)

    def karras(n: int) -> torch.Tensor:
        return sigmas.karras(n, sigma_min=low, sigma_max=high)

    def geometric(n: int) -> torch.Tensor:
        return sigmas.geometric(n, sigma_min=low, sigma_max=high)

    return {
        "Euler": (karras(100), Euler()),
        "Heun": (karras(30), Heun()),
        "DPM-Solver++ (2M)": (karras(30), DPMSolverMultistep()),
        "UniPC": (karras(30), UniPC()),
        "Adams-Bashforth": (karras(30), AdamsBashforth()),
        "churn": (karras(60), Churn(20.0)),
        "probability flow (adaptive)": (torch.tensor([high, low, 0.0]), ProbabilityFlow(1e-4, 1e-4)),
        "DDIM, eta = 0.5": (karras(150), DDIM(0.5)),
        "ancestral": (karras(150), Ancestral()),
        "ancestral, forward variance": (geometric(250), Ancestral("forward", ve)),
        "reverse SDE (VE time)": (geometric(250), ReverseSDE(ve, explicit=True)),
        "reverse SDE (VP time)": (geometric(250), ReverseSDE(VP(), explicit=True)),
        "PC: reverse diffusion + Langevin": (
            geometric(400),
            PredictorCorrector(ReverseDiffusion(ve), LangevinCorrector(0.01)),
        ),
        "PC: Euler + annealed": (geometric(100), PredictorCorrector(Euler(), AnnealedCorrector(0.1))),
        "annealed Langevin": (geometric(200 if quick else 100), AnnealedLangevin(6 if quick else 20, 0.4 * low**2)),
        "plain Langevin": (torch.tensor([low]), Langevin(200, 0.2 * low**2)),
        "calibrated": (None, fitted(trained, 10)),
    }


def fitted(trained: Trained, nfe: int) -> Calibrated:
    """A sampler of few evaluations that is fitted to the model."""
    start = math.hypot(trained.sigma_max, trained.data_std) * torch.randn(128, 2, generator=_seeded())
    options = {"sigma_min": trained.sigma_min, "sigma_max": trained.sigma_max, "method": "least_squares", "trials": 60}
    return calibrate(trained.model, start, nfe=nfe, **options)


def _seeded(purpose: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(SEED + purpose)


def data_against_data(d: Distribution) -> float:
    """99th percentile of the energy distance between two sets of COUNT exact samples, over REPEATS pairs."""
    found = []
    for i in range(REPEATS):
        generator = torch.Generator().manual_seed(1000 + i)
        found.append(energy_distance(d.sample(COUNT, generator), d.sample(COUNT, generator)))
    return float(torch.tensor(found).quantile(0.99))


def errors(trained: Trained) -> dict[str, dict[int, float]]:
    """By solver and evaluations: the rms distance of 512 samples from those of RK4 in 256 steps, from equal starts."""
    low, high, found = trained.sigma_min, trained.sigma_max, {}
    start = math.hypot(high, trained.data_std) * torch.randn(512, 2, generator=_seeded(2))

    def end(n: int, sampler: Sampler) -> tuple[int, torch.Tensor]:
        levels = None if isinstance(sampler, Calibrated) else sigmas.karras(n, sigma_min=low, sigma_max=high)
        last = list(trajectory(trained.model, start, levels, sampler))[-1]
        return last.nfe, last.x

    exact = end(256, RK4())[1]
    solvers = {"Euler": Euler(), "Heun": Heun(), "DPM-Solver++ (2M)": DPMSolverMultistep(), "UniPC": UniPC()}
    for label, sampler in {**solvers, "Adams-Bashforth": AdamsBashforth()}.items():
        ends = (end(n, sampler) for n in (5, 8, 12, 20, 40))
        found[label] = {nfe: float((x - exact).square().mean().sqrt()) for nfe, x in ends}
    ends = (end(0, fitted(trained, nfe)) for nfe in (6, 10))
    found["calibrated"] = {nfe: float((x - exact).square().mean().sqrt()) for nfe, x in ends}
    return found


def draw(gallery: Gallery, names: tuple[str, ...] = DEFAULT) -> None:
    """samplers_TARGET.png and the table in metrics.json."""
    tables = {}
    for name in names:
        trained = gallery.trained(name)
        d, extent = trained.distribution, extent_of(trained.distribution)
        bar = data_against_data(d)
        data = d.sample(COUNT, _seeded())
        rows = {}
        chosen = settings(trained, gallery.mode == "quick")
        made, axes = figure(6, -(-(len(chosen) + 1) // 6), size=2.6)
        points(axes.flat[0], data, extent, f"data\n99 % of data against data: {bar:.2g}", color="#222222")
        bars = tqdm(chosen.items(), desc=f"samplers on {name}", unit="sampler")
        for panel, (label, (levels, sampler)) in zip(list(axes.flat)[1:], bars, strict=False):
            last: list[Step] = []
            began = time.perf_counter()
            x = sample(
                trained.model,
                (COUNT, 2),
                levels,
                sampler,
                generator=_seeded(1),
                data_std=trained.data_std,
                callback=lambda step, last=last: last.__setitem__(slice(None), [step]),
            )
            seconds, distance = time.perf_counter() - began, energy_distance(data, x)
            rows[label] = {
                "nfe": last[0].nfe,
                "seconds": seconds,
                "energy_distance": distance,
                "passes": distance <= bar,
            }
            points(panel, x, extent, f"{label}\n{last[0].nfe} NFE, {seconds:.1f} s, energy {distance:.2g}")
        for panel in list(axes.flat)[len(chosen) + 1 :]:
            panel.axis("off")
        gallery.save(made, f"samplers_{name}")
        tables[name] = {"samples": COUNT, "seed": SEED, "data_99th_percentile": bar, "samplers": rows}
        tables[name]["errors"] = found = errors(trained)
        made, axes = figure(1, size=5)
        for label, by_nfe in found.items():
            axes[0, 0].loglog(by_nfe.keys(), by_nfe.values(), "o-", ms=3, label=label)
        axes[0, 0].set(xlabel="evaluations of the score", ylabel="rms distance from the exact solution", title=name)
        axes[0, 0].set_xticks(TICKS, [str(n) for n in TICKS])
        axes[0, 0].set_xticks([], minor=True)
        axes[0, 0].legend(fontsize=8)
        gallery.save(made, f"solvers_{name}")
    gallery.record("samplers", {**gallery.numbers().get("samplers", {}), **tables})


if __name__ == "__main__":
    draw(*parse(options(__doc__), DEFAULT))
