"""Classifiers of noisy samples, by noise level."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional

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

    def conditioned(self, classes: Tensor | int) -> _LogProb:
        """(x, sigma) -> log p(class | x, sigma) in nats, (B,), for ``guidance.classifier``; classes (B,), one a sample,
        (1,) or a number for all. Raises ValueError for what are no classes, and at its first call for classes that the
        network does not tell apart.
        """
        return _LogProb(self, torch.tensor([classes]) if isinstance(classes, int) else classes)


class _LogProb:
    """What a classifier says of the classes that were asked for."""

    def __init__(self, model: ClassifierModel, classes: Tensor) -> None:
        whole = isinstance(classes, Tensor) and classes.ndim == 1 and not classes.is_floating_point()
        if not whole or classes.dtype == torch.bool:
            got = f"{classes.dtype} {tuple(classes.shape)}" if isinstance(classes, Tensor) else repr(classes)
            raise ValueError(f"the classes are {got}; expected whole numbers (B,), one a sample, or (1,) for all")
        self.span = (int(classes.min()), int(classes.max())) if len(classes) else (0, 0)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.model, self.classes, self.sigma_range = model, classes.to(self.device).long(), model.process.sigma_range

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        if len(self.classes) not in (1, len(x)):
            raise ValueError(f"{len(self.classes)} classes for a batch of {len(x)}; expected one each, or one for all")
        logits = widened(self.model(x, sigma))
        least, most = self.span
        if not 0 <= least <= most < logits.shape[1]:
            raise ValueError(
                f"the classes go from {least} to {most}, and this classifier tells 0 to {logits.shape[1] - 1} apart; "
                "expected classes that it was trained on, in its own numbering"
            )
        picked = functional.log_softmax(logits, 1).gather(1, self.classes.expand(len(x)).unsqueeze(1))
        return picked.squeeze(1)

    def rows(self, index: Tensor) -> _LogProb:
        """The same for these rows of the batch."""
        if len(self.classes) == 1:
            return self
        made = copy.copy(self)
        made.classes = self.classes[index]
        return made
