"""What fitting a sampler to an image model costs, and what it brings: 10 evaluations, both ways.

digits           the U-Net of configs/digits/ncsn.py after 700 steps, 8x8
fashion_mnist    a U-Net of 28x28 with random weights: fitting costs the same whatever the weights

python -m benchmarks.calibration [digits] [fashion_mnist]
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import torch
from tqdm.auto import tqdm

from benchmarks.solvers import RESULTS
from scorelab import VE, PerSampleNoise, ScoreModel
from scorelab.models import UnitVariance
from scorelab.nn import UNet
from scorelab.predictions import edm
from scorelab.samplers import calibrate
from scorelab.training import Trainer, build

NFE, STARTS, TRIALS, ITERATIONS = 10, 64, 100, 60


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digits() -> ScoreModel:
    config = load(Path(__file__).parent.parent / "configs" / "digits" / "ncsn.py").get_config()
    config.training.steps = 700
    trainer = Trainer(build(config), config)
    for _ in tqdm(range(700), desc="training digits", unit="step"):
        trainer.advance(measure=False)
    return trainer.averaged()


def fashion_mnist() -> ScoreModel:
    torch.manual_seed(0)
    net = UNet((1, 28, 28), width=32, blocks=1)
    for p in net.parameters():
        # outputs start at 0: make them something to integrate
        torch.nn.init.normal_(p, std=0.02) if not p.any() else None
    scale = UnitVariance(0.5)
    model = ScoreModel(net, VE(0.01, 50.0), edm(0.5), data_shape=(1, 28, 28), input_scale=scale, label="log_sigma")
    return model.eval().requires_grad_(False)


def main() -> None:
    results = RESULTS / "calibration.json"
    models = {"digits": digits, "fashion_mnist": fashion_mnist}
    chosen = sys.argv[1:] or list(models)
    # what is not chosen keeps its rows
    rows: dict[str, dict[str, float]] = json.loads(results.read_text()) if sys.argv[1:] else {}
    for name in chosen:
        model = models[name]()
        low, high = model.sigma_range
        x = high * PerSampleNoise(0)(torch.empty(STARTS, *model.data_shape))
        for method in ("least_squares", "gradient"):
            found = calibrate(
                model,
                x,
                nfe=NFE,
                sigma_min=low,
                sigma_max=high,
                method=method,
                trials=TRIALS,
                iterations=ITERATIONS,
                progress=True,
            )
            rows[f"{name}, {method}"] = found.report
            print(name, method, found.report, flush=True)
            results.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
