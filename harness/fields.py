"""Declarative settings: frozen dataclasses whose fields carry their comment and limits, and a strict parser for them.

A settings class is a frozen dataclass whose fields are made with `setting(doc, ...)`. `parse` turns a plain mapping
into an instance and raises `ConfigError` with one line that names the key, the value and a valid choice. No torch, no
Hydra.
"""

import dataclasses
import difflib
import operator
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

Settings = TypeVar("Settings")
WORDS: Mapping[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
PLURALS: Mapping[type, str] = {int: "whole numbers", float: "numbers", str: "texts"}
_LIMITS: Mapping[str, Callable[[Any, Any], bool]] = {
    "minimum": operator.ge,
    "maximum": operator.le,
    "above": operator.gt,
    "below": operator.lt,
}


class ConfigError(ValueError):
    """A bad setting. Its text is one line naming the key, the value and a valid choice."""


def setting(
    doc: str,
    *,
    choices: tuple[Any, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    default: Any = dataclasses.MISSING,
) -> Any:
    """A dataclass field with its one-line comment `doc` and, where given, its valid values or its limits.

    `minimum` and `maximum` are valid values themselves, `above` and `below` are not. In a list they hold for each item.
    """
    limits = {"minimum": minimum, "maximum": maximum, "above": above, "below": below}
    metadata = {"doc": doc, "choices": choices, **limits}
    return dataclasses.field(default=default, metadata=metadata)


def is_settings(hint: Any) -> bool:
    """Whether a type hint is a nested settings class."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def fields_of(cls: type[Any]) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """(name, type hint, metadata) of every field of a settings class."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        yield item.name, hints[item.name], item.metadata


def parse(cls: type[Settings], raw: Any, path: str) -> Settings:
    """An instance of `cls` from the mapping `raw`, which must hold exactly its keys; `path` prefixes them in messages.

    A value that already is an instance of a nested settings class is taken as it is. Raises ConfigError.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{_assigned(path, raw)}: must be a group of keys: {_listed(_names(cls))}")
    names = _names(cls)
    for key in raw:
        if key not in names:
            raise ConfigError(unknown_key(join(path, str(key)), [join(path, name) for name in names]))
    values = {}
    for name, hint, metadata in fields_of(cls):
        key = join(path, name)
        if name not in raw:
            raise ConfigError(f"{key} is missing: {metadata['doc']}")
        value = raw[name]
        if is_settings(hint):
            values[name] = value if isinstance(value, hint) else parse(hint, value, key)
        else:
            values[name] = _value(hint, metadata, value, key)
    return cls(**values)


def unknown_key(key: str, valid: Iterable[str]) -> str:
    """One line about a key that does not exist, with the nearest valid key; the group that all share does not count."""
    known = list(valid)
    group = key.rpartition(".")[0] + "."
    shared = len(group) if all(name.startswith(group) for name in known) else 0
    near = difflib.get_close_matches(key[shared:], [name[shared:] for name in known], n=1, cutoff=0.6)
    hint = f"did you mean {key[:shared]}{near[0]}?" if near else f"valid keys are {_listed(known)}"
    return f"{key} is not a key: {hint}"


def join(path: str, name: str) -> str:
    """The dotted key of `name` under `path`."""
    return f"{path}.{name}" if path else name


def to_plain(value: Any) -> Any:
    """Plain dicts, lists and scalars from a settings instance."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def show(value: Any) -> str:
    """A value as it is typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ",".join(show(item) for item in value) + "]"
    return str(value).replace("\n", "\\n")


def _value(hint: Any, metadata: Mapping[str, Any], value: Any, key: str) -> Any:
    """`value` checked against its type and limits; lists become tuples, integers become floats where a float is due."""
    optional, kind = _unwrap(hint)
    if value is None:
        if optional:
            return None
        raise ConfigError(f"{key}=null: must be {_expected(kind, metadata)}")
    if typing.get_origin(kind) is tuple:
        items = tuple(value) if isinstance(value, list | tuple) else (value,)
        wrong = f"{_assigned(key, value)}: must be {_expected(kind, metadata)}"
        element = typing.get_args(kind)[0]
        return tuple(_scalar(element, metadata, item, key, wrong) for item in items)
    return _scalar(kind, metadata, value, key, f"{_assigned(key, value)}: must be {_expected(kind, metadata)}")


def _scalar(kind: Any, metadata: Mapping[str, Any], value: Any, key: str, wrong: str) -> Any:
    """One value of type `kind`; `wrong` is the message where it is none."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        scalar = kind is str and not isinstance(value, Mapping | list)
        raise ConfigError(wrong + (f"; quote what looks like another type: '\"{show(value)}\"'" if scalar else ""))
    if metadata["choices"] and value not in metadata["choices"]:
        raise ConfigError(wrong)
    if kind is str and not value:
        raise ConfigError(f"{key}='': must not be empty")
    if not all(holds(value, metadata[limit]) for limit, holds in _LIMITS.items() if metadata[limit] is not None):
        raise ConfigError(wrong)
    return value


def _unwrap(hint: Any) -> tuple[bool, Any]:
    """(may be null, the type without None) of a hint."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return True, next(arm for arm in typing.get_args(hint) if arm is not type(None))
    return False, hint


def _expected(kind: Any, metadata: Mapping[str, Any]) -> str:
    """What a field takes, in words."""
    plural = typing.get_origin(kind) is tuple
    if metadata["choices"]:
        return ("a list of " if plural else "one of ") + _listed(show(choice) for choice in metadata["choices"])
    words = f"a list of {PLURALS[typing.get_args(kind)[0]]}" if plural else WORDS[kind]
    low, high = metadata["minimum"], metadata["maximum"]
    if low is not None and high is not None:
        return f"{words} from {low} to {high}"
    named = {"minimum": "of at least", "above": "above", "maximum": "of at most", "below": "below"}
    limits = [f"{prefix} {metadata[limit]}" for limit, prefix in named.items() if metadata[limit] is not None]
    return " ".join([words, " and ".join(limits)]) if limits else words


def _assigned(key: str, value: Any) -> str:
    return f"{key}={show(value)}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _names(cls: type[Any]) -> list[str]:
    return [item.name for item in dataclasses.fields(cls)]
