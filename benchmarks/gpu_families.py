"""Every family on a GPU: python -m benchmarks.gpu_families [DEVICE]

Small networks of configs/digits beside the CPU, in fp32 without TF32; published ones at their true size train in bf16
on random images. Prints one line a check.
"""

from __future__ import annotations

import runpy
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_speed import seconds, wait
from scorelab.training import Trainer, build

ROOT = Path(__file__).parent.parent
# where the release learns a variance, its loss is another's: here without it
TRUE = {
    "cifar10/ddpm": {},
    "cifar10/score_sde_ve_ncsnpp_continuous": {},
    "cifar10/ncsnv2": {},
    "cifar10/edm": {},
    "imagenet_64/adm": {"variance": False},
    "imagenet_64/edm2_s": {},
}


def config_of(name: str) -> Any:
    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()


def families_beside_the_cpu(device: torch.device) -> dict[str, str]:
    """Largest difference of score and gradient, of their largest number, in fp32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    found = {}
    for path in sorted((ROOT / "configs" / "digits").glob("*.py")):
        model = build(config_of(f"digits/{path.stem}")).model
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.net.parameters():
                if not p.any():
                    p.normal_(0, 0.02, generator=generator)
        levels = model.process.sigmas(getattr(model.process, "steps", 10))
        sigma = levels[[0, len(levels) // 2, -1]].float()
        x = torch.randn(3, 1, 8, 8, generator=generator) * (0.5 + sigma.reshape(-1, 1, 1, 1))
        labels = torch.tensor([0, 3, 9]) if model.num_classes else None
        outputs, gradients = [], []
        for place in ("cpu", device):
            model.to(place).zero_grad()
            held = None if labels is None else labels.to(place)
            out = model.eval().denoise(x.to(place), sigma.to(place), held)
            out.square().sum().backward()
            outputs.append(out.detach().cpu())
            gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))
        off = [float((a - b).abs().max() / a.abs().max()) for a, b in (outputs, gradients)]
        found[path.stem] = f"{off[0]:.1e}, {off[1]:.1e}"
    torch.backends.cudnn.allow_tf32 = True
    return found


def true_sizes(device: torch.device) -> dict[str, str]:
    """Images a second of training steps in bf16, and the memory at most."""
    found, batch, count = {}, 64 if device.type == "cuda" else 2, 10 if device.type == "cuda" else 1
    for name, options in TRUE.items():
        with tempfile.TemporaryDirectory() as folder:
            c = config_of(name)
            size = {"cifar10": 32, "imagenet_64": 64}[name.split("/")[0]]
            images = np.random.default_rng(0).integers(0, 256, (2 * batch, 3, size, size), dtype=np.uint8)
            np.savez(f"{folder}/x.npz", images=images, labels=np.arange(2 * batch) % 10)
            c.data.source, c.data.path, c.data.layout = "arrays", f"{folder}/x.npz", "channels_first"
            c.training.batch_size, c.training.precision = batch, "bf16" if device.type == "cuda" else "fp32"
            for key, value in options.items():
                c.model.net[key] = value
                c.sampling.sampler.variance = "posterior"
            experiment = build(c)
            experiment.model.to(device)
            trainer = Trainer(experiment, c)
            start = time.perf_counter()
            trainer.advance()
            wait(device)
            first = time.perf_counter() - start
            took = seconds(lambda t=trainer: [t.advance(False) for _ in range(count)], device, 2)
            count_of = sum(p.numel() for p in experiment.model.parameters()) / 1e6
            memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
            rate = f"{batch * count / took:.0f} images/s, {count_of:.1f} M parameters"
            found[name] = f"{rate}, {memory:.1f} GiB, first step {first:.0f} s"
            print(f"  {name}: {found[name]}", flush=True)
            del experiment, trainer
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
    return found


def main() -> None:
    device = torch.device(sys.argv[1] if sys.argv[1:] else "cuda")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, PyTorch {torch.__version__}, Python {sys.version.split()[0]}")
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    for check in (families_beside_the_cpu, true_sizes):
        try:
            print(f"{check.__name__.replace('_', ' ')}: {check(device)}", flush=True)
        except Exception as error:  # the others are still worth their time
            print(f"{check.__name__} FAILED: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
