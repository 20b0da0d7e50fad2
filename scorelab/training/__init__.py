"""Training: configuration, engine, averages of weights, run directories and checkpoints."""

from scorelab.training.config import Experiment, build, load_data, network
from scorelab.training.ema import EMA, Snapshot, reconstruct
from scorelab.training.engine import NonFiniteError, Trainer
from scorelab.training.restoring import posterior_samples
from scorelab.training.run import Interrupted, train
from scorelab.training.sampling import (
    build_sampling,
    in_turn,
    nfe_of,
    own_score,
    sample_model,
    with_nfe,
    with_statistics,
)
from scorelab.training.settings import default_config, resolve

__all__ = [
    "EMA",
    "Experiment",
    "Interrupted",
    "NonFiniteError",
    "Snapshot",
    "Trainer",
    "build",
    "build_sampling",
    "default_config",
    "in_turn",
    "load_data",
    "network",
    "nfe_of",
    "own_score",
    "posterior_samples",
    "reconstruct",
    "resolve",
    "sample_model",
    "train",
    "with_nfe",
    "with_statistics",
]
