"""How a score becomes samples: ``sample``, ``trajectory``, and the samplers they drive."""

from scorelab.samplers.adaptive import ProbabilityFlow
from scorelab.samplers.adaptive_sde import AdaptiveReverseSDE
from scorelab.samplers.analytic import AnalyticVariance, analytic_variance
from scorelab.samplers.base import Context, Sampler, State, Step, Wrapper
from scorelab.samplers.calibrated import Calibrated, calibrate
from scorelab.samplers.corrected import AnnealedCorrector, Corrector, LangevinCorrector, PredictorCorrector
from scorelab.samplers.driver import sample, trajectory
from scorelab.samplers.langevin import (
    PUBLISHED_STEP_SIZES,
    AnnealedLangevin,
    ConsistentLangevin,
    Langevin,
    MetropolisLangevin,
    UnderdampedLangevin,
)
from scorelab.samplers.multistep import AdamsBashforth, DPMSolverMultistep, UniPC
from scorelab.samplers.ode import RK4, Euler, Heun, Midpoint
from scorelab.samplers.reverse import ReverseDiffusion, ReverseSDE, StochasticHeun
from scorelab.samplers.sde import Churn, SDEDPMSolver
from scorelab.samplers.singlestep import DPMSolverSinglestep
from scorelab.samplers.stochastic import DDIM, Ancestral

__all__ = [
    "CORRECTORS",
    "DDIM",
    "PUBLISHED_STEP_SIZES",
    "RK4",
    "SAMPLERS",
    "AdamsBashforth",
    "AdaptiveReverseSDE",
    "AnalyticVariance",
    "Ancestral",
    "AnnealedCorrector",
    "AnnealedLangevin",
    "Calibrated",
    "Churn",
    "ConsistentLangevin",
    "Context",
    "Corrector",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "Euler",
    "Heun",
    "Langevin",
    "LangevinCorrector",
    "MetropolisLangevin",
    "Midpoint",
    "PredictorCorrector",
    "ProbabilityFlow",
    "ReverseDiffusion",
    "ReverseSDE",
    "SDEDPMSolver",
    "Sampler",
    "State",
    "Step",
    "StochasticHeun",
    "UnderdampedLangevin",
    "UniPC",
    "Wrapper",
    "analytic_variance",
    "calibrate",
    "sample",
    "trajectory",
]

SAMPLERS: dict[str, type[Sampler]] = {
    "adams_bashforth": AdamsBashforth,
    "adaptive_reverse_sde": AdaptiveReverseSDE,
    "ancestral": Ancestral,
    "annealed_langevin": AnnealedLangevin,
    "churn": Churn,
    "consistent_langevin": ConsistentLangevin,
    "ddim": DDIM,
    "dpm_solver_multistep": DPMSolverMultistep,
    "dpm2m": DPMSolverMultistep,
    "dpm_solver_singlestep": DPMSolverSinglestep,
    "euler": Euler,
    "heun": Heun,
    "langevin": Langevin,
    "midpoint": Midpoint,
    "ode": ProbabilityFlow,
    "predictor_corrector": PredictorCorrector,
    "reverse_diffusion": ReverseDiffusion,
    "reverse_sde": ReverseSDE,
    "rk4": RK4,
    "sde_dpm_solver": SDEDPMSolver,
    "stochastic_heun": StochasticHeun,
    "underdamped_langevin": UnderdampedLangevin,
    "unipc": UniPC,
}
"""Samplers by the names that configs have for them; Metropolis's needs a density and Calibrated a file."""
CORRECTORS: dict[str, type[Corrector]] = {"annealed": AnnealedCorrector, "langevin": LangevinCorrector}
"""Correctors, likewise."""
