"""A measurement: the operator, what it gave, and how much noise is in it."""

from __future__ import annotations

from dataclasses import dataclass

from scorelab.checks import check_batch, check_finite, check_range
from scorelab.inverse.operators import LinearOperator, Operator
from scorelab.typing import Tensor

__all__ = ["Measurement", "check_measurement", "linear", "noisy"]


@dataclass(frozen=True, eq=False)
class Measurement:
    """y = operator(x0) + noise_std eps: y (B, *operator.shape) with a row for each sample, or (1, *shape) for all.

    noise_std: in units of y; 0 is exact. data_range: where the data lies; y is then checked to lie there too, up to 6
    noise_std, if the operator takes means of the data. Errors: ValueError for a y of another shape, not finite or out
    of range, and for a noise_std that is no finite number >= 0; TypeError for an operator that is none.
    """

    operator: Operator
    y: Tensor
    noise_std: float = 0.0
    data_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.operator, Operator):
            raise TypeError(
                f"operator is {type(self.operator).__name__}; expected an Operator: wrap a function in LinearFunction "
                "or NonlinearFunction"
            )
        check_batch(self.y, "y")
        shape = self.operator.shape
        if tuple(self.y.shape[1:]) != shape:
            raise ValueError(
                f"y has shape {tuple(self.y.shape)}; expected (B, {', '.join(map(str, shape))}) or (1, ...), as "
                f"operator(x0) gives for x0 (B, {', '.join(map(str, self.operator.data_shape))})"
            )
        check_finite(self.y, "y")
        # its square is a number in single precision, too
        if not 0 <= self.noise_std < 1e19:
            raise ValueError(
                f"noise_std is {self.noise_std:g}; expected a finite number >= 0 and below 1e19, in units of y"
            )
        if self.data_range is not None and self.operator.averages and len(self.y):
            slack = 6 * self.noise_std
            check_range(self.y, (self.data_range[0] - slack, self.data_range[1] + slack), "y")

    def residual(self, x0: Tensor) -> Tensor:
        """y - operator(x0), (B, *shape); x0 (B, *D)."""
        if len(self.y) not in (1, len(x0)):
            raise ValueError(f"y has {len(self.y)} rows for {len(x0)} samples; expected 1, or one for each sample")
        return self.y.to(x0) - self.operator(x0)

    def log_likelihood(self, x0: Tensor) -> Tensor:
        """log p(y | x0) in nats up to a constant, -||y - operator(x0)||^2 / (2 noise_std^2), (B,)."""
        return -0.5 * self.residual(x0).flatten(1).square().sum(1) / noisy(self) ** 2

    def rows(self, index: Tensor) -> Measurement:
        """The measurement of some samples of the batch."""
        y = self.y if len(self.y) == 1 else self.y[index.to(self.y.device)]
        return Measurement(self.operator, y, self.noise_std)


def check_measurement(measurement: object) -> None:
    """Refuse (TypeError) what is none."""
    if not isinstance(measurement, Measurement):
        raise TypeError(f"measurement is {type(measurement).__name__}; expected Measurement(operator, y, noise_std)")


def noisy(measurement: Measurement) -> float:
    """Its noise_std, refused if it is 0 where a method divides by it."""
    check_measurement(measurement)
    if measurement.noise_std == 0:
        raise ValueError(
            "noise_std is 0, and this method divides by it; expected a positive noise_std, or pseudo_inverse, "
            "moment_matching, DPS or Replacement"
        )
    return measurement.noise_std


def linear(measurement: Measurement) -> LinearOperator:
    """Its operator, refused without an adjoint where a method needs one."""
    check_measurement(measurement)
    if not isinstance(measurement.operator, LinearOperator):
        raise TypeError(
            f"the operator, {type(measurement.operator).__name__}, has no adjoint and this method needs one; expected "
            "a LinearOperator, or for others dps, DPS or DAPS"
        )
    return measurement.operator
