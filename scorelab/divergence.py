"""Traces of Jacobians of batched vector fields: tr(d f / d x), exactly, by Hutchinson's probes or by Hutch++.

Hutchinson, A stochastic estimator of the trace of the influence matrix, 1990: E[v' J v] = tr J for E[v v'] = I.
Hutch++ takes the trace exactly on the span Q of J' S for random S, where most of it often lies, and probes the rest:

    tr J = tr(Q' J Q) + E[w' J w],    w = (I - Q Q') v

Meyer, Musco, Musco and Woodruff, Hutch++: Optimal Stochastic Trace Estimation, 2021, arXiv:2010.09649.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from scorelab.noise import randn
from scorelab.typing import Tensor

__all__ = ["exact", "hutchinson", "hutchpp", "probes", "rademacher"]

Field = Callable[[Tensor], Tensor]


def exact(field: Field, x: Tensor, *, create_graph: bool = False) -> tuple[Tensor, Tensor]:
    """f(x) and tr(df/dx), (B,), by one backward pass a dimension; x (B, *D), every sample independent of the others."""
    with torch.enable_grad():
        x = x if create_graph and x.requires_grad else x.detach().requires_grad_(True)
        value = field(x)
        flat = value.reshape(len(x), -1)
        trace = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        if not value.requires_grad:  # a constant field
            return value, trace
        last = flat.shape[1] - 1
        for i in range(flat.shape[1]):
            (row,) = torch.autograd.grad(
                flat[:, i].sum(), x, create_graph=create_graph, retain_graph=create_graph or i < last
            )
            trace = trace + row.reshape(len(x), -1)[:, i]
    return (value, trace) if create_graph else (value.detach(), trace.detach())


def hutchinson(field: Field, x: Tensor, probes: Tensor, *, create_graph: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """f(x), tr(df/dx) as the mean of v'Jv over probes (P, B, *D), and the P single estimates (P, B)."""
    with torch.enable_grad():
        x = x if create_graph and x.requires_grad else x.detach().requires_grad_(True)
        value = field(x)
        estimates = []
        if not value.requires_grad:  # a constant field
            still = torch.zeros(len(probes), len(x), dtype=x.dtype, device=x.device)
            return value, still.mean(0), still
        for i, v in enumerate(probes):
            (product,) = torch.autograd.grad(
                value, x, v, create_graph=create_graph, retain_graph=create_graph or i < len(probes) - 1
            )
            estimates.append((product * v).reshape(len(x), -1).sum(1))
        single = torch.stack(estimates)
    if not create_graph:
        value, single = value.detach(), single.detach()
    return value, single.mean(0), single


def hutchpp(
    field: Field, x: Tensor, sketch: Tensor, probes: Tensor, *, create_graph: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """f(x), tr(df/dx) by Hutch++ and the P single estimates (P, B): sketch (K, B, *D), probes (P, B, *D).

    With K of the data's dimension or more the trace is exact. Costs 2 K + P backward passes.
    """
    with torch.enable_grad():
        x = x if create_graph and x.requires_grad else x.detach().requires_grad_(True)
        value = field(x)
        if not value.requires_grad:  # a constant field
            still = torch.zeros(len(probes), len(x), dtype=x.dtype, device=x.device)
            return value, still.mean(0), still

        def products(vectors: Tensor) -> Tensor:
            """J' v for vectors (K, B, D)."""
            rows = [
                torch.autograd.grad(value, x, v.reshape_as(value), create_graph=create_graph, retain_graph=True)[0]
                for v in vectors
            ]
            return torch.stack(rows).flatten(2)

        flat = sketch.flatten(2)[: x[0].numel()]
        # an orthonormal basis for each sample, (B, D, K); it is a choice of estimator, so no gradient goes through it
        basis = torch.linalg.qr(products(flat).detach().permute(1, 2, 0)).Q
        inside = basis.permute(2, 0, 1)
        known = (products(inside) * inside).sum((0, 2))
        v = probes.flatten(2)
        outside = v - torch.einsum("bdk,pbk->pbd", basis, torch.einsum("bek,pbe->pbk", basis, v))
        single = known + (products(outside) * outside).sum(2)
    if not create_graph:
        value, single = value.detach(), single.detach()
    return value, single.mean(0), single


def probes(kind: str, shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Probes with E[v v'] = I: "rademacher" signs, which vary least, or "gaussian"."""
    return rademacher(shape, like, generator) if kind == "rademacher" else randn(shape, like, generator)


def rademacher(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Signs +1 and -1 with equal probability: the probe of least variance among independent ones."""
    bits = torch.randint(0, 2, shape, generator=generator, device=generator.device)
    return (2 * bits - 1).to(device=like.device, dtype=like.dtype)
