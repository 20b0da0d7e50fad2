"""Log-densities by the instantaneous change of variables along the probability-flow ODE (unscaled):

    log p(x; sigma_min) = log prior(x(sigma_max)) - int_{sigma_min}^{sigma_max} sigma tr(grad score) dsigma
                        = log prior(x(sigma_max)) - int sigma^2 tr(grad score) dlog(sigma)

Chen et al., Neural Ordinary Differential Equations, 2018, arXiv:1806.07366; Grathwohl et al., FFJORD, 2019,
arXiv:1810.01367; Song et al., 2021, arXiv:2011.13456.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from scorelab import divergence as traces
from scorelab.checks import check_batch, check_finite, check_sigmas, rows
from scorelab.noise import fresh_generator
from scorelab.samplers.adaptive import Controller, check_broadcasting, integrate
from scorelab.samplers.base import Counted
from scorelab.typing import ScoreFn, Tensor

__all__ = ["LogLikelihood", "log_likelihood", "normal_log_prob"]


@dataclass(frozen=True)
class LogLikelihood:
    """``log_prob`` (B,) in nats; ``stderr`` (B,) of the trace estimate over probes, None if exact or one probe;
    ``latent`` (B, *D), the image of x at sigma_max; ``nfe``, score evaluations of the whole batch."""

    log_prob: Tensor
    stderr: Tensor | None
    latent: Tensor
    nfe: int


def normal_log_prob(x: Tensor, std: float) -> Tensor:
    """log N(x; 0, std^2 I) in nats, (B,)."""
    flat = x.flatten(1)
    return -0.5 * flat.square().sum(1) / std**2 - flat.shape[1] * (math.log(std) + 0.5 * math.log(2 * math.pi))


def log_likelihood(
    score: ScoreFn,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    *,
    prior: Callable[[Tensor], Tensor] | None = None,
    divergence: str = "exact",
    probes: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    data_std: float = 0.0,
    max_steps: int = 1000,
    generator: torch.Generator | None = None,
) -> LogLikelihood:
    """log p(x; sigma_min) in nats for x (B, *D): the density of data blurred by sigma_min.

    prior: log-density (B,) at sigma_max, unscaled; by default N(0, (sigma_max^2 + data_std^2) I), exact only as
    sigma_max grows. divergence: "exact" (one backward pass a dimension) or "hutchinson" with ``probes`` Rademacher
    probes, fixed over the solve, which is unbiased. rtol, atol: tolerance per sample, for x and for log p alike.

    Raises ValueError for shapes or levels that don't fit or a score that is not finite, RuntimeError past max_steps.
    """
    check_batch(x)
    check_finite(x, "x")
    check_sigmas([sigma_max, sigma_min])
    if sigma_min <= 0:
        raise ValueError(f"sigma_min is {sigma_min:g}; expected a positive noise level")
    if divergence not in ("exact", "hutchinson"):
        raise ValueError(f"divergence is {divergence!r}; expected 'exact' or 'hutchinson'")
    if probes < 1:
        raise ValueError(f"probes is {probes}; expected at least 1")
    if len(x) == 0:
        return LogLikelihood(x.new_zeros(0), None, x, 0)
    counted, dims, shape = Counted(score), x[0].numel(), x.shape[1:]
    with torch.no_grad():
        check_broadcasting(counted, x, sigma_min, math.sqrt(sigma_min * sigma_max))
    probe = None
    if divergence == "hutchinson":
        source = fresh_generator() if generator is None else generator
        probe = traces.rademacher((probes, *x.shape), x, source)
    split = hasattr(score, "rows")

    def field(y: Tensor, u: Tensor, index: Tensor) -> Tensor:
        part = rows(counted, index) if split and len(index) < len(x) else counted
        sigma = u.exp()
        var = sigma**2

        def velocity(point: Tensor) -> Tensor:
            assert part is not None
            return -part(point, sigma).flatten(1) * var.unsqueeze(1)

        point = y[:, :dims].reshape(-1, *shape)
        if probe is None:
            slope, trace = traces.exact(velocity, point)
            columns = trace.unsqueeze(1)
        else:
            slope, _, single = traces.hutchinson(lambda p: velocity(p).reshape(p.shape), point, probe[:, index])
            slope, columns = slope.flatten(1), single.T
        # along the flow d log p / du = -div(dx/du), so what must be added to the prior is +div
        return torch.cat([slope, columns], 1)

    def norm(error: Tensor) -> Tensor:
        return torch.maximum(error[:, :dims].square().mean(1).sqrt(), error[:, dims:].mean(1).abs())

    extra = 1 if probe is None else probes
    begin = torch.cat([x.flatten(1), x.new_zeros(len(x), extra)], 1).detach()
    control = Controller(rtol, atol, max_steps)
    result = integrate(field, begin, math.log(sigma_min), math.log(sigma_max), control, norm=norm, split=split)
    latent = result.y[:, :dims].reshape(x.shape)
    gains = result.y[:, dims:]
    with torch.no_grad():
        at_end = normal_log_prob(latent, math.hypot(sigma_max, data_std)) if prior is None else prior(latent)
    if at_end.shape != (len(x),):
        raise ValueError(f"prior returned shape {tuple(at_end.shape)}; expected ({len(x)},): one log-density a sample")
    stderr = gains.std(1) / math.sqrt(probes) if probe is not None and probes > 1 else None
    return LogLikelihood(at_end + gains.mean(1), stderr, latent, counted.nfe)
