"""Classifiers of noisy samples, by noise level."""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from torch.nn import functional

from scorelab.checks import check_batch, widened
from scorelab.noised import NoisedModel
from scorelab.typing import Tensor

__all__ = ["ClassifierModel"]


class ClassifierModel(NoisedModel):
    """(x, sigma) -> logits (B, classes) of x (B, *data_shape), unscaled as a score has it, at sigma () or (B,).

    net: called as net(scaled x, label (B,)); the arguments are those of ``NoisedModel``. A network that was trained on
    DDPM's steps has ``label="index"``: the step, 0 for the least noise, between two steps linear in log sigma. One that
    configs train says so by ``classifies = True``, and has ``num_classes``.
    """

    kind: ClassVar[str] = "classifier"

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        check_batch(x, shape=self.data_shape)
        _, logits = self._called(x, sigma)
        if logits.ndim != 2 or len(logits) != len(x):
            raise ValueError(
                f"the network returned shape {tuple(logits.shape)} for {len(x)} samples; expected (B, classes)"
            )
        return logits

    def conditioned(self, classes: Tensor | int) -> LogProb:
        """(x, sigma) -> log p(class | x, sigma) in nats, (B,), for ``guidance.classifier``; classes (B,), one a sample,
        (1,) or a number for all. Raises ValueError for what are no classes, and at its first call for classes that the
        network does not tell apart.
        """
        return LogProb(self, torch.tensor([classes]) if isinstance(classes, int) else classes)

    def extra_repr(self) -> str:
        (low, high), process = self.sigma_range, type(self.process).__name__
        return f"data {self.data_shape}, {self.num_classes} classes, {process}, sigma from {low:.4g} to {high:.4g}"


class LogProb:
    """What a classifier says of the classes that were asked for."""

    def __init__(self, model: ClassifierModel, classes: Tensor) -> None:
        whole = isinstance(classes, Tensor) and classes.ndim == 1 and not classes.is_floating_point()
        if not whole or classes.dtype == torch.bool:
            got = f"{classes.dtype} {tuple(classes.shape)}" if isinstance(classes, Tensor) else repr(classes)
            raise ValueError(f"the classes are {got}; expected whole numbers (B,), one a sample, or (1,) for all")
        self.span = (int(classes.min()), int(classes.max())) if len(classes) else (0, 0)
        self.device, self.sigma_range = model.device, model.sigma_range
        self.model, self.classes = model, classes.to(self.device).long()

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

    def rows(self, index: Tensor) -> LogProb:
        """The same for these rows of the batch."""
        if len(self.classes) == 1:
            return self
        made = copy.copy(self)
        made.classes = self.classes[index]
        return made
