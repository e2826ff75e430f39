"""How an object becomes one line of a record, and back.

A line is a JSON object that ends in the CRC-32 of what stands before it, so that a torn or edited
line is seen. A number that JSON lacks (nan, inf) is written as a string.
"""

from __future__ import annotations

import json
import math
import operator
import types
import typing
import zlib
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeAlias, TypeVar

T = TypeVar("T")
Json: TypeAlias = Any  # what json.loads may return
Kind: TypeAlias = Any  # a type, or what stands for one in a hint, as list[int] does

_SEAL = b',"crc32":"'
_SPELLED = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def seal(document: dict[str, Any]) -> bytes:
    """Return the line of an object, its end of line included."""
    try:
        text = _encode(document)
    except ValueError:  # a nan or inf somewhere, which is rare
        text = _encode(_spell(json.loads(json.dumps(document, default=_plain))))
    body = text.encode()
    return b'%s%s%08x"}\n' % (body[:-1], _SEAL, zlib.crc32(body))


def intact(line: bytes) -> bool:
    """Say whether a line matches its checksum."""
    body, seal, check = line.rpartition(_SEAL)
    return bool(seal) and check == b'%08x"}' % zlib.crc32(body + b"}")


def unseal(line: bytes) -> dict[str, Any]:
    """Return the object of a line that matches its checksum."""
    if not intact(line):
        raise ValueError(
            "the line must match its checksum, but does not: it was edited or damaged; "
            "restore the file or record the run again"
        )
    document: dict[str, Any] = json.loads(line)
    del document["crc32"]
    return document


def load(kind: type[T], document: dict[str, Any]) -> T:
    """Make a dataclass of an object, every field held against its type.

    Raises:
        ValueError: It names the field and what it must be.
    """
    value: T = _object(kind, document, "")
    return value


def _plain(value: object) -> object:
    """Reduce what JSON does not know: our dataclasses, and numbers that are not Python's own."""
    if is_dataclass(value):
        return vars(value)
    if hasattr(value, "__index__"):
        return operator.index(value)
    if hasattr(value, "__float__"):
        return float(value)
    raise TypeError(f"a record holds numbers, text, lists and objects, not {value!r}")


_encode = json.JSONEncoder(
    allow_nan=False, check_circular=False, separators=(",", ":"), default=_plain
).encode


def _spell(value: Json) -> Json:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list):
        return [_spell(item) for item in value]
    if isinstance(value, dict):
        return {key: _spell(item) for key, item in value.items()}
    return value


def _value(kind: Kind, value: Json, where: str) -> Json:
    """Return a JSON value as a value of this type; `where` is its place in the object."""
    if kind in (int, str, bool):  # a bool is no int here
        return _expect(type(value) is kind, kind.__name__, value, where)
    if kind is float:
        if isinstance(value, str):
            return _expect(value in _SPELLED, "float", _SPELLED.get(value, value), where)
        return float(_expect(type(value) in (int, float), "float", value, where))
    origin, parts = _shape(kind)
    if origin is types.UnionType:  # the only unions here are `X | None`
        return None if value is None else _value(parts[0], value, where)
    if origin is Literal:
        return _expect(value in parts, " or ".join(parts), value, where)
    if origin is object:
        return _object(kind, _expect(type(value) is dict, "object", value, where), where)
    if origin is dict:
        items = _expect(type(value) is dict, "object", value, where).items()
        return {key: _value(parts[1], item, f"{where}.{key}") for key, item in items}
    if origin in (list, tuple):
        _expect(type(value) is list, "list", value, where)
        if origin is list:
            return _items(parts[0], value, where)
        _expect(len(value) == len(parts), f"list of {len(parts)}", value, where)
        return tuple(_value(part, item, where) for part, item in zip(parts, value, strict=True))
    return value  # Any


def _items(kind: Kind, values: list[Json], where: str) -> list[Json]:
    origin, parts = _shape(kind)
    if origin is object:
        return [_object(kind, _expect(type(v) is dict, "object", v, where), where) for v in values]
    if origin is tuple:  # of types that JSON has there is nothing to convert
        return [
            tuple(value)
            if type(value) is list and tuple(map(type, value)) == parts
            else _value(kind, value, where)
            for value in values
        ]
    return [_value(kind, value, where) for value in values]


@cache
def _shape(kind: Kind) -> tuple[Kind, tuple[Kind, ...]]:
    """Take a hint apart: its origin, which is object for a dataclass, and its arguments."""
    return object if is_dataclass(kind) else typing.get_origin(kind), typing.get_args(kind)


def _object(kind: Kind, document: dict[str, Any], where: str) -> Json:
    signature = (*document, *map(type, document.values()))
    sound, choices = _sound(kind)
    if (rest := sound.get(signature)) is not None and all(document[name] in parts for name, parts in choices):
        for name, type_ in rest:
            document[name] = _value(type_, document[name], f"{where}.{name}" if where else name)
        return kind(*document.values())
    known = _fields(kind)
    for name in document.keys() - known.keys():
        raise ValueError(f"{kind.__name__} has no field {name}")
    arguments = {}
    for name, (type_, required) in known.items():
        if name in document:
            arguments[name] = _value(type_, document[name], f"{where}.{name}" if where else name)
        elif required:
            raise ValueError(f"{kind.__name__} must have the field {name}, but it is missing")
    if tuple(document) == tuple(known):
        types_ = {name: type_ for name, (type_, _) in known.items()}
        sound[signature] = [(n, types_[n]) for n, value in document.items() if not _passes(types_[n], type(value))]
    return kind(**arguments)


@cache
def _sound(kind: Kind) -> tuple[dict[tuple[Any, ...], list[tuple[str, Kind]]], list[tuple[str, tuple[Kind, ...]]]]:
    """Return signatures of sound objects, with the fields that they leave open, and what is to be chosen from.

    A signature is the names and then the types of an object's values. A record has a million
    gradients of the same few, so that only new ones are looked at field by field.
    """
    shapes = [(name, *_shape(type_)) for name, (type_, _) in _fields(kind).items()]
    return {}, [(name, parts) for name, origin, parts in shapes if origin is Literal]


def _passes(kind: Kind, type_: type) -> bool:
    """Say whether every value of this type goes unchanged into a field of this kind."""
    origin, parts = _shape(kind)
    if origin is types.UnionType:
        return type_ is types.NoneType or _passes(parts[0], type_)
    if origin is Literal:  # which of them is looked at each time
        return type_ is str
    return kind in (int, float, str, bool) and type_ is kind


@cache
def _fields(kind: Kind) -> dict[str, tuple[Any, bool]]:
    hints = typing.get_type_hints(kind)
    return {
        item.name: (hints[item.name], item.default is item.default_factory is MISSING)
        for item in fields(kind)
    }


def _expect(condition: bool, name: str, value: Json, where: str) -> Json:
    if not condition:
        raise ValueError(f"{where} must be {name}, not {value!r}")
    return value
