from . import adapters as adapters
from . import checks as checks
from . import codecs as codecs
from . import data as data
from . import distributions, losses, predictions, processes, samplers, sigmas
from . import divergence as divergence
from . import evaluation as evaluation
from . import guidance as guidance
from . import inverse as inverse
from . import likelihood as likelihood
from . import models as models
from . import nn as nn
from . import noise as noise
from . import plotting as plotting
from . import precision as precision
from . import scores as scores
from . import training as training
from .adapters import broadcast, clipped, from_denoiser, from_eps, from_time_score
from .classifiers import ClassifierModel
from .evaluation import check_score
from .guidance import autoguidance, classifier_free
from .interop.exporting import export
from .interop.loading import load
from .latent import AutoencoderModel
from .likelihood import LogLikelihood, bits_per_dim, log_likelihood, sample_log_prob, variational_bound
from .models import ScoreModel
from .noise import PerSampleNoise
from .predictions import Prediction, convert
from .processes import VE, VP, Cosine, DiscreteVP, Flow, Process, SubVP
from .samplers import Step, sample, trajectory
from .scores import combined
from .typing import ScoreFn

__version__: str

__all__ = [
    "VE",
    "VP",
    "AutoencoderModel",
    "ClassifierModel",
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
    "autoguidance",
    "bits_per_dim",
    "broadcast",
    "check_score",
    "classifier_free",
    "clipped",
    "combined",
    "convert",
    "distributions",
    "export",
    "from_denoiser",
    "from_eps",
    "from_time_score",
    "load",
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
