"""What is right and wrong with a score and its samples: measures at each noise level, tests of samples, a verdict."""

from scorelab.health.copies import Copies, copies
from scorelab.health.derivatives import Derivatives, derivatives
from scorelab.health.levels import Level, lag, level_health
from scorelab.health.samples import SampleHealth, sample_health
from scorelab.health.verdict import Finding, Health, judged, level_told

__all__ = [
    "Copies",
    "Derivatives",
    "Finding",
    "Health",
    "Level",
    "SampleHealth",
    "copies",
    "derivatives",
    "judged",
    "lag",
    "level_health",
    "level_told",
    "sample_health",
]
