"""Particles that reach the tilted law p(x | y)^w p(x)^(1 - w), which is p(x) p(y | x)^w, and which guidance misses.

At each level let pi = p(x | y; sigma)^w p(x; sigma)^(1 - w). Its score is the guided one, s = w a + (1 - w) b, but
noise does not carry one pi into the next: with v = sigma^2, a blurred density follows dp/dv = lap p / 2, and pi

    dpi/dv = lap pi / 2 - g pi,      g = w (w - 1) ||a - b||^2 / 2

since w ||a||^2 + (1 - w) ||b||^2 - ||s||^2 = w (1 - w) ||a - b||^2. So a particle that follows the guided reverse
process from sigma down to r gains the weight exp(int g dv), and weighted particles have the law pi at each level.
They are resampled where their weights have become unequal: the effective sample size is (sum W)^2 / sum W^2.

Skreta et al., Feynman-Kac Correctors in Diffusion: Annealing, Guidance, and Product of Experts, 2025,
arXiv:2503.02819. That guidance alone misses it: Gao et al., REG: Rectified Gradient Guidance for Conditional Diffusion
Models, 2025, arXiv:2501.18865.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import torch

from scorelab.checks import check_finite, check_sigmas, level
from scorelab.guidance.base import Guided, check_scores
from scorelab.guidance.updates import contrasted
from scorelab.noise import Noise, PerSampleNoise, fresh_generator
from scorelab.samplers.base import Context, start
from scorelab.samplers.multistep import History
from scorelab.samplers.sde import SDEDPMSolver
from scorelab.scores import check_known, device_of
from scorelab.typing import ScoreFn, Shape, Tensor

__all__ = ["Tilted", "tilted"]


class Tilted(NamedTuple):
    """Particles x (N, *D) of equal weight, and the effective sample size at each step, (steps,), at most N.

    Where that falls to few, between any two steps, the law is not reached: take more levels, a smaller scale or more
    particles. Where it does not, the law may be missed all the same, if ``eta`` is below 1. ``nfe``: evaluations of
    each of the two scores. Particles that were resampled late are copies.
    """

    x: Tensor
    ess: Tensor
    nfe: int


@torch.no_grad()
def tilted(
    conditional: ScoreFn,
    unconditional: ScoreFn,
    scale: float,
    x: Tensor | Shape,
    sigmas: Tensor | Iterable[float],
    *,
    eta: float = 1.0,
    threshold: float = 0.5,
    generator: torch.Generator | None = None,
    data_std: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tilted:
    """N particles of p(x | y)^scale p(x)^(1 - scale), by guided steps with weights, and resampling.

    The particles are one population of one condition, so no row is a sample by itself. The bias falls as 1/N and, by a
    second-order solver of the reverse SDE, about as the square of the step. conditional, unconditional: scores, of a
    classifier ``classifier(score, log_prob)`` and ``score``. x: particles (N, *D) at sigmas[0], or their shape, then
    drawn as ``sample`` does. eta: the scale of the noise, 1 that of the reverse SDE. With less the copies of a particle
    part more slowly, and the guided process is narrower: on N(0, a^2)^w N(0, b^2)^(1 - w) it ends at the variance
    a^(2w) b^(2 - 2w) with none. Weights then count on its tails, where no particle is; at scales of 3 and more 1.5 to 2
    errs least. threshold: resample, systematically, where the effective sample size is below this share of N.

    Raises as ``sample`` does, ValueError for a scale, eta or threshold out of its range and for no particles, TypeError
    for a generator of each sample's own noise.
    """
    steer, sampler, grid = contrasted(scale), SDEDPMSolver(eta), check_sigmas(sigmas, at_least=2)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold:g}; expected a share of the particles from 0 to 1")
    check_scores((conditional, unconditional), "model.conditioned(None)")
    pair = Guided(steer, (conditional, unconditional), None, None)
    check_known(pair, min(s for s in grid if s > 0), grid[0])
    if isinstance(generator, PerSampleNoise):
        raise TypeError("generator is PerSampleNoise; expected a torch.Generator: particles are drawn together")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}; expected floating point, such as torch.float32")
    generator = fresh_generator() if generator is None else generator
    noise, found = Noise(generator), []
    wanted = dtype or (x.dtype if isinstance(x, Tensor) else torch.get_default_dtype())
    # squares of scores are beyond half precision
    wide, device = torch.promote_types(wanted, torch.float32), None if isinstance(x, Tensor) else device_of(pair)
    x = start(x, grid[0], data_std, noise, wide, device, pair)
    if not len(x):
        raise ValueError(f"x has shape {tuple(x.shape)}; expected at least one particle")
    past = History((), ())
    logs, before, gap_before = torch.zeros(len(x), dtype=torch.float64), grid[0], torch.zeros(len(x))
    for sigma, sigma_next in pairwise(grid):
        at = level(sigma, x)
        a, b = pair.outputs(x, at)
        score = steer(x, at, a, b).to(x.dtype)
        gap = (0.5 * scale * (scale - 1) * (a - b).square().flatten(1).sum(1)).cpu().double()
        # by the trapezoidal rule along each path
        logs += 0.5 * (gap_before + gap) * (before - sigma) * (before + sigma)
        share = torch.softmax(logs, 0)
        found.append(1 / float(share.square().sum()))
        if found[-1] < threshold * len(x):
            chosen = _systematic(share, generator)
            gap, logs = gap[chosen], torch.zeros_like(logs)
            x, score, *kept = (t[chosen.to(x.device)] for t in (x, score, *past.values))
            past = History(past.sigmas, tuple(kept))
        # evaluated above, once
        x, past = sampler.step(Context(lambda x, s, known=score: known, x, sigma, sigma_next, past, noise))  # type: ignore[misc]
        before, gap_before = sigma, gap
    logs += gap_before * (before - grid[-1]) * (before + grid[-1])
    check_finite(x, "the particles", "lower the scale, or take more levels")
    check_finite(logs.unsqueeze(1), "the weight", "lower the scale, or take more levels")
    x = x[_systematic(torch.softmax(logs, 0), generator).to(x.device)].to(wanted)
    return Tilted(x, torch.tensor(found), len(found))


def _systematic(share: Tensor, generator: torch.Generator) -> Tensor:
    """Indices (N,), each as often as N times its share (N,) or one more or less: systematic resampling."""
    n = len(share)
    places = (
        torch.arange(n, dtype=share.dtype) + torch.rand((), generator=generator, device=generator.device).item()
    ) / n
    return torch.searchsorted(share.cumsum(0), places).clamp_max(n - 1)
