"""Trains every small config to its end, draws 1,000 samples of each by its own sampler, and says what they are worth.

python -m benchmarks.families [--jobs 1] [--steps N] [--n 1000] [--out runs/families] [NAME ...]

A name is such as digits/edm; without one, all of configs/digits and configs/fashion_mnist. What is done is not done
again. The judge of classes is a network of one hidden layer (scikit-learn) that learnt from training images.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.neural_network import MLPClassifier

from scorelab.data import Files, load
from scorelab.evaluation import nearest_distances
from scorelab.plotting.pictures import tiled
from scorelab.typing import Tensor

ROOT = Path(__file__).parents[1]
DATA = ("digits", "fashion_mnist")


@functools.cache
def known(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor, MLPClassifier]:
    """Images and labels that the judge learnt from, those that it did not, and the judge."""
    data = load(name, Files("", (), False, False, False, False, "", "white", ""))
    images, labels = data.take(torch.arange(len(data))).flatten(1), data.labels
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(images)))
    seen, held = order[: min(20_000, len(order) * 2 // 3)], order[-min(5000, len(order) // 3) :]
    judge = MLPClassifier((128,), alpha=1e-2, max_iter=100, early_stopping=True, random_state=0)
    judge.fit(images[seen].numpy(), labels[seen].numpy())
    return images, labels, seen, held, judge


def worth(name: str, x: Tensor, asked: Tensor | None) -> dict[str, float]:
    """What samples (N, D) in [-1, 1] are worth beside images, by class if they were asked for one."""
    images, labels, seen, held, judge = known(name)
    near, _ = nearest_distances(x, images)
    own, _ = nearest_distances(images[seen[:1000]], images[held])
    right = {}
    if asked is not None:
        right = {
            "right class, samples": float((judge.predict(x.numpy()) == asked.numpy()).mean()),
            "right class, unseen images": float((judge.predict(images[held].numpy()) == labels[held].numpy()).mean()),
        }
    return right | {
        "mean, samples": float(x.mean()),
        "mean, images": float(images.mean()),
        "deviation, samples": float(x.std()),
        "deviation, images": float(images.std()),
        "distance to the nearest image, samples": float(near.median()),
        "distance to the nearest other image, images": float(own.median()),
    }


def run(name: str, out: Path, n: int, steps: int) -> dict[str, Any]:
    """Train and sample one config, by the command line; seconds, and the last line of what failed."""
    workdir, samples = out / name, out / f"{name.replace('/', '-')}.npz"
    record, command = workdir / "seconds.json", [sys.executable, "-m", "scorelab.cli"]
    if record.is_file():
        return json.loads(record.read_text())
    found: dict[str, Any] = {}
    more = [f"--config.training.steps={steps}"] * bool(steps)
    conditional = "c.model.conditional" in (ROOT / "configs" / f"{name}.py").read_text()
    for work, options in (
        ("train", ["--config", f"configs/{name}.py", *more]),
        ("sample", ["--n", str(n), "--batch_size", str(n), "--out", str(samples), *["--condition=each"] * conditional]),
    ):
        begun = time.perf_counter()
        ended = subprocess.run(
            [*command, work, "--workdir", str(workdir), *options], cwd=ROOT, capture_output=True, text=True
        )
        found[work] = time.perf_counter() - begun
        if ended.returncode:
            return found | {"failed": (ended.stderr.strip().splitlines() or ["nothing said"])[-1]}
    record.write_text(json.dumps(found))
    return found


def judged(name: str, samples: Path) -> dict[str, float]:
    """What a file of samples is worth; its picture is written beside it."""
    held = np.load(samples)
    data, size = name.split("/")[0], 8 if name.startswith("digits") else 28
    x = torch.from_numpy(held["samples"]).float().reshape(-1, 1, size, size) / (8 if data == "digits" else 127.5) - 1
    Image.fromarray(tiled(x[:100], columns=10)).save(samples.with_suffix(".png"))
    return worth(data, x.flatten(1), torch.from_numpy(held["labels"]) if "labels" in held else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "families")
    options = parser.parse_args()
    # those of the larger images take longest
    every = [
        f"{d}/{p.stem}"
        for d in reversed(DATA)
        for p in sorted((ROOT / "configs" / d).glob("*.py"))
        if p.stem not in ("classifier", "features")
    ]
    names = options.names or every
    options.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        done = [pool.submit(run, name, options.out, options.n, options.steps) for name in names]
        for name, work in zip(names, done, strict=True):
            found = work.result()
            if "failed" not in found:
                found |= judged(name, options.out / f"{name.replace('/', '-')}.npz")
            print(json.dumps({"config": name, **{k: v if k == "failed" else round(v, 4) for k, v in found.items()}}))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
