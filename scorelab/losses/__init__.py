"""How a score is learnt: denoising, implicit and sliced score matching, the variational bound; classifiers; codes."""

from scorelab.losses.autoencoding import Elbo
from scorelab.losses.base import Losses, Objective
from scorelab.losses.classification import CrossEntropy
from scorelab.losses.denoising import WEIGHTINGS, Denoising, denoising_loss, weighting
from scorelab.losses.implicit import Implicit, Sliced, implicit_loss, sliced_loss
from scorelab.losses.variational import Bins, Bound, ContinuousBound, Hybrid

__all__ = [
    "OBJECTIVES",
    "WEIGHTINGS",
    "Bins",
    "Bound",
    "ContinuousBound",
    "CrossEntropy",
    "Denoising",
    "Elbo",
    "Hybrid",
    "Implicit",
    "Losses",
    "Objective",
    "Sliced",
    "denoising_loss",
    "implicit_loss",
    "sliced_loss",
    "weighting",
]

OBJECTIVES: dict[str, type[Objective]] = {
    "denoising": Denoising,
    "implicit": Implicit,
    "sliced": Sliced,
    "hybrid": Hybrid,
    "bound": Bound,
    "continuous_bound": ContinuousBound,
    "cross_entropy": CrossEntropy,
    "elbo": Elbo,
}
"""Objectives by the names that configs have for them."""
