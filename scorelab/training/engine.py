"""One training step after another: gradients, clipping, Adam, averages; alone, or with the processes of torchrun.

Everything random in step n follows from (seed, n) and the place in the batch, dropout from (seed, n, process), so a run
that is resumed from a checkpoint is bit for bit the run that was never interrupted, and several processes that share a
batch do what one would, up to float summation.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scorelab import parallel
from scorelab.models import ScoreModel
from scorelab.noise import PerSampleNoise, counter_generator
from scorelab.precision import prepare
from scorelab.saved import Model
from scorelab.training import checkpoint
from scorelab.training.batches import Batches, Draw
from scorelab.training.config import Experiment
from scorelab.training.ema import averages_of
from scorelab.training.optim import learning_rate
from scorelab.training.sampling import sample_model
from scorelab.training.settings import part, resolve
from scorelab.training.sharding import full, full_state, like, spread

__all__ = ["BINS", "Metrics", "NonFiniteError", "Trainer"]

BINS = 5
"""Parts of equal probability that the noise levels of training are told apart in."""


class NonFiniteError(ValueError):
    """The loss or a gradient is not finite."""


@dataclass(frozen=True)
class Metrics:
    """Of the steps since the last measure: mean loss, also by noise level beside the zero predictor's and the levels
    (geometric means; None where a part had no sample, and of an objective without levels). Of this step: the norm of
    the gradient before clipping, the learning rate, and the share of the initial weights in each average.
    """

    step: int
    loss: float
    loss_bins: list[float | None]
    zero_bins: list[float | None]
    sigma_bins: list[float | None]
    gradient_norm: float
    lr: float
    initial_share: dict[str, float]


class Trainer:
    """Trains an experiment in memory, one ``advance`` a step; ``save`` and ``restore`` carry it over.

    Under torchrun, after ``parallel.join()``, every process has its share of each batch.
    """

    def __init__(self, experiment: Experiment, config: ConfigDict) -> None:
        self.experiment, self.config = experiment, (config := resolve(config))
        self.model, t = experiment.model.train(), config.training
        self.rank, self.processes = parallel.world()
        channels_last = "no" if t.fsdp else t.channels_last
        compiled = t.compile and not t.fsdp
        graphs = self.processes == t.accumulate == 1 and not t.activation_checkpointing
        prepare(self.model, t.precision, compile=compiled, channels_last=channels_last, graphs=graphs)
        self.precision = self.model.precision
        if t.activation_checkpointing:
            self._checkpoint_activations()
        if t.fsdp and self.processes == 1:
            raise ValueError("training.fsdp spreads weights over processes; expected several: start them with torchrun")
        device = self.model.device
        # what a copy of the model is made from when its weights are spread
        self._whole = copy.deepcopy(self.model).cpu() if t.fsdp else None
        if t.fsdp:
            spread(self.model.net, device, self.processes)
            if t.compile:
                self.model.net.compile()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        if (config.optim.clip or 0) < 0 or "lr" not in config.optim:
            raise ValueError(f"optim is {config.optim.to_dict()}; expected an optimiser with an lr, and clip >= 0")
        self.optimiser = part(config, "optim", parameters=self.parameters, params=self.parameters)
        self._schedule = part(config, "optim.schedule", steps=t.steps)
        self.averages = averages_of(self.parameters, tuple(config.optim.ema), tuple(config.optim.ema_power))
        self.ema = self.averages[0]
        self.step = self.skipped = 0
        self._evaluated: Model | None = None
        if t.batch_size < self.processes * t.accumulate:
            raise ValueError(
                f"training.batch_size is {t.batch_size} for {self.processes} processes, accumulate = {t.accumulate}; "
                "expected a row for each part of each process at least"
            )
        rows = parallel.shard(t.batch_size)
        self.batches = Batches(
            experiment.data,
            experiment.objective,
            seed=config.seed,
            size=t.batch_size,
            rows=rows,
            device=device,
            # a step replayed as a graph leaves the CPU to them: 1.6 times as fast on an H100
            workers=config.data.workers or (2 if compiled and graphs and device.type == "cuda" else 0),
            conditional=self.model.conditional,
            null=self.model.null_condition,
            dropout=t.label_dropout,
            semantic=self.model.semantic,
        )
        # row i of a batch has its level in part i of as many of equal probability
        self._bins = nn.functional.one_hot(torch.tensor(rows) * BINS // t.batch_size, BINS).float().to(device)
        self._sums = torch.zeros(4, BINS, device=device)
        self._network: Callable[..., Tensor] = self.model
        if self.processes > 1 and not t.fsdp:
            self._network = DistributedDataParallel(
                self.model,
                [device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
            # DDP settles the order of its sums in its first backward pass: let that be none of the run's, so that a
            # run that goes on sums in the same order as one that never stopped
            self._gradients(self.batches.at(0))
            self.optimiser.zero_grad()

    def _checkpoint_activations(self) -> None:
        if not hasattr(self.model.net, "activation_checkpointing"):
            raise ValueError(
                f"training.activation_checkpointing is for networks that know it; {type(self.model.net).__name__} "
                "does not: leave it False"
            )
        self.model.net.activation_checkpointing = True  # type: ignore[assignment]

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Dropout draws from global state: seed it for this step, and put it back afterwards."""
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            seed = counter_generator(self.config.seed, self.step, 5, self.rank).initial_seed()
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield

    def _gradients(self, draw: Draw) -> Tensor:
        """Losses of this process's rows, and the whole batch's mean gradient in the parameters."""
        t, rows, found = self.config.training, len(draw.u), []
        self.optimiser.zero_grad()
        with self._seeded():
            # as many parts in every process, however many rows it has
            for k in range(t.accumulate):
                some = draw.part(slice(rows * k // t.accumulate, rows * (k + 1) // t.accumulate))
                with self._exchanging(k == t.accumulate - 1):
                    loss = self._losses(self._network, some)
                    # processes' gradients are averaged
                    torch.autograd.backward(loss.sum() * (self.processes / t.batch_size))
                found.append(loss.detach())
        return torch.cat(found)

    def _exchanging(self, last: bool) -> AbstractContextManager[Any]:
        """Processes average their gradients in the last part of a batch only."""
        if self._whole is not None:
            spread_net: Any = self.model.net
            spread_net.set_requires_gradient_sync(last)
        elif isinstance(self._network, DistributedDataParallel) and not last:
            return self._network.no_sync()
        return nullcontext()

    def rehearse(self) -> None:
        """Two rows of a batch through the objective, changing nothing; ValueError for settings that don't go together.

        All that is not known before a step is made: weights of the loss, what the network refuses.
        """
        draw = self.batches.at(self.step).part(slice(2))
        training = self.model.training
        try:
            with torch.no_grad():
                self._losses(self.model.eval(), draw)
        finally:
            self.model.train(training)

    def _losses(self, network: Callable[..., Tensor], draw: Draw) -> Tensor:
        losses = self.experiment.objective.losses(network, *draw)
        if losses.shape != draw.u.shape:
            raise ValueError(
                f"training.objective gives {tuple(losses.shape)} for {len(draw.u)} samples; expected one loss each: "
                "a weighting gives (B,) for sigma (B,)"
            )
        return losses

    def advance(self, measure: bool = True) -> Metrics | None:
        """One step; None where nothing was measured, or the step skipped.

        Raises NonFiniteError, before any weight is changed, naming the step and the noise levels.
        """
        c = self.config
        draw, objective = self.batches.at(self.step), self.experiment.objective
        lr = learning_rate(c.optim.lr, c.optim.warmup, self._schedule, self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        losses = self._gradients(draw)
        limit = c.optim.clip or math.inf
        total = nn.utils.clip_grad_norm_(self.parameters, limit)
        # a loss that is not finite makes this sum so, too: one look at the device for both
        norm = float(full(total) + 0 * losses.sum())
        if parallel.most(not math.isfinite(norm))[0]:
            self._skip(losses, objective.levels(draw.u), lr)
            return None
        self.optimiser.step()
        for average in self.averages:
            average.update()
        self.step += 1
        with torch.no_grad():
            sigma, zero = objective.levels(draw.u), objective.zero(*draw)
        values = torch.stack([losses, zero, sigma.log(), torch.ones_like(losses)])
        self._sums += (values.unsqueeze(2) * self._bins).sum(1)
        if objective.observes:
            size = c.training.batch_size
            objective.observe(parallel.gather(draw.u, size), parallel.gather(losses, size))
        return self._measured(norm, lr) if measure else None

    def _measured(self, norm: float, lr: float) -> Metrics:
        """The means of what was summed since the last measure, which ends here."""
        sums = self._sums.clone()
        if self.processes > 1:
            torch.distributed.all_reduce(sums)
        self._sums.zero_()
        loss, zero, log_sigma, count = sums.double().cpu() if sums.device.type != "mps" else sums.cpu().double()
        return Metrics(
            self.step,
            float(loss.sum() / count.sum()),
            _where(loss / count, count),
            _where(zero / count, count),
            _where((log_sigma / count).exp(), count),
            norm,
            lr,
            {a.name: a.initial_share for a in self.averages},
        )

    def _skip(self, losses: Tensor, sigma: Tensor, lr: float) -> None:
        """Leave this step out, or raise NonFiniteError if that was done too often."""
        size = self.config.training.batch_size
        losses, sigma = parallel.gather(losses, size), parallel.gather(sigma, size)
        broken = ~torch.isfinite(losses)
        where = "a gradient is not finite"
        if broken.any():
            levels = sigma[broken]
            span = f" at sigma = {float(levels.min()):.4g} to {float(levels.max()):.4g}" * bool(levels.isfinite().all())
            where = f"the loss is not finite{span} ({len(levels)} of {len(losses)} samples)"
        if self.skipped >= self.config.training.skip_nonfinite:
            raise NonFiniteError(
                f"step {self.step}: {where}; nothing was changed or written after the last checkpoint: lower optim.lr "
                f"(now {lr:g}) or check the data" + (f"; {self.skipped} steps were skipped before" * (self.skipped > 0))
            )
        warnings.warn(f"step {self.step} is skipped: {where}", RuntimeWarning, stacklevel=3)
        self.skipped += 1
        self.step += 1

    def averaged(self) -> Model:
        """A copy of the model with the (first) averaged weights, in evaluation mode and single precision."""
        copied = copy.deepcopy(self.model if self._whole is None else self._whole)
        copied.precision = "fp32"
        copied.load_weights(self.ema.weights(self.model))
        return copied.to(self.model.device).requires_grad_(False).eval()

    def evaluated(self) -> Model:
        """The same, computing as training does, in one copy that is made once and filled again at each call."""
        if self._evaluated is None:
            t = self.config.training
            self._evaluated = prepare(self.averaged(), self.precision, compile=t.compile, channels_last=t.channels_last)
        else:
            self._evaluated.load_weights(self.ema.weights(self.model))
        return self._evaluated

    def samples(self, model: ScoreModel, n: int, condition: Tensor | None) -> Tensor:
        """n samples of a model for a condition (n,) or none, decoded, by the experiment's sampler, always with the same
        noise; every process makes its share and has all."""
        return sample_model(model, self.config, n, PerSampleNoise(0), condition=condition, progress=False)

    def save(self, folder: Path) -> Path:
        """Write a checkpoint of this step into ``folder``; of several processes the first writes."""
        sums = parallel.gather(self._sums[None], self.processes).cpu()
        weights, averages = full_state(self.model.weights()), {a.name: a.weights(self.model) for a in self.averages}
        training = {
            "step": self.step,
            "skipped": self.skipped,
            "optimiser": full_state(self.optimiser.state_dict()),
            "averages": {a.name: {"count": a.count, "initial_share": a.initial_share} for a in self.averages},
            "sums": sums,
            "objective": self.experiment.objective.state(),
        }
        if self.rank == 0:
            checkpoint.write(folder, self.step, self._whole or self.model, weights, averages, training)
        parallel.most(0)
        return checkpoint.place_of(folder, self.step)

    def restore(self, place: Path) -> None:
        """Continue from a checkpoint; ValueError if it is damaged or of another network.

        An average that is not in it starts from its weights.
        """
        weights, averages, training = checkpoint.read(place)
        own = self.model.weights()
        differing = [k for k in own.keys() | weights.keys() if k not in own or k not in weights]
        differing += [k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape]
        if differing:
            raise ValueError(
                f"checkpoint {place} is of another network ({len(differing)} weights differ: {min(differing)}, ...): "
                "set config.model as it was"
            )
        self.model.load_weights({k: like(v, own[k]) for k, v in weights.items()})
        for average in self.averages:
            average.load(self.model, averages.get(average.name, weights))
            found = training["averages"].get(average.name, {"count": 0, "initial_share": 1.0})
            average.count, average.initial_share = found["count"], found["initial_share"]
        state = training["optimiser"]["state"]
        for index, moments in state.items():
            parameter = self.parameters[index]
            # fused Adam walks memory: moments must lie as their weights do, channels first or last
            moments |= {
                k: torch.empty_like(parameter).copy_(like(v, parameter))
                for k, v in moments.items()
                if v.shape == parameter.shape
            }
        # of the optimiser's settings the config's hold
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        self.step, self.skipped = training["step"], training["skipped"]
        if state := training.get("objective"):
            self.experiment.objective.restore(state)
        sums = training["sums"]
        if len(sums) != self.processes:
            # it was saved by another number of processes
            sums = torch.cat([sums.sum(0, keepdim=True), torch.zeros(self.processes - 1, *sums.shape[1:])])
        self._sums.copy_(sums[self.rank])


def _where(values: Tensor, count: Tensor) -> list[float | None]:
    """Values as a list, None where nothing was counted, or there is no value."""
    return [v if n and v == v else None for v, n in zip(values.tolist(), count.tolist(), strict=True)]
