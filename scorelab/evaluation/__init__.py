"""Distances between sample sets and distributions, and whether a function is the score of given data."""

from scorelab.evaluation.calibration import calibration_ranks, uniformity
from scorelab.evaluation.distances import KL, energy_distance, kl_to_model, nearest_distances
from scorelab.evaluation.scores import Report, check_score

__all__ = [
    "KL",
    "Report",
    "calibration_ranks",
    "check_score",
    "energy_distance",
    "kl_to_model",
    "nearest_distances",
    "uniformity",
]
