"""U-Nets of residual blocks: DDPM's by default, and by their options NCSN++ and DDPM++, ADM and those of EDM's release.

They take data of any shape (C, L), (C, H, W) or (C, D, H, W). Where convolutions change the size, odd ones are halved
rounding up, and going up returns to the size that was left.

Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv:2006.11239; Song et al., Score-Based Generative
Modeling through Stochastic Differential Equations, 2021, arXiv:2011.13456, appendix H; Dhariwal and Nichol, Diffusion
Models Beat GANs on Image Synthesis, 2021, arXiv:2105.05233.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from scorelab.nn.classes import Classes, Conditional
from scorelab.nn.embedding import FourierEmbedding, GaussianEmbedding, PositionalEmbedding
from scorelab.nn.layers import CONV, Attention, Resampled, Residual, Style, given, grown, halved, resampled
from scorelab.typing import Tensor

__all__ = ["ADM", "UNet", "adm", "ddpm", "ncsnpp"]


class _Stage(nn.Module):
    """A residual block and, where asked, attention."""

    def __init__(self, block: Residual, attention: Attention | None) -> None:
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h: Tensor = self.block(x, embedding)
        return h if self.attention is None else self.attention(h)


_CHOICES = {
    "embedding": ("fourier", "positional", "positional_open", "gaussian"),
    "time": ("added", "adaptive"),
    "resampling": ("strided", "same", "plain", "block"),
    "attention_up": ("each", "last"),
    "inputs": ("none", "skip", "residual"),
    "outputs": ("none", "skip", "residual"),
    "combine": ("sum", "cat"),
}


def _channels(width: int, multiplier: float) -> float:
    """width times multiplier, whole where only rounding keeps it from that, as 112 times 464/112 is."""
    found = width * multiplier
    return round(found) if abs(found - round(found)) < 1e-9 * found else found


def _check(config: dict[str, Any]) -> None:
    """Refuse (ValueError) settings of a UNet that don't fit."""
    shape, width, multipliers = config["data_shape"], config["width"], config["multipliers"]
    if len(shape) - 1 not in CONV or min(shape) < 1:
        raise ValueError(
            f"data_shape is {shape}; expected (C, L), (C, H, W) or (C, D, H, W): points need MLP (model.net.name='mlp')"
        )
    for key, choices in _CHOICES.items():
        if config[key] not in choices:
            raise ValueError(f"{key} is {config[key]!r}; expected one of {', '.join(map(repr, choices))}")
    blocks, head, dropout, attention = (config[k] for k in ("blocks", "head", "dropout", "attention"))
    widths = [_channels(width, m) for m in multipliers]
    if (
        width < 2
        or width % 2
        or blocks < 1
        or head < 0
        or not widths
        or any(w < 1 or w % 1 for w in (*widths, _channels(width, config["first"])))
    ):
        raise ValueError(
            f"width = {width}, blocks = {blocks}, head = {head}, multipliers = {multipliers}; expected an even width, "
            "some multipliers that give whole numbers of channels, blocks of 1 or more and head >= 0"
        )
    if config["fir"] and (len(config["fir"]) % 2 or not sum(config["fir"])):
        raise ValueError(f"fir is {config['fir']}; expected an even number of taps, of a sum other than 0, or ()")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout:g}; expected 0 <= dropout < 1")
    if any(a not in range(len(widths)) for a in attention):
        raise ValueError(f"attention is {attention}; expected resolutions from 0 to {len(widths) - 1}")
    for key in ("heads", "heads_up"):
        heads = config[key]
        if heads < 0 or (heads and any(w % heads for i, w in enumerate(widths) if i in attention)):
            raise ValueError(
                f"{key} = {heads} does not divide the attention widths; expected a divisor of {width}, or 0"
            )
    if head and not config["heads"] and any(w % head and w > head for i, w in enumerate(widths) if i in attention):
        raise ValueError(f"head = {head} does not divide the attention widths; expected a divisor of {width}")
    multiple = 2 ** (len(widths) - 1)
    whole = config["resampling"] == "strided" and config["inputs"] == config["outputs"] == "none"
    if not whole and any(n % multiple for n in shape[1:]):
        raise ValueError(
            f"data_shape is {shape}; expected sizes that are multiples of {multiple}, for {len(widths)} resolutions"
        )


class UNet(Conditional):
    """net(x, label, condition=None) -> F like x (B, C, *sizes); label (B,) float, condition (B,) class indices.

    data_shape: (C, *sizes) with one to three sizes. width: channels at full resolution; multipliers: one each. blocks:
    residual ones at each. attention: which resolutions (0 is full) have self-attention, with heads of ``head`` channels
    (0: one head) or so many ``heads``, of which the way up has ``heads_up`` (0: as many); "each" block that goes up has
    it, or the "last". middle_attention: in the middle also where the last resolution has none. num_classes: condition
    on class labels; null_class: and on none. variance: twice the channels come out, F and the variance between its
    bounds.

    embedding of the label: "fourier" (None) for log sigma, "gaussian" for log sigma by random frequencies, "positional"
    for steps, "positional_open" for steps as in ADM. classes_first: classes are added to that, else to what a network
    of two layers makes of it. first: a multiplier for the first convolution. time: "added", or "adaptive" scales and
    shifts. resampling: "strided" convolutions; those of padding "same", or filtered; residual "block"s; or "plain",
    without weights. fir: the kernel of its filter. inputs, outputs: what the pyramid of x, or of the output, adds at
    each resolution, "combine" how. rescaled, group, eps, project: see ``Style``. groups: of the norms, as many in all,
    or in each in the order of ``modules()``; () for as many as ``group`` says. input_features: the exponents n of
    sin(2 pi 2^n x) and its cosine, which come in beside x; 6 and 7 for bytes in [-1, 1], a value or two a period. code:
    the condition is (B, code) numbers, which scale in each block after time does. embedded: the width of what the
    label becomes, 0 for 4 times ``width``.

    Raises ValueError for settings that don't fit, and for sizes that its resolutions don't divide.
    """

    def __init__(
        self,
        data_shape: tuple[int, ...],
        *,
        width: int = 64,
        multipliers: tuple[float, ...] = (1, 2),
        blocks: int = 2,
        attention: tuple[int, ...] = (),
        head: int = 64,
        heads: int = 0,
        heads_up: int = 0,
        dropout: float = 0.0,
        embedding: str | None = None,
        num_classes: int | None = None,
        null_class: bool = False,
        middle_attention: bool = False,
        attention_up: str = "each",
        time: str = "added",
        resampling: str = "strided",
        fir: tuple[float, ...] = (),
        inputs: str = "none",
        outputs: str = "none",
        combine: str = "sum",
        rescaled: bool = False,
        project: bool = False,
        group: int = 4,
        groups: tuple[int, ...] = (),
        eps: float = 1e-5,
        classes_first: bool = False,
        first: float = 1,
        variance: bool = False,
        input_features: tuple[int, ...] = (),
        code: int = 0,
        embedded: int = 0,
    ) -> None:
        config = given(locals()) | {"embedding": embedding or "fourier"}
        super().__init__()
        self.config = config
        _check(config)
        rank, channels = len(data_shape) - 1, data_shape[0]
        inner, widths, begun = (
            embedded or 4 * width,
            [int(_channels(width, m)) for m in multipliers],
            int(_channels(width, first)),
        )
        style = Style(rank, inner, dropout, time == "adaptive", rescaled, group, eps, tuple(fir), project, code)
        self.style, self.blocks, self.activation_checkpointing = style, blocks, False
        encode = _embedding(embedding or "fourier", width)
        self.embed = nn.Sequential(encode, nn.Linear(encode.width, inner), nn.SiLU(), nn.Linear(inner, inner))
        table = encode.width if classes_first else inner
        self.classes = None if num_classes is None else Classes(num_classes, table, null_class)
        self.input_features = tuple(input_features)
        self.first = style.conv(channels * (1 + 2 * len(input_features)), begun)

        def stage(at: int, into: int, to: int, last: bool = True, heads: int = heads) -> _Stage:
            attended = at in attention and (last or attention_up == "each")
            return _Stage(Residual(style, into, to), Attention(style, to, head, heads) if attended else None)

        self.down, self.shrink, self.up, self.grow, self.inputs, self.outputs = (nn.ModuleList() for _ in range(6))
        now, kept, pyramid, deepest = begun, [begun], channels, len(widths) - 1
        for i, to in enumerate(widths):
            for _ in range(blocks):
                self.down.append(stage(i, now, to))
                kept.append(now := to)
            if i < deepest:
                self.shrink.append(self._resampling(now, up=False))
                if inputs == "skip":
                    self.inputs.append(style.conv(channels, now, 1))
                    now *= 1 + (combine == "cat")
                elif inputs == "residual":
                    self.inputs.append(Resampled(style, pyramid, now, up=False))
                    pyramid = now
                kept.append(now)
        attended = middle_attention or deepest in attention
        between = _Stage(Residual(style, now, now), Attention(style, now, head, heads) if attended else None)
        self.middle = nn.ModuleList([between, stage(-1, now, now)])
        self._build_up(now, kept, stage)
        if groups:
            self._regroup(tuple(groups))

    def _regroup(self, groups: tuple[int, ...]) -> None:
        norms = [module for module in self.modules() if isinstance(module, nn.GroupNorm)]
        counts = groups * len(norms) if len(groups) == 1 else groups
        if len(counts) != len(norms):
            raise ValueError(f"groups has {len(groups)} numbers; expected one, or one for each of {len(norms)} norms")
        for norm, count in zip(norms, counts, strict=True):
            if count < 1 or norm.num_channels % count:
                raise ValueError(f"groups holds {count}; expected a divisor of the {norm.num_channels} channels there")
            norm.num_groups = count

    def _build_up(self, now: int, kept: list[int], stage: Callable[..., _Stage]) -> None:
        """The way up, from so many channels and what is kept of the way down."""
        c, style = self.config, self.style
        out, outputs, widths = c["data_shape"][0] * (1 + c["variance"]), c["outputs"], c["multipliers"]
        pyramid, deepest = now, len(widths) - 1
        for i, to in reversed([(i, int(_channels(c["width"], m))) for i, m in enumerate(widths)]):
            for k in range(self.blocks + 1):
                self.up.append(stage(i, now + kept.pop(), to, k == self.blocks, c["heads_up"] or c["heads"]))
                now = to
            if outputs == "skip":
                self.outputs.append(nn.Sequential(style.norm(now), nn.SiLU(), style.conv(now, out)))
            elif outputs == "residual" and i == deepest:
                self.outputs.append(nn.Sequential(style.norm(now), nn.SiLU(), style.conv(now, now)))
                pyramid = now
            elif outputs == "residual":
                self.outputs.append(Resampled(style, pyramid, now, up=True))
                pyramid = now
            if i:
                self.grow.append(self._resampling(now, up=True))
        if outputs != "skip":
            self.norm, self.last = style.norm(now), style.conv(now, out)
            nn.init.zeros_(self.last.weight)

    def _resampling(self, channels: int, up: bool) -> nn.Module:
        style, kind = self.style, self.config["resampling"]
        if kind == "block":
            return Residual(style, channels, channels, up)
        if kind == "plain":
            return nn.Identity()
        if kind == "strided" and not up:
            return CONV[style.rank](channels, channels, 3, stride=2, padding=1)
        return style.conv(channels, channels)  # type: ignore[no-any-return]

    def _run(self, stage: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        """A stage; with ``activation_checkpointing`` its activations are computed again in the backward pass."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            found: Tensor = checkpoint(stage, h, embedding, use_reentrant=False)
            return found
        return stage(h, embedding)  # type: ignore[no-any-return]

    def _shrunk(self, module: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        if isinstance(module, Residual):
            return self._run(module, h, embedding)
        if self.config["resampling"] == "plain":
            return resampled(h, False, self.style.fir)
        return halved(h, module, self.style.fir) if self.config["resampling"] == "same" else module(h)

    def _embedded(self, x: Tensor, label: Tensor, condition: Tensor | None) -> Tensor:
        encoded = self.embed[0](label if label.is_floating_point() else label.float()).to(x.dtype)
        if self.style.code:
            if condition is None or condition.shape[1:] != (self.style.code,):
                got = "none" if condition is None else tuple(condition.shape)
                raise ValueError(f"the condition is {got}; expected a code (B, {self.style.code})")
            return functional.silu(torch.cat([self.embed[1:](encoded), condition.to(x.dtype)], 1))
        if condition is None:
            return functional.silu(self.embed[1:](encoded))
        classes = self.embedded(condition).to(x.dtype)
        if self.config["classes_first"]:
            return functional.silu(self.embed[1:](encoded + classes))
        return functional.silu(self.embed[1:](encoded) + classes)

    def _with_input(self, level: int, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        """h with what the pyramid of x adds at a resolution, and the pyramid there."""
        kind = self.config["inputs"]
        if kind == "skip":
            pyramid = resampled(pyramid, False, self.style.fir)
            added = self.inputs[level](pyramid)
            return (torch.cat([added, h], 1) if self.config["combine"] == "cat" else added + h), pyramid
        if kind == "residual":
            h = pyramid = self.style.sum(self.inputs[level](pyramid), h)
        return h, pyramid

    def _with_output(self, level: int, h: Tensor, pyramid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """h, and the pyramid of the output, after a resolution of the way up."""
        kind = self.config["outputs"]
        if kind == "none":
            return h, None
        module = self.outputs[level]
        if pyramid is None:
            return h, module(h)
        if kind == "skip":
            return h, resampled(pyramid, True, self.style.fir) + module(h)
        h = self.style.sum(module(pyramid), h)
        return h, h

    def _descended(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What comes out of the middle, and what is kept of the way there."""
        h, pyramid = self.first(self._with_features(x)), x
        kept = [h]
        for i, stage in enumerate(self.down):
            kept.append(h := self._run(stage, h, embedding))
            level, place = divmod(i + 1, self.blocks)
            if place == 0 and level <= len(self.shrink):
                h = self._shrunk(self.shrink[level - 1], h, embedding)
                h, pyramid = self._with_input(level - 1, h, pyramid)
                kept.append(h)
        for stage in self.middle:
            h = self._run(stage, h, embedding)
        return h, kept

    def _with_features(self, x: Tensor) -> Tensor:
        """x, and sines and cosines of it as further channels."""
        if not self.input_features:
            return x
        angles = [2 * math.pi * 2.0**n * x for n in self.input_features]
        return torch.cat([x, *(f(a) for a in angles for f in (torch.sin, torch.cos))], 1)

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        embedding = self._embedded(x, label, condition)
        h, kept = self._descended(x, embedding)
        made: Tensor | None = None
        for i, stage in enumerate(self.up):
            h = self._run(stage, torch.cat([h, kept.pop()], 1), embedding)
            level, place = divmod(i + 1, self.blocks + 1)
            if place == 0:
                h, made = self._with_output(level - 1, h, made)
                if kept:
                    h = self._grown(self.grow[level - 1], h, tuple(kept[-1].shape[2:]), embedding)
        if self.config["outputs"] == "skip":
            assert made is not None
            return made
        out: Tensor = self.last(functional.silu(self.norm(h)))
        return out

    def _grown(self, module: nn.Module, h: Tensor, size: tuple[int, ...], embedding: Tensor) -> Tensor:
        if isinstance(module, Residual):
            return self._run(module, h, embedding)
        if self.config["resampling"] == "plain":
            return resampled(h, True, self.style.fir)
        return grown(h, size, module, self.style.fir)


def _embedding(kind: str, width: int) -> Any:
    """What encodes the label."""
    if kind == "fourier":
        return FourierEmbedding(width)
    return GaussianEmbedding(2 * width) if kind == "gaussian" else PositionalEmbedding(width, kind == "positional")


def ddpm(
    data_shape: tuple[int, ...],
    *,
    width: int = 128,
    multipliers: tuple[float, ...] = (1, 2, 2, 2),
    blocks: int = 2,
    attention: tuple[int, ...] = (1,),
    dropout: float = 0.1,
    embedding: str = "positional",
    attention_up: str = "each",
    resampling: str = "same",
    num_classes: int | None = None,
    null_class: bool = False,
) -> UNet:
    """DDPM's, by default as for CIFAR-10; score_sde's version of it has attention_up="last"."""
    return UNet(
        data_shape,
        width=width,
        multipliers=multipliers,
        blocks=blocks,
        attention=attention,
        head=0,
        dropout=dropout,
        embedding=embedding,
        num_classes=num_classes,
        null_class=null_class,
        middle_attention=True,
        attention_up=attention_up,
        resampling=resampling,
        group=1,
        eps=1e-6,
    )


def ncsnpp(
    data_shape: tuple[int, ...],
    *,
    width: int = 128,
    multipliers: tuple[float, ...] = (1, 2, 2, 2),
    blocks: int = 4,
    attention: tuple[int, ...] = (1,),
    dropout: float = 0.1,
    embedding: str = "gaussian",
    resampling: str = "block",
    fir: tuple[float, ...] = (1.0, 3.0, 3.0, 1.0),
    inputs: str = "residual",
    outputs: str = "none",
    combine: str = "sum",
    rescaled: bool = True,
    num_classes: int | None = None,
    null_class: bool = False,
) -> UNet:
    """NCSN++, by default as for CIFAR-10; DDPM++ with embedding="positional", fir=(), inputs="none"."""
    return UNet(
        data_shape,
        width=width,
        multipliers=multipliers,
        blocks=blocks,
        attention=attention,
        head=0,
        dropout=dropout,
        embedding=embedding,
        num_classes=num_classes,
        null_class=null_class,
        middle_attention=True,
        attention_up="last",
        resampling="same" if resampling == "strided" else resampling,
        fir=fir,
        inputs=inputs,
        outputs=outputs,
        combine=combine,
        rescaled=rescaled,
        project=True,
        eps=1e-6,
        classes_first=True,
    )


ADM: dict[str, Any] = {
    "embedding": "positional_open",
    "middle_attention": True,
    "time": "adaptive",
    "resampling": "block",
}
"""What ADM's network and its classifier have in common."""


def adm(
    data_shape: tuple[int, ...],
    *,
    width: int = 192,
    multipliers: tuple[float, ...] = (1, 2, 3, 4),
    blocks: int = 3,
    attention: tuple[int, ...] = (1, 2, 3),
    head: int = 64,
    heads: int = 0,
    dropout: float = 0.1,
    group: int = 1,
    variance: bool = False,
    num_classes: int | None = None,
    null_class: bool = False,
) -> UNet:
    """ADM, by default as for ImageNet at 64 px; EDM's version of it has group=4 and no variance."""
    return UNet(
        data_shape,
        width=width,
        multipliers=multipliers,
        blocks=blocks,
        attention=attention,
        head=head,
        heads=heads,
        dropout=dropout,
        num_classes=num_classes,
        null_class=null_class,
        group=group,
        first=multipliers[0] if multipliers else 1,
        variance=variance,
        **ADM,
    )
