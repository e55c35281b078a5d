"""The page that a benchmark script writes: its machine, tables and notes."""

import argparse
import importlib.util
import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxprune.sweep.devices import cores


class Table(NamedTuple):
    """Lines of a table; a line is column -> cell."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]


#: `(settings, tables, notes, publish)`: adds tables and notes; `publish()` writes the page so far.
PartFn = Callable[[argparse.Namespace, list[Table], list[str], Callable[[], None]], None]


def measure(settings: argparse.Namespace, parts: Mapping[str, PartFn], wrong: str) -> None:
    """Runs the parts that are asked for, or all; prints the page and writes it to `settings.out`.

    Args:
      settings: a flag for each part, by its name.
      parts: in order.
      wrong: what to say, with exit status 1, if a cell says WRONG.
    """
    head, tables, notes = machine_line(), [], []
    print(head, flush=True)

    def publish() -> None:
        if settings.out:
            Path(settings.out).write_text(markdown(head, tables, notes))

    asked = [name for name in parts if getattr(settings, name)]
    for name in asked or parts:
        parts[name](settings, tables, notes, publish)
    publish()
    text = markdown(head, tables, notes)
    print('\n' + text)
    if 'WRONG' in text:
        raise SystemExit(wrong)


def check_out(parser: argparse.ArgumentParser, out: str | None) -> None:
    """Ends the program if the folder of the page is missing."""
    if out and not Path(out).parent.is_dir():
        parser.error(f'--out: there is no folder {Path(out).parent}')


def machine_line() -> str:
    packages = ('jax', 'flax', 'torch', 'torch-pruning', 'torch-kirigami')
    names = [p for p in packages if importlib.util.find_spec(p.replace('-', '_'))]
    load = f', load {os.getloadavg()[0]:.1f} at the start' if hasattr(os, 'getloadavg') else ''
    return (
        f'{jax.local_devices()[0].device_kind}, {cores()} cores{load}, {platform.machine()}; '
        f'{", ".join(f"{p} {version(p)}" for p in names)}, Python {platform.python_version()}.'
    )


def markdown(head: str, tables: list[Table], notes: list[str]) -> str:
    parts = [head, '']
    for table in tables:
        parts += [f'### {table.title}', '', table.note, '']
        # A column that no row has anything to say in is left out.
        shown = [c for c in table.columns if any(str(row.get(c, '')) for row in table.rows)]
        parts += ['| ' + ' | '.join(shown) + ' |', '|' + '---|' * len(shown)]
        for row in table.rows:
            parts.append('| ' + ' | '.join(str(row.get(c, '')) for c in shown) + ' |')
        parts.append('')
    parts += [f'- {note}' for note in notes]
    return '\n'.join(parts) + '\n'
