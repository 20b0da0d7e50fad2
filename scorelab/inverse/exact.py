"""Posteriors in closed form: a Gaussian or a mixture of Gaussians, given a linear measurement.

For x0 ~ N(m, C) and y = A x0 + noise_std eps, with S = A C A' + noise_std^2 I and K = C A' S^-1,

    x0 | y ~ N(m + K (y - A m), C - K A C),      p(y) = N(A m, S)

and of a mixture each part is so conditioned and weighs w_k p_k(y). Without noise the covariance is singular.
"""

from __future__ import annotations

import math

import torch

from scorelab.distributions import Distribution, Gaussian, GaussianMixture, Labelled
from scorelab.inverse.measurement import Measurement, linear
from scorelab.typing import Tensor

__all__ = ["exact_posterior"]


def exact_posterior(prior: Distribution, measurement: Measurement) -> Distribution:
    """The exact distribution of x0 given y (1, *shape), in float64, whose score, samples and density are known.

    prior: a Gaussian or GaussianMixture. Dense matrices of the data's dimension are formed. Raises TypeError for
    another prior or an operator that is not linear, ValueError for more than one row of y.
    """
    if not isinstance(prior, (Gaussian, GaussianMixture)):
        raise TypeError(f"prior is {type(prior).__name__}; expected a Gaussian or a GaussianMixture")
    if len(measurement.y) != 1:
        raise ValueError(f"y has {len(measurement.y)} rows; expected one: condition on each measurement by itself")
    operator, n = linear(measurement), math.prod(prior.data_shape)
    identity = torch.eye(n, dtype=torch.float64)
    a = operator(identity.reshape(n, *prior.data_shape)).flatten(1).T
    y = measurement.y.double().flatten()
    if isinstance(prior, Gaussian):
        parts = [(prior.mean.double(), _covariance(prior))]
        log_weights = torch.zeros(1, dtype=torch.float64)
    else:
        std = prior.std.double().expand(len(prior.means))
        parts = [(m, s**2 * identity) for m, s in zip(prior.means.double(), std, strict=True)]
        log_weights = prior.weights.double().log()
    found = [_conditioned(m, c, a, y, measurement.noise_std) for m, c in parts]
    made = [Gaussian(m.reshape(prior.data_shape), c) for m, c, _ in found]
    if len(made) == 1:
        return made[0]
    return Labelled(made, torch.softmax(log_weights + torch.stack([evidence for *_, evidence in found]), 0))


def _covariance(prior: Gaussian) -> Tensor:
    variances = prior.variances.double()
    if prior.basis is None:
        return torch.diag(variances)
    basis = prior.basis.double()
    whole: Tensor = (basis * variances) @ basis.T
    return whole


def _conditioned(m: Tensor, c: Tensor, a: Tensor, y: Tensor, noise_std: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and covariance given y, and log p(y) up to a constant."""
    s = a @ c @ a.T + noise_std**2 * torch.eye(len(a), dtype=a.dtype)
    gain, off = torch.linalg.lstsq(s, a @ c, driver="gelsd").solution.T, y - a @ m
    kept = torch.eye(len(m), dtype=a.dtype) - gain @ a
    # Joseph's form stays symmetric and positive
    cov = kept @ c @ kept.T + noise_std**2 * gain @ gain.T
    values, vectors = torch.linalg.eigh(s)
    inside = values > len(a) * torch.finfo(a.dtype).eps * values.max()
    along = (vectors.T @ off)[inside]
    evidence = -0.5 * (along.square() / values[inside] + values[inside].log()).sum()
    return m + gain @ off, 0.5 * (cov + cov.T), evidence
