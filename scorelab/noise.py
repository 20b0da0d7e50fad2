"""Where randomness comes from: standard normal noise drawn from a generator, never from global state by surprise.

A generator lives on one device; noise for x is drawn there and moved to x's device, so a CPU generator gives the same
noise on every device.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from scorelab.typing import Shape, Tensor

__all__ = ["Noise", "PerSampleNoise", "counted", "counter_generator", "fresh_generator", "randn", "streams"]

_BLOCK = 2**14
"""Numbers that a generator of ``counted`` draws, about."""
_AHEAD = 2**12
"""Numbers drawn at once for a sample, about: enough that a call costs little beside them."""
_CALLS = 64
"""Of how many calls of noise they are, at most: small samples would draw far more than a run needs."""


def randn(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of the given shape, in the dtype and on the device of ``like``."""
    noise = torch.randn(shape, generator=generator, dtype=like.dtype, device=generator.device)
    return noise.to(like.device)


def counter_generator(*counters: int) -> torch.Generator:
    """A CPU generator that depends on these counters alone; it has 32 bits, so of many thousands some are alike."""
    seed = 0
    for counter in counters:
        # splitmix64: neighbouring counters give unrelated seeds
        seed = (seed + counter + 0x9E3779B97F4A7C15) & (2**64 - 1)
        seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        seed ^= seed >> 31
    return torch.Generator().manual_seed(seed)


def counted(kind: str, shape: Shape, rows: range, *counters: int) -> Tensor:
    """Numbers, "normal" or "uniform" on [0, 1), for these rows of a batch of samples of ``shape``: float32, on the CPU.

    A row follows from the counters, four at most, and its place alone, whichever rows are asked for beside it: blocks
    of rows, whose size is a function of the shape, have a stream each. Streams are Philox's, with the counters as its
    key and counter as they are, so no two are alike. Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011.
    """
    words = np.array([c % 2**64 for c in (*counters, 0, 0, 0, 0)[:4]], np.uint64)
    size = max(1, _BLOCK // math.prod(shape))
    parts = []
    for k in range(rows.start // size, -(-rows.stop // size)):
        # the lowest word counts the numbers drawn
        bits = np.random.Philox(key=words[:2], counter=np.array([0, k, *words[2:]], np.uint64))
        stream = np.random.Generator(bits)
        place = (size, *shape)
        drawn = stream.standard_normal(place, np.float32) if kind == "normal" else stream.random(place, np.float32)
        block = torch.from_numpy(drawn)
        parts.append(block[max(0, rows.start - k * size) : rows.stop - k * size])
    return torch.cat(parts)


def fresh_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded from the operating system: global random state is neither read nor changed."""
    generator = torch.Generator(device)
    generator.seed()
    return generator


class PerSampleNoise:
    """Noise in which sample i depends on (seed, i) alone, whatever the batch size, the chunks or the processes.

    Every sample has a generator of its own on the CPU (torch's Mersenne Twister, whose seeds have 32 bits: a bijection
    keyed by ``seed`` takes i to its seed, so no two samples of a ``seed`` share a stream). ``first`` is the index of
    the first one. Pass it as ``generator``: every call of ``sample`` starts it afresh. Numbers are drawn ahead in
    blocks whose size follows from the shape of a sample alone. Called by hand, an object serves one batch: ``rows`` and
    ``fresh`` give unused ones.
    """

    stream_bytes = 3 * 2**10
    """Memory that the generator of a sample takes, beside the tensors."""

    def __init__(self, seed: int, first: int = 0) -> None:
        if not isinstance(seed, int) or not isinstance(first, int) or min(seed, first) < 0:
            raise ValueError(f"seed = {seed!r}, first = {first!r}; expected whole numbers >= 0")
        self.seed, self.first = seed, first
        self._branch = 0
        self._streams: list[torch.Generator] | None = None
        self._block, self._used = torch.empty(0), 0

    def rows(self, start: int) -> PerSampleNoise:
        """The noise of the samples from ``start`` on, from its beginning."""
        made = PerSampleNoise(self.seed, self.first + start)
        made._branch = self._branch
        return made

    def branch(self, k: int) -> PerSampleNoise:
        """Other noise of the same samples, numbered k >= 1, from its beginning."""
        made = self.fresh()
        made._branch = k
        return made

    def fresh(self) -> PerSampleNoise:
        """The same noise from its beginning."""
        return self.rows(0)

    def __call__(self, x: Tensor) -> Tensor:
        """Noise of x's shape, dtype and device; row k belongs to sample first + k."""
        shape = (len(x), *x.shape[1:])
        # half precision is drawn in single
        dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        if self._streams is None:
            seed = (self.seed, self._branch) if self._branch else self.seed
            self._streams = streams(seed, self.first, len(x))
            ahead = max(1, min(_CALLS, _AHEAD // max(1, math.prod(shape[1:]))))
            self._block, self._used = torch.empty((shape[0], ahead, *shape[1:]), dtype=dtype), ahead
        expected = (self._block.shape[0], *self._block.shape[2:])
        if shape != expected or dtype != self._block.dtype:
            raise ValueError(
                f"this PerSampleNoise gives {tuple(expected)}, {self._block.dtype}, but {shape}, {x.dtype} was asked: "
                "make one for each run, and use it with samplers that keep the whole batch together"
            )
        if self._used == self._block.shape[1]:
            for row, stream in zip(self._block, self._streams, strict=True):
                row.normal_(generator=stream)
            self._used = 0
        self._used += 1
        return self._block[:, self._used - 1].to(x.device, x.dtype, copy=True)


def streams(seed: int | tuple[int, ...], first: int, count: int) -> list[torch.Generator]:
    """CPU generators numbered ``first`` to ``first + count``, no two of a seed alike; ValueError past 2^32 of them."""
    if first + count > 2**32:
        raise ValueError(f"samples {first} to {first + count} of one seed; expected fewer than 2^32: take a new seed")
    keys = np.random.SeedSequence(seed).generate_state(3)
    place = np.arange(first, first + count, dtype=np.uint64).astype(np.uint32)
    for key in keys:
        # MurmurHash3's final mix: every step can be undone, so different places stay different
        place = place ^ key
        place = (place ^ (place >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        place = (place ^ (place >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        place = place ^ (place >> np.uint32(16))
    return [torch.Generator().manual_seed(s) for s in place.tolist()]


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
        self._reuse, self._memory, self._branches = reuse, torch.empty(0), 0

    def branch(self) -> Noise:
        """Noise that may be drawn as often as a batch needs: what PerSampleNoise gives afterwards stays the same."""
        if not isinstance(self.generator, PerSampleNoise):
            return self
        self._branches += 1
        return Noise(self.generator.branch(self._branches))

    def __call__(self, x: Tensor) -> Tensor:
        """Noise of x's shape, dtype and device."""
        if isinstance(self.generator, PerSampleNoise):
            return self.generator(x)
        if not self._reuse or self.generator.device != x.device:
            return randn(tuple(x.shape), x, self.generator)
        if self._memory.shape != x.shape or self._memory.dtype != x.dtype or self._memory.device != x.device:
            self._memory = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return self._memory.normal_(generator=self.generator)
