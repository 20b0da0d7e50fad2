"""``scorelab new``: a config file for data that is there, with what is worth changing in it, commented."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path

from scorelab.data import Files, Source, load
from scorelab.plotting.pictures import are_images
from scorelab.writing import check_writable, whole

__all__ = ["new_config", "source_of"]

_ARRAYS = (".npy", ".npz", ".pt", ".safetensors")


def source_of(path: Path) -> str:
    """The name of the data source that reads a path: folder, zip, arrays, or idx."""
    if path.is_dir():
        return "folder"
    return "zip" if path.suffix == ".zip" else "arrays" if path.suffix in _ARRAYS else "idx"


def new_config(kind: str, target: Path, data: Path, size: tuple[int, ...] = (), layout: str = "") -> str:
    """Write a config for the data in ``data`` to ``target``; says what was found and what to do next.

    kind: "images" or "points". size: what images are scaled to, (height, width). layout: of an array's images, as
    data.layout. Raises ValueError for a file that is
    there already, for data that can't be read, and for another kind of data than was said.
    """
    if kind not in ("images", "points"):
        raise ValueError(
            f"scorelab new {kind!r}; expected images or points: scorelab new images runs/my.py --path FOLDER"
        )
    if target.suffix != ".py" or target.exists():
        said = "which is there already" if target.exists() else "which is no Python file"
        raise ValueError(f"the config is {target}, {said}; expected a new name that ends in .py")
    check_writable(target)
    data, source = data.expanduser().resolve(), source_of(data.expanduser())
    found = load(source, Files(str(data), size, layout=layout))
    images = are_images(found.data_shape)
    if images != (kind == "images"):
        shape = "x".join(map(str, found.data_shape))
        raise ValueError(
            f"{data} holds samples of shape {shape}; expected {kind}, or scorelab new "
            + ("images" if images else "points")
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole(target) as aside:
        aside.write_text(_text(found, source, data, size, layout, target))
    return (
        f"{target}: {_said(found)}\nsee what training costs: scorelab train --config {target} --dry_run\n"
        f"train: scorelab train --config {target} --workdir {target.with_suffix('')}"
    )


def _said(found: Source) -> str:
    count = f"{len(found)} " if isinstance(found, Sized) else ""
    classes = f", {len(found.classes)} classes ({', '.join(found.classes[:5])}{', ...' * (len(found.classes) > 5)})"
    return f"{count}samples of shape {found.data_shape}" + (classes if found.classes else "")


def _text(found: Source, source: str, data: Path, size: tuple[int, ...], layout: str, target: Path) -> str:
    count = len(found) if isinstance(found, Sized) else 0
    vectors = len(found.data_shape) == 1
    lines = [
        f'"""{data.name}: {_said(found)}.',
        "",
        f"    scorelab train --config {target} --workdir {target.with_suffix('')}",
        f"    scorelab sample --workdir {target.with_suffix('')}",
        '"""',
        "",
        "from scorelab.training import default_config",
        "",
        "",
        "def get_config():",
        "    # what is not set here follows from the data, or works for most: docs/settings.md has every setting",
        "    c = default_config()",
        f'    c.data.source, c.data.path = "{source}", {str(data)!r}',
    ]
    if size:
        lines += [f"    c.data.size = {size}  # (height, width): images are scaled to cover it, and cropped"]
    if layout:
        lines += [f"    c.data.layout = {layout!r}"]
    if count >= 50:
        lines += [
            f"    c.data.validation = {min(500, count // 10)}  # samples kept apart, on which the loss is measured"
        ]
    if found.classes and len(found.classes) > 1:
        lines += [
            "    # by class, and without one for a tenth of the samples, which guidance needs",
            "    c.model.conditional, c.training.label_dropout = True, 0.1",
        ]
    if vectors:
        lines += [
            "    c.model.net.width, c.model.net.depth = 128, 3",
            "    c.training.steps, c.training.batch_size = 5000, 256",
        ]
    else:
        lines += [
            "    # this is for a CPU; with a GPU 128, 2, and attention at the lowest resolution, (2,) for example",
            "    c.model.net.width, c.model.net.blocks, c.model.net.attention = 32, 1, ()",
            "    # the first samples are worth looking at after a thousand steps; good ones take tens of thousands",
            "    c.training.steps, c.training.batch_size = 2000, 64",
            "    # c.data.flip = True  # half of the images left to right: where a mirror image is as good",
        ]
    lines += [
        '    c.optim.lr, c.optim.schedule.name = 1e-3, "cosine"  # falls to 0 at the last step',
        "    c.training.checkpoint_every, c.training.sample_every = 500, 500",
        f"    c.sampling.samples = {1000 if vectors else 64}",
        "    return c",
    ]
    return "\n".join(lines) + "\n"
