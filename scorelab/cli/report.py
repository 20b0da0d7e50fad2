"""One page of a run: losses, noise levels, gradients, speed, and the samples over time."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from scorelab.plotting import figure, scaled_for
from scorelab.plotting.page import Section, write_page
from scorelab.training import checkpoint
from scorelab.training.run import recorded_config

__all__ = ["report_run"]

Row = dict[str, Any]
_CODED = ("reconstruction_rmse", "bits_given_code", "bits_of_code")
_NORMAL = 1.96
"""Standard errors on each side of a 95 % interval."""


def _rows(workdir: Path) -> list[Row]:
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{workdir} holds no metrics.jsonl; expected the directory of a run: scorelab train makes one")
    found = []
    for i, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int):
                raise ValueError(f"step is {row['step']!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {i} is no row of metrics ({error}); remove that line") from error
        found.append(row)
    return found


def _png(drawn: Figure) -> bytes:
    data = io.BytesIO()
    drawn.savefig(data, format="png")
    return data.getvalue()


def _legend(ax: Axes) -> None:
    """Under the axes, off the curves; and few whole numbers of steps."""
    ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _losses(trained: list[Row], validated: list[Row], stable: bool) -> bytes:
    by_level = any(level is not None for level in trained[-1]["sigma_bins"])
    drawn, axes = figure(1 + by_level, size=5)
    steps = [r["step"] for r in trained]
    # the plain target's loss has a part that no network can lower
    kinds = (" (stable target)", " (plain target, whose least loss is higher)") if stable else ("", "")
    axes[0, 0].plot(steps, [r["loss"] for r in trained], lw=0.8, label=f"training{kinds[0]}")
    if validated:
        axes[0, 0].plot(
            [r["step"] for r in validated],
            [r["validation_loss"] for r in validated],
            "o-",
            ms=3,
            label=f"fixed noise, averaged weights{kinds[1]}",
        )
    # losses that are known but for a constant may be negative
    scale = "log" if min(r["loss"] for r in trained) > 0 else "linear"
    axes[0, 0].set(xlabel="step", yscale=scale, title="loss")
    _legend(axes[0, 0])
    if not by_level:
        return _png(drawn)
    # a part of the noise levels without a sample is None, and NaN here
    loss, zero = (np.array([r[key] for r in trained], dtype=float) for key in ("loss_bins", "zero_bins"))
    beside = bool((zero != 0).all())
    for ratio, level in zip((loss / zero if beside else loss).T, trained[-1]["sigma_bins"], strict=True):
        if level is not None:
            axes[0, 1].plot(steps, ratio, lw=0.8, label=f"sigma about {level:.3g}")
    axes[0, 1].axhline(1.0 if beside else 0.0, color="k", ls=":", lw=0.8)
    title = (
        "loss / loss of the zero predictor, by noise level" if beside else "loss by noise level (0: the zero predictor)"
    )
    axes[0, 1].set(xlabel="step", yscale="log" if beside else "linear", title=title)
    _legend(axes[0, 1])
    return _png(drawn)


def _health(trained: list[Row]) -> bytes:
    drawn, axes = figure(3, size=3.6)
    steps = [r["step"] for r in trained]
    axes[0, 0].plot(steps, [r["gradient_norm"] for r in trained], lw=0.8)
    axes[0, 0].set(xlabel="step", title="norm of the gradient", yscale="log")
    axes[0, 1].plot(steps, [r["lr"] for r in trained], lw=0.8)
    axes[0, 1].set(xlabel="step", title="learning rate")
    axes[0, 2].plot(steps, [r["images_per_second"] for r in trained], lw=0.8)
    axes[0, 2].set(xlabel="step", title="samples a second", ylim=(0, None))
    for ax in axes.flat:
        ax.title.set_fontsize(9)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return _png(drawn)


def _moments(drew: list[Row], count: int) -> bytes:
    """Of at most 8 channels; bands are two standard errors of ``count`` independent samples of the data."""
    drawn, axes = figure(2, size=4)
    steps = [r["step"] for r in drew]
    for ax, key, title, share in ((axes[0, 0], "mean", "mean", 1.0), (axes[0, 1], "std", "standard deviation", 0.5)):
        for i, wanted in enumerate(drew[-1][f"data_{key}"][:8]):
            (line,) = ax.plot(steps, [r[f"sample_{key}"][i] for r in drew], "o-", ms=3, label=f"channel {i}")
            error = 2 * drew[-1]["data_std"][i] * (share / max(count, 1)) ** 0.5
            ax.axhspan(wanted - error, wanted + error, color=line.get_color(), alpha=0.15, lw=0)
            ax.axhline(wanted, color=line.get_color(), ls=":", lw=0.8)
        ax.set(xlabel="step", title=f"{title} of samples")
        ax.title.set_fontsize(9)
        _legend(ax)
    return _png(drawn)


def _measured(key: str, measured: list[Row], saved: list[int]) -> bytes:
    """A number with 95 % intervals over the steps, its least marked, and the steps of the checkpoints on disk."""
    drawn, ((ax,),) = figure(1, size=5)
    drawn.set_size_inches(7.2, 4.5)
    steps, values = [r["step"] for r in measured], [r[key] for r in measured]
    reach = [_NORMAL * r[f"{key}_stderr"] for r in measured]
    ax.errorbar(steps, values, reach, fmt="o-", ms=3, lw=1, capsize=2, label="averaged weights, 95 % intervals")
    best = min(measured, key=lambda r: r[key])
    ax.plot(best["step"], best[key], "*", ms=14, mfc="none", mec="k", label=f"least, at step {best['step']:,}")
    ax.plot(
        saved, [0.02] * len(saved), "^", color="0.4", transform=ax.get_xaxis_transform(), label="checkpoints on disk"
    )
    scaled_for(ax, [(v - e, v + e) for v, e in zip(values, reach, strict=True)])
    ax.set(xlabel="step", ylabel=key.replace("_", " "), title=f"{key.replace('_', ' ')} over the steps")
    ax.legend(fontsize=8)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return _png(drawn)


def _best(key: str, measured: list[Row], saved: list[int]) -> str:
    """Where a number was least, which steps can't be told from that, and the checkpoint to take."""
    best = min(measured, key=lambda r: r[key])
    step, error = best["step"], f"{key}_stderr"
    alike = [
        f"{r['step']:,}"
        for r in measured
        if r is not best and r[key] - best[key] < _NORMAL * (r[error] ** 2 + best[error] ** 2) ** 0.5
    ]
    said = f"Least at step {step:,}: {best[key]:.4g} ± {best[error]:.2g} (standard error). "
    if alike:
        said += f"Of {len(measured)} measured steps {len(alike)} are within the error of it: {', '.join(alike[-12:])}. "
    if step in saved or not saved:
        return said + (f"Its checkpoint is on disk: --step {step}." if saved else "No checkpoint is on disk.")
    said += f"Of the checkpoints on disk the nearest is --step {min(saved, key=lambda s: abs(s - step))}"
    there = [r for r in measured if r["step"] in saved]
    if there:
        least = min(there, key=lambda r: r[key])
        said += f", the least --step {least['step']}: {least[key]:.4g} ± {least[error]:.2g}"
    return f"{said}."


def report_run(workdir: Path) -> Path:
    """Write ``report.html`` into a run's directory, complete in itself; ValueError if it holds no metrics."""
    rows = _rows(workdir)
    try:
        return _write(workdir, rows)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{workdir / 'metrics.jsonl'} holds rows that no run writes ({error!r}); remove them, or the file"
        ) from error


def _write(workdir: Path, rows: list[Row]) -> Path:
    trained, validated, drew = ([r for r in rows if key in r] for key in ("loss", "validation_loss", "sample_mean"))
    if not trained:
        raise ValueError(f"{workdir} has no measured step yet; expected training.log_every steps at least")
    last, config = trained[-1], recorded_config(workdir) or {}
    stable = bool(config.get("training", {}).get("objective", {}).get("reference", 0))
    summary: Row = {"step": last["step"], "loss": last["loss"], "samples a second": last["images_per_second"]}
    summary |= {"share of the time waiting for data": last["data_share"]}
    summary |= {f"initial weights left in {k}": v for k, v in last["initial_share"].items()}
    if validated:
        summary["loss at fixed noise"] = validated[-1]["validation_loss"]
    levels = {
        f"sigma about {s:.3g}": {"loss": a, "zero predictor": b} | ({"ratio": a / b} if b else {})
        for s, a, b in zip(last["sigma_bins"], last["loss_bins"], last["zero_bins"], strict=True)
        if s is not None
    }
    sections: list[Section] = [
        (
            "Loss",
            "Each noise level beside the predictor that always says 0." if levels else "",
            [_losses(trained, validated, stable)],
            levels or None,
        ),
        ("Health", "", [_health(trained)], summary),
    ]
    if drew:
        count = int(config.get("sampling", {}).get("samples", 64))
        text = (
            f"Dotted are the data's, shaded two standard errors of {count} samples. A channel whose mean or deviation "
            "stays away points at wrong scaling or clipping."
        )
        sections.append(("Samples beside the data", text, [_moments(drew, count)], None))
    saved = [int(p.name[5:]) for p in checkpoint.places(workdir / "checkpoints")]
    # whatever is measured with its standard error
    for key in dict.fromkeys(k for r in rows for k in r if f"{k}_stderr" in r):
        measured = [r for r in rows if key in r]
        numbers = {f"{r['step']:,}": {"value": r[key], "standard error": r[f"{key}_stderr"]} for r in measured}
        said = _best(key, measured, saved)
        sections.append((key.replace("_", " "), said, [_measured(key, measured, saved)], numbers))
    coded = {f"{r['step']:,}": {k: r[k] for k in _CODED} for r in rows if _CODED[0] in r}
    for name, title, text in (
        ("step", "Samples over time", "The same noise at every step, from the averaged weights."),
        (_CODED[0], "Reconstructions over time", "Each beside the image that it is of, from the averaged weights."),
    ):
        pictures: list[Path | bytes] = list(sorted((workdir / "samples").glob(f"{name}_*.png"))[-24:])
        if pictures:
            sections.append((title, text, pictures, coded or None))
    sections.append(("Settings", "", [], config))
    return write_page(workdir / "report.html", f"Run {workdir.name}, step {last['step']:,}", sections)
