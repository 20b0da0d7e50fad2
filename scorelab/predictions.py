"""What a network may predict, and every conversion, through one pivot.

A prediction F stands for the denoised sample by two functions of sigma (unscaled coordinates):

    x0_hat = skip(sigma) x + out(sigma) F

so F_b = (x0_hat - skip_b x) / out_b with x0_hat from F_a, which is

    F_b = ((skip_a - skip_b) / out_b) x + (out_a / out_b) F_a.

The pairs (skip, out) are

    X0 (0, 1)   EPS (1, -sigma)   SCORE (1, sigma^2)   V (1/(1+sigma^2), -sigma/sqrt(1+sigma^2))
    FLOW (1/(1+sigma), -sigma/(1+sigma)), F = eps - x0   edm (sd^2/(sigma^2+sd^2), sigma sd/sqrt(sigma^2+sd^2))

A difference of skips near 1, divided by a small out, would lose all digits, so each prediction also states 1 - skip in
closed form, and below sigma = 1 the difference is taken of those.

Ho et al., 2020, arXiv:2006.11239 (eps); Salimans and Ho, 2022, arXiv:2202.00512 (v); Karras et al., 2022,
arXiv:2206.00364 (edm); Liu et al., 2022, arXiv:2209.03003 (flow).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from scorelab.checks import broadcast, check_batch
from scorelab.typing import Tensor

__all__ = [
    "EPS",
    "FLOW",
    "PREDICTIONS",
    "SCORE",
    "X0",
    "Prediction",
    "V",
    "coefficients",
    "convert",
    "denoise_from_score",
    "edm",
    "score_from_denoised",
]

Coefficient = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Prediction:
    """x0_hat = skip(sigma) x + out(sigma) F.

    ``deficit`` is 1 - skip in a form without cancellation at small sigma; a prediction of one's own may leave it out
    and gets the plain difference.
    """

    skip: Coefficient
    out: Coefficient
    name: str = "custom"
    deficit: Coefficient | None = field(default=None, compare=False)

    def one_minus_skip(self, sigma: Tensor) -> Tensor:
        """1 - skip(sigma)."""
        return 1 - self.skip(sigma) if self.deficit is None else self.deficit(sigma)

    def __repr__(self) -> str:
        return f"Prediction({self.name})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # by name: the functions are not pickled
        if PREDICTIONS.get(self.name) == self:
            return _named, (self.name,)
        if self.name.startswith("edm("):
            return edm, (float(self.name[4:-1]),)
        return super().__reduce_ex__(protocol)


X0 = Prediction(torch.zeros_like, torch.ones_like, "x0", torch.ones_like)
"""The denoised sample."""
EPS = Prediction(torch.ones_like, lambda s: -s, "eps", torch.zeros_like)
"""The noise, (x - x0)/sigma."""
SCORE = Prediction(torch.ones_like, lambda s: s**2, "score", torch.zeros_like)
"""The score."""
V = Prediction(lambda s: 1 / (1 + s**2), lambda s: -s * torch.rsqrt(1 + s**2), "v", lambda s: s**2 / (1 + s**2))
"""v = alpha eps - std x0 with alpha^2 + std^2 = 1."""
FLOW = Prediction(lambda s: 1 / (1 + s), lambda s: -s / (1 + s), "flow", lambda s: s / (1 + s))
"""The velocity of rectified flow, eps - x0."""


def edm(sigma_data: float = 0.5) -> Prediction:
    """EDM's preconditioning: F has unit variance at every sigma when the data has standard deviation sigma_data."""
    if not sigma_data > 0:
        raise ValueError(f"sigma_data is {sigma_data:g}; expected the data's standard deviation, positive")
    sigma_data = float(sigma_data)
    var = sigma_data**2
    return Prediction(
        lambda s: var / (s**2 + var),
        lambda s: s * sigma_data * torch.rsqrt(s**2 + var),
        f"edm({sigma_data!r})",
        lambda s: s**2 / (s**2 + var),
    )


def _named(name: str) -> Prediction:
    return PREDICTIONS[name]


PREDICTIONS = {p.name: p for p in (X0, EPS, SCORE, V, FLOW)}
"""By name; ``edm`` has a parameter."""


def coefficients(sigma: Tensor, source: Prediction, target: Prediction) -> tuple[Tensor, Tensor]:
    """a, b with F_target = a x + b F_source, each of sigma's shape; sigma > 0 unless the target is X0."""
    if source == target:
        return torch.zeros_like(sigma), torch.ones_like(sigma)
    out = target.out(sigma)
    small = target.one_minus_skip(sigma) - source.one_minus_skip(sigma)
    difference = torch.where(sigma < 1, small, source.skip(sigma) - target.skip(sigma))
    return difference / out, source.out(sigma) / out


def convert(output: Tensor, x: Tensor, sigma: Tensor | float, source: Prediction, target: Prediction) -> Tensor:
    """The same prediction in another form.

    output, x: (B, *D), x unscaled; sigma () or (B,), positive unless the target is X0. Raises ValueError for shapes
    that don't fit.
    """
    check_batch(x)
    if output.shape != x.shape:
        raise ValueError(f"output has shape {tuple(output.shape)}, x {tuple(x.shape)}; expected the same shape")
    a, b = coefficients(broadcast(sigma, x), source, target)
    return (a * x + b * output).to(x.dtype)


def denoise_from_score(score: Tensor, x: Tensor, sigma: Tensor | float) -> Tensor:
    """Tweedie: E[x0 | x] = x + sigma^2 score."""
    return (x + broadcast(sigma, x) ** 2 * score).to(x.dtype)


def score_from_denoised(x0_hat: Tensor, x: Tensor, sigma: Tensor | float) -> Tensor:
    """(x0_hat - x) / sigma^2; loses digits where sigma is small against x."""
    return ((x0_hat - x) / broadcast(sigma, x) ** 2).to(x.dtype)
