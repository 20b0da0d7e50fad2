"""Targets whose score, density and samples are exact at every noise level."""

from scorelab.distributions.base import Distribution
from scorelab.distributions.checkerboard import Checkerboard
from scorelab.distributions.gaussian import Gaussian
from scorelab.distributions.mixture import Empirical, GaussianMixture
from scorelab.distributions.targets import STD, TARGETS, target

__all__ = ["STD", "TARGETS", "Checkerboard", "Distribution", "Empirical", "Gaussian", "GaussianMixture", "target"]
