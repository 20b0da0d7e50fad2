"""What ``--dry_run`` prints: the resolved experiment, what was chosen from the data, and what training it costs."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from ml_collections import ConfigDict

from scorelab import parallel
from scorelab.data import Images
from scorelab.models import ScoreModel
from scorelab.noise import counter_generator
from scorelab.precision import check_compiler
from scorelab.training import Trainer, build, resolve
from scorelab.training.config import without_model
from scorelab.training.evaluations import evaluations
from scorelab.training.sampling import check_sampling

__all__ = ["activation_bytes", "dry_run"]


def activation_bytes(trainer: Trainer, rows: int) -> int:
    """Bytes that autograd keeps for the losses of ``rows`` samples, from what it keeps for one and two."""
    draw, kept = trainer.batches.at(trainer.step), dict[int, torch.Tensor]()
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def counted(count: int) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            losses = trainer.experiment.objective.losses(trainer.model, *draw.part(slice(count)))
        del losses
        return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)

    # a part of it is the same for any number
    one = counted(1)
    return one + (rows - 1) * (counted(2) - one) if rows > 1 else one


def in_words(seconds: float) -> str:
    """About how long that is."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device, None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if device.type == "cpu" and info.is_file() else []
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable")), None)


def _stand_in(config: ConfigDict) -> Images | None:
    """1,000 images of noise for a data set of images that ``data.path`` does not say the place of; None for others."""
    c = config.data
    shape = (3, 32, 32) if c.source == "cifar10" else (1 if c.grayscale else 3, *(c.size or ()))
    if c.path or c.source not in ("cifar10", "folder", "zip") or len(shape) != 3:
        return None
    # windows of one row of noise, for of large images a thousand fill the memory
    row = torch.randint(
        256, (math.prod(shape) + 999,), dtype=torch.uint8, generator=counter_generator(config.seed, 0, 0)
    )
    images = row.unfold(0, math.prod(shape), 1).view(-1, *shape)
    return Images(
        images, torch.arange(1000) % (10 if c.source == "cifar10" else 1000), flip=c.flip, dequantise=c.dequantise
    )


def dry_run(config: ConfigDict) -> Iterator[str]:
    """The report, in parts as they are known; of noise where the config names images, but no place of them."""
    config = copy.deepcopy(config)
    noise = _stand_in(config)
    if noise is not None:
        shape, classes = noise.data_shape, len(noise.classes)
        yield f"data.path is empty: images of noise {shape}, of {classes:,} classes, stand for {config.data.source}'s"
    experiment = build(config, data=noise)
    model = experiment.model.to(parallel.join())
    # all that training would refuse
    evaluations(resolve(config))
    if config.training.compile:
        check_compiler(model.device)
    config.training.compile = config.training.fsdp = False
    config.data.workers = 0
    trainer = Trainer(experiment, config)
    trainer.rehearse()
    if config.training.sample_every and isinstance(model, ScoreModel):
        check_sampling(config, model)
    yield f"{str(without_model(config)).rstrip()}\n---\n{experiment.summary(config)}"
    count = sum(p.numel() for p in model.parameters())
    t = config.training
    activations = activation_bytes(trainer, t.batch_size // t.accumulate)
    # weights, gradients, two Adam moments and the averages of the weights, float32
    fixed = (4 + len(config.optim.ema) + len(config.optim.ema_power)) * 4 * count
    told = f"weights and optimiser {fixed / 2**20:.1f} MiB, activations about {activations / 2**20:.1f} MiB"
    yield f"memory: {told}"
    free = free_bytes(model.device)
    if free is not None and fixed + activations > free:
        yield (
            f"time: not measured, for {free / 2**20:.0f} MiB are free on this machine's {model.device.type}: train "
            "with a smaller training.batch_size, or in parts by training.accumulate"
        )
        return
    trainer.advance()
    began = time.perf_counter()
    trainer.advance()
    seconds = time.perf_counter() - began
    yield f"time: {seconds:.3g} s a step on this machine's {model.device.type}, {in_words(seconds * t.steps)} in all"
