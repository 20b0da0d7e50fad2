"""Sampling from a run directory, and writing samples in the data's own range."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ml_collections import ConfigDict
from PIL import Image
from safetensors.torch import load_file

from scorelab import parallel
from scorelab.checks import checked_device, nearest_name
from scorelab.data import Values
from scorelab.models import ScoreModel
from scorelab.noise import PerSampleNoise
from scorelab.plotting.pictures import are_images, picture_bytes, scatter, tiled
from scorelab.precision import prepare
from scorelab.training import Snapshot, checkpoint, default_config, in_turn, reconstruct, sample_model, with_nfe
from scorelab.training.run import recorded_config, recorded_data, recorded_values
from scorelab.typing import Tensor
from scorelab.writing import check_writable, whole

__all__ = [
    "RunSamples",
    "bad_of",
    "check_guided",
    "check_out",
    "condition_of",
    "guide",
    "load_run",
    "sample_run",
    "write_samples",
]


@dataclass(frozen=True)
class RunSamples:
    """Samples (N, *D) as the model sees them, what their numbers mean, the model and the step they come from, and their
    classes (N,), None if they have none."""

    x: Tensor
    values: Values | None
    model: ScoreModel
    step: int
    labels: Tensor | None = None

    @property
    def shown(self) -> bool:
        """Whether a sample can be shown as an image."""
        return are_images(tuple(self.x.shape[1:]))

    @property
    def columns(self) -> int:
        """As many for each class, where they come in turn and are few; 0 where that is not so."""
        count = self.model.num_classes or 0
        turns = in_turn(self.model, len(self.x))
        few = self.labels is not None and turns is not None and torch.equal(self.labels, turns)
        return count * max(1, round(len(self.x) ** 0.5 / count)) if few and 1 < count <= 32 else 0


def load_run(workdir: Path, *, step: int = 0, weights: str = "ema") -> tuple[ConfigDict, ScoreModel, int]:
    """Config, model and step of a run's checkpoint (0: the last); ValueError if it is missing or damaged.

    ``weights``: "model" for the raw ones, "ema" for the first average, "ema_0.9999" or "ema_power_0.1" for another; a
    power-function average of a width that is not stored is made from those that are, in all checkpoints up to the step.

    A directory of a saved model alone is one of step 0, with the default settings of sampling, and without data.
    """
    if (workdir / "model.json").is_file():
        return _saved(workdir, step, weights)
    folder, recorded = workdir / "checkpoints", recorded_config(workdir) if workdir.is_dir() else None
    if recorded is None:
        raise ValueError(f"{workdir} holds no config.json; expected the directory of a run: scorelab train makes one")
    place = folder / f"step_{step:08d}" if step else checkpoint.latest(folder)
    if place is None or not place.is_dir():
        there = ", ".join(str(int(p.name[5:])) for p in sorted(folder.glob("step_*"))) or "none"
        raise ValueError(f"{workdir} has no checkpoint{f' of step {step}' if step else ''}; steps there: {there}")
    try:
        found = checkpoint.verify(place)
    except ValueError as damage:
        raise ValueError(f"{damage}: take another by --step, or train on, which sets it aside") from damage
    config, width = default_config().unlock(), weights.removeprefix("ema_power_")
    # settings that came after the run have their defaults
    with config.ignore_type():
        config.update(recorded)
    first = next(iter(torch.load(place / "training.pt", weights_only=True)["averages"]))
    weights = "ema" if weights == first else weights
    stored = sorted(p.stem for p in place.glob("*.safetensors"))
    if weights in stored:
        return config, ScoreModel.load(place, weights=f"{weights}.safetensors"), found
    if width == weights:
        raise ValueError(
            f"{place} holds no weights {weights!r}; expected {', '.join(stored)}, or ema_power_ and a width"
        )
    model = ScoreModel.load(place)
    averages, error = reconstruct(_snapshots(folder, found), _as_width(width))
    if error > 0.05:
        warnings.warn(
            f"the stored averages can't make up one of width {width} (relative error {error:.2g}): keep more "
            "checkpoints (training.keep_every) or take a width nearer to optim.ema_power",
            RuntimeWarning,
            stacklevel=2,
        )
    model.load_weights(averages)
    return config, model, found


def _saved(folder: Path, step: int, weights: str) -> tuple[ConfigDict, ScoreModel, int]:
    if step or weights not in ("ema", "model"):
        raise ValueError(f"{folder} holds one model and no checkpoints; expected neither --step nor --weights")
    model, config = ScoreModel.load(folder), default_config()
    config.data.source, config.model.conditional = "none", model.conditional
    if model.null_condition is not None:
        config.training.label_dropout = 0.1
    if model.variance:
        config.sampling.sampler = ConfigDict({"name": "ancestral", "variance": "learned"})
    return config, model, 0


def _as_width(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"the width of an average is {text!r}; expected a number such as ema_power_0.1") from error


def _snapshots(folder: Path, step: int) -> list[Snapshot]:
    """The power-function averages of all checkpoints up to a step."""
    found = []
    for place in checkpoint.places(folder):
        files = sorted(place.glob("ema_power_*.safetensors"))
        if files and int(place.name[5:]) <= step:
            checkpoint.verify(place)
            counts = torch.load(place / "training.pt", weights_only=True)["averages"]
            found += [
                Snapshot(counts[f.stem]["count"], float(f.stem.removeprefix("ema_power_")), load_file(f)) for f in files
            ]
    return found


def guide(config: ConfigDict, scale: float | None, interval: str | None, rescale: float | None = None) -> None:
    """Put guidance that was asked for into the experiment's settings; ValueError for an interval or share of none."""
    if scale is not None:
        config.sampling.guidance = scale
    if rescale is not None:
        if not 0 <= rescale <= 1:
            raise ValueError(f"--guidance_rescale is {rescale:g}; expected a share from 0 (none) to 1, such as 0.7")
        config.sampling.guidance_rescale = rescale
    if interval is not None:
        try:
            low, high = (float(part) for part in interval.split(","))
        except ValueError as error:
            raise ValueError(f"--guidance_interval is {interval!r}; expected two noise levels such as 0.2,5") from error
        if not 0 <= low < high:
            raise ValueError(
                f"--guidance_interval is {interval!r}; expected the lower noise level first, such as 0.2,5"
            )
        config.sampling.guidance_interval = (low, high)


def check_guided(labels: Tensor | None, *asked: object) -> None:
    """Refuse (ValueError) guidance that was asked for without a class to guide to."""
    if labels is None and any(option is not None for option in asked):
        raise ValueError(
            "--guidance needs a class to guide to; expected a model with classes, and no --condition=none, or "
            "--autoguidance=STEP"
        )


def bad_of(workdir: Path, config: ConfigDict, model: ScoreModel, step: int, found: int, weights: str) -> ScoreModel:
    """The model of an earlier checkpoint, to guide ``model`` of step ``found`` away from, where that one is.

    Raises ValueError for a checkpoint that is missing or no earlier one, and where no scale was asked for.
    """
    if config.sampling.guidance == 1:
        raise ValueError(f"--autoguidance={step} has a scale of 1, which is none; expected --guidance, such as 2")
    if not 0 < step < found:
        raise ValueError(f"--autoguidance is {step}; expected an earlier step than that of the samples, {found}")
    return load_run(workdir, step=step, weights=weights)[1].to(model.device)


def condition_of(text: str, model: ScoreModel, workdir: Path, n: int) -> Tensor | None:
    """The classes (n,) that ``--condition`` asks for: a class's name or number, "each" in turn, or "none".

    Nothing ("") is each, of a model that has classes. Raises ValueError for what the model does not know.
    """
    if model.num_classes is None:
        if text:
            raise ValueError(
                f"--condition is {text!r}, but this model has no classes; train with model.conditional=True"
            )
        return None
    names = recorded_data(workdir).get("classes") or [str(k) for k in range(model.num_classes)]
    called = [name.casefold() for name in names]
    if called.count(text.casefold()) == 1 or text in names:
        return torch.full((n,), names.index(text) if text in names else called.index(text.casefold()))
    if text in ("", "each"):
        return in_turn(model, n)
    if text == "none":
        # refused where the model knows no such condition
        model.conditioned(None)
        return None
    # by its place only where no class is called by a number
    if text.isascii() and text.isdigit() and int(text) < model.num_classes and not any(n.isdigit() for n in names):
        return torch.full((n,), int(text))
    numbers = "" if any(n.isdigit() for n in names) else f", or a number from 0 to {len(names) - 1}"
    meant = nearest_name(text, [*names, *difflib.get_close_matches(text, ["each", "none"], cutoff=0.7)])
    others = ", each or none" if meant.startswith("known") else ""
    raise ValueError(f"--condition is {text!r}; {meant}{others}{numbers}")


def sample_run(
    workdir: Path,
    *,
    n: int = 0,
    seed: int = 0,
    step: int = 0,
    weights: str = "ema",
    sampler: Path | None = None,
    condition: str = "",
    guidance: float | None = None,
    guidance_interval: str | None = None,
    guidance_rescale: float | None = None,
    autoguidance: int | None = None,
    precision: str = "fp32",
    compile: bool = False,
    device: str = "",
    nfe: int = 0,
    changes: Callable[[ConfigDict], ConfigDict] = lambda config: config,
) -> RunSamples:
    """Samples of a run's checkpoint and ``weights`` (see ``load_run``); sample i depends on (seed, i) alone, and on its
    class (see ``condition_of``). n: 0 for the experiment's own number, or so many of each class. autoguidance: the
    earlier checkpoint to guide away from, instead of from no class. precision, compile: how the network computes (see
    ``prepare``). device: by default the GPU, if there is one. nfe: as many noise levels as take this many evaluations
    at most. changes: what is changed of the experiment's settings.

    Under torchrun every process makes its share and returns all of them.
    """
    config, model, found = load_run(workdir, step=step, weights=weights)
    config = changes(config)
    place = parallel.join()
    prepare(model.to(checked_device(device) if device else place), precision, compile=compile)
    if nfe:
        config = with_nfe(config, model, nfe)
    guide(config, guidance, guidance_interval, guidance_rescale)
    count, classes = n or config.sampling.samples, model.num_classes
    if not n and classes and condition in ("", "each"):
        count = max(1, count // classes) * classes
    labels = condition_of(condition, model, workdir, count)
    bad = None
    if autoguidance is not None:
        bad = bad_of(workdir, config, model, autoguidance, found, weights)
        prepare(bad, precision, compile=compile)
    else:
        check_guided(labels, guidance, guidance_interval, guidance_rescale)
    x = sample_model(model, config, count, PerSampleNoise(seed), condition=labels, bad=bad, sampler=sampler)
    return RunSamples(x, _values(workdir, model), model, found, labels)


def _values(workdir: Path, model: ScoreModel) -> Values | None:
    """What a run's numbers mean; of one that did not record it, by the model's range."""
    found = recorded_values(workdir)
    if found or model.data_range is None:
        return found
    least, most = model.data_range
    # images of bytes are whole numbers
    return Values(least, most, 1.0 if model.data_range == (0.0, 255.0) else 0.0, model.data_range)


def check_out(out: Path) -> None:
    """Refuse what can't be written, before samples are drawn for it: files of another kind, directories in use."""
    if out.suffix not in ("", ".png", ".npz"):
        raise ValueError(f"--out is {out}; expected .png, .npz, or a directory for single PNGs")
    if not out.suffix and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out is {out}, which is there and not empty; expected a new directory, or an empty one")
    check_writable(out if out.suffix else out / "000000.png")


def write_samples(run: RunSamples, out: Path) -> str:
    """Write ``.npz`` (``samples`` as the data has them, images of bytes as uint8 (N, H, W, C)), one PNG (a grid, or a
    scatter plot of vectors), or a directory of PNGs; says what was written. ValueError for what can't be shown so.
    """
    check_out(out)
    images = run.shown
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        x = run.x if run.values is None else run.values.outside(run.x)
        # as the tools that judge images take them
        pixels = (
            images and run.values is not None and (run.values.least, run.values.most, run.values.step) == (0, 255, 1)
        )
        with whole(out) as aside, aside.open("wb") as file:
            levels = picture_bytes(run.x, run.values) if pixels else x.cpu().numpy()
            arrays = {"samples": levels[..., None] if pixels and levels.ndim == 3 else levels}
            if run.labels is not None:
                arrays["labels"] = run.labels.numpy()
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    elif out.suffix == ".png" and run.x.ndim == 2:
        with whole(out) as aside:
            x = run.x if run.values is None else run.values.outside(run.x)
            scatter(x).savefig(aside, format="png")
    elif not images:
        raise ValueError(f"samples of shape {tuple(run.x.shape[1:])} are no images; write them to a .npz file")
    elif out.suffix == ".png":
        with whole(out) as aside:
            Image.fromarray(tiled(run.x, run.values, run.columns)).save(aside, "PNG")
    else:
        out.mkdir(exist_ok=True)
        for i, picture in enumerate(picture_bytes(run.x, run.values)):
            with whole(out / f"{i:06d}.png") as aside:
                Image.fromarray(picture).save(aside, "PNG")
    return f"{len(run.x)} samples{f' of step {run.step}' if run.step else ''}: {out}"
