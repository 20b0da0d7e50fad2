"""Models of codes: autoencoders, and the codecs that they are for other models."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from scorelab.checks import check_batch, widened
from scorelab.codecs import Codec
from scorelab.nn.autoencoder import Encoded
from scorelab.noise import PerSampleNoise
from scorelab.saved import Model, module_checksum, unwrapped
from scorelab.typing import Shape, Tensor

__all__ = ["Autoencoded", "AutoencoderModel", "autoencoded"]

_AT_ONCE = 250


class AutoencoderModel(Model):
    """x (B, *data_shape) to normal distributions of codes (B, *latent_shape), and codes to x.

    net: has ``encode``, ``decode``, ``latent_shape``, and ``encodes = True`` (see scorelab.nn.autoencoder). The prior
    of codes is N(0, 1).
    """

    kind: ClassVar[str] = "autoencoder"

    @property
    def latent_shape(self) -> Shape:
        """Of a code."""
        return tuple(unwrapped(self.net).latent_shape)  # type: ignore[arg-type]

    def forward(self, x: Tensor, noise: Tensor) -> Encoded:
        """What a code drawn with noise (B, *latent_shape) decodes to; ValueError for shapes that don't fit."""
        check_batch(x, shape=self.data_shape)
        found = self._computed(x, noise)
        return Encoded(**{k: v.to(widened(x)) for k, v in found._asdict().items() if v is not None})

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the codes of x (B, *data_shape), each (B, *latent_shape)."""
        check_batch(x, shape=self.data_shape)
        mean, log_variance = self._computed(x, by="encode")
        return mean.to(x.dtype), torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)).to(x.dtype)

    def reconstruct(self, x: Tensor) -> Tensor:
        """What the mean of the codes of x decodes to, like x."""
        return self.generate(self.posterior(x)[0])

    def generate(self, z: Tensor) -> Tensor:
        """The mean of x (B, *data_shape) given codes (B, *latent_shape), in [-1, 1] for data that is scaled to it: what
        training has outside stands for the least and the most value."""
        check_batch(z, "z", shape=self.latent_shape)
        x: Tensor = self._computed(z, by="decode").to(z.dtype)
        return x if self.data_range is None else x.clamp(-1.0, 1.0)

    def sample(self, n: int, generator: torch.Generator | PerSampleNoise) -> Tensor:
        """n samples (n, *data_shape), the means that codes from the prior have, decoded as far as a codec is before."""
        shape = (n, *self.latent_shape)
        if isinstance(generator, PerSampleNoise):
            z = generator.fresh()(torch.empty(shape))
        else:
            z = torch.randn(shape, generator=generator, device=generator.device)
        with torch.no_grad():
            return self.decode(in_parts(self.generate, z.to(self.device, self.dtype)))

    def rehearse(self, x: Tensor) -> None:
        self(x, torch.zeros(len(x), *self.latent_shape, device=x.device))

    def extra_repr(self) -> str:
        return f"data {self.data_shape}, codes {self.latent_shape}"


def in_parts(fn: Any, *tensors: Tensor) -> Any:
    """fn of some rows at a time, with its results joined: a tensor, or a tuple of them."""
    found = [fn(*some) for some in zip(*(torch.split(t, _AT_ONCE) for t in tensors), strict=True)]
    if isinstance(found[0], tuple):
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))
    return torch.cat(found)


class Autoencoded(Codec):
    """Codes that an ``AutoencoderModel`` draws, less their mean and over their deviation in every channel, so that
    scores see unit variance (Karras et al., 2024, arXiv:2312.02696; latent diffusion has one factor for all channels).

    autoencoder: ``to_dict`` of the model, whose weights are this codec's. fingerprint: their SHA-256, "" before there
    are any. Raises ValueError for weights that are not those of the fingerprint.
    """

    log_scale = None
    mean: Tensor
    std: Tensor

    def __init__(self, autoencoder: dict[str, Any], fingerprint: str = "") -> None:
        super().__init__()
        self.model = AutoencoderModel.from_dict(autoencoder).requires_grad_(False).eval()
        self.config, self.fingerprint = {"autoencoder": autoencoder, "fingerprint": fingerprint}, fingerprint
        shape = (1, self.model.latent_shape[0], *(1,) * (len(self.model.latent_shape) - 1))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    @classmethod
    def of(cls, model: AutoencoderModel) -> Autoencoded:
        """The codec of a model, without what it needs in training alone."""
        described, weights = model.to_dict(), model.weights()
        if described["net"] is None:
            raise ValueError(f"{type(model.net).__name__} has no config attribute that says how it is made")
        if described["net"].get("critic"):
            described["net"]["critic"] = 0
            weights = {name: value for name, value in weights.items() if not name.startswith("critic.")}
        made = cls(described)
        made.model.load_weights(weights)
        made.fingerprint = made.config["fingerprint"] = module_checksum(made.model)
        return made

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As ever; ValueError where the autoencoder's weights are not those that it was made of."""
        found = super().load_state_dict(state_dict, strict, assign)
        if (own := module_checksum(self.model)) != self.fingerprint:
            raise ValueError(
                f"the autoencoder's weights have SHA-256 {own[:16]}..., and the model was trained on codes of "
                f"{self.fingerprint[:16]}...; expected the file that was written with it"
            )
        return found

    def fit(self, x0: Tensor) -> None:
        """Measure the codes of data (N, *D)."""
        mean, std = in_parts(self.model.posterior, x0)
        axes = [0, *range(2, mean.ndim)]
        own = mean.double()
        # of drawn codes: of their means, and about them
        variance = own.var(axes, correction=0, keepdim=True) + std.double().square().mean(axes, keepdim=True)
        self.mean.copy_(own.mean(axes, keepdim=True))
        self.std.copy_(variance.sqrt())

    def encode(self, x0: Tensor) -> Tensor:
        return self.moments(x0)[0]

    def moments(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = in_parts(self.model.posterior, x0.to(self.mean.device))
        return ((mean - self.mean) / self.std).to(x0.device), (std / self.std).to(x0.device)

    def decode(self, z: Tensor) -> Tensor:
        x: Tensor = in_parts(self.model.generate, z * self.std.to(z) + self.mean.to(z))
        return x


def autoencoded(path: str, data_shape: Shape) -> Codec:
    """Codes of the autoencoder in ``path``, a run's directory or that of a saved model; ValueError for one of other
    data."""
    try:
        model = AutoencoderModel.load(path)
    except ValueError as error:
        raise ValueError(f"model.codec.path: {error}; expected the directory of a trained autoencoder") from error
    if model.data_shape != tuple(data_shape):
        raise ValueError(f"model.codec.path is of data {model.data_shape}, and the data has {tuple(data_shape)}")
    return Autoencoded.of(model)
