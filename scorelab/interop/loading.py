"""``load``: a trained model of one's own, of the package, or of a public release's checkpoint."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from scorelab.checks import nearest_name
from scorelab.interop.reading import read_file
from scorelab.interop.releases import READERS, RELEASES, resembled
from scorelab.models import ScoreModel

__all__ = ["FEATURES", "PRETRAINED", "load", "pretrained"]

_OWN = Path(__file__).parents[1] / "pretrained"
PRETRAINED = ("digits", "fashion_mnist")
"""Models that come with the package, each with a card beside it."""
FEATURES = tuple(f"{name}_features" for name in PRETRAINED)
"""Classifiers that come with it, for distances of sets."""


def load(path: str | Path, release: str = "", **options: Any) -> ScoreModel:
    """A trained model, in evaluation mode, with its averaged weights: one that comes with the package, "digits" or
    "fashion_mnist"; a run's directory, or one that ``ScoreModel.save`` wrote; or a public release's checkpoint.

    release: one of ``RELEASES``; options: what its file does not say, see there. What was assumed is printed on
    standard error. Nothing in a file is executed. Raises ValueError for a file that is damaged or of another release or
    size, and for options that the release does not have.
    """
    if not release:
        if options:
            raise ValueError(f"options {', '.join(options)} are a release's; expected release=..., one of {_names()}")
        folder = pretrained(path)
        if not folder.is_dir():
            raise ValueError(
                f"{path} is no directory of a model, nor one that comes with scorelab ({', '.join(PRETRAINED)}); "
                f"expected release=... for a file, one of {_names()}"
            )
        return ScoreModel.load(folder).requires_grad_(False)
    if release not in RELEASES:
        raise ValueError(f"release is {release!r}; {nearest_name(release, RELEASES)}")
    maker = RELEASES[release]
    known = {name: p.default for name, p in inspect.signature(maker).parameters.items() if name != "found"}
    for name, value in options.items():
        if name not in known:
            raise ValueError(
                f"{release} has no option {name!r}; {nearest_name(name, known) if known else 'it has none'}"
            )
        wanted = type(known[name])
        if wanted in (bool, int, str) and type(value) is not wanted:
            raise ValueError(f"{release}'s option {name} is {value!r}; expected {wanted.__name__}, as {known[name]!r}")
    found = READERS.get(release, read_file)(path)
    try:
        model = maker(found, **options)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        like = resembled(found)
        said = f"it lacks {error}" if isinstance(error, KeyError) else error
        if like and release not in like.split(" or "):
            said = f"its layout is that of {like}"
        raise ValueError(
            f"{path} can't be loaded as release={release!r} ({said}): check the release and options"
        ) from error
    bound = inspect.signature(maker).bind(found, **options)
    bound.apply_defaults()
    assumed = {k: v for k, v in bound.arguments.items() if k != "found" and k not in options and v is not None}
    if assumed:
        said = ", ".join(f"{k}={v!r}" for k, v in assumed.items())
        print(f"{Path(path).name}: assumed {said}", file=sys.stderr)
    return model.requires_grad_(False).eval()


def pretrained(name: str | Path) -> Path:
    """The directory of a model or classifier that comes with the package; any other name is a directory's own."""
    found = Path(name).expanduser()
    return _OWN / str(name) if str(name) in PRETRAINED + FEATURES and not found.exists() else found


def _names() -> str:
    return ", ".join(RELEASES)
