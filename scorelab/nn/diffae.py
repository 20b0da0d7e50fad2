"""The network of a diffusion autoencoder: an encoder of what an image shows, and a U-Net that is told of it.

Preechakul et al., Diffusion Autoencoders: Toward a Meaningful and Decodable Representation, 2022, arXiv:2111.15640.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from torch.nn import functional

from scorelab.nn.layers import Attention, Style, given, resampled
from scorelab.nn.unet import UNet
from scorelab.typing import Tensor

__all__ = ["DiffAE"]


class _Block(nn.Module):
    """norm, SiLU, at half the size where asked, conv, and what comes in."""

    def __init__(self, style: Style, channels: int, out: int, halved: bool = False) -> None:
        super().__init__()
        self.halved, self.norm, self.conv = halved, style.norm(channels), style.conv(channels, out)
        self.skip = style.conv(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = functional.silu(self.norm(x))
        if self.halved:
            h, x = resampled(h, False), resampled(x, False)
        found: Tensor = self.skip(x) + self.conv(h)
        return found


class Encoder(nn.Module):
    """x (B, C, *sizes) -> (B, code), of what is there, wherever it is: a mean over positions at the end."""

    def __init__(
        self,
        data_shape: tuple[int, ...],
        *,
        code: int,
        width: int,
        multipliers: tuple[int, ...],
        blocks: int,
        attention: tuple[int, ...],
        heads: int,
    ) -> None:
        super().__init__()
        style = Style(len(data_shape) - 1, 0, group=1)
        widths: list[int] = [width * m for m in multipliers]
        layers: list[nn.Module] = []
        now = widths[0]
        self.first = style.conv(data_shape[0], now)
        for i, to in enumerate(widths):
            for _ in range(blocks):
                layers.append(_Block(style, now, to))
                now = to
                if i in attention:
                    layers.append(Attention(style, now, 0, heads))
            if i + 1 < len(widths):
                layers.append(_Block(style, now, now, halved=True))
        layers += [_Block(style, now, now), Attention(style, now, 0, heads), _Block(style, now, now)]
        self.layers = nn.Sequential(*layers)
        self.norm, self.out = style.norm(now), nn.Linear(now, code)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.silu(self.norm(self.layers(self.first(x))))
        found: Tensor = self.out(h.flatten(2).mean(2))
        return found


class DiffAE(UNet):
    """net(x, label, condition) -> F like x (B, C, *sizes); condition (B, code), or the clean images (B, C, *sizes),
    whose codes it then takes.

    code: numbers of a code. encoder_multipliers, encoder_blocks: the encoder's resolutions, of as many channels as the
    U-Net's width times these. The other settings are ``UNet``'s, by default ADM's. Raises ValueError for settings that
    don't fit.
    """

    semantic: ClassVar[bool] = True

    def __init__(
        self,
        data_shape: tuple[int, ...],
        *,
        code: int = 512,
        encoder_multipliers: tuple[int, ...] = (1, 2, 2),
        encoder_blocks: int = 1,
        width: int = 64,
        multipliers: tuple[float, ...] = (1, 2),
        blocks: int = 2,
        attention: tuple[int, ...] = (1,),
        heads: int = 1,
        dropout: float = 0.0,
        embedded: int = 0,
    ) -> None:
        made_with: dict[str, Any] = given(locals())
        multiple = 2 ** (max(len(encoder_multipliers), 1) - 1)
        if code < 1 or encoder_blocks < 1 or not encoder_multipliers or any(n % multiple for n in data_shape[1:]):
            raise ValueError(
                f"code = {code}, encoder_blocks = {encoder_blocks}, encoder_multipliers = {encoder_multipliers} for "
                f"{data_shape}; expected 1 or more of each, and sizes that are multiples of {multiple}"
            )
        super().__init__(
            data_shape,
            code=code,
            embedded=embedded,
            width=width,
            multipliers=multipliers,
            blocks=blocks,
            attention=attention,
            heads=heads,
            head=0,
            dropout=dropout,
            embedding="positional_open",
            middle_attention=True,
            time="adaptive",
            resampling="block",
            group=1,
        )
        self.made_with = made_with
        deep = tuple(i for i in attention if i < len(encoder_multipliers))
        self.encoder = Encoder(
            data_shape,
            code=code,
            width=width,
            multipliers=encoder_multipliers,
            blocks=encoder_blocks,
            attention=deep,
            heads=heads,
        )

    def encode(self, x: Tensor) -> Tensor:
        """Codes (B, code) of images (B, C, *sizes)."""
        found: Tensor = self.encoder(x)
        return found

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None and condition.shape[1:] == x.shape[1:]:
            condition = self.encoder(condition)
        return super().forward(x, label, condition)
