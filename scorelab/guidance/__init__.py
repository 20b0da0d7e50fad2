"""Scores steered by other scores."""

from scorelab.guidance.classifier import classifier
from scorelab.guidance.classifier_free import classifier_free

__all__ = ["classifier", "classifier_free"]
