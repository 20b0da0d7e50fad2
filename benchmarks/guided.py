"""Guided digits: are they what was asked for? And DDIM there and back. ``python -m benchmarks.guided --out runs/x``

configs/digits/{conditional,ddpm,classifier}.py are trained by the command line, if they are not there. Samples, each
class in turn, are judged by a network of one hidden layer that learnt from other digits (scikit-learn, see judge.py)
and has nothing to do with what guides; standard errors in brackets. Held-out digits are encoded by DDIM and decoded.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.judge import known
from scorelab import sample, sigmas
from scorelab.cli.runs import load_run
from scorelab.cli.sampling import sample_run
from scorelab.cli.steering import Steering
from scorelab.inverse import encode
from scorelab.samplers import DDIM
from scorelab.typing import Tensor

ROOT = Path(__file__).parents[1]
NAMES = ("conditional", "ddpm", "classifier")
SCALES = (1.0, 2.0, 4.0)


def agreement(x: Tensor, labels: Tensor) -> str:
    """The share of samples (N, 1, 8, 8) that the judge takes for what they were asked to be."""
    *_, judge = known("digits")
    right = (judge.predict(x.flatten(1).numpy()) == labels.numpy()).mean()
    return f"{right:.3f} ({(right * (1 - right) / len(x)) ** 0.5:.3f})"


def round_trip(run: Path, steps: int, exact: bool) -> str:
    """Root mean square of decoded minus held-out digits in [-1, 1], by DDIM over so many of the process's steps."""
    _, model, _ = load_run(run)
    images, _, _, held, _ = known("digits")
    x0 = images[held[:64]].reshape(-1, 1, 8, 8)
    levels = sigmas.from_betas(model.process.betas, steps)
    latent = encode(model, x0, levels, DDIM(), exact=exact)
    back = sample(model, latent, levels, DDIM())
    return f"{float((back - x0).square().mean().sqrt()):.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "guided")
    options = parser.parse_args()
    for name in NAMES:
        command = ["train", "--config", f"configs/digits/{name}.py", "--workdir", str(options.out / name)]
        subprocess.run([sys.executable, "-m", "scorelab.cli", *command], cwd=ROOT, check=True)
    conditional, free, classifier = (options.out / name for name in NAMES)
    print("| scale | classifier-free | by a classifier |\n|---|---|---|")
    for scale in SCALES:
        first = sample_run(conditional, n=options.n, steering=Steering("each", scale))
        second = sample_run(free, n=options.n, steering=Steering("each", scale, classifier=str(classifier)))
        print(f"| {scale:g} | {agreement(first.x, first.labels)} | {agreement(second.x, second.labels)} |", flush=True)
    print("\n| DDIM steps | run upwards | inverted |\n|---|---|---|")
    for steps in (50, 100, 250):
        print(f"| {steps} | {round_trip(free, steps, False)} | {round_trip(free, steps, True)} |", flush=True)


if __name__ == "__main__":
    main()
