"""``scorelab convert``: a checkpoint of a public release as scorelab's own files."""

from __future__ import annotations

import inspect
from pathlib import Path
from shlex import quote
from typing import Any

from scorelab.interop.loading import load
from scorelab.interop.releases import RELEASES
from scorelab.writing import check_writable

__all__ = ["convert", "switches"]


def switches(release: str) -> tuple[str, ...]:
    """A release's options that are true or false."""
    known = inspect.signature(RELEASES[release]).parameters.values() if release in RELEASES else ()
    return tuple(parameter.name for parameter in known if isinstance(parameter.default, bool))


def convert(file: Path, release: str, out: Path, options: dict[str, Any]) -> str:
    """Write the model of a release's file (see ``scorelab.load``) into the new directory ``out``; says what it is.

    Raises ValueError for a directory in use, and as ``load`` does.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out is {out}, which is there and not empty; expected a new directory, or an empty one")
    model = load(file, release, **options)
    check_writable(out / "model.json")
    model.save(out)
    count = sum(p.numel() for p in model.parameters())
    low, high = model.sigma_range
    return (
        f"{out}: {type(model.net).__name__}, {count:,} parameters, data of shape {model.data_shape}, "
        f"sigma from {low:.6g} to {high:.6g}; sample with: scorelab sample --workdir {quote(str(out))}"
    )
