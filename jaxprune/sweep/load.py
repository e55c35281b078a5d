"""A TOML file or a table -> a checked `SweepSpec`, and back to TOML."""

import dataclasses
import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from jaxprune.errors import SpecError, first_line, quoted, shown
from jaxprune.sweep.check_spec import check
from jaxprune.sweep.initial_params import located, same_content
from jaxprune.sweep.parse import plain, section
from jaxprune.sweep.spec import SweepSpec


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> SweepSpec:
    """Reads a specification.

    Args:
      path: a TOML file.
      overrides: `section.key=value` strings, the value in TOML syntax (a bare word is a string).

    Raises:
      SpecError: one line that says where and what.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise SpecError(f'{path}: no such file') from None
    except OSError as error:
        raise SpecError(f'{path}: cannot be read ({error})') from None
    return read_spec(content, str(path), Path(path).parent, overrides)


def read_spec(
    content: bytes, source: str, folder: str | Path = '', overrides: Sequence[str] = ()
) -> SweepSpec:
    """A specification from the content of its file; see `load_spec` and `make_spec`."""
    try:
        table = tomllib.loads(content.decode('utf-8-sig'))
    except UnicodeDecodeError as error:
        raise SpecError(f'{source}: cannot be read ({error})') from None
    except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
        raise SpecError(f'{source}: not valid TOML: {error}') from None
    for override in overrides:
        _override(table, override)
    return make_spec(table, source, folder)


def make_spec(table: Mapping[str, Any], source: str = 'spec', folder: str | Path = '') -> SweepSpec:
    """A specification from nested dicts with the keys of the TOML file.

    Args:
      table: what the file would hold.
      source: what error messages call it.
      folder: where relative paths begin; by default the working directory.
    """
    spec = section(SweepSpec, _with_every_method(table, source), source, '')
    spec = dataclasses.replace(spec, model=located(spec.model, Path(folder), source))
    return check(spec, source)


def _with_every_method(table: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """The table with `grid.every_method` written into every method that does not say otherwise."""
    grid = table.get('grid') if isinstance(table, Mapping) else None
    if not isinstance(grid, Mapping) or 'every_method' not in grid:
        return table
    shared, methods = grid['every_method'], grid.get('method')
    if not isinstance(shared, Mapping) or 'name' in shared:
        raise SpecError(f'{source}: grid.every_method: expected a table of keys other than name')
    rest = {key: value for key, value in grid.items() if key not in ('every_method', 'method')}
    if methods is None:  # the error for a missing key comes later
        return {**table, 'grid': rest}
    if isinstance(methods, (list, tuple)):
        named = [{'name': m} if isinstance(m, str) else m for m in methods]
        methods = [{**shared, **m} if isinstance(m, Mapping) else m for m in named]
    return {**table, 'grid': {**rest, 'method': methods}}


def resolved(spec: SweepSpec) -> dict[str, Any]:
    """The specification as nested dicts, every default written out; `make_spec` reads it back."""
    return plain(spec)


def to_toml(spec: SweepSpec) -> str:
    """The resolved specification as TOML."""
    return tomli_w.dumps(resolved(spec))


def identity(spec: SweepSpec) -> dict[str, Any]:
    """What makes two sweeps the same one: all but [engine], which a continuation may change.

    Of a file of parameters the content counts.
    """
    spec = dataclasses.replace(spec, model=same_content(spec.model))
    return {key: value for key, value in resolved(spec).items() if key != 'engine'}


def spec_hash(spec: SweepSpec) -> str:
    """Ten hexadecimal digits of the specification's identity."""
    return hashlib.sha256(tomli_w.dumps(identity(spec)).encode()).hexdigest()[:10]


def _override(table: dict, override: str) -> None:
    key, equals, text = override.partition('=')
    at = shown(override)[1:-1]
    if not equals or not key.strip():
        raise SpecError(f"--set {at}: expected key=value, as in 'train.epochs=2'")
    text = text.strip()
    try:
        parsed = tomllib.loads(f'value = {text}')
    except (ValueError, RecursionError) as error:
        if text.startswith(('[', '{', '"', "'")):
            raise SpecError(f'--set {at}: not valid TOML: {first_line(error)}') from None
        parsed = {'value': text}  # a bare word: --set data.name=mnist
    if set(parsed) != {'value'}:
        raise SpecError(f'--set {at}: expected one value')
    *outer, last = key.strip().split('.')
    for name in outer:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise SpecError(f'--set {at}: {quoted(name)} is not a section')
    table[last] = parsed['value']
