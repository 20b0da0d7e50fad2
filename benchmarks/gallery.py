"""``make gallery``: the image models of every family, each trained for its share of an hour, on one page.

python -m benchmarks.gallery [--minutes 60] [--jobs 2] [--whole] [--out runs/gallery] [NAME ...]

A name is a data set, digits or fashion_mnist, or one of its configs, such as digits/edm; without one, all. Each is
trained in one thread to the end of its learning rate's schedule, in as many steps as fit its share; EDM's, which the
rows of restored and of interpolated images and the plot of distance against evaluations are made with, for longer.
--whole: in as many steps as the config says, and 1,000 samples, each class in turn, are judged beside the data. What is
done is not done again, and a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from PIL import Image
from tqdm.auto import tqdm

from benchmarks.judge import worth
from benchmarks.minutes import once, spent, step_of, steps_in
from benchmarks.restoring import CASES, draw_rows
from scorelab import ScoreModel, sample
from scorelab.cli.bound import bound_run
from scorelab.cli.cost import cost_of, cost_table, points
from scorelab.cli.evaluating import JudgedRun
from scorelab.cli.overrides import config_file
from scorelab.cli.restoring import measure
from scorelab.cli.runs import is_autoencoder, load_run, run_config
from scorelab.cli.sampling import sample_run
from scorelab.cli.steering import Steering
from scorelab.inverse import Measurement, encode, slerp
from scorelab.plotting import figure
from scorelab.plotting.page import Section, write_page
from scorelab.plotting.pictures import tiled
from scorelab.processes import Process
from scorelab.samplers import Heun
from scorelab.saved import Model
from scorelab.sigmas import karras
from scorelab.training import load_data, posterior_samples, train
from scorelab.training.restoring import DEFAULT, usual_nfe
from scorelab.typing import Batch, Tensor

ROOT = Path(__file__).parents[1]
SHARES = {"digits": 40 / 60, "fashion_mnist": 140 / 60}
"""Seconds of training a minute of the gallery."""
MAIN, LONGER, HELD = "edm", 3, {"digits": 100, "fashion_mnist": 1000}
CODED = {"autoencoder": "autoencoder", "semantic": "diffae"}
"""Whose codes a codec's are: the config that it is trained by."""
SCALES, SHEET, COUNT = (0, 1, 2, 4), 40, 1000
TASKS = {name: case.operator for name, case in CASES.items() if not (case.coloured or case.noise_std)}
COSTS = {"samplers": ["heun", "dpm2m", "ancestral"], "nfe": [5, 10, 20, 50]}
JUDGED = {"digits": 1000, "fashion_mnist": 300}
Numbers = dict[str, Any]


def names_of(source: str) -> list[str]:
    """The configs of a data set's models that are sampled from, such as digits/edm, that which takes longest last."""
    other = ("classifier", "features", *CODED.values())
    found = sorted(p.stem for p in (ROOT / "configs" / source).glob("*.py") if p.stem not in other)
    return [f"{source}/{name}" for name in sorted(found, key=lambda name: name == MAIN)]


def config_of(name: str) -> ConfigDict:
    return config_file([f"--config={ROOT / 'configs' / name}.py"])[0]


def trained(name: str, minutes: float, workdir: Path) -> Model:
    """The run of a config, begun or gone on with; minutes: 0 for all of its steps. That of codes begins with that of
    what makes them, for as long, beside it."""
    if (workdir / "config.json").is_file():
        c = run_config(workdir)
    else:
        c, (source, kind) = config_of(name), name.split("/")
        c.data.validation = HELD[source]
        if of := CODED.get(c.model.codec.name):
            place = workdir.with_name("codec")
            trained(f"{source}/{of}", minutes, place)
            c.model.codec.path = str(place)
        c.training.sample_every = c.training.validate_every = 0
        if minutes:
            # to be guided
            c.training.label_dropout = c.training.label_dropout or 0.1 * c.model.conditional
            seconds = SHARES[source] * minutes * (LONGER if kind == MAIN else 1)
            c.training.steps = min(c.training.steps, steps_in(seconds, step_of(c), tried=12)[0])
            c.optim.warmup = min(c.optim.warmup, c.training.steps // 10)
    return train(c, workdir)


def family(name: str, minutes: float, out: Path) -> Numbers:
    """Train a config and draw its sheets: a column a class at every scale of guidance, where it knows classes."""
    model = trained(name, minutes, out / "run")
    c = run_config(out / "run")
    found: Numbers = {"steps": c.training.steps, "training, s": spent(out / "run")}
    scales = SCALES if c.training.label_dropout else SCALES[1:2]
    kinds = {f"guidance_{w}": Steering(condition="each", guidance=float(w)) for w in scales if model.conditional}
    for kind, steering in (kinds or {"samples": Steering()}).items():
        began = time.perf_counter()
        drawn = sample_run(out / "run", n=SHEET, steering=steering)
        found[f"{kind.replace('_', ' ')}, s"] = time.perf_counter() - began
        Image.fromarray(tiled(drawn.x, drawn.values, columns=10)).save(out / f"{kind}.png")
    source = name.split("/")[0]
    if model.codec is not None:
        x = load_data(c).hold_out(HELD[source]).x0[:8]
        rows = torch.stack([x, model.decode(model.encode(x))])
        rows_picture(rows, ("image", "decoded")).savefig(out / "decoded.png")
        found["training of the codec, s"] = spent(out / "codec")
    return found | (judged(source, out / "run") if not minutes else {})


def judged(source: str, workdir: Path) -> Numbers:
    """What samples by the config's own sampler and guidance are worth."""
    began = time.perf_counter()
    drawn = sample_run(workdir, n=COUNT)
    seconds, x = time.perf_counter() - began, drawn.x if drawn.values is None else drawn.values.rounded(drawn.x)
    return {f"{COUNT:,} samples, s": seconds, "judged": worth(source, x.flatten(1), drawn.labels)}


def main_model(source: str, out: Path) -> tuple[ConfigDict, ScoreModel, Batch]:
    """The config and model that pictures of a data set are made with, and images that it did not see."""
    c, model, _ = load_run(out.parent / f"{source}-{MAIN}" / "run")
    return c, model, load_data(c).hold_out(HELD[source])


def rows_picture(rows: Tensor, names: Sequence[str], columns: Sequence[str] = ()) -> Figure:
    """A picture of ``draw_rows`` alone."""
    made, ((ax,),) = figure(1)
    made.set_size_inches(0.8 * rows.shape[1] + 1.6, 0.8 * len(rows) + 0.3)
    draw_rows(ax, rows, names, columns)
    return made


def restored(source: str, out: Path) -> Numbers:
    """Images that the model did not see, what is known of them, and three samples of the rest, for each task."""
    c, model, held = main_model(source, out)
    x0, seconds = held.x0[:8], {}
    for task, made in TASKS.items():
        began, operator = time.perf_counter(), made(model.data_shape)
        seen = measure(operator, x0)
        x = posterior_samples(model, c, Measurement(operator, seen.y), 3, nfe=usual_nfe(c, model, DEFAULT))
        rows = torch.stack([x0, seen.picture, *x.unbind(1)])
        rows_picture(rows, ("image", "known", *["sample"] * 3)).savefig(out / f"{task.replace(' ', '_')}.png")
        seconds[f"{task}, s"] = time.perf_counter() - began
    return {"method": DEFAULT, **seconds}


def interpolated(source: str, out: Path) -> Numbers:
    """Pairs of images that the model did not see, encoded by the probability-flow ODE and the score of no class, and
    the arc between their latents, decoded."""
    _, model, held = main_model(source, out)
    began, score = time.perf_counter(), model.conditioned(None)
    low, high = model.sigma_range
    levels = karras(18, sigma_min=low, sigma_max=high)
    first, second = held.x0[0:10:2], held.x0[1:10:2]
    a, b = (encode(score, x, levels, Heun(), tol=1e-3) for x in (first, second))
    ways = [slerp(a, b, w) for w in torch.linspace(0, 1, 7).tolist()]
    x = sample(score, torch.cat(ways), levels, Heun()).reshape(7, 5, *model.data_shape)
    rows = torch.stack([first, *x, second], 1)
    columns = ["image", "decoded", *(f"{k}/6" for k in range(1, 6)), "decoded", "image"]
    rows_picture(rows, [f"pair {k + 1}" for k in range(5)], columns).savefig(out / "interpolated.png")
    given_back = float((torch.stack([x[0], x[6]]) - torch.stack([first, second])).square().mean().sqrt())
    return {"seconds": time.perf_counter() - began, "ends off the images by (RMS)": given_back}


def bounds(source: str, out: Path) -> Numbers:
    """The terms of the variational bound of held-out images, bits per dimension."""
    found = {}
    for name in ("ddpm", "improved_ddpm", "vdm"):
        began, place = time.perf_counter(), out / f"{name}.png"
        run = out.parent / f"{source}-{name}" / "run"
        told = json.loads(bound_run(run, place, n=100, levels=-1, seed=0, step=0, steps=100))
        parts = {k: told[k]["mean"] for k in ("bound", "prior", "steps", "decoder")}
        found[name] = {**parts, "± of the bound": told["bound"]["standard_error"], "s": time.perf_counter() - began}
    return found


def schedules(source: str, out: Path) -> Numbers:
    """Log-SNR against time of every process, that of VDM as it was learned; families that share one share a line."""
    made, ((ax,),) = figure(1, size=6)
    found: dict[tuple[str, float, float], tuple[list[str], Process]] = {}
    for name in sorted(names_of(source)):
        run = out.parent / name.replace("/", "-") / "run"
        if is_autoencoder(run):
            continue
        p = load_run(run)[1].process
        found.setdefault((type(p).__name__, *p.sigma_range), ([], p))[0].append(Path(name).name)
    for k, (names, p) in enumerate(found.values()):
        t = torch.linspace(p.t_min, p.t_max, 400, dtype=torch.float64)
        with torch.no_grad():
            snr = -2 * p.sigma(t).log()
        share = (t - p.t_min) / (p.t_max - p.t_min)
        ax.plot(share.numpy(), snr.numpy(), "--" if k % 2 else "-", label=", ".join(names), lw=1.6)
    ax.set(xlabel="time, as a share of the process's", ylabel="log SNR = -2 log sigma")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    made.savefig(out / "schedules.png")
    return {
        ", ".join(names): {"process": kind, "least sigma": low, "greatest sigma": high}
        for (kind, low, high), (names, _) in found.items()
    }


def costs(source: str, out: Path) -> Numbers:
    """The distance of samples from data against evaluations, on the classifier's features that come with scorelab."""
    run = JudgedRun(
        out.parent / f"{source}-{MAIN}" / "run", n=JUDGED[source], features=source, against="train", few=True
    )
    found = cost_of(run, points(run, COSTS["samplers"], COSTS["nfe"], []), out / "cost.json")
    return {"table": cost_table(found).splitlines()}


EXTRAS: dict[str, tuple[Callable[[str, Path], Numbers], str]] = {
    "costs": (costs, "Distance against evaluations"),
    "restored": (restored, "Inverse problems"),
    "interpolated": (interpolated, "Interpolations"),
    "bounds": (bounds, "Terms of the bound"),
    "schedules": (schedules, "Schedules"),
}


def done(out: Path) -> Numbers | None:
    """What a part of the gallery found, if it is done."""
    record = out / "record.json"
    found: Numbers | None = json.loads(record.read_text()) if record.is_file() else None
    return found


def work(part: Callable[..., Numbers], arguments: tuple[Any, ...], out: Path) -> None:
    """Do a part of the gallery and record what it found; an error is said, and recorded for this time."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "failed.txt").unlink(missing_ok=True)
    try:
        once(out / "record.json", lambda: part(*arguments, out))
    except Exception as error:
        # the other parts go on
        (out / "failed.txt").write_text(traceback.format_exc())
        print(f"{out.name} failed: {error}", file=sys.stderr)


def _begin(places: Any) -> None:
    """Of each process: one thread, and a line of its own for progress bars."""
    os.environ["TQDM_POSITION"] = str(places.get())
    torch.set_num_threads(1)


def all_done(parts: list[tuple[Callable[..., Numbers], tuple[Any, ...], Path]], jobs: int, title: str) -> None:
    """Do the parts that are not done, several at once."""
    left = [p for p in parts if done(p[2]) is None]
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for k in range(jobs):
        places.put(k + 1)
    bar = tqdm(total=len(parts), initial=len(parts) - len(left), desc=title, unit="part", position=0)
    with bar, ProcessPoolExecutor(jobs, context, _begin, (places,)) as pool:
        running: dict[Future[None], str] = {pool.submit(work, *p): p[2].name for p in left}
        for ended in as_completed(running):
            ended.result()
            bar.set_postfix_str(running[ended])
            bar.update()


def sections(asked: list[str], sources: list[str], out: Path) -> Iterator[Section]:
    """The page: what all families make, of each data set, then the rest."""
    for source, called in (("digits", "Digits"), ("fashion_mnist", "Fashion-MNIST")):
        for name in sorted(n for n in asked if n.startswith(source)):
            about = (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1]
            yield section(f"{called}: {Path(name).name}", about, out / name.replace("/", "-"))
        for key, (part, heading) in EXTRAS.items() if source in sources else ():
            yield section(f"{called}: {heading}", part.__doc__ or "", out / f"{source}-{key}")


def section(heading: str, text: str, place: Path) -> Section:
    """A part of the page, with the seconds that it took."""
    found, text = done(place), " ".join(text.split())
    if found is None:
        failed = place / "failed.txt"
        said = failed.read_text().splitlines()[-1] if failed.is_file() else "not done yet"
        return heading, f"{text} {said}", [], None
    if "steps" in found:
        drew = [
            f"{k.removesuffix(', s')} {v:.0f} s"
            for k, v in found.items()
            if k.endswith(", s") and not k.startswith("training")
        ]
        text += f" {found['steps']:,} steps in {found['training, s']:.0f} s; {SHEET} samples: {', '.join(drew)}."
    return heading, text, sorted(place.glob("*.png")), found


def main() -> int:
    """Do all parts, as far as they go, write the page and say where it is; 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(SHARES))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gallery")
    options = parser.parse_args()
    began, out, minutes = time.perf_counter(), options.out, 0.0 if options.whole else options.minutes
    asked = [n for source in SHARES for n in names_of(source) if {n, source} & set(options.names)]
    unknown = set(options.names) - {*SHARES, *asked}
    if unknown:
        parser.error(f"{sorted(unknown)[0]} is neither a data set nor a config; expected such as digits or digits/edm")
    sources = [source for source in SHARES if source in options.names]
    for source in sources:
        # what is not there is said before hours of work
        load_data(config_of(f"{source}/{MAIN}"))
    # those of the larger images take longest
    families = [(family, (name, minutes), out / name.replace("/", "-")) for name in reversed(asked)]
    extras = [(EXTRAS[key][0], (source,), out / f"{source}-{key}") for key in EXTRAS for source in sources]
    all_done(families, options.jobs, "families")
    all_done(extras, options.jobs, "pictures")
    page = write_page(out / "index.html", "scorelab: images of every family", list(sections(asked, sources, out)))
    failed = [place.name for _, _, place in (*families, *extras) if done(place) is None]
    print(f"{page.resolve()} ({time.perf_counter() - began:.0f} s)")
    if failed:
        print(f"failed: {', '.join(failed)}; run it again to go on", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
