"""Tables -> specification classes: keys, types and ranges. Every mistake is one line.

A message names the file, the key, what was expected and the nearest valid name.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from jaxprune.arguments import Option, outside
from jaxprune.errors import SpecError, nearest, quoted, shown
from jaxprune.sweep.spec import MethodSpec

_WORDS = {str: 'a string', int: 'a whole number', float: 'a number', bool: 'true or false'}
#: Programs count in int32 and compute in float32.
_LIMITS = {int: 2**31 - 1, float: 3.4e38}


def section(cls: type, table: Any, source: str, where: str) -> Any:
    """An instance of a specification class from a table; unknown keys are options if it is open."""
    if not isinstance(table, Mapping):
        raise SpecError(f'{source}: {where}: expected a table, not {shown(table)}')
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name != 'options'}
    is_open = 'options' in hints
    values, options = {}, {}
    for key, value in table.items():
        name = quoted(key)[1:-1]
        at = f'{where}.{name}' if where else name
        if key in fields:
            values[key] = _value(hints[key], fields[key], value, source, at)
        elif is_open:
            options[key] = value  # whether it is a valid option is checked with its owner
        else:
            raise SpecError(f'{source}: {at}: unknown key, {nearest(key, fields)}')
    for name, f in fields.items():
        if is_required(f) and name not in values:
            at = f'{where}.{name}' if where else name
            raise SpecError(f'{source}: {at}: missing; {_wanted(hints[name], f, at)}')
    return cls(**values, **({'options': options} if is_open else {}))


def is_required(f: dataclasses.Field) -> bool:
    """Must a specification have this key?"""
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _wanted(hint: Any, f: dataclasses.Field, at: str) -> str:
    """What a missing key should hold, with an example."""
    what = f'expected {f.metadata["option"].doc}'
    if not dataclasses.is_dataclass(hint):
        return f'{what}, such as {f.metadata["example"]}'
    examples = [
        part.metadata['example']
        for part in dataclasses.fields(hint)
        if part.metadata.get('example') and (is_required(part) or part.default == ())
    ]
    return f'{what}: a section [{at}] with {", ".join(examples)}'


def _value(hint: Any, f: dataclasses.Field, value: Any, source: str, at: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if hint is MethodSpec and isinstance(value, str):
            value = {'name': value}
        return section(hint, value, source, at)
    origin = typing.get_origin(hint)
    if origin is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, (list, tuple)):
            raise SpecError(f'{source}: {at}: expected a list, not {shown(value)}')
        return tuple(_value(item, f, v, source, f'{at}[{i}]') for i, v in enumerate(value))
    if origin is not None and typing.get_args(hint)[1] is int:
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise SpecError(f'{source}: {at}: expected a table of numbers, not {shown(value)}')
        return {
            k: _scalar(int, f.metadata['option'], v, source, f'{at}.{quoted(k)[1:-1]}')
            for k, v in sorted(value.items())
        }
    if origin is not None:  # grid.train: key -> list of values, checked with [train]
        if not isinstance(value, Mapping):
            raise SpecError(f'{source}: {at}: expected a table of lists, not {shown(value)}')
        return {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in value.items()}
    return _scalar(hint, f.metadata['option'], value, source, at)


def _scalar(hint: type, option: Option, value: Any, source: str, at: str) -> Any:
    """The value as `hint`, or a SpecError; a whole number passes as a float, True as neither."""
    fits = isinstance(value, (int, float) if hint is float else hint)
    if not fits or (isinstance(value, bool) and hint is not bool):
        raise SpecError(f'{source}: {at}: expected {_WORDS[hint]}, not {shown(value)}')
    if not fits_device(value, hint):
        raise SpecError(f'{source}: {at}: expected {limits(hint)}, not {shown(value)}')
    value = hint(value)
    if wrong := outside(value, option):
        raise SpecError(f'{source}: {at}: {wrong}')
    return value


def fits_device(value: Any, hint: type) -> bool:
    """Is it finite and within int32 or float32? Always true of strings and truth values."""
    return hint not in _LIMITS or abs(value) <= _LIMITS[hint]


def limits(hint: type) -> str:
    """What `fits_device` wants, in words."""
    return f'a finite number up to {_LIMITS[hint]:g}' if hint is float else 'less than 2**31'


def plain(value: Any) -> Any:
    """A specification, or a part of one, as nested dicts and lists; options beside the keys."""
    if dataclasses.is_dataclass(value):
        table = {
            f.name: plain(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if getattr(value, f.name) or not f.metadata.get('later')
        }
        options = table.pop('options', {})
        return {**table, **options}
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    return value
