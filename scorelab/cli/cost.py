"""``scorelab evaluate --samplers``: quality against cost, the distance of samples by evaluations of the score."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from ml_collections import ConfigDict

from scorelab import parallel
from scorelab.checks import nearest_name
from scorelab.cli.analysis import calibrated_file
from scorelab.cli.evaluating import JudgedRun, sampler_of
from scorelab.cli.overrides import sampling_changed
from scorelab.plotting import figure, scaled_for
from scorelab.samplers import SAMPLERS, Calibrated
from scorelab.training import nfe_of, with_nfe
from scorelab.writing import save_json, whole

__all__ = ["Point", "cost_of", "cost_table", "points", "shown_distance"]

_CALIBRATED = "calibrated"
Record = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """A sampler at a cost: its name, the evaluations that were asked for and those that it takes, and its settings, or
    the file of a calibrated one."""

    name: str
    nfe: int
    evaluations: int
    config: ConfigDict
    file: Path | None = None

    @property
    def about(self) -> Record:
        """What its record says of it."""
        known = {"name": self.name, "nfe": self.nfe, "evaluations": self.evaluations}
        return {**known, "sampler": sampler_of(self.config, self.file)}


def points(run: JudgedRun, samplers: list[str], counts: list[int], guided: list[str]) -> list[Point]:
    """Every sampler at every number of evaluations. guided: what a calibrated sampler's file is named by.

    Raises ValueError for a sampler that is not known, can't keep to a number of evaluations, or is not calibrated yet.
    """
    unknown = [name for name in samplers if name not in (*SAMPLERS, _CALIBRATED)]
    if unknown:
        raise ValueError(f"--samplers has {unknown[0]!r}; {nearest_name(unknown[0], (*SAMPLERS, _CALIBRATED))}")
    found = []
    for name in samplers:
        changes = [] if name == _CALIBRATED else [f"--config.sampling.sampler.name={name}"]
        named = sampling_changed(run.config, changes)
        for nfe in counts:
            if name == _CALIBRATED:
                found.append(Point(name, nfe, nfe, named, _calibrated(run, nfe, guided)))
                continue
            try:
                config = with_nfe(named, run.model, nfe)
            except ValueError as error:
                raise ValueError(f"--samplers has {name!r}: {error}") from error
            found.append(Point(name, nfe, nfe_of(config, run.model), config))
    return found


def _calibrated(run: JudgedRun, nfe: int, guided: list[str]) -> Path:
    file = calibrated_file(run.workdir, nfe, guided)
    if not file.is_file():
        raise ValueError(
            f"there is no calibrated sampler {file}; make it with: scorelab calibrate --workdir "
            f"{quote(str(run.workdir))} --nfe {nfe}{run.steering.options()}"
        )
    takes = len(Calibrated.load(file).weights)
    if takes != nfe:
        raise ValueError(f"{file} takes {takes} evaluations; expected {nfe}: calibrate again")
    return file


def cost_of(run: JudgedRun, asked: list[Point], out: Path) -> Record:
    """The records of all points in one, with the distance of data from itself; ``out`` is written after each, and what
    it holds of the same settings is not computed again. Raises ValueError where it holds something else."""
    about: Record = json.loads(json.dumps(run.about))
    found = _begun(out, about)
    if "floor" not in found:
        found = {**about, "floor": run.beside.floor(run.model.device), "records": []}
    for point in asked:
        mine = json.loads(json.dumps(point.about))
        if any({k: r.get(k) for k in mine} == mine for r in found["records"]):
            continue
        record = run.record(point.file, point.config)
        others = [r for r in found["records"] if (r["name"], r["nfe"]) != (point.name, point.nfe)]
        found["records"] = [*others, {**mine, **{k: v for k, v in record.items() if k not in about and k not in mine}}]
        if parallel.world()[0] == 0:
            save_json(found, out)
    if parallel.world()[0] == 0:
        with whole(out.with_suffix(".png")) as aside:
            cost_figure(found).savefig(aside, format="png")
    return found


def _begun(out: Path, about: Record) -> Record:
    """What is there of the same settings."""
    if not out.is_file():
        return {}
    try:
        found: Record = json.loads(out.read_text())
        differing = [k for k in about if found[k] != about[k]]
        complete = all({"name", "nfe", "evaluations", "distances"} <= r.keys() for r in found["records"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{out} holds no records of --samplers ({error!r}); expected another --out") from error
    if differing or not complete:
        key = next(iter(differing), "records")
        raise ValueError(
            f"{out} holds records of other settings: {key} is {found[key]!r} there, {about.get(key)!r} now; expected "
            "another --out, or remove it"
        )
    return found


def shown_distance(found: Record) -> str:
    """The distance that stands for all: Frechet's where the sets are large enough for it, else the energy distance."""
    every = [found["floor"], *found["records"]]
    return "frechet" if all("value" in r["distances"]["frechet"] for r in every) else "kernel_energy"


def front(records: list[Record], distance: str) -> list[Record]:
    """Those that none beats at as few evaluations, by their number."""
    kept: list[Record] = []
    for r in sorted(records, key=lambda r: (r["evaluations"], r["distances"][distance]["value"])):
        if not kept or r["distances"][distance]["value"] < kept[-1]["distances"][distance]["value"]:
            kept.append(r)
    return kept


def cost_table(found: Record) -> str:
    """The records in lines."""
    name = shown_distance(found)
    best, floor = front(found["records"], name), found["floor"]["distances"][name]
    of = found["data"]
    lines = [f"{found['of']}, beside {of['count']:,} of {of['source']} ({of['against']})"]
    lines.append(f"features: {found['features']}; {name} ± standard error; * none is better at as few evaluations")
    for r in sorted(found["records"], key=lambda r: (r["name"], r["evaluations"])):
        d, mark = r["distances"][name], "*" if r in best else " "
        said = f"{r['name']:<22} {r['evaluations']:>5} evaluations {mark} {d['value']:.4g} ± {d['stderr']:.2g}"
        lines.append(f"{said}, {r['seconds_drawing']:.1f} s of drawing")
    lines.append(f"{found['floor']['of']}: {floor['value']:.4g} ± {floor['stderr']:.2g}")
    return "\n".join(lines)


_TITLES = {"frechet": "Fréchet distance, extrapolated to endless sets", "kernel_energy": "energy distance"}


def cost_figure(found: Record) -> Figure:
    """Distance with 95 % intervals against evaluations, a line for each sampler."""
    name = shown_distance(found)
    drawn, ((ax,),) = figure(1, size=7)
    drawn.set_size_inches(7.2, 5)
    ticks: list[int] = []
    for count in sorted({r["evaluations"] for r in found["records"]}, reverse=True):
        # one number where two would lie over each other
        ticks += [count] if not ticks or ticks[-1] > 1.15 * count else []
    for sampler in sorted({r["name"] for r in found["records"]}):
        mine = sorted((r for r in found["records"] if r["name"] == sampler), key=lambda r: r["evaluations"])
        values = [r["distances"][name]["value"] for r in mine]
        reach = [r["distances"][name]["interval_95"][1] - v for r, v in zip(mine, values, strict=True)]
        ax.errorbar([r["evaluations"] for r in mine], values, reach, fmt="o-", ms=4, lw=1.2, capsize=3, label=sampler)
    best = front(found["records"], name)
    x, y = ([r["evaluations"] for r in best], [r["distances"][name]["value"] for r in best])
    ax.plot(x, y, "o", ms=11, mfc="none", mec="k", mew=1, label="none is better at as few")
    low, high = found["floor"]["distances"][name]["interval_95"]
    ax.axhspan(low, high, color="0.85", zorder=0, label=f"{found['floor']['of']} (95 %)".replace("_", " "))
    scaled_for(ax, [r["distances"][name]["interval_95"] for r in (found["floor"], *found["records"])])
    ax.set_xscale("log")
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(xlabel="evaluations of the score a sample", ylabel=f"{_TITLES[name]} (95 % bars)")
    ax.set_title(f"quality against cost, {found['features']}\n{found['of']}", fontsize=9)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return drawn
