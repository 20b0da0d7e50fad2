"""Posterior samplers that are no scores: DPS's published rule, DDRM in singular coordinates, DAPS.

All norms are per sample. y may be one for all samples or one for each; then a request is not made in parts.

Chung et al., Diffusion Posterior Sampling, 2023, arXiv:2209.14687; Kawar et al., Denoising Diffusion Restoration
Models, 2022, arXiv:2201.11793; Zhang et al., Improving Diffusion Inverse Problem Solving with Decoupled Noise
Annealing, 2024, arXiv:2407.01521.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from scorelab.checks import broadcast
from scorelab.divergence import check_followed, kernels, leaf
from scorelab.inverse.measurement import Measurement, check_measurement, linear, noisy
from scorelab.inverse.operators import SVD, LinearOperator
from scorelab.processes import Process
from scorelab.samplers.base import Context, Sampler, State, Wrapper, check_sampler, evaluate
from scorelab.samplers.ode import Euler
from scorelab.samplers.stochastic import Ancestral
from scorelab.scores import Combined
from scorelab.sigmas import karras
from scorelab.typing import ScoreFn, Tensor

__all__ = ["DAPS", "DDRM", "DPS"]


class _Watched(Combined):
    """A score; its first evaluation also leaves ``slope``, the gradient of ||y - A(x0_hat)|| with respect to x."""

    def __init__(self, score: ScoreFn, measurement: Measurement) -> None:
        super().__init__(lambda x, sigma, s: s, (score,), None, True)
        self.measurement, self.slopes = measurement, []  # type: ignore[var-annotated]

    def outputs(self, x: Tensor, sigma: Tensor) -> tuple[Any, ...]:
        if self.slopes:
            return super().outputs(x, sigma)
        graph = torch.is_grad_enabled() and x.requires_grad
        with torch.enable_grad(), kernels(graph):
            inside = x if graph else leaf(x)
            (s,) = super().outputs(inside, sigma)
            check_followed(s, "score")
            residual = self.measurement.residual(inside + broadcast(sigma, inside) ** 2 * s)
            check_followed(residual, "operator")
            norms = residual.flatten(1).norm(dim=1).sum()
            self.slopes.append(torch.autograd.grad(norms, inside, create_graph=graph)[0])
        return (s if graph else s.detach(),)


@lru_cache(maxsize=8192)
def _alpha(process: Process | None, sigma: float) -> float:
    """The process's scale of the data where its noise level is sigma."""
    if process is None or sigma == 0:
        return 1 / math.hypot(1, sigma)
    return float(process.alpha(process.time(torch.tensor(sigma, dtype=torch.float64))))


@dataclass(frozen=True)
class DPS(Wrapper):
    """The published rule: after each step of ``inner``, x_s <- x_s - zeta grad ||y - A(x0_hat(x_t))||, in the process's
    scaled coordinates x_t = alpha_t x; here, unscaled, x <- x - zeta/(alpha_s alpha_t) grad ||y - A(x0_hat(x))||.

    It ignores the length of the step and noise_std, so its law depends on the number of steps: published for 1,000 of
    DDPM with zeta .3 for blur and super-resolution, .5 for inpainting, 1 for phase retrieval. Any operator. process:
    the scales alpha, by default a variance-preserving process's, 1/sqrt(1 + sigma^2). One backward pass a step, beside
    inner's evaluations. Norms are per sample where the release takes one over the batch.

    Raises ValueError for a zeta that is no finite number >= 0.
    """

    measurement: Measurement
    zeta: float = 0.5
    inner: Sampler = Ancestral()  # noqa: RUF009
    process: Process | None = None

    def __post_init__(self) -> None:
        check_measurement(self.measurement)
        if not 0 <= self.zeta < math.inf:
            raise ValueError(f"zeta is {self.zeta:g}; expected a finite number >= 0")
        check_sampler(self.inner, "inner")

    @property
    def order(self) -> int | None:  # type: ignore[override]
        """None: the rule is no solver's."""
        return None

    def init(self, x: Tensor, sigmas: list[float]) -> State:
        self.measurement.residual(x)
        return self.inner.init(x, sigmas)

    def step(self, at: Context) -> tuple[Tensor, State]:
        watched = _Watched(at.score, self.measurement)
        x, state = self.inner.step(at._replace(score=watched))
        share = self.zeta / (_alpha(self.process, at.sigma) * _alpha(self.process, at.sigma_next))
        return x.sub(watched.slopes[0], alpha=share), state


def _spectral(measurement: Measurement) -> SVD:
    """Its operator's singular values, refused where there are none."""
    svd = linear(measurement).svd
    if svd is None:
        raise ValueError(
            f"the operator, {type(measurement.operator).__name__}, has no singular values at hand; expected one with "
            "svd, such as Matrix, or moment_matching, DPS, or DAPS with steps"
        )
    return svd


@dataclass(frozen=True)
class DDRM(Sampler):
    """Denoising diffusion restoration: DDIM in the operator's singular coordinates, mixed with y where it is known.

    With q = noise_std/s, ybar = U'y/s, in the coordinates V'x from sigma to r:

        s = 0    x0_hat + sqrt(1 - eta^2) r eps_hat + eta r z
        q > r    x0_hat + sqrt(1 - eta^2) r (ybar - x0_hat)/q + eta r z
        q <= r   (1 - eta_b) x0_hat + eta_b ybar + sqrt(r^2 - eta_b^2 q^2) z

    One evaluation a step and no gradients, for operators with ``svd``; without noise A x = y holds exactly at the end.
    Defaults are the paper's. Raises ValueError for an eta outside [0, 1] or an operator without singular values.
    """

    measurement: Measurement
    eta: float = 0.85
    eta_b: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1 or not 0 <= self.eta_b <= 1:
            raise ValueError(f"eta = {self.eta:g}, eta_b = {self.eta_b:g}; expected numbers from 0 to 1")
        _spectral(self.measurement)

    def init(self, x: Tensor, sigmas: list[float]) -> State:
        self.measurement.residual(x)
        return None

    def step(self, at: Context) -> tuple[Tensor, State]:
        svd, noise_std, r = _spectral(self.measurement), self.measurement.noise_std, at.sigma_next
        x0_hat = at.x.add(evaluate(at.score, at.x, at.sigma), alpha=at.sigma**2)
        mean, along = svd.vt(x0_hat), svd.vt((at.x - x0_hat) / at.sigma)
        z = svd.vt(at.noise(at.x)) if r > 0 else torch.zeros_like(mean)
        keep = math.sqrt(1 - self.eta**2)
        free = mean + keep * r * along + self.eta * r * z
        y, s = svd.ut(self.measurement.y.to(at.x)), svd.s(mean)
        (part, _), (kick, _), (loose, rest) = (c.tensor_split((len(s),), 1) for c in (mean, z, free))
        # (ybar - x0_hat)/q without dividing by an s of 0
        pull = (y - s * part) / (noise_std if noise_std > 0 else 1.0)
        noisier = part + keep * r * pull + self.eta * r * kick
        inverse = 1 / torch.where(s > 0, s, 1.0)
        spread = (r**2 - (self.eta_b * noise_std * inverse) ** 2).clamp_min(0).sqrt()
        clearer = torch.lerp(part, y * inverse, self.eta_b) + spread * kick
        known = torch.where(noise_std * inverse > r, noisier, clearer)
        return svd.v(torch.cat([torch.where(s > 0, known, loose), rest], 1)), None


@dataclass(frozen=True)
class DAPS(Sampler):
    """Decoupled annealing: at each level x0 is drawn given x and y, and noised again to the next level.

    p(x0 | x) is taken for N(x0_hat, r^2 I), x0_hat from ``ode_steps`` steps of ``inner`` down to 0 (1: the denoised
    sample), r = sigma as published, or with ``data_std`` = s given r^2 = s^2 sigma^2/(s^2 + sigma^2), which with one
    step is exact for N(m, s^2 I). steps: Langevin steps, from a draw of that Gaussian, of ``step_size`` times the scale
    of the steepest direction, which takes the operator's ``lipschitz``; they leave up to 1/(1 - step_size/2) times the
    variance. None draws exactly, for operators with ``svd``. ode_steps evaluations a level; any operator, with steps.

    Raises ValueError for settings out of range, an operator without lipschitz or svd, or steps without noise.
    """

    measurement: Measurement
    data_std: float | None = None
    steps: int | None = None
    step_size: float = 0.1
    ode_steps: int = 1
    inner: Sampler = Euler()  # noqa: RUF009

    def __post_init__(self) -> None:
        if self.ode_steps < 1 or not (self.steps is None or self.steps >= 1) or not 0 < self.step_size < 2:
            raise ValueError(
                f"ode_steps = {self.ode_steps}, steps = {self.steps}, step_size = {self.step_size:g}; expected "
                "ode_steps and steps >= 1 and 0 < step_size < 2"
            )
        if self.data_std is not None and not 0 < self.data_std < math.inf:
            raise ValueError(f"data_std is {self.data_std:g}; expected a positive number, or None")
        if self.steps is None:
            _spectral(self.measurement)
        elif noisy(self.measurement) and self.measurement.operator.lipschitz is None:
            raise ValueError(
                f"the operator, {type(self.measurement.operator).__name__}, does not say how steep it is; expected one "
                "with lipschitz: set operator.lipschitz to a bound of ||A(x) - A(x')|| / ||x - x'||"
            )

    def init(self, x: Tensor, sigmas: list[float]) -> State:
        """The lowest positive level."""
        self.measurement.residual(x)
        return min(s for s in sigmas if s > 0)

    def step(self, at: Context) -> tuple[Tensor, State]:
        variance = at.sigma**2 if self.data_std is None else 1 / (at.sigma**-2 + self.data_std**-2)
        x0_hat = self._denoised(at)
        x0 = self._drawn(x0_hat, variance, at) if self.steps is None else self._walked(x0_hat, variance, at)
        return (x0.add(at.noise(x0), alpha=at.sigma_next) if at.sigma_next > 0 else x0), at.state

    def _denoised(self, at: Context) -> Tensor:
        """x0_hat by the inner sampler."""
        levels = [at.sigma, 0.0]
        if self.ode_steps > 1 and at.sigma > at.state:
            inside = karras(self.ode_steps, sigma_min=at.state, sigma_max=at.sigma).tolist()
            levels = [at.sigma, *inside[1:]]
        x, state = at.x, self.inner.init(at.x, levels)
        for a, b in zip(levels[:-1], levels[1:], strict=True):
            x, state = self.inner.step(at._replace(x=x, sigma=a, sigma_next=b, state=state))
        return x

    def _drawn(self, x0_hat: Tensor, variance: float, at: Context) -> Tensor:
        """x0 from N(x0_hat, variance I) given y, exactly."""
        svd, noise = _spectral(self.measurement), self.measurement.noise_std**2
        mean, z = svd.vt(x0_hat), svd.vt(at.noise(x0_hat))
        s = svd.s(mean)
        y = svd.ut(self.measurement.y.to(x0_hat))
        (part, free), (kick, other) = (c.tensor_split((len(s),), 1) for c in (mean, z))
        size = variance * s**2 + noise
        size = torch.where(size > 0, size, 1.0)
        left = torch.where(s > 0, variance * noise / size, variance)
        known = part + variance * s / size * (y - s * part) + left.sqrt() * kick
        return svd.v(torch.cat([known, free + math.sqrt(variance) * other], 1))

    def _walked(self, x0_hat: Tensor, variance: float, at: Context) -> Tensor:
        """x0 by Langevin steps."""
        assert self.steps is not None
        noise, steep = self.measurement.noise_std**2, self.measurement.operator.lipschitz
        assert steep is not None
        size = self.step_size / (1 / variance + steep**2 / noise)
        # directions that y says nothing of have their law from the start
        x0 = x0_hat.add(at.noise(x0_hat), alpha=math.sqrt(variance))
        for _ in range(self.steps):
            slope = (x0_hat - x0) / variance + self._slope(x0)
            x0 = x0.add(slope, alpha=size).add_(at.noise(x0), alpha=math.sqrt(2 * size))
        return x0

    def _slope(self, x0: Tensor) -> Tensor:
        """grad log p(y | x0)."""
        operator, noise = self.measurement.operator, self.measurement.noise_std**2
        if isinstance(operator, LinearOperator):
            return operator.adjoint(self.measurement.residual(x0)) / noise
        graph = torch.is_grad_enabled() and x0.requires_grad
        with torch.enable_grad():
            x0 = x0 if graph else leaf(x0)
            value = self.measurement.log_likelihood(x0).sum()
            return torch.autograd.grad(value, x0, create_graph=graph)[0]
