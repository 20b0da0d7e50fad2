"""Linear operators with known singular values: inpainting, colourisation, super-resolution, matrices, blur.

A mean over groups of n numbers has the one singular value n^-1/2; V is the Householder reflection that takes the first
unit vector to (1, ..., 1)/sqrt(n). A circular blur is diagonal in Fourier's basis, where coordinates are complex and
the kernel's phase belongs to U.

Kawar et al., Denoising Diffusion Restoration Models, 2022, arXiv:2201.11793, appendix D.
"""

from __future__ import annotations

import math

import torch

from scorelab.inverse.operators import SVD, LinearOperator
from scorelab.tables import Table
from scorelab.typing import Shape, Tensor

__all__ = ["Blur", "Colourisation", "Inpainting", "Matrix", "SuperResolution"]


class Inpainting(LinearOperator):
    """The known numbers of x0, in order, (B, n): ``known`` is True where they are known.

    known: bool, of ``data_shape`` or broadcast to it, such as (1, H, W) for images of any channels.
    """

    averages, lipschitz = True, 1.0

    def __init__(self, known: Tensor, data_shape: Shape | None = None) -> None:
        shape = tuple(known.shape if data_shape is None else data_shape)
        if known.dtype != torch.bool:
            raise TypeError(f"known has dtype {known.dtype}; expected bool, True where known: known = mask > 0")
        fits = len(known.shape) <= len(shape) and all(
            a in (1, b) for a, b in zip(reversed(known.shape), reversed(shape), strict=False)
        )
        if not fits:
            raise ValueError(f"known has shape {tuple(known.shape)}; expected that of the data, {shape}, or (1, H, W)")
        self.known = known.expand(shape)
        flat = self.known.flatten().cpu()
        if not bool(flat.any()):
            raise ValueError("known is False everywhere; expected at least one known number: there is no measurement")
        super().__init__(shape, (int(flat.sum()),))
        order = torch.cat([flat.nonzero().flatten(), (~flat).nonzero().flatten()])
        self._order, self._place, self._mask = Table(order), Table(order.argsort()), Table(self.known)
        self.svd = SVD(Table(torch.ones(self.shape)), self._vt, self._v, lambda y: y, lambda c: c)

    def _take(self, flat: Tensor, table: Table, count: int | None = None) -> Tensor:
        index = table.like(torch.empty(0, dtype=torch.long, device=flat.device))
        return flat.index_select(1, index if count is None else index.narrow(0, 0, count))

    def _apply(self, x0: Tensor) -> Tensor:
        return self._take(x0.flatten(1), self._order, self.shape[0])

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._v(y)

    def _vt(self, x0: Tensor) -> Tensor:
        return self._take(x0.flatten(1), self._order)

    def _v(self, c: Tensor) -> Tensor:
        return self._take(_padded(c, self.known.numel()), self._place).reshape(-1, *self.data_shape)

    def pasted(self, x: Tensor, y: Tensor) -> Tensor:
        """x with the known numbers replaced by y (B or 1, n), exactly."""
        mask = self._mask.like(torch.empty(0, dtype=torch.bool, device=x.device))
        return torch.where(mask, self._v(y.expand(len(x), -1)), x)


def _padded(c: Tensor, n: int) -> Tensor:
    """Coordinates (B, r) with n - r zeros after them."""
    return torch.cat([c, c.new_zeros(len(c), n - c.shape[1])], 1) if c.shape[1] < n else c


class _GroupMeans(LinearOperator):
    """The means of groups of ``size`` numbers, of which all of x0 is made; subclasses sort them."""

    averages = True

    def __init__(self, data_shape: Shape, shape: Shape, size: int) -> None:
        super().__init__(data_shape, shape)
        self.size, self.lipschitz = size, 1 / math.sqrt(size)
        singular = Table(torch.full((math.prod(shape),), size**-0.5, dtype=torch.float64))
        self.svd = SVD(singular, self._vt, self._v, lambda y: y.flatten(1), lambda c: c.reshape(-1, *self.shape))

    def _grouped(self, x0: Tensor) -> Tensor:
        """(B, size, groups)."""
        raise NotImplementedError

    def _ungrouped(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def _apply(self, x0: Tensor) -> Tensor:
        return self._grouped(x0).mean(1).reshape(-1, *self.shape)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._ungrouped((y.flatten(1) / self.size).unsqueeze(1).expand(-1, self.size, -1))

    def _reflected(self, z: Tensor) -> Tensor:
        """H z = z - w (w' z)/(1 - n^-1/2), w = e_1 - (1, ..., 1)/sqrt(n), along dimension 1; its own inverse."""
        if self.size == 1:
            return z
        root = self.size**-0.5
        first, rest = z.tensor_split((1,), 1)
        along = (first - root * z.sum(1, keepdim=True)) / (1 - root)
        return torch.cat([first - along * (1 - root), rest + along * root], 1)

    def _vt(self, x0: Tensor) -> Tensor:
        return self._reflected(self._grouped(x0)).flatten(1)

    def _v(self, c: Tensor) -> Tensor:
        groups = math.prod(self.shape)
        return self._ungrouped(self._reflected(_padded(c, groups * self.size).reshape(-1, self.size, groups)))


class Colourisation(_GroupMeans):
    """The mean of the channels, (B, 1, *spatial)."""

    def __init__(self, data_shape: Shape) -> None:
        super().__init__(data_shape, (1, *data_shape[1:]), data_shape[0])

    def _grouped(self, x0: Tensor) -> Tensor:
        return x0.flatten(2) if x0.ndim > 2 else x0.unsqueeze(2)

    def _ungrouped(self, z: Tensor) -> Tensor:
        return z.reshape(-1, *self.data_shape)


class SuperResolution(_GroupMeans):
    """The means of blocks of ``factor`` pixels a side, (B, C, *spatial / factor); data (C, L), (C, H, W) and so on."""

    def __init__(self, data_shape: Shape, factor: int) -> None:
        spatial = tuple(data_shape[1:])
        if factor < 1 or not spatial or any(n % factor for n in spatial):
            raise ValueError(
                f"factor is {factor} for data {tuple(data_shape)}; expected one that divides every size of {spatial}"
            )
        self.factor = factor
        super().__init__(data_shape, (data_shape[0], *(n // factor for n in spatial)), factor ** len(spatial))

    def _axes(self) -> tuple[list[int], list[int]]:
        """In x0 with each size n split into (n/factor, factor): the axes of blocks, and those inside them."""
        count = len(self.shape) - 1
        return [2 + 2 * i for i in range(count)], [3 + 2 * i for i in range(count)]

    def _grouped(self, x0: Tensor) -> Tensor:
        blocks, inside = self._axes()
        split = [k for n in self.shape[1:] for k in (n, self.factor)]
        return (
            x0.reshape(len(x0), self.shape[0], *split)
            .permute(0, *inside, 1, *blocks)
            .reshape(len(x0), self.size, math.prod(self.shape))
        )

    def _ungrouped(self, z: Tensor) -> Tensor:
        blocks, inside = self._axes()
        order = [0, *inside, 1, *blocks]
        back = [order.index(i) for i in range(len(order))]
        wide = z.reshape(len(z), *[self.factor] * len(inside), *self.shape)
        return wide.permute(back).reshape(len(z), *self.data_shape)


class Matrix(LinearOperator):
    """y = x0 M', (B, m), of the flattened data: M (m, n), n = prod(data_shape); compressed sensing and the like."""

    def __init__(self, matrix: Tensor, data_shape: Shape | None = None) -> None:
        shape = tuple(matrix.shape[1:] if data_shape is None else data_shape)
        if matrix.ndim != 2 or matrix.shape[1] != math.prod(shape):
            raise ValueError(
                f"matrix has shape {tuple(matrix.shape)} for data {shape}; expected (m, {math.prod(shape)})"
            )
        if not len(matrix) or matrix.is_complex() or not bool(torch.isfinite(matrix).all()):
            got = (
                "NaN or infinity" if len(matrix) and not matrix.is_complex() else f"{len(matrix)} rows, {matrix.dtype}"
            )
            raise ValueError(f"matrix holds {got}; expected finite real numbers, and a row at least")
        super().__init__(shape, (len(matrix),))
        self._matrix = Table(matrix)
        u, s, vt = torch.linalg.svd(self._matrix.values, full_matrices=True)
        self._u, self._vt = Table(u[:, : len(s)]), Table(vt)
        self.svd = SVD(
            Table(s),
            lambda x0: x0.flatten(1) @ self._vt.like(x0).T,
            lambda c: (c @ self._vt.like(c).narrow(0, 0, c.shape[1])).reshape(-1, *self.data_shape),
            lambda y: y @ self._u.like(y),
            lambda c: c @ self._u.like(c).T,
        )
        self.lipschitz = float(s.max())

    def _apply(self, x0: Tensor) -> Tensor:
        return x0.flatten(1) @ self._matrix.like(x0).T

    def _adjoint(self, y: Tensor) -> Tensor:
        return (y @ self._matrix.like(y)).reshape(-1, *self.data_shape)


class Blur(LinearOperator):
    """Each channel convolved with one kernel of 1 to 3 dimensions, of the data's size: y_i = sum_j k_j x0_(i - j).

    j runs from the kernel's centre, ``size // 2``. padding: "circular", which has singular values, or "zero".
    """

    def __init__(self, kernel: Tensor, data_shape: Shape, padding: str = "circular") -> None:
        spatial = tuple(data_shape[1:])
        fits = kernel.ndim == len(spatial) and all(k <= n for k, n in zip(kernel.shape, spatial, strict=True))
        if not fits or kernel.ndim == 0:
            raise ValueError(
                f"kernel has shape {tuple(kernel.shape)} for data {tuple(data_shape)}; expected one size for each of "
                f"{spatial}, and none larger"
            )
        if not kernel.numel() or not bool(torch.isfinite(kernel).all()):
            raise ValueError(f"kernel holds {kernel.tolist()}; expected finite numbers")
        if padding not in ("circular", "zero"):
            raise ValueError(f"padding is {padding!r}; expected 'circular' or 'zero'")
        super().__init__(data_shape, data_shape)
        self._axes = tuple(range(-kernel.ndim, 0))
        wide = zip(spatial, kernel.shape, strict=True)
        self._wide = spatial if padding == "circular" else tuple(n + k - 1 for n, k in wide)
        placed = torch.zeros(self._wide, dtype=torch.float64)
        placed[tuple(slice(k) for k in kernel.shape)] = kernel.double().cpu()
        transformed = torch.fft.fftn(placed.roll([-(k // 2) for k in kernel.shape], self._axes))
        self._real, self._imag = Table(transformed.real), Table(transformed.imag)
        self.averages = bool((kernel >= 0).all()) and abs(float(kernel.sum()) - 1) < 1e-4 and padding == "circular"
        self.lipschitz = float(transformed.abs().max())
        if padding == "circular":
            s = transformed.abs()
            phase = torch.where(s > 0, transformed / s.clamp_min(1e-300), torch.ones_like(transformed))
            self._phase = Table(phase.real), Table(phase.imag)
            singular = Table(s.expand(data_shape).flatten())
            self.svd = SVD(singular, self._vt, self._v, self._ut, self._u)

    def _convolved(self, x: Tensor, *, adjoint: bool) -> Tensor:
        kernel = torch.complex(self._real.like(x), self._imag.like(x))
        wide = torch.fft.fftn(x, self._wide, dim=self._axes) * (kernel.conj() if adjoint else kernel)
        whole: Tensor = torch.fft.ifftn(wide, dim=self._axes).real
        for axis, size in zip(self._axes, self.data_shape[1:], strict=True):
            whole = whole.narrow(axis, 0, size)
        return whole

    def _apply(self, x0: Tensor) -> Tensor:
        return self._convolved(x0, adjoint=False)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._convolved(y, adjoint=True)

    def _vt(self, x0: Tensor) -> Tensor:
        coordinates: Tensor = torch.fft.fftn(x0, dim=self._axes, norm="ortho")
        return coordinates.flatten(1)

    def _v(self, c: Tensor) -> Tensor:
        x0: Tensor = torch.fft.ifftn(c.reshape(-1, *self.data_shape), dim=self._axes, norm="ortho")
        return x0.real

    def _turn(self, c: Tensor, sign: float) -> Tensor:
        """Coordinates times the kernel's phase, or its conjugate."""
        real, imag = (table.like(c.real) for table in self._phase)
        return (c.reshape(-1, *self.data_shape) * torch.complex(real, sign * imag)).flatten(1)

    def _ut(self, y: Tensor) -> Tensor:
        return self._turn(self._vt(y), -1.0)

    def _u(self, c: Tensor) -> Tensor:
        return self._v(self._turn(c, 1.0))
