"""Makers of score models from what files of public releases hold; ``RELEASES`` has them by name.

What a file does not say, and most hold no settings, is read off the shapes of its weights or asked for by name. x is
data in [-1, 1] with noise, whatever the release scales its data to: one that takes data from 0 to 1 has noise levels
twice as large here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from scorelab.checks import nearest_name
from scorelab.classifiers import ClassifierModel
from scorelab.interop.diffusers import model_of, read_folder
from scorelab.interop.magnitude import from_edm2
from scorelab.interop.reading import Record, State, read_file, state_of
from scorelab.interop.refinenets import from_ncsn, from_ncsnv2
from scorelab.interop.transformers import from_dit
from scorelab.interop.unets import from_adm, from_edm, from_score_sde, score_sde_settings
from scorelab.models import Constant, LogSigma, ScoreModel, UnitVariance
from scorelab.nn import EDM2, Classifier, DiT, RefineNet, UNet, adm, ddpm, ncsnpp
from scorelab.nn.dit import SIZES
from scorelab.predictions import EPS, SCORE, edm
from scorelab.processes import VE, VP, DiscreteVP, SubVP, cosine_betas, linear_betas
from scorelab.sigmas import geometric
from scorelab.typing import Tensor

__all__ = ["READERS", "RELEASES", "load_classifier"]

_PIXELS = (0.0, 255.0)


def _filled(net: nn.Module, state: State) -> Any:
    for name, value in state.items():
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise ValueError(f"its weights for {name} are {value.dtype}, or not all finite; expected finite floats")
    net.load_state_dict({k: v.float() for k, v in state.items()})
    return net


def _plain(found: Any) -> State:
    """A state dict by the network's own names: without what DataParallel, torch.compile and Lightning put before them,
    and out of the dict that a trainer keeps it in."""
    if isinstance(found, dict) and not any(isinstance(v, Tensor) for v in found.values()):
        inner = [found[k] for k in ("state_dict", "model") if isinstance(found.get(k), dict)]
        found = inner[0] if len(inner) == 1 else found
    state = {_bare(k): v for k, v in state_of(found).items()}
    if state and all(k.startswith("model.") for k in state):
        state = {_bare(k.removeprefix("model.")): v for k, v in state.items()}
    return state


def _bare(name: str) -> str:
    while (shorter := name.removeprefix("module.").removeprefix("_orig_mod.")) != name:
        name = shorter
    return name


def _times(net: Any, factor: float) -> Any:
    """A network whose output is multiplied: by -1, of a score times sigma the noise."""
    ends = [stage[-1] for stage in net.outputs] if net.config.get("outputs") == "skip" else [net.last]
    with torch.no_grad():
        for parameter in (p for end in ends for p in end.parameters()):
            parameter.mul_(factor)
    return net


def _refuse(c: dict[str, Any], **known: Any) -> None:
    """ValueError for settings that our networks don't have, other than the release's own."""
    for key, value in known.items():
        if c.get(key, value) != value:
            raise ValueError(f"its {key} is {c[key]!r}; expected {value!r}, as in all published networks")


def _levels(sizes: list[int], size: int, count: int) -> tuple[int, ...]:
    """Resolutions by their place."""
    return tuple(i for i in range(count) if size >> i in sizes)


def _edm(found: Any) -> ScoreModel:
    """EDM's pickles of any of its four preconditionings; they say all."""
    ema = found["ema"]
    inner = ema.fields["_modules"]["model"]
    c, size, channels = inner.fields["_init_kwargs"], int(ema.fields["img_resolution"]), int(ema.fields["img_channels"])
    _refuse(c, channel_mult_emb=4)
    multipliers, label_dim = tuple(c["channel_mult"]), int(c.get("label_dim", 0))
    blocks, sizes = (3, [32, 16, 8]) if inner.kind == "DhariwalUNet" else (4, [16])
    known: dict[str, Any] = {
        "width": int(c["model_channels"]),
        "multipliers": multipliers,
        "blocks": int(c.get("num_blocks", blocks)),
        "dropout": float(c.get("dropout", 0.1)),
        "attention": _levels(list(c.get("attn_resolutions", sizes)), size, len(multipliers)),
    }
    if label_dim:
        known |= {"num_classes": label_dim, "null_class": True}
    shape = (channels, size, size)
    if inner.kind == "DhariwalUNet":
        net = adm(shape, group=4, variance=ema.kind == "iDDPMPrecond", **known)
    else:
        _refuse(c, channel_mult_noise=2 if c.get("embedding_type") == "fourier" else 1)
        taps = tuple(float(v) for v in c.get("resample_filter", [1, 1]))
        known["inputs"] = {"standard": "none"}.get(c.get("encoder_type", "standard"), c.get("encoder_type", "none"))
        known["outputs"] = {"standard": "none"}.get(c.get("decoder_type", "standard"), c.get("decoder_type", "none"))
        known["embedding"] = "gaussian" if c.get("embedding_type") == "fourier" else "positional"
        # averages and copies are the filter (1, 1), but where a pyramid's convolution looks over the edge
        net = ncsnpp(shape, fir=() if taps == (1.0, 1.0) and known["inputs"] != "residual" else taps, **known)
    # augmentation is without effect outside of training
    state = {k: v for k, v in state_of(inner).items() if "resample_filter" not in k and "map_augment" not in k}
    _filled(net, from_edm(net, state))
    return _preconditioned(ema, net, shape)


def _preconditioned(ema: Record, net: Any, shape: tuple[int, ...]) -> ScoreModel:
    """A network of EDM's or EDM2's in the preconditioning that its file names."""
    f = ema.fields
    if ema.kind in ("EDMPrecond", "Precond"):
        scale = float(f.get("sigma_data", 0.5))
        options: dict[str, Any] = {"label": "log_sigma", "label_scale": 0.25, "input_scale": UnitVariance(scale)}
        return ScoreModel(net, VE(0.002, 80.0), edm(scale), data_shape=shape, data_range=_PIXELS, **options)
    if ema.kind == "VPPrecond":
        least, most = float(f.get("beta_min", 0.1)), float(f.get("beta_min", 0.1)) + float(f.get("beta_d", 19.9))
        steps = float(f.get("M", 1000)) - 1
        return ScoreModel(net, VP(least, most), data_shape=shape, data_range=_PIXELS, label_scale=steps)
    if ema.kind == "VEPrecond":
        options = {"label": LogSigma(2.0), "input_scale": Constant(1.0)}
        return ScoreModel(_times(net, -1), VE(0.02, 100.0), data_shape=shape, data_range=_PIXELS, **options)
    if ema.kind == "iDDPMPrecond":
        _refuse(f, C_1=0.001, C_2=0.008)
        options = {"label": "index", "variance": True}
        return ScoreModel(net, _steps("cosine", int(f.get("M", 1000))), data_shape=shape, data_range=_PIXELS, **options)
    raise ValueError(
        f"its preconditioning is {ema.kind!r}; expected EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond or Precond"
    )


def _edm2(found: Any) -> ScoreModel:
    """EDM2's pickles; those of 512 px score latents, which the encoder named inside decodes."""
    ema = found["ema"]
    unet = ema.fields["_modules"]["unet"]
    c, size, channels = unet.fields["_init_kwargs"], int(ema.fields["img_resolution"]), int(ema.fields["img_channels"])
    multipliers, label_dim = tuple(c.get("channel_mult", [1, 2, 3, 4])), int(ema.fields.get("label_dim", 0))
    _refuse(c, label_balance=0.5, concat_balance=0.5, res_balance=0.3, attn_balance=0.3, clip_act=256)
    _refuse(c, channel_mult_noise=None, channel_mult_emb=None, resample_filter=[1, 1])
    state = state_of(ema)
    head = state.get("logvar_linear.weight")
    shape = (channels, size, size)
    net = EDM2(
        shape,
        width=int(c.get("model_channels", 192)),
        multipliers=multipliers,
        blocks=int(c.get("num_blocks", 3)),
        attention=_levels(list(c.get("attn_resolutions", [16, 8])), size, len(multipliers)),
        head=int(c.get("channels_per_head", 64)),
        uncertainty=0 if head is None else head.shape[1],
        num_classes=label_dim or None,
        null_class=label_dim > 0,
    )
    known = {k: v for k, v in state.items() if "resample_filter" not in k}
    return _preconditioned(ema, _filled(net, from_edm2(net, known)), shape)


_GROWS = re.compile(r"output_blocks\.\d+\.[12]\.(in_layers\.2|conv)\.weight")


def _parts(state: State) -> set[int]:
    """The numbers of what has weights on the way down of an ADM network."""
    return {int(k.split(".")[1]) for k in state if k.startswith("input_blocks.")}


def _descent(state: State, levels: int) -> tuple[dict[str, Any], Tensor]:
    """Width, multipliers, blocks and attention of so many levels of an ADM network, and its first convolution."""
    width, first = state["time_embed.0.weight"].shape[1], state["input_blocks.0.0.weight"]
    count = 1 + max(_parts(state))
    if count % levels:
        raise ValueError(f"it has {count} parts on its way down, which are no {levels} resolutions of as many each")
    starts = [f"input_blocks.{1 + level * (count // levels)}" for level in range(levels)]
    widths = [len(state[f"{name}.0.in_layers.2.weight"]) for name in starts]
    attention = tuple(i for i, name in enumerate(starts) if f"{name}.1.qkv.weight" in state)
    known = {"width": width, "multipliers": tuple(w / width for w in widths), "blocks": count // levels - 1}
    return {**known, "attention": attention}, first


def load_classifier(
    path: str | Path, image_size: int = 64, *, levels: int = 0, head: int = 64, schedule: str = "", steps: int = 1000
) -> ClassifierModel:
    """guided-diffusion's classifier of noisy images, in evaluation mode: (x, sigma) -> logits.

    levels: its resolutions, by default those of the published one for this size (64, 128, 256 or 512); head: channels
    of an attention head; schedule: of its betas, by default "cosine" at 64 px and "linear" else. Raises ValueError for
    a file that is damaged or no such classifier's, and as ``load`` does.
    """
    state = _plain(read_file(path))
    if "out.2.positional_embedding" not in state:
        raise ValueError(
            f"{path} holds no weights of a classifier with attention that pools; expected guided-diffusion's"
        )
    if not levels and image_size not in _LEVELS:
        raise ValueError(
            f"image_size is {image_size}, of which none is published; expected levels=..., its resolutions"
        )
    try:
        known, first = _descent(state, levels or _LEVELS[image_size])
        shape = (first.shape[1], image_size, image_size)
        net = Classifier(shape, len(state["out.2.c_proj.weight"]), head=head, **known)
        _filled(net, from_adm(net, state))
    except (ValueError, KeyError) as error:
        said = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path} can't be loaded as a classifier at {image_size} px ({said}): check the size"
        ) from error
    process = _steps(schedule or ("cosine" if image_size == 64 else "linear"), steps)
    return ClassifierModel(net, process, data_shape=shape, label="index").requires_grad_(False).eval()


_LEVELS = {64: 4, 128: 5, 256: 6, 512: 7}


def _steps(schedule: str, steps: int) -> DiscreteVP:
    betas = {"linear": linear_betas, "cosine": cosine_betas}
    if schedule not in betas:
        raise ValueError(f"schedule is {schedule!r}; {nearest_name(schedule, betas)}")
    return DiscreteVP(betas[schedule](steps))


def _adm(
    found: Any,
    image_size: int = 64,
    head: int = 64,
    heads: int = 0,
    heads_up: int = 0,
    legacy: bool = False,
    schedule: str = "cosine",
    steps: int = 1000,
    rescaled: bool = False,
) -> ScoreModel:
    """guided-diffusion's state dicts, by default ADM's for ImageNet at 64 px. head: channels of an attention head, or
    heads: their number, heads_up: that of the way up if another; legacy: queries, keys and values lie within the heads,
    as in all but that; schedule: "linear", as in all but that, or "cosine", of so many steps; rescaled: the network is
    told of them as if there were 1,000.
    """
    state = _plain(found)
    if "out.2.positional_embedding" in state:
        raise ValueError("these are a classifier's weights; expected scorelab.interop.load_classifier(file)")
    grows, parts = len([k for k in state if _GROWS.fullmatch(k)]), _parts(state)
    # what resamples without weights has a number
    known, first = _descent(state, (grows or 1 + max(parts) - len(parts)) + 1)
    block, channels = "input_blocks.1.0", first.shape[1]
    variance = state["out.2.weight"].shape[0] == 2 * channels
    net = UNet(
        (channels, *(image_size,) * (first.ndim - 2)),
        **known,
        head=head,
        heads=heads,
        heads_up=heads_up,
        embedding="positional_open",
        num_classes=state["label_emb.weight"].shape[0] if "label_emb.weight" in state else None,
        middle_attention=True,
        time="adaptive"
        if len(state[f"{block}.emb_layers.1.weight"]) > len(state[f"{block}.in_layers.2.weight"])
        else "added",
        resampling="plain" if not grows else "strided" if any(k.endswith(".0.op.weight") for k in state) else "block",
        group=1,
        first=first.shape[0] / known["width"],
        variance=variance,
    )
    _filled(net, from_adm(net, state, legacy=legacy))
    options: dict[str, Any] = {"label": "index", "variance": variance, "data_range": _PIXELS}
    options["label_scale"] = 1000 / steps if rescaled else 1.0
    return ScoreModel(net, _steps(schedule, steps), data_shape=net.config["data_shape"], **options)


def _improved(
    found: Any,
    image_size: int = 64,
    heads: int = 4,
    heads_up: int = 0,
    legacy: bool = True,
    schedule: str = "cosine",
    steps: int = 4000,
    rescaled: bool = True,
) -> ScoreModel:
    """improved-diffusion's state dicts, likewise."""
    return _adm(found, image_size, 0, heads, heads_up, legacy, schedule, steps, rescaled)


def _dit(found: Any, heads: int = 0, steps: int = 1000, null_class: bool = True) -> ScoreModel:
    """DiT's state dicts, alone or with an average beside; heads: 0 for those of the published width; null_class: the
    last row of the table of classes stands for none, as it does unless it was trained without.
    """
    state = _plain(found.get("ema", found))
    weight, table = state["x_embedder.proj.weight"], state.get("y_embedder.embedding_table.weight")
    width, channels, patch = weight.shape[:3]
    depth = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    side = math.isqrt(state["pos_embed"].shape[1]) * patch
    published = {sizes["width"]: sizes["heads"] for sizes in SIZES.values()}
    if not heads and width not in published:
        raise ValueError(f"a width of {width} is none of the published; expected heads=...")
    variance = len(state["final_layer.linear.weight"]) == 2 * channels * patch**2
    net = DiT(
        (channels, side, side),
        patch=patch,
        width=width,
        depth=depth,
        heads=heads or published[width],
        mlp=len(state["blocks.0.mlp.fc1.weight"]) / width,
        variance=variance,
        num_classes=None if table is None else len(table) - null_class,
        null_class=table is not None and null_class,
    )
    _filled(net, from_dit(net, state))
    process, shape = DiscreteVP(linear_betas(steps)), (channels, side, side)
    return ScoreModel(net, process, data_shape=shape, label="index", variance=variance)


def _refine(state: State, levels: Tensor, image_size: int, centered: bool = False) -> ScoreModel:
    depth = 6 if "res31.0.conv1.weight" in state else 5 if "res5.0.conv1.weight" in state else 4
    weight, conditional = state["begin_conv.weight"], "normalizer.embed.weight" in state
    shape = (weight.shape[1], *(image_size,) * (weight.ndim - 2))
    net = RefineNet(shape, width=len(weight), depth=depth, levels=len(levels) if conditional else 0)
    _filled(net, (from_ncsn if conditional else from_ncsnv2)(net, state))
    # in [-1, 1] noise is twice as large, and a score half as large: the scale of eps is kept
    scale = 1.0 if centered else 2.0
    grid = scale * levels.double()
    process = VE(float(grid[-1]), float(grid[0]))
    options: dict[str, Any] = {"data_shape": shape, "data_range": _PIXELS, "levels": grid, "input_scale": Constant(1.0)}
    if conditional:
        return ScoreModel(_times(net, 1 / scale), process, SCORE, label="index", index_order="descending", **options)
    return ScoreModel(net, process, EPS, label="log_sigma", **options)


def _ncsn(found: Any, image_size: int = 32, sigma_max: float = 1.0, sigma_min: float = 0.01) -> ScoreModel:
    """NCSN's lists [model, optimiser]; its levels are geometric."""
    state = _plain(found[0] if isinstance(found, list) else found)
    count = len(state["normalizer.embed.weight"])
    levels = torch.from_numpy(np.geomspace(sigma_max, sigma_min, count))
    return _refine(state, levels, image_size)


def _ncsnv2(found: Any, image_size: int = 32, averaged: bool = True) -> ScoreModel:
    """NCSNv2's lists [model, optimiser, epoch, step, average]; its levels are inside. averaged: take the average; a
    state dict alone is taken as it is.
    """
    state = _plain(found[0] if isinstance(found, list) else found)
    if isinstance(found, list) and averaged:
        if len(found) < 5:
            raise ValueError("this run had no average; expected averaged=False")
        average = _plain(found[4])
        if lacking := state.keys() - average.keys() - {"sigmas"}:
            raise ValueError(
                f"its average lacks {len(lacking)} weights ({sorted(lacking)[0]}); expected averaged=False"
            )
        state |= average
    return _refine(state, state["sigmas"], image_size)


def _score_sde(
    found: Any,
    sde: str | None = None,
    image_size: int = 32,
    net: dict[str, Any] | None = None,
    continuous: bool | None = None,
    centered: bool | None = None,
    scale_by_sigma: bool | None = None,
    averaged: bool = True,
) -> ScoreModel:
    """score_sde's {optimizer, model, ema, step}. sde: "ve", "vp" or "subvp", which the file tells of networks that take
    log sigma alone; continuous: of "vp", else its steps; net: settings of ``ncsnpp`` and ``ddpm`` other than those that
    the shapes tell, as a filter, or "name", which of the two; of "ve": centered, the release's data is in [-1, 1], not
    in [0, 1], by default False; scale_by_sigma, what its network returns is divided by sigma, by default True.
    """
    if sde not in ("ve", "vp", "subvp", None):
        raise ValueError(f"sde is {sde!r}; {nearest_name(sde, ('ve', 'vp', 'subvp'))}")
    state = _plain(found["model"])
    levels = state.pop("sigmas", torch.empty(0))
    # log sigma's random frequencies, and NCSN's networks
    told = "all_modules.0.W" in state or "begin_conv.weight" in state
    sde = "ve" if sde is None and told else sde
    if sde is None or (sde == "vp" and continuous is None and not told):
        raise ValueError(
            "the file does not say by which process it was trained; expected sde='ve', 'vp' or 'subvp', and of 'vp' "
            "continuous=True or False, as its config had them"
        )
    if sde != "ve" and (centered, scale_by_sigma) != (None, None):
        raise ValueError("centered and scale_by_sigma are options of 've'; expected neither beside 'vp' and 'subvp'")
    if sde == "ve" and not len(levels):
        raise ValueError("it has no sigmas, the noise levels of VE; expected the whole checkpoint")
    if averaged:
        # averages of what was trained, in its order: the random frequencies are not
        trained = [k for k in state if not k.endswith(".W") or "NIN" in k]
        shadow = found["ema"]["shadow_params"]
        if len(shadow) != len(trained):
            raise ValueError(f"it has averages of {len(shadow)} weights, and {len(trained)} weights; expected as many")
        state |= dict(zip(trained, shadow, strict=True))
    if "begin_conv.weight" in state:
        if sde != "ve":
            raise ValueError("it holds a network of NCSN, whose noise levels are those of VE; expected sde='ve'")
        return _refine(state, levels, image_size, bool(centered))
    own = dict(net or {})
    name, settings = score_sde_settings(state, own.pop("name", ""))
    channels = next(v.shape[1] for v in state.values() if v.ndim == 4)
    maker: Any = {"ddpm": ddpm, "ncsnpp": ncsnpp}[name]
    made = maker((channels, image_size, image_size), **{**settings, **own})
    _filled(made, from_score_sde(made, state))
    if (sde == "ve") < (made.config["embedding"] == "gaussian"):
        raise ValueError(f"sde is {sde!r}, but the network takes log sigma, as those of VE alone; expected sde='ve'")
    if sde == "ve":
        return _exploding(made, levels, 1.0 if centered else 2.0, scale_by_sigma is not False)
    options: dict[str, Any] = {"data_shape": made.config["data_shape"], "data_range": _PIXELS}
    if continuous is not False:
        return ScoreModel(made, {"vp": VP, "subvp": SubVP}[sde](0.1, 20.0), label_scale=999.0, **options)
    if sde == "subvp":
        raise ValueError("the release has no sub-VP in steps; expected continuous=True")
    return ScoreModel(made, DiscreteVP(linear_betas(1000)), label="index", **options)


def _exploding(made: Any, levels: Tensor, scale: float, scale_by_sigma: bool) -> ScoreModel:
    """score_sde's VE, whose network takes 2x - 1 of data in [0, 1] (scale 2); what it returns, over sigma where that is
    so, is the score there."""
    process = VE(scale * float(levels.min()), scale * float(levels.max()))
    options: dict[str, Any] = {"data_shape": made.config["data_shape"], "data_range": _PIXELS}
    options["input_scale"] = Constant(1.0)
    if made.config["embedding"] == "gaussian":
        options["label"] = LogSigma(scale)
    else:
        grid = geometric(len(levels), sigma_min=process.sigma_min, sigma_max=process.sigma_max)
        options |= {"label": "index", "index_order": "descending", "levels": grid}
    if scale_by_sigma:
        return ScoreModel(_times(made, -1), process, **options)
    return ScoreModel(_times(made, 1 / scale), process, SCORE, **options)


def resembled(found: Any) -> str:
    """Which releases a file's layout is of; "" if none shows."""
    if isinstance(found, list):
        return "ncsn" if len(found) < 4 else "ncsnv2"
    if not isinstance(found, dict):
        return ""
    inner = found["model"] if isinstance(found.get("model"), dict) else found
    signs = {
        "edm or edm2": isinstance(found.get("ema"), Record),
        "score_sde": any(".all_modules." in f".{k}" or "begin_conv." in str(k) for k in inner),
        "guided_diffusion or improved_diffusion": "time_embed.0.weight" in inner,
        "dit": "x_embedder.proj.weight" in inner,
    }
    return next((name for name, shown in signs.items() if shown), "")


RELEASES: dict[str, Callable[..., ScoreModel]] = {
    "score_sde": _score_sde,
    "ncsn": _ncsn,
    "ncsnv2": _ncsnv2,
    "guided_diffusion": _adm,
    "improved_diffusion": _improved,
    "edm": _edm,
    "edm2": _edm2,
    "dit": _dit,
    "diffusers": model_of,
}
"""Releases by name, and what makes a model of what their files hold."""
READERS: dict[str, Callable[[str | Path], Any]] = {"diffusers": read_folder}
"""What reads those that are no files."""
