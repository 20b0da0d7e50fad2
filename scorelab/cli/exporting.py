"""``scorelab export``: the denoiser of a run, or of a saved model, as a file that runs without scorelab."""

from __future__ import annotations

from pathlib import Path

from scorelab.cli.runs import load_run
from scorelab.interop.exporting import export
from scorelab.interop.loading import pretrained

__all__ = ["export_run"]


def export_run(workdir: Path, out: Path, *, step: int = 0, weights: str = "ema") -> str:
    """Write the denoiser of a run's checkpoint and ``weights`` (see ``load_run``) to ``out`` (see ``export``).

    Says what it takes.
    """
    _, model, found = load_run(pretrained(workdir), step=step, weights=weights)
    export(model, out)
    shape, (low, high) = ", ".join(map(str, model.data_shape)), model.sigma_range
    given = f"x (batch, {shape}), sigma (batch,)" + (" and condition (batch,)" if model.conditional else "")
    return f"{out}: x0_hat of {given}, step {found}; sigma from {low:.6g} to {high:.6g}"
