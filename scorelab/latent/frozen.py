"""Codecs that are trained models, which nothing changes any more, and whose weights are known by a fingerprint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from scorelab.codecs import Codec
from scorelab.saved import Model, module_checksum
from scorelab.typing import Shape, Tensor

__all__ = ["Frozen", "in_parts", "of_data"]

_AT_ONCE = 250


class Frozen(Codec):
    """Base: codes of a model, less their mean and over their deviation in every channel, so that scores see unit
    variance (Karras et al., 2024, arXiv:2312.02696; latent diffusion has one factor for all channels).

    fingerprint: the SHA-256 of the model's weights, "" before there are any. Raises ValueError for other weights.
    """

    log_scale = None
    mean: Tensor
    std: Tensor

    def __init__(self, model: Model, shape: Shape, fingerprint: str, settings: dict[str, Any]) -> None:
        super().__init__()
        self.model: Any = model.requires_grad_(False).eval()
        self.config, self.fingerprint = {**settings, "fingerprint": fingerprint}, fingerprint
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def owning(self, weights: dict[str, Tensor]) -> Any:
        """The codec itself, with a model's weights."""
        self.model.load_weights(weights)
        self.fingerprint = self.config["fingerprint"] = module_checksum(self.model)
        return self

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As ever; ValueError where the model's weights are not those that it was made of."""
        found = super().load_state_dict(state_dict, strict, assign)
        if (own := module_checksum(self.model)) != self.fingerprint:
            raise ValueError(
                f"the {self.model.kind} that made the codes has weights of SHA-256 {own[:16]}..., and the model was "
                f"trained on codes of {self.fingerprint[:16]}...; expected the file that was written with it"
            )
        return found

    def fit(self, x0: Tensor) -> None:
        """Measure the codes of data (N, *D)."""
        mean, std = self._raw(x0)
        axes = [0, *range(2, mean.ndim)]
        own = mean.double()
        variance = own.var(axes, correction=0, keepdim=True)
        if std is not None:
            # of drawn codes: of their means, and about them
            variance = variance + std.double().square().mean(axes, keepdim=True)
        self.mean.copy_(own.mean(axes, keepdim=True))
        self.std.copy_(variance.sqrt().clamp_min(1e-12))

    def _raw(self, x0: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation of the model's own codes; no deviation of codes that are not drawn."""
        raise NotImplementedError

    def encode(self, x0: Tensor) -> Tensor:
        return self.moments(x0)[0]

    def moments(self, x0: Tensor) -> tuple[Tensor, Tensor | None]:
        mean, std = self._raw(x0.to(self.mean.device))
        return ((mean - self.mean) / self.std).to(x0.device), None if std is None else (std / self.std).to(x0.device)

    def _own(self, z: Tensor) -> Tensor:
        """The model's codes, of those of this codec."""
        return z * self.std.to(z) + self.mean.to(z)


def in_parts(fn: Callable[..., Any], *tensors: Tensor) -> Any:
    """fn of some rows at a time, with its results joined: a tensor, or a tuple of them."""
    found = [fn(*some) for some in zip(*(torch.split(t, _AT_ONCE) for t in tensors), strict=True)]
    if isinstance(found[0], tuple):
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))
    return torch.cat(found)


def of_data(path: str, data_shape: Shape, kind: type[Model], called: str) -> Any:
    """The model in ``path``, a run's directory or that of a saved model; ValueError for one of other data, or of
    another kind than what is ``called`` so."""
    try:
        model = kind.load(path)
    except ValueError as error:
        raise ValueError(f"model.codec.path: {error}; expected the directory of a trained {called}") from error
    if model.outside_shape != tuple(data_shape):
        raise ValueError(f"model.codec.path is of data {model.outside_shape}, and the data has {tuple(data_shape)}")
    return model
