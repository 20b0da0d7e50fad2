"""The evidence lower bound of autoencoders."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from scorelab.losses.base import Objective
from scorelab.losses.variational import Bins, log_density
from scorelab.typing import Batch, Tensor

__all__ = ["Elbo"]

_LIKELIHOODS = ("normal", "laplace")


class Elbo(Objective):
    """-log p(x | z) + kl_weight KL(q(z | x) || N(0, 1)), in bits a dimension of x; called with an ``AutoencoderModel``.

    p(x | z) is normal or a Laplace distribution about what z decodes to, of a deviation that is learned for each
    channel (Rybkin et al., 2021, arXiv:2006.13202); bins: where the values of data lie, of which a normal one has its
    mass, None for a density. With kl_weight=1 it is a bound of the data's own code length; below, codes keep more.
    Kingma and Welling, 2014, arXiv:1312.6114; Higgins et al., beta-VAE, 2017.
    """

    kind: ClassVar[str] = "autoencoder"

    def __init__(self, bins: Bins | None = None, kl_weight: float = 1.0, likelihood: str = "normal") -> None:
        if likelihood not in _LIKELIHOODS:
            raise ValueError(f"training.objective.likelihood is {likelihood!r}; expected one of {_LIKELIHOODS}")
        if not 0 <= kl_weight < math.inf:
            raise ValueError(f"training.objective.kl_weight is {kl_weight:g}; expected 0 or more, 1 for the bound")
        self.bins, self.kl_weight, self.likelihood = bins, kl_weight, likelihood

    def losses(self, score: Callable[..., Any], batch: Batch, u: Tensor, noise: Tensor) -> Tensor:
        reconstruction, rate = self.terms(score, batch.x0, noise)
        loss: Tensor = reconstruction + self.kl_weight * rate
        return loss

    def terms(self, model: Callable[..., Any], x0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Bits a dimension of x0 (B, *D), each (B,): of x0 given a code, and of the code. noise (B, *D): of its first
        numbers the code is drawn."""
        found = model(x0, latent_noise(noise, model))
        unit = 1 / (math.log(2) * math.prod(x0.shape[1:]))
        variance = torch.exp(found.log_variance)
        rate = 0.5 * (found.mean.square() + variance - 1 - found.log_variance).flatten(1).sum(1)
        return -self.log_likelihood(x0, found).flatten(1).sum(1) * unit, rate * unit

    def log_likelihood(self, x0: Tensor, found: Any) -> Tensor:
        """log p(x0 | z) in nats for every number, found as the model returns it."""
        std = torch.exp(found.log_std).expand_as(found.decoded)
        if self.likelihood == "laplace":
            scale = std * 0.5**0.5
            laplace: Tensor = -(x0 - found.decoded).abs() / scale - torch.log(2 * scale)
            return laplace
        if self.bins is not None:
            return self.bins.log_mass(x0, found.decoded, std)
        return log_density(x0 - found.decoded, std)

    def zero(self, batch: Batch, u: Tensor, noise: Tensor) -> Tensor:
        """None: there is no such autoencoder."""
        return torch.full_like(u, math.nan)


def latent_noise(noise: Tensor, model: Any) -> Tensor:
    """Noise of codes, the first numbers of that of samples (B, *D)."""
    shape = getattr(model, "module", model).latent_shape
    count = math.prod(shape)
    flat = noise.flatten(1)
    if count > flat.shape[1]:
        raise ValueError(
            f"codes have {count} numbers, {tuple(shape)}, and samples {flat.shape[1]}; expected no more: fewer latent "
            "channels (model.net.latent)"
        )
    return flat[:, :count].reshape(len(noise), *shape)
