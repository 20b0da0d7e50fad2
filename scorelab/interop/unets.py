"""The weights of releases' U-Nets by the names that ``UNet`` has for them.

Each function says which of our modules is which of the release's. 1x1 convolutions are matrices in some (NIN's are
transposed), queries, keys and values lie side by side in an order of each release's own, and sines come before cosines
in Song's embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from scorelab.interop.reading import Reader, State
from scorelab.nn.classifier import Classifier
from scorelab.nn.diffae import DiffAE
from scorelab.nn.layers import Attention, Resampled
from scorelab.nn.unet import UNet
from scorelab.typing import Tensor

__all__ = ["from_adm", "from_edm", "from_score_sde", "score_sde_settings", "swapped", "walk"]


class _Reader(Reader):
    """What U-Nets besides have."""

    def matrix(self, ours: str, theirs: list[str]) -> None:
        """One matrix of NINs, (in, out) each, side by side."""
        self.put(f"{ours}.weight", torch.cat([self.take(f"{name}.W").T for name in theirs]))
        self.put(f"{ours}.bias", torch.cat([self.take(f"{name}.b") for name in theirs]))

    def heads(self, ours: str, theirs: str, shape: tuple[str, str, str], heads: int) -> None:
        """Queries, keys and values, whose rows lie in the order of ``shape``: which, head and channel."""
        for kind in ("weight", "bias"):
            value = self.take(f"{theirs}.{kind}")
            sizes = {"which": 3, "head": heads, "channel": len(value) // 3 // heads}
            split = value.reshape(*(sizes[part] for part in shape), -1)
            ordered = split.movedim([shape.index(k) for k in ("which", "head", "channel")], [0, 1, 2])
            self.put(f"{ours}.{kind}", ordered.flatten(0, 2))


def walk(net: UNet) -> Iterator[tuple[str, int, int]]:
    """Our modules in the order in which they run: name, level, place in the level (-1: none)."""
    deepest = len(net.shrink)
    yield "first", 0, -1
    for i in range(len(net.down)):
        level, place = divmod(i, net.blocks)
        yield f"down.{i}", level, place
        if place == net.blocks - 1 and level < deepest:
            yield f"shrink.{level}", level + 1, -1
            if len(net.inputs):
                yield f"inputs.{level}", level + 1, -1
    yield "middle.0", deepest, 0
    yield "middle.1", deepest, 1
    for i in range(len(net.up)):
        passed, place = divmod(i, net.blocks + 1)
        yield f"up.{i}", deepest - passed, place
        if place == net.blocks:
            if len(net.outputs):
                yield f"outputs.{passed}", deepest - passed, -1
            if passed < deepest:
                yield f"grow.{passed}", deepest - passed - 1, -1


def swapped(x: Tensor, count: int) -> Tensor:
    """Sines and cosines the other way round, in the last ``count`` columns' halves."""
    return torch.cat([x[..., count // 2 :], x[..., : count // 2]], -1)


_SONG = {"norm1": "GroupNorm_0", "conv1": "Conv_0", "embed": "Dense_0", "norm2": "GroupNorm_1", "conv2": "Conv_1"}


def from_score_sde(net: UNet, state: State) -> State:
    """Of score_sde's ``ddpm`` and ``ncsnpp``, whose modules are numbered in the order in which they are built."""
    read, number = _Reader(net, state), -1

    def following() -> str:
        nonlocal number
        number += 1
        return f"all_modules.{number}"

    def residual(name: str) -> None:
        theirs = following()
        for ours, part in _SONG.items():
            read.leaf(f"{name}.{ours}", f"{theirs}.{part}")
        if f"{name}.skip.weight" in read.own:
            if f"{theirs}.NIN_0.W" in read.left:
                read.matrix(f"{name}.skip", [f"{theirs}.NIN_0"])
            else:
                read.leaf(f"{name}.skip", f"{theirs}.Conv_2")

    def attention(name: str) -> None:
        theirs = following()
        read.leaf(f"{name}.norm", f"{theirs}.GroupNorm_0")
        read.matrix(f"{name}.qkv", [f"{theirs}.NIN_{k}" for k in range(3)])
        read.matrix(f"{name}.out", [f"{theirs}.NIN_3"])

    if net.config["embedding"] == "gaussian":
        read.put("embed.0.frequencies", read.take(f"{following()}.W"))
    for name in ("embed.1", "embed.3"):
        read.leaf(name, following())
    first = read.found["embed.1.weight"]
    read.found["embed.1.weight"] = swapped(first, first.shape[1])
    for name, _, place in walk(net):
        module = net.get_submodule(name)
        if place >= 0:
            residual(f"{name}.block")
            if f"{name}.attention.norm.weight" in read.own:
                attention(f"{name}.attention")
        elif name.startswith("outputs") and isinstance(module, nn.Sequential):
            if name != "outputs.0":
                # what enlarges the pyramid has a number and no weights
                following()
            read.leaf(f"{name}.0", following())
            read.leaf(f"{name}.2", following())
        elif f"{name}.norm1.weight" in read.own:
            residual(name)
        elif name == "first":
            read.leaf(name, following())
        elif name.startswith("inputs") and not isinstance(module, Resampled):
            # so does what halves it
            following()
            read.leaf(name, f"{following()}.Conv")
        else:
            theirs = following()
            if isinstance(module, nn.Identity):
                continue
            inner = "Conv2d_0" if f"{theirs}.Conv2d_0.weight" in read.left else "Conv_0"
            read.leaf(f"{name}.conv" if isinstance(module, Resampled) else name, f"{theirs}.{inner}")
    if "last.weight" in read.own:
        for name in ("norm", "last"):
            read.leaf(name, following())
    return read.ended()


def score_sde_settings(state: State, name: str = "") -> tuple[str, dict[str, Any]]:
    """Whether weights of score_sde are of "ddpm" or "ncsnpp", by ``name`` or else, and what their shapes say of its
    settings.

    A filter has no weights: beside convolutions that resample their names tell, else one is assumed where NCSN++ has a
    pyramid. NCSN++ made of DDPM's blocks is DDPM's where nothing else tells. Raises ValueError for weights that are no
    such network's.
    """
    parts: dict[int, dict[str, tuple[int, ...]]] = {}
    for key, value in state.items():
        _, number, rest = key.split(".", 2)
        parts.setdefault(int(number), {})[rest] = tuple(value.shape)
    if max(parts) > 10 * len(parts):
        raise ValueError(f"its modules are numbered up to {max(parts)}, and there are {len(parts)} of them")
    rows = [parts.get(i, {}) for i in range(max(parts) + 1)]
    gaussian = "W" in rows[0]
    if len(rows[gaussian].get("weight", ())) != 2:
        raise ValueError("these weights are of a network that is not told of the noise level; expected one that is")
    rows = rows[gaussian + 2 :]
    width, now = rows[0]["weight"][0], 0
    place = 1

    def residual(row: dict[str, tuple[int, ...]], same: bool | None = None) -> bool:
        """Whether it is a residual block, at the same size or at another."""
        if "Dense_0.weight" not in row:
            return False
        shrinks = "Conv_2.weight" in row and row["GroupNorm_0.weight"][0] == row["Conv_1.weight"][0]
        return same is None or shrinks != same

    def convolves(row: dict[str, tuple[int, ...]]) -> bool:
        return bool(row) and {k.split(".")[0] for k in row} <= {"Conv_0", "Conv2d_0"}

    widths: list[int] = []
    attention: list[int] = []
    blocks, resampling, inputs, combine = 0, "block", "none", "sum"
    while True:
        count = 0
        while residual(rows[place], same=True) and not (blocks and count == blocks):
            now = rows[place]["Conv_0.weight"][0]
            place, count = place + 1, count + 1
            if "NIN_0.W" in rows[place]:
                place, attention = place + 1, [*attention, len(widths)]
        widths, blocks = [*widths, now], blocks or count
        # what resamples without weights has a number
        if rows[place] and not convolves(rows[place]) and not residual(rows[place], same=False):
            break
        if not residual(rows[place]):
            resampling = "strided" if rows[place] else "plain"
        place += 1
        # so has what halves the pyramid, which has weights in residual ones
        if not rows[place]:
            inputs, place = "skip", place + 2
        elif convolves(rows[place]):
            inputs, place = "residual", place + 1
        if rows[place]["GroupNorm_0.weight"][0] == 2 * now:
            combine = "cat"
    convs = [row["weight"] for row in rows[place:] if len(row.get("weight", ())) == 4]
    outputs = "none" if len(convs) == 1 else "skip" if convs[0][0] == rows[0]["weight"][1] else "residual"
    found: dict[str, Any] = {"width": width, "multipliers": tuple(w / width for w in widths), "blocks": blocks}
    found["attention"] = tuple(sorted(set(attention)))
    filtered, pyramids = any("Conv2d_0" in key for key in state), inputs != "none" or outputs != "none"
    if name not in ("", "ddpm", "ncsnpp"):
        raise ValueError(f"name is {name!r}; expected 'ddpm' or 'ncsnpp'")
    plain = resampling != "block" and not (gaussian or filtered or pyramids)
    if name == "ddpm" or (plain and not name):
        same = {"strided": "same"}.get(resampling, resampling)
        return "ddpm", {**found, "attention_up": "last", "resampling": same}
    found |= {"embedding": "gaussian" if gaussian else "positional", "inputs": inputs, "outputs": outputs}
    if not filtered and (not pyramids or any(map(convolves, rows))):
        found["fir"] = ()
    return "ncsnpp", {**found, "combine": combine, "resampling": resampling}


_EDM = {"norm1": "norm0", "conv1": "conv0", "embed": "affine", "norm2": "norm1", "conv2": "conv1", "skip": "skip"}


def from_edm(net: UNet, state: State) -> State:
    """Of EDM's ``SongUNet``, whose labels are one-hot times the root of their number, and ``DhariwalUNet``."""
    read, size, song = _Reader(net, state), net.config["data_shape"][-1], net.config["classes_first"]
    if net.config["embedding"] == "gaussian":
        read.put("embed.0.frequencies", read.take("map_noise.freqs"))
    for ours, theirs in (("embed.1", "map_layer0"), ("embed.3", "map_layer1")):
        read.leaf(ours, theirs)
    if net.classes is not None:
        labels = read.take("map_label.weight").T
        table = labels * len(labels) ** 0.5 + read.take("map_label.bias") if song else labels
        # no label is a label of zeros
        null = [table[:1] - labels[:1] * len(labels) ** 0.5 if song else torch.zeros_like(table[:1])]
        table = torch.cat([table, *(null if net.classes.null is not None else [])])
        read.put("classes.weight", swapped(table, table.shape[1]) if song else table)
    if song:
        read.found["embed.1.weight"] = swapped(read.found["embed.1.weight"], read.found["embed.1.weight"].shape[1])
    for name, level, place in walk(net):
        side, part = ("enc" if name.startswith(("first", "down", "shrink", "inputs")) else "dec"), name.split(".")[0]
        at = f"{side}.{size >> level}x{size >> level}"
        if place >= 0:
            theirs = f"{at}_{'in' if part == 'middle' else 'block'}{place}"
            ours = f"{name}.block"
        else:
            theirs = f"{at}_{ {'first': 'conv', 'shrink': 'down', 'grow': 'up'}.get(part, '') }"
            ours = name
        if f"{ours}.norm1.weight" in read.own:
            for own, inner in _EDM.items():
                if f"{ours}.{own}.weight" in read.own:
                    read.leaf(f"{ours}.{own}", f"{theirs}.{inner}")
        elif part == "inputs":
            kind = "aux_residual" if net.config["inputs"] == "residual" else "aux_skip"
            read.leaf(f"{name}.conv" if kind == "aux_residual" else name, f"{at}_{kind}")
        elif part == "outputs":
            read.leaf(f"{name}.0", f"{at}_aux_norm")
            read.leaf(f"{name}.2", f"{at}_aux_conv")
        else:
            read.leaf(name, theirs)
        attention = getattr(net.get_submodule(name), "attention", None)
        if isinstance(attention, Attention):
            read.leaf(f"{name}.attention.norm", f"{theirs}.norm2")
            read.heads(f"{name}.attention.qkv", f"{theirs}.qkv", ("head", "channel", "which"), attention.heads)
            read.leaf(f"{name}.attention.out", f"{theirs}.proj")
    if "last.weight" in read.own:
        at = f"dec.{size}x{size}_aux" if song else "out"
        read.leaf("norm", f"{at}_norm")
        read.leaf("last", f"{at}_conv")
    return read.ended()


_ADM = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "embed": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
    "scale": "cond_emb_layers.1",
}


def from_adm(net: UNet, state: State, *, legacy: bool = True) -> State:
    """Of guided- and improved-diffusion's ``UNetModel``, and of the former's classifiers; ``legacy``: queries, keys and
    values lie within the heads, but for the attention that pools.
    """
    read = _Reader(net, state)
    order = ("head", "which", "channel") if legacy else ("which", "head", "channel")
    read.leaf("embed.1", "time_embed.0")
    read.leaf("embed.3", "time_embed.2")
    if net.classes is not None:
        read.put("classes.weight", read.take("label_emb.weight"))

    def residual(ours: str, theirs: str) -> None:
        for own, inner in _ADM.items():
            if f"{ours}.{own}.weight" in read.own:
                read.leaf(f"{ours}.{own}", f"{theirs}.{inner}")

    def stage(ours: str, theirs: str, second: str) -> None:
        residual(f"{ours}.block", theirs)
        attention = net.get_submodule(ours).attention
        if isinstance(attention, Attention):
            read.leaf(f"{ours}.attention.norm", f"{second}.norm")
            read.heads(f"{ours}.attention.qkv", f"{second}.qkv", order, attention.heads)
            read.leaf(f"{ours}.attention.out", f"{second}.proj_out")

    def moved(ours: str, theirs: str, conv: str) -> None:
        """What changes the resolution, with weights or without."""
        if f"{ours}.weight" in read.own:
            read.leaf(ours, f"{theirs}.{conv}")
        else:
            residual(ours, theirs)

    number, raised = -1, -1
    for name, _, _ in walk(net):
        part = name.split(".")[0]
        if part in ("first", "down", "shrink"):
            number += 1
        if part == "first":
            read.leaf("first", "input_blocks.0.0")
        elif part == "down":
            stage(name, f"input_blocks.{number}.0", f"input_blocks.{number}.1")
        elif part == "shrink":
            moved(name, f"input_blocks.{number}.0", "op")
        elif part == "middle":
            place = int(name[-1])
            stage(name, f"middle_block.{2 * place}", "middle_block.1")
        elif part == "up":
            raised += 1
            stage(name, f"output_blocks.{raised}.0", f"output_blocks.{raised}.1")
        else:
            attended = net.up[raised].attention is not None
            moved(name, f"output_blocks.{raised}.{1 + attended}", "conv")
    read.leaf("norm", "out.0")
    if isinstance(net, Classifier):
        read.put("pool.positions", read.take("out.2.positional_embedding").T)
        read.leaf("pool.qkv", "out.2.qkv_proj")
        read.leaf("pool.out", "out.2.c_proj")
    else:
        read.leaf("last", "out.2")
    if isinstance(net, DiffAE):
        _encoder(net, read)
    return read.ended()


def _encoder(net: DiffAE, read: _Reader) -> None:
    """That of a diffusion autoencoder's release: its attention stands beside the block before it."""
    read.leaf("encoder.first", "encoder.input_blocks.0.0")
    layers, number = list(net.encoder.layers), 0
    for i, layer in enumerate(layers):
        ours, last = f"encoder.layers.{i}", len(layers) - 3
        attends = isinstance(layer, Attention)
        number += i < last and not attends
        place = f"input_blocks.{number}.{int(attends)}" if i < last else f"middle_block.{i - last}"
        inner = {"norm": "norm", "qkv": "qkv", "out": "proj_out"} if attends else _BLOCK
        for own, name in inner.items():
            if f"{ours}.{own}.weight" in read.own:
                read.leaf(f"{ours}.{own}", f"encoder.{place}.{name}")
    read.leaf("encoder.norm", "encoder.out.0")
    read.leaf("encoder.out", "encoder.out.3")


_BLOCK = {"norm": "in_layers.0", "conv": "in_layers.2", "skip": "skip_connection"}
