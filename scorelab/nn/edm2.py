"""EDM2's magnitude-preserving U-Net: no norms and no biases; every operation keeps the mean square of what it is given.

A weight w is used as w_hat / sqrt(n), where each of its rows of n numbers is divided by its root mean square, so inputs
of unit variance that don't correlate give outputs of unit variance. In training the weights themselves are put back to
a root mean square of 1 before each step's pass ("forced weight normalisation"): else they grow, which lowers the
effective learning rate. With a and b independent and of mean square 1 so are

    mp_sum(a, b, t) = ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)
    mp_silu(x) = silu(x) / 0.596,    0.596^2 = E silu(z)^2 for normal z
    mp_cat(a, b) = [a sqrt(N / 2 N_a), b sqrt(N / 2 N_b)],    N = N_a + N_b, to whose mean square both add as much.

Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, 2024, arXiv:2312.02696, configuration
G.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from scorelab.checks import widened
from scorelab.nn.classes import Conditional
from scorelab.nn.dropout import Dropout
from scorelab.nn.layers import CONV, given, resampled
from scorelab.typing import Tensor

__all__ = ["EDM2"]

_CONVOLVED = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_BALANCE = 0.3  # the share of a branch in what it is added to
_LARGEST = 256.0  # activations are clipped there, which half precision still holds


def _unit(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x divided by its root mean square over ``dims``, taken in float32 at least; 1e-4 keeps zeros finite."""
    count = math.prod([x.shape[d] for d in dims])
    norm: Tensor = torch.linalg.vector_norm(widened(x), dim=dims, keepdim=True)
    return x / (1e-4 + norm / math.sqrt(count)).to(x.dtype)


def _rows(weight: Tensor) -> Tensor:
    """A weight (out, ...) whose rows have a root mean square of 1."""
    return _unit(weight, tuple(range(1, weight.ndim)))


def _sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def _silu(x: Tensor) -> Tensor:
    return functional.silu(x) / 0.596


def _cat(a: Tensor, b: Tensor) -> Tensor:
    """(B, N_a, *sizes), (B, N_b, *sizes) -> (B, N_a + N_b, *sizes)."""
    half = (a.shape[1] + b.shape[1]) / 2
    return torch.cat([math.sqrt(half / a.shape[1]) * a, math.sqrt(half / b.shape[1]) * b], 1)


class _Conv(nn.Module):
    """A convolution that keeps sizes and magnitudes, without bias: of rank 0 a matrix, for (B, channels)."""

    def __init__(self, rank: int, channels: int, out: int, kernel: int = 1) -> None:
        super().__init__()
        self.rank, self.padding = rank, kernel // 2
        self.weight = nn.Parameter(torch.randn(out, channels, *(kernel,) * rank))

    @torch.no_grad()
    def normalise(self) -> None:
        """Forced weight normalisation: the rows' root mean square becomes 1."""
        self.weight.copy_(_rows(widened(self.weight)))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = (_rows(widened(self.weight)) * (gain / math.sqrt(math.prod(self.weight.shape[1:])))).to(x.dtype)
        if not self.rank:
            return functional.linear(x, weight)
        return _CONVOLVED[self.rank](x, weight, padding=self.padding)


class _Fourier(nn.Module):
    """sqrt(2) cos of a label at random frequencies and phases: (B,) -> (B, width), in float32 at least."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(width))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))

    def forward(self, label: Tensor) -> Tensor:
        label = widened(label)
        angle = label.unsqueeze(1) * self.frequencies.to(label.dtype) + self.phases.to(label.dtype)
        return math.sqrt(2) * angle.cos()


class _Labels(_Conv):
    """Class indices (B,) -> (B, width): a matrix's product with one-hot rows times the root of their length.

    The null class, number ``num_classes``, is a row of zeros.
    """

    def __init__(self, num_classes: int, width: int, null: bool) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; expected at least 1, or None")
        super().__init__(0, num_classes, width)
        self.num_classes, self.null = num_classes, num_classes if null else None

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        known = self.num_classes + (self.null is not None)
        one = functional.one_hot(x.long(), known).narrow(1, 0, self.num_classes)
        return super().forward(math.sqrt(self.num_classes) * one.to(self.weight.dtype), gain)


class _Attention(nn.Module):
    """Self-attention over all positions, with queries, keys and values of unit magnitude."""

    def __init__(self, rank: int, channels: int, head: int) -> None:
        super().__init__()
        self.heads = max(1, channels // head)
        self.qkv, self.out = _Conv(rank, channels, 3 * channels, 1), _Conv(rank, channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        # channels lie as in the release: by head, then by place in it, then query, key, value
        split = _unit(self.qkv(x).reshape(b, self.heads, c // self.heads, 3, -1), (2,))
        q, k, v = split.transpose(2, 4).unbind(3)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)
        return _sum(x, self.out(mixed), _BALANCE)


class _Block(nn.Module):
    """A residual block and, where asked (``head``), attention; ``up``: at twice the size, or at half.

    On the way down (``normed``) pixels are normalised after the skip's convolution, so that magnitudes can't add up.
    """

    def __init__(
        self,
        rank: int,
        channels: int,
        out: int,
        embedding: int,
        dropout: float,
        head: int = 0,
        *,
        normed: bool = False,
        up: bool | None = None,
    ) -> None:
        super().__init__()
        self.normed, self.up = normed, up
        self.skip = _Conv(rank, channels, out, 1) if channels != out else None
        self.conv1 = _Conv(rank, out if normed else channels, out, 3)
        self.embed, self.gain = _Conv(0, embedding, out), nn.Parameter(torch.zeros(1))
        self.dropout, self.conv2 = Dropout(dropout), _Conv(rank, out, out, 3)
        self.attention = _Attention(rank, out, head) if head else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.up is not None:
            x = resampled(x, self.up)
        if self.normed:
            x = _unit(x if self.skip is None else self.skip(x), (1,))
        scale = 1 + self.embed(embedding, self.gain).reshape(x.shape[0], -1, *(1,) * (x.ndim - 2))
        h = _silu(self.conv1(_silu(x)) * scale.to(x.dtype))
        h = self.conv2(self.dropout(h))
        if not self.normed and self.skip is not None:
            x = self.skip(x)
        x = _sum(x, h, _BALANCE)
        if self.attention is not None:
            x = self.attention(x)
        return x.clamp(-_LARGEST, _LARGEST)


def _check(config: dict[str, Any]) -> None:
    """Refuse (ValueError) settings that don't fit."""
    shape, width, multipliers = config["data_shape"], config["width"], config["multipliers"]
    blocks, head, dropout, attention = (config[k] for k in ("blocks", "head", "dropout", "attention"))
    if len(shape) - 1 not in CONV or min(shape) < 1:
        raise ValueError(
            f"data_shape is {shape}; expected (C, L), (C, H, W) or (C, D, H, W): points need MLP (model.net.name='mlp')"
        )
    if width < 1 or blocks < 1 or head < 1 or config["uncertainty"] < 0 or not multipliers or min(multipliers) < 1:
        raise ValueError(
            f"width = {width}, blocks = {blocks}, head = {head}, uncertainty = {config['uncertainty']}, multipliers = "
            f"{multipliers}; expected width, blocks, head and some multipliers of 1 or more, and uncertainty >= 0"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout:g}; expected 0 <= dropout < 1")
    levels = len(multipliers)
    if any(a not in range(levels) for a in attention):
        raise ValueError(f"attention is {attention}; expected resolutions from 0 to {levels - 1}")
    # the middle has attention whatever the settings say
    widths = [width * multipliers[i] for i in {*attention, levels - 1}]
    if any(w > head and w % head for w in widths):
        raise ValueError(f"head = {head} does not divide the widths with attention, {widths}; expected a divisor")
    if any(n % 2 ** (levels - 1) for n in shape[1:]):
        raise ValueError(
            f"data_shape is {shape}; expected sizes that are multiples of {2 ** (levels - 1)}, for {levels} "
            "resolutions: crop or pad the data, or give fewer multipliers"
        )


class EDM2(Conditional):
    """net(x, label, condition=None) -> F like x (B, C, *sizes); label (B,) is log(sigma)/4, condition (B,) classes.

    x must have unit variance and F then has it: build the ScoreModel with ``edm(sd)``, ``UnitVariance(sd)``,
    ``label="log_sigma"`` and ``label_scale=0.25``. Without a condition a network with classes takes a label of zeros.

    data_shape: (C, *sizes) with one to three sizes. width: channels at full resolution; multipliers: one each. blocks:
    residual ones at each on the way down, one more on the way up. attention: which resolutions (0 is full) have
    self-attention, with heads of ``head`` channels (one head where there are fewer); the middle always has.
    uncertainty: features of the head that estimates it, 0: no head. num_classes: condition on class labels;
    null_class: and on none.

    In training mode a pass with gradients first normalises the weights in place, so two such passes can't share one
    backward pass. Raises ValueError for settings that don't fit, and for sizes that its resolutions don't divide.
    """

    wants: ClassVar[dict[str, tuple[str, ...]]] = {
        "label": ("log_sigma", "relative_log_sigma"),
        "input_scale": ("unit_variance",),
    }
    label_scale: ClassVar[float] = 0.25
    # of another type than an embedding, with the same attributes
    classes: _Labels | None  # type: ignore[assignment]

    def __init__(
        self,
        data_shape: tuple[int, ...],
        *,
        width: int = 192,
        multipliers: tuple[int, ...] = (1, 2, 3, 4),
        blocks: int = 3,
        attention: tuple[int, ...] = (2, 3),
        head: int = 64,
        dropout: float = 0.0,
        uncertainty: int = 128,
        num_classes: int | None = None,
        null_class: bool = False,
    ) -> None:
        config = given(locals())
        super().__init__()
        self.config = config
        _check(config)
        rank, channels, widths = len(data_shape) - 1, data_shape[0], [width * m for m in multipliers]
        inner, deepest, self.blocks, self.activation_checkpointing = max(widths), len(widths) - 1, blocks, False
        self.fourier, self.embed = _Fourier(widths[0]), _Conv(0, widths[0], inner)
        self.classes = None if num_classes is None else _Labels(num_classes, inner, null_class)
        self.fourier_uncertainty = _Fourier(uncertainty) if uncertainty else None
        self.last_uncertainty = _Conv(0, uncertainty, 1) if uncertainty else None
        # a channel of ones stands for the biases that there are not
        self.first = _Conv(rank, channels + 1, widths[0], 3)
        self.down, self.middle, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        now, kept = widths[0], [widths[0]]
        for i, to in enumerate(widths):
            if i:
                self.down.append(_Block(rank, now, now, inner, dropout, normed=True, up=False))
                kept.append(now)
            for _ in range(blocks):
                self.down.append(_Block(rank, now, to, inner, dropout, head if i in attention else 0, normed=True))
                kept.append(now := to)
        self.middle.extend([_Block(rank, now, now, inner, dropout, head), _Block(rank, now, now, inner, dropout)])
        for i, to in reversed(list(enumerate(widths))):
            if i < deepest:
                self.up.append(_Block(rank, now, now, inner, dropout, up=True))
            for _ in range(blocks + 1):
                self.up.append(_Block(rank, now + kept.pop(), to, inner, dropout, head if i in attention else 0))
                now = to
        self.last, self.gain = _Conv(rank, now, channels, 3), nn.Parameter(torch.zeros(1))

    def normalise(self) -> None:
        """Put the rows of all weights back to a root mean square of 1, which hardly changes what they compute."""
        for module in self.modules():
            if isinstance(module, _Conv):
                module.normalise()

    def uncertainty(self, label: Tensor) -> Tensor:
        """log u (B,), in float32 at least, of label (B,) = log(sigma)/4: trained by loss / u + log u, u is the loss
        that is expected there. ValueError for a network without this head.
        """
        if self.fourier_uncertainty is None or self.last_uncertainty is None:
            raise ValueError("this EDM2 has no uncertainty; expected one that was built with uncertainty=128 or so")
        found: Tensor = self.last_uncertainty(self.fourier_uncertainty(label))
        return found.squeeze(1)

    def _run(self, block: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        """A block; with ``activation_checkpointing`` its activations are computed again in the backward pass."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            found: Tensor = checkpoint(block, h, embedding, use_reentrant=False)
            return found
        return block(h, embedding)  # type: ignore[no-any-return]

    def _embedded(self, x: Tensor, label: Tensor, condition: Tensor | None) -> Tensor:
        found: Tensor = self.embed(self.fourier(label if label.is_floating_point() else label.float()).to(x.dtype))
        if condition is not None:
            found = _sum(found, self.embedded(condition), 0.5)
        elif self.classes is not None:
            found = _sum(found, torch.zeros_like(found), 0.5)
        return _silu(found)

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.normalise()
        embedding = self._embedded(x, label, condition)
        h: Tensor = self.first(torch.cat([x, torch.ones_like(x.narrow(1, 0, 1))], 1))
        kept = [h]
        for block in self.down:
            kept.append(h := self._run(block, h, embedding))
        for block in self.middle:
            h = self._run(block, h, embedding)
        for block in self.up:
            h = self._run(block, h if block.up else _cat(h, kept.pop()), embedding)
        out: Tensor = self.last(h, self.gain)
        if self.training and self.last_uncertainty is not None:
            # processes wait for a gradient of every weight, also where the loss has no uncertainty in it
            out = out + 0 * self.last_uncertainty.weight.sum()
        return out
