"""Optimisers and learning rates by their names in a config."""

from __future__ import annotations

import math

import torch
from ml_collections import ConfigDict
from torch import nn

from scorelab.checks import nearest_name

__all__ = ["SCHEDULES", "learning_rate", "optimiser"]

SCHEDULES = ("constant", "cosine", "inverse_sqrt")
_OPTIMISERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def optimiser(parameters: list[nn.Parameter], o: ConfigDict) -> torch.optim.Optimizer:
    """Adam or AdamW of ``config.optim``, fused; ValueError for another name or schedule."""
    if o.name not in _OPTIMISERS:
        raise ValueError(f"optim.name is {o.name!r}; {nearest_name(o.name, _OPTIMISERS)}")
    if o.schedule not in SCHEDULES:
        raise ValueError(f"optim.schedule is {o.schedule!r}; {nearest_name(o.schedule, SCHEDULES)}")
    if o.schedule == "inverse_sqrt" and o.decay_from < 1:
        raise ValueError(f"optim.decay_from is {o.decay_from}; expected the step, 1 or more, at which the rate falls")
    if min(o.lr, o.eps, o.weight_decay, o.clip or 0) < 0 or not (0 <= o.beta1 < 1 and 0 <= o.beta2 < 1):
        raise ValueError(
            f"optim.lr = {o.lr:g}, eps = {o.eps:g}, weight_decay = {o.weight_decay:g}, clip = {o.clip}, "
            f"beta1 = {o.beta1:g}, beta2 = {o.beta2:g}; expected none below 0, and betas below 1"
        )
    made: torch.optim.Optimizer = _OPTIMISERS[o.name](
        parameters, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay, fused=True
    )
    return made


def learning_rate(o: ConfigDict, step: int, steps: int) -> float:
    """The rate of a step: a linear warm-up times the schedule.

    cosine falls to 0 at ``steps``; inverse_sqrt is lr sqrt(decay_from/step) after step ``decay_from`` (EDM2's).
    """
    warm = min(1.0, (step + 1) / o.warmup) if o.warmup > 0 else 1.0
    fall = 1.0
    if o.schedule == "cosine":
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    elif o.schedule == "inverse_sqrt":
        fall = min(1.0, math.sqrt(o.decay_from / max(step, 1)))
    return float(o.lr * warm * fall)
