"""The reverse SDE with a step size of its own for every sample, on a Brownian path that rejected steps don't change.

In log sigma, unscaled, the SDE that keeps the marginals with noise eta is solved exactly for x0_hat linear over a step
from sigma to r, h = log(sigma/r), rho = 1 + eta^2 (an exponential trapezoidal rule; its predictor x' leaves out w):

    x(r) = e^(-rho h) x + (1 - e^(-rho h)) x0_hat(x, sigma) + w (x0_hat(x', r) - x0_hat(x, sigma)) + r^rho dB
    w = 1 - (1 - e^(-rho h))/(rho h)

B is a Brownian motion in the clock sigma^(-2 eta^2), so r^rho dB = r sqrt(1 - e^(-2 eta^2 h)) z. A step that is too
long is halved in log sigma: its increment is split by a Brownian bridge and the second half waits on a stack, so that
whatever is rejected the path stays the same.

Step sizes by halving on a fixed path: Gaines and Lyons, Variable step size control in the numerical solution of
stochastic differential equations, 1997; error from two orders: Jolicoeur-Martineau et al., Gotta Go Fast When
Generating Data with Score-Based Models, 2021, arXiv:2105.14080.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from scorelab.checks import level
from scorelab.noise import Noise
from scorelab.predictions import denoise_from_score
from scorelab.samplers.adaptive import Controller, check_broadcasting, refuse_broken, rms
from scorelab.samplers.base import Context, Sampler, State
from scorelab.scores import can_split, restricted
from scorelab.typing import ScoreFn, Tensor

__all__ = ["AdaptiveReverseSDE", "Path"]

_DEEPEST = 40


class Path:
    """A Brownian path for each of B samples over log sigma, refined where it is asked for.

    ``place`` (B,) counts what is behind in units of 2^-40 of the whole, ``depth`` (B,) says that the interval at hand
    is 2^-depth of it; ``z`` (B, N) is its dB in units of its standard deviation. Intervals that wait lie in
    ``waiting``, one place a depth: the next one has the depth of the lowest bit set in ``place``.
    """

    def __init__(self, span: float, eta: float, noise: Tensor) -> None:
        self.span, self.eta = span, eta
        self.place = torch.zeros(len(noise), dtype=torch.long, device=noise.device)
        self.depth = self.place.clone()
        self.z = noise.clone()
        self.waiting = [torch.zeros_like(noise)]

    @property
    def width(self) -> Tensor:
        """Length in log sigma of the interval at hand, (B,) float32."""
        return self.span * torch.exp2(-self.depth.float())

    @property
    def moving(self) -> Tensor:
        """Which samples have not come to the end."""
        return torch.lt(self.place, 2**_DEEPEST)

    def behind(self) -> tuple[Tensor, Tensor]:
        """The share of the whole that lies before both ends of the interval at hand, (B,) float32."""
        ends = self.place, torch.minimum(self.place + self._length(), torch.full_like(self.place, 2**_DEEPEST))
        return ends[0].float() / 2**_DEEPEST, ends[1].float() / 2**_DEEPEST

    def _length(self) -> Tensor:
        return torch.bitwise_left_shift(torch.ones_like(self.depth), _DEEPEST - self.depth)

    def halve(self, which: Tensor, noise: Tensor) -> None:
        """Split the intervals at hand of the samples ``which`` (B,), by a Brownian bridge with ``noise`` (B, N)."""
        # in the clock sigma^(-2 eta^2) the halves' lengths are as 1 to e^a
        first = torch.sigmoid(-(self.eta**2) * self.width).unsqueeze(1).to(noise)
        left = first.sqrt() * self.z + (1 - first).sqrt() * noise
        right = (1 - first).sqrt() * self.z - first.sqrt() * noise
        self.depth = self.depth + which
        while len(self.waiting) <= int(self.depth.max()):
            self.waiting.append(torch.zeros_like(self.z))
        for depth in set(self.depth[which].tolist()):
            mine = (which & (self.depth == depth)).unsqueeze(1)
            self.waiting[depth] = torch.where(mine, right, self.waiting[depth])
        self.z = torch.where(which.unsqueeze(1), left, self.z)

    def accept(self, which: Tensor) -> None:
        """The samples ``which`` (B,) have passed their interval: each takes the next from its stack."""
        self.place = self.place + which * self._length()
        lowest = (self.place & -self.place).clamp_min(1)
        # powers of two, exact in single precision
        depth = _DEEPEST - lowest.float().log2().round().long()
        going = which & self.moving
        self.depth = torch.where(going, depth, self.depth)
        for d in set(depth[going].tolist()):
            self.z = torch.where((going & (depth == d)).unsqueeze(1), self.waiting[d], self.z)


@dataclass(frozen=True)
class AdaptiveReverseSDE(Sampler):
    """The reverse SDE to a tolerance: error control per sample, two evaluations a tried step, any ``eta`` > 0.

    rtol, atol: the difference of first and second order over a step, in root mean square, may be rtol |x| + atol; in
    units of x. The grid gives only the points that are reported. A step to 0 denoises. ``nfe`` follows the sample that
    needs the most; memory, one x for every halving.

    max_steps: a sample that needs more tries than these between two reported levels is a RuntimeError.
    """

    eta: float = 1.0
    rtol: float = 1e-2
    atol: float = 1e-2
    max_steps: int = 1000

    def __post_init__(self) -> None:
        Controller(self.rtol, self.atol, self.max_steps)
        if not 0 < self.eta < math.inf:
            raise ValueError(f"eta is {self.eta:g}; expected a finite number > 0: without noise use ProbabilityFlow")

    def step(self, at: Context) -> tuple[Tensor, State]:
        score, x, sigma, sigma_next, state, noise = at
        # rounds are drawn as the slowest sample needs them, which must not change what is drawn after this step
        noise = noise.branch() if isinstance(noise, Noise) else noise
        if sigma_next == 0:
            return denoise_from_score(score(x, level(sigma, x)), x, sigma), state
        if state is None:
            check_broadcasting(score, x, sigma, math.sqrt(sigma * sigma_next))
        y, shape = x.flatten(1), x.shape
        path = Path(math.log(sigma / sigma_next), self.eta, noise(x).flatten(1))
        width = torch.full_like(path.width, 0.1) if state is None else state
        tried = torch.zeros_like(path.depth)
        everything = torch.arange(len(x), device=x.device)

        while bool(path.moving.any()):
            # one draw a round for every sample, whether it needs it or not: no sample's noise depends on the others
            bridge = noise(x).flatten(1)
            path.halve(path.moving & (path.width > width) & (path.depth < _DEEPEST - 1), bridge)
            ready = path.moving & ((path.width <= width) | (path.depth >= _DEEPEST - 1))
            index = ready.nonzero().flatten() if can_split(score) else everything
            if not bool(ready.any()):
                continue
            part = restricted(score, index) if len(index) < len(x) else score
            assert part is not None
            proposal, error = _try(part, y[index], shape, sigma, path, index)
            scale = self.atol + self.rtol * torch.maximum(y[index].abs(), proposal.abs()).detach()
            size = rms(error.detach() / scale).float()
            refuse_broken(size, ready[index], index)
            accept = torch.zeros_like(ready)
            accept[index] = ready[index] & (size <= 1)
            # the strong local error of this pair is of order 3/2
            factor = (0.9 * size.clamp_min(1e-10) ** (-2 / 3)).clamp(0.2, 5.0)
            factor = torch.where(accept[index], factor, factor.clamp_max(0.5))
            width = width.index_put((index,), torch.where(ready[index], path.width[index] * factor, width[index]))
            y = y.index_put((index,), torch.where(accept[index].unsqueeze(1), proposal, y[index]))
            path.accept(accept)
            tried = tried + ready
            if bool((tried > self.max_steps).any()):
                late = int((tried > self.max_steps).nonzero()[0])
                stuck = sigma * math.exp(-path.span * float(path.behind()[0][late]))
                raise RuntimeError(
                    f"the adaptive solver needed more than max_steps = {self.max_steps} steps for sample {late}, at "
                    f"sigma = {stuck:.4g}: raise max_steps, loosen rtol and atol, or check the "
                    "score there"
                )
        return y.reshape(shape), width


def _try(
    score: ScoreFn, y: Tensor, shape: torch.Size, sigma: float, path: Path, index: Tensor
) -> tuple[Tensor, Tensor]:
    """The end of a step of each row over its interval at hand, and the error: what the second order changes."""
    begin, end = (sigma * torch.exp(-path.span * share[index].to(y)) for share in path.behind())
    point = y.reshape(-1, *shape[1:])
    first = denoise_from_score(score(point, begin), point, begin).flatten(1)
    width, eta = path.width[index].unsqueeze(1).to(y), path.eta
    h = (1 + eta**2) * width
    whole = -torch.expm1(-h)
    noise = end.unsqueeze(1) * (-torch.expm1(-2 * eta**2 * width)).sqrt() * path.z[index]
    guess = (1 - whole) * y + whole * first + noise
    point = guess.reshape(-1, *shape[1:])
    second = denoise_from_score(score(point, end), point, end).flatten(1)
    error = (1 - whole / h) * (second - first)
    return guess + error, error
