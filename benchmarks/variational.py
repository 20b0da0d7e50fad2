"""DDPM, improved DDPM and VDM trained for equal times on the same data: bits per dimension, few steps, and schedules.

``python -m benchmarks.variational [--minutes 4] [--source digits] [--n 300] [--out runs/variational] [--table]`` trains
``configs/SOURCE/{ddpm,improved_ddpm,vdm}.py`` one after another in one thread, each to the end of its learning rate's
schedule, for so many minutes by the time of a step; 300 samples (500 of Fashion-MNIST) are held out of all. What was
trained is not trained again, what was measured is measured again. The tables go into docs/variational.md, the numbers
into benchmarks/results/variational_SOURCE.json; --table only writes the tables.

Bound: of ``n`` held-out data over all steps (VDM: 1,000 levels), one draw of the chain. Variances share chains, so
their differences are known better than the errors of each. ODE: uniform dequantisation, one probe.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from scipy.stats import t as student

from benchmarks.minutes import once, step_of, steps_in
from scorelab import PerSampleNoise, ScoreModel, clipped, sample, variational_bound
from scorelab.cli.overrides import config_file
from scorelab.evaluation import energy_distance
from scorelab.likelihood import bits_per_dim
from scorelab.losses import Bins, ContinuousBound
from scorelab.processes import DiscreteVP, Learned, Process
from scorelab.samplers import Ancestral, analytic_variance
from scorelab.sigmas import from_betas
from scorelab.training import load_data, train
from scorelab.typing import Batch, Tensor

ROOT = Path(__file__).parents[1]
NAMES = ("ddpm", "improved_ddpm", "vdm")
HELD = {"digits": 300, "fashion_mnist": 500}
FEW, FEWER, SAMPLES, GROUPS, STATISTICS, DRAWS, BATCHES = 25, 8, 1000, 5, 128, 64, 100


def config_of(source: str, name: str) -> ConfigDict:
    c, _ = config_file([f"--config={ROOT / 'configs' / source / name}.py"])
    c.data.validation = HELD[source]
    c.training.sample_every = c.training.validate_every = 0
    return c


def trained(source: str, name: str, minutes: float, out: Path) -> tuple[ScoreModel, dict[str, float]]:
    """The averaged model after so many minutes of steps, and what training took."""
    c, workdir = config_of(source, name), out / source / name

    def work() -> dict[str, float]:
        c.training.steps, each = steps_in(60 * minutes, step_of(c))
        c.training.checkpoint_every = c.training.steps
        began = time.perf_counter()
        train(c, workdir, progress=False)
        return {"steps": c.training.steps, "step": each, "seconds": time.perf_counter() - began}

    took = once(workdir / "seconds.json", work)
    return ScoreModel.load(sorted((workdir / "checkpoints").glob("step_*"))[-1]).eval(), took


class Remembered:
    """A score that, begun anew, gives its outputs again in the order in which they were asked for: chains of one seed
    are the same for every variance."""

    def __init__(self, score: Any, learned: bool) -> None:
        self.score, self.learned, self.kept, self.place = score, learned, [], 0

    def again(self) -> Remembered:
        self.place = 0
        return self

    def score_and_variance(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        if self.place == len(self.kept):
            both = self.score.score_and_variance(x, sigma) if self.learned else (self.score(x, sigma), x)
            self.kept.append(both)
        self.place += 1
        return self.kept[self.place - 1]

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.score_and_variance(x, sigma)[0]


def in_parts(score: Any, size: int = 100) -> Any:
    """A score that sees ``size`` samples at once: on a CPU larger batches are slower."""

    class Parts:
        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            return torch.cat([score(part, sigma) for part in x.split(size)])

        def score_and_variance(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
            both = [score.score_and_variance(part, sigma) for part in x.split(size)]
            return tuple(torch.cat(one) for one in zip(*both, strict=True))

    return Parts()


def with_error(x: Tensor) -> list[float]:
    return [float(x.double().mean()), float(x.double().std()) / math.sqrt(len(x))]


def interval(values: list[float]) -> list[float]:
    """Mean and half of the 95 % t-interval."""
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return [statistics.mean(values), half]


def levels_of(model: ScoreModel, steps: int | None = None) -> Tensor:
    """All levels or ``steps`` of them, descending, without 0."""
    p = model.process
    return from_betas(p.betas, steps)[:-1] if isinstance(p, DiscreteVP) else p.sigmas(steps or 1000, p.t_min)


def bounds(
    model: ScoreModel, clip: bool, x0: Tensor, x: Tensor, spacing: float, steps: int | None = None
) -> dict[str, dict[str, list[float]]]:
    """Bits per dimension of held-out x0, in all and of the parts, for each variance; x: training data."""
    grid, scale, found = levels_of(model, steps), x0[0].numel() * math.log(2), {}
    remembered = Remembered(in_parts(model), model.variance)
    kinds: dict[str, Any] = {name: name for name in variances_of(model)}
    kinds["analytic"] = analytic_variance(in_parts(own(model, clip)), x, grid, generator=PerSampleNoise(1))
    if clip:
        kinds["not clamped"] = next(iter(kinds.values()))
    for name, kind in kinds.items():
        score = own(remembered.again(), clip and name != "not clamped")
        sampler, noise = Ancestral(kind, model.process), PerSampleNoise(0)
        b = variational_bound(score, x0, grid, sampler, data_std=1.0, spacing=spacing, generator=noise)
        assert b.prior is not None
        assert b.steps is not None
        assert b.decoder is not None
        found[name] = {
            "bound": with_error(-b.log_prob / scale),
            "prior": with_error(b.prior / scale),
            "noisiest step": with_error(b.steps[0] / scale),
            "other steps": with_error(b.steps[1:].sum(0) / scale),
            "decoder": with_error(b.decoder / scale),
        }
    return found


def own(score: Any, clip: bool) -> Any:
    """The score that a run samples with."""
    return clipped(score, -1.0, 1.0) if clip else score


def variances_of(model: ScoreModel) -> list[str]:
    return [*["learned"] * model.variance, "posterior", "forward"]


def few_steps(model: ScoreModel, score: Any, x0: Tensor, x: Tensor, steps: int) -> dict[str, dict[str, Any]]:
    """The energy distance of samples in few steps to held-out data x0, in ``GROUPS``, what it is less that of the first
    variance with the same noise, and the samples' deviation over the data's; x: training data, judged likewise."""
    grid = levels_of(model, steps)
    kinds: dict[str, Any] = {name: name for name in variances_of(model)}
    kinds["analytic"] = analytic_variance(in_parts(score), x[:STATISTICS], grid, generator=PerSampleNoise(1))
    found: dict[str, dict[str, Any]] = {}
    first: list[float] = []
    for name, kind in [*kinds.items(), ("training data", None)]:
        shape, ends = (SAMPLES, *model.data_shape), torch.cat([grid, grid.new_zeros(1)])
        y = x
        if kind is not None:
            sampler = Ancestral(kind, model.process)
            y = sample(score, shape, ends, sampler, generator=PerSampleNoise(2), batch_size=100)
        far = [energy_distance(part, x0) for part in y.chunk(GROUPS)]
        first = first or far
        found[name] = {"distance": interval(far), "deviation": float(y.std() / x0.std())}
        found[name]["less"] = interval([a - b for a, b in zip(far, first, strict=True)])
    return found


class CosineBetween(Process):
    """sigma = tan(a), a linear in time between given noise levels: the cosine schedule's middle."""

    t_min, t_max = 0.0, 1.0

    def __init__(self, low: float, high: float) -> None:
        self.first, self.rate = math.atan(low), math.atan(high) - math.atan(low)

    def angle(self, t: Tensor) -> Tensor:
        return self.first + self.rate * t

    def alpha(self, t: Tensor) -> Tensor:
        return self.angle(t).cos()

    def std(self, t: Tensor) -> Tensor:
        return self.angle(t).sin()

    def sigma(self, t: Tensor) -> Tensor:
        return self.angle(t).tan()

    def time(self, sigma: Tensor) -> Tensor:
        return (sigma.atan() - self.first) / self.rate

    def drift(self, t: Tensor) -> Tensor:
        return -self.rate * self.angle(t).tan()

    def diffusion(self, t: Tensor) -> Tensor:
        return (2 * self.rate * self.angle(t).tan()).sqrt()


def schedules(model: ScoreModel, held: Tensor, x: Tensor, bins: Bins) -> dict[str, dict[str, list[float]]]:
    """VDM's bound of one network under three schedules of equal ends: its value on held-out data, over ``DRAWS`` draws
    each, the variance of a draw, and E||g - E g||^2 of the weights' gradient g of a batch, with standard errors."""
    low, high = model.process.sigma_range
    ends = Learned(2 * math.log(low), 2 * math.log(high), hidden=0)
    kinds = {"learned": model.process, "linear in log sigma": ends, "cosine": CosineBetween(low, high)}
    weights, found, means = list(model.net.parameters()), {}, {}
    for name, process in kinds.items():
        objective, gen = ContinuousBound(process, 1.0, bins), torch.Generator().manual_seed(3)

        def drawn(x0: Tensor, u: Tensor, objective: ContinuousBound = objective, gen: Any = gen) -> Tensor:
            noise = torch.randn(len(x0), 2, *x0.shape[1:], generator=gen)
            return objective.losses(model, Batch(x0), u, noise)

        with torch.no_grad():
            draws = torch.stack(
                [drawn(held, torch.rand(len(held), generator=gen, dtype=torch.float64)) for _ in range(DRAWS)]
            ).double()
        means[name] = draws.mean(0)
        # within a sample: over times and noise alone
        spread = (draws - draws.mean(0)).square().sum(0) / (DRAWS - 1)
        gradients = []
        for _ in range(BATCHES):
            some = x[torch.randperm(len(x), generator=gen)[:64]]
            # in parts of equal probability, as training draws them
            u = (torch.arange(64, dtype=torch.float64) + torch.rand(64, generator=gen, dtype=torch.float64)) / 64
            loss = drawn(some, u).mean()
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
        apart = torch.tensor([float((a - b).square().sum()) / 2 for a, b in list(pairwise(gradients))[::2]])
        found[name] = {
            "bits": with_error(draws.mean(0)),
            "variance": with_error(spread),
            "gradient": with_error(apart),
        }
    for name in kinds:
        found[name]["less learned"] = with_error(means[name] - means["learned"])
    return found


def measure(source: str, minutes: float, n: int, out: Path) -> dict[str, Any]:
    models = {name: trained(source, name, minutes, out) for name in NAMES}
    data = load_data(config_of(source, "vdm"))
    held = data.hold_out(HELD[source]).x0
    x0, x = held[:n], data.batch(0, 0, SAMPLES).x0
    assert data.values is not None
    spacing = data.values.spacing
    rows: dict[str, Any] = {}
    for name, (model, took) in models.items():
        began = time.perf_counter()
        clip = bool(config_of(source, name).sampling.clip)
        row: dict[str, Any] = {"took": took, "clipped": clip}
        with torch.no_grad():
            for steps in (None, FEW):
                row[f"bound, {steps or 'all'}"] = bounds(model, clip, x0, x[:STATISTICS], spacing, steps)
        options: dict[str, Any] = {"divergence": "hutchinson", "rtol": 1e-3, "atol": 1e-3, "data_std": 1.0}
        gen = torch.Generator().manual_seed(4)
        low, high = model.sigma_range
        ode = [bits_per_dim(model, p, low, high, spacing=spacing, generator=gen, **options).bits for p in x0.split(50)]
        row["ode"] = with_error(torch.cat(ode))
        if model.variance:
            row["few"] = {steps: few_steps(model, own(model, clip), held, x, steps) for steps in (FEW, FEWER)}
        if isinstance(model.process, Learned):
            row["schedules"] = schedules(model, x0, x, Bins(spacing, -1.0, 1.0))
        rows[name] = row
        print(f"{name}: measured in {time.perf_counter() - began:.0f} s", flush=True)
    return {"n": n, "minutes": minutes, "rows": rows}


def cell(value: list[float]) -> str:
    """A number with its error, of which one digit is told, two where it begins with 1."""
    mean, error = value
    if 0 <= mean < 1e-4 and error < 1e-4:
        return "< 1e-4" if mean else ""
    digits = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 2
    digits -= digits > 0 and error * 10 ** (digits - 1) >= 1.95
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def tables(found: dict[str, Any]) -> str:
    rows = found["rows"]
    took = [
        [f"`{n}`", f"{r['took']['steps']:,.0f}", f"{1000 * r['took']['step']:.0f}", cell(r["ode"])]
        for n, r in rows.items()
    ]
    bits = [
        [
            f"`{n}`",
            v,
            *(cell(b[k]) for k in ("bound", "noisiest step", "decoder")),
            cell(r[f"bound, {FEW}"][v]["bound"]),
        ]
        for n, r in rows.items()
        for v, b in r["bound, all"].items()
    ]
    few = [
        [steps, v, cell(f["distance"]), "" if v == "training data" else cell(f["less"]), f"{f['deviation']:.3f}"]
        for r in rows.values()
        for steps, by in r.get("few", {}).items()
        for v, f in by.items()
    ]
    drawn = [
        [v, *(cell(f[k]) for k in ("bits", "less learned", "variance", "gradient"))]
        for r in rows.values()
        for v, f in r.get("schedules", {}).items()
    ]
    parts = [
        markdown(["config", "steps", "ms a step", "bits/dim by the ODE"], took),
        markdown(["config", "variance", "bound, bits/dim", "noisiest step", "decoder", f"bound, {FEW} steps"], bits),
        markdown(["steps", "variance", "energy distance", "less the learned one's", "deviation over the data's"], few),
        markdown(
            ["schedule", "bound, bits/dim", "less the learned one's", "variance of a draw", "of a gradient"], drawn
        ),
        f"Measured with {found['versions']}.",
    ]
    return "\n\n".join(parts)


def page(source: str, found: dict[str, Any]) -> None:
    """The tables in docs/variational.md, between their marks."""
    path, begin, end = ROOT / "docs" / "variational.md", f"<!-- {source} -->\n", f"<!-- /{source} -->"
    head, rest = path.read_text().split(begin)
    path.write_text(f"{head}{begin}\n{tables(found)}\n\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--source", choices=tuple(HELD), default="digits")
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "variational")
    parser.add_argument("--table", action="store_true", help="only write what was measured before")
    options = parser.parse_args()
    path = Path(__file__).parent / "results" / f"variational_{options.source}.json"
    if not options.table:
        torch.set_num_threads(1)
        found = measure(options.source, options.minutes, options.n, options.out)
        found["versions"] = f"torch {torch.__version__}, Python {platform.python_version()}"
        path.write_text(json.dumps(found, indent=1) + "\n")
    page(options.source, json.loads(path.read_text()))


if __name__ == "__main__":
    main()
