"""Score models as files that run without scorelab: PyTorch's own (``.pt2``) and ONNX, which needs no PyTorch.

What is written is the denoiser, one function with all of the model inside (scale of the input, label, network,
prediction), from which any sampler outside begins:

    x0_hat(x, sigma),    the probability-flow ODE is dx/dsigma = (x - x0_hat)/sigma.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from scorelab import __version__
from scorelab.checks import broadcast
from scorelab.models import ScoreModel
from scorelab.saved import unwrapped
from scorelab.typing import Tensor
from scorelab.writing import check_writable

__all__ = ["export"]

_NEEDED = ("onnx", "onnxscript")


def export(model: ScoreModel, path: str | Path) -> None:
    """Write the denoiser of a model, in evaluation mode and float32, to a file ``.pt2`` or ``.onnx``.

    (x (B, *data_shape), sigma (B,)) -> x0_hat like x, unscaled and float32, for any B of 1 or more; a model with
    conditions takes them as a third input, ``condition``: whole numbers (B,), int64, of classes. A network that takes
    whole indices gives NaN at levels that are none of its own. A learned variance and the codec are left out.

    Beside it stand, each as JSON, ``data_shape``, ``data_range``, ``sigma_range``, ``data_mean``, ``num_classes``,
    ``null_condition``, ``levels`` (of a network that takes whole indices) and ``scorelab``, its version: in ONNX as the
    model's metadata, in ``.pt2`` as an extra file ``scorelab.json``. ONNX beyond 2 GB has its weights in a file beside,
    ``.onnx.data``.

    Raises ValueError for another suffix, a place that can't be written, a network that can't be traced, and for ONNX
    where its packages are missing.
    """
    place = Path(path).expanduser()
    if not isinstance(model, ScoreModel):
        raise TypeError(f"model is {type(model).__name__}; expected a ScoreModel: a condition is an input of the file")
    if place.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"path is {place}; expected a name that ends in .pt2 (for PyTorch) or .onnx")
    missing = [name for name in _NEEDED if place.suffix == ".onnx" and find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {' and '.join(missing)}: pip install 'scorelab[interop]', or export to .pt2")
    check_writable(place)
    program, about = _traced(model), _about(model)
    with TemporaryDirectory(dir=place.parent, prefix=".") as folder:
        aside = Path(folder) / place.name
        if place.suffix == ".pt2":
            torch.export.save(program, aside, extra_files={"scorelab.json": json.dumps(about)})
        else:
            _write_onnx(program, aside, {key: json.dumps(value) for key, value in about.items()})
        # the model last, after weights beside it
        for file in sorted(aside.parent.iterdir(), key=lambda file: file == aside):
            file.replace(place.parent / file.name)


class _Denoiser(nn.Module):
    """x0_hat of a model, as a module."""

    logs: Tensor | None

    def __init__(self, model: ScoreModel) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("logs", None if (levels := _levels(model)) is None else levels.log().float())

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        x0_hat = self.model.denoise(x, sigma, condition)
        if self.logs is None:
            return x0_hat
        known = ((sigma.log().unsqueeze(1) - self.logs).abs() <= 1e-4).any(1)
        return torch.where(broadcast(known, x), x0_hat, torch.nan)


def _levels(model: ScoreModel) -> Tensor | None:
    """The only levels that the model knows, ascending; None where it knows all between."""
    whole = model.label == "index" and getattr(unwrapped(model.net), "integer_labels", False)
    return model.levels if whole else None


def _about(model: ScoreModel) -> dict[str, Any]:
    """What one has to know of a denoiser to use it."""
    null, levels, mean = model.null_condition, _levels(model), model.data_mean
    return {
        "data_shape": list(model.data_shape),
        "data_range": model.data_range,
        "sigma_range": model.sigma_range,
        "data_mean": None if mean is None else mean.flatten().tolist(),
        "num_classes": model.num_classes,
        "null_condition": None if null is None else null.tolist(),
        "levels": None if levels is None else levels.flip(0).tolist(),
        "scorelab": __version__,
    }


def _traced(model: ScoreModel) -> ExportedProgram:
    # a network's compiled code is left behind
    made = copy.deepcopy(model).to("cpu", torch.float32).requires_grad_(False).eval()
    made.net, made.codec, made.precision = unwrapped(made.net), None, "fp32"
    # a batch of 2 at the least: one of 1 would be taken for a size that stays
    low, high = made.sigma_range
    sigma = (
        torch.tensor([high, low], dtype=torch.float32) if (levels := _levels(made)) is None else levels[[-1, 0]].float()
    )
    inputs = [torch.zeros(2, *made.data_shape, dtype=torch.float32), sigma]
    if made.conditional:
        null = made.null_condition
        inputs.append(torch.zeros(2, dtype=torch.int64) if null is None else null.cpu().expand(2, *null.shape))
    batch = Dim("batch", min=1)
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(_Denoiser(made), tuple(inputs), dynamic_shapes=tuple({0: batch} for _ in inputs))
    except Exception as error:
        raise ValueError(
            f"{type(made.net).__name__} can't be exported ({_first_line(error)}): expected a network without branches "
            "on values of tensors, that takes batches of any size, by x.shape[0] and not len(x)"
        ) from error


def _write_onnx(program: ExportedProgram, path: Path, about: dict[str, str]) -> None:
    names = list(program.graph_signature.user_inputs)
    try:
        with _quiet():
            made = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=names,
                output_names=["x0_hat"],
                dynamic_shapes=tuple({0: "batch"} for _ in names),
            )
    except Exception as error:
        raise ValueError(
            f"this model can't be written as ONNX ({_first_line(error.__cause__ or error)}): export it to .pt2"
        ) from error
    assert made is not None
    made.model.metadata_props.update(about)
    for node in made.model.graph.all_nodes():
        # where in whose folders the code stood
        node.metadata_props.clear()
    made.save(path)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks: on packages that aren't there, on parts of PyTorch that they use, and the whole
    graph of what fails."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
