"""Inverse problems: what was measured of data, and its posterior as a score or as a sampler."""

from scorelab.inverse.editing import encode, sdedit, slerp, swapped
from scorelab.inverse.exact import exact_posterior
from scorelab.inverse.inpainting import RePaint, Replacement
from scorelab.inverse.linear import Blur, Colourisation, Inpainting, Matrix, SuperResolution
from scorelab.inverse.measurement import Measurement
from scorelab.inverse.operators import (
    SVD,
    Composition,
    LinearFunction,
    LinearOperator,
    NonlinearFunction,
    Operator,
    PhaseRetrieval,
)
from scorelab.inverse.posterior import dps, moment_matching, plug_in, pseudo_inverse
from scorelab.inverse.samplers import DAPS, DDRM, DPS

__all__ = [
    "DAPS",
    "DDRM",
    "DPS",
    "SVD",
    "Blur",
    "Colourisation",
    "Composition",
    "Inpainting",
    "LinearFunction",
    "LinearOperator",
    "Matrix",
    "Measurement",
    "NonlinearFunction",
    "Operator",
    "PhaseRetrieval",
    "RePaint",
    "Replacement",
    "SuperResolution",
    "dps",
    "encode",
    "exact_posterior",
    "moment_matching",
    "plug_in",
    "pseudo_inverse",
    "sdedit",
    "slerp",
    "swapped",
]
