"""The two variances between which a step of ancestral sampling lies, in unscaled coordinates.

From a level sigma to r < sigma, where alpha_t and alpha_s are a process's scales of the data at both,

    posterior   r^2 (sigma^2 - r^2) / sigma^2                   of x_r given x_sigma and x0: beta tilde
    forward     (sigma^2 - r^2) (alpha_t / alpha_s)^2           of x_t given x_s, over alpha_s^2: beta

Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv:2006.11239.
"""

from __future__ import annotations

from typing import TypeVar

from scorelab.typing import Tensor

__all__ = ["step_variances"]

T = TypeVar("T", float, Tensor)


def step_variances(sigma: T, sigma_next: T, scale: T | None = None) -> tuple[T, T]:
    """Posterior and forward variance of steps from ``sigma`` to ``sigma_next``, numbers or tensors of one shape.

    scale: (alpha_t / alpha_s)^2, by default a variance-preserving process's, (1 + r^2) / (1 + sigma^2).
    """
    gap = (sigma - sigma_next) * (sigma + sigma_next)
    forward = gap * (1 + sigma_next**2) / (1 + sigma**2) if scale is None else gap * scale
    return sigma_next**2 * gap / sigma**2, forward
