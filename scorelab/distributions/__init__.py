"""Targets whose score, density and samples are exact at every noise level."""

from scorelab.distributions.base import Distribution
from scorelab.distributions.checkerboard import Checkerboard
from scorelab.distributions.gaussian import Gaussian
from scorelab.distributions.labelled import Labelled
from scorelab.distributions.mixture import Empirical, GaussianMixture
from scorelab.distributions.targets import LABELLED, STD, TARGETS, target

__all__ = [
    "LABELLED",
    "STD",
    "TARGETS",
    "Checkerboard",
    "Distribution",
    "Empirical",
    "Gaussian",
    "GaussianMixture",
    "Labelled",
    "target",
]
