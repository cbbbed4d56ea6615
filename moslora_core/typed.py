"""Dataclasses out of JSON and YAML: every value is checked against the annotation of its field where it is read.

Annotations are dataclasses, ``str``, ``int``, ``float``, ``bool``, ``Any``, ``X | None``, ``dict[str, X]``,
``list[X]``, ``tuple[X, ...]`` and ``Annotated[X, low]`` or ``Annotated[X, low, high]`` for numbers within bounds. A
file of others is JSON as Python reads it: it may hold NaN, infinities and integers of any size, which are refused.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import UserError

Count = Annotated[int, 0]
Share = Annotated[float, 0, 1]
Seconds = Annotated[float, 0]

T = TypeVar("T")
_WORDS = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false"} | {
    list: "a list",
    dict: "an object",
}
_LARGEST = 2**63  # whole numbers beyond it overflow in whatever they reach
_DEEPEST = 100  # levels inside a value of any kind: enough for every file, and far from Python's limit

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def shown(value: Any) -> str:
    """A value as errors show it: a line of bounded length, however large or nested it is."""
    return _short.repr(value)


def build(kind: type[T], value: Any, where: str, key: str = "") -> T:
    """``value``, as JSON or YAML was read, as an instance of the dataclass (or other annotation) ``kind``.

    Args:
        where: the file, for errors.
        key: of ``value`` in it, parts joined by dots.

    Raises:
        UserError: names the first key that is missing, unknown or not of its kind.
    """
    try:
        return _build(kind, value, where, key)
    except RecursionError:
        raise UserError(f"{where}: {key or 'it'} is nested too deeply") from None


def _build(kind: Any, value: Any, where: str, key: str) -> Any:
    if kind is Any:
        _check_plain(value, where, key, _DEEPEST)
        return value
    if is_dataclass(kind):
        return _object(kind, value, where, key)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        (inner,) = (argument for argument in arguments if argument is not NoneType)
        return None if value is None else _build(inner, value, where, key)
    if origin is Annotated:
        inner, low, high = (*arguments, math.inf)[:3]
        if not low <= _build(inner, value, where, key) <= high:
            span = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
            raise _refused(f"{_WORDS[inner]} {span}", value, where, key)
        return value
    if origin is dict:
        _check(dict, value, where, key)
        return {
            _check(str, name, where, key): _build(arguments[1], value[name], where, _at(key, name)) for name in value
        }
    if origin in (list, tuple):
        _check(list, value, where, key)
        return origin(_build(arguments[0], entry, where, _at(key, at)) for at, entry in enumerate(value))
    return _check(kind, value, where, key)


def _object(kind: type, value: Any, where: str, key: str) -> Any:
    hints, known = _hints(kind), {entry.name: entry for entry in fields(kind)}
    if not isinstance(value, dict):
        raise _refused(f"an object with {', '.join(known)}", value, where, key)
    for name in value:
        if name not in known:
            place = f"{where}: {key}" if key else where
            raise UserError(f"{place}: unknown key {shown(name)}; expected {', '.join(known)}")
    for name, entry in known.items():
        if name not in value and entry.default is MISSING and entry.default_factory is MISSING:
            raise UserError(f"{where}: {_at(key, name)} is missing; expected {', '.join(known)}")
    return kind(**{name: _build(hints[name], entry, where, _at(key, name)) for name, entry in value.items()})


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _check(kind: type[T], value: Any, where: str, key: str) -> T:
    """``value`` if it is of a plain type; a whole number is a finite one too, true and false are no numbers."""
    if not (type(value) is kind or (kind is float and type(value) is int)) or not _usable(value):
        raise _refused(_WORDS[kind], value, where, key)
    return value


def _usable(value: Any) -> bool:
    return abs(value) < _LARGEST if type(value) is int else type(value) is not float or math.isfinite(value)


def _check_plain(value: Any, where: str, key: str, levels: int) -> None:
    if not levels or not _usable(value):
        raise _refused("of finite numbers and a few levels", value, where, key)
    if isinstance(value, dict | list):
        for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
            _check_plain(entry, where, _at(key, name), levels - 1)


def _refused(expected: str, value: Any, where: str, key: str) -> UserError:
    return UserError(f"{where}: {f'{key} must be' if key else 'expected'} {expected}, found {shown(value)}")


def _at(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)
