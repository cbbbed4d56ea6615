"""Dataclasses out of JSON and YAML: every value is checked against the annotation of its field where it is read.

Annotations are dataclasses, ``str``, ``int``, ``float``, ``bool``, ``Any``, ``X | Y``, ``None``, ``dict[str, X]``,
``list[X]``, ``tuple[X, ...]``, ``tuple[X, Y]``, and ``Annotated[X, low]`` or ``Annotated[X, low, high]`` for numbers
within bounds. JSON as Python reads it may hold NaN, infinities and integers of any size, which are refused.
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
_PLAIN = tuple(_WORDS)
_LARGEST = 2**63  # whole numbers beyond it overflow in whatever they reach
_DEEPEST = 100  # levels inside a value of any kind: enough for every file, and far from Python's limit

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def shown(value: Any) -> str:
    """A value as errors show it: a line of bounded length, however large or nested it is."""
    return _short.repr(value)


def build(kind: type[T], value: Any, where: str, key: str = "", *, others: bool = False) -> T:
    """``value``, as JSON or YAML was read, as an instance of the dataclass (or other annotation) ``kind``.

    Args:
        where: the file, for errors.
        key: of ``value`` in it, parts joined by dots.
        others: leave out keys that the dataclasses do not have, instead of refusing them.

    Raises:
        UserError: names the first key that is missing, unknown or not of its kind.
    """

    def refused(expected: str, value: Any, key: str) -> UserError:
        return UserError(f"{where}: {f'{key} must be' if key else 'expected'} {expected}, found {shown(value)}")

    def of(kind: Any, value: Any, key: str) -> Any:
        if kind in _PLAIN:
            # A whole number is a finite one too; true and false are no numbers, though Python says so.
            if not (type(value) is kind or (kind is float and type(value) is int)) or not _usable(value):
                raise refused(_WORDS[kind], value, key)
            return value
        if kind is Any:
            return plain(value, key, _DEEPEST)
        if is_dataclass(kind):
            return instance(kind, value, key)
        origin, arguments = get_origin(kind), get_args(kind)
        if origin in (Union, UnionType):
            if value is None and NoneType in arguments:
                return None
            kinds = [argument for argument in arguments if argument is not NoneType]
            alike = [inner for inner in kinds if type(value) is (get_origin(inner) or inner)]
            return of((alike or kinds)[0], value, key)
        if origin is Annotated:
            inner, low, high = (*arguments, math.inf)[:3]
            if not low <= of(inner, value, key) <= high:
                span = f"of at least {low}" if high == math.inf else f"in [{low}, {high}]"
                raise refused(f"{_WORDS[inner]} {span}", value, key)
            return value
        if origin is dict:
            names = [of(str, name, f"a key of {key or 'it'}") for name in of(dict, value, key)]
            return {name: of(arguments[1], value[name], _at(key, name)) for name in names}
        if origin in (list, tuple):
            length = len(of(list, value, key))
            kinds = arguments if origin is tuple and arguments[1] is not ... else arguments[:1] * length
            if length != len(kinds):
                raise refused(f"a list of {len(kinds)}", value, key)
            return origin(of(*entry, _at(key, at)) for at, entry in enumerate(zip(kinds, value, strict=True)))
        raise TypeError(f"{kind} is no annotation that can be checked")

    def instance(kind: type, value: Any, key: str) -> Any:
        hints, known = _hints(kind), {entry.name: entry for entry in fields(kind)}
        if not isinstance(value, dict):
            raise refused(f"an object with {', '.join(known)}", value, key)
        place = f"{where}: {key}" if key else where
        if not others and (unknown := [name for name in value if name not in known]):
            raise UserError(f"{place}: unknown key {shown(unknown[0])}; expected {', '.join(known)}")
        for name, entry in known.items():
            if name not in value and entry.default is MISSING and entry.default_factory is MISSING:
                raise UserError(f"{where}: {_at(key, name)} is missing; expected {', '.join(known)}")
        return kind(**{name: of(hints[name], value[name], _at(key, name)) for name in known if name in value})

    def plain(value: Any, key: str, levels: int) -> Any:
        if not levels or not _usable(value):
            raise refused("of finite numbers and a few levels", value, key)
        if isinstance(value, dict | list):
            for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
                plain(entry, _at(key, name), levels - 1)
        return value

    try:
        return of(kind, value, key)
    except RecursionError:
        raise UserError(f"{where}: {key or 'it'} is nested too deeply") from None


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _usable(value: Any) -> bool:
    return abs(value) < _LARGEST if type(value) is int else type(value) is not float or math.isfinite(value)


def _at(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)
