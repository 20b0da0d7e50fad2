"""How data becomes noise: VE, VP, sub-VP, cosine, rectified flow and DDPM's discrete steps."""

from scorelab.processes.base import Process
from scorelab.processes.continuous import VE, VP, Cosine, Flow, SubVP
from scorelab.processes.discrete import DiscreteVP, cosine_betas, linear_betas

__all__ = ["VE", "VP", "Cosine", "DiscreteVP", "Flow", "Process", "SubVP", "cosine_betas", "linear_betas"]
