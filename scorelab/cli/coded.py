"""``scorelab likelihood`` of an autoencoder: bounds of the code length of a run's data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from tqdm.auto import tqdm

from scorelab.cli.analysis import data_for, held_data, with_data
from scorelab.cli.bound import with_error
from scorelab.cli.runs import load_drawn
from scorelab.latent import AutoencoderModel
from scorelab.losses import Elbo
from scorelab.noise import counted
from scorelab.training import build
from scorelab.typing import Tensor

__all__ = ["coded_run"]

_AT_ONCE = 2000


def coded_run(workdir: Path, *, n: int, codes: int, seed: int, step: int, data: ConfigDict | None = None) -> str:
    """The evidence lower bound of ``n`` data of an autoencoder's run, held-out ones if it has any, its parts, and the
    tighter bound by ``codes`` of each drawn from the posterior (Burda et al., 2016, arXiv:1509.00519), in bits a
    dimension: of data that takes some values of these, of other data of its density.
    """
    config, model, found = load_drawn(workdir, step=step)
    assert isinstance(model, AutoencoderModel)
    config = with_data(config, data)
    source = data_for(model, config)
    objective = build(config, data=source).objective
    if not isinstance(objective, Elbo):
        raise ValueError(f"{workdir} learnt by {type(objective).__name__}; expected training.objective.name='elbo'")
    # a density of numbers that were only scaled is one of data
    scale = 0.0 if model.codec is None else model.codec.log_scale or 0.0
    x0 = model.encode(held_data(source, config, n).x0.to(model.device))
    print(f"likelihood: {len(x0)} data, {codes} codes each", file=sys.stderr)
    parts: list[tuple[Tensor, ...]] = []
    for row in tqdm(range(len(x0)), desc=f"likelihood of {len(x0)}", unit="sample"):
        noise = counted("normal", (codes, *model.latent_shape), range(row, row + 1), seed, 0, 15)[0].to(x0)
        with torch.no_grad():
            made = [objective.weighed(model, x0[row], some) for some in torch.split(noise, _AT_ONCE)]
        given, rate, weights = (torch.cat(some).double().cpu() for some in zip(*made, strict=True))
        mean = torch.logsumexp(weights, 0) - torch.tensor(float(codes)).double().log()
        unit = objective.unit(x0[row])
        parts.append((given.mean() + scale * unit, rate.mean(), (scale - mean) * unit))
    given, rate, tighter = (torch.stack(some) for some in zip(*parts, strict=True))
    numbers: dict[str, Any] = {
        "step": found,
        "samples": len(x0),
        "of": "held-out data" if config.data.validation else "training data",
        "unit": "bits per dimension" if objective.bins is not None else "bits per dimension, of a density",
        "bound": with_error(given + rate),
        "given_code": with_error(given),
        "of_code": with_error(rate),
        f"bound_by_{codes}_codes": with_error(tighter),
    }
    return json.dumps(numbers, indent=1)
