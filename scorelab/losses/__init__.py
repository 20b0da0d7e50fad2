"""How a score is learnt: denoising, implicit and sliced score matching."""

from scorelab.losses.base import Losses, Objective
from scorelab.losses.denoising import WEIGHTINGS, Denoising, denoising_loss, weighting
from scorelab.losses.implicit import Implicit, Sliced, implicit_loss, sliced_loss

__all__ = [
    "WEIGHTINGS",
    "Denoising",
    "Implicit",
    "Losses",
    "Objective",
    "Sliced",
    "denoising_loss",
    "implicit_loss",
    "sliced_loss",
    "weighting",
]
