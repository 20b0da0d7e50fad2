"""Parts that are chosen by name, such as networks and samplers, with settings that stand beside their code.

A part is made by a class or a function, and its settings are the parameters of that: of plain types, each with a
default or given by what surrounds the part. A part of one's own is named by its import path, "package.module:Class". So
a part is added by one file and one line in its room's table.
"""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from scorelab.checks import nearest_name

__all__ = ["Kind", "Setting", "fits", "in_words"]


@dataclass(frozen=True)
class Setting:
    """A parameter that can be set: its default (None also where it has none) and its type."""

    default: Any
    hint: Any
    needed: bool
    """Whether what surrounds the part must give it where it is None."""


@dataclass(frozen=True)
class Kind:
    """Parts that can stand in each other's place: makers by their names, and the class that an imported one must have.

    ``inner``: parameters that are parts themselves, and of which kind; ``given``: parameters that are no settings, for
    what surrounds the part knows them.
    """

    name: str
    table: Mapping[str, Callable[..., Any]]
    base: type | None = None
    inner: Mapping[str, Kind] = field(default_factory=dict)
    given: tuple[str, ...] = ()

    def maker(self, name: object, where: str) -> Callable[..., Any]:
        """What makes the part of this name; ValueError with the nearest for one that is not known."""
        if isinstance(name, str) and name in self.table:
            return self.table[name]
        if name is None:
            raise ValueError(f"{where}.name is not set; expected one of {', '.join(self.table)}")
        if not isinstance(name, str) or ":" not in name:
            raise ValueError(
                f"{where}.name is {name!r}; {nearest_name(str(name), self.table)} One of your own is named "
                "package.module:Class"
            )
        module, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{where}.name is {name!r}: {error}; expected an importable package.module:Class: start from the "
                "folder that holds it, or set PYTHONPATH"
            ) from error
        if not callable(found) or (
            self.base is not None and not (isinstance(found, type) and issubclass(found, self.base))
        ):
            wanted = "a function" if self.base is None else f"a subclass of {self.base.__module__}.{self.base.__name__}"
            raise ValueError(f"{where}.name is {name!r}, which is {found!r}; expected {wanted}")
        return found  # type: ignore[no-any-return]

    def settings(self, maker: Callable[..., Any]) -> dict[str, Setting]:
        """The parameters of plain types."""
        hints = _hints(maker)
        return {
            name: Setting(None if p.default is p.empty else p.default, hints[name], p.default is p.empty)
            for name, p in inspect.signature(maker).parameters.items()
            if name in hints and name not in (*self.inner, *self.given) and _is_plain(hints[name])
        }

    def inner_parts(self, maker: Callable[..., Any]) -> dict[str, tuple[Kind, bool]]:
        """The parameters that are parts, their kind, and whether they may be left out."""
        known = inspect.signature(maker).parameters
        inner = {name: kind for name, kind in self.inner.items() if name in known}
        return {name: (kind, known[name].default is not inspect.Parameter.empty) for name, kind in inner.items()}

    def resolve(
        self,
        given: Mapping[str, Any],
        where: str,
        defaults: Mapping[str, Any] | None = None,
        beside: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """``given`` (name and keys) with all keys of the part; ``defaults``: of those that have none.

        ``beside``: keys that are there and none of the part's. Raises ValueError for a key that the part lacks and for
        a value of another type.
        """
        maker = self.maker(given.get("name"), where)
        known, parts, defaults = self.settings(maker), self.inner_parts(maker), defaults or {}
        for key in given:
            if key not in known and key not in parts and key != "name" and key not in beside:
                owners = [n for n, other in self.table.items() if n != "auto" and key in self.settings(other)]
                raise ValueError(
                    f"{where}.{key} is no setting of {where}.name={given['name']!r}"
                    + (f" (only of {', '.join(map(repr, owners))})" if owners else "")
                    + f"; {nearest_name(key, (*known, *parts, *beside)) if known or parts or beside else 'it has none'}"
                )
        found = {"name": given["name"]}
        for key, setting in known.items():
            value = given.get(key, defaults.get(key) if setting.needed else setting.default)
            if value != setting.default and not fits(value, setting.hint):
                raise ValueError(f"{where}.{key} is {value!r}; expected {in_words(setting.hint)}")
            found[key] = tuple(value) if isinstance(value, list) else value
        for key, (kind, optional) in parts.items():
            inside = dict(given.get(key) or {})
            if inside or not optional:
                found[key] = kind.resolve(inside, f"{where}.{key}")
            else:
                found[key] = {}
        return found

    def make(self, resolved: Mapping[str, Any], where: str, context: Mapping[str, Any]) -> Any:
        """The part; what its settings leave open, None among them, comes from ``context`` by the parameters' names."""
        maker = self.maker(resolved["name"], where)
        known, parts = self.settings(maker), self.inner_parts(maker)
        arguments: dict[str, Any] = {}
        for name, parameter in inspect.signature(maker).parameters.items():
            value = resolved.get(name) if name in known else None
            if name in parts:
                if resolved.get(name):
                    arguments[name] = parts[name][0].make(resolved[name], f"{where}.{name}", context)
            elif value is not None:
                arguments[name] = tuple(value) if isinstance(value, list) else value
            elif name in context and (parameter.default is parameter.empty or _suits(context[name], maker, name)):
                arguments[name] = context[name]
            elif parameter.default is parameter.empty and parameter.kind not in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            ):
                raise ValueError(
                    f"{where}: {resolved['name']!r} needs {name}, which a config can't give; expected parameters whose "
                    f"types are written and plain, or of {', '.join(sorted(context)) or 'nothing else'}"
                    if name not in known
                    else f"{where}.{name} is not set; expected {in_words(known[name].hint)}"
                )
        return maker(**arguments)


def _hints(maker: Callable[..., Any]) -> dict[str, Any]:
    """The types of parameters, of those that say none the defaults' if they are plain."""
    try:
        found = typing.get_type_hints(maker.__init__ if isinstance(maker, type) else maker)  # type: ignore[misc]
    except NameError as error:
        raise ValueError(
            f"the types of {getattr(maker, '__qualname__', maker)}'s parameters can't be read ({error}); expected ones "
            "that are imported when it runs, not under TYPE_CHECKING alone"
        ) from error
    for name, parameter in inspect.signature(maker).parameters.items():
        kind = type(parameter.default)
        if name not in found and parameter.default is not None and _is_plain(kind):
            found[name] = kind
    return found


def _suits(value: Any, maker: Callable[..., Any], name: str) -> bool:
    """Whether a value is of the type that a parameter has."""
    for option in _options(_hints(maker).get(name, object)):
        if option is Any or fits(value, option):
            return True
        kind = typing.get_origin(option) or option
        if callable(value) if kind is Callable else isinstance(kind, type) and isinstance(value, kind):
            return True
    return False


def _options(hint: Any) -> tuple[Any, ...]:
    """The types of a union, else the type alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _is_plain(hint: Any) -> bool:
    options = _options(hint)
    if len(options) > 1:
        # float | Tensor, as of torch's optimisers, can be set to a float
        return any(_is_plain(option) for option in options if option is not type(None))
    if typing.get_origin(hint) is tuple:
        return all(a is ... or _is_plain(a) for a in typing.get_args(hint))
    return hint in (bool, int, float, str, type(None))


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a plain type; whole numbers are floats, too, and lists tuples."""
    for option in _options(hint):
        if typing.get_origin(option) is tuple:
            inside = typing.get_args(option)
            if isinstance(value, (tuple, list)):
                of = inside[:1] * len(value) if inside[-1:] == (...,) else inside
                if len(of) == len(value) and all(map(fits, value, of)):
                    return True
        elif option is float:
            if (
                isinstance(value, (int, float))
                and not isinstance(value, bool)
                and abs(value) != float("inf")
                and value == value
            ):
                return True
        elif type(value) is option:
            return True
    return False


def in_words(hint: Any) -> str:
    """A plain type for a message."""
    words = {bool: "True or False", int: "a whole number", float: "a finite number", str: "a text", type(None): "None"}
    plain = [option for option in _options(hint) if _is_plain(option)]
    return " or ".join(words.get(option, "a tuple such as (1, 2)") for option in plain)


def walk(parts: Mapping[str, Kind]) -> Iterator[tuple[str, Kind]]:
    """The paths of parts, those that hold others first."""
    yield from sorted(parts.items(), key=lambda item: item[0].count("."))
