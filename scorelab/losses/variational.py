"""The variational bound as a loss: of a score, and with it of the variance of DDPM's steps, or of VDM's schedule.

With x at step i of T, error = sigma score + eps, and a step's variance between those of the process,

    log s^2 = v log(forward) + (1 - v) log(posterior),     v the network's, 0 to 1

the bound's term of the step is, in unscaled coordinates and averaged over dimensions, in bits,

    i > 1   KL(N(0, posterior) || N((sigma^2 - r^2) error / sigma, s^2)),   r the level of step i - 1
    i = 1   -log of the mass that N(x0 + sigma error, s^2) has in the bin of x0, or of its density at x0

and T times its mean over the steps is the bound, but for the constant L_T.

    Bound     T term_i                                    step i with probability p_i, weighed by 1 / (T p_i)
    Hybrid    mean of error^2 + 1e-3 T term_i             the mean in the term held fixed, so that it learns v alone

Nichol and Dhariwal, Improved Denoising Diffusion Probabilistic Models, 2021, arXiv:2102.09672.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from scorelab.checks import broadcast, widened
from scorelab.losses.base import Objective, conditioned
from scorelab.processes import DiscreteVP, Learned, Process, step_variances
from scorelab.tables import Table
from scorelab.typing import Batch, Tensor

__all__ = ["Bins", "Bound", "ContinuousBound", "Hybrid", "gaussian_kl", "log_bin_mass", "log_density"]


class Bins(NamedTuple):
    """Where the values of data lie inside: ``spacing`` apart, from ``low`` to ``high``."""

    spacing: float
    low: float
    high: float

    def log_mass(self, x0: Tensor, mean: Tensor, std: Tensor | float) -> Tensor:
        """log of what N(mean, std^2) has in x0's bins, of which the first and the last are open."""
        below, above = x0 <= self.low + 0.25 * self.spacing, x0 >= self.high - 0.25 * self.spacing
        return log_bin_mass(x0 - mean, std, self.spacing, below, above)


def gaussian_kl(difference: Tensor, std: Tensor | float, other: Tensor | float) -> Tensor:
    """KL(N(m, std^2) || N(m + difference, other^2)) in nats for every number."""
    ratio = std / other
    # r - 1 - log r of the ratio of variances, by u = log r: right for ratios of any size
    if isinstance(ratio, Tensor):
        u = 2 * ratio.log()
        excess: Tensor | float = torch.expm1(u) - u
    else:
        excess = math.expm1(2 * math.log(ratio)) - 2 * math.log(ratio)
    return 0.5 * (excess + (difference / other).square())


def log_bin_mass(gap: Tensor, std: Tensor | float, spacing: float, below: Tensor, above: Tensor) -> Tensor:
    """log of the mass of N(0, std^2) within half a ``spacing`` of ``gap``; of all below or above it where so marked.

    In single precision a digit is lost for every factor of ten by which std exceeds the spacing.
    """
    upper = torch.where(above, math.inf, (gap + 0.5 * spacing) / std)
    lower = torch.where(below, -math.inf, (gap - 0.5 * spacing) / std)
    # mirrored to the left tail, where logarithms of the distribution function keep their digits
    mirrored = lower > 0
    upper, lower = torch.where(mirrored, -lower, upper), torch.where(mirrored, -upper, lower)
    most, least = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    mass: Tensor = most + torch.log1p(-torch.exp(least - most))
    return mass


def log_density(gap: Tensor, std: Tensor) -> Tensor:
    """log N(gap; 0, std^2) for every number."""
    return -0.5 * (gap / std).square() - std.log() - 0.5 * math.log(2 * math.pi)


class _Steps(Objective):
    """Terms of the bound at steps 1 to T of DDPM's process, in bits a dimension."""

    learns_variance = True

    def __init__(self, process: Process, bins: Bins | None = None) -> None:
        if not isinstance(process, DiscreteVP):
            raise ValueError(
                f"the variance of steps is learned of a process of steps, and the process is {type(process).__name__}; "
                "expected process.name='ddpm' or 'ddpm_cosine'"
            )
        self.process, self.bins, self.steps = process, bins, process.steps
        sigma = process.step_sigmas
        r = torch.cat([torch.zeros(1, dtype=sigma.dtype), sigma[:-1]])
        posterior, forward = step_variances(sigma, r)
        # that of the first step is 0: the release takes the second's, of scaled x
        posterior[0] = posterior[1] / (1 + sigma[0] ** 2) if self.steps > 1 else forward[0]
        self._sigma, self._reach = Table(sigma), Table((sigma - r) * (sigma + r) / sigma)
        self._posterior, self._forward = Table(posterior.log()), Table(forward.log())

    def index(self, u: Tensor) -> Tensor:
        """The steps (B,), 0 to T - 1, of u (B,): from the noisiest on, each as often."""
        return self.steps - 1 - (u * self.steps).long().clamp(0, self.steps - 1)

    def levels(self, u: Tensor) -> Tensor:
        return self._sigma.like(u).take(self.index(u))

    def zero(self, batch: Batch, u: Tensor, noise: Tensor) -> Tensor:
        """Those of a score that is 0, with a variance in the middle of its bounds."""
        middle: Any = lambda x, *_, **__: (torch.zeros_like(x), torch.full_like(x, 0.5))  # noqa: E731
        return self.losses(middle, batch, u, noise)

    def _errors(self, score: Callable[..., Any], batch: Batch, u: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """sigma score + eps, and v, both (B, *D)."""
        sigma = self.levels(u).to(widened(batch.x0))
        level = broadcast(sigma, batch.x0)
        given = ((batch.x0 + level * noise).to(batch.x0.dtype), sigma)
        given = given if batch.condition is None else (*given, batch.condition)  # type: ignore[assignment]
        found = score(*given, variance=True)
        if not (isinstance(found, tuple) and len(found) == 2):
            raise TypeError(
                "this objective learns a variance; expected a score that returns (score, v) for variance=True"
            )
        return level * found[0] + noise, found[1]

    def _terms(self, x0: Tensor, u: Tensor, error: Tensor, v: Tensor) -> Tensor:
        """The bound's term of each sample's step in bits, (B,), averaged over dimensions."""
        index = self.index(u)

        def at(table: Table) -> Tensor:
            return broadcast(table.like(u).take(index).to(error), error)

        posterior, width = at(self._posterior), at(self._forward) - at(self._posterior)
        std = torch.exp(0.5 * (posterior + v * width))
        divergence = gaussian_kl(at(self._reach) * error, torch.exp(0.5 * posterior), std)
        first = broadcast((index == 0).to(error), error) > 0
        # elsewhere numbers that give no infinite gradient
        gap, own = torch.where(first, at(self._sigma) * error, 0.0), torch.where(first, std, 1.0)
        decoder = -log_density(gap, own) if self.bins is None else -self.bins.log_mass(x0, x0 + gap, own)
        return torch.where(first, decoder, divergence).flatten(1).mean(1) / math.log(2)


class Hybrid(_Steps):
    """The eps-MSE, and the bound times ``bound`` in which the mean is held fixed: what it learns of the bound is the
    variance. bins: where the values of data lie, None for continuous data.

    Raises ValueError for a process that has no steps.
    """

    def __init__(self, process: Process, bins: Bins | None = None, bound: float = 1e-3) -> None:
        super().__init__(process, bins)
        if not 0 <= bound < math.inf:
            raise ValueError(f"bound is {bound:g}; expected the weight of the bound, 1e-3 in the paper")
        self.bound = bound

    def losses(self, score: Callable[..., Any], batch: Batch, u: Tensor, noise: Tensor) -> Tensor:
        error, v = self._errors(score, batch, u, noise)
        term = self._terms(batch.x0, u, error.detach(), v)
        return error.flatten(1).square().mean(1) + self.bound * self.steps * term


class Bound(_Steps):
    """The bound itself, in bits a dimension but for L_T. With ``importance`` a step is visited as often as the root of
    the mean square of its last ``history`` losses, from when each of them has as many; a thousandth is uniform.
    """

    def __init__(self, process: Process, bins: Bins | None = None, importance: bool = True, history: int = 10) -> None:
        super().__init__(process, bins)
        if history < 1:
            raise ValueError(f"history is {history}; expected 1 or more losses of a step to go by")
        self.importance = importance
        self._seen = torch.zeros(self.steps, history, dtype=torch.float64)
        self._count = torch.zeros(self.steps, dtype=torch.long)
        self._probabilities()

    def _probabilities(self) -> None:
        p = torch.full((self.steps,), 1 / self.steps, dtype=torch.float64)
        if self.importance and bool((self._count >= self._seen.shape[1]).all()):
            root = self._seen.square().mean(1).sqrt()
            # of losses that are all 0 none counts for more
            p = 0.999 * root / root.sum() + 0.001 * p if root.any() else p
        # from the noisiest step on, as u goes
        self._p, self._ends = Table(p), Table(p.flip(0).cumsum(0))

    def index(self, u: Tensor) -> Tensor:
        ends = self._ends.like(u)
        return self.steps - 1 - torch.searchsorted(ends, u.contiguous()).clamp_max(self.steps - 1)

    def losses(self, score: Callable[..., Any], batch: Batch, u: Tensor, noise: Tensor) -> Tensor:
        error, v = self._errors(score, batch, u, noise)
        return self._terms(batch.x0, u, error, v) / self._p.like(u).take(self.index(u)).to(error)

    @property
    def observes(self) -> bool:  # type: ignore[override]
        """Whether steps are chosen by their losses."""
        return self.importance

    def observe(self, u: Tensor, losses: Tensor) -> None:
        index = self.index(u.cpu())
        terms = losses.double().cpu() * self._p.like(u.cpu()).double()[index]
        for step, term in zip(index.tolist(), terms.tolist(), strict=True):
            self._seen[step, self._count[step] % self._seen.shape[1]] = term
            self._count[step] += 1
        self._probabilities()

    def state(self) -> dict[str, Tensor]:
        return {"seen": self._seen.clone(), "count": self._count.clone()}

    def restore(self, state: dict[str, Tensor]) -> None:
        there, here = tuple(state["seen"].shape), tuple(self._seen.shape)
        if there != here:
            raise ValueError(
                f"the checkpoint holds {there[1]} losses of each of {there[0]} steps, and the objective takes "
                f"{here[1]} of {here[0]}; expected process.steps and training.objective.history as they were"
            )
        self._seen.copy_(state["seen"])
        self._count.copy_(state["count"])
        self._probabilities()


class ContinuousBound(Objective):
    """VDM's bound in continuous time, in bits a dimension: with gamma = log sigma^2,

        1/2 gamma'(t) ||sigma score + eps||^2 + KL(N(x0, sigma_1^2) || N(0, sigma_1^2 + s^2)) - log p(x0 | z_0)

    summed over dimensions, where z_0 = x0 + sigma_0 eps_0, and p(x0 | z_0) is a softmax over the values of data of
    -(z_0 - value)^2 / (2 sigma_0^2), or for continuous data N(z_0, sigma_0^2). s: 1, of a process whose largest noise
    is scaled to N(0, 1), else ``sigma_data``.

    Of a ``Learned`` process the ends learn from the bound, which depends on them alone, and what is between them from
    the variance: its gradient is that of the mean of the first term's square. Kingma et al., 2021, arXiv:2107.00630.
    """

    draws = 2

    def __init__(self, process: Process, sigma_data: float, bins: Bins | None = None) -> None:
        self.process, self.bins = process, bins
        with torch.no_grad():
            scaled = float(process.alpha(torch.tensor(process.t_max))) < 1
        self.prior_std = 1.0 if scaled else sigma_data

    def _time(self, u: Tensor) -> Tensor:
        return self.process.t_min + u * (self.process.t_max - self.process.t_min)

    def levels(self, u: Tensor) -> Tensor:
        with torch.no_grad():
            return self.process.sigma(self._time(u))

    def losses(self, score: Callable[..., Tensor], batch: Batch, u: Tensor, noise: Tensor) -> Tensor:
        x0, dims = batch.x0, math.prod(batch.x0.shape[1:])
        t, scale = self._time(u.to(widened(x0))), 1 / (dims * math.log(2))
        weight: list[Tensor] = []
        gamma, rate = self._schedule(t, weight)
        sigma, eps = torch.exp(0.5 * gamma), noise[:, 1]
        level = broadcast(sigma, x0)
        error = level * conditioned(score, batch.condition)((x0 + level * eps).to(x0.dtype), sigma) + eps
        diffusion = 0.5 * rate * error.flatten(1).square().sum(1) * scale
        weight.append(2 * diffusion.detach())
        first, last = (self.process.sigma(t.new_tensor(end)) for end in (self.process.t_min, self.process.t_max))
        prior = gaussian_kl(x0, last, (last**2 + self.prior_std**2).sqrt()).flatten(1).sum(1)
        return diffusion + scale * (prior + self._decoder(x0, noise[:, 0], first))

    def zero(self, batch: Batch, u: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad():
            return super().zero(batch, u, noise)

    def _schedule(self, t: Tensor, weight: list[Tensor]) -> tuple[Tensor, Tensor]:
        """gamma(t) and its derivative in u; gradients of what is inside are multiplied by ``weight``."""
        p = self.process
        if not isinstance(p, Learned):
            return 2 * p.sigma(t).log(), (p.t_max - p.t_min) * (p.diffusion(t) / p.std(t)).square()
        (low, span), inside = p.ends(t), p.rise(t)
        for part in inside:
            if part.requires_grad:
                part.register_hook(lambda gradient: gradient * weight[0])  # type: ignore[no-untyped-call]
        return low + span * inside[0], span * inside[1]

    def _decoder(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """-log p(x0 | z_0) in nats, (B,)."""
        if self.bins is None:
            return -log_density(sigma * noise, sigma).flatten(1).sum(1)
        spacing, low, high = self.bins
        z, last = x0 + sigma * noise, round((high - low) / spacing)
        near, reach = torch.zeros_like(z), last
        # only a CPU knows sigma without waiting: there what lies 9 sigma beyond the nearest value is left out
        if z.device.type == "cpu" and (wide := 9 * float(sigma.detach()) / spacing) < last // 2 - 1:
            near, reach = ((z.detach() - low) / spacing).round().clamp(0, last), math.ceil(wide) + 1
        first = -reach if reach < last else 0
        place = near.unsqueeze(-1) + torch.arange(first, reach + 1, dtype=z.dtype, device=z.device)
        logits = -0.5 * ((z.unsqueeze(-1) - (low + spacing * place)) / sigma).square()
        logits = logits.masked_fill((place < 0) | (place > last), -math.inf)
        own = ((x0 - low) / spacing).round().clamp(0, last)
        index = (own - near).long() - first
        # of the same number, so that nothing is left of gradients where no other value counts
        seen = logits.gather(-1, index.clamp(0, reach - first).unsqueeze(-1)).squeeze(-1)
        inside = (index >= 0) & (index <= reach - first)
        far = -0.5 * ((z - (low + spacing * own)) / sigma).square()
        found: Tensor = logits.logsumexp(-1) - torch.where(inside, seen, far)
        return found.flatten(1).sum(1)
