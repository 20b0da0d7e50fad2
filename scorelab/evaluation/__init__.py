"""Distances between sample sets with their errors, and whether a function is the score of given data."""

from scorelab.evaluation.calibration import calibration_ranks, uniformity
from scorelab.evaluation.comparison import compared
from scorelab.evaluation.distances import KL, kl_to_model, nearest_distances
from scorelab.evaluation.estimates import Estimate
from scorelab.evaluation.features import Features, FromClassifier, FromModule, Inception, Pixels, collected, features_of
from scorelab.evaluation.frechet import Frechet, Moments, frechet_distance
from scorelab.evaluation.kernels import energy_distance, kernel_distance
from scorelab.evaluation.neighbours import Manifold, manifold
from scorelab.evaluation.scores import Report, check_score
from scorelab.evaluation.sliced import sliced_wasserstein
from scorelab.evaluation.variety import inception_score, vendi_score

__all__ = [
    "KL",
    "Estimate",
    "Features",
    "Frechet",
    "FromClassifier",
    "FromModule",
    "Inception",
    "Manifold",
    "Moments",
    "Pixels",
    "Report",
    "calibration_ranks",
    "check_score",
    "collected",
    "compared",
    "energy_distance",
    "features_of",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "kl_to_model",
    "manifold",
    "nearest_distances",
    "sliced_wasserstein",
    "uniformity",
    "vendi_score",
]
