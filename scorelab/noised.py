"""A network of noised data and of how much noise is in it, and what it is told.

output = net(input_scale(sigma) x, label(sigma), ...),     x = x0 + sigma eps, unscaled
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from scorelab.checks import broadcast, check_sigmas, widened
from scorelab.codecs import Codec
from scorelab.described import Function, function_from_json, function_to_json, process_from_dict, process_to_dict
from scorelab.processes import DiscreteVP, Process
from scorelab.saved import Model, unwrapped
from scorelab.tables import Table
from scorelab.typing import Shape, Tensor

__all__ = ["NoisedModel"]

_LABELS = ("time", "log_sigma", "index")
_ORDERS = ("ascending", "descending")


class NoisedModel(Model):
    """Base of models of x (B, *data_shape), unscaled, at noise levels sigma () or (B,).

    net: called as net(scaled x, label (B,)), with a condition beside them where it takes one.
    input_scale: "process" (alpha) or a callable of sigma. label: "time", "log_sigma", "index" (position among
    ``levels``, by default the process's steps) or a callable of sigma; multiplied by label_scale. index_order:
    "ascending" counts from the least noise (DDPM), "descending" from the most (NCSN). data_mean: of the data in each
    channel, (C,), around which samples begin; None for 0. The others are those of ``Model``.

    A network that takes whole indices only says so by an attribute ``integer_labels = True``; it then gets int64, and a
    level that is none of the grid's to 1e-4 is a ValueError; with ``num_levels``, so is a grid of another number.
    """

    levels: Tensor | None
    data_mean: Tensor | None

    def __init__(
        self,
        net: nn.Module,
        process: Process,
        *,
        data_shape: Shape,
        data_range: tuple[float, float] | None = None,
        input_scale: str | Function = "process",
        label: str | Function = "time",
        label_scale: float = 1.0,
        index_order: str = "ascending",
        levels: Tensor | None = None,
        codec: Codec | None = None,
        data_mean: Sequence[float] | None = None,
    ) -> None:
        super().__init__(net, data_shape=data_shape, data_range=data_range, codec=codec)
        if not isinstance(process, Process):
            raise TypeError(f"process is {type(process).__name__}; expected a scorelab process such as VP()")
        if input_scale != "process" and not callable(input_scale):
            raise ValueError(f"input_scale is {input_scale!r}; expected 'process' or a callable of sigma")
        if label not in _LABELS and not callable(label):
            raise ValueError(f"label is {label!r}; expected one of {_LABELS} or a callable of sigma")
        if index_order not in _ORDERS:
            raise ValueError(f"index_order is {index_order!r}; expected one of {_ORDERS}")
        if label == "index":
            if levels is None and isinstance(process, DiscreteVP):
                levels = process.step_sigmas.flip(0)
            if levels is None:
                raise ValueError("label='index' needs the noise levels it counts; pass levels=sigmas.geometric(...)")
        self.process = process
        self.input_scale, self.label, self.label_scale = input_scale, label, float(label_scale)
        self.index_order = index_order
        # ascending, as a plain attribute: it stays float64 on the CPU when the model moves or changes precision
        grid = None if levels is None else [s for s in check_sigmas(levels) if s > 0][::-1]
        self.levels = None if grid is None else torch.tensor(grid, dtype=torch.float64)
        self._logs = None if self.levels is None else Table(self.levels.log())
        known = getattr(unwrapped(net), "num_levels", None)
        if label == "index" and known is not None and grid is not None and len(grid) != known:
            raise ValueError(
                f"the network knows {known} noise levels, and the model counts {len(grid)}; expected the same number"
            )
        self.data_mean = None if data_mean is None else torch.tensor(data_mean, dtype=torch.float64)
        if self.data_mean is not None:
            if self.data_mean.shape != self.data_shape[:1]:
                raise ValueError(f"data_mean is {data_mean}; expected a number for each of {data_shape[0]} channels")
            self.data_mean = self.data_mean.reshape(-1, *(1,) * (len(self.data_shape) - 1))

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The noise levels that the model knows."""
        return self.process.sigma_range

    def conditioned(self, condition: Any) -> Any:
        """What the model is for a condition, as a function of (x, sigma)."""
        raise NotImplementedError

    def rehearse(self, x: Tensor) -> None:
        no_null = self.num_classes is not None and self.null_condition is None
        called = self.conditioned(torch.tensor([0])) if no_null else self.conditioned(x) if self.semantic else self
        called(x, torch.tensor(self.sigma_range[1], device=x.device))

    def _called(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The noise level in x's dimensions, and what the network returns."""
        level = broadcast(sigma, x).to(widened(x))
        sigma = level.reshape(-1)
        if isinstance(self.input_scale, str):
            scale = self.process.alpha(self.process.time(sigma))
        else:
            scale = self.input_scale(sigma)
        label = self._label(sigma).expand(x.shape[0])
        others = () if condition is None else (condition,)
        output = self._computed((scale.reshape(level.shape) * x).to(x.dtype), label, *others)
        if not isinstance(output, Tensor):
            raise ValueError(
                f"the network returned {type(output).__name__}; expected a tensor: wrap a network that gives more in "
                "one that returns what it predicts"
            )
        return level, output

    def _label(self, sigma: Tensor) -> Tensor:
        if callable(self.label):
            return self.label_scale * self.label(sigma)
        if self.label == "time":
            return self.label_scale * self.process.time(sigma)
        if self.label == "log_sigma":
            return self.label_scale * sigma.log()
        index = self._index(sigma)
        return self.label_scale * index if index.is_floating_point() else index

    def _index(self, sigma: Tensor) -> Tensor:
        assert self._logs is not None
        table = self._logs.like(sigma)
        log = sigma.log()
        last = len(table) - 1
        if last == 0:
            index = torch.zeros_like(sigma)
        else:
            left = self._logs.segment(log)
            index = (left + (log - table.take(left)) / (table.take(left + 1) - table.take(left))).clamp(0, last)
        if self.index_order == "descending":
            index = last - index
        if not getattr(self.net, "integer_labels", False):
            return index
        nearest = index.round()
        near = table[(last - nearest if self.index_order == "descending" else nearest).long()]
        # a graph that is being exported has no values to look at
        if not torch.compiler.is_exporting() and bool(((near - log).abs() > 1e-4).any()):
            raise ValueError(
                f"sigma = {float(sigma[(near - log).abs().argmax()]):g} is none of this model's {last + 1} levels and "
                "its network takes whole indices only: sample at its own levels"
            )
        return nearest.long()

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {
            "process": process_to_dict(self.process),
            "input_scale": function_to_json(self.input_scale, "input_scale"),
            "label": function_to_json(self.label, "label"),
            "label_scale": self.label_scale,
            "index_order": self.index_order,
            "levels": None if self.levels is None else self.levels.flip(0).tolist(),
            "data_mean": None if self.data_mean is None else self.data_mean.flatten().tolist(),
        }

    def _beside(self) -> list[tuple[str, nn.Module]]:
        learned = [("process:", self.process)] if isinstance(self.process, nn.Module) else []
        return [*learned, *super()._beside()]

    @classmethod
    def _arguments(cls, settings: dict[str, Any]) -> dict[str, Any]:
        levels = settings["levels"]
        return super()._arguments(settings) | {
            "process": process_from_dict(settings["process"]),
            "input_scale": function_from_json(settings["input_scale"]),
            "label": function_from_json(settings["label"]),
            "label_scale": settings["label_scale"],
            "index_order": settings["index_order"],
            "levels": None if levels is None else torch.tensor(levels, dtype=torch.float64),
            "data_mean": settings.get("data_mean"),
        }
