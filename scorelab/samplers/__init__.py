"""How a score becomes samples: ``sample``, ``trajectory``, and the samplers they drive."""

from scorelab.samplers.adaptive import ProbabilityFlow
from scorelab.samplers.base import Sampler, State, Step
from scorelab.samplers.corrected import AnnealedCorrector, Corrector, LangevinCorrector, PredictorCorrector
from scorelab.samplers.driver import sample, trajectory
from scorelab.samplers.langevin import AnnealedLangevin, Langevin
from scorelab.samplers.ode import Euler, Heun
from scorelab.samplers.stochastic import DDIM, Ancestral, ReverseDiffusion, ReverseSDE

__all__ = [
    "DDIM",
    "Ancestral",
    "AnnealedCorrector",
    "AnnealedLangevin",
    "Corrector",
    "Euler",
    "Heun",
    "Langevin",
    "LangevinCorrector",
    "PredictorCorrector",
    "ProbabilityFlow",
    "ReverseDiffusion",
    "ReverseSDE",
    "Sampler",
    "State",
    "Step",
    "sample",
    "trajectory",
]
