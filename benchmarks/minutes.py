"""Training for a given time, to the end of the learning rate's schedule."""

from __future__ import annotations

import json
import statistics
import time
from itertools import pairwise
from pathlib import Path

from ml_collections import ConfigDict

from scorelab.training import Trainer, build


def steps_in(config: ConfigDict, seconds: float, tried: int = 60) -> tuple[int, float]:
    """As many steps as a config makes in so many seconds, 1 at least, and the seconds of a step: the median of
    ``tried``."""
    trainer, times = Trainer(build(config), config), []
    for _ in range(tried):
        began = time.perf_counter()
        trainer.advance(measure=False)
        times.append(time.perf_counter() - began)
    each = statistics.median(times[tried // 6 :])
    return max(1, int(seconds / each)), each


def spent(workdir: Path) -> float:
    """Seconds that a run trained for, of all its starts."""
    seconds = [json.loads(row)["seconds"] for row in (workdir / "metrics.jsonl").read_text().splitlines()]
    return sum(a for a, b in pairwise([*seconds, 0.0]) if b < a)
