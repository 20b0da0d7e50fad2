"""Where randomness comes from: standard normal noise drawn from a generator, never from global state by surprise.

A generator lives on one device; noise for x is drawn there and moved to x's device, so a CPU generator gives the same
noise on every device.
"""

from __future__ import annotations

import torch

from scorelab.typing import Tensor

__all__ = ["Noise", "fresh_generator", "randn"]


def randn(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of the given shape, in the dtype and on the device of ``like``."""
    noise = torch.randn(shape, generator=generator, dtype=like.dtype, device=generator.device)
    return noise.to(like.device)


def fresh_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded from the operating system: global random state is neither read nor changed."""
    generator = torch.Generator(device)
    generator.seed()
    return generator


class Noise:
    """``noise(x)``: standard normal noise like x, drawn from one generator (by default freshly seeded)."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator is {type(generator).__name__}; expected a torch.Generator: "
                "torch.Generator().manual_seed(0) makes one"
            )
        self.generator = fresh_generator() if generator is None else generator

    def __call__(self, x: Tensor) -> Tensor:
        """Noise of x's shape, dtype and device."""
        return randn(tuple(x.shape), x, self.generator)
