"""One training step of a DDPM U-Net (forward, backward, clipping, Adam, EMA) beside diffusers' UNet2DModel.

1.6 M parameters, 32x32x1, batch 64, self-attention with one head at 16x16; both networks have the same number of
parameters, the same optimiser and the same loss. scorelab's step is ``Trainer.advance``, which also makes the batch.
The peer's is the shortest loop that does the same, on a batch that is ready. Both run in turns, in one process; a ratio
is the median over rounds. The convolution peak is what the 3x3 convolutions of this network's half resolution reach by
themselves, forward and backward.

    python -m benchmarks.training [--rounds 7] [--precisions fp32]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.solvers import RESULTS
from scorelab.nn import UNet
from scorelab.precision import multiplies_in_bf16
from scorelab.training import Trainer, build, default_config

BATCH, SIZE, STEPS = 64, 32, 2


def config_of(precision: str, dropout: float) -> Any:
    c = default_config()
    c.data.source = "arrays"
    c.process.name, c.model.prediction, c.model.label = "ddpm", "eps", "index"
    c.model.net.width, c.model.net.multipliers, c.model.net.blocks = 32, (1, 2, 2), 2
    c.model.net.attention, c.model.net.head, c.model.net.dropout = (1,), 64, dropout
    c.training.batch_size, c.training.precision = BATCH, precision
    return c


def scorelab_step(precision: str, dropout: float) -> tuple[Callable[[], object], int]:
    c = config_of(precision, dropout)
    with tempfile.TemporaryDirectory() as folder:
        c.data.path = f"{folder}/images.npy"
        np.save(c.data.path, np.random.default_rng(0).integers(0, 256, (512, SIZE, SIZE), dtype=np.uint8))
        trainer = Trainer(build(c), c)
    return lambda: trainer.advance(measure=False), sum(p.numel() for p in trainer.parameters)


def diffusers_step(precision: str, dropout: float) -> tuple[Callable[[], object], int]:
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=64,
        add_attention=False,
        norm_num_groups=8,
        dropout=dropout,
    ).train()
    if precision == "fp32" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        # as scorelab's, where that is the faster layout
        net.to(memory_format=torch.channels_last)
    parameters = list(net.parameters())
    optimiser = torch.optim.Adam(parameters, lr=2e-4, fused=True)
    average = [p.detach().clone() for p in parameters]
    x0, t = torch.rand(BATCH, 1, SIZE, SIZE) * 2 - 1, torch.randint(0, 1000, (BATCH,))
    noise = torch.randn_like(x0)
    abar = torch.cos(t / 1000 * 1.5).square().reshape(-1, 1, 1, 1)
    x = abar.sqrt() * x0 + (1 - abar).sqrt() * noise

    def step() -> None:
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = (net(x, t).sample.float() - noise).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1e-3)

    return step, sum(p.numel() for p in parameters)


STEPPERS = {"scorelab": scorelab_step, "diffusers": diffusers_step}


def flops() -> int:
    """Multiplications and additions of one step of the network, forward and backward."""
    m = config_of("fp32", 0.0).model
    net = UNet(
        (1, SIZE, SIZE), width=m.width, multipliers=m.multipliers, blocks=m.blocks, attention=m.attention, head=m.head
    )
    with FlopCounterMode(display=False) as counted:
        net(torch.randn(BATCH, 1, SIZE, SIZE), torch.rand(BATCH)).square().mean().backward()
    return int(counted.get_total_flops())


def peak(precision: str) -> float:
    """GFLOP/s of one 3x3 convolution of 64 channels at half resolution, forward and backward, in its better layout."""
    best = 0.0
    for layout in (torch.contiguous_format, torch.channels_last):
        conv = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=layout)
        x = torch.randn(BATCH, 64, SIZE // 2, SIZE // 2).to(memory_format=layout).requires_grad_()

        def run(conv: nn.Module = conv, x: torch.Tensor = x) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                y = conv(x)
            y.backward(torch.ones_like(y))

        with FlopCounterMode(display=False) as counted:
            run()
        seconds = min(timed(run) for _ in range(50))
        best = max(best, counted.get_total_flops() / seconds / 1e9)
    return best


def timed(fn: Callable[[], object]) -> float:
    began = time.perf_counter()
    fn()
    return time.perf_counter() - began


def memory(name: str, precision: str, dropout: float) -> float:
    """MiB of resident memory that three steps add, in a process of their own."""
    code = (
        "import re\nfrom benchmarks.training import STEPPERS\n"
        "most = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = most()\n"
        f"step, _ = STEPPERS[{name!r}]({precision!r}, {dropout})\n"
        "for _ in range(3): step()\n"
        "print((most() - before) / 1024)"
    )
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(child.stdout.split()[-1])


def compare(precision: str, dropout: float, rounds: int) -> dict[str, float]:
    steps, counts = {}, {}
    for name, make in STEPPERS.items():
        steps[name], counts[name] = make(precision, dropout)
        steps[name]()
    assert len(set(counts.values())) == 1, counts
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for k in range(rounds):
        for name, step in list(steps.items())[:: 1 if k % 2 else -1]:
            seconds[name].append(timed(lambda step=step: [step() for _ in range(STEPS)]) / STEPS)
    ratio = statistics.median(b / a for a, b in zip(seconds["scorelab"], seconds["diffusers"], strict=True))
    rates = {f"{name}_images_per_second": BATCH / statistics.median(s) for name, s in seconds.items()}
    return {"ratio": ratio, **rates, "parameters": counts["scorelab"]}


def machine() -> str:
    """What decides these numbers of a CPU."""
    has = {
        "AVX-512": torch.backends.cpu.get_cpu_capability() == "AVX512",
        "bf16 instructions": multiplies_in_bf16(torch.device("cpu")),
    }
    said = ", ".join(f"{'with' if there else 'without'} {name}" for name, there in has.items())
    return f"Measured on a CPU {said}, {torch.get_num_threads()} threads."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precisions", default="fp32,bf16" if multiplies_in_bf16(torch.device("cpu")) else "fp32")
    options = parser.parse_args()
    work, out = flops(), RESULTS / "training.json"
    # rows of other precisions, measured before on a machine like this one, stay
    before = json.loads(out.read_text()) if out.exists() else {}
    rows = before["rows"] if before.get("machine") == machine() else {}
    for precision in options.precisions.split(","):
        for dropout in (0.0, 0.1):
            row = compare(precision, dropout, options.rounds)
            most = peak(precision)
            reached = work / BATCH * row["scorelab_images_per_second"] / 1e9
            row |= {"gflops": reached, "peak_gflops": most, "share_of_peak": reached / most}
            row |= {f"{name}_mib": memory(name, precision, dropout) for name in STEPPERS}
            rows[f"{precision}, dropout {dropout:g}"] = row
            print(precision, dropout, {k: round(v, 3) for k, v in row.items()}, flush=True)
            found = {"machine": machine(), "rows": rows}
            out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
