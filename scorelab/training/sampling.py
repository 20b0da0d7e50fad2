"""Sampling as an experiment's config says: its noise levels, its sampler, its clipping."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from ml_collections import ConfigDict

from scorelab.adapters import clipped
from scorelab.checks import broadcast
from scorelab.classifiers import ClassifierModel
from scorelab.guidance.autoguidance import autoguidance
from scorelab.guidance.classifier import classifier
from scorelab.guidance.classifier_free import classifier_free
from scorelab.latent import AutoencoderModel
from scorelab.models import ScoreModel
from scorelab.noise import PerSampleNoise
from scorelab.processes import DiscreteVP
from scorelab.samplers import Ancestral, Calibrated, Sampler, analytic_variance, sample, trajectory
from scorelab.saved import Model
from scorelab.scores import combined
from scorelab.training.config import training_data
from scorelab.training.settings import part, resolve
from scorelab.typing import ScoreFn, Tensor

__all__ = [
    "build_sampling",
    "check_guidance",
    "check_sampling",
    "in_turn",
    "nfe_of",
    "own_score",
    "sample_model",
    "with_nfe",
    "with_statistics",
]

_STATISTICS = 512
"""Training samples that an analytic variance is estimated from."""


def build_sampling(config: ConfigDict, model: ScoreModel) -> tuple[Tensor, Sampler]:
    """The noise levels and the sampler of ``config.sampling``."""
    config, process = resolve(config), model.process
    low, high = model.sigma_range
    if config.sampling.grid.name == "steps" and not isinstance(process, DiscreteVP):
        raise ValueError(
            "sampling.grid.name='steps' takes DDPM's own steps; expected process.name 'ddpm' or 'ddpm_cosine'"
        )
    betas = {"betas": process.betas} if isinstance(process, DiscreteVP) else {}
    levels: Tensor = part(config, "sampling.grid", process=process, sigma_min=low, sigma_max=high, **betas)
    sampler: Sampler = part(config, "sampling.sampler", process=process, sigma_min=low, sigma_max=high)
    if isinstance(sampler, Ancestral) and sampler.variance == "learned" and not model.variance:
        raise ValueError(
            "sampling.sampler.variance is 'learned', but the network learned none; expected 'posterior', 'forward' or "
            "'analytic'"
        )
    return levels, sampler


def _is_analytic(sampler: Sampler) -> bool:
    return isinstance(sampler, Ancestral) and sampler.variance == "analytic"


def _without_statistics(sigmas: Tensor, sampler: Sampler) -> tuple[Tensor, Sampler]:
    """A sampler whose steps can be tried without data."""
    return sigmas, Ancestral() if _is_analytic(sampler) else sampler


def with_statistics(sampler: Sampler, model: ScoreModel, config: ConfigDict, sigmas: Tensor) -> Sampler:
    """A sampler of ``variance="analytic"`` with the variance that training samples of the config's data have under the
    model's score at ``sigmas``, each given its class and without guidance; any other sampler as it is.

    It takes ``_STATISTICS`` evaluations of one sample a level, and is the same for a model and config wherever it runs.
    """
    if not _is_analytic(sampler):
        return sampler
    batch = training_data(config).batch(config.seed, 0, _STATISTICS).mapped(lambda t: t.to(model.device))
    with torch.no_grad():
        x0 = model.encode(batch.x0)
    score = own_score(model, config, batch.condition if model.conditional else None, guided=False)
    return replace(sampler, variance=analytic_variance(score, x0, sigmas, generator=PerSampleNoise(config.seed)))  # type: ignore[type-var]


def nfe_of(config: ConfigDict, model: Model) -> int:
    """How many evaluations of the score the experiment's sampler takes, tried on a normal distribution; ValueError for
    a model without a score."""
    if not isinstance(model, ScoreModel):
        raise ValueError(f"samples of an {model.kind} are decoded at once; expected no --nfe and no --samplers")
    levels, sampler = _without_statistics(*build_sampling(config, model))
    return list(trajectory(_Gaussian(), (1, 2), levels, sampler, generator=PerSampleNoise(0)))[-1].nfe


def with_nfe(config: ConfigDict, model: Model, nfe: int) -> ConfigDict:
    """The config with as many noise levels as take ``nfe`` evaluations at most.

    Raises ValueError for samplers whose evaluations do not follow from the levels, and where one level takes more.
    """
    config = resolve(config)
    grid = config.sampling.grid
    key = "n" if "n" in grid else "steps" if "steps" in grid else ""
    if not key:
        raise ValueError(f"--nfe needs a grid with a number of levels, n; sampling.grid.name={grid.name!r} has none")

    def takes(n: int) -> int:
        grid[key] = n
        return nfe_of(config, model)

    # a process of steps has no more
    most = getattr(getattr(model, "process", None), "steps", 2**30) if key == "steps" else 2**30
    if takes(min(2, most)) == takes(min(6, most)) and most > 1:
        raise ValueError(
            f"--nfe={nfe}, but sampling.sampler.name={config.sampling.sampler.name!r} chooses its steps itself; "
            "expected its tolerances, --config.sampling.sampler.rtol=1e-2 for example"
        )
    low, high = 1, min(nfe, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if takes(middle) <= nfe else (low, middle - 1)
    if takes(low) > nfe:
        raise ValueError(f"--nfe={nfe}, but {config.sampling.sampler.name} takes {takes(low)} for one noise level")
    return config


class _Gaussian:
    """The score of a unit normal distribution, and a variance in the middle of its bounds."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return -x / (1 + broadcast(sigma, x) ** 2)

    def score_and_variance(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return self(x, sigma), torch.full_like(x, 0.5)


class _EnoughError(Exception):
    """The sampler has been tried."""


def _tried(score: ScoreFn, most: int) -> ScoreFn:
    """A score that ends its run after ``most`` evaluations."""
    left = most

    def formula(x: Tensor, sigma: Tensor, s: Tensor) -> Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise _EnoughError
        return s

    return combined(formula, score, variance=True)


def check_guidance(config: ConfigDict, model: ScoreModel, said: str = "sampling.", none: float = 1.0) -> None:
    """Refuse (ValueError) a share that is none, an interval without any of the model's noise levels, and either beside
    the scale that guides nowhere, ``none``. said: what the settings' names begin with."""
    c, (least, most) = config.sampling, model.sigma_range
    interval, rescale = tuple(c.guidance_interval), c.guidance_rescale
    if not 0 <= rescale <= 1:
        raise ValueError(f"{said}guidance_rescale is {rescale:g}; expected a share from 0 (none) to 1, such as 0.7")
    if interval and (interval[1] < least or interval[0] >= most):
        raise ValueError(
            f"{said}guidance_interval is {interval}, and the model's noise levels go from {least:.4g} to {most:.4g}; "
            "expected some of them inside"
        )
    if c.guidance == none and (interval or rescale):
        raise ValueError(
            f"{said}guidance_{'interval' if interval else 'rescale'} has a scale of {none:g}, which is none; expected "
            f"{said}guidance, such as 2"
        )


def check_sampling(config: ConfigDict, model: ScoreModel) -> None:
    """Refuse (ValueError) settings of ``config.sampling`` that can't be sampled with, before training needs them.

    Two samples take the sampler's first step, of at most 12 evaluations.
    """
    c = config.sampling
    for key in ("samples", "batch_size"):
        if c[key] < 1:
            raise ValueError(f"sampling.{key} is {c[key]}; expected at least 1")
    if c.clip and model.data_range is None:
        raise ValueError("sampling.clip is for data scaled to [-1, 1], images of bytes or digits; expected False")
    check_guidance(config, model)
    noise_levels, sampler = _without_statistics(*build_sampling(config, model))
    low, high = model.sigma_range
    least, most = float(noise_levels[noise_levels > 0].min()), float(noise_levels[0])
    if least < low * (1 - 1e-6) or most > high * (1 + 1e-6):
        raise ValueError(
            f"sampling's noise levels span [{least:g}, {most:g}], "
            f"the model's [{low:g}, {high:g}]; expected them inside: set sampling.sigma_min and sigma_max"
        )
    training = model.training
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", "the sampler stopped early", RuntimeWarning)
            score, start = own_score(model.eval(), config, in_turn(model, 2)), (2, *model.data_shape)
            steps = trajectory(_tried(score, 12), start, noise_levels, sampler, generator=PerSampleNoise(0))
            for _ in islice(steps, 2):
                pass
    except _EnoughError:
        return
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"the first step of config.sampling can't be sampled with: {error}") from error
    finally:
        model.train(training)


def own_score(
    model: ScoreModel,
    config: ConfigDict,
    condition: Tensor | None = None,
    by: ScoreModel | ClassifierModel | None = None,
    *,
    guided: bool = True,
) -> ScoreFn:
    """The score that an experiment samples with: for a condition guided, with the denoised sample clamped to the data's
    range, as it says. by: guide away from this model instead, for a condition or none, or by this classifier, to the
    condition at the noise levels that it knows. guided: False leaves classifier-free guidance out. Raises ValueError
    for guidance of a model that can't leave the condition out, and for a share taken back beside a classifier.
    """
    c = config.sampling
    interval, rescale = tuple(c.guidance_interval) or None, c.guidance_rescale
    score: ScoreFn = model if condition is None or not model.conditional else model.conditioned(condition)
    if isinstance(by, ClassifierModel):
        if rescale:
            raise ValueError(f"guidance_rescale is {rescale:g}, which a classifier does not know; expected 0 beside it")
        if condition is not None:
            # of a model that always takes a class, the class's own score is sharpened
            free = score if model.conditional and model.null_condition is None else model
            (low, high), (least, most) = interval or (0.0, math.inf), by.sigma_range
            if model.sigma_range[0] < least or model.sigma_range[1] > most:
                interval = (max(low, least), min(high, most))
            score = classifier(free, by.conditioned(condition), c.guidance, interval=interval)
    elif by is not None:
        other = by if condition is None else by.conditioned(condition)
        score = autoguidance(score, other, c.guidance, interval=interval, rescale=rescale)
    elif guided and condition is not None and c.guidance != 1:
        if not config.training.label_dropout:
            raise ValueError(
                f"guidance is {c.guidance:g}, but this model was trained with training.label_dropout=0, so it never "
                "learnt what to predict without a class: train with 0.1, for example"
            )
        score = classifier_free(score, model.conditioned(None), c.guidance, interval=interval, rescale=rescale)
    return clipped(score, -1.0, 1.0) if c.clip and model.data_range is not None else score


def in_turn(model: ScoreModel, n: int) -> Tensor | None:
    """Each class in turn for n samples, (n,); None for a model without classes. Of one that is told what a sample shows
    that nothing is there, (n, *data_shape)."""
    if model.semantic:
        return torch.zeros(n, *model.data_shape)
    return None if model.num_classes is None else torch.arange(n) % model.num_classes


def sample_model(
    model: ScoreModel | AutoencoderModel,
    config: ConfigDict,
    n: int,
    generator: torch.Generator | PerSampleNoise,
    *,
    condition: Tensor | None = None,
    by: ScoreModel | ClassifierModel | None = None,
    sampler: Path | None = None,
    progress: bool = True,
    sharded: bool = True,
) -> Tensor:
    """n samples, decoded, for a condition (n, ...) or (1, ...) or none, with the experiment's own sampler and batch
    size, or with a calibrated sampler's file; of an autoencoder from its prior. by: see ``own_score``. sharded: under
    torchrun every process makes its share of PerSampleNoise's samples and returns all."""
    if isinstance(model, AutoencoderModel):
        return model.sample(n, generator)
    noise_levels, own = build_sampling(config, model)
    if sampler is None:
        own = with_statistics(own, model, config, noise_levels)
    codes = sample(
        own_score(model, config, condition, by),
        (n, *model.data_shape),
        noise_levels if sampler is None else None,
        own if sampler is None else Calibrated.load(sampler),
        generator=generator,
        progress=progress,
        batch_size=config.sampling.batch_size,
        sharded=sharded and isinstance(generator, PerSampleNoise),
    )
    return model.decode(codes)
