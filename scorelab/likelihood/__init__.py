"""How a score becomes log-densities."""

from scorelab.likelihood.ode import LogLikelihood, log_likelihood, normal_log_prob

__all__ = ["LogLikelihood", "log_likelihood", "normal_log_prob"]
