"""Large requests in a budget of memory: 1,000,000 points of the plane and 50,000 images of 8x8, in one process each.

Networks with random weights: what they take does not depend on what they have learnt. ``peak`` is the process's largest
resident set during the request beyond what it was before, the result included.

    python -m benchmarks.large
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

import torch

from benchmarks.solvers import RESULTS
from scorelab import VE, PerSampleNoise, ScoreModel, sample, sigmas
from scorelab.models import LogSigma
from scorelab.nn import MLP, UNet
from scorelab.samplers import DPMSolverMultistep

BUDGET = 256 * 2**20
CASES = {"points": (1_000_000, (2,)), "images": (50_000, (1, 8, 8))}


def run(case: str) -> dict[str, float]:
    count, shape = CASES[case]
    net = MLP(shape) if len(shape) == 1 else UNet(shape, width=32)
    model = ScoreModel(net, VE(0.01, 50.0), data_shape=shape, label=LogSigma(1.0)).eval().requires_grad_(False)
    levels = sigmas.karras(5, sigma_min=0.02, sigma_max=20.0)
    # whatever is made once, before the request is measured
    sample(model, (16, *shape), levels, DPMSolverMultistep(2), generator=PerSampleNoise(0))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    sizes = []

    def counted(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return model(x, sigma)

    x = sample(counted, (count, *shape), levels, DPMSolverMultistep(2), generator=PerSampleNoise(0), memory=BUDGET)
    assert x.shape == (count, *shape)
    return {
        "samples": count,
        "nfe": 5,
        "budget_mib": BUDGET / 2**20,
        "result_mib": x.numel() * 4 / 2**20,
        "peak_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "rows_in_a_part": max(sizes),
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(run(sys.argv[1])))
        return
    rows = {}
    for case in CASES:
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.large", case], check=True, capture_output=True, text=True
        )
        rows[case] = json.loads(child.stdout)
        print(case, rows[case], flush=True)
    (RESULTS / "large.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
