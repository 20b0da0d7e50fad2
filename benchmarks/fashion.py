"""Fashion-MNIST after some minutes of one CPU thread: Fréchet distances of scorelab's samples and a diffusers loop's.

``python -m benchmarks.fashion [--minutes 20] [--n 10000] [--out runs/fashion] [--data FOLDER] [--table] [ROW ...]``
trains each row for the same CPU time, to the end of its learning rate's schedule (steps by the time of a step), draws
``n`` samples, and judges them as ``scorelab evaluate --samples`` does, by the features that come with the package,
beside the 60,000 training images; the floor is the test images beside them. Drawing and judging are not counted as
training. What is done is not done again, and drawing goes on where it was interrupted. The numbers go into
benchmarks/results/fashion.json, where rows measured alike stay, the table into docs/evaluation.md; --table only writes
the table.

scorelab: ``configs/fashion_mnist/minutes.py``, and latent diffusion, by ``autoencoder.py`` and ``latent.py`` beside it,
trained for as long in all. diffusers, in fp32, by its example of unconditional training:
UNet2DModel of about as many parameters, DDPMScheduler with 1,000 steps, AdamW with that example's settings, a cosine
after 500 steps of warm-up, clipped gradients, EMAModel; its batch of 16 and rate of 1e-4, and a rate that suits so few
minutes better. Of DDIM at 50 steps and DPM-Solver++ at 20 each row takes the one whose first samples are nearer: all
1,000 steps of 10,000 samples would take hours.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from ml_collections import ConfigDict
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm

from benchmarks.minutes import once, step_of, steps_in
from benchmarks.pretrained import cpu
from benchmarks.variational import markdown
from scorelab import PerSampleNoise
from scorelab.cli.evaluating import evaluate_samples
from scorelab.cli.overrides import config_file
from scorelab.cli.runs import load_run
from scorelab.data.files import read_idx
from scorelab.noise import counted
from scorelab.precision import prepare
from scorelab.saved import Model
from scorelab.training import build, load_data, sample_model, train
from scorelab.typing import Tensor

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "fashion.json"
FOLDER = Path("/usr/share/datasets/fashion-mnist")
SHAPE, AT_ONCE, FIRST, SEED, MOST = (1, 28, 28), 100, 1000, 1, 60_000
SCHEDULERS = {"DDIM": (DDIMScheduler, 50), "DPM-Solver++": (DPMSolverMultistepScheduler, 20)}

Draw = Callable[[int, int], Tensor]
"""Samples (n, 1, 28, 28) in [-1, 1] from the first one's place on."""


def config_of(data: Path, name: str = "minutes") -> ConfigDict:
    c, _ = config_file([f"--config={ROOT / 'configs' / 'fashion_mnist' / name}.py"])
    c.data.path = str(data)
    c.training.sample_every = c.training.validate_every = 0
    return c


def trained(c: ConfigDict, minutes: float, workdir: Path) -> tuple[Model, dict[str, Any]]:
    """A model after so many minutes of CPU time, to the end of its learning rate's schedule, and what it took."""
    shutil.rmtree(workdir, ignore_errors=True)
    c.training.steps, _ = steps_in(60 * minutes, step_of(c), 25, time.process_time)
    c.training.checkpoint_every = c.training.steps
    began = time.process_time()
    model = train(c, workdir)
    told = {"steps": c.training.steps, "batch": c.training.batch_size, "rate": c.optim.lr}
    told |= {"parameters": sum(p.numel() for p in model.net.parameters()), "seconds": time.process_time() - began}
    return model, {**told, "precision": json.loads((workdir / "config.json").read_text())["training"]["precision"]}


class Scorelab:
    """A row of scorelab's, in a place of its own."""

    def __init__(self, data: Path, place: Path, precision: str, name: str = "minutes") -> None:
        self.data, self.place, self.config = data, place, config_of(data, name)
        self.config.training.precision = precision

    def train(self, minutes: float) -> dict[str, Any]:
        return trained(self.config, minutes, self.place / "run")[1]

    def samplers(self) -> dict[str, Draw]:
        c, model, _ = load_run(self.place / "run")
        prepare(model, c.training.precision, compile=False)
        # the config's own, which may be newer than the run
        s = c.sampling = self.config.sampling
        # as often as the data has them: of each in turn would be no independent draws
        classes = load_data(self.config).drawn_classes(MOST, SEED)

        def draw(first: int, n: int) -> Tensor:
            labels = classes[first : first + n]
            return sample_model(model, c, n, PerSampleNoise(SEED, first), condition=labels, progress=False)

        guided = f", guidance {s.guidance:g}" if s.guidance != 1 else ""
        if guided and s.guidance_interval:
            guided += " from {:g} to {:g}".format(*s.guidance_interval)
        return {f"{s.sampler.name}, {s.grid.n} levels{guided}": draw}


class Latent(Scorelab):
    """A row of an autoencoder, trained for a share of the time, and a score of its codes, for the rest."""

    share = 0.3

    def train(self, minutes: float) -> dict[str, Any]:
        coded = once(self.place / "autoencoder.json", lambda: self._coded(self.share * minutes))
        self.config.model.codec.path = str(self.place / "autoencoder")
        _, told = trained(self.config, (1 - self.share) * minutes, self.place / "run")
        seconds, parameters = (told[k] + coded[k] for k in ("seconds", "parameters"))
        return {**told, "seconds": seconds, "parameters": parameters, "autoencoder": coded}

    def _coded(self, minutes: float) -> dict[str, Any]:
        """The autoencoder, and what it makes of the test images."""
        c = config_of(self.data, "autoencoder")
        model, coded = trained(c, minutes, self.place / "autoencoder")
        x = images_of(self.data, "t10k")
        terms: Any = build(c).objective
        noise = counted("normal", SHAPE, range(len(x)), SEED, 0)
        with torch.no_grad():
            off = torch.cat([model.reconstruct(a) - a for a in x.split(AT_ONCE)])
            bits = [terms.terms(model, a, b) for a, b in zip(x.split(AT_ONCE), noise.split(AT_ONCE), strict=True)]
        given, rate = (float(torch.cat(some).double().mean()) for some in zip(*bits, strict=True))
        rmse = float(off.double().square().mean().sqrt())
        return {**coded, "rmse": rmse, "bits_given_code": given, "bits_of_code": rate}


class Diffusers:
    """A row of the peer's: data in [-1, 1], eps predicted at uniform steps."""

    def __init__(self, data: Path, place: Path, rate: float, batch: int) -> None:
        self.data, self.place, self.rate, self.batch = data, place, rate, batch

    @staticmethod
    def network() -> UNet2DModel:
        return UNet2DModel(
            sample_size=SHAPE[1],
            in_channels=1,
            out_channels=1,
            layers_per_block=2,
            block_out_channels=(16, 32, 64),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )

    def stepping(self, images: Tensor, steps: int) -> tuple[UNet2DModel, EMAModel, Callable[[], object]]:
        """A new network, its average, and what makes a training step."""
        torch.manual_seed(0)
        net, scheduler = self.network().train(), DDPMScheduler(num_train_timesteps=1000)
        optimiser = torch.optim.AdamW(net.parameters(), self.rate, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
        falling = get_cosine_schedule_with_warmup(optimiser, 500, steps)
        average = EMAModel(net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        rows: list[Tensor] = []

        def step() -> None:
            if not rows:
                rows.extend(torch.randperm(len(images)).split(self.batch))
            x0 = images[rows.pop()]
            noise, t = torch.randn_like(x0), torch.randint(0, 1000, (len(x0),))
            loss = functional.mse_loss(net(scheduler.add_noise(x0, noise, t), t).sample, noise)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            falling.step()
            optimiser.zero_grad()
            average.step(net.parameters())

        return net, average, step

    def train(self, minutes: float) -> dict[str, Any]:
        source = load_data(config_of(self.data))
        images = source.take(torch.arange(len(source)))
        steps, _ = steps_in(60 * minutes, self.stepping(images, 10**6)[2], 25, time.process_time)
        net, average, step = self.stepping(images, steps)
        began = time.process_time()
        for _ in tqdm(range(steps), desc=self.place.name, unit="step"):
            step()
        seconds = time.process_time() - began
        average.copy_to(net.parameters())
        self.place.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), self.place / "net.pt")
        count = sum(p.numel() for p in net.parameters())
        told = {"steps": steps, "batch": self.batch, "rate": self.rate, "parameters": count}
        return {**told, "seconds": seconds, "precision": "fp32"}

    def samplers(self) -> dict[str, Draw]:
        net = self.network().eval()
        net.load_state_dict(torch.load(self.place / "net.pt", weights_only=True))

        def draw(first: int, n: int, name: str) -> Tensor:
            kind, steps = SCHEDULERS[name]
            scheduler = kind.from_config(DDPMScheduler(num_train_timesteps=1000).config)
            scheduler.set_timesteps(steps)
            x = torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(10**6 * SEED + first))
            for t in scheduler.timesteps:
                x = scheduler.step(net(x, t).sample, t, x).prev_sample
            return x

        return {f"{name}, {steps} steps": functools.partial(draw, name=name) for name, (_, steps) in SCHEDULERS.items()}


def samples_of(place: Path, draw: Draw, n: int) -> Path:
    """A file of n samples, as bytes; each part is kept, so that drawing goes on where it stopped."""
    parts = []
    for first in tqdm(range(0, n, AT_ONCE), desc=f"{place.parent.name}: {place.name}", unit=f"{AT_ONCE} samples"):
        part = place / f"{first:06}.npy"
        parts.append(part)
        if not part.is_file():
            place.mkdir(parents=True, exist_ok=True)
            began = time.process_time()
            with torch.no_grad():
                x = draw(first, min(AT_ONCE, n - first))
            part.with_suffix(".seconds").write_text(str(time.process_time() - began))
            np.save(part, ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy())
    whole = place / f"{n}.npz"
    np.savez(whole, samples=np.concatenate([np.load(part) for part in parts])[:n])
    return whole


def seconds_of(place: Path, n: int) -> float:
    """CPU seconds that drawing 1,000 of n samples took."""
    each = [float((place / f"{first:06}.seconds").read_text()) for first in range(0, n, AT_ONCE)]
    return 1000 / n * sum(each)


def images_of(data: Path, part: str) -> Tensor:
    """ "train" or "t10k" images, inside."""
    path = next(p for p in data.glob(f"{part}-images*ubyte*"))
    return torch.from_numpy(read_idx(path)[:, None].astype(np.float32)) / 127.5 - 1


def distance(samples: Path, data: Path) -> dict[str, Any]:
    found = evaluate_samples(samples, config_of(data), features="fashion_mnist", against="train", few=True)
    told: dict[str, Any] = found["distances"]["frechet"]
    return told


def row(kind: Scorelab | Diffusers, data: Path, minutes: float, n: int) -> dict[str, Any]:
    """What a row took and what its samples are worth: those of the sampler whose first ones are nearest."""
    place = kind.place
    told = once(place / "trained.json", lambda: {"minutes": minutes, **kind.train(minutes)})
    if told["minutes"] != minutes:
        raise ValueError(
            f"{place} was trained for {told['minutes']:g} minutes, not {minutes:g}; expected another --out"
        )
    tried = kind.samplers()

    def folder_of(name: str) -> Path:
        return place / name.replace(", ", "_").replace(" ", "_")

    def judged(name: str, count: int) -> dict[str, Any]:
        folder = folder_of(name)
        return once(folder / f"distance_{count}.json", lambda: distance(samples_of(folder, tried[name], count), data))

    first = {name: judged(name, min(n, FIRST))["value"] for name in tried}
    best = min(first, key=lambda name: first[name])
    found = judged(best, n)
    return {**told, "sampler": best, "tried": first, "drawing": seconds_of(folder_of(best), n), "distance": found}


def floor(data: Path, out: Path) -> dict[str, Any]:
    """The test images' distance from the training images."""

    def work() -> dict[str, Any]:
        file = out / "test.npz"
        out.mkdir(parents=True, exist_ok=True)
        np.savez(file, samples=((images_of(data, "t10k") + 1) * 127.5).round().to(torch.uint8).numpy())
        return distance(file, data)

    return once(out / "floor.json", work)


def rows_of(data: Path, out: Path) -> dict[str, Scorelab | Diffusers]:
    return {
        "scorelab": Scorelab(data, out / "scorelab", "auto"),
        "scorelab_fp32": Scorelab(data, out / "scorelab_fp32", "fp32"),
        "scorelab_latent": Latent(data, out / "scorelab_latent", "auto", "latent"),
        "diffusers": Diffusers(data, out / "diffusers", 1e-4, 16),
        "diffusers_tuned": Diffusers(data, out / "diffusers_tuned", 1e-3, 16),
    }


def table(found: dict[str, Any]) -> str:
    def cells(d: dict[str, Any]) -> list[str]:
        low, high = d["interval_95"]
        return [f"{d['plain']:.3f}", f"{d['value']:.3f}", f"{low:.3f} to {high:.3f}"]

    body = [
        [
            f"{name.split('_')[0]}{' of codes' if 'autoencoder' in r else ''}, {r['precision']}, rate {r['rate']:g}",
            f"{r['steps']:,} of {r['batch']}",
            f"{r['seconds'] / 60:.1f}",
            f"{r['parameters']:,}",
            r["sampler"],
            f"{r['drawing']:.1f}" if "drawing" in r else "",
            *cells(r["distance"]),
        ]
        for name, r in found["rows"].items()
    ]
    body.append(["test images", *[""] * 5, *cells(found["floor"])])
    head = ["", "steps", "CPU minutes", "parameters", "sampler", "s for 1,000", "plain", "extrapolated", "95 %"]
    return f"{markdown(head, body)}\n\nMeasured on {found['machine']}, {found['versions']}."


def page(found: dict[str, Any]) -> None:
    """The table in docs/evaluation.md, between its marks."""
    path, begin, end = ROOT / "docs" / "evaluation.md", "<!-- fashion -->\n", "<!-- /fashion -->"
    head, rest = path.read_text().split(begin)
    path.write_text(f"{head}{begin}\n{table(found)}\n\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "fashion")
    parser.add_argument("--data", type=Path, default=FOLDER)
    parser.add_argument("--table", action="store_true", help="only write what was measured before")
    options = parser.parse_args()
    if not options.table:
        torch.set_num_threads(1)
        found: dict[str, Any] = {"minutes": options.minutes, "n": options.n, "machine": f"one thread of {cpu()}"}
        found |= {"versions": f"torch {torch.__version__}, Python {platform.python_version()}"}
        # rows that were measured alike stay
        before = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
        rows = before["rows"] if {k: before.get(k) for k in found} == found else {}
        known = rows_of(options.data, options.out)
        for name in options.rows or known:
            rows[name] = row(known[name], options.data, options.minutes, options.n)
        found["rows"] = {name: rows[name] for name in known if name in rows}
        found["floor"] = floor(options.data, options.out)
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
    page(json.loads(RESULT.read_text()))


if __name__ == "__main__":
    main()
