"""What ``--dry_run`` prints: the resolved experiment, what was chosen from the data, and what training it costs."""

from __future__ import annotations

import copy
import time

import torch
from ml_collections import ConfigDict
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from scorelab import parallel
from scorelab.precision import check_compiler
from scorelab.training import Trainer, build
from scorelab.training.sampling import check_sampling

__all__ = ["activation_bytes", "dry_run"]


def activation_bytes(net: torch.nn.Module, data_shape: tuple[int, ...], batch_size: int) -> int:
    """Bytes that autograd keeps for one forward pass, counted on tensors without storage."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[id(tensor)] = tensor.numel() * tensor.element_size()
        holders.append(tensor)
        return tensor

    holders: list[torch.Tensor] = []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        state = {
            k: mode.from_tensor(v.detach()).requires_grad_(v.requires_grad)
            for k, v in net.state_dict(keep_vars=True).items()
        }
        own = {id(v) for v in state.values()}
        x, label = torch.empty(batch_size, *data_shape), torch.empty(batch_size)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            functional_call(net, state, (x, label))
    return sum(size for key, size in kept.items() if key not in own)


def in_words(seconds: float) -> str:
    """About how long that is."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def dry_run(config: ConfigDict) -> str:
    """The report as text."""
    config = copy.deepcopy(config)
    experiment = build(config)
    model = experiment.model.to(parallel.join())
    if config.training.sample_every:
        check_sampling(config, model)
    # all that training would refuse
    if config.training.compile:
        check_compiler(model.device)
    config.training.compile = config.training.fsdp = False
    config.data.workers = 0
    trainer = Trainer(experiment, config)
    trainer.rehearse()
    count = sum(p.numel() for p in model.parameters())
    t = config.training
    activations = activation_bytes(model.net, model.data_shape, t.batch_size // t.accumulate)
    # weights, gradients, two Adam moments and the averages of the weights, float32
    fixed = (4 + len(config.optim.ema) + len(config.optim.ema_power)) * 4 * count
    trainer.advance()
    began = time.perf_counter()
    trainer.advance()
    seconds = time.perf_counter() - began
    return "\n".join(
        [
            str(config).rstrip(),
            "---",
            experiment.summary(config),
            f"memory: weights and optimiser {fixed / 2**20:.1f} MiB, activations about {activations / 2**20:.1f} MiB",
            f"time: {seconds:.3g} s a step on this machine's {model.device.type}, {in_words(seconds * t.steps)} in all",
        ]
    )
