"""Networks of the public releases: their weights drawn again, and what they return (tests/reference)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

REFERENCE = Path(__file__).parent / "reference"


class Released(NamedTuple):
    """Weights by the release's names, its settings, and its inputs and outputs by name."""

    state: dict[str, torch.Tensor]
    config: dict[str, Any]
    values: dict[str, torch.Tensor]


def released(name: str) -> Released:
    """A release's network: parameter i is mean + std * RandomState(seed + i).standard_normal(shape)."""
    stored = np.load(REFERENCE / f"{name}.npz")
    names, shapes = json.loads(str(stored["param_names"])), json.loads(str(stored["param_shapes"]))
    state, seed = {}, int(stored["seed"])
    for i, (key, shape) in enumerate(zip(names, shapes, strict=True)):
        drawn = np.random.RandomState(seed + i).standard_normal(shape)
        value = (stored["param_mean"][i] + stored["param_std"][i] * drawn).astype(np.float32)
        state[key] = torch.from_numpy(np.asarray(value))
    state |= {k.removeprefix("buffer/"): torch.from_numpy(stored[k]) for k in stored.files if k.startswith("buffer/")}
    apart = ("param_", "buffer/", "seed", "config", "note")
    values = {k: torch.from_numpy(np.asarray(stored[k])) for k in stored.files if not k.startswith(apart)}
    return Released(state, json.loads(str(stored["config"])), values)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())
