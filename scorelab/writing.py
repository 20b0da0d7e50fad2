"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from scorelab.typing import Tensor

__all__ = ["check_writable", "save_json", "save_tensors", "whole"]


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside ``path`` to write to, which takes its name at the end; nothing is left of it if that is never
    reached, and what was at ``path`` stays: a full disk leaves no file of 0 bytes."""
    aside = path.with_name(f".{os.getpid()}_{path.name}")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def save_json(found: Any, path: Path) -> None:
    """``path``, whole, as lines that people can read."""
    with whole(path) as aside:
        aside.write_text(json.dumps(found, indent=1) + "\n")


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, readable by whom the process's other files are: safetensors 0.8 keeps its own to their owner.

    Shared weights are written under each of their names.
    """
    path.write_bytes(b"")
    mode = path.stat().st_mode & 0o777
    apart = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    save_file(apart, path, metadata)
    path.chmod(mode)


def check_writable(path: Path) -> None:
    """Refuse (ValueError) a place for a file that can't be written, before there is anything to write; its folder is
    made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        tried = path.with_name(f".{os.getpid()}_{path.name}")
        tried.write_bytes(b"")
        tried.unlink()
    except OSError as error:
        raise ValueError(f"{path} can't be written ({error.strerror}); choose another place") from error
