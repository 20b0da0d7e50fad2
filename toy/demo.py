"""``make demo``: the gallery on four targets, a digits model trained and sampled, and one page of it all."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch

from scorelab.cli.sampling import load_run, sample_model
from scorelab.data import digits
from scorelab.evaluation import nearest_distances
from scorelab.plotting import figure, image_grid
from toy.__main__ import Section, draw_all
from toy.common import Gallery
from toy.page import write_page

TARGETS = ("two_modes", "ring", "swiss_roll", "checkerboard")
OUT = Path("runs/demo")
DIGITS_STEPS = 700
"""Of the 2,500 that the experiment sets itself, to stay within minutes."""


def digits_section(out: Path) -> Section:
    """Train configs/digits/ncsn.py by the command line, sample it, and compare with the nearest training images."""
    run = out / "digits"
    began = time.perf_counter()
    command = [sys.executable, "-m", "scorelab.cli", "train", "--config", "configs/digits/ncsn.py"]
    command += [f"--config.training.steps={DIGITS_STEPS}", "--workdir", str(run)]
    subprocess.run(command, check=True)
    trained = time.perf_counter() - began
    config, model, step = load_run(run)
    began = time.perf_counter()
    x = sample_model(model, config, 100, torch.Generator().manual_seed(0))
    sampled = time.perf_counter() - began
    data = digits().x0
    distance, index = nearest_distances(x, data)
    own, _ = nearest_distances(data, data, same=True)
    made, axes = figure(2, size=4.4)
    image_grid(axes[0, 0], x, "100 samples, annealed Langevin")
    pairs = torch.stack([x[:50].reshape(5, 10, 1, 8, 8), data[index[:50]].reshape(5, 10, 1, 8, 8)], 1)
    image_grid(axes[0, 1], pairs.reshape(-1, 1, 8, 8), "rows in pairs: a sample, its nearest training image")
    made.savefig(out / "digits.png")
    numbers = {
        "training_steps": step,
        "training_seconds": trained,
        "sampling_seconds": sampled,
        "median_distance_to_nearest_training_image": float(distance.median()),
        "1st_percentile_train_against_train": float(own.quantile(0.01)),
        "least_distance": float(distance.min()),
    }
    text = (
        "The experiment configs/digits/ncsn.py, for 700 of its 2,500 steps: a score model of 8x8 digits, sampled by "
        "annealed Langevin dynamics. Every second row shows the nearest training images."
    )
    return "Digits", text, [out / "digits.png"], numbers


def main() -> None:
    """Draw, train, sample, and print the path of the page."""
    began = time.perf_counter()
    gallery = Gallery(OUT, "quick")
    sections = [digits_section(OUT), *draw_all(gallery, TARGETS)]
    page = write_page(OUT / "index.html", "scorelab: what it does, on this machine", sections)
    print(f"{page.resolve()} ({time.perf_counter() - began:.0f} s)")


if __name__ == "__main__":
    main()
