"""Images restored by ``scorelab restore``'s methods: held-out Fashion-MNIST, by the model that comes with scorelab.

Tasks: the lower half and a random half of the pixels missing, images at half their size without and with noise of std
0.1, and gray images coloured by a model of (3, 14, 14) that is trained here, in 3,000 steps, on the training images
times a random hue. For ``COUNT`` test images a method makes ``DRAWS`` samples each, as the command does. Given are root
mean square errors of their mean and of a sample, over the pixels that are not known, in units where black is -1 and
white 1; the energy score, E|x - x0| - E|x - x'|/2 over the root of the number of pixels, which on average is least for
samples of the true posterior (Gneiting and Raftery, 2007); and how far A(x) is from y. Of each the mean over images and
its standard error.

``python -m benchmarks.restoring`` writes docs/inverse.md and docs/images/restored.png.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from ml_collections import ConfigDict
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from scorelab.cli.restoring import measure
from scorelab.cli.runs import load_run
from scorelab.data import read_idx
from scorelab.interop.loading import pretrained
from scorelab.inverse import Colourisation, Inpainting, LinearOperator, Measurement, SuperResolution
from scorelab.plotting import figure
from scorelab.plotting.pictures import tiled
from scorelab.training import default_config, posterior_samples, train
from scorelab.training.restoring import DEFAULT, usual_nfe

DATA = Path("/usr/share/datasets/fashion-mnist")
ROOT = Path(__file__).parents[1]
DOCS, TINTED, RESULTS = ROOT / "docs", ROOT / "runs" / "tinted", ROOT / "benchmarks" / "results" / "restoring.json"
COUNT, DRAWS, SHOWN = 16, 3, 6


def images(name: str) -> Tensor:
    """uint8 (N, 1, 28, 28) of "train" or "t10k"."""
    return torch.from_numpy(read_idx(DATA / f"{name}-images-idx3-ubyte.gz").copy()).unsqueeze(1)


def tinted(gray: Tensor, seed: int) -> Tensor:
    """uint8 (N, 3, 14, 14): images (N, 1, 28, 28) at half their size, each times a colour of random hue."""
    hue = torch.rand(len(gray), generator=torch.Generator().manual_seed(seed))
    colour = hsv_to_rgb(torch.stack([hue, torch.full_like(hue, 0.8), torch.ones_like(hue)], 1).numpy())
    small = avg_pool2d(gray.float(), 2)
    return (small * torch.from_numpy(colour).float()[:, :, None, None]).round().to(torch.uint8)


class Tinted(Dataset):
    """The training images in colour, (3, 14, 14)."""

    def __init__(self) -> None:
        self.images = tinted(images("train"), 0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def tinted_config() -> ConfigDict:
    """EDM's preconditioning, levels and sampler on ``Tinted``."""
    c = default_config()
    c.data.source = "benchmarks.restoring:Tinted"
    c.model.net.name, c.model.net.embedding, c.model.net.fir, c.model.net.inputs = "ncsnpp", "positional", (), "none"
    c.model.net.width, c.model.net.multipliers, c.model.net.blocks = 16, (1, 2), 1
    c.model.net.attention, c.model.net.dropout = (1,), 0.0
    c.model.label, c.model.label_scale = "log_sigma", 0.25
    c.training.weighting.name = "edm"
    c.training.steps, c.training.batch_size = 3000, 64
    c.training.checkpoint_every = 500
    c.optim.lr, c.optim.schedule.name, c.optim.ema = 2e-3, "cosine", (0.999,)
    c.sampling.sampler.name, c.sampling.grid.name, c.sampling.grid.n = "heun", "karras", 18
    return c


@dataclass(frozen=True)
class Case:
    """A task, whose option is no file, on test images of a model."""

    task: str
    operator: Callable[[tuple[int, ...]], LinearOperator]
    methods: tuple[str, ...] = ("pseudo_inverse", "ddrm", "daps")
    noise_std: float = 0.0
    coloured: bool = False

    def images(self, count: int) -> Tensor:
        gray = images("t10k")[:count]
        return (tinted(gray, 1) if self.coloured else gray).float() / 127.5 - 1


def half(shape: tuple[int, ...]) -> LinearOperator:
    known = torch.ones(1, *shape[1:], dtype=torch.bool)
    known[:, shape[1] // 2 :] = False
    return Inpainting(known, shape)


def scattered(shape: tuple[int, ...]) -> LinearOperator:
    return Inpainting(torch.rand(1, *shape[1:], generator=torch.Generator().manual_seed(5)) > 0.5, shape)


CASES = {
    "lower half missing": Case("inpaint", half, ("pseudo_inverse", "ddrm", "daps", "replacement")),
    "random half missing": Case("inpaint", scattered, ("pseudo_inverse", "ddrm", "replacement")),
    "half the size": Case("super_resolve", lambda shape: SuperResolution(shape, 2)),
    "half the size, noise 0.1": Case("super_resolve", lambda shape: SuperResolution(shape, 2), noise_std=0.1),
    "gray to colour": Case("colourise", Colourisation, coloured=True),
}


def restored(case: Case, method: str, count: int, draws: int) -> tuple[Tensor, Tensor, Tensor, LinearOperator, Tensor]:
    """Images (K, *D), what is seen of them (K, *D), samples (K, n, *D), the operator and its y."""
    config, model, _ = load_run(TINTED if case.coloured else pretrained("fashion_mnist"))
    x0 = case.images(count)
    operator = case.operator(model.data_shape)
    y = operator(x0)
    y = y + case.noise_std * torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    seen = measure(operator, x0 if case.task == "inpaint" else y)
    options = {"method": method, "nfe": usual_nfe(config, model, method)}
    # by a seed of its own, so that errors of images are independent
    parts = [Measurement(operator, seen.y[k : k + 1], case.noise_std) for k in range(count)]
    x = torch.cat([posterior_samples(model, config, part, draws, k, **options) for k, part in enumerate(parts)])
    return x0, seen.picture, x, operator, y


def numbers(case: Case, method: str) -> dict[str, tuple[float, float] | float]:
    """Errors, each with the standard error of its mean over images, and seconds of one thread for a sample."""
    begun = time.process_time()
    x0, _, x, operator, y = restored(case, method, COUNT, DRAWS)
    seconds = (time.process_time() - begun) / (COUNT * DRAWS)
    unknown = ~operator.known if isinstance(operator, Inpainting) else torch.ones(operator.data_shape, dtype=torch.bool)
    drawn, truth = x[:, :, unknown], x0[:, None, unknown]
    pairs = torch.cdist(drawn, drawn).sum((1, 2)) / (DRAWS * (DRAWS - 1))
    apart = operator(x.flatten(0, 1)) - y.repeat_interleave(DRAWS, 0)
    found = {
        "mean": (drawn.mean(1) - truth[:, 0]).square().mean(1).sqrt(),
        "sample": (drawn - truth).square().mean((1, 2)).sqrt(),
        "energy": ((drawn - truth).norm(dim=2).mean(1) - 0.5 * pairs) / math.sqrt(drawn.shape[2]),
        "apart": apart.reshape(COUNT, -1).square().mean(1).sqrt(),
    }
    spread = {k: (float(v.mean()), statistics.stdev(v.tolist()) / math.sqrt(COUNT)) for k, v in found.items()}
    return {**spread, "seconds": seconds}


def draw_rows(ax: Axes, rows: Tensor, names: Sequence[str], columns: Sequence[str] = ()) -> None:
    """Rows of images (R, K, C, H, W) under each other, with their names and those of the columns."""
    page = tiled(rows.flatten(0, 1), columns=rows.shape[1])
    ax.imshow(page, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    for axis, size, said in ((ax.yaxis, page.shape[0], names), (ax.xaxis, page.shape[1], columns)):
        axis.set_ticks([size / len(said) * (k + 0.5) for k in range(len(said))], said)
    ax.xaxis.tick_top()


def plot() -> None:
    """restored.png: a panel for each task; from above the images, what is known of them, and samples."""
    made, axes = figure(2, 2, size=4.6)
    cases = {name: case for name, case in CASES.items() if not case.noise_std}
    for ax, (name, case) in zip(axes.flat, cases.items(), strict=True):
        x0, seen, x, _, _ = restored(case, DEFAULT, SHOWN, 3)
        draw_rows(ax, torch.stack([x0, seen, *x.unbind(1)]), ("image", "known", *["sample"] * 3))
        ax.set_title(f"{name}, by {DEFAULT}")
    made.set_size_inches(9.2, 7.6)
    made.savefig(DOCS / "images" / "restored.png")


def cell(value: tuple[float, float]) -> str:
    mean, error = value
    return "0" if mean < 1e-6 else f"{mean:.3f} ± {error:.3f}"


def table(results: dict[str, dict[str, dict]]) -> str:
    """Markdown: a line for each task and method; the command's own is marked."""
    lines = [
        "| task | method | error of the mean | of a sample | energy score | off y | s a sample |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in results.items():
        for method, row in rows.items():
            marked = f"**{method}**" if method == DEFAULT else method
            cells = [cell(row[key]) for key in ("mean", "sample", "energy", "apart")]
            lines.append(f"| {name} | {marked} | " + " | ".join([*cells, f"{row['seconds']:.2g}"]) + " |")
    return "\n".join(lines)


def page(results: dict[str, dict[str, dict]]) -> None:
    """The table in docs/inverse.md, between its marks."""
    path, begin, end = DOCS / "inverse.md", "<!-- restored -->\n", "<!-- /restored -->"
    head, rest = path.read_text().split(begin)
    about = f"Measured with torch {torch.__version__}, Python {platform.python_version()}."
    path.write_text(f"{head}{begin}\n{table(results)}\n\n{about}\n\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", action="store_true", help="only draw and write what was measured before")
    torch.set_num_threads(1)
    only_plot = parser.parse_args().plot
    results: dict[str, dict[str, dict]] = json.loads(RESULTS.read_text()) if only_plot else {}
    work = [(name, method) for name, case in CASES.items() for method in case.methods]
    for name, method in [] if only_plot else tqdm(work, unit="method"):
        if CASES[name].coloured:
            # a run that is done stays as it is
            train(tinted_config(), TINTED)
        results.setdefault(name, {})[method] = numbers(CASES[name], method)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    plot()
    page(results)


if __name__ == "__main__":
    main()
