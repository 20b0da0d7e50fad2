"""How data becomes noise: VE, VP, sub-VP, cosine, rectified flow, DDPM's discrete steps and VDM's learned schedule."""

from collections.abc import Callable

from scorelab.processes.base import Process
from scorelab.processes.continuous import VE, VP, Cosine, Flow, SubVP
from scorelab.processes.discrete import DiscreteVP, cosine_betas, ddpm, ddpm_cosine, linear_betas
from scorelab.processes.learned import Learned
from scorelab.processes.steps import step_variances

__all__ = [
    "PROCESSES",
    "VE",
    "VP",
    "Cosine",
    "DiscreteVP",
    "Flow",
    "Learned",
    "Process",
    "SubVP",
    "cosine_betas",
    "linear_betas",
    "step_variances",
]


def ve(sigma_min: float, sigma_max: float) -> VE:
    """Variance exploding between these levels; where a config leaves them open they follow from its data."""
    return VE(sigma_min, sigma_max)


PROCESSES: dict[str, Callable[..., Process]] = {
    "ve": ve,
    "vp": VP,
    "subvp": SubVP,
    "cosine": Cosine,
    "flow": Flow,
    "ddpm": ddpm,
    "ddpm_cosine": ddpm_cosine,
    "learned": Learned,
}
"""Processes by the names that configs have for them."""
