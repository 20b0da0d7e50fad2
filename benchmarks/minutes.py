"""Long work: training for a given time, to the end of the learning rate's schedule, and what is not done twice."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from scorelab.training import Trainer, build
from scorelab.writing import save_json


def steps_in(
    seconds: float, step: Callable[[], object], tried: int = 60, clock: Callable[[], float] = time.perf_counter
) -> tuple[int, float]:
    """How many steps last so many seconds, 1 at least, and the seconds of one: the median of those tried, but for a
    sixth that warms up."""
    times = []
    for _ in range(tried):
        began = clock()
        step()
        times.append(clock() - began)
    each = statistics.median(times[tried // 6 :])
    return max(1, int(seconds / each)), each


def step_of(config: ConfigDict) -> Callable[[], object]:
    """What makes a step of training by a config, of a run that is thrown away."""
    trainer = Trainer(build(config), config)
    return lambda: trainer.advance(measure=False)


def once(record: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was recorded, or else is now."""
    if not record.is_file():
        found = work()
        record.parent.mkdir(parents=True, exist_ok=True)
        save_json(found, record)
    told: dict[str, Any] = json.loads(record.read_text())
    return told


def spent(workdir: Path) -> float:
    """Seconds that a run trained for, of all its starts."""
    seconds = [json.loads(row)["seconds"] for row in (workdir / "metrics.jsonl").read_text().splitlines()]
    return sum(a for a, b in pairwise([*seconds, 0.0]) if b < a)
