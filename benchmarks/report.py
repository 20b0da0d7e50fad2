"""Writes docs/benchmarks.md from ``benchmarks/results/*.json``; the last step of ``make bench``.

python -m benchmarks.report
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.solvers import RESULTS, table
from benchmarks.stochastic import NFE

DOCS = Path(__file__).parent.parent / "docs" / "benchmarks.md"
PROBLEMS = {
    "gmm2d": """### Eight Gaussians on a circle

Standard deviation 0.08, on the unit circle; starts at sigma 80, in double precision.""",
    "digits": """### A mixture at 1,797 digits

Standard deviation 0.15 at scikit-learn's digits (64 dimensions); starts at sigma 80, in double precision.""",
    "trained": """### A trained network

The gallery's network for the two moons after 2,800 steps, between its own noise levels, in double precision.""",
}
HEAD = """# Benchmarks

Written by `make bench`, which makes an environment of its own with the peers (`benchmarks/peers.txt`) beside scorelab,
runs all of `benchmarks/` and keeps the numbers in `benchmarks/results/`. scorelab's rows come from its public API. Of
k-diffusion and smalldiffusion only the modules with samplers are loaded: the rest imports torchvision, which does not
import beside the CPU build of torch that `constraints.txt` pins. A shared machine with 2 cores and no GPU: seconds and
ratios vary from run to run, errors don't."""
SOLVERS = """## Error against NFE, deterministic solvers

The measure is the root mean square over dimensions between a sample and the ODE's solution from the same start (400
steps of RK4, then denoised), averaged over starts (4,096; 1,024 on digits and for the network). "Best uncalibrated" is
the best of scorelab's solvers on 6 grids, "best peer" the best row of all installed libraries; ratios are to the best
peer. The calibrated sampler is fitted to other starts (512; 960 on digits): by least squares, which only evaluates the
score, and from there by descent.

![Error against NFE](../benchmarks/results/solvers.png)"""
STOCHASTIC = """## Distance of distributions against NFE, stochastic samplers

Energy distance between samples and as many exact ones (4,096; 512 on digits), mean and standard error of 4 seeds;
Karras grids from 80 to 0.002 (azula's: log-linear).

![Energy distance against NFE](../benchmarks/results/stochastic.png)"""
OVERHEAD = """## What `sample` costs beside the score

Seconds of `sample` over seconds of as many bare calls of the score under `no_grad`: 20 steps, 2 threads, median of
rounds that time both in turns."""
CALIBRATION = """## Fitting a sampler to an image model

10 evaluations, 64 starts, 100 grids tried, 60 steps of descent. digits: the experiment `configs/digits/ncsn.py` after
700 steps. fashion_mnist: a U-Net of 28x28 images with random weights, for the cost alone. Errors are held out; the
uncalibrated ones are exponential Adams-Bashforth's of order 3 on Karras's grid."""
LARGE = """## Large requests

`sample(..., memory=...)` with noise per sample, 5 evaluations: points by an MLP, images of 8x8 by a U-Net. Peak: the
process's largest resident set beyond what it was before, the result included. A part's tensors get half of the budget,
for what kernels use inside themselves and what the allocator keeps of freed memory; the convolutions of image networks
take more than that: there count on twice the budget."""
TRAINING = """## Training

One step (forward, backward, clipping, Adam, EMA) of a DDPM U-Net of 1.6 M parameters on 64 images of 32x32x1,
self-attention with one head at 16x16, beside diffusers' UNet2DModel of the same architecture and number of parameters,
in turns in one process; the ratio is the median over rounds, above 1 where scorelab is faster. scorelab's step also
makes the batch. The share is of the convolution peak: what 3x3 convolutions reach by themselves, forward and backward,
in the better of two layouts. MiB: resident memory that three steps add, in a process of their own; it varies by 5 %.

Where scorelab's time goes in fp32 with dropout, by PyTorch's profiler: convolutions 68 % (oneDNN's, as the peer's: the
weights' gradients alone a quarter of the step, at two thirds of the forward pass's speed; copies between layouts 10 %),
attention 9 %, other matrix products 4 %, SiLU 4 %, dropout 3 %, group norm 3 %, copies 3 %, the rest 6 %. Convolutions
and attention alone take longer than a step at 1.4 times the peer's speed would."""


NETWORKS = """## Published networks

A forward pass, and a forward and backward pass, of networks at published sizes beside diffusers' UNet2DModel of the
same architecture and number of parameters, in fp32, in turns in one process; a ratio is the median over rounds, above 1
where scorelab is faster."""


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def seconds(rows: dict[str, dict[str, float]]) -> str:
    parts = []
    for method, text in (("least_squares", "by least squares"), ("gradient", "with the descent")):
        found = [v for k, v in rows[f"scorelab calibrated, {method}"].items() if k.endswith("seconds")]
        parts.append(f"{min(found):.0f} to {max(found):.0f} s {text}")
    return "Fitting one sampler took " + " and ".join(parts) + "."


def solvers() -> list[str]:
    found = read("solvers")["results"]
    return [SOLVERS] + [
        part for name, text in PROBLEMS.items() for part in (text, table(found[name]), seconds(found[name]))
    ]


def stochastic() -> list[str]:
    parts = [STOCHASTIC]
    for name, rows in read("stochastic").items():
        body = [[k, *(f"{r[str(n)]:.2g} ± {r[f'{n} standard error']:.1g}" for n in NFE)] for k, r in rows.items()]
        parts += [PROBLEMS[name].splitlines()[0], markdown(["sampler", *map(str, NFE)], body)]
    return parts


def overhead() -> list[str]:
    found = read("overhead")
    names = list(next(iter(found["ratios"].values())))
    body = [[case, *(f"{row[n]:.2f}" for n in names)] for case, row in found["ratios"].items()]
    noise = f"`PerSampleNoise` over plain noise for 256 images of 28x28: {found['per_sample_noise']:.2f}."
    return [OVERHEAD, markdown(["case", *names], body), noise]


def calibration() -> list[str]:
    keys = ("held_out_error", "uncalibrated_held_out_error", "seconds")
    body = [[name, *(f"{row[k]:.3g}" for k in keys)] for name, row in read("calibration").items()]
    return [CALIBRATION, markdown(["model and method", "error", "uncalibrated", "seconds"], body)]


def large() -> list[str]:
    keys = ("budget_mib", "result_mib", "peak_mib", "rows_in_a_part", "seconds")
    body = [[f"{row['samples']:,} {name}", *(f"{row[k]:,.0f}" for k in keys)] for name, row in read("large").items()]
    return [LARGE, markdown(["request", "budget, MiB", "result, MiB", "peak, MiB", "rows in a part", "seconds"], body)]


def training() -> list[str]:
    found = read("training")
    keys = {"ratio": ".2f", "scorelab_images_per_second": ".1f", "diffusers_images_per_second": ".1f", "gflops": ".0f"}
    keys |= {"share_of_peak": ".2f", "scorelab_mib": ",.0f", "diffusers_mib": ",.0f"}
    body = [[name, *(f"{row[k]:{form}}" for k, form in keys.items())] for name, row in found["rows"].items()]
    head = ["precision", "ratio", "scorelab, images/s", "diffusers, images/s", "GFLOP/s", "share of peak"]
    return [TRAINING, found["machine"], markdown([*head, "scorelab, MiB", "diffusers, MiB"], body)]


def networks() -> list[str]:
    found = read("networks")
    keys = {"parameters": ",.0f", "batch": ".0f", "forward_ratio": ".2f", "gradient_ratio": ".2f"}
    keys |= {"scorelab_gradient_seconds": ".2f", "diffusers_gradient_seconds": ".2f"}
    body = [[name, *(f"{row[k]:{form}}" for k, form in keys.items())] for name, row in found["rows"].items()]
    head = ["network", "parameters", "batch", "forward, ratio", "with gradient, ratio", "scorelab, s", "diffusers, s"]
    return [NETWORKS, found["machine"], markdown(head, body)]


def main() -> None:
    parts = [HEAD]
    for section in (solvers, stochastic, overhead, calibration, large, training, networks):
        if (RESULTS / f"{section.__name__}.json").is_file():
            parts += section()
    DOCS.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
