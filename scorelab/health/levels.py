"""How good a score is at each noise level, beside what can be had there.

Data x0 are noised to x = x0 + sigma eps, and the score is read as a prediction of eps:

    eps_hat = -sigma s(x, sigma),     loss = E|eps_hat - eps|^2 / D

0 is perfect, and 1 the predictor that always says 0. For the score of the data's law, which has the least loss of all
functions of (x, sigma), and of all levels that a score could be told the least at sigma itself:

    E[eps . eps_hat] = E|eps_hat|^2            so that eps has the slope 1 over eps_hat
    E[x0_hat - x0] = 0                         x0_hat = x + sigma^2 s
    E|x0_hat - x0|^2 = sigma^2 E tr J          J = d x0_hat/dx = Cov(x0 | x) / sigma^2     (Tweedie of second order)

On the very data that a model was trained on the least loss is that of the empirical law's score, which is known in
closed form and knows the data by heart; of functions that are linear in x it is that of the Gaussian with the data's
mean and covariance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from scorelab.checks import call, check_batch, check_finite, check_output, doubled, level
from scorelab.distributions import Distribution, Empirical
from scorelab.evaluation import Estimate
from scorelab.health.derivatives import derivatives
from scorelab.models import ScoreModel
from scorelab.processes import DiscreteVP
from scorelab.scores import sigma_range
from scorelab.sigmas import geometric
from scorelab.typing import Batch, ScoreFn, Tensor

__all__ = ["Level", "as_batch", "lag", "level_health", "levels_of"]

SHIFTS = (-0.7, -0.35, -0.17, -0.08, 0.0, 0.08, 0.17, 0.35, 0.7)
"""Logarithms of what a level is multiplied by before the score is told it."""
STEPS = (-8, -4, -2, -1, 0, 1, 2, 4, 8)
"""The same of a score with levels of its own, in steps."""
_PARTS = 4
"""Of the samples of a level, that show how far the loss at another level follows from which samples they are."""
Profile = tuple[tuple[float, tuple[float, ...]], ...]
_REFERENCE = 60_000
"""Training data that the least possible losses are of, at most."""
_LINEAR = 4096
"""Dimensions above which the best linear denoiser is left out: its covariance is decomposed."""
_AT_ONCE = 256


@dataclass(frozen=True)
class Level:
    """A score at a noise level; losses are per dimension, of eps, and None is what was not measured.

    ``loss``: on held-out or fresh data; ``train_loss`` and ``best``: on training data, and the least possible there;
    ``linear``: of the best linear denoiser, on the held-out data. ``memorised``: how much of the way from the held-out
    loss to the least possible one the loss on training data has gone, 0 to 1; None where they can't be told apart.
    ``slope``: of eps over eps_hat. ``profile``: by how much sigma was multiplied (its logarithm, or steps of a score
    with levels of its own) before the score was told it, and the loss left by the best multiple of its eps_hat, of each
    of some parts of the samples.
    ``offset``: the share of the error of x0_hat that is the same for all data. ``fisher``: E|s - s_true|^2 sigma^2 / D.
    The rest is ``Derivatives``.
    """

    sigma: float
    loss: Estimate
    slope: Estimate
    offset: Estimate
    profile: Profile
    linear: float | None = None
    train_loss: Estimate | None = None
    best: Estimate | None = None
    memorised: Estimate | None = None
    fisher: Estimate | None = None
    trace: Estimate | None = None
    dimension: Estimate | None = None
    asymmetry: float | None = None
    fokker_planck: float | None = None


def levels_of(
    score: ScoreFn, count: int, low: float = 0.0, high: float = math.inf
) -> tuple[list[float], Tensor | None]:
    """``count`` noise levels that a score knows, from the least, and all levels of one that counts them, ascending."""
    own = getattr(score, "levels", None)
    process = getattr(score, "process", None)
    if own is None and isinstance(process, DiscreteVP):
        own = process.step_sigmas.flip(0)
    known = sigma_range(score)
    low, high = max(low, known[0]), min(high, known[1])
    if not 0 < low < high < math.inf:
        raise ValueError(
            f"noise levels go from {low:g} to {high:g}; expected sigma_min and sigma_max, 0 < sigma_min < sigma_max: "
            "this score does not say which it knows"
        )
    wanted = geometric(count, sigma_min=low, sigma_max=high)
    wanted = wanted[wanted > 0].flip(0).double()
    if own is None:
        return wanted.tolist(), None
    own = own[(own >= low * (1 - 1e-6)) & (own <= high * (1 + 1e-6))]
    nearest = (wanted.log().unsqueeze(1) - own.log()).abs().argmin(1).unique()
    return own[nearest].tolist(), own


def level_health(
    score: ScoreFn,
    held: Tensor | Batch,
    train: Tensor | Batch | None = None,
    *,
    truth: Distribution | None = None,
    count: int = 8,
    points: int = 512,
    differentiated: int = 32,
    sigma_min: float = 0.0,
    sigma_max: float = math.inf,
    generator: torch.Generator | None = None,
) -> Iterator[Level]:
    """What a score is worth at ``count`` noise levels, from the least, one after another.

    held: data (N, *D) that it was not trained on, as the score sees it; train: what it was trained on. Of a model with
    conditions they are ``Batch``es, with the condition of each. truth: the law of the data, where it is known. At each
    level ``points`` of either are noised, and derivatives are taken at ``differentiated`` of them (0: none).

    Raises ValueError or TypeError for data, levels and outputs that don't fit.
    """
    unseen, seen = as_batch(held, "held"), None if train is None else as_batch(train, "train", held)
    sigmas, own = levels_of(score, count, sigma_min, sigma_max)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    reference = None if seen is None else _some(seen, _REFERENCE, torch.Generator().manual_seed(0))
    linear = None if reference is None else _Linear.of(reference.x0)
    for sigma in sigmas:
        batch = _some(unseen, points, generator)
        noised = _Noised.of(score, batch, sigma, generator)
        loss = noised.losses
        found = Level(sigma, _mean(loss), *noised.consistent(), _profile(noised, own, sigma_range(score)))
        if truth is not None:
            gap = noised.own + sigma * truth.score(noised.x, level(sigma, noised.x))
            found = replace(found, fisher=_mean(gap.flatten(1).square().mean(1)))
        if linear is not None:
            found = replace(found, linear=float(noised.errors(linear.eps_hat(noised.x, sigma)).mean()))
        if reference is not None:
            # noised training data is among what the least loss is computed from
            trained = _Noised.of(score, _some(reference, points, generator), sigma, generator)
            mine = trained.losses
            least = trained.errors(_known_by_heart(trained.x, trained.batch.condition, reference, sigma, score))
            found = replace(found, train_loss=_mean(mine), best=_mean(least), memorised=_memorised(loss, mine, least))
        if differentiated:
            few = _Noised.of(score, _some(unseen, differentiated, generator), sigma, generator)
            found = replace(found, **_differentiated(few, sigma, own is None, generator))
        yield found


def as_batch(data: Tensor | Batch, name: str, like: Tensor | Batch | None = None) -> Batch:
    """Data as a batch; ValueError for few of it, or where it does not fit that of another."""
    batch = data if isinstance(data, Batch) else Batch(data)
    beside = like.x0 if isinstance(like, Batch) else like
    check_batch(batch.x0, name, None if beside is None else tuple(beside.shape[1:]))
    check_finite(batch.x0, name)
    if len(batch.x0) < 8:
        raise ValueError(f"{name} has {len(batch.x0)} samples; expected at least 8, better hundreds")
    return batch


def _some(batch: Batch, count: int, generator: torch.Generator) -> Batch:
    """So many samples at random, all where there are no more."""
    index = torch.randperm(len(batch.x0), generator=generator)[:count].to(batch.x0.device)
    return Batch(batch.x0[index], None if batch.condition is None else batch.condition[index])


def lag(score: ScoreFn, other: ScoreFn, held: Tensor | Batch, *, count: int = 8, points: int = 512) -> Estimate:
    """How much less the loss of another score is than a score's, in logarithms, on average over noise levels, at the
    same noised data."""
    generator, gaps, errors = torch.Generator().manual_seed(1), [], []
    batch = _some(as_batch(held, "held"), points, generator)
    for sigma in levels_of(score, count)[0]:
        own = _Noised.of(score, batch, sigma, generator)
        ratio = _ratio(own.losses, replace(own, score=other).losses)
        gaps.append(math.log(ratio.value))
        errors.append(ratio.stderr / ratio.value)
    return Estimate(sum(gaps) / len(gaps), math.hypot(*errors) / len(gaps))


def _bound(score: ScoreFn, batch: Batch) -> ScoreFn:
    """The score of these samples."""
    conditional = isinstance(score, ScoreModel) and score.conditional and batch.condition is not None
    return score.conditioned(batch.condition) if conditional else score  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Noised:
    """Noised samples, and the score that is theirs."""

    score: ScoreFn
    batch: Batch
    eps: Tensor
    x: Tensor
    sigma: float

    @classmethod
    def of(cls, score: ScoreFn, batch: Batch, sigma: float, generator: torch.Generator) -> _Noised:
        x0 = batch.x0
        eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=generator.device).to(x0.device)
        return cls(score, batch, eps, x0 + sigma * eps, sigma)

    @cached_property
    def own(self) -> Tensor:
        """eps_hat (N, *D) of the score that is told the level there is."""
        return self.eps_hat(self.sigma)

    def eps_hat(self, told: float) -> Tensor:
        """(N, *D), of a score that is told another level."""
        found = []
        for first in range(0, len(self.x), _AT_ONCE):
            rows = slice(first, first + _AT_ONCE)
            x = self.x[rows]
            score = _bound(self.score, self.batch.part(rows))
            with torch.no_grad():
                found.append(-told * check_output(call(score, x, level(told, x)), x, level(told, x)))
        return torch.cat(found)

    def errors(self, eps_hat: Tensor) -> Tensor:
        """(N,), per dimension."""
        return doubled(eps_hat - self.eps).flatten(1).square().mean(1)

    @property
    def losses(self) -> Tensor:
        """(N,), told the level there is."""
        return self.errors(self.own)

    def shapes(self, told: float) -> tuple[float, ...]:
        """The loss that is left by the best multiple of eps_hat, of each of some parts of the samples."""
        found = []
        eps_hat = self.own if told == self.sigma else self.eps_hat(told)
        for a, b in zip(*(torch.tensor_split(doubled(z), _PARTS) for z in (self.eps, eps_hat)), strict=True):
            found.append(float(a.square().mean() - (a * b).mean() ** 2 / b.square().mean().clamp_min(1e-300)))
        return tuple(found)

    def consistent(self) -> tuple[Estimate, Estimate]:
        """Slope and offset."""
        eps, eps_hat = doubled(self.eps.flatten(1)), doubled(self.own.flatten(1))
        products, squares = (eps * eps_hat).mean(1), eps_hat.square().mean(1)
        e, n = self.sigma * (eps - eps_hat), len(eps)
        # of e's mean the squared length, without that of the samples' own noise
        own = e.square().sum(1)
        common = (e.sum(0).square().sum() - own.sum()) / (n * (n - 1))
        spread = float((2 / n) * (e @ e.mean(0) - common).std()) / math.sqrt(n) + float(own.mean()) / n
        offset = Estimate(float(common / own.mean()), spread / float(own.mean()))
        return _ratio(products, squares), offset


def _profile(noised: _Noised, own: Tensor | None, known: tuple[float, float]) -> Profile:
    """What is left of the loss, by the best multiple of eps_hat, where the score is told another level."""
    if own is None:
        told: list[tuple[float, float]] = [(shift, noised.sigma * math.exp(shift)) for shift in SHIFTS]
    else:
        place = int((own - noised.sigma).abs().argmin())
        told = [(k, float(own[place + k])) for k in STEPS if 0 <= place + k < len(own)]
    told = [(k, t) for k, t in told if known[0] * (1 - 1e-6) <= t <= known[1] * (1 + 1e-6)]
    return tuple((k, noised.shapes(t)) for k, t in told)


def _differentiated(noised: _Noised, sigma: float, between: bool, generator: torch.Generator) -> dict[str, Any]:
    found = derivatives(
        _bound(noised.score, noised.batch), noised.x, noised.batch.x0, sigma, between=between, generator=generator
    )
    if found is None:
        return {}
    errors = noised.losses * noised.x[0].numel()
    known = float(found.trace.sum()) > 0
    return found._asdict() | {"trace": _ratio(errors, doubled(found.trace)) if known else None}


def _mean(x: Tensor) -> Estimate:
    return Estimate(float(x.mean()), float(x.std()) / math.sqrt(len(x)))


def _ratio(a: Tensor, b: Tensor) -> Estimate:
    """Of means, by the delta method."""
    mean = float(b.mean())
    if mean == 0:
        return Estimate(math.inf, math.inf)
    value = float(a.mean()) / mean
    return Estimate(value, float((a - value * b).std()) / abs(mean) / math.sqrt(len(a)))


def _memorised(held: Tensor, train: Tensor, best: Tensor) -> Estimate | None:
    h, t, b = (float(z.mean()) for z in (held, train, best))
    room, error = h - b, math.hypot(float(held.std()) / len(held) ** 0.5, float(best.std()) / len(best) ** 0.5)
    # where the least loss is as good as that on unseen data, memory shows nowhere
    if room < 8 * error:
        return None
    value = (h - t) / room
    of_held = (1 - value) / room * float(held.std()) / len(held) ** 0.5
    of_train = float((train - value * best).std()) / room / len(train) ** 0.5
    return Estimate(value, math.hypot(of_held, of_train))


def _known_by_heart(x: Tensor, condition: Tensor | None, data: Batch, sigma: float, score: ScoreFn) -> Tensor:
    """eps_hat of the empirical law of the data, of a score with classes each of its class's."""
    at = level(sigma, x)
    if condition is None or data.condition is None or getattr(score, "num_classes", None) is None:
        return -sigma * Empirical(data.x0).score(x, at)
    found = torch.empty_like(x)
    for k in torch.unique(condition).tolist():
        found[condition == k] = -sigma * Empirical(data.x0[data.condition == k]).score(x[condition == k], at)
    return found


@dataclass(frozen=True)
class _Linear:
    """The best linear denoiser: that of the Gaussian with the data's mean and covariance."""

    mean: Tensor
    variances: Tensor
    directions: Tensor

    @classmethod
    def of(cls, x0: Tensor) -> _Linear | None:
        flat = x0.flatten(1).cpu().double()
        if flat.shape[1] > _LINEAR:
            return None
        variances, directions = torch.linalg.eigh(torch.cov(flat.T).reshape(flat.shape[1], -1))
        return cls(flat.mean(0), variances.clamp_min(0), directions)

    def eps_hat(self, x: Tensor, sigma: float) -> Tensor:
        z = (x.flatten(1).cpu().double() - self.mean) @ self.directions
        return ((z * (sigma / (self.variances + sigma**2))) @ self.directions.T).to(x).reshape(x.shape)
