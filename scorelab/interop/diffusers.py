"""diffusers' ``UNet2DModel`` both ways: folders and live networks as score models, and score models as folders.

Nothing of the diffusers package is needed for that.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from scorelab.described import Constant, LogSigma
from scorelab.interop.reading import State, read_file, state_of
from scorelab.interop.schedulers import config_of, prediction_of, process_of, read_config
from scorelab.interop.unet2d import checked, config_for, filled, state_for
from scorelab.models import ScoreModel
from scorelab.nn import UNet
from scorelab.predictions import EPS, X0, V
from scorelab.processes import VE, DiscreteVP, cosine_betas
from scorelab.saved import unwrapped
from scorelab.typing import Tensor
from scorelab.writing import save_tensors, whole

__all__ = ["Folder", "from_diffusers", "model_of", "read_folder", "to_diffusers"]

_FILE = "diffusion_pytorch_model"


class Folder(NamedTuple):
    """What a folder of diffusers holds: the network's config and weights, the scheduler's config if there is one, and
    the names of its parts."""

    config: dict[str, Any]
    state: State
    scheduler: dict[str, Any] | None
    parts: tuple[str, ...]


def read_folder(path: str | Path) -> Folder:
    """The folder of a pipeline (``unet`` and ``scheduler`` in it, or their files) or of a network alone.

    Raises ValueError for a folder that holds no network, and for files that are missing or damaged.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; expected that of a pipeline or a UNet2DModel of diffusers")
    index = read_config(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    inner = folder / "unet" if (folder / "unet").is_dir() else folder
    if not (inner / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json, nor unet/config.json; expected a UNet2DModel of diffusers")
    places = (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
    scheduler = next((read_config(place) for place in places if place.is_file()), None)
    return Folder(read_config(inner / "config.json"), _weights(inner), scheduler, tuple(index))


def _weights(folder: Path) -> State:
    """Those of one file, or of those that an index names."""
    for name in (f"{_FILE}.safetensors", f"{_FILE}.bin"):
        if (folder / name).is_file():
            return state_of(read_file(folder / name))
        if (folder / f"{name}.index.json").is_file():
            index = read_config(folder / f"{name}.index.json").get("weight_map")
            if not isinstance(index, dict) or not all(
                isinstance(file, str) and Path(file).name == file for file in index.values()
            ):
                raise ValueError(f"{name}.index.json has no weight_map of files beside it; expected weights by files")
            state: State = {}
            for file in sorted(set(index.values())):
                state |= state_of(read_file(folder / file))
            return state
    raise ValueError(f"{folder} holds no {_FILE}.safetensors, .bin or index of parts; expected a network's weights")


def _image_size(given: object, image_size: object) -> tuple[int, int]:
    size = given if image_size is None else image_size
    if size is None:
        raise ValueError("its config has no sample_size; expected image_size=...")
    size = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (list, tuple)) else ()
    if len(size) != 2 or any(type(n) is not int or n < 1 for n in size):
        raise ValueError(f"sample_size is {size}; expected a whole number, or (height, width)")
    return size


def model_of(
    found: Folder, image_size: int | tuple[int, int] | None = None, scheduler: object | None = None
) -> ScoreModel:
    """The score model of a folder. image_size: where its config does not say, or another; scheduler: another than its
    own (see ``from_scheduler``).

    A VE network sees data as it is, or in [-1, 1] with twice the noise if it centres data from [0, 1] itself. Raises
    ValueError, naming the class or key, for what is not built here.
    """
    c = checked(found.config)
    fourier = c["time_embedding_type"] == "fourier"
    taken = found.scheduler if scheduler is None else config_of(scheduler)
    if taken is None:
        taken = {"_class_name": "ScoreSdeVeScheduler" if fourier else "DDPMScheduler"}
        print(f"no scheduler is there: assumed {taken['_class_name']} with its defaults", file=sys.stderr)
    process, prediction = process_of(taken), prediction_of(taken)
    if isinstance(process, VE) != fourier:
        raise ValueError(
            f"time_embedding_type {c['time_embedding_type']!r} with {taken['_class_name']} is not built here; expected "
            "'fourier' with ScoreSdeVeScheduler, 'positional' with the others"
        )
    if c["center_input_sample"] and not fourier:
        raise ValueError("center_input_sample is true, which is not built here but for VE's networks; expected false")
    net = filled(c, found.state, _image_size(c["sample_size"], image_size))
    codes = any(part in found.parts for part in ("vae", "vqvae"))
    options: dict[str, Any] = {"data_shape": net.config["data_shape"], "variance": net.config["variance"]}
    if isinstance(process, VE):
        scale = 2.0 if c["center_input_sample"] else 1.0
        options |= {"label": LogSigma(scale), "input_scale": Constant(1.0)}
        options["data_range"] = (0.0, 255.0) if c["center_input_sample"] else None
        return ScoreModel(net, VE(scale * process.sigma_min, scale * process.sigma_max), **options)
    options["data_range"] = None if codes else (0.0, 255.0)
    return ScoreModel(net, process, prediction, label="index", **options)


def from_diffusers(
    unet: nn.Module, scheduler: object | None = None, *, image_size: int | tuple[int, int] | None = None
) -> ScoreModel:
    """A live ``UNet2DModel`` of diffusers, with its scheduler, as a score model in evaluation mode, with weights of its
    own; ``load(folder, "diffusers")`` reads a saved one.

    scheduler: a live one, its config or its folder; DDPM's defaults where it is None. Raises ValueError as ``load``.
    """
    config = {**getattr(unet, "config", {}), "_class_name": type(unet).__name__}
    model = model_of(Folder(config, state_of(unet.state_dict()), None, ()), image_size, scheduler)
    return model.requires_grad_(False).eval()


def to_diffusers(model: ScoreModel, folder: str | Path, *, clip_sample: bool = False) -> None:
    """Write a model as the folder of a ``DDPMPipeline``: ``unet``, ``scheduler`` and ``model_index.json``.

    ``DDPMPipeline.from_pretrained(folder)`` then gives the same outputs and, with the same noise, the samples of
    ``Ancestral()`` at its steps. clip_sample: whether denoised samples are clamped to [-1, 1] there. "No class" is one
    class more. Raises ValueError, with the reason, for what diffusers can't express.
    """
    net = unwrapped(model.net)
    if type(net) is not UNet:
        raise ValueError(f"the network is {type(net).__name__}; expected a UNet of DDPM's family")
    config, scheduler = config_for(net), {**_scheduler_for(model), "clip_sample": clip_sample}
    index = {"_class_name": "DDPMPipeline"}
    parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    place = Path(folder).expanduser()
    for inner in ("unet", "scheduler"):
        (place / inner).mkdir(parents=True, exist_ok=True)
    with whole(place / "unet" / f"{_FILE}.safetensors") as aside:
        save_tensors(state_for(net), aside, {"format": "pt"})
    files = (("unet/config.json", config), ("scheduler/scheduler_config.json", scheduler))
    for name, content in (*files, ("model_index.json", {**index, **parts})):
        with whole(place / name) as aside:
            aside.write_text(json.dumps(content, indent=2) + "\n")


def _scheduler_for(model: ScoreModel) -> dict[str, Any]:
    """The config of ``DDPMScheduler`` for a model; ValueError, with the reason, if there is none."""
    process, levels = model.process, model.levels
    if not isinstance(process, DiscreteVP):
        raise ValueError(
            f"its process is {process!r}, not one of steps (DiscreteVP): that can't be written for diffusers"
        )
    steps = process.step_sigmas
    own = levels is not None and levels.shape == steps.shape and torch.allclose(levels, steps, rtol=1e-9, atol=0.0)
    told = model.label == "index" and model.label_scale == 1 and model.index_order == "ascending"
    for wrong, said in (
        (model.prediction not in (EPS, V, X0), f"it predicts {model.prediction.name}, not eps, v or x0"),
        (model.input_scale != "process", "its network sees x scaled otherwise than by the process"),
        (not told, "its network is told something else than the step, from the least noise on (label='index')"),
        (not own, "its network counts other levels than the process's steps"),
        (model.codec is not None, "it has a codec"),
        (not _begins_at_zero(model), "its samples begin around a mean of the data (data_mean)"),
    ):
        if wrong:
            raise ValueError(f"{said}: that can't be written for diffusers")
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": process.steps,
        **_said(process.betas),
        "prediction_type": {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[model.prediction.name],
        "variance_type": "learned_range" if model.variance else "fixed_small",
        "timestep_spacing": "leading",
        "steps_offset": 0,
    }


def _begins_at_zero(model: ScoreModel) -> bool:
    """Whether the mean that samples begin around is less than a hundredth of the noise there."""
    mean = model.data_mean
    return mean is None or float(mean.abs().max()) <= 0.01 * model.sigma_range[1]


def _said(betas: Tensor) -> dict[str, Any]:
    """Betas as a config says them."""
    count, low, high = len(betas), float(betas[0]), float(betas[-1])
    same: dict[str, Any] = {"rtol": 1e-9, "atol": 0.0}
    if torch.allclose(betas, torch.linspace(low, high, count, dtype=torch.float64), **same):
        return {"beta_schedule": "linear", "beta_start": low, "beta_end": high, "trained_betas": None}
    if torch.allclose(betas, cosine_betas(count), **same):
        return {"beta_schedule": "squaredcos_cap_v2", "trained_betas": None}
    return {"beta_schedule": "linear", "trained_betas": betas.tolist()}
