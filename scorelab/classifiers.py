"""Classifiers of noisy samples, by noise level."""

from __future__ import annotations

from torch import nn

from scorelab.checks import broadcast, check_batch, widened
from scorelab.processes import DiscreteVP
from scorelab.typing import Tensor

__all__ = ["ClassifierModel"]


class ClassifierModel(nn.Module):
    """A network that was trained on the steps of a process, (x, sigma) -> logits (B, classes).

    x (B, *D) is unscaled and sigma () or (B,), as a score has them; the network gets alpha x and the step, 0 for the
    least noise, between two steps linear in log sigma.
    """

    def __init__(self, net: nn.Module, process: DiscreteVP) -> None:
        super().__init__()
        self.net, self.process = net, process

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        check_batch(x, "x")
        level = broadcast(sigma, x).to(widened(x))
        t = self.process.time(level.reshape(-1))
        scaled = (self.process.alpha(t).reshape(level.shape) * x).to(x.dtype)
        logits: Tensor = self.net(scaled, (t * self.process.steps - 1).to(x.dtype).expand(len(x)))
        return logits
