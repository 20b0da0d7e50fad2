"""Distances between sample sets and distributions."""

from scorelab.evaluation.distances import KL, energy_distance, kl_to_model, nearest_distances

__all__ = ["KL", "energy_distance", "kl_to_model", "nearest_distances"]
