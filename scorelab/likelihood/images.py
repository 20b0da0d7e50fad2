"""Bits per dimension of images with discrete values, which say how they were made continuous.

A value k stands at x = x(k), the next one ``spacing`` w further. With u uniform on [-1/2, 1/2]^D and K draws of it,

    -log2 P(k) / D  <=  -E log2 [ (1/K) sum_j p(x + w u_j) ] / D - log2 w

which is the usual uniform dequantisation for K = 1, and tightens as K grows (importance weighting). With a random trace
estimate K must be 1: the logarithm of a mean of noisy densities is biased upwards, and the bound would be lost.
Theis, van den Oord and Bethge, 2016, arXiv:1511.01844; Burda, Grosse and Salakhutdinov, 2016, arXiv:1509.00519.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from scorelab.checks import check_batch
from scorelab.likelihood.ode import log_likelihood
from scorelab.noise import fresh_generator
from scorelab.typing import ScoreFn, Tensor

__all__ = ["BitsPerDim", "bits_per_dim"]


@dataclass(frozen=True)
class BitsPerDim:
    """``bits`` (B,) of each image, their ``stderr`` from the trace probes or None; ``statement`` says what they are."""

    bits: Tensor
    stderr: Tensor | None
    nfe: int
    statement: str


def bits_per_dim(
    score: ScoreFn,
    x0: Tensor,
    sigma_min: float,
    sigma_max: float,
    *,
    spacing: float,
    draws: int = 1,
    generator: torch.Generator | None = None,
    **options: Any,
) -> BitsPerDim:
    """Bits per dimension of x0 (B, *D), whose values lie ``spacing`` apart in the model's units.

    spacing: 2/255 for k/127.5 - 1, 2/256 for (k + 1/2)/128 - 1, 1/8 for digits/8 - 1. draws: K above. options:
    those of ``log_likelihood`` (divergence, probes, rtol, ...). The density is that of the data blurred by sigma_min.

    Raises ValueError for a spacing or a number of draws that is not positive, and what ``log_likelihood`` raises.
    """
    check_batch(x0, "x0")
    if not 0 < spacing < math.inf or draws < 1:
        raise ValueError(f"spacing = {spacing:g}, draws = {draws}; expected a positive spacing and draws >= 1")
    if draws > 1 and options.get("divergence", "exact") != "exact":
        raise ValueError(
            f"draws = {draws} with divergence = {options['divergence']!r}; expected draws = 1, or the exact trace: "
            "noise in log p would break the bound"
        )
    generator = fresh_generator() if generator is None else generator
    dims, logs, errors, nfe = x0[0].numel() if len(x0) else 1, [], [], 0
    for _ in range(draws):
        u = torch.rand(x0.shape, generator=generator, dtype=x0.dtype, device=generator.device).to(x0.device) - 0.5
        found = log_likelihood(score, x0 + spacing * u, sigma_min, sigma_max, generator=generator, **options)
        logs.append(found.log_prob)
        errors.append(found.stderr)
        nfe += found.nfe
    log_prob = torch.logsumexp(torch.stack(logs), 0) - math.log(draws)
    stderr = None if errors[0] is None else errors[0] / (dims * math.log(2))
    statement = (
        f"uniform dequantisation over bins of width {spacing:g}, {draws} draw{'s' if draws > 1 else ''}; density at "
        f"sigma_min = {sigma_min:g} by the probability-flow ODE from sigma_max = {sigma_max:g}"
    )
    return BitsPerDim((-log_prob / dims - math.log(spacing)) / math.log(2), stderr, nfe, statement)
