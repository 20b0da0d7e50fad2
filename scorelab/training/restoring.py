"""Samples of what a measurement leaves open, by an experiment's model: by a posterior score and the experiment's own
sampler, or by a sampler of posteriors over its noise levels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from ml_collections import ConfigDict

from scorelab.checks import nearest_name
from scorelab.inverse import (
    DAPS,
    DDRM,
    DPS,
    Colourisation,
    Inpainting,
    Measurement,
    RePaint,
    Replacement,
    SuperResolution,
    moment_matching,
    pseudo_inverse,
)
from scorelab.models import ScoreModel
from scorelab.noise import PerSampleNoise
from scorelab.samplers import Sampler, sample
from scorelab.saved import unwrapped
from scorelab.training.sampling import build_sampling, own_score, with_nfe, with_statistics
from scorelab.training.settings import resolve
from scorelab.typing import ScoreFn, Tensor

__all__ = ["DEFAULT", "METHODS", "posterior_samples", "usual_nfe"]

_DATA_STD = 0.5
"""Of a pixel, in images scaled to [-1, 1]; EDM's sigma_data."""

_POSTERIORS: dict[str, Callable[[ScoreFn, Measurement], ScoreFn]] = {
    "pseudo_inverse": lambda score, m: pseudo_inverse(score, m, _DATA_STD),
    "moment_matching": lambda score, m: moment_matching(score, m, solver="gmres", tol=1e-2),
}
_SAMPLERS: dict[str, Callable[[Measurement], Sampler]] = {
    "ddrm": DDRM,
    "daps": lambda m: DAPS(m, data_std=_DATA_STD),
    "dps": DPS,
    "replacement": Replacement,
    "repaint": lambda m: RePaint(m, jump=2, resample=5),
}
METHODS = (*_POSTERIORS, *_SAMPLERS)
"""Those that are scores run with the experiment's own sampler, the others are samplers."""
DEFAULT = "ddrm"
"""It takes no gradients, and on held-out images no other is clearly better (docs/inverse.md)."""


def usual_nfe(config: ConfigDict, model: ScoreModel, method: str) -> int:
    """Evaluations for a sample: 100 of a method that is a sampler; 0, those of the experiment, of others and where its
    levels are all that there are."""
    fixed = getattr(unwrapped(model.net), "integer_labels", False)
    return 100 if method in _SAMPLERS and not fixed and {"n", "steps"} & set(resolve(config).sampling.grid) else 0


def posterior_samples(
    model: ScoreModel,
    config: ConfigDict,
    measurement: Measurement,
    n: int,
    seed: int = 0,
    *,
    method: str = DEFAULT,
    labels: Tensor | None = None,
    nfe: int = 0,
    progress: bool = False,
) -> Tensor:
    """n samples for each of K measured images, (K, n, *data_shape), in [-1, 1] where the model's data is, on the CPU.

    Sample i of each follows from (seed, i) and that image alone. method: one of ``METHODS``. labels: classes (n,) or
    None. nfe: as many levels as take this many evaluations at most, 0 for the config's own number; see ``usual_nfe``.
    Without noise samples agree with y. Raises ValueError for a method that is none.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; {nearest_name(method, METHODS)}")
    own = method in _SAMPLERS
    if own:
        config = config.copy_and_resolve_references()
        config.sampling.sampler = ConfigDict({"name": "ancestral"})
    if nfe:
        # of each level as RePaint goes there: 5 times
        config = with_nfe(config, model, max(1, nfe // 5) if method == "repaint" else nfe)
    levels, sampler = build_sampling(config, model)
    sampler = with_statistics(sampler, model, config, levels)
    score, found = own_score(model, config, labels), []
    for k in range(len(measurement.y)):
        m = replace(measurement, y=measurement.y[k : k + 1])
        x = sample(
            score if own else _POSTERIORS[method](score, m),
            (n, *model.data_shape),
            levels,
            _SAMPLERS[method](m) if own else sampler,
            generator=PerSampleNoise(seed),
            progress=progress,
            batch_size=config.sampling.batch_size,
        ).cpu()
        x = x if model.data_range is None else x.clamp(-1, 1)
        found.append(x if m.noise_std else _agreeing(x, m, model.data_range is not None))
    return torch.stack(found)


def _agreeing(x: Tensor, measurement: Measurement, bounded: bool) -> Tensor:
    """x with operator(x) = y, projected onto that and onto [-1, 1] in turns; of pixels the known ones are y itself."""
    operator = measurement.operator
    if isinstance(operator, Inpainting):
        return operator.pasted(x, measurement.y)
    if not isinstance(operator, (SuperResolution, Colourisation)):
        return x
    for _ in range(200):
        # A A' = I/size
        x = x + operator.size * operator.adjoint(measurement.residual(x))
        x = x.clamp(-1, 1) if bounded else x
    return x
