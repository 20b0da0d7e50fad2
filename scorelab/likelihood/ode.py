"""Log-densities by the instantaneous change of variables along the probability-flow ODE (unscaled):

    log p(x; sigma_min) = log prior(x(sigma_max)) - int_{sigma_min}^{sigma_max} sigma tr(grad score) dsigma
                        = log prior(x(sigma_max)) - int sigma^2 tr(grad score) dlog(sigma)

Chen et al., Neural Ordinary Differential Equations, 2018, arXiv:1806.07366; Grathwohl et al., FFJORD, 2019,
arXiv:1810.01367; Song et al., 2021, arXiv:2011.13456.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from scorelab import divergence as traces
from scorelab.checks import broadcast, check_batch, check_finite, level
from scorelab.noise import fresh_generator
from scorelab.samplers.adaptive import Controller, check_broadcasting, integrate
from scorelab.samplers.base import Counted
from scorelab.scores import can_split, check_known, data_mean, restricted
from scorelab.typing import ScoreFn, Tensor

__all__ = ["LogLikelihood", "log_likelihood", "normal_log_prob", "sample_log_prob"]


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


def _velocity(score: ScoreFn, sigma: Tensor) -> Callable[[Tensor], Tensor]:
    """dx/dlog(sigma) of x at the noise levels sigma (B,)."""
    return lambda x: -score(x, sigma) * broadcast(sigma, x) ** 2


class _Flow:
    """The ODE of x together with the trace along it: columns of y are x, flattened, and one for each estimate."""

    def __init__(self, score: ScoreFn, x: Tensor, probes: dict[str, Tensor], differentiable: bool) -> None:
        self.score, self.shape, self.dims, self.count = score, x.shape[1:], x[0].numel(), len(x)
        self.probes, self.differentiable = probes, differentiable
        self.split = can_split(score)

    @property
    def estimates(self) -> int:
        """Estimates of the trace that are carried along."""
        return next((len(self.probes[name]) for name in ("probes", "outside") if name in self.probes), 1)

    def __call__(self, y: Tensor, u: Tensor, index: Tensor) -> Tensor:
        part = restricted(self.score, index) if self.split and len(index) < self.count else self.score
        assert part is not None
        velocity = _velocity(part, u.exp())
        point = y[:, : self.dims].reshape(-1, *self.shape)
        mine = {name: probe[:, index] for name, probe in self.probes.items()}
        if not mine:
            slope, trace = traces.exact(velocity, point, create_graph=self.differentiable)
            columns = trace.unsqueeze(1)
        else:
            estimate = traces.hutchpp if "inside" in mine else traces.hutchinson
            slope, _, single = estimate(velocity, point, create_graph=self.differentiable, **mine)
            columns = single.T
        # along the flow d log p / du = -div(dx/du), so what must be added to the prior is +div
        return torch.cat([slope.flatten(1), columns], 1)

    def norm(self, error: Tensor) -> Tensor:
        """The larger of the errors of x (root mean square) and of log p."""
        return torch.maximum(error[:, : self.dims].square().mean(1).sqrt(), error[:, self.dims :].mean(1).abs())


_MANY = 500
"""Dimensions above which an exact trace is warned of."""


def _draw(divergence: str, probes: int, kind: str, x: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
    """The probes of a solve, fixed over it; none for the exact trace."""
    if divergence not in ("exact", "hutchinson", "hutch++"):
        raise ValueError(f"divergence is {divergence!r}; expected 'exact', 'hutchinson' or 'hutch++'")
    if divergence == "exact" and (dims := x.shape[1:].numel()) > _MANY:
        warnings.warn(
            f"an exact trace of {dims} dimensions takes as many derivatives an evaluation; divergence='hutchinson' "
            "estimates it by one, with its error",
            RuntimeWarning,
            stacklevel=3,
        )
    # of Hutch++'s, two thirds are for the rest, which says the error
    least = 4 if divergence == "hutch++" else 1
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is {type(generator).__name__}; expected a torch.Generator for the probes")
    if probes < least:
        raise ValueError(f"probes is {probes}; expected at least {least} for {divergence}")
    if kind not in ("rademacher", "gaussian"):
        raise ValueError(f"probe is {kind!r}; expected 'rademacher' or 'gaussian'")
    dims = x[0].numel() if len(x) else 1
    # Hutch++'s with one for each dimension span x, where the trace itself takes as many products
    if divergence == "exact" or (divergence == "hutch++" and probes >= dims):
        return {}
    generator = fresh_generator() if generator is None else generator
    if divergence == "hutchinson":
        return {"probes": traces.probes(kind, (probes, *x.shape), x, generator)}
    third = probes // 3
    return {
        "sketch": traces.probes(kind, (third, *x.shape), x, generator),
        "gaussian": traces.probes("gaussian", (probes - third, *x.shape), x, generator),
    }


def check_density_batch(x: Tensor, what: str = "x") -> None:
    """Refuse what has no density worth the name: no batch, half precision, NaN."""
    check_batch(x, what)
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{what} has dtype {x.dtype}; expected float32 or float64: a density in half precision is off by nats"
        )
    check_finite(x, what)


def _check(score: ScoreFn, x: Tensor, sigma_min: float, sigma_max: float) -> None:
    check_density_batch(x)
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min = {sigma_min:g}, sigma_max = {sigma_max:g}; expected 0 < sigma_min < sigma_max")
    check_known(score, sigma_min, sigma_max)


def _check_autograd(score: ScoreFn, x: Tensor, sigma: float) -> None:
    """Refuse a score that changes with x but gives autograd no way to see it: its trace would silently be 0."""
    sigmas = level(sigma, x).repeat(len(x))
    with torch.enable_grad():
        if score(x.detach().requires_grad_(True), sigmas).requires_grad:
            return
    with torch.no_grad():
        moved = score(x + sigma, sigmas).clone()
        if not torch.equal(moved, score(x, sigmas)):
            raise ValueError(
                "the score changes with x but its output carries no gradient, and the log-density needs its trace; "
                "expected a score that autograd can follow: no torch.no_grad, inference_mode, detach or NumPy inside, "
                "and create_graph=True where it differentiates itself"
            )


def _prior(prior: Callable[[Tensor], Tensor] | None, x: Tensor, std: float, score: ScoreFn) -> Tensor:
    """The log-density at sigma_max (B,), checked."""
    found = normal_log_prob(x - data_mean(score, x), std) if prior is None else prior(x)
    if found.shape != (len(x),):
        raise ValueError(f"prior returned shape {tuple(found.shape)}; expected ({len(x)},): one log-density a sample")
    return found


def _transport(
    score: ScoreFn,
    x: Tensor,
    begin: float,
    end: float,
    drawn: dict[str, Tensor],
    control: Controller,
    differentiable: bool,
) -> tuple[Tensor, Tensor, int]:
    """x carried from one noise level to another, the integral of tr(d(dx/du)/dx) du of each estimate, and NFE."""
    if len(x) == 0:
        return x, x.new_zeros(0, 1), 0
    counted = Counted(score)
    with torch.no_grad():
        check_broadcasting(counted, x, begin, math.sqrt(begin * end))
    _check_autograd(counted, x, begin)
    if "sketch" in drawn:
        inside, outside = traces.split(_velocity(counted, level(begin, x).repeat(len(x))), x, **drawn)
        drawn = {"inside": inside, "outside": outside}
    flow = _Flow(counted, x, drawn, differentiable)
    with torch.enable_grad() if differentiable else torch.no_grad():
        start = torch.cat([x.flatten(1), x.new_zeros(len(x), flow.estimates)], 1)
        y = integrate(flow, start, math.log(begin), math.log(end), control, norm=flow.norm, split=flow.split).y
        return y[:, : flow.dims].reshape(x.shape), y[:, flow.dims :], counted.nfe


def _stderr(estimates: Tensor) -> Tensor | None:
    """Standard error of the mean over the columns of (B, P), None for one."""
    count = estimates.shape[1]
    return estimates.detach().std(1) / math.sqrt(count) if count > 1 else None


def log_likelihood(
    score: ScoreFn,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    *,
    prior: Callable[[Tensor], Tensor] | None = None,
    divergence: str = "exact",
    probes: int = 1,
    probe: str = "rademacher",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    data_std: float = 0.0,
    max_steps: int = 1000,
    method: str = "dopri5",
    differentiable: bool = False,
    generator: torch.Generator | None = None,
) -> LogLikelihood:
    """log p(x; sigma_min) in nats for x (B, *D): the density of data blurred by sigma_min.

    prior: log-density (B,) at sigma_max, unscaled; by default N(m, (sigma_max^2 + data_std^2) I), exact only as
    sigma_max grows. divergence: "exact" (one backward pass a dimension), "hutchinson" or "hutch++" with ``probes``
    backward passes of kind ``probe``, "rademacher" or "gaussian"; probes are fixed over the solve and the estimate is
    unbiased. Hutch++ is for Jacobians of fast falling spectrum, and exact from one probe a dimension on. rtol, atol:
    tolerance per sample, for x and for log p alike. method: "dopri5" or "bosh3". differentiable:
    keep the graph, for gradients by x and by the score's parameters.

    Raises ValueError for shapes or levels that don't fit or a score that is not finite, RuntimeError past max_steps.
    """
    _check(score, x, sigma_min, sigma_max)
    drawn = _draw(divergence, probes, probe, x, generator)
    control = Controller(rtol, atol, max_steps, method)
    latent, gains, nfe = _transport(score, x, sigma_min, sigma_max, drawn, control, differentiable)
    with torch.enable_grad() if differentiable else torch.no_grad():
        log_prob = _prior(prior, latent, math.hypot(sigma_max, data_std), score) + gains.mean(1)
    return LogLikelihood(log_prob, _stderr(gains), latent, nfe)


def sample_log_prob(
    score: ScoreFn,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    *,
    prior: Callable[[Tensor], Tensor] | None = None,
    divergence: str = "exact",
    probes: int = 1,
    probe: str = "rademacher",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    data_std: float = 0.0,
    max_steps: int = 1000,
    method: str = "dopri5",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, LogLikelihood]:
    """Samples (B, *D) at sigma_min and log p(.; sigma_min) of each, in one solve from x (B, *D) at sigma_max.

    Arguments and errors are those of ``log_likelihood``; ``latent`` of the result is x itself.
    """
    _check(score, x, sigma_min, sigma_max)
    drawn = _draw(divergence, probes, probe, x, generator)
    control = Controller(rtol, atol, max_steps, method)
    y, losses, nfe = _transport(score, x, sigma_max, sigma_min, drawn, control, False)
    with torch.no_grad():
        log_prob = _prior(prior, x, math.hypot(sigma_max, data_std), score) - losses.mean(1)
    return y, LogLikelihood(log_prob, _stderr(losses), x, nfe)
