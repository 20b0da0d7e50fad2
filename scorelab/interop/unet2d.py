"""``UNet2DModel`` of diffusers as ``UNet``, and back: its config, and the names of its weights, a table for both ways.

``UNet`` has both of its families, DDPM's blocks and NCSN++'s ("Skip").
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from scorelab.checks import nearest_name
from scorelab.interop.reading import Reader, State
from scorelab.interop.unets import swapped, walk
from scorelab.nn import UNet

__all__ = ["DEFAULTS", "checked", "config_for", "filled", "state_for"]

DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
"""What ``UNet2DModel`` takes, as it is where a config leaves it out."""
_AVERAGE = ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup")
"""What the config of averaged weights has besides: how they were averaged."""

# whether a block has attention, and how it resamples: None as downsample_type or upsample_type say
_DOWN: dict[str, tuple[bool, str | None]] = {
    "DownBlock2D": (False, "conv"),
    "ResnetDownsampleBlock2D": (False, "resnet"),
    "AttnDownBlock2D": (True, None),
    "SkipDownBlock2D": (False, "skip"),
    "AttnSkipDownBlock2D": (True, "skip"),
}
_UP: dict[str, tuple[bool, str | None]] = {
    "UpBlock2D": (False, "conv"),
    "ResnetUpsampleBlock2D": (False, "resnet"),
    "AttnUpBlock2D": (True, None),
    "SkipUpBlock2D": (False, "skip"),
    "AttnSkipUpBlock2D": (True, "skip"),
}


def _names(net: UNet) -> Iterator[tuple[str, str]]:
    """Our modules that have weights, and diffusers' names of them; a star stands for queries, keys and values."""
    own, deepest = net.state_dict(), len(net.shrink)
    skips, each = net.config["inputs"] == "skip", net.config["attention_up"] == "each"

    def residual(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
        for inner in ("norm1", "conv1", "norm2", "conv2"):
            yield f"{ours}.{inner}", f"{theirs}.{inner}"
        yield f"{ours}.embed", f"{theirs}.time_emb_proj"
        if f"{ours}.skip.weight" in own:
            yield f"{ours}.skip", f"{theirs}.conv_shortcut"

    def stage(ours: str, theirs: str, place: int, attention: int) -> Iterator[tuple[str, str]]:
        yield from residual(f"{ours}.block", f"{theirs}.resnets.{place}")
        if f"{ours}.attention.norm.weight" in own:
            for inner, name in (("norm", "group_norm"), ("qkv", "to_*"), ("out", "to_out.0")):
                yield f"{ours}.attention.{inner}", f"{theirs}.attentions.{attention}.{name}"

    yield "embed.1", "time_embedding.linear_1"
    yield "embed.3", "time_embedding.linear_2"
    for name, level, place in walk(net):
        part, passed = name.split(".")[0], deepest - level
        if part == "first":
            yield name, "conv_in"
        elif part == "down":
            yield from stage(name, f"down_blocks.{level}", place, place)
        elif part == "middle":
            yield from stage(name, "mid_block", place, 0)
        elif part == "up":
            yield from stage(name, f"up_blocks.{passed}", place, place if each else 0)
        elif part == "inputs":
            yield name, f"down_blocks.{level - 1}.skip_conv"
        elif part == "outputs":
            names = ("conv_norm_out", "conv_out") if level == 0 else ("skip_norm", "skip_conv")
            for inner, theirs in zip((0, 2), names, strict=True):
                yield f"{name}.{inner}", theirs if level == 0 else f"up_blocks.{passed}.{theirs}"
        else:
            at = f"down_blocks.{level - 1}" if part == "shrink" else f"up_blocks.{passed - 1}"
            along = "downsamplers.0" if part == "shrink" else "upsamplers.0"
            if f"{name}.norm1.weight" not in own:
                yield name, f"{at}.{along}.conv"
            else:
                yield from residual(name, f"{at}.{'resnet_' + along[: -len('samplers.0')] if skips else along}")
    if "last.weight" in own:
        yield "norm", "conv_norm_out"
        yield "last", "conv_out"


def _groups(net: UNet, c: dict[str, Any]) -> tuple[int, ...]:
    """How many groups diffusers gives each norm, in the order of ours; one number where all have that, () where ours
    have them anyway.

    NCSN++'s blocks have a quarter of the channels, 32 at most; their attention has 32; the first norm of one that goes
    up with attention, of p channels and s kept ones, has p + s/4.
    """
    skips, theirs = net.config["inputs"] == "skip", dict(_names(net))
    counts = {}
    for name, module in net.named_modules():
        if not isinstance(module, nn.GroupNorm):
            continue
        channels, place = module.num_channels, theirs[name]
        if "mid_block.attentions" in place and c["attn_norm_num_groups"] is not None:
            counts[name] = c["attn_norm_num_groups"]
        elif not skips or (c["norm_num_groups"] is not None and place.startswith(("mid_block", "conv_norm_out"))):
            counts[name] = c["norm_num_groups"]
        elif "attentions" in place and not place.startswith("mid_block"):
            counts[name] = 32
        else:
            counts[name] = min(channels // 4, 32)
            block = re.fullmatch(r"up_blocks\.(\d+)\.resnets\.\d+\.norm1", place)
            if block and c["up_block_types"][int(block[1])] == "AttnSkipUpBlock2D":
                number = int(name.split(".")[1])
                before: Any = net.up[number - 1] if number else net.middle[1]
                coming = before.block.conv2.out_channels
                counts[name] = min(coming + (channels - coming) // 4, 32)
    found = tuple(counts.values())
    if found == tuple(net.get_submodule(name).num_groups for name in counts):
        return ()
    return found[:1] if len(set(found)) == 1 else found


def _kinds(c: dict[str, Any]) -> tuple[str, tuple[int, ...]]:
    """How all blocks resample, "conv", "resnet" or "skip", and which resolutions have attention."""
    down, up, last = c["down_block_types"], c["up_block_types"], len(c["block_out_channels"]) - 1
    for key, names, known in (("down_block_types", down, _DOWN), ("up_block_types", up, _UP)):
        if len(names) != last + 1:
            raise ValueError(f"{key} has {len(names)} blocks; expected {last + 1}, as block_out_channels has")
        for name in names:
            if name not in known:
                raise ValueError(f"{name} is not built here; {nearest_name(name, known)}")
    attention = tuple(i for i, name in enumerate(down) if _DOWN[name][0])
    rising = tuple(i for i, name in enumerate(reversed(up)) if _UP[name][0])
    if attention != rising:
        raise ValueError(
            f"down_block_types have attention at resolutions {attention}, up_block_types at {rising}; expected the same"
        )
    kinds = {_DOWN[name][1] or c["downsample_type"] for name in down[:-1]}
    kinds |= {_UP[name][1] or c["upsample_type"] for name in up[:-1]}
    # the last blocks change no size, but are of a family
    skips = [name for name in (*down, *up) if "Skip" in name]
    if len(skips) not in (0, len(down) + len(up)):
        raise ValueError(f"{skips[0]} stands beside others than NCSN++'s, which is not built here")
    if skips:
        kinds = {"skip"}
    if len(kinds) > 1 or not kinds <= {"conv", "resnet", "skip"}:
        said = " and ".join(sorted(map(repr, kinds)))
        raise ValueError(f"its blocks resample by {said}, as downsample_type and upsample_type say; expected one kind")
    return (kinds.pop() if kinds else "conv"), attention


def checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of ``UNet2DModel`` with its defaults; ValueError, naming class or key, for what is not built here."""
    name = config.get("_class_name", "UNet2DModel")
    if name != "UNet2DModel":
        raise ValueError(f"{name} is not built here; expected UNet2DModel")
    given = {k: v for k, v in config.items() if not k.startswith("_") and k not in _AVERAGE}
    for key in given:
        if key not in DEFAULTS:
            raise ValueError(f"{key} is not known of UNet2DModel; {nearest_name(key, DEFAULTS)}")
    c = {**DEFAULTS, **given}
    for key in ("down_block_types", "up_block_types", "block_out_channels"):
        kind = int if key == "block_out_channels" else str
        if not isinstance(c[key], (list, tuple)) or not c[key] or any(type(v) is not kind for v in c[key]):
            raise ValueError(f"{key} is {c[key]!r}; expected a list")
        c[key] = tuple(v.removeprefix("UNetRes") if kind is str else v for v in c[key])
    for key in ("in_channels", "out_channels", "layers_per_block"):
        if type(c[key]) is not int or c[key] < 1:
            raise ValueError(f"{key} is {c[key]!r}; expected a whole number from 1 on")
    for key in ("attention_head_dim", "norm_num_groups", "attn_norm_num_groups", "num_class_embeds"):
        if c[key] is not None and (type(c[key]) is not int or c[key] < 1):
            raise ValueError(f"{key} is {c[key]!r}; expected a whole number from 1 on, or null")
    for key in ("dropout", "norm_eps", "mid_block_scale_factor"):
        if isinstance(c[key], bool) or not isinstance(c[key], (int, float)) or not 0 <= c[key] < math.inf:
            raise ValueError(f"{key} is {c[key]!r}; expected a number from 0 on")
    built: dict[str, tuple[Any, ...]] = {
        "mid_block_type": ("UNetMidBlock2D",),
        "act_fn": ("silu", "swish"),
        "class_embed_type": (None,),
        "time_embedding_type": ("positional", "fourier"),
        "time_embedding_dim": (None, 4 * c["block_out_channels"][0]),
        "freq_shift": (0, 1),
        "downsample_padding": (0, 1),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "out_channels": (c["in_channels"], 2 * c["in_channels"]),
    }
    if c["resnet_time_scale_shift"] == "scale_shift" and c["attn_norm_num_groups"] is None and c["add_attention"]:
        raise ValueError("attn_norm_num_groups is null with scale_shift: attention without a norm is not built here")
    for key, values in built.items():
        if c[key] not in values:
            raise ValueError(f"{key} is {c[key]!r}, which is not built here; expected {' or '.join(map(repr, values))}")
    return c


def _settings(c: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """By what ``UNet`` is made, of a checked config."""
    kind, attention = _kinds(c)
    widths, skips = c["block_out_channels"], kind == "skip"
    factor, scale = c["mid_block_scale_factor"], 2**0.5 if skips else 1.0
    if abs(factor - scale) > 1e-6:
        raise ValueError(f"mid_block_scale_factor is {factor!r}, which is not built here; expected {scale:.12g}")
    if not c["add_attention"] and len(widths) - 1 in attention:
        raise ValueError("add_attention is false below blocks with attention, which is not built here; expected true")
    if skips and (c["in_channels"], c["out_channels"]) != (3, 3):
        raise ValueError(f"in_channels is {c['in_channels']}; expected 3, which NCSN++'s blocks are made for")
    if not skips and c["norm_num_groups"] is None:
        raise ValueError("norm_num_groups is null; expected a number, but for NCSN++'s blocks")
    head = c["attention_head_dim"] or 0
    middle = (len(widths) - 1,) if c["add_attention"] else ()
    if head and any(widths[i] % head for i in (*attention, *middle)):
        raise ValueError(f"attention_head_dim is {head}; expected a divisor of the channels where attention is")
    filtered = {"fir": (1.0, 3.0, 3.0, 1.0), "inputs": "skip", "outputs": "skip", "rescaled": True, "project": True}
    fourier = c["time_embedding_type"] == "fourier"
    return {
        "data_shape": (c["in_channels"], *size),
        "width": widths[0],
        "multipliers": tuple(w / widths[0] for w in widths),
        "blocks": c["layers_per_block"],
        "attention": attention,
        "head": head,
        "dropout": float(c["dropout"]),
        "embedding": "gaussian" if fourier else "positional" if c["freq_shift"] else "positional_open",
        "num_classes": c["num_class_embeds"],
        "middle_attention": c["add_attention"],
        "attention_up": "last" if skips else "each",
        "time": "adaptive" if c["resnet_time_scale_shift"] == "scale_shift" else "added",
        "resampling": "block" if kind != "conv" else "strided" if c["downsample_padding"] else "same",
        "group": 1,
        "eps": float(c["norm_eps"]),
        "variance": c["out_channels"] != c["in_channels"],
        **(filtered if skips else {}),
    }


_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _renamed(state: State) -> State:
    """With today's names for attention."""
    old = re.compile(rf"(attentions\.\d+)\.({'|'.join(_OLD)})\.(weight|bias)$")
    return {old.sub(lambda m: f"{m[1]}.{_OLD[m[2]]}.{m[3]}", k): v for k, v in state.items()}


def filled(c: dict[str, Any], state: State, size: tuple[int, int]) -> UNet:
    """The network of a checked config with these weights."""
    state = _renamed(state)
    # before anything of a size that only the config says is made
    for i, width in enumerate(c["block_out_channels"]):
        name = f"down_blocks.{i}.resnets.{c['layers_per_block'] - 1}.conv1.weight"
        if name not in state or len(state[name]) != width:
            raise ValueError(f"the weights have no {name} of {width} channels; expected those that config.json tells")
    if c["num_class_embeds"] is not None and len(state["class_embedding.weight"]) != c["num_class_embeds"]:
        raise ValueError(f"num_class_embeds is {c['num_class_embeds']}; expected as many rows as the weights have")
    settings = _settings(c, size)
    with torch.device("meta"):
        plan = UNet(**settings)
    net = UNet(**settings, groups=_groups(plan, c))
    read, fourier = Reader(net, state), c["time_embedding_type"] == "fourier"
    if fourier:
        frequencies = [v for v in (read.left.pop(f"time_proj.{k}", None) for k in ("weight", "W")) if v is not None]
        if not frequencies:
            raise KeyError("time_proj.weight")
        read.put("embed.0.frequencies", frequencies[0])
    if net.classes is not None:
        read.put("classes.weight", read.take("class_embedding.weight"))
    for ours, theirs in _names(net):
        for kind in ("weight", "bias"):
            parts = [theirs.replace("*", k) for k in "qkv"] if "*" in theirs else [theirs]
            value = torch.cat([read.take(f"{part}.{kind}") for part in parts])
            if ours == "embed.1" and kind == "weight" and (fourier or not c["flip_sin_to_cos"]):
                # sines come first there; the random ones always
                value = swapped(value, value.shape[1])
            if fourier and (theirs == "conv_out" or re.fullmatch(r"up_blocks\.\d+\.skip_conv", theirs)):
                # of the score times sigma the noise
                value = -value
            read.put(f"{ours}.{kind}", value)
    net.load_state_dict({k: v.float() for k, v in read.ended().items()})
    return net


def config_for(net: UNet) -> dict[str, Any]:
    """The config of ``UNet2DModel`` for a network; ValueError, with the reason, if there is none."""
    c = net.config
    shape, widths = c["data_shape"], tuple(round(c["width"] * m) for m in c["multipliers"])
    groups = {m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)}
    last = len(widths) - 1
    attended = [widths[i] for i in c["attention"]]
    attended += [widths[-1]] if c["middle_attention"] or last in c["attention"] else []
    if c["heads"]:
        heads = {w // c["heads"] for w in attended}
    else:
        heads = {w if w < c["head"] else c["head"] for w in attended} if c["head"] else set()
    block = c["resampling"] == "block"
    for wrong, said in (
        (len(shape) != 3, f"data_shape is {shape}, not that of images"),
        (any(n % 2**last for n in shape[1:]), f"data_shape is {shape}, whose sizes are odd at some resolution"),
        (c["embedding"] not in ("positional", "positional_open"), f"its embedding is {c['embedding']!r}"),
        (c["inputs"] != "none" or c["outputs"] != "none", "it has pyramids of input or output (NCSN++)"),
        (c["rescaled"], "its sums are divided by sqrt(2) (rescaled)"),
        (bool(c["fir"]) and last > 0, "it resamples with a filter (fir)"),
        (c["project"] and block and last > 0, "blocks that resample have a convolution in their skip (project)"),
        (c["attention_up"] == "last" and bool(c["attention"]), "only the last block of a resolution attends"),
        (c["classes_first"] and net.classes is not None, "classes are added before the embedding's layers"),
        (c["first"] != 1 or c["multipliers"][0] != 1, "its first multipliers are not 1"),
        (len(groups) > 1, f"its norms have {', '.join(map(str, sorted(groups)))} groups, not one number (groups=...)"),
        (len(heads) > 1, f"its heads have {', '.join(map(str, sorted(heads)))} channels, not one number"),
    ):
        if wrong:
            raise ValueError(f"{said}: that can't be written for diffusers")
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if block else ("DownBlock2D", "UpBlock2D")
    blocks = [("AttnDownBlock2D", "AttnUpBlock2D") if i in c["attention"] else plain for i in range(last + 1)]
    adaptive = c["time"] == "adaptive"
    return {
        "_class_name": "UNet2DModel",
        **DEFAULTS,
        "sample_size": shape[1] if shape[1] == shape[2] else list(shape[1:]),
        "in_channels": shape[0],
        "out_channels": shape[0] * (1 + c["variance"]),
        "freq_shift": int(c["embedding"] == "positional"),
        "down_block_types": [down for down, _ in blocks],
        "up_block_types": [up for _, up in reversed(blocks)],
        "block_out_channels": list(widths),
        "layers_per_block": c["blocks"],
        "downsample_padding": int(c["resampling"] != "same"),
        "downsample_type": "resnet" if block else "conv",
        "upsample_type": "resnet" if block else "conv",
        "dropout": c["dropout"],
        "attention_head_dim": heads.pop() if heads else None,
        "norm_num_groups": next(iter(groups)),
        "attn_norm_num_groups": next(iter(groups)) if adaptive else None,
        "norm_eps": c["eps"],
        "resnet_time_scale_shift": "scale_shift" if adaptive else "default",
        "add_attention": bool(c["middle_attention"] or last in c["attention"]),
        "num_class_embeds": None if net.classes is None else net.classes.num_embeddings,
    }


def state_for(net: UNet) -> State:
    """A network's weights by diffusers' names."""
    own = {k: v.detach().cpu() for k, v in net.state_dict().items()}
    state = {} if net.classes is None else {"class_embedding.weight": own["classes.weight"].clone()}
    for ours, theirs in _names(net):
        for kind in ("weight", "bias"):
            names = [theirs.replace("*", k) for k in "qkv"] if "*" in theirs else [theirs]
            values = own[f"{ours}.{kind}"].chunk(len(names))
            state |= {
                f"{n}.{kind}": v.clone(memory_format=torch.contiguous_format)
                for n, v in zip(names, values, strict=True)
            }
    return state
