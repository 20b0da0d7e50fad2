"""How a score becomes log-densities: the probability-flow ODE, and bits per dimension of images."""

from scorelab.likelihood.images import BitsPerDim, bits_per_dim
from scorelab.likelihood.ode import LogLikelihood, log_likelihood, normal_log_prob, sample_log_prob

__all__ = ["BitsPerDim", "LogLikelihood", "bits_per_dim", "log_likelihood", "normal_log_prob", "sample_log_prob"]
