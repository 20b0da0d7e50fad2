"""Makes the models that come with the package: trains them, judges them, and writes each beside its card.

python -m benchmarks.pretrained [digits fashion_mnist digits_features fashion_mnist_features]

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
from pathlib import Path

import torch

from benchmarks.judge import worth
from benchmarks.minutes import spent
from scorelab import PerSampleNoise, ScoreModel
from scorelab.classifiers import ClassifierModel
from scorelab.cli.runs import load_run
from scorelab.evaluation import FromClassifier
from scorelab.interop.loading import FEATURES, PRETRAINED
from scorelab.training import default_config, load_data, sample_model

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


def trained(config: str, name: str) -> tuple[Path, Path, dict[str, str]]:
    """The run of a config, trained to its end; where its model goes, an empty place; what the card says of the run."""
    workdir, out = ROOT / "runs" / f"pretrained_{name}", ROOT / "scorelab" / "pretrained" / name
    command = [sys.executable, "-m", "scorelab.cli", "train", "--config", config, "--workdir", str(workdir)]
    subprocess.run(command, cwd=ROOT, check=True)
    shutil.rmtree(out, ignore_errors=True)
    recorded = json.loads((workdir / "config.json").read_text())
    t = recorded["training"]
    return (
        workdir,
        out,
        {
            "config": f"`{config}`, seed {recorded['seed']}",
            "training": f"{t['steps']:,} steps of {t['batch_size']}, {spent(workdir):.0f} s, {t['precision']}",
            "machine": f"{cpu()}, {os.cpu_count()} cores, torch {torch.__version__}",
            "made by": f"`make models` (`python -m benchmarks.pretrained {name}`)",
        },
    )


def write_card(out: Path, use: str, told: dict[str, str], quality: str) -> None:
    """``card.md``, of which a copy is printed."""
    rows = [f"| {key} | {value} |" for key, value in told.items()]
    lines = [f"# {out.name}", "", use, "", "| | |", "|---|---|", *rows, "", quality]
    (out / "card.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def size_of(model: ScoreModel | ClassifierModel) -> str:
    return f"{sum(p.numel() for p in model.parameters()):,} parameters, stored in half precision"


def make_model(name: str) -> None:
    """A score model, judged by its samples."""
    workdir, out, told = trained(f"configs/{name}/edm.py", name)
    ScoreModel.load(workdir).save(out, dtype=torch.float16)
    shutil.copy(workdir / "data.json", out)
    # what is judged is what comes with the package
    model = ScoreModel.load(out)
    told = {
        "data": f"{name}, {model.data_shape}, {model.num_classes} classes",
        "network": size_of(model),
        **told,
        **{key: f"{value:.3g}" for key, value in judged(name, model, workdir).items()},
    }
    use = f'`scorelab.load("{name}")`, `scorelab sample --model {name}`: images by class, or of none, for guidance.'
    quality = f"Quality: {COUNT:,} samples without guidance by the config's own sampler; the judge is a network of\n"
    write_card(out, use, told, f"{quality}one hidden layer that learnt from training images.")


def make_features(name: str) -> None:
    """A classifier of images without noise, judged by those that its run held out."""
    data = name.removesuffix("_features")
    workdir, out, told = trained(f"configs/{data}/features.py", name)
    ClassifierModel.load(workdir).save(out, dtype=torch.float16)
    model = ClassifierModel.load(out)
    config = default_config()
    config.data.source = data
    source = load_data(config)
    held = source.hold_out(json.loads((workdir / "config.json").read_text())["data"]["validation"])
    seen = FromClassifier(model)
    both = [seen.both(x) for x in torch.split(held.x0, 500)]
    right = float((torch.cat([logits for _, logits in both]).argmax(1) == held.condition).float().mean())
    told = {
        "data": f"{data}, {model.data_shape}, {model.num_classes} classes",
        "network": f"{size_of(model)}; {both[0][0].shape[1]} features",
        **told,
        "right class": f"{right:.3g} of {len(held.x0):,} held-out images",
    }
    use = f"`scorelab evaluate --features {data}`: what the last layer of a classifier sees, for distances of sets."
    write_card(out, use, told, "Published distances are of Inception's features: these are smaller numbers.")


def main() -> None:
    """Make those that are named, or all."""
    for name in sys.argv[1:] or (*PRETRAINED, *FEATURES):
        (make_features if name in FEATURES else make_model)(name)


if __name__ == "__main__":
    main()
