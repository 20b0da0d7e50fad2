"""Optimisers and learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

__all__ = ["OPTIMISERS", "SCHEDULES", "learning_rate"]

Schedule = Callable[[int], float]
"""The factor of the learning rate at a step."""


class Adam(torch.optim.Adam):
    """Adam, fused; weight decay is a gradient. Raises ValueError for settings below 0 and betas from 1 on."""

    decoupled = False

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if min(lr, eps, weight_decay) < 0 or not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(
                f"optim.lr = {lr:g}, eps = {eps:g}, weight_decay = {weight_decay:g}, beta1 = {beta1:g}, "
                f"beta2 = {beta2:g}; expected none below 0, and betas below 1"
            )
        options = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, **options, fused=True, decoupled_weight_decay=self.decoupled)  # type: ignore[arg-type]


class AdamW(Adam):
    """The same, but that weight decay is a shrinkage."""

    decoupled = True


def constant() -> Schedule:
    """1 at every step."""
    return lambda step: 1.0


def cosine(steps: int) -> Schedule:
    """Half a cosine, to 0 at ``steps``."""
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def inverse_sqrt(decay_from: int = 10_000) -> Schedule:
    """sqrt(decay_from/step) after step ``decay_from``: EDM2's."""
    if decay_from < 1:
        raise ValueError(
            f"optim.schedule.decay_from is {decay_from}; expected the step, 1 or more, at which the rate falls"
        )
    return lambda step: min(1.0, math.sqrt(decay_from / max(step, 1)))


OPTIMISERS: dict[str, type[torch.optim.Optimizer]] = {"adam": Adam, "adamw": AdamW}
"""Optimisers by the names that configs have for them."""
SCHEDULES: dict[str, Callable[..., Schedule]] = {"constant": constant, "cosine": cosine, "inverse_sqrt": inverse_sqrt}
"""Schedules of the learning rate, likewise; one that takes ``steps`` gets training.steps."""


def learning_rate(lr: float, warmup: int, schedule: Schedule, step: int) -> float:
    """The rate of a step: a linear warm-up times the schedule."""
    warm = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
    return lr * warm * schedule(step)
