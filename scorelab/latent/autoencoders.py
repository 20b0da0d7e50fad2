"""Models of codes: autoencoders, and the codecs that they are for other models."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from scorelab.checks import check_batch, widened
from scorelab.codecs import Codec
from scorelab.latent.frozen import Frozen, in_parts, of_data
from scorelab.nn.autoencoder import LOG_VARIANCES, Encoded
from scorelab.noise import PerSampleNoise
from scorelab.saved import Model, unwrapped
from scorelab.typing import Shape, Tensor

__all__ = ["Autoencoded", "AutoencoderModel", "autoencoded"]


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
        return mean.to(x.dtype), torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCES)).to(x.dtype)

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


class Autoencoded(Frozen):
    """Codes that an ``AutoencoderModel`` draws. autoencoder: its ``to_dict``; fingerprint: see ``Frozen``."""

    def __init__(self, autoencoder: dict[str, Any], fingerprint: str = "") -> None:
        model = AutoencoderModel.from_dict(autoencoder)
        shape = (1, model.latent_shape[0], *(1,) * (len(model.latent_shape) - 1))
        super().__init__(model, shape, fingerprint, {"autoencoder": autoencoder})

    @classmethod
    def of(cls, model: AutoencoderModel) -> Autoencoded:
        """The codec of a model, without what it needs in training alone."""
        described, weights = model.to_dict(), model.weights()
        if described["net"] is None:
            raise ValueError(f"{type(model.net).__name__} has no config attribute that says how it is made")
        if described["net"].get("critic"):
            described["net"]["critic"] = 0
            weights = {name: value for name, value in weights.items() if not name.startswith("critic.")}
        made: Autoencoded = cls(described).owning(weights)
        return made

    def _raw(self, x0: Tensor) -> tuple[Tensor, Tensor | None]:
        # an autoencoder may have a codec of its own
        mean, std = in_parts(lambda x: self.model.posterior(self.model.encode(x)), x0)
        return mean, std

    def decode(self, z: Tensor) -> Tensor:
        x: Tensor = in_parts(lambda own: self.model.decode(self.model.generate(own)), self._own(z))
        return x


def autoencoded(path: str, data_shape: Shape) -> Codec:
    """Codes of the autoencoder in ``path``, a run's directory or that of a saved model; ValueError for one of other
    data."""
    return Autoencoded.of(of_data(path, data_shape, AutoencoderModel, "autoencoder"))
