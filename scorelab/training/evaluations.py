"""What is measured of the averaged weights while a run trains: each every so many steps, and at the end."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict

from scorelab import parallel
from scorelab.data import Coded
from scorelab.latent import AutoencoderModel
from scorelab.models import ScoreModel
from scorelab.noise import counted
from scorelab.saved import Model
from scorelab.training.batches import Draw
from scorelab.training.engine import BINS, Trainer
from scorelab.training.measures import Distance, Evaluation, Found
from scorelab.training.sampling import in_turn
from scorelab.training.settings import EVALUATION, named_part
from scorelab.typing import Tensor

__all__ = ["Evaluation", "FixedNoiseLoss", "Found", "Samples", "evaluations"]

_FIXED = 512
"""Samples that the loss at fixed noise takes, at most."""


_SETTLED = 500
"""Steps after which samples should have the data's mean and spread, about."""


class FixedNoiseLoss(Evaluation):
    """The loss in each part of the noise levels: of held-out samples if there are any, always with the same noise."""

    key, what, bins = "validation_loss", "validation loss", "validation_bins"

    def each(self, objective: Any, model: Model, draw: Draw) -> Tensor:
        """The number of each sample, (B,)."""
        losses: Tensor = objective.losses(model, *draw)
        return losses

    def run(self, model: Model, trainer: Trainer) -> Found:
        e, batches = trainer.experiment, trainer.batches
        held = batches.known(e.data.batch(0, 0, _FIXED) if e.held_out is None else e.held_out.part(slice(_FIXED)))
        # every part of the levels has as many samples
        least = -(-max(BINS, trainer.processes) // BINS) * BINS
        count = max(least, len(held.x0) // BINS * BINS)
        index = torch.arange(count) % len(held.x0)
        batch, u = held.mapped(lambda t: t[index]), (torch.arange(count) + 0.5) / count
        noise = counted("normal", batches.noise_shape(batch), range(count), 0, 10).to(batch.x0)
        draw, mine = Draw(batch, u, noise), parallel.shard(count)

        def measured() -> Tensor:
            found = []
            for first in range(mine.start, mine.stop, batches.size):
                some = draw.part(slice(first, min(first + batches.size, mine.stop)))
                found.append(self.each(e.objective, model, some.mapped(lambda t: t.to(batches.device))))
            return torch.cat(found)

        with torch.no_grad():
            numbers = parallel.gather(parallel.together(measured), count)
        bins = numbers.double().cpu().reshape(BINS, -1).mean(1).tolist()
        return Found({self.key: float(np.mean(bins)), self.bins: bins})


class Accuracy(FixedNoiseLoss):
    """The share of samples whose likeliest class is their own, in the same parts with the same noise."""

    key, what, bins = "accuracy", "accuracy", "accuracy_bins"

    def each(self, objective: Any, model: Model, draw: Draw) -> Tensor:
        right: Tensor = objective.right(model, *draw)
        return right


def moments(x: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every channel of (N, C, *sizes)."""
    count = x.numel() // x.shape[1]
    total, squares = torch.zeros(2, x.shape[1], dtype=torch.float64)
    for part in torch.split(x.cpu(), 256):
        channels = part.double().transpose(0, 1).flatten(1)
        total += channels.sum(1)
        squares += channels.square().sum(1)
    mean = total / count
    return mean.tolist(), ((squares - count * mean**2) / max(1, count - 1)).clamp_min(0).sqrt().tolist()


def far_off(found: list[float], wanted: list[float], std: list[float], count: int) -> list[int]:
    """The channels whose mean, of ``count`` samples, is more than a quarter of the data's deviation away from its own,
    beyond what chance explains."""
    far = (0.25 + 4 / max(count, 1) ** 0.5) * np.array(std)
    return np.flatnonzero(~(np.abs(np.array(found) - wanted) <= far)).tolist()


def spread_off(found: list[float], wanted: list[float], count: int) -> list[int]:
    """The channels whose deviation is more than half as large again as the data's, or less than two thirds of it."""
    slack = 1 + 4 / max(2 * count, 1) ** 0.5
    ratio = (np.array(found) + 1e-12) / (np.array(wanted) + 1e-12)
    return np.flatnonzero(~((ratio <= 1.5 * slack) & (ratio >= 1 / (1.5 * slack)))).tolist()


class Samples(Evaluation):
    """Samples as ``scorelab sample`` draws them, and their mean and deviation in every channel beside the data's. Of a
    network that is told what a sample shows, of data, each shown behind what it is of.
    """

    key, what = "sample_mean", "samples"

    def __init__(self, every: int = 1000) -> None:
        super().__init__(every)
        self._of_data: dict[str, list[float]] = {}

    def run(self, model: ScoreModel, trainer: Trainer) -> Found:
        if not self._of_data:
            data = trainer.experiment.data
            mean, std = moments((data.source if isinstance(data, Coded) else data).first(10_000).x0)
            self._of_data = {"data_mean": mean, "data_std": std}
        n = trainer.config.sampling.samples
        shown = in_turn(model, n)
        if model.semantic:
            shown = trainer.experiment.data.first(n).x0
            n = len(shown)
        x = trainer.samples(model, n, shown)
        mean, std = moments(x)
        # before, samples of most networks are far off
        if trainer.rank == 0 and trainer.step >= _SETTLED:
            self._warn(mean, std, n, trainer.step)
        if model.semantic and shown is not None:
            x = torch.stack([model.decode(shown.to(x)), x], 1)[: max(1, n // 2)].flatten(0, 1)
        return Found({self.key: mean, "sample_std": std, **self._of_data}, x)

    def _warn(self, mean: list[float], std: list[float], count: int, step: int) -> None:
        """RuntimeWarning of samples whose mean or spread is far from the data's."""
        wanted_mean, wanted = self._of_data["data_mean"], self._of_data["data_std"]
        off = spread_off(std, wanted, count)
        far = far_off(mean, wanted_mean, wanted, count)
        if not off and not far:
            return
        k = (off + far)[0]
        others = f", and so have {len(set(off + far)) - 1} more channels" if len(set(off + far)) > 1 else ""
        causes = "too few steps so far, optim.lr, sampling's noise levels, or a network whose inputs are not scaled"
        if off and std[k] > wanted[k]:
            causes += " (model.prediction='edm' with model.input_scale='unit_variance' is the safe choice)"
        warnings.warn(
            f"samples at step {step} have mean {mean[k]:.3g} and deviation {std[k]:.3g} in channel {k}, the data "
            f"{wanted_mean[k]:.3g} and {wanted[k]:.3g}{others}: usual causes are {causes}",
            RuntimeWarning,
            stacklevel=2,
        )


class Reconstructions(Evaluation):
    """Images and, after each, what the mean of its codes decodes to: held-out ones, if there are any, of which the root
    mean square error in [-1, 1] is told, and the bits a dimension of x given its code and of the code."""

    key, what = "reconstruction_rmse", "reconstructions"

    def run(self, model: AutoencoderModel, trainer: Trainer) -> Found:
        e = trainer.experiment
        x = (e.data.first(_FIXED).x0 if e.held_out is None else e.held_out.x0[:_FIXED]).to(model.device)
        noise = counted("normal", tuple(x.shape[1:]), range(len(x)), 0, 10).to(x)
        objective: Any = e.objective
        with torch.no_grad():
            parts = [objective.terms(model, a, b) for a, b in zip(x.chunk(8), noise.chunk(8), strict=True)]
            found = torch.cat([model.reconstruct(a) for a in x.chunk(8)])
            pairs = torch.stack([x, found], 1)[: max(1, trainer.config.sampling.samples // 2)].flatten(0, 1)
            shown = model.decode(pairs)
        given, rate = (float(torch.cat(bits).double().mean()) for bits in zip(*parts, strict=True))
        rmse = float((found - x).double().square().mean().sqrt())
        return Found({self.key: rmse, "bits_given_code": given, "bits_of_code": rate}, shown)


def evaluations(config: ConfigDict) -> list[Evaluation]:
    """Those of a resolved config: the loss at fixed noise, samples, of classifiers the accuracy, of autoencoders
    reconstructions, and what ``config.evaluation`` names."""
    t = config.training
    kind = getattr(named_part(config, "training.objective"), "kind", "score")
    shown = {"classifier": Accuracy(t.validate_every), "autoencoder": Reconstructions(t.sample_every)}
    found: list[Evaluation] = [FixedNoiseLoss(t.validate_every), shown.get(kind) or Samples(t.sample_every)]
    for name, settings in config.evaluation.items():
        made: Evaluation = EVALUATION.make(settings.to_dict(), f"config.evaluation.{name}", {"called": name})
        if kind == "classifier" and isinstance(made, Distance):
            raise ValueError(f"config.evaluation.{name} is of samples, which a classifier draws none of: leave it out")
        lacking = [key for key in ("key", "what") if not isinstance(getattr(made, key, None), str)]
        if lacking:
            raise ValueError(
                f"config.evaluation.{name}: {type(made).__name__} has no {' and no '.join(lacking)}; expected a class "
                "with key, of one of its numbers, and what, its name in words"
            )
        found.append(made)
    return found
