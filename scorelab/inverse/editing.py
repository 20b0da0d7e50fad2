"""Editing by the probability-flow ODE and by noise: encoding, spherical interpolation, swapped conditions, SDEdit.

A deterministic step x_r = F(x_sigma) is taken upwards in two ways. Run with its levels exchanged it is a step of the
same order, as DDIM inversion is published: it evaluates the score at the lower end, and does not lead back. Inverted it
solves the implicit equation by fixed-point iteration, x <- x + x_r - F(x), which by itself converges like
(1 - r/sigma)^k or faster where the density is log-concave, and diverges where F expands more than twofold, as between
modes; Anderson mixing of the last iterates carries it on there. Then decoding, ``sample(score, latent, sigmas,
sampler)``, gives back what was encoded, to rounding.

Song, Meng and Ermon, Denoising Diffusion Implicit Models, 2021, arXiv:2010.02502; Pan et al., Effective Real Image
Editing with Accelerated Iterative Diffusion Inversion, 2023, arXiv:2309.04907, who mix likewise; Meng et al., SDEdit,
2022, arXiv:2108.01073; Shoemake, Animating Rotation with Quaternion Curves, 1985.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from scorelab.checks import broadcast, check_batch, check_finite, check_sigmas, widened
from scorelab.noise import Noise, PerSampleNoise
from scorelab.samplers import Ancestral, Context, Euler, Sampler, State, Wrapper, sample
from scorelab.samplers.base import Counted, check_sampler
from scorelab.scores import check_known
from scorelab.typing import ScoreFn, Tensor

__all__ = ["encode", "sdedit", "slerp", "swapped"]

Levels = Tensor | Iterable[float]


def _no_noise(x: Tensor) -> Tensor:
    raise ValueError("the sampler asks for noise; expected a deterministic one, such as Euler() or Heun()")


def encode(
    score: ScoreFn,
    x0: Tensor,
    sigmas: Levels,
    sampler: Sampler = Euler(),  # noqa: B008
    *,
    exact: bool = True,
    tol: float | None = None,
    iterations: int = 200,
) -> Tensor:
    """The latent (B, *D) at noise level sigmas[0] of which a deterministic sampler makes x0 (B, *D), unscaled.

    sigmas: descending, those of decoding. x0 is at the last level; exact: every step is inverted, also that to 0, by
    iteration until |x_r - F(x)| is ``tol`` of |x_r| in each sample, by default a few roundings. A RuntimeWarning says
    where ``iterations`` did not suffice, as where F is far from one to one. Not exact: the sampler's steps are run
    upwards, with x0 at the lowest positive level. sampler: one without noise or memory: Euler, DDIM, Heun, Midpoint,
    RK4. The score is evaluated at most once an iteration for each evaluation of a step.

    Raises ValueError or TypeError for what ``sample`` refuses, and for a sampler with noise or memory.
    """
    check_batch(x0, "x0")
    check_finite(x0, "x0")
    check_sampler(sampler)
    grid = check_sigmas(sigmas, at_least=2)
    check_known(score, min(s for s in grid if s > 0), grid[0])
    if sampler.order is None or sampler.init(x0, grid) is not None:
        raise ValueError(f"{sampler!r} has noise or memory; expected Euler(), DDIM(), Heun(), Midpoint() or RK4()")
    if iterations < 1 or not (tol is None or 0 < tol < 1):
        raise ValueError(f"tol = {tol}, iterations = {iterations}; expected 0 < tol < 1 and iterations >= 1")
    upwards = grid[::-1] if exact or grid[-1] > 0 else grid[-2::-1]
    counted, x, worst = Counted(score), widened(x0), 0.0
    limit = 16 * torch.finfo(x.dtype).eps if tol is None else tol
    with torch.no_grad():
        for low, high in zip(upwards[:-1], upwards[1:], strict=True):
            if exact:
                x, left = _inverted(_step(sampler, counted, high, low), x, limit, iterations)
                worst = max(worst, left)
            else:
                x = _step(sampler, counted, low, high)(x)
    check_finite(x, "the latent", "take more levels, or exact=False")
    if worst > limit:
        warnings.warn(
            f"a step was inverted to {worst:.3g} of x after {iterations} iterations; expected {limit:.3g}: take more "
            "levels near that step, more iterations or a larger tol",
            RuntimeWarning,
            stacklevel=2,
        )
    return x.to(x0.dtype)


def _step(sampler: Sampler, score: ScoreFn, sigma: float, sigma_next: float) -> Callable[[Tensor], Tensor]:
    """A step as a map."""
    return lambda x: sampler.step(Context(score, x, sigma, sigma_next, None, _no_noise))[0]


def _inverted(
    step: Callable[[Tensor], Tensor], target: Tensor, tol: float, iterations: int, memory: int = 5
) -> tuple[Tensor, float]:
    """x with step(x) = target, and the largest relative residual of a sample; a sample that has converged stands.

    Anderson mixing with the last ``memory`` differences, for each sample by itself.
    """
    size = target.flatten(1).norm(dim=1).clamp_min(torch.finfo(target.dtype).tiny)
    x, best, least = target, target, torch.full_like(size, torch.inf)
    # differences of neighbouring iterates and of their residuals, (B, N) each
    moves: list[tuple[Tensor, Tensor]] = []
    before: tuple[Tensor, Tensor] | None = None
    for _ in range(iterations):
        off = target - step(x)
        left = (off.flatten(1).norm(dim=1) / size).nan_to_num(torch.inf)
        better = left < least
        best, least = torch.where(broadcast(better, x), x, best), torch.where(better, left, least)
        alive = least > tol
        if not bool(alive.any()):
            break
        flat = x.flatten(1), off.flatten(1)
        if before is not None:
            moves = [*moves[1 - memory :], (flat[0] - before[0], flat[1] - before[1])]
        before = flat
        x = torch.where(broadcast(alive, x), (flat[0] + _mixed(flat[1], moves)).reshape(x.shape), x)
    return best, float(least.max()) if len(least) else 0.0


def _mixed(off: Tensor, moves: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The step f - (dX + dF) g, g the least squares of f = dF g; f itself where nothing is known yet."""
    if not moves:
        return off
    steps, residuals = (torch.stack(z, 2) for z in zip(*moves, strict=True))
    length = residuals.norm(dim=1, keepdim=True).clamp_min(torch.finfo(off.dtype).tiny)
    scaled = residuals / length
    gram = scaled.mT @ scaled
    inverse = torch.linalg.pinv(gram, hermitian=True, rtol=1e3 * torch.finfo(off.dtype).eps)
    weights: Tensor = inverse @ (scaled.mT @ off.unsqueeze(2)) / length.mT
    return off - ((steps + residuals) @ weights).squeeze(2)


def swapped(
    source: ScoreFn,
    target: ScoreFn,
    x0: Tensor,
    sigmas: Levels,
    sampler: Sampler = Euler(),  # noqa: B008
    *,
    exact: bool = True,
) -> Tensor:
    """x0 (B, *D) encoded under one condition and decoded under another, ``model.conditioned(a)`` and ``(b)``.

    With both alike it gives x0 back. Arguments and errors are those of ``encode`` and ``sample``.
    """
    grid = check_sigmas(sigmas, at_least=2)
    return sample(target, encode(source, x0, grid, sampler, exact=exact), grid, sampler)


def slerp(a: Tensor, b: Tensor, weight: Tensor | float) -> Tensor:
    """Spherical interpolation of latents a and b (B, *D), or (1, *D): a at weight 0, b at 1; weight a number or (B,).

    sin((1-w) h)/sin(h) a + sin(w h)/sin(h) b, h the angle between them: noise keeps its norm, which a straight line
    between independent latents halves in square. Raises ValueError for other shapes, for opposite latents and those of
    length 0, and for what is not finite.
    """
    check_batch(a, "a")
    check_batch(b, "b", tuple(a.shape[1:]))
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        raise ValueError(f"a has {len(a)} rows, b {len(b)}; expected as many, or one")
    for z, what in ((a, "a"), (b, "b")):
        check_finite(z, what)
        if not bool(z.flatten(1).any(1).all()):
            raise ValueError(f"{what} holds latents of length 0, which have no direction; expected other latents")
    first, second = (z.flatten(1) / z.flatten(1).norm(dim=1, keepdim=True) for z in (a, b))
    # by half angles: an arc cosine loses digits near 0 and pi
    angle = 2 * torch.atan2((first - second).norm(dim=1), (first + second).norm(dim=1))
    if bool((torch.pi - angle < 1e-3).any()):
        raise ValueError("a and b are opposite, so no shortest arc joins them; expected other latents")
    w = torch.as_tensor(weight, dtype=angle.dtype, device=angle.device)
    if w.ndim > 1 or (w.ndim and len(angle) not in (1, len(w))):
        raise ValueError(f"weight has shape {tuple(w.shape)} for {len(angle)} latents; expected () or ({len(angle)},)")
    if not bool(torch.isfinite(w).all()):
        raise ValueError("weight is not finite; expected numbers, 0 for a and 1 for b")
    w = w + torch.zeros_like(angle)
    angle = angle + torch.zeros_like(w)
    # of equal directions the limits, 1 - w and w
    small = angle < 1e-6
    sine = torch.where(small, 1.0, angle.sin())
    left = torch.where(small, 1 - w, ((1 - w) * angle).sin() / sine)
    right = torch.where(small, w, (w * angle).sin() / sine)
    shape = (-1, *[1] * (a.ndim - 1))
    return left.reshape(shape) * a + right.reshape(shape) * b


@dataclass(frozen=True, eq=False)
class _Kept(Wrapper):
    """A sampler whose known part is x0 at the level of x, with the noise that x began with."""

    sampler: Sampler
    x0: Tensor
    known: Tensor

    @property
    def inner(self) -> Sampler:
        """The sampler that makes the steps."""
        return self.sampler

    def init(self, x: Tensor, sigmas: list[float]) -> State:
        return (x - self.x0) / sigmas[0], self.inner.init(x, sigmas)

    def step(self, at: Context) -> tuple[Tensor, State]:
        eps, state = at.state
        x, state = self.inner.step(at._replace(state=state))
        level = self.inner.reached(at.sigma, at.sigma_next)
        return torch.where(self.known, self.x0 + level * eps if level > 0 else self.x0, x), (eps, state)


def sdedit(
    score: ScoreFn,
    x0: Tensor,
    sigmas: Levels,
    sampler: Sampler = Ancestral(),  # noqa: B008
    *,
    repeats: int = 1,
    known: Tensor | None = None,
    generator: torch.Generator | PerSampleNoise | None = None,
) -> Tensor:
    """x0 (B, *D), such as a sketch, noised to sigmas[0] and brought back by a sampler, ``repeats`` times.

    The first level trades faithfulness for realism: published are 0.5 of a variance-preserving process's time, sigma
    about 3.4, and 3 repeats. known: bool, broadcast to (B, *D), True where x0 is to stay: that part is noised with the
    same eps at every level of a repeat and comes back exactly where the levels end at 0. Raises what ``sample`` does.
    """
    check_batch(x0, "x0")
    check_finite(x0, "x0")
    grid = check_sigmas(sigmas, at_least=1 if getattr(sampler, "every_level", False) else 2)
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; expected at least 1")
    if known is not None:
        if known.dtype != torch.bool:
            raise TypeError(f"known has dtype {known.dtype}; expected bool, True where x0 stays")
        try:
            known = known.to(x0.device).expand(x0.shape)
        except RuntimeError as error:
            raise ValueError(
                f"known has shape {tuple(known.shape)}; expected one that broadcasts to that of x0, {tuple(x0.shape)}"
            ) from error
    noise = Noise(generator)
    x = x0
    for _ in range(repeats):
        # noise and sampler from streams of their own
        eps, stream = noise.branch()(x0), noise.branch().generator
        inner = sampler if known is None else _Kept(sampler, x0, known)
        start = x if known is None else torch.where(known, x0, x)
        x = sample(score, start + grid[0] * eps, grid, inner, generator=stream)
    return x
