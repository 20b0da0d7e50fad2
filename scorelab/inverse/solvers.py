"""Linear systems of a batch, each row its own: conjugate gradients and GMRES on matrix-free operators.

Rows that have converged stand still, so no row's result depends on how long its neighbours take. Hestenes and Stiefel,
Methods of Conjugate Gradients for Solving Linear Systems, 1952; Saad and Schultz, GMRES, 1986.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from scorelab.typing import Tensor

__all__ = ["conjugate_gradients", "gmres"]

Map = Callable[[Tensor], Tensor]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def _floor(b: Tensor, tol: float) -> Tensor:
    """Norms of residuals (B,) at which a row has converged: what rounding leaves, at least."""
    length: Tensor = b.norm(dim=1)
    return length * max(tol, 8 * torch.finfo(b.dtype).eps)


def _warn(left: Tensor, floor: Tensor, tol: float, iterations: int, name: str) -> None:
    """RuntimeWarning of rows that have not converged."""
    if bool((left > floor).any()):
        worst = float((left / floor.clamp_min(torch.finfo(left.dtype).tiny)).max()) * tol
        other = ", or take solver='gmres' where the score's Jacobian is not symmetric" if name != "GMRES" else ""
        warnings.warn(
            f"{name} left a relative residual of {worst:.3g} after {iterations} iterations; expected {tol:g}: raise "
            f"iterations or tol{other}",
            RuntimeWarning,
            stacklevel=6,
        )


def conjugate_gradients(apply: Map, b: Tensor, tol: float, iterations: int) -> Tensor:
    """z with apply(z) = b, both (B, M), apply symmetric and positive on the span of b; RuntimeWarning where it fails.

    A row whose direction has no positive curvature, as of a matrix that is not positive or not symmetric, stops there.
    The iterate of the least residual is returned, for residuals of such a matrix may grow without bound.
    """
    z, best, residual = torch.zeros_like(b), torch.zeros_like(b), b
    direction, square, floor = b, _dot(b, b), _floor(b, tol)
    least = square.sqrt()
    alive = least > floor
    for _ in range(iterations):
        if not bool(alive.any()):
            break
        image = apply(direction)
        curvature = _dot(direction, image)
        alive = alive & (curvature > 0)
        step = torch.where(alive, square / curvature, 0.0).unsqueeze(1)
        z, residual = z + step * direction, residual - step * image
        after = _dot(residual, residual)
        direction = residual + torch.where(alive, after / square, 0.0).unsqueeze(1) * direction
        square = torch.where(alive, after, square)
        better = square.sqrt() < least
        best, least = torch.where(better.unsqueeze(1), z, best), torch.where(better, square.sqrt(), least)
        alive = alive & (least > floor)
    _warn(least, floor, tol, iterations, "conjugate gradients")
    return best


def gmres(apply: Map, b: Tensor, tol: float, iterations: int) -> Tensor:
    """z with apply(z) = b, both (B, M), for any apply: the least residual over a Krylov space, which is kept whole."""
    length, floor, tiny = b.norm(dim=1, keepdim=True), _floor(b, tol), torch.finfo(b.dtype).tiny
    basis = [b / length.clamp_min(tiny)]
    columns: list[Tensor] = []
    most = min(iterations, b.shape[1])
    z, left = torch.zeros_like(b), length.squeeze(1)
    for k in range(most):
        alive = left > floor
        if not bool(alive.any()):
            break
        w, column = apply(basis[-1]), b.new_zeros(len(b), most + 1)
        # twice: once leaves directions of rounding that are not orthogonal
        for _ in range(2):
            for j, q in enumerate(basis):
                share = _dot(q, w)
                column[:, j] += share
                w = w - share.unsqueeze(1) * q
        norm = w.norm(dim=1, keepdim=True)
        if not bool(torch.isfinite(norm).all()):
            raise ValueError(
                "GMRES met numbers that are not finite; expected a score with a finite derivative, and a noise_std of "
                "the measurement's size"
            )
        # the space is exhausted where nothing but rounding is left
        kept = norm > 64 * torch.finfo(b.dtype).eps * column.norm(dim=1, keepdim=True)
        column[:, k + 1] = torch.where(kept, norm, 0.0).squeeze(1)
        basis.append(torch.where(kept, w / norm.clamp_min(tiny), 0.0))
        columns.append(column)
        # (B, k + 2, k + 1)
        upper = torch.stack(columns, 2)[:, : k + 2]
        target = torch.cat([length, length.new_zeros(len(b), k + 1)], 1).unsqueeze(2)
        weights = torch.linalg.pinv(upper) @ target
        left = torch.where(alive, (target - upper @ weights).flatten(1).norm(dim=1), left)
        found = (torch.stack(basis[:-1], 2) @ weights).squeeze(2)
        z = torch.where(alive.unsqueeze(1), found, z)
    _warn(left, floor, tol, most, "GMRES")
    return z
