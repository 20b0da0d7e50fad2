"""What ``sample`` costs beside the score: seconds of ``sample`` over seconds of NFE bare calls, interleaved in one run.

MLPs of depth 4 and widths 128 and 256 on 2-D batches of 64, 1,024 and 10,000, and a small U-Net. Each ratio is the
median over rounds; in a round both are timed once, in turns, so that a noisy machine weighs on both alike. Also: noise
per sample against plain noise for 256 images of 28x28.

    python -m benchmarks.overhead
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.solvers import RESULTS
from scorelab import PerSampleNoise, ScoreModel, sample, sigmas
from scorelab.nn import UNet
from scorelab.noise import Noise
from scorelab.processes import VE
from scorelab.samplers import DDIM, AdamsBashforth, Ancestral, DPMSolverMultistep, Euler, Heun, Sampler, UniPC

STEPS, ROUNDS = 20, 21
SAMPLERS: dict[str, Sampler] = {
    "Euler": Euler(),
    "Heun": Heun(),
    "DDIM": DDIM(),
    "DDIM, eta = 1": DDIM(1.0),
    "ancestral": Ancestral(),
    "Adams-Bashforth 3, eps": AdamsBashforth(3),
    "DPM-Solver++ 2M": DPMSolverMultistep(2),
    "DPM-Solver++ 3M": DPMSolverMultistep(3),
    "UniPC-3": UniPC(3),
}


def mlp(width: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A plain network of x and log sigma, 4 hidden layers."""
    layers: list[nn.Module] = [nn.Linear(3, width), nn.SiLU()]
    for _ in range(3):
        layers += [nn.Linear(width, width), nn.SiLU()]
    net = nn.Sequential(*layers, nn.Linear(width, 2)).requires_grad_(False)

    def score(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return net(torch.cat([x, sigma.log().expand(len(x), 1)], 1)) / sigma

    return score


def timed(fn: Callable[[], object]) -> float:
    began = time.perf_counter()
    fn()
    return time.perf_counter() - began


def ratio(
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], shape: tuple[int, ...], sampler: Sampler
) -> float:
    levels = sigmas.karras(STEPS, sigma_min=0.02, sigma_max=20.0)
    x, generator, nfe = 20 * torch.randn(shape), torch.Generator().manual_seed(0), 0

    def counting(y: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        nonlocal nfe
        nfe += 1
        return score(y, sigma)

    sample(counting, x, levels, sampler, generator=generator)
    calls, level = nfe, torch.tensor(1.0)

    @torch.no_grad()
    def bare() -> None:
        for _ in range(calls):
            score(x, level)

    found = []
    for _ in range(ROUNDS):
        found.append(timed(lambda: sample(score, x, levels, sampler, generator=generator)) / timed(bare))
    return statistics.median(found)


def noise_ratio() -> float:
    x, plain, mine = torch.empty(256, 1, 28, 28), Noise(torch.Generator().manual_seed(0), reuse=True), PerSampleNoise(0)
    found = []
    for _ in range(ROUNDS):
        a = timed(lambda: [mine(x) for _ in range(20)])
        found.append(a / timed(lambda: [plain(x) for _ in range(20)]))
    return statistics.median(found)


def main() -> None:
    rows: dict[str, dict[str, float]] = {}
    unet = ScoreModel(UNet((1, 16, 16), width=32), VE(0.01, 50.0), data_shape=(1, 16, 16)).eval().requires_grad_(False)
    cases = [(f"MLP 4 x {w}, batch {b}", mlp(w), (b, 2)) for w in (128, 256) for b in (64, 1024, 10_000)]
    for name, score, shape in [*cases, ("U-Net, 16 images of 16x16", unet, (16, 1, 16, 16))]:
        rows[name] = {key: ratio(score, shape, sampler) for key, sampler in SAMPLERS.items()}
        print(name, {k: round(v, 3) for k, v in rows[name].items()}, flush=True)
    noise = noise_ratio()
    print("noise per sample / plain noise:", round(noise, 3))
    (RESULTS / "overhead.json").write_text(json.dumps({"ratios": rows, "per_sample_noise": noise}, indent=1) + "\n")


if __name__ == "__main__":
    main()
