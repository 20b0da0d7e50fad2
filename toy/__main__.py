"""``python -m toy``: the whole gallery, on all targets or on those named, and its page."""

from __future__ import annotations

import json
import time

from scorelab.distributions import TARGETS
from toy import densities, fields, forward, langevin, samplers, schedules, trajectories, triangle
from toy.common import Gallery, parse
from toy.page import write_page

Section = tuple[str, str, list, object]


def draw_all(gallery: Gallery, names: tuple[str, ...]) -> list[Section]:
    """Draw every figure on every target; the sections of the page."""
    figures = {
        "forward": (forward, "Forward and reverse process", ()),
        "schedules": (schedules, "Noise schedules", ()),
        "densities": (densities, "Exact and learnt densities", names),
        "fields": (fields, "Score fields", names),
        "langevin": (langevin, "Langevin dynamics", ()),
        "samplers": (samplers, "Samplers", names),
        "trajectories": (trajectories, "Trajectories", names),
        "triangle": (triangle, "Score, eps, x0, v", names),
    }
    sections: list[Section] = []
    for i, (key, (module, heading, targets)) in enumerate(figures.items()):
        began = time.perf_counter()
        print(f"figure {i + 1} of {len(figures)}: {heading}", flush=True)
        module.draw(gallery, names) if targets else module.draw(gallery)
        prefixes = {"trajectories": ("trajectories_", "annealed_", "reverse_")}.get(key, (f"{key}_",))
        plain = [p for p in (gallery.out / f"{key}.png",) if p.is_file()]
        pictures = plain + [
            p for n in targets for x in prefixes for e in ("png", "gif") if (p := gallery.out / f"{x}{n}.{e}").is_file()
        ]
        numbers = json.loads((gallery.out / "metrics.json").read_text())[key]
        sections.append((heading, " ".join((module.__doc__ or "").split()), pictures, numbers))
        print(f"  {time.perf_counter() - began:.0f} s", flush=True)
    return sections


if __name__ == "__main__":
    chosen, wanted = parse(__doc__, TARGETS)
    print(write_page(chosen.out / "index.html", "scorelab: the 2-D gallery", draw_all(chosen, wanted)))
