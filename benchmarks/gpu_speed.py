"""How a GPU trains, samples and guides: python -m benchmarks.gpu_speed [DEVICE] [WIDTH]

DDPM's CIFAR-10 network (width 128) on random images. Prints one line a check: what ran is kept if time runs out.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scorelab import DiscreteVP, PerSampleNoise, ScoreModel, classifier_free, sample, sigmas
from scorelab.cli.main import main as scorelab
from scorelab.nn import UNet
from scorelab.precision import prepare
from scorelab.processes import linear_betas
from scorelab.samplers import Ancestral, Context, Euler, Heun, PredictorCorrector
from scorelab.training import Trainer, build, default_config, train
from scorelab.typing import Tensor

ROOT = Path(__file__).parent.parent


def network(width: int, classes: int | None = None) -> ScoreModel:
    torch.manual_seed(0)
    layers: dict[str, Any] = {"multipliers": (1, 2, 2, 2), "blocks": 2, "attention": (1,), "head": 2 * width}
    net = UNet((3, 32, 32), width=width, num_classes=classes, null_class=classes is not None, **layers)
    for p in net.parameters():
        # layers that start at zero would hide what comes before them
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return ScoreModel(net, DiscreteVP(linear_betas()), data_shape=(3, 32, 32), label="index")


def frozen(model: ScoreModel, device: torch.device) -> ScoreModel:
    return model.to(device).eval().requires_grad_(False)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The best of some, after one that is not counted."""
    found = []
    for _ in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def config_of(width: int, folder: str, batch: int) -> Any:
    c = default_config()
    np.save(f"{folder}/x.npy", np.random.default_rng(0).integers(0, 256, (2 * batch, 3, 32, 32), dtype=np.uint8))
    c.data.source, c.data.path, c.data.layout = "arrays", f"{folder}/x.npy", "channels_first"
    c.process.name, c.model.prediction, c.model.label = "ddpm", "eps", "index"
    c.model.net.width, c.model.net.multipliers, c.model.net.blocks = width, (1, 2, 2, 2), 2
    c.model.net.attention, c.model.net.head, c.model.net.dropout = (1,), 2 * width, 0.1
    c.sampling.grid.name, c.sampling.sampler.name = "steps", "ancestral"
    c.training.batch_size = batch
    return c


@torch.no_grad()
def synchronisations(device: torch.device, width: int) -> dict[str, str]:
    """Steps of samplers, and losses with their gradients, under PyTorch's watch for calls that wait for the GPU."""
    if device.type != "cuda":
        return {}
    found, levels = {}, [2.0, 1.0, 0.5, 0.0]
    plain, classes = (frozen(network(width, k), device) for k in (None, 10))
    x, labels = torch.randn(8, 3, 32, 32, device=device), torch.arange(8, device=device)
    guided = classifier_free(classes.conditioned(labels), classes.conditioned(None), 2.0, interval=(0.7, 5.0))
    for name, score in (("plain", plain), ("guided", guided)):
        for sampler in (Euler(), Heun(), Ancestral(), PredictorCorrector(Heun())):
            for watch in ("default", "error"):
                state, y = sampler.init(x, levels), x
                wait(device)
                torch.cuda.set_sync_debug_mode(watch)
                try:
                    for a, b in zip(levels, levels[1:], strict=False):
                        y, state = sampler.step(Context(score, y, a, b, state, torch.randn_like))
                    found[f"{name}, {type(sampler).__name__}"] = "none"
                except RuntimeError as error:
                    found[f"{name}, {type(sampler).__name__}"] = str(error)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
    with tempfile.TemporaryDirectory() as folder, torch.enable_grad():
        c = config_of(width, folder, 16)
        experiment = build(c)
        experiment.model.to(device)
        trainer = Trainer(experiment, c)
        for watch in ("default", "error"):
            draw = trainer.batches.at(0)
            wait(device)
            torch.cuda.set_sync_debug_mode(watch)
            try:
                losses = experiment.objective.losses(trainer.model, *draw)
                losses.sum().backward()
                found["losses"] = "none"
            except RuntimeError as error:
                found["losses"] = str(error)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return found


@torch.no_grad()
def sampling(device: torch.device, width: int) -> dict[str, str]:
    """16 images by 20 evaluations: seconds, and the difference from fp32 relative to its norm."""
    levels, exact, found = [*sigmas.geometric(20, sigma_min=0.02, sigma_max=80.0).tolist(), 0.0], None, {}
    for precision, compiled in (("fp32", False), ("bf16", False), ("bf16", True)):
        start = time.perf_counter()
        model = prepare(frozen(network(width), device), precision, compile=compiled)

        def draw(model: ScoreModel = model) -> Tensor:
            return sample(model, (16, 3, 32, 32), levels, Euler(), generator=PerSampleNoise(0))

        x = draw()
        first = time.perf_counter() - start
        exact = x if exact is None else exact
        off = float((x - exact).norm() / exact.norm())
        found[f"{precision}{' compiled' * compiled}"] = f"{seconds(draw, device):.4f} s, {off:.1e}, first {first:.0f} s"
    return found


@torch.no_grad()
def guidance(device: torch.device, width: int) -> dict[str, str]:
    """What guidance costs beside the conditional score, both conditions as one batch and apart, in bf16."""
    model, found = prepare(frozen(network(width, 10), device), "bf16" if device.type == "cuda" else "fp32"), {}
    for count in (1, 16, 64, 256) if device.type == "cuda" else (1, 4):
        x, sigma = torch.randn(count, 3, 32, 32, device=device), torch.full((), 1.0, device=device)
        own, none = model.conditioned(torch.arange(count) % 10), model.conditioned(None)
        took = [seconds(lambda own=own, x=x, sigma=sigma: own(x, sigma), device)]
        for together in (True, False):
            guided = classifier_free(own, none, 2.0, together=together)
            took.append(seconds(lambda guided=guided, x=x, sigma=sigma: guided(x, sigma), device))
        found[str(count)] = f"together {took[1] / took[0] - 1:.2f}, apart {took[2] / took[0] - 1:.2f}, {took[0]:.4f} s"
    return found


def a_conditional_run(device: torch.device, width: int) -> dict[str, Any]:
    """Digits by class: 40 steps at once and stopped after 20; guided samples of a compiled network in bf16."""
    path = ROOT / "configs" / "digits" / "conditional.py"
    spec = importlib.util.spec_from_file_location("conditional", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    folder = Path(tempfile.mkdtemp())

    def config(steps: int) -> Any:
        c = module.get_config()
        c.training.steps, c.training.checkpoint_every, c.training.sample_every, c.data.workers = steps, 20, 0, 2
        c.optim.schedule.name = "constant"
        return c

    whole = train(config(40), folder / "a", progress=False)
    train(config(20), folder / "b", progress=False)
    resumed = train(config(40), folder / "b", progress=False)
    weights = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    told, guided = io.StringIO(), ["--guidance=2", "--condition=each", "--n=20"]
    if device.type == "cuda":
        guided += ["--precision=bf16", "--compile"]
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        code = scorelab(["sample", f"--workdir={folder / 'a'}", *guided])
    return {
        "largest difference after a resume": max(float((a - b).abs().max()) for a, b in weights),
        "guided samples": code or "written" if not code else told.getvalue()[-300:],
    }


def training(device: torch.device, width: int) -> dict[str, str]:
    """Images a second, and the memory at most."""
    found, batch = {}, 128 if device.type == "cuda" else 4
    ways = [
        ("fp32", False, "no"),
        ("bf16", False, "no"),
        ("bf16", False, "yes"),
        ("bf16", True, "yes"),
        ("bf16", True, "no"),
    ]
    for precision, compiled, last in ways if device.type == "cuda" else ways[:1]:
        with tempfile.TemporaryDirectory() as folder:
            c = config_of(width, folder, batch)
            c.training.precision, c.training.compile, c.training.channels_last = precision, compiled, last
            experiment = build(c)
            experiment.model.to(device)
            trainer = Trainer(experiment, c)
            start = time.perf_counter()
            for _ in range(3):
                trainer.advance()
            wait(device)
            first = time.perf_counter() - start
            count = 20 if device.type == "cuda" else 2
            took = seconds(lambda t=trainer, n=count: [t.advance(False) for _ in range(n)], device, 3)
            name = f"{precision}{' compiled' * compiled}, channels {'last' if last == 'yes' else 'first'}"
            found[name] = f"{batch * count / took:.0f} images/s, first three steps {first:.0f} s"
            print(f"  {name}: {found[name]}", flush=True)
            del experiment, trainer
            torch._dynamo.reset()
    return found


def main() -> None:
    device = torch.device(sys.argv[1] if sys.argv[1:] else "cuda")
    width = int(sys.argv[2]) if sys.argv[2:] else 128
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, PyTorch {torch.__version__}, Python {sys.version.split()[0]}, width {width}")
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    for check in (synchronisations, guidance, a_conditional_run, sampling, training):
        start = time.perf_counter()
        try:
            print(f"{check.__name__.replace('_', ' ')}: {check(device, width)}", flush=True)
        except Exception as error:  # the others are still worth their time
            print(f"{check.__name__} FAILED: {type(error).__name__}: {error}", flush=True)
        print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
