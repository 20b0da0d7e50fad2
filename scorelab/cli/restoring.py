"""``scorelab restore``: images of which a part, a mean or a blurred copy is known, drawn from the posterior of a model.

y = A(x0) + noise_std eps, in the model's scale (black -1, white 1):

    inpaint        A takes the pixels where the mask is black
    colourise      the mean of the channels
    super_resolve  the means of blocks of factor x factor pixels
    deblur         the convolution with a Gaussian, circular at the edges

Sample i of an image follows from (seed, i) and that image alone.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from absl import flags
from PIL import Image
from torch.nn.functional import interpolate

from scorelab import parallel
from scorelab.checks import checked_device, nearest_name
from scorelab.cli.overrides import parse, sampling_changed
from scorelab.cli.runs import load_run, place_of
from scorelab.cli.sampling import RunSamples, values_of, write_samples
from scorelab.cli.steering import condition_of
from scorelab.data import Files, Values, load
from scorelab.data.decoding import Listing, decode
from scorelab.data.sources import Stored
from scorelab.inverse import (
    Blur,
    Colourisation,
    Inpainting,
    LinearOperator,
    Measurement,
    SuperResolution,
)
from scorelab.plotting.pictures import are_images, tiled
from scorelab.training.restoring import DEFAULT, METHODS, posterior_samples, usual_nfe
from scorelab.typing import Shape, Tensor
from scorelab.writing import check_writable, whole

__all__ = [
    "Measured",
    "measure",
    "operator_of",
    "restore",
]

_OPTION = {"inpaint": "mask", "colourise": "", "super_resolve": "factor", "deblur": "blur"}
"""The tasks, and the option that each has to itself."""
_ROUNDING = 2 / 255 / math.sqrt(12)
"""What rounding to bytes leaves in an image, as a standard deviation: a blur can't be undone beyond it."""


@dataclass(frozen=True)
class Measured:
    """What is known of images: y (K, *operator.shape) and the picture of it (K, *data_shape), as the model sees them;
    ``degraded``: what was done to the images beforehand, "" if nothing was."""

    operator: LinearOperator
    y: Tensor
    picture: Tensor
    degraded: str = ""


def restore(arguments: list[str]) -> None:
    """The command; its name first. Raises ValueError for what can't be used."""
    given = [a for a in arguments if a.startswith("--config.")]
    values = _flags()
    parse([a for a in arguments if not a.startswith("--config.")], values)
    asked: dict[str, Any] = {name: values[name].value for name in values}
    task, n, nfe = _checked(asked)
    workdir, place = place_of(asked["workdir"], asked["model"])
    config, model, found = load_run(workdir, step=int(asked["step"] or 0), weights=str(asked["weights"]))
    config = sampling_changed(config, given)
    if not are_images(model.data_shape) or model.codec is not None:
        raise ValueError(f"{workdir} is a model of {model.data_shape}; expected one of gray or colour images as pixels")
    numbers = values_of(workdir, model)
    operator = operator_of(task, model.data_shape, mask=asked["mask"], factor=asked["factor"], blur=asked["blur"])
    images = read_images(Path(asked["image"]).expanduser(), numbers, model.data_shape[0] == 1, config.data.background)
    measured = measure(operator, images, asked["image"])
    noise_std = max(float(asked["noise_std"]), _ROUNDING if task == "deblur" else 0.0)
    method = asked["method"] or DEFAULT
    levels_given = any(a.startswith("--config.sampling.grid.") for a in given)
    evaluations = nfe or (0 if levels_given else usual_nfe(config, model, method))
    out = Path(asked["out"] or place / f"{_named(asked, task, found)}.png").expanduser()
    check_writable(out)

    model.to(checked_device(asked["device"]) if asked["device"] else parallel.join())
    labels = condition_of(asked["condition"] or ("none" if model.conditional else ""), model, workdir, n)
    measurement = Measurement(operator, measured.y, noise_std)
    options: dict[str, Any] = {"method": method, "labels": labels, "nfe": evaluations, "progress": True}
    x = posterior_samples(model, config, measurement, n, int(asked["seed"] or 0), **options)
    if out.suffix == ".npz":
        write_samples(RunSamples(x.flatten(0, 1), numbers, model, found), out)
    else:
        rows = torch.cat([measured.picture.unsqueeze(1), x], 1).flatten(0, 1)
        with whole(out) as aside:
            Image.fromarray(tiled(rows, numbers, columns=1 + n)).save(aside, "PNG")
    off = float((operator(x.flatten(0, 1)) - measured.y.repeat_interleave(n, 0)).square().mean().sqrt())
    notes = [f"{n} samples of {len(x)} image{'s' if len(x) > 1 else ''} by {method}", measured.degraded]
    notes.append(f"{off:.2g} off what is known, black being -1 and white 1")
    if off > max(0.05, 5 * noise_std):
        notes.append(f"far more than its noise: check --noise_std{' and --blur' if task == 'deblur' else ''}")
    print(f"{'; '.join(filter(None, notes))}: {out}")


def _named(asked: dict[str, Any], task: str, step: int) -> str:
    """The name of a picture: what was asked for, and the seed."""
    weights, seed = str(asked["weights"]), int(asked["seed"] or 0)
    parts = [task, Path(asked["image"]).stem, f"{step:08d}" if step else "", weights if weights != "ema" else ""]
    parts += [asked["method"] or "", f"nfe_{asked['nfe']}" if asked["nfe"] else "", asked["condition"] or ""]
    return "_".join(filter(None, [*parts, f"seed_{seed}" if seed else ""])).replace("/", "_")


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()  # type: ignore[no-untyped-call]
    for name, number in {"n": 4, "seed": 0, "step": 0, "factor": None, "nfe": None}.items():
        flags.DEFINE_integer(name, number, name, flag_values=values)
    for name, size in {"noise_std": 0.0, "blur": None}.items():
        flags.DEFINE_float(name, size, name, flag_values=values)
    texts: dict[str, str | None] = dict.fromkeys(["workdir", "model", "task", "image", "mask", "method", "out"])
    for name, text in {**texts, "weights": "ema", "condition": "", "device": ""}.items():
        flags.DEFINE_string(name, text, name, flag_values=values)
    return values


def _checked(asked: dict[str, Any]) -> tuple[str, int, int]:
    """Task, number of samples and evaluations (0: the default) of options that go together; ValueError for others."""
    task, n, nfe, noise_std = asked["task"], int(asked["n"] or 0), asked["nfe"], asked["noise_std"]
    if task not in _OPTION:
        raise ValueError(f"--task is {task or 'missing'}; known: {', '.join(sorted(_OPTION))}")
    for other, option in _OPTION.items():
        if option and other != task and asked[option] is not None:
            raise ValueError(f"--{option} is for --task={other}; expected none with --task={task}")
    if not asked["image"]:
        raise ValueError("--image is missing; expected an image file, a folder of them, or a .npy or .npz of arrays")
    if n < 1 or (nfe is not None and nfe < 1):
        raise ValueError(f"--n is {n}, --nfe is {nfe}; expected 1 or more")
    if noise_std is None or not 0 <= noise_std < math.inf:
        raise ValueError(f"--noise_std is {noise_std}; expected a number >= 0, black being -1 and white 1")
    method = asked["method"]
    if method and method not in METHODS:
        raise ValueError(f"--method is {method!r}; {nearest_name(method, METHODS)}")
    if method in ("replacement", "repaint") and task != "inpaint":
        raise ValueError(f"--method={method} is for --task=inpaint; expected another with --task={task}")
    if asked["out"] and Path(asked["out"]).suffix not in (".png", ".npz"):
        raise ValueError(f"--out is {asked['out']}; expected a name that ends in .png or .npz")
    return task, n, int(nfe or 0)


def operator_of(
    task: str, shape: Shape, *, mask: str | None = None, factor: int | None = None, blur: float | None = None
) -> LinearOperator:
    """What is known of images (C, H, W) in a task; mask: a file, blur: a standard deviation in pixels.

    Raises ValueError for a mask of another size or of one colour, a factor that does not divide the size, a blur that
    is not positive or too wide, and for colours of a gray model; RuntimeWarning for a mask with much gray, as photos.
    """
    if task == "inpaint":
        return Inpainting(_known(mask, shape), shape)
    if task == "colourise":
        if shape[0] == 1:
            raise ValueError("--task=colourise needs a model of colour images, and this one is of gray ones")
        return Colourisation(shape)
    if task == "super_resolve":
        return SuperResolution(shape, 2 if factor is None else factor)
    most = min(shape[1:]) / 6
    if blur is None or not 0 < blur <= most:
        raise ValueError(
            f"--blur is {blur or 'missing'}; expected the standard deviation of the blur in pixels, up to {most:.3g}"
        )
    reach = min(math.ceil(3 * blur), (min(shape[1:]) - 1) // 2)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / blur) ** 2)
    weights /= weights.sum()
    return Blur(weights.outer(weights), shape)


def _known(mask: str | None, shape: Shape) -> Tensor:
    """True where a mask is black, (1, H, W)."""
    meaning = "white where pixels are to be filled in, black where they are known"
    if not mask:
        raise ValueError(f"--mask is missing; expected an image of {_size(shape)} pixels, {meaning}")
    pixels = torch.from_numpy(_decoded(Path(mask).expanduser(), Files(grayscale=True), "--mask"))
    known = pixels < 128
    if known.shape[1:] != shape[1:]:
        raise ValueError(f"--mask={mask} is {_size(known.shape)}, the model's images {_size(shape)}; expected the same")
    if bool(known.all()) or not bool(known.any()):
        raise ValueError(f"--mask={mask} is {'black' if bool(known.all()) else 'white'} everywhere; expected {meaning}")
    if (gray := float(((pixels >= 32) & (pixels < 224)).float().mean())) > 0.05:
        warnings.warn(
            f"--mask={mask} is gray in {gray:.0%} of its pixels, taken for the nearer of black and white; expected a "
            f"mask, {meaning}",
            RuntimeWarning,
            stacklevel=3,
        )
    return known


def _size(shape: Shape) -> str:
    return f"{shape[-1]}x{shape[-2]}"


def _decoded(place: Path, files: Files, option: str) -> Any:
    """uint8 (C, H, W) of an image file; ValueError, naming the option, for what is none."""
    if not place.is_file():
        raise ValueError(f"{option} is {place}, and there is no such file; expected an image")
    listing = Listing([place.name], lambda name: place.read_bytes(), None, str(place.parent), [])
    try:
        return decode(listing, files)[0][0]
    except ValueError as error:
        raise ValueError(f"{option} is {place}, which can't be used: {error.__cause__ or error}") from error


def read_images(place: Path, numbers: Values | None, gray: bool, background: str) -> Tensor:
    """Images (K, C, H, W) as the model sees them: of files from black to white, of arrays in the data's own numbers."""
    if not place.exists():
        raise ValueError(f"--image is {place}, and there is no such file; expected an image, a folder or arrays")
    own = numbers or Values(-1.0, 1.0)
    files = Files(str(place), grayscale=gray, background=background)
    if place.suffix in (".npy", ".npz"):
        source = load("arrays", Files(str(place)))
        assert isinstance(source, Stored)
        x = source.kept(torch.arange(len(source))).float()
        if x.ndim != 4:
            raise ValueError(f"--image={place} holds {tuple(x.shape)}; expected images (N, C, H, W)")
        own.check(float(x.min()), float(x.max()), f"--image={place}")
        return own.inside(x)
    if place.is_dir():
        source = load("folder", files)
        assert isinstance(source, Stored)
        pixels = source.kept(torch.arange(len(source)))
    else:
        pixels = torch.from_numpy(_decoded(place, files, "--image")).unsqueeze(0)
    return own.inside(own.least + pixels.float() / 255 * (own.most - own.least))


def measure(operator: LinearOperator, images: Tensor, where: str = "the image") -> Measured:
    """What is known of images (K, C, H, W): of those of the data's shape, the operator's value, of those of y's, all.

    A gray image is one of equal channels to a model of colours. Raises ValueError for images of another shape.
    """
    shape, small = operator.data_shape, isinstance(operator, SuperResolution)
    if images.shape[1] == 1 and not isinstance(operator, Colourisation):
        images = images.expand(-1, shape[0], -1, -1)
    got = tuple(images.shape[1:])
    if isinstance(operator, Blur) and got == shape:
        return Measured(operator, images, images)
    if isinstance(operator, Inpainting) and got == shape:
        y = operator(images)
        return Measured(operator, y, operator.pasted(torch.zeros_like(images), y))
    if isinstance(operator, (SuperResolution, Colourisation)) and got in (shape, operator.shape):
        y = images if got == operator.shape else operator(images)
        degraded = f"{where} was made {'smaller' if small else 'gray'} first" if got != operator.shape else ""
        return Measured(operator, y, interpolate(y, shape[1:]).expand(-1, shape[0], -1, -1), degraded)
    wanted = f"{_size(operator.shape)} pixels, or {_size(shape)} to be made so first" if small else _size(shape)
    if got[0] in (1, shape[0]):
        raise ValueError(f"{where} is {_size(got)}; expected {wanted}; crop or scale it")
    raise ValueError(
        f"{where} is {_size(got)} with {got[0]} channel{'s' if got[0] > 1 else ''}; expected {wanted}, and "
        f"{shape[0] if shape[0] == 1 else '1 or 3'}"
    )
