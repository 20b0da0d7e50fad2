"""What every figure shares: where results go, and models that are trained once."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from tqdm.auto import tqdm

from scorelab.checks import nearest_name
from scorelab.distributions import LABELLED, STD, TARGETS, Distribution, target
from scorelab.models import ScoreModel
from scorelab.training import Trainer, build, default_config
from scorelab.training.config import sigma_data_of

__all__ = ["Gallery", "Trained", "config_for", "options", "parse"]

STEPS = {"full": 3300, "quick": 1000}
"""Training steps a target: at most 30 s and 15 s on 2 CPU cores."""


@dataclass(frozen=True)
class Trained:
    """A target, its learnt score, and what the training took."""

    name: str
    distribution: Distribution
    model: ScoreModel
    data_std: float
    seconds: float
    steps: int

    @property
    def sigma_min(self) -> float:
        """The smallest noise level of the model: a tenth of the target's standard deviation."""
        return self.model.sigma_range[0]

    @property
    def sigma_max(self) -> float:
        """The largest noise level: 20 times the data's root mean square."""
        return self.model.sigma_range[1]


def sigma_min_for(name: str) -> float:
    """A tenth of the target's standard deviation; the checkerboard's squares have standard deviation 0.29."""
    return STD[name] / 10 if name in STD else 0.02


def config_for(name: str, steps: int) -> ConfigDict:
    """The experiment that learns a target: the same for all but for the noise levels."""
    c = default_config()
    c.data.source = name
    c.model.net.name, c.model.prediction, c.model.net.width, c.model.net.features = "mlp", "edm", 128, 32
    c.process.sigma_min = sigma_min_for(name)
    scale = sigma_data_of(target(name).sample(10_000, torch.Generator().manual_seed(0)))
    c.process.sigma_max = round(20 * scale, 3)
    if name in LABELLED:
        c.model.conditional, c.training.label_dropout = True, 0.1
    c.training.sigmas.name, c.training.weighting.name, c.training.steps = "tapered", "sigma2", steps
    c.training.batch_size, c.training.objective.reference = 512, 2048
    c.optim.lr, c.optim.beta2, c.optim.schedule.name = 1e-2, 0.99, "cosine"
    return c


class Gallery:
    """A directory of figures, numbers and trained models."""

    def __init__(self, out: Path, mode: str = "full") -> None:
        self.out, self.mode, self.steps = out, mode, STEPS[mode]
        out.mkdir(parents=True, exist_ok=True)
        self._trained: dict[str, Trained] = {}

    def trained(self, name: str) -> Trained:
        """The target's model: from memory, from the gallery's directory, or trained now."""
        if name not in self._trained:
            self._trained[name] = self._load_or_train(name)
        return self._trained[name]

    def _load_or_train(self, name: str) -> Trained:
        # of targets with labels a step takes longer, for its averages are over those of a label
        steps = min(self.steps, 2000) if name in LABELLED else self.steps
        config = config_for(name, steps)
        distribution, place = target(name), self.out / "models" / f"{name}_{steps}"
        record = place / "training.json"
        settings = json.loads(config.to_json())
        data_std = config.process.sigma_max / 20
        if record.is_file():
            kept = json.loads(record.read_text())
            if kept["config"] == settings:
                model = ScoreModel.load(place)
                return Trained(name, distribution, model, data_std, kept["seconds"], steps)
        trainer = Trainer(build(config), config)
        began = time.perf_counter()
        for _ in tqdm(range(steps), desc=f"training {name}", unit="step"):
            trainer.advance(measure=False)
        seconds = time.perf_counter() - began
        model = trainer.averaged()
        model.save(place)
        _write(record, {"config": settings, "seconds": seconds})
        return Trained(name, distribution, model, data_std, seconds, steps)

    def save(self, figure: Figure, name: str) -> None:
        """Write ``name``.png, as large as everything that is drawn needs."""
        figure.savefig(self.out / f"{name}.png", bbox_inches="tight")

    def record(self, name: str, numbers: object) -> None:
        """Put the numbers of a figure into metrics.json, beside those of the others (and of other processes)."""
        parts = self.out / "numbers"
        parts.mkdir(exist_ok=True)
        _write(parts / f"{name}.json", numbers)
        _write(self.out / "metrics.json", self.numbers())

    def numbers(self) -> dict[str, Any]:
        """The numbers of all figures that have been drawn."""
        return {path.stem: json.loads(path.read_text()) for path in sorted((self.out / "numbers").glob("*.json"))}


def _write(path: Path, value: object) -> None:
    """Write JSON so that it appears whole."""
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(value, indent=1) + "\n")
    aside.replace(path)


def options(description: str | None) -> argparse.ArgumentParser:
    """What every figure takes: --target (may be repeated), --out, --quick."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--target", action="append", help=f"one of {', '.join(TARGETS)}; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("runs/toy"), help="directory of the gallery")
    parser.add_argument("--quick", action="store_true", help="train half as long")
    return parser


def parse(parser: argparse.ArgumentParser, default: tuple[str, ...]) -> tuple[Gallery, tuple[str, ...]]:
    """The gallery and the targets that the command line asks for."""
    arguments = parser.parse_args()
    names = tuple(arguments.target or default)
    for name in names:
        if name not in TARGETS:
            parser.error(f"unknown target {name!r}; {nearest_name(name, TARGETS)}")
    return Gallery(arguments.out, "quick" if arguments.quick else "full"), names
