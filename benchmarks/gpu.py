"""What a GPU computes beside what the CPU does: python -m benchmarks.gpu [DEVICE]

Prints one line a check. The suite itself hides GPUs, so that it gives the same results on every machine.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scorelab import VE, PerSampleNoise, ScoreModel, broadcast, check_score, from_eps, log_likelihood, sample, sigmas
from scorelab.cli.main import main as scorelab
from scorelab.distributions import GaussianMixture
from scorelab.models import Constant, LogSigma
from scorelab.nn import MLP
from scorelab.predictions import edm
from scorelab.samplers import (
    DDIM,
    RK4,
    AdamsBashforth,
    AdaptiveReverseSDE,
    Ancestral,
    AnnealedLangevin,
    Churn,
    ConsistentLangevin,
    DPMSolverMultistep,
    DPMSolverSinglestep,
    Euler,
    Heun,
    Langevin,
    LangevinCorrector,
    MetropolisLangevin,
    Midpoint,
    PredictorCorrector,
    ProbabilityFlow,
    ReverseDiffusion,
    ReverseSDE,
    Sampler,
    SDEDPMSolver,
    StochasticHeun,
    UnderdampedLangevin,
    UniPC,
    calibrate,
)
from scorelab.training import Trainer, build, default_config, train
from scorelab.typing import Tensor

LEVELS = [*sigmas.geometric(8, sigma_min=0.05, sigma_max=8.0).tolist(), 0.0]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(device: torch.device | str, dims: int = 2) -> GaussianMixture:
    means = 2 * torch.randn(4, dims, generator=generator(), dtype=torch.float64)
    return GaussianMixture(means.to(device), 0.3)


def samplers(log_prob: Callable[[Tensor, Tensor], Tensor]) -> list[Sampler]:
    plain = [Euler(), Heun(), Midpoint(), RK4(), AdamsBashforth(), DPMSolverMultistep(), DPMSolverSinglestep(), UniPC()]
    noisy = [Ancestral(), DDIM(0.5), Churn(), SDEDPMSolver(), ReverseSDE(), StochasticHeun(), ReverseDiffusion(VE())]
    langevin = [Langevin(3), AnnealedLangevin(3), UnderdampedLangevin(3), ConsistentLangevin()]
    adaptive = [ProbabilityFlow(), AdaptiveReverseSDE(), PredictorCorrector(ProbabilityFlow())]
    metropolis = MetropolisLangevin(log_prob=log_prob, steps=5)
    return [*plain, *noisy, *langevin, *adaptive, metropolis, PredictorCorrector(Heun(), LangevinCorrector())]


def samplers_beside_the_cpu(device: torch.device) -> dict[str, float]:
    """Largest difference of 64 samples in float64, the same noise."""
    x, off = 8 * torch.randn(64, 2, generator=generator(), dtype=torch.float64), {}
    here, there = mixture("cpu"), mixture(device)
    for a, b in zip(samplers(here.log_prob), samplers(there.log_prob), strict=True):
        own = sample(here.score, x, LEVELS, a, generator=generator(1))
        its = sample(there.score, x.to(device), LEVELS, b, generator=generator(1))
        off[type(a).__name__] = max(off.get(type(a).__name__, 0.0), float((own - its.cpu()).abs().max()))
    return off


def densities_beside_the_cpu(device: torch.device) -> dict[str, float]:
    x, off = mixture("cpu", 8).sample(8, generator(2)), {}
    for name in ("exact", "hutchinson", "hutch++"):
        options = {"divergence": name, "probes": 6}
        own = log_likelihood(mixture("cpu", 8).score, x, 0.05, 20.0, generator=generator(), **options).log_prob
        its = log_likelihood(mixture(device, 8).score, x.to(device), 0.05, 20.0, generator=generator(), **options)
        off[name] = float((own - its.log_prob.cpu()).abs().max())
    return off


class Graphed:
    """A model replayed from a CUDA graph for each shape: every call overwrites what the last one returned."""

    def __init__(self, model: ScoreModel) -> None:
        self.model = model
        self.known: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        key = (*x.shape, sigma.ndim)
        if key not in self.known:
            a, b, stream = x.clone(), sigma.clone(), torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.model(a, b)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = self.model(a, b)
            self.known[key] = graph, a, b, out
        graph, a, b, out = self.known[key]
        a.copy_(x)
        b.copy_(sigma)
        graph.replay()
        return out


def network(device: torch.device | str) -> ScoreModel:
    torch.manual_seed(0)
    net = MLP((2,), width=128, depth=3)
    model = ScoreModel(net, VE(), edm(1.5), data_shape=(2,), input_scale=Constant(1 / 1.5), label=LogSigma(1.5))
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def cuda_graphs_beside_eager(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    model, off = network(device), {}
    graphed, x = Graphed(model), 8 * torch.randn(64, 2, generator=generator()).to(device)
    for sampler in samplers(lambda x, s: -x.square().sum(1) / 2):
        eager, replayed = (sample(s, x, LEVELS, sampler, generator=generator(1)) for s in (model, graphed))
        off[type(sampler).__name__] = float((eager - replayed).abs().max())
    return off


def half_precision(device: torch.device) -> dict[str, float]:
    """Relative to float32, from sigma = 500; N(0, I)."""

    def eps(x: Tensor, sigma: Tensor) -> Tensor:
        s = broadcast(sigma, x)
        return (x.float() * s / (1 + s**2)).to(x.dtype)

    levels = sigmas.karras(12, sigma_min=0.01, sigma_max=500.0)
    wanted = (torch.float32, torch.float16, torch.bfloat16)
    found = [sample(from_eps(eps), (256, 3), levels, device=device, generator=generator(), dtype=d) for d in wanted]
    return {str(d): float((x.float() - found[0]).norm() / found[0].norm()) for d, x in zip(wanted, found, strict=True)}


def fits_and_checks(device: torch.device) -> dict[str, Any]:
    """A calibrated sampler knows its network on both devices; check_score takes the exact score, not its double."""
    model, x = network(device), 40 * torch.randn(40, 2, generator=generator()).to(device)
    fitted = calibrate(model, x, nfe=4, sigma_min=0.02, sigma_max=40.0, trials=20, iterations=5, reference_steps=32)
    options: dict[str, Any] = {"sampler": fitted, "generator": PerSampleNoise(0)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = sample(model, (1000, 2), memory=2**22, **options) - sample(model, (1000, 2), **options)
        sample(network("cpu"), (10, 2), **options)
    d, data = mixture(device), mixture("cpu").sample(500, generator()).to(device)
    checks = [check_score(lambda x, s, k=k: k * d.score(x, s), data, sigma_min=0.05, sigma_max=10.0).ok for k in (1, 2)]
    return {"in parts": float(parts.abs().max()), "exact, doubled": checks}


def bf16_gradients(device: torch.device) -> dict[str, Any]:
    """Relative error of all gradients of one step in the precision "auto" beside fp32, for kinds of shapes."""
    off: dict[str, Any] = {}
    for shape, multipliers in (
        *(((1, 4, 8, 8), (1, 2)), ((1, 2, 8, 8), (1, 2)), ((1, 7, 7), (1, 2, 2, 2)), ((3, 32, 32), (1, 2, 2))),
        *(((2, 16), (1, 2)), ((1, 2, 2), (1,))),
    ):
        found = []
        for precision in ("fp32", "auto"):
            c = default_config()
            with tempfile.TemporaryDirectory() as folder:
                np.save(f"{folder}/x.npy", np.random.default_rng(0).normal(size=(64, *shape)))
                c.data.source, c.data.path, c.data.layout = "arrays", f"{folder}/x.npy", "channels_first"
                c.model.net.width, c.model.net.blocks, c.model.net.multipliers = 32, 1, multipliers
                c.training.batch_size, c.training.precision = 32, precision
                experiment = build(c)
            experiment.model.to(device)
            trainer = Trainer(experiment, c)
            trainer._gradients(trainer.batches.at(0))
            found.append(torch.cat([p.grad.double().flatten().cpu() for p in trainer.parameters if p.grad is not None]))
        off[str(shape)] = trainer.precision, float((found[0] - found[1]).norm() / found[0].norm())
    return off


def a_run(device: torch.device) -> dict[str, Any]:
    """Digits: 40 steps at once and stopped after 20; sampling and likelihood by the command line."""
    folder = Path(tempfile.mkdtemp())

    def config(steps: int) -> Any:
        c = default_config()
        c.data.validation, c.model.net.width, c.model.net.dropout = 64, 32, 0.1
        c.training.steps, c.training.batch_size, c.training.checkpoint_every = steps, 64, 20
        c.training.sample_every, c.training.log_every = 0, 20
        return c

    whole = train(config(40), folder / "a", progress=False)
    train(config(20), folder / "b", progress=False)
    resumed = train(config(40), folder / "b", progress=False)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        codes = [scorelab(["sample", f"--workdir={folder / 'a'}", "--n=16"])]
        codes += [scorelab(["likelihood", f"--workdir={folder / 'a'}", "--n=4", "--levels=17", "--tolerance=1e-2"])]
    rows = [json.loads(line) for line in (folder / "a" / "metrics.jsonl").read_text().splitlines()]
    weights = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    return {
        "largest difference after a resume": max(float((a - b).abs().max()) for a, b in weights),
        "sample, likelihood": codes,
        "images a second": [round(r["images_per_second"]) for r in rows if "images_per_second" in r],
    }


def main() -> None:
    device = torch.device(sys.argv[1] if sys.argv[1:] else "cuda")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, PyTorch {torch.__version__}, Python {sys.version.split()[0]}")
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    for check in (
        *(samplers_beside_the_cpu, densities_beside_the_cpu, cuda_graphs_beside_eager, half_precision),
        *(fits_and_checks, bf16_gradients, a_run),
    ):
        print(f"{check.__name__.replace('_', ' ')}: {check(device)}", flush=True)


if __name__ == "__main__":
    main()
