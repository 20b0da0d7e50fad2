"""Traces of Jacobians of batched vector fields: tr(d f / d x), exactly, by Hutchinson's probes or by Hutch++.

Hutchinson, A stochastic estimator of the trace of the influence matrix, 1990: E[v' J v] = tr J for E[v v'] = I.
Hutch++ takes the trace exactly on the span of an orthonormal Q (K vectors of D) and probes the rest:

    tr J = tr(Q' J Q) + E[w' J w],    w = sqrt(D - K) (I - Q Q') v / |(I - Q Q') v|,    v Gaussian

It is unbiased for any Q that does not depend on v; Q spans J' S for random S, where most of the trace often lies. The
length of w is set, so that a multiple of the identity, which the Jacobian of a velocity always has in it, adds no
variance: with (I - Q Q') v itself Hutch++ was ten times worse there than Hutchinson's signs.

Meyer, Musco, Musco and Woodruff, Hutch++: Optimal Stochastic Trace Estimation, 2021, arXiv:2010.09649; the length:
Epperly, Tropp and Webber, XTrace, 2024, arXiv:2301.07825.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from scorelab.noise import randn
from scorelab.typing import Tensor

__all__ = ["check_followed", "exact", "hutchinson", "hutchpp", "kernels", "leaf", "probes", "rademacher", "split"]

Field = Callable[[Tensor], Tensor]


def kernels(twice: bool) -> AbstractContextManager[None]:
    """Within it what is to be differentiated twice computes attention by matrix products: fused kernels have one
    derivative only."""
    return sdpa_kernel(SDPBackend.MATH) if twice else nullcontext()


def leaf(x: Tensor) -> Tensor:
    """x as a new variable to differentiate by; ValueError under torch.inference_mode, where that can't be done."""
    if torch.is_inference_mode_enabled():
        raise ValueError("this differentiates, and torch.inference_mode is on; expected torch.no_grad in its place")
    x = x.detach()
    return (x.clone() if x.is_inference() else x).requires_grad_(True)


def check_followed(output: Tensor, what: str) -> None:
    """Refuse (ValueError) an output that autograd can't follow back to x0_hat."""
    if not output.requires_grad:
        raise ValueError(
            f"the {what}'s output carries no gradient, and the likelihood needs that of x0_hat; expected one "
            "that autograd can follow: no torch.no_grad, detach or NumPy inside"
        )


def exact(field: Field, x: Tensor, *, create_graph: bool = False) -> tuple[Tensor, Tensor]:
    """f(x) and tr(df/dx), (B,), by one backward pass a dimension; x (B, *D), every sample independent of the others."""
    with torch.enable_grad():
        x = x if create_graph and x.requires_grad else x.detach().requires_grad_(True)
        with kernels(create_graph):
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
        with kernels(create_graph):
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


def split(field: Field, x: Tensor, sketch: Tensor, gaussian: Tensor) -> tuple[Tensor, Tensor]:
    """Q (K, B, *D) of the Jacobian at x by K backward passes, and w (P, B, *D), from S (K, B, *D) and v (P, B, *D).

    For a solve they are made once: a Q that follows x turns fast where J' S is nearly singular, and the solver with it.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        value = field(x)
        rows = [s for s in sketch]
        if value.requires_grad:
            rows = [torch.autograd.grad(value, x, s, retain_graph=True)[0] for s in sketch]
    # (B, D, K)
    basis = torch.linalg.qr(torch.stack(rows).flatten(2)[: x[0].numel()].permute(1, 2, 0)).Q
    v = gaussian.flatten(2)
    w = v - torch.einsum("bdk,pbk->pbd", basis, torch.einsum("bek,pbe->pbk", basis, v))
    length = math.sqrt(basis.shape[1] - basis.shape[2])
    w = w * (length / w.norm(dim=2, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny))
    return basis.permute(2, 0, 1).reshape(-1, *x.shape), w.reshape_as(gaussian)


def hutchpp(
    field: Field, x: Tensor, inside: Tensor, outside: Tensor, *, create_graph: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """f(x), tr(df/dx) by Hutch++ and the P single estimates (P, B), with what ``split`` made; K + P backward passes."""
    value, _, single = hutchinson(field, x, torch.cat([inside, outside]), create_graph=create_graph)
    single = single[: len(inside)].sum(0) + single[len(inside) :]
    return value, single.mean(0), single


def probes(kind: str, shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Probes with E[v v'] = I: "rademacher" signs, which vary least, or "gaussian"."""
    return rademacher(shape, like, generator) if kind == "rademacher" else randn(shape, like, generator)


def rademacher(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Signs +1 and -1 with equal probability: the probe of least variance among independent ones."""
    bits = torch.randint(0, 2, shape, generator=generator, device=generator.device)
    return (2 * bits - 1).to(device=like.device, dtype=like.dtype)
