"""How a score becomes log-densities: the probability-flow ODE, the variational bound, bits per dimension of images."""

from scorelab.likelihood.bound import VariationalBound, variational_bound
from scorelab.likelihood.images import BitsPerDim, bits_per_dim
from scorelab.likelihood.ode import LogLikelihood, log_likelihood, normal_log_prob, sample_log_prob

__all__ = [
    "BitsPerDim",
    "LogLikelihood",
    "VariationalBound",
    "bits_per_dim",
    "log_likelihood",
    "normal_log_prob",
    "sample_log_prob",
    "variational_bound",
]
