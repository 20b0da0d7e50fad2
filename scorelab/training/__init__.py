"""Training: configuration, engine, EMA and checkpoints."""

from scorelab.training.config import Experiment, build, build_sampling, default_config, load_data
from scorelab.training.ema import EMA
from scorelab.training.engine import Interrupted, NonFiniteError, Trainer, train

__all__ = [
    "EMA",
    "Experiment",
    "Interrupted",
    "NonFiniteError",
    "Trainer",
    "build",
    "build_sampling",
    "default_config",
    "load_data",
    "train",
]
