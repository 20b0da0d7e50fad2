"""What may be measured of the averaged weights while a run trains, and the distance of their samples from data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from scorelab import parallel
from scorelab.checks import nearest_name
from scorelab.data import Coded
from scorelab.data.sources import Stored
from scorelab.evaluation import Estimate, features_of, frechet_distance, kernel_distance
from scorelab.typing import Tensor

if TYPE_CHECKING:
    from scorelab.models import ScoreModel
    from scorelab.training.engine import Trainer

__all__ = ["Distance", "Evaluation", "Found"]


class Found(NamedTuple):
    """Numbers for metrics.jsonl, and samples (N, *D), decoded, that are written as a picture or an array."""

    numbers: dict[str, Any]
    samples: Tensor | None = None


class Evaluation(ABC):
    """Base of what is measured every ``every`` steps (0: never).

    ``key``: a key of its numbers, by which a run that goes on knows what was measured; ``what``: its name in words.
    The report draws a number with another called ``<its key>_stderr`` beside it over the steps.
    """

    key: str
    what: str
    every: int = 1000

    def __init__(self, every: int = 1000) -> None:
        if every < 0:
            raise ValueError(f"every is {every}; expected a number of steps, 0 for never")
        self.every = every

    def due(self, step: int, last: int) -> bool:
        """Whether it is its turn at a step, of a run that ends at step ``last``."""
        return bool(self.every and step) and (step % self.every == 0 or step == last)

    @abstractmethod
    def run(self, model: Any, trainer: Trainer) -> Found:
        """Measure the averaged weights, of a ``ScoreModel`` or a ``ClassifierModel``; all processes call it, and the
        first one's results are written."""


_AGAINST = ("train", "held_out")
_DISTANCES: dict[str, Callable[[Tensor, Tensor], Estimate]] = {
    "energy": lambda x, y: kernel_distance(x, y, "energy"),
    "cubic": lambda x, y: kernel_distance(x, y, "cubic"),
    "frechet": lambda x, y: frechet_distance(x, y).extrapolated,
}
_AT_ONCE = 256


class Distance(Evaluation):
    """The distance of ``n`` samples, by the run's own sampler and of classes drawn as often as the data has them, from
    as many data, with its standard error.

    distance: energy, cubic (KID's kernel) or frechet, extrapolated, which takes four times as many samples as features.
    features: pixels, digits, fashion_mnist, classifier:DIR, inception:FILE or package.module:Class. against: train or
    held_out data, "" for the latter where there is any. Samples, rounded to the data's values, and data are the same at
    every step but for the weights. called: its name in the config.
    """

    def __init__(
        self,
        called: str,
        every: int = 1000,
        n: int = 2048,
        distance: str = "energy",
        features: str = "pixels",
        against: str = "",
    ) -> None:
        super().__init__(every)
        where = f"config.evaluation.{called}"
        if n < 2:
            raise ValueError(f"{where}.n is {n}; expected at least 2, better thousands")
        for key, value, known in (("distance", distance, _DISTANCES), ("against", against or "train", _AGAINST)):
            if value not in known:
                raise ValueError(f"{where}.{key} is {value!r}; {nearest_name(value, known)}")
        self.key, self.what, self.n, self.against = f"{called}_distance", f"distance {called}", n, against
        self._between, self._features = _DISTANCES[distance], features_of(features, f"{where}.features")
        self._of_data: Tensor | None = None

    def run(self, model: ScoreModel, trainer: Trainer) -> Found:
        values = trainer.experiment.data.values
        if self._of_data is None:
            self._of_data = self._seen(self._data(trainer).to(model.device))
        drawn = None if model.num_classes is None else trainer.experiment.data.drawn_classes(self.n, 0)
        x = trainer.samples(model, self.n, drawn)
        value, stderr = self._between(self._seen(x if values is None else values.rounded(x)), self._of_data)
        return Found({self.key: value, f"{self.key}_stderr": stderr})

    def _data(self, trainer: Trainer) -> Tensor:
        """As many data, as they are decoded."""
        e = trainer.experiment
        source = e.data.source if isinstance(e.data, Coded) else e.data
        held = trainer.config.data.validation
        if self.against == "held_out" and not held:
            raise ValueError("against is 'held_out', and nothing was held out; expected data.validation > 0")
        if held and self.against != "train":
            return source.hold_out(held).x0[: self.n]
        if not isinstance(source, Stored):
            return source.first(self.n).x0
        order = torch.randperm(len(source.trained), generator=torch.Generator().manual_seed(0))
        return source.take(source.trained[order[: self.n]])

    def _seen(self, x: Tensor) -> Tensor:
        """Features of images, of which every process makes its share."""
        mine = parallel.shard(len(x))

        def seen() -> Tensor:
            return torch.cat([self._features(some) for some in torch.split(x[mine.start : mine.stop], _AT_ONCE)])

        return parallel.gather(parallel.together(seen), len(x))
