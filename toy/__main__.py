"""``python -m toy``: the whole gallery, on all targets or on those named, and its page."""

from __future__ import annotations

import time
from collections.abc import Iterable

from scorelab.distributions import TARGETS
from scorelab.plotting.page import write_page
from toy import densities, fields, forward, guidance, langevin, samplers, schedules, trajectories, triangle
from toy.common import Gallery, options, parse

Section = tuple[str, str, list, object]

FIGURES = {
    "forward": (forward, "Forward and reverse process"),
    "schedules": (schedules, "Noise schedules"),
    "densities": (densities, "Exact and learnt densities"),
    "fields": (fields, "Score fields"),
    "langevin": (langevin, "Langevin dynamics"),
    "samplers": (samplers, "Samplers"),
    "trajectories": (trajectories, "Trajectories"),
    "triangle": (triangle, "Score, eps, x0, v"),
    "guidance": (guidance, "Guidance, and what it samples"),
}
FOR_TARGETS = ("densities", "fields", "samplers", "trajectories", "triangle")
"""The figures that are drawn for every target."""


def draw_all(gallery: Gallery, names: tuple[str, ...], keys: Iterable[str] = FIGURES) -> None:
    """Draw these figures, on every target where there is one for each."""
    for key in keys:
        module, heading = FIGURES[key]
        began = time.perf_counter()
        print(f"figure {list(FIGURES).index(key) + 1} of {len(FIGURES)}: {heading}", flush=True)
        module.draw(gallery, names) if key in FOR_TARGETS else module.draw(gallery)
        print(f"  {time.perf_counter() - began:.0f} s", flush=True)


def sections(gallery: Gallery, names: tuple[str, ...]) -> list[Section]:
    """The page's sections, of pictures and numbers in the gallery's directory."""
    found: list[Section] = []
    for key, (module, heading) in FIGURES.items():
        prefixes = {"trajectories": ("trajectories_", "annealed_", "reverse_")}.get(key, (f"{key}_",))
        targets = names if key in FOR_TARGETS else ()
        files = [f"{key}.png", *(f"{x}{n}.{e}" for n in targets for x in prefixes for e in ("png", "gif"))]
        pictures = [gallery.out / f for f in files if (gallery.out / f).is_file()]
        found.append((heading, " ".join((module.__doc__ or "").split()), pictures, gallery.numbers()[key]))
    return found


if __name__ == "__main__":
    chosen, wanted = parse(options(__doc__), TARGETS)
    draw_all(chosen, wanted)
    print(write_page(chosen.out / "index.html", "scorelab: the 2-D gallery", sections(chosen, wanted)))
