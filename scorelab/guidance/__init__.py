"""Scores steered by other scores."""

from scorelab.guidance.autoguidance import autoguidance
from scorelab.guidance.classifier import classifier
from scorelab.guidance.classifier_free import classifier_free
from scorelab.guidance.particles import Tilted, tilted
from scorelab.guidance.steps import ByStep, snapped
from scorelab.guidance.updates import Projected, Thresholded

__all__ = [
    "ByStep",
    "Projected",
    "Thresholded",
    "Tilted",
    "autoguidance",
    "classifier",
    "classifier_free",
    "snapped",
    "tilted",
]
