"""Forward pass and gradient of published networks' sizes, beside diffusers' UNet2DModel of the same architecture.

DDPM for CIFAR-10 (35.7 M parameters), and ADM for 64 px at a third of its width, whose blocks scale and shift.
Both networks have as many parameters, in fp32; no weights are shared. They run in turns, in one process, on batches
that are ready; a ratio is the median over rounds.

    python -m benchmarks.networks [--rounds 5] [--batch 4]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import nn

from benchmarks.solvers import RESULTS
from benchmarks.training import machine, timed
from scorelab.nn import adm, ddpm


def ddpm_cifar10() -> tuple[nn.Module, nn.Module, int]:
    ours = ddpm((3, 32, 32), dropout=0.0)
    theirs = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=256,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    return ours, theirs, 32


def adm_64() -> tuple[nn.Module, nn.Module, int]:
    ours = adm((3, 64, 64), width=64, variance=True, dropout=0.0)
    theirs = UNet2DModel(
        sample_size=64,
        out_channels=6,
        block_out_channels=(64, 128, 192, 256),
        layers_per_block=3,
        down_block_types=("ResnetDownsampleBlock2D", *("AttnDownBlock2D",) * 3),
        up_block_types=(*("AttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
        attention_head_dim=64,
        attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
    )
    return ours, theirs, 64


CASES = {"DDPM, CIFAR-10": ddpm_cifar10, "ADM, 64 px, width 64": adm_64}


def passes(net: nn.Module, x: torch.Tensor, steps: torch.Tensor) -> dict[str, Callable[[], Any]]:
    def output() -> torch.Tensor:
        out = net(x, steps)
        return out if isinstance(out, torch.Tensor) else out.sample

    def forward() -> None:
        with torch.no_grad():
            output()

    def gradient() -> None:
        net.zero_grad(set_to_none=True)
        output().square().mean().backward()

    return {"forward": forward, "gradient": gradient}


def compare(name: str, batch: int, rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    ours, theirs, size = CASES[name]()
    count, other = (sum(p.numel() for p in net.parameters()) for net in (ours, theirs))
    assert count == other, (count, other)
    x, steps = torch.randn(batch, 3, size, size), torch.arange(batch) * (1000 // batch)
    runs = {key: passes(net, x, steps) for key, net in (("scorelab", ours), ("diffusers", theirs))}
    row: dict[str, float] = {"parameters": count, "batch": batch}
    for kind in ("forward", "gradient"):
        seconds: dict[str, list[float]] = {key: [] for key in runs}
        for k in range(rounds + 1):
            for key in list(runs)[:: 1 if k % 2 else -1]:
                # the first round is not counted
                seconds[key].append(timed(runs[key][kind]))
        pairs = zip(seconds["scorelab"][1:], seconds["diffusers"][1:], strict=True)
        row[f"{kind}_ratio"] = statistics.median(b / a for a, b in pairs)
        row |= {f"{key}_{kind}_seconds": statistics.median(s[1:]) for key, s in seconds.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    rows = {}
    for name in CASES:
        rows[name] = compare(name, options.batch, options.rounds)
        print(name, {k: round(v, 3) for k, v in rows[name].items()}, flush=True)
    (RESULTS / "networks.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
