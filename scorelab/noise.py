"""Where randomness comes from: standard normal noise drawn from a generator, never from global state by surprise.

A generator lives on one device; noise for x is drawn there and moved to x's device, so a CPU generator gives the same
noise on every device.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from scorelab.typing import Tensor

__all__ = ["Noise", "PerSampleNoise", "fresh_generator", "randn"]

_AHEAD = 2**14
"""Numbers drawn at once for a sample: enough that the call costs little beside them."""
_BLOCK = 2**24
"""Numbers drawn at once for all samples, at most (but for one draw of each)."""


def randn(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of the given shape, in the dtype and on the device of ``like``."""
    noise = torch.randn(shape, generator=generator, dtype=like.dtype, device=generator.device)
    return noise.to(like.device)


def fresh_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded from the operating system: global random state is neither read nor changed."""
    generator = torch.Generator(device)
    generator.seed()
    return generator


class PerSampleNoise:
    """Noise in which sample i depends on (seed, i) alone, whatever the batch size, the chunks or the processes.

    Every sample has a stream of its own on the CPU (PCG64DXSM, seeded by NumPy's SeedSequence of both numbers);
    ``first`` is the index of the first one. Pass it as ``generator``: every call of ``sample`` starts it
    afresh. Numbers are drawn ahead in blocks, which changes nothing. Called by hand, an object serves one batch:
    ``rows`` and ``fresh`` give unused ones.
    """

    def __init__(self, seed: int, first: int = 0) -> None:
        if not isinstance(seed, int) or not isinstance(first, int) or min(seed, first) < 0:
            raise ValueError(f"seed = {seed!r}, first = {first!r}; expected whole numbers >= 0")
        self.seed, self.first = seed, first
        self._streams: list[np.random.Generator] = []
        self._block, self._used = torch.empty(0), 0

    def rows(self, start: int) -> PerSampleNoise:
        """The noise of the samples from ``start`` on, from its beginning."""
        return PerSampleNoise(self.seed, self.first + start)

    def fresh(self) -> PerSampleNoise:
        """The same noise from its beginning."""
        return self.rows(0)

    def __call__(self, x: Tensor) -> Tensor:
        """Noise of x's shape, dtype and device; row k belongs to sample first + k."""
        shape = (len(x), *x.shape[1:])
        size = max(1, math.prod(shape[1:]))
        ahead = max(1, min(_AHEAD, _BLOCK // max(1, len(x))) // size)
        if not self._streams:
            seeds = [np.random.SeedSequence((self.seed, self.first + k)) for k in range(len(x))]
            self._streams = [np.random.Generator(np.random.PCG64DXSM(seed)) for seed in seeds]
            self._block, self._used = torch.empty((shape[0], ahead, *shape[1:]), dtype=x.dtype), ahead
        expected = (self._block.shape[0], *self._block.shape[2:])
        if shape != expected or x.dtype != self._block.dtype:
            raise ValueError(
                f"this PerSampleNoise gives {tuple(expected)}, {self._block.dtype}, but {shape}, {x.dtype} was asked: "
                "make one for each run, and use it with samplers that keep the whole batch together"
            )
        if self._used == ahead:
            # half precision is drawn in single
            drawn = self._block if x.dtype in (torch.float32, torch.float64) else self._block.float()
            self._fill(drawn.numpy())
            self._block.copy_(drawn)
            self._used = 0
        self._used += 1
        return self._block[:, self._used - 1].to(x.device, copy=True)

    def _fill(self, rows: np.ndarray) -> None:
        """Draw the next numbers of every stream, on as many threads as torch uses (NumPy lets them run)."""

        def draw(part: slice) -> None:
            for row, stream in zip(rows[part], self._streams[part], strict=True):
                stream.standard_normal(dtype=row.dtype, out=row)

        threads = min(torch.get_num_threads(), max(1, rows.size // 2**18))
        parts = [slice(k * len(rows) // threads, (k + 1) * len(rows) // threads) for k in range(threads)]
        if threads == 1:
            draw(parts[0])
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(draw, parts))


class Noise:
    """``noise(x)``: standard normal noise like x, drawn from one generator (by default freshly seeded).

    With ``reuse`` the memory of one call is overwritten by the next, so nothing may be kept.
    """

    def __init__(self, generator: torch.Generator | PerSampleNoise | None = None, *, reuse: bool = False) -> None:
        if generator is not None and not isinstance(generator, (torch.Generator, PerSampleNoise)):
            raise TypeError(
                f"generator is {type(generator).__name__}; expected a torch.Generator, such as "
                "torch.Generator().manual_seed(0), or a scorelab.PerSampleNoise(seed)"
            )
        if isinstance(generator, PerSampleNoise):
            generator = generator.fresh()
        self.generator = fresh_generator() if generator is None else generator
        self._reuse, self._memory = reuse, torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        """Noise of x's shape, dtype and device."""
        if isinstance(self.generator, PerSampleNoise):
            return self.generator(x)
        if not self._reuse or self.generator.device != x.device:
            return randn(tuple(x.shape), x, self.generator)
        if self._memory.shape != x.shape or self._memory.dtype != x.dtype or self._memory.device != x.device:
            self._memory = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return self._memory.normal_(generator=self.generator)
