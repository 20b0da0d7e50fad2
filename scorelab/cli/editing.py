"""``scorelab edit``: images changed towards a class by the codes of a diffusion autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from scorelab import parallel
from scorelab.checks import checked_device, nearest_name
from scorelab.cli.analysis import data_for, with_data
from scorelab.cli.overrides import config_file, parse
from scorelab.cli.restoring import read_images
from scorelab.cli.runs import load_run
from scorelab.cli.sampling import values_of
from scorelab.data.sources import Stored
from scorelab.latent import Directions, codes, decoded, latents
from scorelab.latent.diffae import check_semantic
from scorelab.models import ScoreModel
from scorelab.plotting.pictures import are_images, tiled
from scorelab.writing import check_writable, whole

__all__ = ["directions_of", "edit", "edit_run"]

_MOST = 10_000
"""Codes that directions are learnt from."""


def edit_run(
    workdir: Path,
    image: Path,
    out: Path,
    *,
    towards: str,
    strength: float = 1.0,
    steps: int = 100,
    step: int = 0,
    weights: str = "ema",
    device: str = "",
    data: ConfigDict | None = None,
) -> str:
    """Write images (a file, a folder or arrays), what their codes and latents give back, and the same with the codes
    moved ``towards`` a class, a row each, into ``out``, a .png; says how likely a linear classifier of codes holds that
    class before and after.

    The classifier learns from the run's data, or that of the config ``data``, and is kept beside the checkpoints.
    Raises ValueError for a model without such codes, data without classes, or a class that is not known.
    """
    config, model, found = load_run(workdir, step=step, weights=weights)
    check_semantic(model)
    if steps < 1 or not -100 <= strength <= 100:
        raise ValueError(f"--steps is {steps}, --strength is {strength:g}; expected 1 or more steps, about 1")
    if not are_images(model.data_shape) or out.suffix != ".png":
        raise ValueError(f"--out is {out}, of data {model.data_shape}; expected images, and a name that ends in .png")
    check_writable(out)
    numbers = values_of(workdir, model)
    x0 = read_images(image, numbers, model.data_shape[0] == 1, config.data.background)
    if x0.shape[1:] != model.data_shape:
        raise ValueError(f"--image={image} is {tuple(x0.shape[1:])}; expected {model.data_shape}, as the model's data")
    model.to(checked_device(device) if device else parallel.join())
    kept = workdir / f"directions_{found}_{weights}.safetensors"
    ways = directions_of(model, with_data(config, data), kept)
    called = [name.casefold() for name in ways.classes]
    if towards.casefold() not in called:
        raise ValueError(f"--towards is {towards!r}; {nearest_name(towards, ways.classes)}")
    k = called.index(towards.casefold())
    x0 = x0.to(model.device)
    z = codes(model, x0)
    latent, moved = latents(model, x0, z, steps=steps), ways.towards(z, k, strength)
    back, edited = (decoded(model, some, latent, steps=steps) for some in (z, moved))
    rows = torch.stack([x0, back, edited], 1).flatten(0, 1)
    with whole(out) as aside:
        Image.fromarray(tiled(rows, numbers, columns=3)).save(aside, "PNG")
    before, after, seen = (ways.probabilities(some)[:, k] for some in (z, moved, codes(model, edited)))
    off = float((back - x0).square().mean().sqrt())
    lines = [f"given back {off:.2g} off the images, black being -1 and white 1"]
    lines += [
        f"image {i}: {ways.classes[k]} {a:.3f} before, {b:.3f} of the moved code, {c:.3f} of the code of what it became"
        for i, (a, b, c) in enumerate(zip(before.tolist(), after.tolist(), seen.tolist(), strict=True))
    ]
    lines.append(f"the classifier of codes is right for {ways.accuracy:.3f} of codes that it did not learn from: {out}")
    return "\n".join(lines)


def directions_of(model: ScoreModel, config: ConfigDict, kept: Path) -> Directions:
    """Those in the file ``kept``, or else learnt from the config's data, and written there."""
    if kept.is_file():
        return Directions.load(kept)
    source = data_for(model, config)
    if not isinstance(source, Stored) or source.labels is None or not source.classes:
        raise ValueError(f"data.source={config.data.source!r} has no classes; expected data with labels to learn from")
    if config.data.validation:
        source.hold_out(config.data.validation)
    index = source.trained
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))[:_MOST]]
    z = torch.cat([codes(model, source.take(some).to(model.device)).cpu() for some in torch.split(index, 1000)])
    found = Directions.fit(z, source.labels[index], source.classes)
    found.save(kept)
    return found


def edit(arguments: list[str]) -> None:
    """The command."""
    asked = any(argument.partition("=")[0] == "--config" for argument in arguments)
    data, arguments = config_file(arguments) if asked else (None, arguments)
    values = flags.FlagValues()  # type: ignore[no-untyped-call]
    for name, number in {"steps": 100, "step": 0}.items():
        flags.DEFINE_integer(name, number, name, flag_values=values)
    for name, text in {"workdir": None, "image": None, "towards": None, "out": None}.items():
        flags.DEFINE_string(name, text, name, flag_values=values)
    for name, default in {"weights": "ema", "device": ""}.items():
        flags.DEFINE_string(name, default, name, flag_values=values)
    flags.DEFINE_float("strength", 1.0, "of 1, as far as the class lies", flag_values=values)
    parse(arguments, values)
    missing = [f"--{name}" for name in ("workdir", "image", "towards") if not values[name].value]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} missing; expected scorelab edit --workdir RUN --image FILE --towards CLASS"
        )
    workdir, image = (Path(str(values[name].value)).expanduser() for name in ("workdir", "image"))
    towards, strength = str(values["towards"].value), float(values["strength"].value or 0)
    named = f"edited_{image.stem}_towards_{towards.replace('/', '_')}_{strength:g}.png"
    out = Path(values["out"].value or workdir / "samples" / named).expanduser()
    options: dict[str, Any] = {name: values[name].value for name in ("steps", "step", "weights", "device")}
    print(edit_run(workdir, image, out, towards=towards, strength=strength, data=data, **options))
