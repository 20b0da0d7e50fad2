"""Autoencoders: x to a normal distribution of codes, and codes to the mean of x.

Kingma and Welling, Auto-Encoding Variational Bayes, 2014, arXiv:1312.6114; the convolutional one is of the kind of
Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022, arXiv:2112.10752.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from scorelab.nn.layers import CONV, Attention, Residual, Style, given, grown
from scorelab.typing import Shape, Tensor

__all__ = ["LOG_VARIANCES", "Autoencoder", "ConvAutoencoder", "Encoded", "MLPAutoencoder"]

LOG_VARIANCES = (-30.0, 20.0)
"""What log-variances of codes are clamped to, as in latent diffusion's release."""


class Encoded(NamedTuple):
    """Of x (B, *D): what a drawn code decodes to, (B, *D), with the logarithm of the deviation of x about it, (C, 1,
    ...) or (D,); mean and log-variance of the code, (B, *latent_shape). Of a network with a critic, what that says of
    patches, (B, *patches): of x, of what was decoded, for the critic to learn from, and again, for the decoder to."""

    decoded: Tensor
    log_std: Tensor
    mean: Tensor
    log_variance: Tensor
    real: Tensor | None = None
    false: Tensor | None = None
    judged: Tensor | None = None


class Autoencoder(nn.Module):
    """Base: net(x, noise) -> ``Encoded``, noise (B, *latent_shape). A network of one's own has ``encode``, ``decode``
    and ``latent_shape``; ``log_std``, a number for each channel, is learned."""

    encodes: ClassVar[bool] = True
    latent_shape: Shape
    critic: nn.Module | None

    def __init__(self, data_shape: Shape) -> None:
        super().__init__()
        self.critic = None
        self.log_std = nn.Parameter(torch.full((data_shape[0], *(1,) * (len(data_shape) - 1)), -1.0))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the codes of x (B, *D), each (B, *latent_shape)."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """The mean of x (B, *D) given codes (B, *latent_shape)."""
        raise NotImplementedError

    def forward(self, x: Tensor, noise: Tensor) -> Encoded:
        mean, log_variance = self.encode(x)
        log_variance = log_variance.clamp(*LOG_VARIANCES)
        decoded = self.decode(mean + torch.exp(0.5 * log_variance) * noise)
        found = Encoded(decoded, self.log_std, mean, log_variance)
        if self.critic is None or not self.training:
            return found
        # the decoder learns from the critic as it is
        held = {name: p.detach() for name, p in self.critic.named_parameters()}
        judged = torch.func.functional_call(self.critic, held, (decoded,))
        return found._replace(real=self.critic(x), false=self.critic(decoded.detach()), judged=judged)


def _layers(sizes: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with SiLU between them."""
    found: list[nn.Module] = []
    for into, to in itertools.pairwise(sizes):
        found += [nn.SiLU(), nn.Linear(into, to)]
    return nn.Sequential(*found[1:])


class MLPAutoencoder(Autoencoder):
    """Codes (latent,) of x (B, *D) of any shape, by ``depth`` hidden layers of ``width`` each way.

    Raises ValueError for sizes below 1.
    """

    def __init__(self, data_shape: tuple[int, ...], *, width: int = 256, depth: int = 2, latent: int = 16) -> None:
        super().__init__(data_shape)
        self.config = given(locals())
        if min(width, depth, latent) < 1:
            raise ValueError(f"width = {width}, depth = {depth}, latent = {latent}; expected 1 or more of each")
        dims, hidden = math.prod(data_shape), (width,) * depth
        self.latent_shape = (latent,)
        self.encoder, self.decoder = _layers((dims, *hidden, 2 * latent)), _layers((latent, *hidden, dims))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(x.flatten(1)).chunk(2, 1)
        return mean, log_variance

    def decode(self, z: Tensor) -> Tensor:
        x: Tensor = self.decoder(z)
        return x.reshape(len(z), *self.config["data_shape"])


def _critic(style: Style, channels: int, width: int) -> nn.Sequential:
    """Numbers of patches, above 0 for those of data: two convolutions that halve and two that don't, as in Isola et
    al., 2017, arXiv:1611.07004, with group norms, so that no image depends on its neighbours."""
    conv: Any = CONV[style.rank]
    return nn.Sequential(
        conv(channels, width, 3, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        conv(width, 2 * width, 3, stride=2, padding=1),
        style.norm(2 * width),
        nn.LeakyReLU(0.2),
        style.conv(2 * width, 2 * width),
        style.norm(2 * width),
        nn.LeakyReLU(0.2),
        style.conv(2 * width, 1),
    )


class ConvAutoencoder(Autoencoder):
    """Codes (latent, *sizes) of x (B, C, *sizes), one to three sizes, each halved, rounding up, once less than there
    are ``multipliers``.

    width: channels at full resolution; multipliers: one each; blocks: residual ones at each, each way.
    middle_attention: in the middle of either way, with heads of ``head`` channels (0: one head). critic: channels of
    the first layer of what tells patches of images from those of decoded ones, for training; 0: none. Raises ValueError
    for settings that don't fit.
    """

    def __init__(
        self,
        data_shape: tuple[int, ...],
        *,
        width: int = 32,
        multipliers: tuple[int, ...] = (1, 2, 2),
        blocks: int = 1,
        latent: int = 4,
        middle_attention: bool = False,
        head: int = 64,
        dropout: float = 0.0,
        critic: int = 0,
    ) -> None:
        super().__init__(data_shape)
        self.config = given(locals())
        if len(data_shape) - 1 not in CONV or min(data_shape) < 1:
            raise ValueError(
                f"data_shape is {data_shape}; expected (C, L), (C, H, W) or (C, D, H, W): points need mlp_autoencoder"
            )
        sizes = (width, blocks, latent, *multipliers, len(multipliers))
        if min(sizes) < 1 or min(head, critic) < 0 or not 0 <= dropout < 1:
            raise ValueError(
                f"width = {width}, blocks = {blocks}, latent = {latent}, multipliers = {multipliers}, head = {head}, "
                f"critic = {critic}, dropout = {dropout:g}; expected 1 or more, some multipliers, head and critic of 0 "
                "or more and 0 <= dropout < 1"
            )
        rank, channels = len(data_shape) - 1, data_shape[0]
        style, widths = Style(rank, 0, dropout), [width * m for m in multipliers]
        if middle_attention and head and widths[-1] % head and widths[-1] > head:
            raise ValueError(f"head = {head} does not divide the {widths[-1]} channels in the middle")
        self.sizes = [tuple(data_shape[1:])]
        for _ in multipliers[1:]:
            self.sizes.append(tuple((n + 1) // 2 for n in self.sizes[-1]))
        self.latent_shape = (latent, *self.sizes[-1])

        def stage(into: int, to: int) -> nn.Sequential:
            return nn.Sequential(*(Residual(style, into if k == 0 else to, to) for k in range(blocks)))

        def middle() -> nn.Sequential:
            attention = [Attention(style, widths[-1], head)] if middle_attention else []
            return nn.Sequential(Residual(style, widths[-1], widths[-1]), *attention)

        def ends(into: int, to: int) -> nn.Sequential:
            return nn.Sequential(style.norm(into), nn.SiLU(), style.conv(into, to))

        conv: Any = CONV[rank]
        self.first, self.down, self.shrink = style.conv(channels, widths[0]), nn.ModuleList(), nn.ModuleList()
        for i, to in enumerate(widths):
            self.down.append(stage(widths[max(0, i - 1)], to))
            if i + 1 < len(widths):
                self.shrink.append(conv(to, to, 3, stride=2, padding=1))
        self.coded, self.moments = middle(), ends(widths[-1], 2 * latent)
        self.begun, self.up, self.grow = style.conv(latent, widths[-1]), nn.ModuleList(), nn.ModuleList()
        self.opened, now = middle(), widths[-1]
        for i, to in reversed(list(enumerate(widths))):
            self.up.append(stage(now, to))
            now = to
            if i:
                self.grow.append(style.conv(to, to))
        self.last = ends(now, channels)
        if critic:
            self.critic = _critic(style, channels, critic)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x)
        for i, stage in enumerate(self.down):
            h = stage(h)
            if i < len(self.shrink):
                h = self.shrink[i](h)
        mean, log_variance = self.moments(self.coded(h)).chunk(2, 1)
        return mean, log_variance

    def decode(self, z: Tensor) -> Tensor:
        h = self.opened(self.begun(z))
        for i, stage in enumerate(self.up):
            h = stage(h)
            if i < len(self.grow):
                h = grown(h, self.sizes[-2 - i], self.grow[i])
        x: Tensor = self.last(h)
        return x
