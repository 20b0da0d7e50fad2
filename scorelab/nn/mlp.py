"""A residual MLP for points, with Fourier features of x and of log sigma.

p(x; sigma) is p_data blurred: its Fourier component at frequency w is damped by exp(-w^2 sigma^2 / 2). The features
cos(w x), sin(w x) are damped alike, so fine features help at small noise and vanish where they could only be noise
(integrated positional encoding: Barron et al., Mip-NeRF, 2021, arXiv:2103.13415).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from scorelab.checks import widened
from scorelab.nn.classes import Classes, Conditional
from scorelab.nn.embedding import FourierEmbedding
from scorelab.typing import Tensor

__all__ = ["MLP"]


class MLP(Conditional):
    """net(x, label, condition=None) -> (B, D) for x (B, D) in units where the data has standard deviation about 1.

    ``label`` (B,) must be log sigma in the same units: build the ScoreModel with ``input_scale=Constant(1 / sd)`` and
    ``label=LogSigma(sd)``. width, depth: hidden layers; features: number of random frequencies, log-uniform from
    ``low`` to ``high``, drawn from ``seed`` and saved with the weights. num_classes: condition (B,) on class labels;
    null_class: and on none.
    """

    directions: Tensor
    wants: ClassVar[dict[str, tuple[str, ...]]] = {"label": ("relative_log_sigma",), "input_scale": ("unit_data",)}

    def __init__(
        self,
        data_shape: tuple[int, ...],
        *,
        width: int = 128,
        depth: int = 3,
        features: int = 32,
        low: float = 0.5,
        high: float = 15.0,
        embedding: int = 16,
        seed: int = 0,
        num_classes: int | None = None,
        null_class: bool = False,
    ) -> None:
        super().__init__()
        if len(data_shape) != 1 or data_shape[0] < 1:
            raise ValueError(
                f"data_shape is {tuple(data_shape)}; expected (D,): images need UNet (model.net.name='unet')"
            )
        if width < 1 or depth < 1 or features < 0 or embedding < 2 or not 0 < low <= high:
            raise ValueError(
                f"width = {width}, depth = {depth}, features = {features}, embedding = {embedding}, low = {low:g}, "
                f"high = {high:g}; expected positive sizes and 0 < low <= high"
            )
        self.config = {
            "data_shape": tuple(data_shape),
            "width": width,
            "depth": depth,
            "features": features,
            "low": low,
            "high": high,
            "embedding": embedding,
            "seed": seed,
            "num_classes": num_classes,
            "null_class": null_class,
        }
        dims = data_shape[0]
        generator = torch.Generator().manual_seed(seed)
        size = torch.exp(math.log(low) + torch.rand(features, generator=generator) * math.log(high / low))
        direction = functional.normalize(torch.randn(dims, features, generator=generator), dim=0)
        self.register_buffer("directions", direction * size)
        self.embed = FourierEmbedding(embedding)
        self.first = nn.Linear(dims + 2 * features + embedding, width)
        self.classes = None if num_classes is None else Classes(num_classes, width * (1 + depth), null_class)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.gate = nn.Linear(embedding, width)
        nn.init.zeros_(self.gate.weight)
        nn.init.ones_(self.gate.bias)
        self.last = nn.Linear(width, dims)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        # one level for all, expanded: whatever depends on it alone is computed once
        label = label.narrow(0, 0, 1) if label.stride(0) == 0 and label.shape[0] else label
        label = widened(label) if label.is_floating_point() else label.to(x.dtype)
        var = torch.exp(2 * label).unsqueeze(1)
        embedding = self.embed(label)
        phase = x @ self.directions
        # not below e^-20: denormal numbers would slow the matrix products many times
        damping = torch.exp((-0.5 * var * self.directions.square().sum(0)).clamp_min(-20.0))
        parts = [
            x * torch.rsqrt(1 + var),
            damping * phase.cos(),
            damping * phase.sin(),
            embedding.expand(x.shape[0], -1),
        ]
        h = torch.cat(parts, 1).to(x.dtype)
        count = 1 + len(self.layers)
        shifts = None if condition is None else self.embedded(condition).to(x.dtype).chunk(count, 1)
        h = functional.silu(self.first(h) if shifts is None else self.first(h) + shifts[0])
        for i, layer in enumerate(self.layers, 1):
            h = functional.silu(layer(h) if shifts is None else layer(h) + shifts[i]).add_(h)
        out: Tensor = self.last(h * self.gate(embedding.to(x.dtype)))
        return out
