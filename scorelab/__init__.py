"""scorelab: score-based generative modelling around one function, score(x, sigma) = grad_x log p(x; sigma)."""

from scorelab import distributions, losses, nn, predictions, processes, samplers, sigmas  # noqa: F401
from scorelab.adapters import broadcast, clipped, from_denoiser, from_eps, from_time_score
from scorelab.evaluation import check_score
from scorelab.guidance import classifier_free
from scorelab.likelihood import LogLikelihood, bits_per_dim, log_likelihood, sample_log_prob, variational_bound
from scorelab.models import ScoreModel
from scorelab.noise import PerSampleNoise
from scorelab.predictions import Prediction, convert
from scorelab.processes import VE, VP, Cosine, DiscreteVP, Flow, Process, SubVP
from scorelab.samplers import Step, sample, trajectory
from scorelab.scores import combined
from scorelab.typing import ScoreFn

__version__ = "0.1.0"

# "nn" is left out: a star import must not hide torch's
__all__ = [
    "VE",
    "VP",
    "Cosine",
    "DiscreteVP",
    "Flow",
    "LogLikelihood",
    "PerSampleNoise",
    "Prediction",
    "Process",
    "ScoreFn",
    "ScoreModel",
    "Step",
    "SubVP",
    "bits_per_dim",
    "broadcast",
    "check_score",
    "classifier_free",
    "clipped",
    "combined",
    "convert",
    "distributions",
    "from_denoiser",
    "from_eps",
    "from_time_score",
    "log_likelihood",
    "losses",
    "predictions",
    "processes",
    "sample",
    "sample_log_prob",
    "samplers",
    "sigmas",
    "trajectory",
    "variational_bound",
]
