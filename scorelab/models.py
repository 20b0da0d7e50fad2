"""A score model: a network, the process its inputs come from, and what it predicts.

    F = net(input_scale(sigma) x, label(sigma), condition)
    score = a x + b F,    a, b = coefficients(sigma, prediction, SCORE)

so no difference of nearly equal numbers is divided by a small sigma^2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from scorelab.checks import check_batch
from scorelab.described import (
    Constant,
    LogSigma,
    UnitVariance,
    prediction_from_json,
    prediction_to_json,
    process_from_dict,
    process_to_dict,
)
from scorelab.noised import NoisedModel
from scorelab.predictions import EPS, PREDICTIONS, X0, Prediction, V, coefficients
from scorelab.processes import Process
from scorelab.saved import unwrapped
from scorelab.typing import ScoreFn, Shape, Tensor

__all__ = ["Conditioned", "Constant", "LogSigma", "ScoreModel", "UnitVariance", "process_from_dict", "process_to_dict"]


class ScoreModel(NoisedModel):
    """score(x, sigma, condition=None), x (B, *data_shape) unscaled, sigma () or (B,); a ScoreFn.

    net: called as net(scaled x, label (B,)) or net(scaled x, label, condition), returns F (B, *data_shape). variance:
    the network returns twice the channels, F and where the log-variance of ancestral sampling lies between its bounds,
    from -1 to 1 (Nichol and Dhariwal, 2021, arXiv:2102.09672); the model has ``score_and_variance``. Further arguments
    are those of ``NoisedModel``.

    A network that takes conditions has ``num_classes`` or ``null_condition`` (see scorelab.nn.classes); where no
    condition is given it gets the null condition, and without one that is a ValueError.
    """

    kind: ClassVar[str] = "score"

    def __init__(
        self,
        net: nn.Module,
        process: Process,
        prediction: Prediction = EPS,
        *,
        data_shape: Shape,
        variance: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(net, process, data_shape=data_shape, **options)
        if not isinstance(prediction, Prediction):
            raise TypeError(
                f"prediction is {prediction!r}; expected one of scorelab.predictions: EPS, V, edm(0.5), ..."
            )
        self.prediction, self.variance = prediction, variance

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None, variance: bool = False) -> Any:
        """The score (B, *data_shape); with ``variance`` (score, v), of models that have one. Raises ValueError for
        shapes that don't fit."""
        if variance:
            return self.score_and_variance(x, sigma, condition)
        return self._predict(x, sigma, condition, _SCORE)

    @property
    def score_and_variance(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """(x, sigma, condition=None) -> the score and v (B, *data_shape), 0 to 1; of models with ``variance`` only."""
        if not self.variance:
            raise AttributeError("score_and_variance")
        return self._score_and_variance

    def _score_and_variance(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        level, output, beside = self._outputs(x, sigma, condition)
        assert beside is not None
        return self._converted(x, level, output, _SCORE), (0.5 * (beside + 1)).to(x.dtype)

    def denoise(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        """x0_hat, an estimate of E[x0 | x]."""
        return self._predict(x, sigma, condition, X0)

    def eps(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        """The estimate of the noise, -sigma score."""
        return self._predict(x, sigma, condition, EPS)

    def v(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        """The estimate of v = alpha eps - std x0, alpha = 1/sqrt(1 + sigma^2)."""
        return self._predict(x, sigma, condition, V)

    def conditioned(self, condition: Tensor | int | None) -> Conditioned:
        """A ScoreFn with the condition bound: (B,) or (B, ...) rows, one for all (1, ...) or a class's number, or None
        for no condition.

        Raises ValueError for classes that the network does not know, and for None where it knows no null condition.
        """
        return Conditioned(self, torch.tensor([condition]) if isinstance(condition, int) else condition)

    def extra_repr(self) -> str:
        classes = "" if self.num_classes is None else f", {self.num_classes} classes"
        (low, high), process = self.sigma_range, type(self.process).__name__
        return (
            f"data {self.data_shape}{classes}, {process}, sigma from {low:.4g} to {high:.4g}, predicts "
            f"{self.prediction.name}"
        )

    def rows(self, index: Tensor) -> ScoreFn:
        """The same function: without a condition no row depends on its place."""
        return self

    def _predict(self, x: Tensor, sigma: Tensor, condition: Tensor | None, target: Prediction) -> Tensor:
        level, output, _ = self._outputs(x, sigma, condition)
        return self._converted(x, level, output, target)

    def _converted(self, x: Tensor, level: Tensor, output: Tensor, target: Prediction) -> Tensor:
        a, b = coefficients(level, self.prediction, target)
        return (a * x + b * output.to(x.dtype)).to(x.dtype)

    def _outputs(self, x: Tensor, sigma: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The noise level in x's dimensions, F, and what the network returns beside it."""
        check_batch(x, shape=self.data_shape)
        if condition is None and self.conditional:
            condition = self._null(x.shape[0])
        level, output = self._called(x, sigma, condition)
        expected = (x.shape[0], (1 + self.variance) * x.shape[1], *x.shape[2:])
        if output.shape != expected:
            raise ValueError(
                f"the network returned shape {tuple(output.shape)} for input {tuple(x.shape)}; expected "
                + ("the same shape" if not self.variance else f"{expected}: F and the variance")
            )
        if not self.variance:
            return level, output, None
        output, beside = output.chunk(2, 1)
        return level, output, beside

    def _null(self, count: int) -> Tensor:
        null = self.null_condition
        if self.semantic:
            raise ValueError(
                "this network is told what a sample shows; expected model.conditioned(codes), of images by "
                "model.net.encode, or model.conditioned(images): a model of its codes makes some (docs/latents.md)"
            )
        if null is None:
            raise ValueError(
                "this network has classes and none that stands for no class; expected a condition, as "
                "model.conditioned(classes): for none train with training.label_dropout > 0 (null_class=True)"
            )
        if null.ndim == 0 and null.device != self.device:
            # made there: no synchronisation
            return torch.full((count,), null.item(), dtype=null.dtype, device=self.device)
        return null.to(self.device).expand(count, *null.shape)

    def uncertainty(self, sigma: Tensor) -> Tensor:
        """log u (B,) of sigma (B,), u being the training loss that is expected there.

        Raises ValueError for a network without such a head, as ``EDM2`` has by default.
        """
        head = getattr(unwrapped(self.net), "uncertainty", None)
        if head is None:
            raise ValueError(f"{type(unwrapped(self.net)).__name__} estimates no uncertainty; expected an EDM2")
        found: Tensor = head(self._label(sigma))
        return found

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"prediction": prediction_to_json(self.prediction), "variance": self.variance}

    @classmethod
    def _arguments(cls, settings: dict[str, Any]) -> dict[str, Any]:
        own = {"prediction": prediction_from_json(settings["prediction"]), "variance": settings.get("variance", False)}
        return super()._arguments(settings) | own


_SCORE = PREDICTIONS["score"]


class Conditioned:
    """A model's score with a condition bound to it."""

    def __init__(self, model: ScoreModel, condition: Tensor | None) -> None:
        if not model.conditional:
            raise ValueError(
                "this model knows no conditions, as one whose network has num_classes does; expected it as it is: "
                "score = model"
            )
        if condition is None:
            condition = model._null(1)
        elif not isinstance(condition, Tensor) or condition.ndim < 1:
            raise ValueError("the condition must be a tensor with one row a sample, (B, ...), or one for all, (1, ...)")
        elif (count := model.num_classes) is not None:
            if condition.ndim != 1 or condition.is_floating_point() or condition.dtype == torch.bool:
                raise ValueError(
                    f"the condition is {condition.dtype} {tuple(condition.shape)}; expected classes, whole numbers (B,)"
                )
            if condition.numel() and not 0 <= int(condition.min()) <= int(condition.max()) < count:
                raise ValueError(
                    f"the condition holds classes from {int(condition.min())} to {int(condition.max())}; expected "
                    f"0 to {count - 1}, which the network knows, or None for no class"
                )
        self.model, self.condition = model, condition.to(model.device)
        if model.num_classes is not None:
            self.condition = self.condition.long()

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The noise levels that the model knows."""
        return self.model.sigma_range

    @property
    def data_mean(self) -> Tensor | None:
        """The data's, of all classes."""
        return self.model.data_mean

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype | None:
        """Of what type the weights are."""
        return self.model.dtype

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.model(x, sigma, self._expanded(len(x)))  # type: ignore[no-any-return]

    @property
    def score_and_variance(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(x, sigma) -> the score and v; of models with ``variance`` only."""
        found = self.model.score_and_variance
        return lambda x, sigma: found(x, sigma, self._expanded(len(x)))

    def together(self, other: object, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor] | None:
        """This score and another of the same model, in one evaluation of twice the batch; None for any other."""
        if not isinstance(other, Conditioned) or other.model is not self.model:
            return None
        conditions = torch.cat([self._expanded(len(x)), other._expanded(len(x))])
        both = self.model(torch.cat([x, x]), sigma if sigma.ndim == 0 else torch.cat([sigma, sigma]), conditions)
        first, second = both.chunk(2)
        return first, second

    def rows(self, index: Tensor) -> Conditioned:
        """The score for these rows of the batch."""
        if len(self.condition) == 1:
            return self
        made = copy.copy(self)
        made.condition = self.condition[index]
        return made

    def _expanded(self, count: int) -> Tensor:
        if len(self.condition) not in (1, count):
            raise ValueError(f"the condition has {len(self.condition)} rows for a batch of {count}; expected one each")
        return self.condition.expand(count, *self.condition.shape[1:])
