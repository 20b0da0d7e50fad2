"""Posterior scores: score(x, sigma) + grad_x log p(y | x), with the likelihood at a noise level approximated.

With x0_hat(x) = x + sigma^2 score and J = d x0_hat / dx, p(y | x) is the mean of p(y | x0) over p(x0 | x), of which

    dps                the point x0_hat                       J' A' (y - A x0_hat) / noise_std^2
    pseudo_inverse     N(x0_hat, r^2 I)                       J' A' (r^2 A A' + noise_std^2 I)^-1 (y - A x0_hat)
    moment_matching    N(x0_hat, sigma^2 J), Tweedie's        J' A' (sigma^2 A J A' + noise_std^2 I)^-1 (y - A x0_hat)

stand for p(x0 | x). r^2 = s^2 sigma^2 / (s^2 + sigma^2) is exact for N(m, s^2 I), moment matching on any Gaussian; of
other data all three are approximations, for the covariance's own derivative is left out and p(x0 | x) is no Gaussian.
dps, without the covariance, overstates the likelihood where sigma is large.

Chung et al., Diffusion Posterior Sampling, 2023, arXiv:2209.14687; Song et al., Pseudoinverse-Guided Diffusion Models,
2023 (ICLR); Rozet et al., Learning Diffusion Priors from Observations by Expectation Maximization, 2024,
arXiv:2405.13712, whose Jacobian products these are; Boys et al., 2023, arXiv:2310.06721.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from scorelab.checks import broadcast, level_of
from scorelab.divergence import check_followed, kernels, leaf
from scorelab.inverse.measurement import Measurement, linear, noisy
from scorelab.inverse.solvers import conjugate_gradients, gmres
from scorelab.scores import Combined
from scorelab.typing import ScoreFn, Tensor

__all__ = ["dps", "moment_matching", "plug_in", "pseudo_inverse"]

LogLikelihood = Callable[[Tensor], Tensor]


class Denoised:
    """x0_hat (B, *D) of x at noise levels sigma, () or (B,), with products of its Jacobian J = I + sigma^2 H.

    ``graph``: products can be differentiated again.
    """

    def __init__(self, score: Tensor, x: Tensor, sigma: Tensor, graph: bool) -> None:
        check_followed(score, "score")
        self.x, self.sigma, self.graph = x, sigma, graph
        self.x0_hat = x + broadcast(sigma, x) ** 2 * score

    @property
    def value(self) -> Tensor:
        """x0_hat, without its graph unless that is asked for."""
        return self.x0_hat if self.graph else self.x0_hat.detach()

    def vjp(self, v: Tensor) -> Tensor:
        """J' v."""
        found = torch.autograd.grad(self.x0_hat, self.x, v, retain_graph=True, create_graph=self.graph)[0]
        # x may be in half precision, x0_hat is not
        return found.to(v.dtype)

    def jvp(self, v: Tensor) -> Tensor:
        """J v: J' w is linear in w, and its adjoint is J."""
        with torch.enable_grad():
            w = torch.zeros_like(self.x0_hat, requires_grad=True)
            back = torch.autograd.grad(self.x0_hat, self.x, w, create_graph=True)[0]
            return torch.autograd.grad(back, w, v.to(back.dtype), retain_graph=True, create_graph=self.graph)[0]


class Posterior(Combined):
    """Base of the posterior scores: one score, differentiated, plus ``likelihood`` of its denoised sample.

    ``twice``: whether the likelihood differentiates it twice.
    """

    twice = False

    def __init__(self, score: ScoreFn, scale: float) -> None:
        super().__init__(lambda x, sigma, s, g: s + g, (score,), None, True)
        if not math.isfinite(scale):
            raise ValueError(f"scale is {scale}; expected a finite number: 1 is the posterior")
        self.scale = float(scale)

    @abstractmethod
    def likelihood(self, at: Denoised) -> Tensor:
        """grad_x log p(y | x), (B, *D)."""

    def outputs(self, x: Tensor, sigma: Tensor) -> tuple[Any, ...]:
        graph = torch.is_grad_enabled() and x.requires_grad
        with torch.enable_grad(), kernels(graph or self.twice):
            inside = x if graph else leaf(x)
            (s,) = super().outputs(inside, sigma)
            at = Denoised(s, inside, sigma, graph)
        with torch.set_grad_enabled(graph):
            g = self.likelihood(at)
        return (s if graph else s.detach()), self.scale * g


class _PlugIn(Posterior):
    """``plug_in``'s."""

    def __init__(self, score: ScoreFn, log_likelihood: LogLikelihood, scale: float) -> None:
        super().__init__(score, scale)
        if not callable(log_likelihood):
            raise TypeError(f"log_likelihood is {log_likelihood!r}; expected a function of x0_hat (B, *D) to (B,)")
        self.log_likelihood = log_likelihood

    def likelihood(self, at: Denoised) -> Tensor:
        return _slope(at, self.log_likelihood)

    def _rows(self, index: Tensor) -> Combined:
        made = super()._rows(index)
        assert isinstance(made, _PlugIn)
        if (rows := getattr(self.log_likelihood, "rows", None)) is not None:
            made.log_likelihood = rows(index)
        return made


def _slope(at: Denoised, log_likelihood: LogLikelihood) -> Tensor:
    """grad_x log_likelihood(x0_hat)."""
    with torch.enable_grad():
        x0_hat = at.x0_hat if at.graph else at.value.requires_grad_(True)
        value = log_likelihood(x0_hat)
        if not isinstance(value, Tensor) or value.shape != (len(x0_hat),):
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"log_likelihood returned {got}; expected ({len(x0_hat)},): one a sample")
        check_followed(value, "log_likelihood")
        slope = torch.autograd.grad(value.sum(), x0_hat, create_graph=at.graph)[0]
    return at.vjp(slope)


class _Measured(Posterior):
    """A posterior of a measurement, restricted to rows with it."""

    def __init__(self, score: ScoreFn, measurement: Measurement, scale: float) -> None:
        super().__init__(score, scale)
        self.measurement = measurement

    def scales(self, sigma: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """sigma for each row, and the larger of it and noise_std, (B, 1): the likelihood is solved in units of that,
        for squares may be beyond float32, and sigma may be 0 where there is noise. ValueError where both are."""
        noise_std = self.measurement.noise_std
        if noise_std == 0 and level_of(sigma) == 0:
            raise ValueError(
                "sigma is 0, and so is noise_std, where the posterior has no density and no score; expected a positive "
                "noise level: samplers end at 0 without evaluating there"
            )
        sigma = sigma.to(residual).expand(len(residual)).unsqueeze(1)
        return sigma, sigma.clamp_min(noise_std)

    def _rows(self, index: Tensor) -> Combined:
        made = super()._rows(index)
        assert isinstance(made, _Measured)
        made.measurement = self.measurement.rows(index)
        return made


class _DPS(_Measured):
    """``dps``'s."""

    def likelihood(self, at: Denoised) -> Tensor:
        return _slope(at, self.measurement.log_likelihood)


class _PseudoInverse(_Measured):
    """``pseudo_inverse``'s."""

    def __init__(self, score: ScoreFn, measurement: Measurement, data_std: float, adaptive: bool, scale: float) -> None:
        super().__init__(score, measurement, scale)
        self.operator, self.data_std, self.adaptive = linear(measurement), data_std, adaptive

    def likelihood(self, at: Denoised) -> Tensor:
        residual = self.measurement.residual(at.value)
        sigma, unit = self.scales(at.sigma, residual)
        # ratio = r^2 / unit^2
        ratio = (sigma / unit) ** 2 * self.data_std**2 / (self.data_std**2 + sigma**2)
        found = at.vjp(self._pulled(residual, ratio, (self.measurement.noise_std / unit) ** 2))
        return found * broadcast((ratio if self.adaptive else unit**-2).squeeze(1), found)

    def _pulled(self, residual: Tensor, ratio: Tensor, noise: Tensor) -> Tensor:
        """A' (ratio A A' + noise I)^-1 residual; ratio and noise (B, 1)."""
        if (svd := self.operator.svd) is not None:
            c = svd.ut(residual)
            s = svd.s(c)
            size = ratio * s**2 + noise
            return svd.v(torch.where(size > 0, s / torch.where(size > 0, size, 1.0), 0.0) * c)
        flat = residual.flatten(1)

        def apply(z: Tensor) -> Tensor:
            image = self.operator(self.operator.adjoint(z.reshape_as(residual)))
            return ratio * image.flatten(1) + noise * z

        tol = 1e-6 if flat.dtype == torch.float32 else 1e-10
        return self.operator.adjoint(conjugate_gradients(apply, flat, tol, 1000).reshape_as(residual))


class _MomentMatching(_Measured):
    """``moment_matching``'s."""

    def __init__(
        self,
        score: ScoreFn,
        measurement: Measurement,
        solver: str,
        symmetrise: bool,
        tol: float,
        iterations: int,
        scale: float,
    ) -> None:
        super().__init__(score, measurement, scale)
        self.operator, self.tol, self.iterations = linear(measurement), tol, iterations
        self.twice = symmetrise
        self.solve = {"cg": conjugate_gradients, "gmres": gmres}[solver]

    def likelihood(self, at: Denoised) -> Tensor:
        residual = self.measurement.residual(at.value)
        sigma, unit = self.scales(at.sigma, residual)
        share, noise = (sigma / unit) ** 2, (self.measurement.noise_std / unit) ** 2

        def covariance(v: Tensor) -> Tensor:
            return 0.5 * (at.vjp(v) + at.jvp(v)) if self.twice else at.vjp(v)

        least = torch.zeros((), dtype=residual.dtype, device=residual.device)

        def apply(z: Tensor) -> Tensor:
            nonlocal least
            image = self.operator(covariance(self.operator.adjoint(z.reshape_as(residual)))).flatten(1)
            found = share * image + noise * z
            size = (z.norm(dim=1) * found.norm(dim=1)).clamp_min(torch.finfo(z.dtype).tiny)
            # of the solver's own directions, which costs no evaluation; as a cosine, so without units
            least = torch.minimum(least, ((z * found).sum(1) / size).detach().amin())
            return found

        z = self.solve(apply, residual.flatten(1), self.tol, self.iterations).reshape_as(residual)
        # well beyond what rounding makes of 0
        if float(least) < -1e-3:
            warnings.warn(
                "the score's Jacobian gives y negative variances, which no covariance does: moment_matching's samples "
                "may be no posterior's; expected a score that is nearer to exact, or take pseudo_inverse, DDRM or DAPS",
                RuntimeWarning,
                stacklevel=2,
            )
        found = at.vjp(self.operator.adjoint(z))
        return found / broadcast(unit.squeeze(1), found) ** 2


def plug_in(score: ScoreFn, log_likelihood: LogLikelihood, scale: float = 1.0) -> ScoreFn:
    """The score plus the gradient of scale log_likelihood(x0_hat(x)), any differentiable function of x0_hat to (B,).

    In nats; a classifier's log-probability of clean data, a measurement's ``log_likelihood``. One evaluation and one
    backward pass. Where the score is restricted to rows, so is a function with ``rows(index)``; one that is bound to
    the rows of a batch without it needs batches that are never split. Raises TypeError for what is not callable,
    ValueError for another shape than (B,).
    """
    return _PlugIn(score, log_likelihood, scale)


def dps(score: ScoreFn, measurement: Measurement, scale: float = 1.0) -> ScoreFn:
    """Diffusion posterior sampling as a score: score - scale grad ||y - A(x0_hat)||^2 / (2 noise_std^2).

    Any operator; for the published rule, which is no score, see ``DPS``. ValueError for a noise_std of 0.
    """
    noisy(measurement)
    return _DPS(score, measurement, scale)


def pseudo_inverse(
    score: ScoreFn, measurement: Measurement, data_std: float, *, adaptive: bool = False, scale: float = 1.0
) -> ScoreFn:
    """Pseudo-inverse guidance for a linear operator; exact for data N(m, data_std^2 I), with noise or without.

    data_std: s, of the data in each dimension; the paper's r^2 = sigma^2 / (1 + sigma^2) is s = 1. adaptive: the
    release's weighting, the likelihood's score times r^2. Operators without singular values are solved by conjugate
    gradients. Raises TypeError for an operator that is not linear, ValueError for a data_std that is not positive.
    """
    if not 0 < data_std < math.inf:
        raise ValueError(f"data_std is {data_std:g}; expected the data's standard deviation, a positive number")
    return _PseudoInverse(score, measurement, data_std, adaptive, scale)


def moment_matching(
    score: ScoreFn,
    measurement: Measurement,
    *,
    solver: str = "cg",
    symmetrise: bool = False,
    tol: float = 1e-6,
    iterations: int = 200,
    scale: float = 1.0,
) -> ScoreFn:
    """Moment matching with Tweedie's covariance sigma^2 J, for a linear operator; exact where the data is Gaussian.

    Its system, of y's size, is solved until the residual is ``tol`` of y - A x0_hat's, one product with J' and one
    backward pass an iteration; a RuntimeWarning says where ``iterations`` did not suffice. The true J is symmetric and
    positive; a network's is neither, and a RuntimeWarning says where that leaves y with a negative variance. solver:
    "cg", conjugate gradients, or "gmres", which solves the system with the network's J' as it is. symmetrise:
    (J + J')/2 instead, at three times the cost.

    Raises TypeError for an operator that is not linear, ValueError for another solver, tol or iterations.
    """
    if solver not in ("cg", "gmres"):
        raise ValueError(f"solver is {solver!r}; expected 'cg' or 'gmres'")
    if not 0 < tol < 1 or iterations < 1:
        raise ValueError(f"tol = {tol:g}, iterations = {iterations}; expected 0 < tol < 1 and iterations >= 1")
    return _MomentMatching(score, measurement, solver, symmetrise, tol, iterations, scale)
