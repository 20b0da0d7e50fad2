"""``make demo``: the gallery on four targets, a digits model trained and sampled, and one page of it all."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from scorelab.cli.runs import load_run
from scorelab.data import digits
from scorelab.evaluation import nearest_distances
from scorelab.plotting import figure, image_grid
from scorelab.plotting.page import write_page
from scorelab.training import in_turn, sample_model
from toy import samplers
from toy.__main__ import FIGURES, Section, draw_all, sections
from toy.common import Gallery

TARGETS = ("two_modes", "ring", "swiss_roll", "checkerboard")
OUT = Path("runs/demo")
DIGITS_STEPS = 1000
"""Of the 4,000 that the experiment sets itself, to stay within minutes."""


class Aside(threading.Thread):
    """Work for the second core: train the digits by the command line, then compare the samplers on three targets.

    Its progress bars stand below those of the rest. ``toys`` says to it that the 2-D models are trained, ``digits``
    says that the digits' training has ended, ``failed`` which commands failed.
    """

    def __init__(self, out: Path) -> None:
        super().__init__(daemon=True)
        self.out, self.failed, self.process = out, "", None
        self.toys, self.digits = threading.Event(), threading.Event()

    def run(self) -> None:
        training = ["scorelab.cli", "train", "--config", "configs/digits/conditional.py"]
        training += [f"--config.training.steps={DIGITS_STEPS}", "--workdir", str(self.out / "digits")]
        targets = [word for name in TARGETS[1:] for word in ("--target", name)]
        self._call(training)
        self.digits.set()
        self.toys.wait()
        self._call(["toy.samplers", "--quick", "--out", str(self.out), *targets])

    def _call(self, command: list[str]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_POSITION": "1"}
        self.process = subprocess.Popen([sys.executable, "-m", *command], env=environment)
        if self.process.wait():
            self.failed += f"failed: {' '.join(command)}\n"


def digits_section(out: Path) -> Section:
    """Sample the trained digits model by class, and compare with the nearest training images."""
    run = out / "digits"
    config, model, step = load_run(run)
    began = time.perf_counter()
    config.sampling.guidance = 2.0
    classes = in_turn(model, 100)
    x = sample_model(model, config, 100, torch.Generator().manual_seed(0), condition=classes)
    sampled = time.perf_counter() - began
    data = digits().reference()
    distance, index = nearest_distances(x, data)
    own, _ = nearest_distances(data, data, same=True)
    made, axes = figure(2, size=4.4)
    image_grid(axes[0, 0], x, "a column a class, guidance scale 2, Heun")
    pairs = torch.stack([x[:50].reshape(5, 10, 1, 8, 8), data[index[:50]].reshape(5, 10, 1, 8, 8)], 1)
    image_grid(axes[0, 1], pairs.reshape(-1, 1, 8, 8), "rows in pairs: a sample, its nearest training image")
    made.savefig(out / "digits.png")
    numbers = {
        "training_steps": step,
        "sampling_seconds": sampled,
        "median_distance_to_nearest_training_image": float(distance.median()),
        "1st_percentile_train_against_train": float(own.quantile(0.01)),
        "least_distance": float(distance.min()),
    }
    text = (
        "The experiment configs/digits/conditional.py, for 1,000 of its 4,000 steps: a score model of 8x8 digits by "
        "class, trained with a tenth of the labels left out and sampled with classifier-free guidance of scale 2, as "
        "scorelab sample --condition each --guidance 2 does. Every second row shows the nearest training images."
    )
    return "Digits", text, [out / "digits.png"], numbers


def main() -> None:
    """Draw, train, sample, and print the path of the page."""
    began = time.perf_counter()
    gallery = Gallery(OUT, "quick")
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    aside = Aside(OUT)
    aside.start()
    try:
        for name in TARGETS:
            gallery.trained(name)
        aside.toys.set()
        draw_all(gallery, TARGETS, [key for key in FIGURES if key != "samplers"])
        # the other core compares them on the other targets
        samplers.draw(gallery, TARGETS[:1])
        aside.digits.wait()
        found = digits_section(OUT)
        aside.join()
        if aside.failed:
            raise RuntimeError(aside.failed)
    finally:
        if aside.process is not None:
            aside.process.kill()
    pages = [found, *sections(gallery, TARGETS)]
    page = write_page(OUT / "index.html", "scorelab: what it does, on this machine", pages)
    print(f"{page.resolve()} ({time.perf_counter() - began:.0f} s)")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
