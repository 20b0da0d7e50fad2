"""Inpainting around any sampler: the known part of x is noised to the current level and pasted.

    x[known] = y + sigma z,    before every step, and after the last one (with sigma = 0: y itself)

The model fills the rest in without seeing y at its own noise level, so this is no posterior sample: where known and
unknown parts are correlated its law is biased. RePaint goes back and forth between levels, each time with fresh noise
in the known part, and tends to agree with it.

Song et al., 2021, arXiv:2011.13456, appendix I; Lugmayr et al., RePaint, 2022, arXiv:2201.09865.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scorelab.inverse.linear import Inpainting
from scorelab.inverse.measurement import Measurement
from scorelab.samplers.base import Context, Sampler, State, Wrapper, check_sampler
from scorelab.samplers.stochastic import Ancestral
from scorelab.typing import Tensor

__all__ = ["RePaint", "Replacement"]


@dataclass(frozen=True)
class Replacement(Wrapper):
    """A sampler, ``inner``, that finds the known part at its noise level before every step, and leaves it in its place.

    measurement: of an ``Inpainting``; with noise_std = 0 the known numbers come back exactly where the levels end at 0.
    y of noise_std > 0 is pasted while sigma > noise_std, with the noise that it lacks, and then left to the sampler.
    Noise of the known part is independent of the sampler's. inner: one without memory of earlier steps, whose slopes
    would not fit what is pasted. Raises TypeError for a measurement of another operator or an inner that is no sampler.
    """

    measurement: Measurement
    inner: Sampler = Ancestral()  # noqa: RUF009

    def __post_init__(self) -> None:
        if not isinstance(self.measurement, Measurement) or not isinstance(self.measurement.operator, Inpainting):
            got = getattr(self.measurement, "operator", self.measurement)
            raise TypeError(f"got {type(got).__name__}; expected a Measurement of an Inpainting: see DDRM, DPS or DAPS")
        check_sampler(self.inner, "inner")

    @property
    def order(self) -> int | None:  # type: ignore[override]
        """None: noise is pasted."""
        return None

    def init(self, x: Tensor, sigmas: list[float]) -> State:
        """The levels, and the inner sampler's state."""
        self.measurement.residual(x)
        return sigmas, self.inner.init(x, sigmas)

    def pasted(self, at: Context, x: Tensor, sigma: float) -> Tensor:
        """x with the known part at noise level sigma."""
        operator, y, noise_std = self.measurement.operator, self.measurement.y, self.measurement.noise_std
        assert isinstance(operator, Inpainting)
        y = y.to(x)
        if sigma > noise_std:
            y = y + math.sqrt((sigma - noise_std) * (sigma + noise_std)) * operator(at.noise(x))
        return operator.pasted(x, y) if sigma > noise_std or noise_std == 0 else x

    def step(self, at: Context) -> tuple[Tensor, State]:
        levels, state = at.state
        x, state = self.inner.step(at._replace(x=self.pasted(at, at.x, at.sigma), state=state))
        if at.sigma_next == levels[-1]:
            x = self.pasted(at, x, self.inner.reached(at.sigma, at.sigma_next))
        return x, (levels, state)


@dataclass(frozen=True)
class RePaint(Replacement):
    """Replacement that, at every ``jump``-th level, goes back up by ``jump`` levels and down again, resample - 1 times.

    Levels are counted from the lowest positive one, 0; the highest that is gone back from lies below T - jump, of T
    positive levels. T = 250 with the published jump = resample = 10 is 2,410 denoising steps and 2,160 of noising;
    those of one jump are drawn at once, for their sum has the same law. Raises ValueError for a jump or resample
    below 1, TypeError for an inner sampler that walks at a level (Langevin).
    """

    jump: int = 10
    resample: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.jump < 1 or self.resample < 1:
            raise ValueError(f"jump = {self.jump}, resample = {self.resample}; expected whole numbers >= 1")
        if self.inner.every_level:
            raise TypeError(
                f"inner is {type(self.inner).__name__}, which walks at each level; expected one such as Ancestral()"
            )

    def step(self, at: Context) -> tuple[Tensor, State]:
        x, (levels, state) = super().step(at)
        positive = len(levels) - (levels[-1] == 0)
        arrived = levels.index(at.sigma_next)
        place = positive - 1 - arrived
        if place < 0 or place % self.jump or place >= positive - self.jump:
            return x, (levels, state)
        first = arrived - self.jump
        gap = math.sqrt((levels[first] - levels[arrived]) * (levels[first] + levels[arrived]))
        for _ in range(self.resample - 1):
            x = x + gap * at.noise(x)
            state = self.inner.init(x, levels)
            for k in range(first, arrived):
                again = at._replace(x=x, sigma=levels[k], sigma_next=levels[k + 1], state=(levels, state))
                x, (_, state) = super().step(again)
        return x, (levels, state)
