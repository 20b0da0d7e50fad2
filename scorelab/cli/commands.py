"""The commands and their flags; what takes long to import is imported once the flags are read."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any

from absl import flags
from ml_collections import config_flags

from scorelab.checks import nearest_name
from scorelab.cli.guided import GUIDED, define_guidance, guidance_of, guided_names
from scorelab.cli.overrides import (
    check_keys,
    config_file,
    literal,
    parse,
    parted,
    sampling_changed,
    settings_of,
    with_parts,
)

__all__ = ["COMMANDS"]


def _train(arguments: list[str]) -> None:
    config, rest = config_file(arguments)
    config, rest = with_parts(config, rest)
    check_keys(config, rest)
    # ml_collections takes None for the text of a number, and no number for None
    known = settings_of(config)
    apart = {a: a[len("--config.") :].partition("=") for a in rest if a.startswith("--config.") and "=" in a}
    apart = {a: p for a, p in apart.items() if p[2] == "None" or known[p[0]] is None}
    rest = [a for a in rest if a not in apart]
    values = flags.FlagValues()  # type: ignore[no-untyped-call]
    holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["scorelab", *rest[1:]])
    flags.DEFINE_string("workdir", None, "the run directory", flag_values=values)
    flags.DEFINE_integer("step", 0, "the checkpoint to go on from", flag_values=values)
    flags.DEFINE_bool("accept_changes", False, "go on with settings or data other than the run's", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "print the experiment and its cost, and train nothing", flag_values=values)
    parse(rest, values)
    config = holder.value
    with config.ignore_type():
        config.update_from_flattened_dict({key: literal(text) for key, _, text in apart.values()})
    from scorelab import parallel
    from scorelab.cli.dry_run import dry_run
    from scorelab.training import train
    from scorelab.training.checkpoint import last_step

    _keep_freed_memory()
    if values["dry_run"].value:
        for text in dry_run(config):
            print(text, flush=True)
        return
    if not values["workdir"].value:
        raise ValueError("--workdir is missing; expected a directory for the run, e.g. --workdir runs/digits")
    workdir, step = _workdir(values), int(values["step"].value or 0)
    accept, spare = bool(values["accept_changes"].value), "OMP_NUM_THREADS" not in os.environ
    train(config, workdir, accept_changes=accept, step=step or None, spare_threads=spare)
    if parallel.world()[0] == 0:
        classifier = config.training.objective.name == "cross_entropy"
        options = "--workdir RUN --guidance 2 --classifier" if classifier else "--workdir"
        print(f"trained to step {last_step(workdir)}; sample with: scorelab sample {options} {quote(str(workdir))}")


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step: giving it back and fetching it costs a step on a CPU 5 %."""
    if platform.libc_ver()[0] == "glibc":
        libc, trim, mmap = ctypes.CDLL(None), -1, -3
        libc.mallopt(mmap, 2**30)
        libc.mallopt(trim, 2**31 - 1)


def _sample(arguments: list[str]) -> None:
    given = [a for a in arguments if a.startswith("--config.")]
    arguments = [a for a in arguments if not a.startswith("--config.")]
    values = _run_flags(
        {"n": None, "nfe": None, "batch_size": None},
        {"out": None, "sampler": None, "grid": None, "weights": "ema", "precision": "fp32", "device": "", **GUIDED}
        | {"model": None},
    )
    define_guidance(values)
    flags.DEFINE_bool("compile", False, "compile the network: faster samples after a slow start", flag_values=values)
    # torchrun takes --n for one of its own options
    flags.DEFINE_alias("samples", "n", flag_values=values)
    parse(arguments, values)
    from scorelab import parallel
    from scorelab.cli.runs import place_of
    from scorelab.cli.sampling import check_out, sample_run, write_samples
    from scorelab.cli.steering import Steering

    workdir, place = place_of(values["workdir"].value, values["model"].value)
    n, seed, step = (int(values[name].value or 0) for name in ("n", "seed", "step"))
    if n < 0 or values["n"].value == 0:
        raise ValueError(f"--n is {n}; expected a positive number of samples, or none for the experiment's own")
    batch_size = values["batch_size"].value
    if batch_size is not None and int(batch_size) < 1:
        raise ValueError(f"--batch_size is {batch_size}; expected 1 or more")
    if values["grid"].value:
        given.append(f"--config.sampling.grid.name={values['grid'].value}")
    sampler, nfe = _asked_sampler(values, given)
    _check_drawn(workdir, sampler, given)
    if batch_size:
        given.append(f"--config.sampling.batch_size={batch_size}")
    out = Path(values["out"].value).expanduser() if values["out"].value else None
    if out is not None and os.environ.get("RANK", "0") == "0":
        check_out(out)
    weights = str(values["weights"].value)
    numbers: dict[str, Any] = {"precision": str(values["precision"].value), "compile": bool(values["compile"].value)}
    numbers |= {"steering": Steering(**guidance_of(values))}
    numbers |= {"device": str(values["device"].value), "nfe": nfe, "changes": lambda c: sampling_changed(c, given)}
    run = sample_run(workdir, n=n, seed=seed, step=step, weights=weights, sampler=sampler, **numbers)
    parts = [
        f"drawn_{run.step:08d}" if run.step else "drawn",
        weights if weights != "ema" else "",
        sampler.stem if sampler else str(values["sampler"].value or ""),
    ]
    parts += [f"nfe_{nfe}" if nfe else "", str(values["grid"].value or "")]
    parts += [*guided_names(values), f"seed_{seed}" if seed else ""]
    out = out or place / f"{'_'.join(filter(None, parts))}{'.png' if run.shown else '.npz'}"
    if parallel.world()[0] == 0:
        print(write_samples(run, out))


def _restore(arguments: list[str]) -> None:
    from scorelab.cli.restoring import restore

    restore(arguments)


def _check_drawn(workdir: Path, sampler: Path | None, given: list[str]) -> None:
    """Refuse (ValueError) a sampler for an autoencoder, which has none."""
    from scorelab.cli.runs import is_autoencoder

    asked = [g for g in given if g.startswith("--config.sampling.")] + [f"--sampler={sampler}"] * (sampler is not None)
    if asked and is_autoencoder(workdir):
        raise ValueError(f"got {asked[0]}, but samples of an autoencoder are decoded at once; expected no sampler")


def _edit(arguments: list[str]) -> None:
    from scorelab.cli.editing import edit

    edit(arguments)


def _asked_sampler(values: flags.FlagValues, given: list[str]) -> tuple[Path | None, int]:
    """The file of a calibrated sampler, None where --sampler names another, which goes into ``given``, and --nfe."""
    name, nfe = values["sampler"].value or "", int(values["nfe"].value or 0)
    file = Path(name).expanduser() if name.endswith(".json") or Path(name).expanduser().is_file() else None
    if (values["nfe"].value is not None and nfe < 1) or (file is not None and (nfe or given)):
        raise ValueError(f"--nfe is {nfe}, --sampler {name!r}; expected nfe > 0, and no other settings beside a file's")
    if name and file is None:
        given.append(f"--config.sampling.sampler.name={name}")
    return file, nfe


def _other_data(arguments: list[str]) -> tuple[Any, list[str]]:
    """The config whose data is meant instead of the run's, None without --config, and the other arguments."""
    asked = any(argument.partition("=")[0] == "--config" for argument in arguments)
    return config_file(arguments) if asked else (None, arguments)


def _workdir(values: flags.FlagValues) -> Path:
    if not values["workdir"].value:
        raise ValueError("--workdir is missing; expected the directory of a run, e.g. --workdir runs/digits")
    return Path(str(values["workdir"].value)).expanduser()


def _run_flags(numbers: dict[str, int | None], texts: dict[str, str | None]) -> flags.FlagValues:
    """Flags of a command on a run: --workdir, --seed, --step, and its own."""
    values = flags.FlagValues()  # type: ignore[no-untyped-call]
    for name, default in {"seed": 0, "step": 0, **numbers}.items():
        flags.DEFINE_integer(name, default, name, flag_values=values)
    for name, text in {"workdir": None, **texts}.items():
        flags.DEFINE_string(name, text, name, flag_values=values)
    return values


def _calibrate(arguments: list[str]) -> None:
    values = _run_flags({"nfe": 10, "starts": 64}, {"method": "least_squares", "out": None, **GUIDED})
    define_guidance(values)
    parse(arguments, values)
    workdir = _workdir(values)
    from scorelab.cli.analysis import calibrate_run, calibrated_file
    from scorelab.cli.steering import Steering

    nfe, starts, seed, step = (int(values[name].value or 0) for name in ("nfe", "starts", "seed", "step"))
    out = Path(values["out"].value or calibrated_file(workdir, nfe, guided_names(values))).expanduser()
    options: dict[str, Any] = {
        "nfe": nfe,
        "starts": starts,
        "seed": seed,
        "step": step,
        "method": str(values["method"].value),
    }
    print(calibrate_run(workdir, out, steering=Steering(**guidance_of(values)), **options))


def _likelihood(arguments: list[str]) -> None:
    data, arguments = _other_data(arguments)
    values = _run_flags(
        {"n": 64, "probes": 1, "levels": 0, "steps": 0},
        {"divergence": "hutchinson", "method": "ode", "out": None, "variance": ""},
    )
    flags.DEFINE_float("tolerance", 1e-3, "of the adaptive solver", flag_values=values)
    flags.DEFINE_integer("codes", 100, "of an autoencoder, drawn for each sample", flag_values=values)
    flags.DEFINE_bool("bits", False, "per dimension, of data that takes some values", flag_values=values)
    parse(arguments, values)
    workdir = _workdir(values)
    from scorelab.cli.analysis import likelihood_run

    n, probes, levels, seed, step = (int(values[k].value or 0) for k in ("n", "probes", "levels", "seed", "step"))
    if n < 1 or levels < 0:
        raise ValueError(f"--n is {n}, --levels is {levels}; expected n >= 1 and levels >= 0")
    levels = -1 if values["bits"].value and not levels else levels
    from scorelab.cli.runs import is_autoencoder

    if is_autoencoder(workdir):
        of_scores = ("probes", "divergence", "tolerance", "method", "steps", "out", "variance", "levels", "bits")
        given, codes = [f"--{k}" for k in of_scores if values[k].present], int(values["codes"].value or 0)
        if given or codes < 1:
            raise ValueError(
                f"{workdir} is an autoencoder's run, --codes is {codes}{', and got ' * bool(given)}{', '.join(given)}; "
                "expected --codes=1 or more, and none of a score's flags"
            )
        from scorelab.cli.coded import coded_run

        print(coded_run(workdir, n=n, codes=codes, seed=seed, step=step, data=data))
        return
    if values["codes"].present:
        raise ValueError("--codes is for the run of an autoencoder; expected none")
    method, steps = values["method"].value, int(values["steps"].value or 0)
    if method not in ("ode", "bound"):
        raise ValueError(f"--method is {method!r}; {nearest_name(str(method), ('ode', 'bound'))}")
    if method == "bound":
        from scorelab.cli.bound import bound_run

        if any(values[name].present for name in ("probes", "divergence", "tolerance")):
            raise ValueError(
                "--probes, --divergence and --tolerance are for --method=ode; expected none with --method=bound"
            )
        out = Path(values["out"].value or workdir / "samples" / "bound.png").expanduser()
        variance = str(values["variance"].value or "")
        asked: dict[str, Any] = {"n": n, "levels": levels, "seed": seed, "step": step, "steps": steps, "data": data}
        print(bound_run(workdir, out, variance=variance, **asked))
        return
    if steps or values["out"].value or values["variance"].value:
        raise ValueError("--steps, --variance and --out are for --method=bound; expected none with --method=ode")
    kind, tolerance = str(values["divergence"].value), float(values["tolerance"].value or 0)
    options: dict[str, Any] = {"n": n, "probes": probes, "levels": levels, "seed": seed, "step": step, "data": data}
    print(likelihood_run(workdir, divergence=kind, tolerance=tolerance, **options))


def _evaluate(arguments: list[str]) -> None:
    data, arguments = _other_data(arguments)
    given = [a for a in arguments if a.startswith("--config.")]
    texts = {"model": None, "out": None, "features": "pixels", "against": "", "sampler": None, "weights": "ema"}
    texts |= {"samples": None, "samplers": None, "nfe": None}
    values = _run_flags({"n": 10_000}, {**texts, "device": "", **GUIDED})
    define_guidance(values)
    flags.DEFINE_bool("few", False, "fewer than 2,048 samples or data", flag_values=values)
    parse([a for a in arguments if not a.startswith("--config.")], values)
    samples = str(values["samples"].value or "")
    if samples.isdecimal():
        # torchrun takes --n for one of its own options
        values["n"].value, samples = int(samples), ""
    from scorelab import parallel
    from scorelab.cli.cost import cost_of, cost_table, points
    from scorelab.cli.evaluating import JudgedRun, evaluate_samples, table
    from scorelab.cli.runs import place_of, run_config
    from scorelab.cli.steering import Steering
    from scorelab.writing import check_writable, save_json

    out = Path(values["out"].value).expanduser() if values["out"].value else None
    if out is not None:
        check_writable(out)
    options: dict[str, Any] = {k: str(values[k].value or "") for k in ("features", "against", "device")}
    options |= {"few": bool(values["few"].value)}
    if samples:
        drawing = ("model", "n", "nfe", "seed", "step", "sampler", "samplers", "weights", *guidance_of(values))
        asked = [f"--{k}" for k in drawing if values[k].present] + given
        if asked:
            raise ValueError(
                f"--samples is {samples}, samples that are there; expected no {asked[0]}, which draws some"
            )
        config = run_config(_workdir(values)) if data is None else data
        record = evaluate_samples(Path(samples).expanduser(), config, **options)
    else:
        workdir, place = place_of(values["workdir"].value, values["model"].value)
        n, several = int(values["n"].value or 0), str(values["samplers"].value or "")
        if n < 1:
            raise ValueError(f"--n is {n}; expected 1 or more")
        counts = _counts(values, several)
        file, nfe = (None, 0) if several else _asked_sampler(values, given)
        _check_drawn(workdir, file, given)
        options |= {k: int(values[k].value or 0) for k in ("seed", "step")}
        options |= {"weights": str(values["weights"].value), "nfe": nfe, "data": data}
        options |= {"steering": Steering(**guidance_of(values)), "changes": lambda c: sampling_changed(c, given)}
        run = JudgedRun(workdir, n=n, **options)
        if several:
            out = out or (workdir if values["workdir"].value else place) / "cost.json"
            check_writable(out)
            named = list(dict.fromkeys(several.split(",")))
            found = cost_of(run, points(run, named, counts, guided_names(values)), out)
            if parallel.world()[0] == 0:
                print(f"{cost_table(found)}\n{out}, {out.with_suffix('.png')}")
            return
        record = run.record(file)
    if parallel.world()[0] == 0:
        print(table(record))
        if out is not None:
            save_json(record, out)


def _counts(values: flags.FlagValues, several: str) -> list[int]:
    """The numbers of evaluations that --nfe asks for: at most one, but for --samplers at least one."""
    text = str(values["nfe"].value or "")
    counts = [int(t) for t in text.split(",") if t.isdecimal()]
    if len(counts) != len(text.split(",")) * bool(text) or min(counts, default=1) < 1:
        raise ValueError(f"--nfe is {text!r}; expected a whole number, in digits, or with --samplers some: 5,10,20")
    if several and (not counts or values["sampler"].value):
        raise ValueError("--samplers asks for several samplers; expected no --sampler, and --nfe, such as 5,10,20")
    if not several and len(counts) > 1:
        raise ValueError(f"--nfe is {text!r}; expected one number, or --samplers, such as heun,dpm2m")
    return sorted(set(counts))


def _health(arguments: list[str]) -> None:
    data, arguments = _other_data(arguments)
    given = [a for a in arguments if a.startswith("--config.")]
    numbers: dict[str, int | None] = {"n": 1000, "levels": 8, "points": 512, "nfe": None}
    values = _run_flags(numbers, {"model": None, "out": None, "sampler": None, "weights": "ema", "device": ""})
    parse([a for a in arguments if not a.startswith("--config.")], values)
    from scorelab import parallel
    from scorelab.cli.health import health_run, health_table
    from scorelab.cli.runs import place_of
    from scorelab.writing import check_writable, save_json

    workdir, _ = place_of(values["workdir"].value, values["model"].value)
    n, count, points = (int(values[k].value or 0) for k in ("n", "levels", "points"))
    if n < 0 or count < 2 or points < 8:
        raise ValueError(f"--n is {n}, --levels {count}, --points {points}; expected 0 or more, 2 and 8 or more")
    file, nfe = _asked_sampler(values, given)
    if file is not None:
        raise ValueError("--sampler is a file; expected the name of a sampler: a calibrated one is for few steps")
    out = Path(values["out"].value).expanduser() if values["out"].value else None
    if out is not None:
        check_writable(out)
    options: dict[str, Any] = {k: str(values[k].value or "") for k in ("weights", "device")}
    options |= {k: int(values[k].value or 0) for k in ("seed", "step")}
    options |= {"count": count, "points": points, "nfe": nfe, "data": data}
    _, record = health_run(workdir, n=n, changes=lambda c: sampling_changed(c, given), **options)
    if parallel.world()[0] == 0:
        print(health_table(record))
        if out is not None:
            save_json(record, out)


def _settings(arguments: list[str]) -> None:
    parse(arguments, flags.FlagValues())  # type: ignore[no-untyped-call]
    from scorelab.cli.reference import reference

    print(reference(), end="")


def _convert(arguments: list[str]) -> None:
    from scorelab.cli.convert import convert, switches

    named, given = parted(arguments, switches(parted(arguments)[1].get("release", "")))
    release, out = given.pop("release", ""), given.pop("out", "")
    if len(named) != 1 or not release or not out:
        raise ValueError("expected scorelab convert FILE --release=NAME --out=DIRECTORY, and the release's own options")
    options = {
        key: literal(text.title() if text.lower() in ("true", "false") else text or "True")
        for key, text in given.items()
    }
    print(convert(Path(named[0]).expanduser(), release, Path(out).expanduser(), options))


def _export(arguments: list[str]) -> None:
    values = flags.FlagValues()  # type: ignore[no-untyped-call]
    flags.DEFINE_integer("step", 0, "the checkpoint, by default the last", flag_values=values)
    flags.DEFINE_string("weights", "ema", "averaged ones, or model", flag_values=values)
    named = parted(arguments)[0][:2]
    parse([a for a in arguments if a not in named], values)
    if len(named) < 2:
        raise ValueError("expected scorelab export RUN_OR_SAVED_MODEL FILE.onnx: a directory, and a file to write")
    from scorelab.cli.exporting import export_run

    workdir, out = (Path(name).expanduser() for name in named)
    print(export_run(workdir, out, step=int(values["step"].value or 0), weights=str(values["weights"].value)))


def _new(arguments: list[str]) -> None:
    values = flags.FlagValues()  # type: ignore[no-untyped-call]
    flags.DEFINE_string("path", None, "the data", flag_values=values)
    flags.DEFINE_string("size", "", "height,width", flag_values=values)
    flags.DEFINE_string("layout", "", "of an array's images, as data.layout", flag_values=values)
    named = parted(arguments)[0][:2]
    parse([a for a in arguments if a not in named], values)
    if len(named) < 2 or not values["path"].value:
        raise ValueError(
            "expected scorelab new images|points runs/my.py --path=DATA: a kind, a file to write, and data"
        )
    from scorelab.cli.new import new_config

    try:
        size = tuple(int(s) for s in str(values["size"].value or "").split(",") if s)
    except ValueError as error:
        raise ValueError(f"--size is {values['size'].value}; expected height,width, such as 32,32") from error
    print(
        new_config(
            named[0], Path(named[1]).expanduser(), Path(str(values["path"].value)), size, str(values["layout"].value)
        )
    )


def _density(arguments: list[str]) -> None:
    values = _run_flags({"n": 200}, {"out": None})
    parse(arguments, values)
    workdir = _workdir(values)
    from scorelab.cli.density import density_run

    n, seed, step = (int(values[name].value or 0) for name in ("n", "seed", "step"))
    out = Path(values["out"].value or workdir / "density.png").expanduser()
    if out.suffix != ".png":
        raise ValueError(f"--out is {out}; expected a name that ends in .png")
    print(density_run(workdir, out, n=n, step=step, seed=seed))


def _report(arguments: list[str]) -> None:
    values = flags.FlagValues()  # type: ignore[no-untyped-call]
    flags.DEFINE_string("workdir", None, "the run directory", flag_values=values)
    parse(arguments, values)
    workdir = _workdir(values)
    from scorelab.cli.report import report_run

    print(report_run(workdir))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "sample": _sample,
    "restore": _restore,
    "edit": _edit,
    "calibrate": _calibrate,
    "likelihood": _likelihood,
    "evaluate": _evaluate,
    "health": _health,
    "report": _report,
    "density": _density,
    "new": _new,
    "settings": _settings,
    "convert": _convert,
    "export": _export,
}
"""By name; each takes its arguments, its own name first, and raises what the user is to be told."""
