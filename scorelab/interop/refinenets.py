"""The weights of NCSN's and NCSNv2's releases by the names that ``RefineNet`` has for them.

Levels of the deepest are called 1, 2, 3, 31, 4, 5, and those of the way back by the same names in another order.
"""

from __future__ import annotations

import torch

from scorelab.interop.reading import Reader, State
from scorelab.nn.refinenet import RefineNet

__all__ = ["from_ncsn", "from_ncsnv2"]

_DOWN = {4: ("1", "2", "3", "4"), 5: ("1", "2", "3", "4", "5"), 6: ("1", "2", "3", "31", "4", "5")}
_BACK = {4: ("1", "2", "3", "4"), 5: ("1", "2", "3", "4", "5"), 6: ("1", "2", "31", "3", "4", "5")}


def from_ncsn(net: RefineNet, state: State) -> State:
    """Of NCSN's ``CondRefineNetDilated``, for a net with ``levels`` and depth 4; its output is the score.

    Raises ValueError for weights that don't fit.
    """
    return _converted(net, state).ended()


def from_ncsnv2(net: RefineNet, state: State) -> State:
    """Of ``NCSNv2``, ``NCSNv2Deeper`` and ``NCSNv2Deepest``, for a net without ``levels``, of depth 4, 5 and 6.

    Before it is divided by sigma their output is minus the noise, so the last convolution changes its sign: the net
    predicts eps. The buffer ``sigmas`` is left out, being the model's. Raises ValueError for weights that don't fit.
    """
    read = _converted(net, {k: v for k, v in state.items() if k != "sigmas"})
    for kind in ("weight", "bias"):
        read.found[f"last.{kind}"] = -read.found[f"last.{kind}"]
    return read.ended()


def _converted(net: RefineNet, state: State) -> Reader:
    read = Reader(net, state)

    def norm(ours: str, theirs: str) -> None:
        if net.config["levels"]:
            read.put(f"{ours}.table", read.take(f"{theirs}.embed.weight"))
        else:
            read.put(f"{ours}.table", torch.cat([read.take(f"{theirs}.{k}") for k in ("gamma", "alpha", "beta")]))

    def conv(ours: str, theirs: str, kinds: tuple[str, ...] = ("weight", "bias")) -> None:
        # within a module that averages as well the convolution has a name
        theirs += ".conv" if f"{theirs}.conv.weight" in read.left else ""
        for kind in kinds:
            read.put(f"{ours}.{kind}", read.take(f"{theirs}.{kind}"))

    def back(ours: str, i: int, norms: str, convs: str, kinds: tuple[str, ...] = ("weight",)) -> None:
        if net.config["levels"]:
            norm(f"{ours}.norms.{i}", norms)
        conv(f"{ours}.convs.{i}", convs, kinds)

    def units(ours: str, theirs: str) -> None:
        for i in range(len(net.get_submodule(f"{ours}.convs"))):  # type: ignore[arg-type]
            name = f"{theirs}.{i // 2 + 1}_{i % 2 + 1}"
            back(ours, i, f"{name}_norm", f"{name}_conv")

    conv("first", "begin_conv")
    norm("norm", "normalizer")
    conv("last", "end_conv")
    for i, name in enumerate(_DOWN[net.config["depth"]]):
        for k in range(2):
            ours, theirs = f"down.{i}.blocks.{k}", f"res{name}.{k}"
            for j in (1, 2):
                norm(f"{ours}.norm{j}", f"{theirs}.normalize{j}")
                conv(f"{ours}.conv{j}", f"{theirs}.conv{j}")
            if f"{ours}.skip.weight" in read.own:
                conv(f"{ours}.skip", f"{theirs}.shortcut")
    for i, name in enumerate(_BACK[net.config["depth"]]):
        ours, theirs = f"back.{i}", f"refine{name}"
        for k in range(2 if i else 1):
            units(f"{ours}.adapt.{k}", f"{theirs}.adapt_convs.{k}")
            if i:
                back(ours, k, f"{theirs}.msf.norms.{k}", f"{theirs}.msf.convs.{k}", ("weight", "bias"))
        for k in range(2):
            back(f"{ours}.pooled", k, f"{theirs}.crp.norms.{k}", f"{theirs}.crp.convs.{k}")
        units(f"{ours}.units", f"{theirs}.output_convs")
    return read
