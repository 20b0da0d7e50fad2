"""Exact problems: distributions and processes that many tests share, in float64."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from scorelab import VE, VP, Cosine, DiscreteVP, Flow, SubVP, parallel
from scorelab.distributions import Gaussian, GaussianMixture, target
from scorelab.processes import cosine_betas, linear_betas

REFERENCE = Path(__file__).parent / "reference"
F64 = torch.float64

PROCESSES = {
    "ve": VE(),
    "vp": VP(),
    "subvp": SubVP(),
    "cosine": Cosine(),
    "flow": Flow(),
    "ddpm": DiscreteVP(linear_betas()),
    "ddpm_cosine": DiscreteVP(cosine_betas()),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=generator(seed))


def correlated() -> Gaussian:
    """A 3-D Gaussian with a full covariance."""
    a = randn(3, 3, seed=7)
    return Gaussian(torch.tensor([1.0, -2.0, 0.5], dtype=F64), a @ a.T / 3 + 0.2 * torch.eye(3, dtype=F64))


def mixture() -> GaussianMixture:
    """Three components of different widths and weights in 2-D."""
    return GaussianMixture(
        torch.tensor([[0.0, 0.0], [2.0, 1.0], [-1.0, 2.0]], dtype=F64),
        torch.tensor([0.3, 0.5, 0.2], dtype=F64),
        torch.tensor([0.5, 0.3, 0.2], dtype=F64),
    )


def ring() -> GaussianMixture:
    found = target("ring", dtype=F64)
    assert isinstance(found, GaussianMixture)
    return found


def as_processes(monkeypatch, count, run):
    """What ``run(rank)`` returns, or raises, in threads that take themselves for processes and wait for each other."""
    place, barrier, told, found = threading.local(), threading.Barrier(count, timeout=60), {}, {}

    def most(*values):
        told[place.rank] = values
        barrier.wait()
        largest = [max(v) for v in zip(*told.values(), strict=True)]
        barrier.wait()
        return largest

    def ran(rank):
        place.rank = rank
        try:
            found[rank] = run(rank)
        except Exception as error:
            found[rank] = error

    with monkeypatch.context() as patched:
        patched.setattr(parallel, "world", lambda: (place.rank, count))
        patched.setattr(parallel, "wait", barrier.wait)
        patched.setattr(parallel, "most", most)
        threads = [threading.Thread(target=ran, args=(rank,)) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return [found[rank] for rank in range(count)]
