"""The weights of EDM2's release by the names that ``EDM2`` has for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scorelab.interop.reading import Reader, State
from scorelab.nn.edm2 import EDM2

__all__ = ["from_edm2"]

_BLOCK = {
    "conv1.weight": "conv_res0.weight",
    "conv2.weight": "conv_res1.weight",
    "embed.weight": "emb_linear.weight",
    "gain": "emb_gain",
    "skip.weight": "conv_skip.weight",
    "attention.qkv.weight": "attn_qkv.weight",
    "attention.out.weight": "attn_proj.weight",
}
_REST = {
    "fourier.frequencies": "unet.emb_fourier.freqs",
    "fourier.phases": "unet.emb_fourier.phases",
    "embed.weight": "unet.emb_noise.weight",
    "classes.weight": "unet.emb_label.weight",
    "last.weight": "unet.out_conv.weight",
    "gain": "unet.out_gain",
    "fourier_uncertainty.frequencies": "logvar_fourier.freqs",
    "fourier_uncertainty.phases": "logvar_fourier.phases",
    "last_uncertainty.weight": "logvar_linear.weight",
}


def _blocks(net: EDM2) -> Iterator[tuple[str, str]]:
    """Our blocks' names and the release's, which count a resolution's blocks."""
    size, level, place = net.config["data_shape"][-1], 0, 0
    for part in ("down", "middle", "up"):
        for i, block in enumerate(net.get_submodule(part).children()):
            up: Any = block.up
            if up is not None:
                level, place = level + (-1 if up else 1), 0
                kind = "up" if up else "down"
            else:
                kind, place = f"{'in' if part == 'middle' else 'block'}{place}", place + 1
            yield f"{part}.{i}", f"unet.{'enc' if part == 'down' else 'dec'}.{size >> level}x{size >> level}_{kind}"
        place = 0


def from_edm2(net: EDM2, state: State) -> State:
    """Of EDM2's ``Precond``; ValueError for weights of another network or size.

    A network without the uncertainty head leaves its weights out.
    """
    read, size = Reader(net, state), net.config["data_shape"][-1]
    read.put("first.weight", read.take(f"unet.enc.{size}x{size}_conv.weight"))
    for ours, theirs in _REST.items():
        if ours in read.own:
            read.put(ours, read.take(theirs))
        elif theirs.startswith("logvar"):
            read.left.pop(theirs, None)
    for ours, theirs in _blocks(net):
        for own, inner in _BLOCK.items():
            if f"{ours}.{own}" in read.own:
                read.put(f"{ours}.{own}", read.take(f"{theirs}.{inner}"))
    return read.ended()
