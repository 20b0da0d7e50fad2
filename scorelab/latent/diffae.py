"""Diffusion autoencoders: a code of what an image shows, and the latent of the rest, by which it comes back.

    z = encoder(x0),   x_T = the DDIM latent of x0 by score(x, sigma, z),   x0 = decode(z, x_T)

Preechakul et al., Diffusion Autoencoders: Toward a Meaningful and Decodable Representation, 2022, arXiv:2111.15640.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import functional

from scorelab.adapters import clipped
from scorelab.codecs import Codec
from scorelab.inverse.editing import encode
from scorelab.latent.frozen import Frozen, in_parts, of_data
from scorelab.models import ScoreModel
from scorelab.noise import counted
from scorelab.processes import DiscreteVP
from scorelab.samplers import DDIM, sample
from scorelab.saved import unwrapped
from scorelab.sigmas import from_betas
from scorelab.typing import ScoreFn, Shape, Tensor
from scorelab.writing import save_tensors, whole

__all__ = ["Directions", "Semantic", "codes", "ddim_levels", "decoded", "latents", "semantic"]


def check_semantic(model: ScoreModel) -> None:
    """Refuse (ValueError) a model that is told no codes of what images show."""
    if not model.semantic:
        raise ValueError(
            f"the network is a {type(unwrapped(model.net)).__name__}, which makes no codes; expected a diffusion "
            "autoencoder's, model.net.name='diffae'"
        )


def ddim_levels(model: ScoreModel, steps: int) -> Tensor:
    """Levels of ``steps`` steps, and a final 0: evenly spaced ones of a process of steps, else uniform in time."""
    process = model.process
    if isinstance(process, DiscreteVP):
        return from_betas(process.betas, steps)
    return torch.cat([process.sigmas(steps), torch.zeros(1, dtype=torch.float64)])


def codes(model: ScoreModel, x0: Tensor) -> Tensor:
    """Codes (B, code) of what images x0 (B, C, *sizes) show."""
    check_semantic(model)
    net: Any = unwrapped(model.net)
    with torch.no_grad():
        found: Tensor = in_parts(net.encode, x0)
    return found


def latents(model: ScoreModel, x0: Tensor, z: Tensor, *, steps: int = 100, exact: bool = True) -> Tensor:
    """The DDIM latents (B, C, *sizes) of which ``decoded`` makes images x0 with their codes z (B, code); exact: to
    rounding, else as published, by the steps run upwards."""
    check_semantic(model)
    return encode(model.conditioned(z), x0, ddim_levels(model, steps), DDIM(), exact=exact, tol=1e-4)


def decoded(model: ScoreModel, z: Tensor, latent: Tensor, *, steps: int = 100, clip: bool = False) -> Tensor:
    """Images (B, C, *sizes) of codes z (B, code) and latents (B, C, *sizes), unscaled at the largest level. clip: the
    denoised images to [-1, 1], which helps where the latents are fresh noise; those of ``latents`` were made without.
    """
    check_semantic(model)
    score: ScoreFn = model.conditioned(z)
    return sample(clipped(score, -1.0, 1.0) if clip else score, latent, ddim_levels(model, steps), DDIM())


@dataclass(frozen=True)
class Directions:
    """A linear classifier of codes: logits = weight (code - mean)/std + bias, weight (K, code), bias (K,); ``means``
    (K, code), of the standardised codes of each class; ``classes``, their names; ``accuracy``, on codes that it did not
    learn from."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    means: Tensor
    classes: tuple[str, ...]
    accuracy: float

    @classmethod
    def fit(cls, z: Tensor, labels: Tensor, classes: Sequence[str], *, penalty: float = 1e-3) -> Self:
        """By logistic regression with a ``penalty`` on the square of the weights, on codes z (N, code) with labels
        (N,); a fifth of them is kept for the accuracy. Raises ValueError for fewer than five."""
        if len(z) < 5 or labels.shape != (len(z),):
            raise ValueError(f"there are {len(z)} codes and labels {tuple(labels.shape)}; expected five or more")
        z, labels, count = z.double().cpu(), labels.long().cpu(), len(classes)
        mean, std = z.mean(0), z.std(0).clamp_min(1e-12)
        inside, held = (z - mean) / std, torch.arange(len(z)) % 5 == 0
        x, y = inside[~held], labels[~held]
        weight = torch.zeros(count, z.shape[1], dtype=z.dtype, requires_grad=True)
        bias = torch.zeros(count, dtype=z.dtype, requires_grad=True)
        solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            solver.zero_grad()
            found = functional.cross_entropy(x @ weight.T + bias, y) + penalty * weight.square().sum()
            torch.autograd.backward(found)
            return found

        solver.step(loss)  # type: ignore[no-untyped-call]
        weight, bias = weight.detach(), bias.detach()
        right = (inside[held] @ weight.T + bias).argmax(1) == labels[held]
        means = torch.stack([inside[labels == k].mean(0).nan_to_num(0.0) for k in range(count)])
        return cls(weight, bias, mean, std, means, tuple(classes), float(right.double().mean()))

    def probabilities(self, z: Tensor) -> Tensor:
        """(B, K), of codes (B, code)."""
        inside = (z.double().cpu() - self.mean) / self.std
        return torch.softmax(inside @ self.weight.T + self.bias, 1)

    def towards(self, z: Tensor, k: int, strength: float = 1.0) -> Tensor:
        """Codes (B, code) moved along the direction in which class ``k`` gains on all others: at ``strength`` 1 as far
        as the mean of that class lies that way, not at all where they are beyond it."""
        inside = (z.double().cpu() - self.mean) / self.std
        way = self.weight[k] - self.weight.mean(0)
        way = way / way.norm()
        far = ((self.means[k] - inside) @ way).clamp_min(0.0)
        moved: Tensor = ((inside + strength * far.unsqueeze(1) * way) * self.std + self.mean).to(z)
        return moved

    def save(self, path: Path) -> None:
        """As safetensors."""
        names = {f"class:{name}": torch.tensor(k) for k, name in enumerate(self.classes)}
        tensors = {k: getattr(self, k) for k in _TENSORS} | {"accuracy": torch.tensor(self.accuracy).double()} | names
        with whole(path) as aside:
            save_tensors(tensors, aside)

    @classmethod
    def load(cls, path: Path) -> Self:
        """What ``save`` wrote; ValueError for a damaged file."""
        try:
            state = load_file(path)
            names = {int(v): k.removeprefix("class:") for k, v in state.items() if k.startswith("class:")}
            classes = tuple(names[k] for k in range(len(names)))
            return cls(**{k: state[k] for k in _TENSORS}, classes=classes, accuracy=float(state["accuracy"]))
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); remove it, and it is made again") from error


_TENSORS = ("weight", "bias", "mean", "std", "means")


class Semantic(Frozen):
    """Codes of what images show, for a score of them: what is drawn becomes images again by ``steps`` DDIM steps, from
    noise that follows from the code alone. model: ``to_dict`` of the diffusion autoencoder; fingerprint: see
    ``Frozen``."""

    def __init__(self, model: dict[str, Any], steps: int = 20, fingerprint: str = "") -> None:
        made = ScoreModel.from_dict(model)
        check_semantic(made)
        net: Any = made.net
        super().__init__(made, (1, net.style.code), fingerprint, {"model": model, "steps": steps})
        self.steps = steps

    def _raw(self, x0: Tensor) -> tuple[Tensor, Tensor | None]:
        return codes(self.model, x0), None

    def decode(self, z: Tensor) -> Tensor:
        shape, high = self.model.data_shape, self.model.sigma_range[1]
        noise = torch.cat([counted("normal", shape, range(1), *_counters(row)) for row in z])
        with torch.no_grad():
            clip = self.model.data_range is not None
            made: Tensor = in_parts(
                lambda own, latent: decoded(self.model, own, latent, steps=self.steps, clip=clip),
                self._own(z),
                high * noise.to(z),
            )
        return made


def _counters(z: Tensor) -> tuple[int, int]:
    """Of one code, the same where it differs by rounding."""
    rounded = (z.detach().cpu().double() * 100).round().to(torch.int64)
    digest = hashlib.sha256(rounded.numpy().tobytes()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def semantic(path: str, data_shape: Shape, steps: int = 20) -> Codec:
    """Codes of the diffusion autoencoder in ``path``, a run's directory or that of a saved model; ValueError for
    another model, or of other data."""
    model = of_data(path, data_shape, ScoreModel, "diffusion autoencoder")
    check_semantic(model)
    if steps < 1:
        raise ValueError(f"model.codec.steps is {steps}; expected 1 or more")
    made: Semantic = Semantic(model.to_dict(), steps).owning(model.weights())
    return made
