"""What is measured of data: y = A(x0) + noise_std eps. Operators take and return batches, one row a sample.

A linear operator has an adjoint, <A x, y> = <x, A' y>, and where that is cheap its singular values and vectors,

    A = U diag(s) V',     A A' = U diag(s^2) U'

as maps to coordinates and back: V' and U' are unitary, so noise keeps its law in them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from scorelab.checks import check_batch
from scorelab.noise import counter_generator
from scorelab.tables import Table
from scorelab.typing import Shape, Tensor

__all__ = [
    "SVD",
    "Composition",
    "LinearFunction",
    "LinearOperator",
    "NonlinearFunction",
    "Operator",
    "PhaseRetrieval",
]


class Operator(ABC):
    """y = A(x0): x0 (B, *data_shape) to (B, *shape), row by row.

    ``lipschitz``: a bound of ||A(x) - A(x')|| / ||x - x'||, None if it is not known. ``averages``: whether each number
    of y is a weighted mean of the data's, so that it lies in their range. Calls raise ValueError for another shape.
    """

    lipschitz: float | None = None
    averages: bool = False

    def __init__(self, data_shape: Shape, shape: Shape) -> None:
        self.data_shape, self.shape = tuple(data_shape), tuple(shape)
        if not self.data_shape or min(self.data_shape) < 1:
            raise ValueError(f"data_shape is {data_shape}; expected the shape of one sample, such as (3, 32, 32)")

    def __call__(self, x0: Tensor) -> Tensor:
        """A(x0), (B, *shape)."""
        check_batch(x0, "x0", self.data_shape)
        # Fourier transforms of no samples fail
        return self._apply(x0) if len(x0) else x0.new_zeros(0, *self.shape)

    @abstractmethod
    def _apply(self, x0: Tensor) -> Tensor: ...

    def __matmul__(self, inner: Operator) -> Operator:
        """This operator after another: (A @ B)(x0) = A(B(x0)); linear if both are."""
        both = isinstance(self, LinearOperator) and isinstance(inner, LinearOperator)
        return Composition(self, inner) if both else _After(self, inner)


@dataclass(frozen=True)
class SVD:
    """A = U diag(s) V': ``vt`` (B, *data_shape) -> (B, n) coordinates, of which the first r = len(s) belong to the
    singular values, ``v`` back from n or r of them; ``ut`` (B, *shape) -> (B, r), ``u`` back."""

    singular: Table
    vt: Callable[[Tensor], Tensor]
    v: Callable[[Tensor], Tensor]
    ut: Callable[[Tensor], Tensor]
    u: Callable[[Tensor], Tensor]

    def s(self, like: Tensor) -> Tensor:
        """The singular values (r,), real, those that are rounding as 0."""
        s = self.singular.like(like.real if like.is_complex() else like)
        return s.masked_fill(s <= 10 * torch.finfo(s.dtype).eps * s.max(), 0.0)


class LinearOperator(Operator):
    """One with an adjoint; ``svd`` is None where it is not cheap."""

    svd: SVD | None = None

    def adjoint(self, y: Tensor) -> Tensor:
        """A' y, (B, *data_shape), of y (B, *shape)."""
        check_batch(y, "y", self.shape)
        return self._adjoint(y) if len(y) else y.new_zeros(0, *self.data_shape)

    @abstractmethod
    def _adjoint(self, y: Tensor) -> Tensor: ...


class Composition(LinearOperator):
    """outer(inner(x0)), both linear."""

    def __init__(self, outer: Operator, inner: Operator) -> None:
        if not isinstance(outer, LinearOperator) or not isinstance(inner, LinearOperator):
            raise TypeError(f"got {type(outer).__name__} and {type(inner).__name__}; expected linear operators: use @")
        _check_chain(outer, inner)
        super().__init__(inner.data_shape, outer.shape)
        self.outer, self.inner = outer, inner
        self.averages, self.lipschitz = outer.averages and inner.averages, _product(outer, inner)

    def _apply(self, x0: Tensor) -> Tensor:
        return self.outer(self.inner(x0))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.inner.adjoint(self.outer.adjoint(y))


class _After(Operator):
    """outer(inner(x0)), not linear."""

    def __init__(self, outer: Operator, inner: Operator) -> None:
        _check_chain(outer, inner)
        super().__init__(inner.data_shape, outer.shape)
        self.outer, self.inner, self.lipschitz = outer, inner, _product(outer, inner)

    def _apply(self, x0: Tensor) -> Tensor:
        return self.outer(self.inner(x0))


def _check_chain(outer: Operator, inner: Operator) -> None:
    if outer.data_shape != inner.shape:
        raise ValueError(
            f"the outer operator takes {outer.data_shape}, the inner one gives {inner.shape}; expected the same shape"
        )


def _product(outer: Operator, inner: Operator) -> float | None:
    return None if outer.lipschitz is None or inner.lipschitz is None else outer.lipschitz * inner.lipschitz


class LinearFunction(LinearOperator):
    """Any linear function of a batch, row by row, with an adjoint by autograd if none is given.

    example: a batch (B, *data_shape) such as fn takes, of its dtype and device. Raises ValueError for a function that
    is not linear, and for an adjoint that is not its own, seen at random points around the example.
    """

    def __init__(
        self,
        fn: Callable[[Tensor], Tensor],
        example: Tensor,
        adjoint: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        check_batch(example, "example")
        self.fn, self._given = fn, adjoint
        super().__init__(tuple(example.shape[1:]), _shape_of(fn, example))
        generator = counter_generator(1)
        v, w = (torch.randn(example.shape, generator=generator, dtype=example.dtype).to(example) for _ in range(2))
        # beside an example of zeros every function without offset would look linear
        v = example + v
        with torch.no_grad():
            sum_, parts = fn(v + w), (fn(v), fn(w))
        off = float((sum_ - parts[0] - parts[1]).norm())
        if not off <= 1e-3 * float(parts[0].norm() + parts[1].norm()):
            raise ValueError(
                f"fn(a + b) differs from fn(a) + fn(b) by {off:.3g}; expected a linear function, without offset: use "
                "NonlinearFunction, or subtract fn(0) from it and from y"
            )
        if adjoint is not None:
            self._check_adjoint(w, parts[1])

    def _check_adjoint(self, x0: Tensor, value: Tensor) -> None:
        """Refuse (ValueError) an adjoint that is none: <A x, y> = <x, A' y>."""
        y = torch.randn(value.shape, generator=counter_generator(2), dtype=value.dtype).to(value)
        with torch.no_grad():
            back = self.adjoint(y)
        if back.shape != x0.shape:
            raise ValueError(f"adjoint returned {tuple(back.shape)} for {tuple(y.shape)}; expected {tuple(x0.shape)}")
        off = float(((value * y).sum() - (x0 * back).sum()).abs())
        if not off <= 1e-3 * float(value.norm() * y.norm()):
            raise ValueError(f"<fn(x), y> differs from <x, adjoint(y)> by {off:.3g}; expected fn's adjoint, or none")

    def _apply(self, x0: Tensor) -> Tensor:
        return self.fn(x0)

    def _adjoint(self, y: Tensor) -> Tensor:
        if self._given is not None:
            return self._given(y)
        graph = torch.is_grad_enabled() and y.requires_grad
        with torch.enable_grad():
            x0 = torch.zeros(len(y), *self.data_shape, dtype=y.dtype, device=y.device, requires_grad=True)
            out = self.fn(x0)
            if not out.requires_grad:
                raise ValueError(
                    "fn has no adjoint: autograd can't follow it; expected adjoint=, or a function of torch operations"
                )
            return torch.autograd.grad(out, x0, y, create_graph=graph)[0]


def _shape_of(fn: Callable[[Tensor], Tensor], example: Tensor) -> Shape:
    """The shape of one row of fn's output."""
    with torch.no_grad():
        out = fn(example)
    if not isinstance(out, Tensor) or out.ndim < 2 or len(out) != len(example):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"fn returned {got} for {len(example)} samples; expected a tensor with a row for each")
    return tuple(out.shape[1:])


class NonlinearFunction(Operator):
    """Any function of a batch, row by row, that autograd can follow; example as for ``LinearFunction``."""

    def __init__(self, fn: Callable[[Tensor], Tensor], example: Tensor, lipschitz: float | None = None) -> None:
        check_batch(example, "example")
        super().__init__(tuple(example.shape[1:]), _shape_of(fn, example))
        self.fn, self.lipschitz = fn, lipschitz

    def _apply(self, x0: Tensor) -> Tensor:
        return self.fn(x0)


class PhaseRetrieval(Operator):
    """The amplitudes |F x0| of the unitary Fourier transform of each channel, zero-padded by ``oversampling``.

    x0, -x0, its shifts and its reflection have the same amplitudes. Chung et al., 2023, arXiv:2209.14687, pad 256
    pixels by 64 on every side: oversampling = 1.5.
    """

    lipschitz = 1.0

    def __init__(self, data_shape: Shape, oversampling: float = 2.0) -> None:
        if not 1 <= oversampling < math.inf or len(data_shape) < 2:
            raise ValueError(f"oversampling is {oversampling:g}, data {data_shape}; expected >= 1 and (C, *spatial)")
        self._wide = tuple(round(oversampling * n) for n in data_shape[1:])
        super().__init__(data_shape, (data_shape[0], *self._wide))

    def _apply(self, x0: Tensor) -> Tensor:
        waves: Tensor = torch.fft.fftn(x0, self._wide, dim=tuple(range(2, x0.ndim)), norm="ortho")
        return waves.abs()
