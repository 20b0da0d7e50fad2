"""What samples are conditioned on and guided by, as the command line asks for it."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote

import torch
from ml_collections import ConfigDict

from scorelab.checks import nearest_name
from scorelab.classifiers import ClassifierModel
from scorelab.cli.runs import load_run
from scorelab.data import Source
from scorelab.models import ScoreModel
from scorelab.saved import Model
from scorelab.training.config import training_data
from scorelab.training.run import recorded_data
from scorelab.training.sampling import check_guidance
from scorelab.typing import Tensor

__all__ = ["Steering", "condition_of"]


@dataclass(frozen=True)
class Steering:
    """The flags, None where nothing was asked for. condition: see ``condition_of``; guidance: the scale, and at which
    noise levels, "low,high", and how much of its deviation is taken back; autoguidance: the earlier step to guide away
    from, instead of from no class; classifier: the directory of one to guide by."""

    condition: str = ""
    guidance: float | None = None
    guidance_interval: str | None = None
    guidance_rescale: float | None = None
    autoguidance: int | None = None
    classifier: str | None = None

    def options(self) -> str:
        """What was asked for, as it is written on a command line, each with a space before it."""
        asked = {key: value for key, value in asdict(self).items() if value not in (None, "")}
        return "".join(f" --{key}={quote(str(value))}" for key, value in asked.items())

    def classes(self, model: Model) -> int | None:
        """How many classes can be asked for."""
        return model.num_classes if self.classifier is None else ClassifierModel.load(str(self.classifier)).num_classes

    def applied(
        self,
        workdir: Path,
        config: ConfigDict,
        model: Model,
        n: int,
        *,
        found: int,
        weights: str = "ema",
        seed: int = 0,
        source: Source | None = None,
    ) -> tuple[Tensor | None, ScoreModel | ClassifierModel | None]:
        """The classes of n samples (n,), and what guides them beside the model, of step ``found``, where that is; the
        rest goes into the experiment's settings. seed, source: of classes that are drawn, and the data that has them,
        by default the config's. Raises ValueError for what does not go together.
        """
        if not isinstance(model, ScoreModel):
            if asked := self.options().strip():
                raise ValueError(f"got {asked}, and an {model.kind} has no conditions; expected none")
            return None, None
        _guide(config, self.guidance, self.guidance_interval, self.guidance_rescale)

        def drawn(count: int) -> Tensor:
            return _drawn(training_data(config) if source is None else source, count, n, seed)

        labels, by = self._found(workdir, config, model, n, found, weights, drawn)
        if self.guidance_interval is not None or self.guidance_rescale is not None:
            check_guidance(config, model, "--", none=0.0 if self.classifier is not None else 1.0)
        return labels, by

    def _found(
        self,
        workdir: Path,
        config: ConfigDict,
        model: ScoreModel,
        n: int,
        found: int,
        weights: str,
        drawn: Callable[[int], Tensor],
    ) -> tuple[Tensor | None, ScoreModel | ClassifierModel | None]:
        """What ``applied`` returns."""
        if self.classifier is not None:
            if self.autoguidance is not None:
                raise ValueError("got --classifier and --autoguidance; expected one of them")
            by = self._classifier(model, tuple(config.sampling.guidance_interval) or (0.0, math.inf))
            labels = condition_of(self.condition, by, Path(self.classifier).expanduser(), n, drawn)
            if labels is None:
                raise ValueError(
                    "--classifier guides to a class, and --condition is none; expected a class, each or no --condition"
                )
            return labels, by
        labels = condition_of(self.condition, model, workdir, n, drawn)
        if self.autoguidance is not None:
            return labels, _earlier(workdir, config, model, self.autoguidance, found, weights)
        _check_guided(labels, self.guidance, self.guidance_interval, self.guidance_rescale)
        return labels, None

    def _classifier(self, model: ScoreModel, interval: tuple[float, float]) -> ClassifierModel:
        """The classifier, where the model is; ValueError for one of other data or classes, or that knows none of the
        model's noise levels in the interval, RuntimeWarning for one that does not know all of them."""
        found = ClassifierModel.load(str(self.classifier))
        said = f"--classifier={self.classifier}"
        if found.data_shape != model.data_shape or found.data_range != model.data_range:
            raise ValueError(
                f"{said} is of data {found.data_shape} from {found.data_range}, the model of {model.data_shape} from "
                f"{model.data_range}; expected the same"
            )
        if model.num_classes not in (None, found.num_classes):
            raise ValueError(
                f"{said} tells {found.num_classes} classes apart, and the model knows {model.num_classes}; expected "
                "the same"
            )
        low, high = found.sigma_range
        least, most = max(model.sigma_range[0], interval[0]), min(model.sigma_range[1], interval[1])
        knows, asked = f"{said} knows noise levels from {low:.4g} to {high:.4g}", f"from {least:.4g} to {most:.4g}"
        if least < most and not max(low, least) < min(high, most):
            raise ValueError(f"{knows}, and is to guide {asked}; expected some of its own among them")
        if low > least * (1 + 1e-6) or high < most * (1 - 1e-6):
            warnings.warn(
                f"{knows} and guides at those only: those to guide at go {asked}",
                RuntimeWarning,
                stacklevel=4,
            )
        return found.to(model.device)


def _guide(config: ConfigDict, scale: float | None, interval: str | None, rescale: float | None) -> None:
    """Put guidance that was asked for into the experiment's settings; ValueError for an interval that is none."""
    if scale is not None:
        config.sampling.guidance = scale
    if rescale is not None:
        config.sampling.guidance_rescale = rescale
    if interval is not None:
        try:
            low, high = (float(part) for part in interval.split(","))
        except ValueError as error:
            raise ValueError(f"--guidance_interval is {interval!r}; expected two noise levels such as 0.2,5") from error
        if not 0 <= low < high:
            raise ValueError(
                f"--guidance_interval is {interval!r}; expected the lower noise level first, such as 0.2,5"
            )
        config.sampling.guidance_interval = (low, high)


def _check_guided(labels: Tensor | None, *asked: object) -> None:
    """Refuse (ValueError) guidance that was asked for without a class to guide to."""
    if labels is None and any(option is not None for option in asked):
        raise ValueError(
            "--guidance needs a class to guide to; expected a model with classes, and no --condition=none, or "
            "--autoguidance=STEP, or --classifier=DIRECTORY"
        )


def _earlier(workdir: Path, config: ConfigDict, model: ScoreModel, step: int, found: int, weights: str) -> ScoreModel:
    """The model of an earlier checkpoint, to guide ``model`` of step ``found`` away from, where that one is.

    Raises ValueError for a checkpoint that is missing or no earlier one, and where no scale was asked for.
    """
    if config.sampling.guidance == 1:
        raise ValueError(f"--autoguidance={step} has a scale of 1, which is none; expected --guidance, such as 2")
    if not found:
        raise ValueError(
            f"--autoguidance is {step}, but a saved model has no earlier checkpoints; expected a run's --workdir"
        )
    if not 0 < step < found:
        raise ValueError(f"--autoguidance is {step}; expected an earlier step than that of the samples, {found}")
    return load_run(workdir, step=step, weights=weights)[1].to(model.device)


def _drawn(source: Source, count: int, n: int, seed: int) -> Tensor:
    """Of n samples of ``count`` classes, as often as data has them; ValueError for data of other classes."""
    if len(source.classes) != count:
        raise ValueError(
            f"--condition=data draws {count} classes as often as the data has them, and it has {len(source.classes)} "
            "classes; expected data of the model, or --condition=each, a class or none"
        )
    return source.drawn_classes(n, seed)


def condition_of(
    text: str, model: ScoreModel | ClassifierModel, workdir: Path, n: int, drawn: Callable[[int], Tensor] | None = None
) -> Tensor | None:
    """The classes (n,) that ``--condition`` asks for: a class's name or number, "each" in turn, "data", as often as
    the data has them, or "none".

    Nothing ("") is each, of a model that has classes. drawn: what draws the data's, for samples that are no data's.
    Raises ValueError for what the model does not know.
    """
    if model.num_classes is None:
        if text:
            raise ValueError(
                f"--condition is {text!r}, but this model has no classes; train with model.conditional=True"
            )
        return None
    names = recorded_data(workdir).get("classes") or [str(k) for k in range(model.num_classes)]
    called = [name.casefold() for name in names]
    if called.count(text.casefold()) == 1 or text in names:
        return torch.full((n,), names.index(text) if text in names else called.index(text.casefold()))
    if text in ("", "each"):
        return torch.arange(n) % model.num_classes
    if text == "data" and drawn is not None:
        return drawn(model.num_classes)
    if text == "none":
        # refused where the model knows no such condition
        if isinstance(model, ScoreModel):
            model.conditioned(None)
        return None
    # by its place only where no class is called by a number
    if text.isascii() and text.isdigit() and int(text) < model.num_classes and not any(n.isdigit() for n in names):
        return torch.full((n,), int(text))
    numbers = "" if any(n.isdigit() for n in names) else f", or a number from 0 to {len(names) - 1}"
    words = ["each", "none"] if drawn is None else ["each", "data", "none"]
    meant = nearest_name(text, [*names, *difflib.get_close_matches(text, words, cutoff=0.7)])
    if text.isdigit() and all(name.isdigit() for name in names):
        # no other number is meant
        meant = f"known: {', '.join(names[:20])}" + (", ..." if len(names) > 20 else "")
    others = f", {', '.join(words[:-1])} or none" if meant.startswith("known") else ""
    raise ValueError(f"--condition is {text!r}; {meant}{others}{numbers}")
