"""Makes the models that come with the package: trains them, judges them, and writes each beside its card.

python -m benchmarks.pretrained [digits fashion_mnist]

A run that is there already is gone on with, or taken as it is when it is done. The judge is a network of one hidden
layer (scikit-learn) that learnt from training images; it is judged in turn on images that it has not seen.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.families import worth
from scorelab import PerSampleNoise, ScoreModel
from scorelab.cli.runs import load_run
from scorelab.interop.loading import PRETRAINED
from scorelab.training import sample_model

ROOT = Path(__file__).parents[1]
COUNT = 1000


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor())


def judged(name: str, model: ScoreModel, workdir: Path) -> dict[str, float]:
    """What samples of each class in turn are worth, beside images that the judge has not seen."""
    config, _, _ = load_run(workdir)
    asked = torch.arange(COUNT) % model.num_classes
    begun = time.perf_counter()
    sample_model(model, config, 64, PerSampleNoise(1), condition=asked[:64], progress=False)
    seconds = time.perf_counter() - begun
    x = sample_model(model, config, COUNT, PerSampleNoise(0), condition=asked, progress=False).clamp(-1, 1).flatten(1)
    return {"seconds for 64": seconds} | worth(name, x, asked)


def main() -> None:
    """Make those that are named, or all."""
    for name in sys.argv[1:] or PRETRAINED:
        config, workdir, out = f"configs/{name}/edm.py", ROOT / "runs" / f"pretrained_{name}", ROOT / "scorelab"
        out = out / "pretrained" / name
        command = [sys.executable, "-m", "scorelab.cli", "train", "--config", config, "--workdir", str(workdir)]
        subprocess.run(command, cwd=ROOT, check=True)
        shutil.rmtree(out, ignore_errors=True)
        ScoreModel.load(workdir).save(out, dtype=torch.float16)
        shutil.copy(workdir / "data.json", out)
        # what is judged is what comes with the package
        model = ScoreModel.load(out)
        found = judged(name, model, workdir)
        recorded = json.loads((workdir / "config.json").read_text())
        seconds = [json.loads(row)["seconds"] for row in (workdir / "metrics.jsonl").read_text().splitlines()]
        # of every start
        spent = sum(a for a, b in pairwise([*seconds, 0.0]) if b < a)
        t, count = recorded["training"], sum(p.numel() for p in model.parameters())
        told = {
            "data": f"{name}, {model.data_shape}, {model.num_classes} classes",
            "config": f"`{config}`, seed {recorded['seed']}",
            "network": f"{count:,} parameters, stored in half precision",
            "training": f"{t['steps']:,} steps of {t['batch_size']}, {spent:.0f} s, {t['precision']}",
            "machine": f"{cpu()}, {os.cpu_count()} cores, torch {torch.__version__}",
            "made by": f"`make models` (`python -m benchmarks.pretrained {name}`)",
        }
        told |= {key: f"{value:.3g}" for key, value in found.items()}
        lines = [
            f"# {name}",
            "",
            f'`scorelab.load("{name}")`, `scorelab sample --model {name}`: images by class, or of none, for guidance.',
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in told.items()),
            "",
            f"Quality: {COUNT:,} samples without guidance by the config's own sampler; the judge is a network of",
            "one hidden layer that learnt from training images.",
        ]
        (out / "card.md").write_text("\n".join(lines) + "\n")
        print("\n".join(lines))


if __name__ == "__main__":
    main()
