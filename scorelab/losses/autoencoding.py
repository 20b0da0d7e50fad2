"""The evidence lower bound of autoencoders."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.nn import functional

from scorelab.losses.base import Objective
from scorelab.losses.variational import Bins, log_density
from scorelab.typing import Batch, Tensor

__all__ = ["Elbo"]

_LIKELIHOODS = ("normal", "laplace")


class Elbo(Objective):
    """-log p(x | z) + kl_weight KL(q(z | x) || N(0, 1)), in bits a dimension of x; called with an ``AutoencoderModel``.

    p(x | z) is normal or a Laplace distribution about what z decodes to, of a deviation that is learned for each
    channel (Rybkin et al., 2021, arXiv:2006.13202); bins: where the values of data lie, of which it has the mass, None
    for a density. With kl_weight=1 it is a bound of the data's own code length; below, codes keep more.
    Kingma and Welling, 2014, arXiv:1312.6114; Higgins et al., beta-VAE, 2017.

    Two terms may be added, as in latent diffusion (arXiv:2112.10752). perceptual times the mean square difference of
    what ``seen``, of the name ``features``, sees of x and of what was decoded, over the mean square of what it sees of
    x. adversarial times what the network's critic has against the decoded (the mean over patches of minus its number),
    after ``adversarial_from`` steps; the critic itself learns the hinge loss from the first one on.
    """

    kind: ClassVar[str] = "autoencoder"

    def __init__(
        self,
        bins: Bins | None = None,
        kl_weight: float = 1.0,
        likelihood: str = "normal",
        perceptual: float = 0.0,
        features: str = "",
        adversarial: float = 0.0,
        adversarial_from: int = 0,
        seen: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if likelihood not in _LIKELIHOODS:
            raise ValueError(f"training.objective.likelihood is {likelihood!r}; expected one of {_LIKELIHOODS}")
        weights = {"kl_weight": kl_weight, "perceptual": perceptual, "adversarial": adversarial}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"training.objective.{name} is {weight:g}; expected a weight of 0 or more")
        if (perceptual > 0) != (seen is not None):
            raise ValueError(
                f"training.objective.perceptual is {perceptual:g} and features is {features!r}; expected both or "
                "neither: features=package.module:Class, a torch.nn.Module"
            )
        if adversarial_from < 0:
            raise ValueError(f"training.objective.adversarial_from is {adversarial_from}; expected steps, 0 or more")
        self.bins, self.kl_weight, self.likelihood = bins, kl_weight, likelihood
        self.perceptual, self.features, self.seen = perceptual, features, seen
        self.adversarial, self.adversarial_from = adversarial, adversarial_from
        self.observes, self._steps = adversarial_from > 0, 0

    def losses(self, score: Callable[..., Any], batch: Batch, u: Tensor, noise: Tensor) -> Tensor:
        found = score(batch.x0, latent_noise(noise, score))
        given, rate = self._terms(batch.x0, found)
        loss: Tensor = given + self.kl_weight * rate
        if self.seen is not None:
            loss = loss + self.perceptual * self._unlike(batch.x0, found.decoded)
        if found.real is not None:
            begun = float(self._steps >= self.adversarial_from)
            hinge = functional.relu(1 - found.real) + functional.relu(1 + found.false)
            loss = loss + (hinge - begun * self.adversarial * found.judged).flatten(1).mean(1)
        return loss

    def _unlike(self, x0: Tensor, decoded: Tensor) -> Tensor:
        """How differently they are seen, (B,)."""
        assert self.seen is not None
        wanted, found = self.seen(x0), self.seen(decoded)
        if decoded.requires_grad and not found.requires_grad:
            raise ValueError(
                f"training.objective.features={self.features!r} has no gradient in the images; expected one that has"
            )
        return (found - wanted).square().flatten(1).mean(1) / (wanted.square().flatten(1).mean(1) + 1e-6)

    def observe(self, u: Tensor, losses: Tensor) -> None:
        self._steps += 1

    def state(self) -> dict[str, Tensor]:
        return {"steps": torch.tensor(self._steps)} if self.observes else {}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._steps = int(state["steps"])

    def terms(self, model: Callable[..., Any], x0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Bits a dimension of x0 (B, *D), each (B,): of x0 given a code, and of the code. noise (B, *D): of its first
        numbers the code is drawn."""
        return self._terms(x0, model(x0, latent_noise(noise, model)))

    def _terms(self, x0: Tensor, found: Any) -> tuple[Tensor, Tensor]:
        unit = self.unit(x0[0])
        variance = torch.exp(found.log_variance)
        rate = 0.5 * (found.mean.square() + variance - 1 - found.log_variance).flatten(1).sum(1)
        return -self.log_likelihood(x0, found).flatten(1).sum(1) * unit, rate * unit

    @staticmethod
    def unit(x0: Tensor) -> float:
        """A nat of one sample (*D), in bits a dimension."""
        return 1 / (math.log(2) * math.prod(x0.shape))

    def weighed(self, model: Any, x0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of one sample x0 (*D) by K codes that noise (K, *latent_shape) draws from its posterior: ``terms``, and the
        logarithm of p(x0 | z) p(z) / q(z | x0), whose exponential is p(x0) on average, each (K,)."""
        many = x0.expand(len(noise), *x0.shape)
        found = model(many, noise)
        given, rate = self._terms(many, found)
        z = found.mean + torch.exp(0.5 * found.log_variance) * noise
        # the constants of both densities are the same
        ratio = -0.5 * z.square() + 0.5 * (noise.square() + found.log_variance)
        weights: Tensor = ratio.flatten(1).sum(1) - given / self.unit(x0)
        return given, rate, weights

    def log_likelihood(self, x0: Tensor, found: Any) -> Tensor:
        """log p(x0 | z) in nats for every number, found as the model returns it."""
        std = torch.exp(found.log_std).expand_as(found.decoded)
        if self.likelihood == "laplace":
            scale = std * 0.5**0.5
            if self.bins is not None:
                return laplace_log_mass(self.bins, x0, found.decoded, scale)
            laplace: Tensor = -(x0 - found.decoded).abs() / scale - torch.log(2 * scale)
            return laplace
        if self.bins is not None:
            return self.bins.log_mass(x0, found.decoded, std)
        return log_density(x0 - found.decoded, std)

    def zero(self, batch: Batch, u: Tensor, noise: Tensor) -> Tensor:
        """None: there is no such autoencoder."""
        return torch.full_like(u, math.nan)


def laplace_log_mass(bins: Bins, x0: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """log of what a Laplace distribution about ``mean`` has in x0's bins, of which the first and the last are open."""
    half = 0.5 * bins.spacing
    below, above = x0 <= bins.low + 0.5 * half, x0 >= bins.high - 0.5 * half
    upper = torch.where(above, math.inf, (x0 - mean + half) / scale)
    lower = torch.where(below, -math.inf, (x0 - mean - half) / scale)
    # mirrored to the left of the peak, or with the peak inside
    mirrored = lower > 0
    upper, lower = torch.where(mirrored, -lower, upper), torch.where(mirrored, -upper, lower)
    inside = upper > 0
    b, a = torch.where(inside, -1.0, upper), torch.where(inside, -2.0, lower)
    left = math.log(0.5) + b + torch.log1p(-torch.exp(a - b))
    b, a = torch.where(inside, upper, 1.0), torch.where(inside, lower, -1.0)
    # 1 - exp(-b)/2 - exp(a)/2, of small b and a
    both = torch.log(-0.5 * (torch.expm1(-b) + torch.expm1(a)))
    mass: Tensor = torch.where(inside, both, left)
    return mass


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
