"""The config file of an experiment, and what the command line changes of it."""

from __future__ import annotations

import ast
import re
import runpy
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from scorelab.checks import nearest_name

__all__ = ["check_keys", "config_file", "literal", "parse", "parted", "sampling_changed", "settings_of", "with_parts"]


_MEANT = {
    "steps": ("nfe",),  # a sampler may take several evaluations a step
    "class": ("condition",),
    "label": ("condition",),
    "number": ("n",),
    "num": ("n",),
    "samples": ("n",),
    "data": ("path",),
    "output": ("out",),
}
"""Options by other names that people try."""
_KEYS = {"learning_rate": "optim.lr", "ema": "optim.ema", "epochs": "training.steps", "batch": "training.batch_size"}
"""Settings likewise."""


def config_file(arguments: list[str]) -> tuple[ConfigDict, list[str]]:
    """The experiment of the file that --config names, as it stands there, and the other arguments."""
    name, rest, given = "", [], iter(arguments)
    for argument in given:
        if argument == "--config":
            name = next(given, "")
        elif argument.startswith("--config="):
            name = argument.split("=", 1)[1]
        else:
            rest.append(argument)
    if not name:
        raise ValueError(
            "--config is missing; expected a config file, e.g. --config configs/digits/ncsn.py; scorelab new writes "
            "one for data of your own"
        )
    path, wanted = Path(name).expanduser(), []
    if not path.is_file() and ":" in name:
        # file.py:word hands the word to get_config
        path, wanted = Path(name.rpartition(":")[0]).expanduser(), [name.rpartition(":")[2]]
    if not path.is_file():
        raise ValueError(f"--config: there is no file {path}; expected a Python file, e.g. configs/digits/ncsn.py")
    # modules beside it can be imported
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        config = runpy.run_path(str(path)).get("get_config")
        config = config(*wanted) if callable(config) else config
    except SyntaxError as error:
        raise ValueError(f"--config: {path} is no Python file ({error})") from error
    except (Exception, SystemExit) as error:
        line = next(
            (f.lineno for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename == str(path)), 0
        )
        said = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        where = f"{path}, line {line}" if line else path
        raise ValueError(f"--config: {where}: {_refused(said) or f'{type(error).__name__}: {said}'}") from error
    if not isinstance(config, ConfigDict):
        got = "has no get_config() or it returns None" if config is None else f"gives {type(config).__name__}"
        raise ValueError(
            f"--config: {path} {got}; expected a function get_config() that returns "
            "scorelab.training.default_config() with the experiment's own values"
        )
    return config, rest


def _refused(said: str) -> str:
    """What ml_collections refuses, in our words; nothing for other errors."""
    from scorelab.training.settings import PARTS, default_config

    wrong = re.match(r"Could not override field '(\w+)' \(reference\)\. (.*) is of original type <class '(\w+)", said)
    if wrong:
        key, value, got = wrong.groups()
        kind = said.rpartition("<class '")[2].rpartition("'>")[0].rpartition(".")[2]
        if kind == "ConfigDict":
            return f"{key} is {value}; a part is chosen by its name, as in c.model.net.name = 'unet'"
        wanted = {"int": "a whole number", "float": "a number", "bool": "True or False", "str": "a text"}.get(
            kind, kind
        )
        if kind == "tuple":
            wanted = f"a tuple: ({value}, {value})" if key == "size" else f"a tuple: ({value},)"
        return f"{key} is {value} ({got}); expected {wanted}"
    missing = re.search(r'Key "(\w+)" does not exist', said)
    if not missing:
        return ""
    key = missing[1]
    owners = [path for path, kind in PARTS.items() if any(key in kind.settings(made) for made in kind.table.values())]
    if owners:
        return f"there is no setting {key!r}; a part has that key: {', '.join(f'c.{path}.{key}' for path in owners)}"
    known = list(settings_of(default_config()))
    alike = [_KEYS[key]] if key in _KEYS else _keys_ending(key, known)
    # the group's own, as ml_collections lists them, before all others
    near = re.search(r'Did you mean "(\w+)"', said)
    return f"there is no setting {key!r}; " + (
        f"did you mean c.{alike[0]}?" if alike else f"did you mean {near[1]!r}?" if near else nearest_name(key, known)
    )


def with_parts(config: ConfigDict, arguments: list[str]) -> tuple[ConfigDict, list[str]]:
    """The config with the parts that arguments name, ``--config.process.name=vp``, and all settings of each; and the
    other arguments. A part that is named takes its own defaults, not those of the one before.
    """
    from scorelab.training import resolve
    from scorelab.training.settings import PARTS, beside, check_types

    named, rest = {}, []
    for argument in arguments:
        key, _, value = argument.removeprefix("--config.").partition("=")
        path, _, last = key.rpartition(".")
        inside = [p for p in PARTS if path == p or path.startswith(f"{p}.")]
        if argument.startswith("--config.") and inside and last == "name":
            named[path] = value
        else:
            rest.append(argument)
    check_types(config)
    for path in sorted(named, key=lambda p: p.count(".")):
        place = config
        for key in path.split("."):
            if key not in place:
                place[key] = ConfigDict()
            place = place[key]
        if place.get("name") != named[path]:
            for key in [k for k in place if path not in PARTS or k not in beside(path)]:
                del place[key]
            place.name = named[path]
    return resolve(config), rest


def check_keys(config: ConfigDict, arguments: list[str]) -> None:
    """Refuse an override of an unknown key with the nearest full name (ml_collections names only parts of it)."""
    known = settings_of(config)
    for argument in arguments:
        if argument.startswith("--config."):
            name = argument[len("--config.") :].split("=")[0]
            if name not in known:
                group, _, last = name.rpartition(".")
                beside = [k.removeprefix(f"{group}.") for k in known if k.startswith(f"{group}.")]
                alike = [_KEYS[last]] if last in _KEYS else _keys_ending(name, known)
                near = nearest_name(last, beside) if group.count(".") and beside else nearest_name(name, known)
                near = f"did you mean {alike[0]!r}?" if alike else near
                raise ValueError(f"unknown config key {name!r}; {near}")
            if isinstance(known[name], tuple) and "=" in argument and not argument.endswith("=None"):
                _check_tuple(name, argument.split("=", 1)[1])


def literal(text: str) -> Any:
    """What a text says, itself if it is no number, tuple or None."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _check_tuple(name: str, text: str) -> None:
    if not isinstance(literal(text), (tuple, int, float)):
        raise ValueError(f"--config.{name} is {text!r}; expected a tuple such as '(1, 2)'")


def _keys_ending(name: str, known: Iterable[str]) -> list[str]:
    """The full names of settings whose last part is ``name``, the shortest first."""
    return sorted((k for k in known if k.rpartition(".")[2] == name), key=lambda k: k.count("."))


def settings_of(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """All settings by their full names."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        values |= settings_of(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {f"{prefix}{key}": value}
    return values


def sampling_changed(config: ConfigDict, arguments: list[str]) -> ConfigDict:
    """The config of a run with other settings of sampling."""
    from scorelab.training.settings import check_types, resolve

    for argument in arguments:
        if not argument.startswith("--config.sampling.") or "=" not in argument:
            raise ValueError(
                f"{argument!r} can't be changed after training; expected --config.sampling.KEY=VALUE, such as "
                "--config.sampling.sampler.name=heun"
            )
    config, rest = with_parts(config, arguments)
    check_keys(config, rest)
    with config.ignore_type():
        for key, _, text in (a.removeprefix("--config.").partition("=") for a in rest):
            config.update_from_flattened_dict({key: literal(text)})
    return resolve(check_types(config))


def parted(arguments: list[str], switches: tuple[str, ...] = ()) -> tuple[list[str], dict[str, str]]:
    """What of a command's arguments (its name first) is neither an option nor its value, and the options, "" for those
    without a value. An option and its value may stand apart, but for ``switches``, which say true by being there."""
    named, options, left = [], dict[str, str](), arguments[1:]
    while left:
        word, *left = left
        if not word.startswith("--"):
            named.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        if not equals and name not in switches and left and not left[0].startswith("--"):
            value, *left = left
        options[name] = value
    return named, options


def parse(arguments: list[str], values: flags.FlagValues) -> None:
    """Read the flags of a command (its name first) into ``values``; ValueError for what is none, naming the nearest."""
    try:
        rest = values(["scorelab", *arguments[1:]])[1:]
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        config = values["config"].value if "config" in values else None
        settings = [f"config.{k}" for k in _keys_ending(name, settings_of(config) if config else {})]
        alike = [other for other in _MEANT.get(name, ()) if other in values]
        if config and name in settings_of(config):
            alike.append(f"config.{name}")
        alike += settings
        near = f"did you mean --{alike[0]}?" if alike else nearest_name(name, list(values))
        raise ValueError(f"unknown option --{name}; {near}") from error
    except flags.IllegalFlagValueError as error:
        # "flag --n=x: invalid literal for int() ..."
        given = str(error).partition(": ")[0].removeprefix("flag ")
        wanted = values[given[2:].partition("=")[0]].parser.syntactic_help
        wanted = {"an integer": "a whole number, in digits", "a number": "a number"}.get(wanted, wanted)
        raise ValueError(f"{given}: expected {wanted or 'True or False'}") from error
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}; options are written --name=value")
