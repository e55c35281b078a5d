"""The command line. Thin; all work is done by the rooms below."""

import importlib.metadata
import os
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxprune.errors import JaxpruneError, nearest, quoted

#: Failed runs that a sweep lists at its end.
_MOST_FAILED = 10

Spec = Annotated[Path, tyro.conf.Positional]
Directory = Annotated[Path, tyro.conf.Positional]
Set = Annotated[list[str], tyro.conf.UseAppendAction, tyro.conf.arg(metavar='KEY=VALUE')]


@dataclass(frozen=True)
class Plan:
    """Show what a sweep would do: runs, programs, chunks, memory and time. Trains nothing.

    Example: jaxprune plan experiments/quickstart.toml --set train.epochs=2
    """

    spec: Spec
    """The sweep's TOML file."""
    set: Set
    """Replace a value of the file, TOML syntax; may be repeated."""
    probe: bool = False
    """Time the ways to train on this machine first; the fastest is remembered for the sweep."""


@dataclass(frozen=True)
class Sweep:
    """Train every run of a sweep, store the results and draw the report.

    Run the same command again to continue after an interruption: finished chunks are kept.

    Example: jaxprune sweep experiments/quickstart.toml --set grid.seed=[0,1]
    """

    spec: Spec
    """The sweep's TOML file."""
    set: Set
    """Replace a value of the file, TOML syntax; may be repeated."""
    out: Annotated[str | None, tyro.conf.arg(metavar='DIR')] = None
    """Directory of the results; by default runs/<name>-<hash of the resolved file>."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar='DIR')] = None
    """Where prepared TFDS data lie; by default $TFDS_DATA_DIR or ~/tensorflow_datasets."""


@dataclass(frozen=True)
class Status:
    """Show how far a sweep directory is."""

    directory: Directory
    """A directory that `jaxprune sweep` wrote."""


@dataclass(frozen=True)
class Report:
    """Draw report.html and its figures from whatever a sweep directory holds by now."""

    directory: Directory
    """A directory that `jaxprune sweep` wrote."""


@dataclass(frozen=True)
class List:
    """List what a specification may name: methods, models, data, quantities, ...

    Example: jaxprune list methods
    """

    kind: Annotated[str, tyro.conf.Positional] = ''
    """methods, models, data, quantities, allocations, schedules, optimizers or keys; none for all
    kinds."""


@dataclass(frozen=True)
class Explain:
    """Explain a name or a key of a specification, with its defaults and a piece of TOML.

    Example: jaxprune explain synflow
    """

    name: Annotated[str, tyro.conf.Positional]
    """A method, a model, a quantity, ..., or a key such as train.epochs."""


_DESCRIPTION = """Neural-network pruning research at accelerator scale: many seeds, sparsities and
methods in one compiled program.

A sweep is a TOML file: what is trained, on which data, and a grid of methods, compressions and
seeds. `jaxprune list` shows what it may name, `jaxprune explain NAME` what that means. Try:

    jaxprune sweep experiments/quickstart.toml
"""


def main(argv: list[str] | None = None) -> int:
    """The entry point; returns the exit code: 0, 2 for a mistake in what was asked."""
    given = sys.argv[1:] if argv is None else argv
    if given == ['--version']:
        print('jaxprune', importlib.metadata.version('jaxprune'))
        return 0
    if given and not given[0].startswith('-') and given[0] not in _COMMANDS:
        tail = nearest(given[0], _COMMANDS)
        print(f'jaxprune: unknown command {quoted(given[0])}: {tail}', file=sys.stderr)
        return 2
    command = tyro.extras.subcommand_cli_from_dict(
        {name: kind for name, (kind, _) in _COMMANDS.items()},
        args=argv,
        prog='jaxprune',
        description=_DESCRIPTION,
    )
    try:
        dict(_COMMANDS.values())[type(command)](command)
    except JaxpruneError as error:
        # One line, even where it quotes a name that has line breaks in it.
        print('jaxprune:', ' '.join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('jaxprune: interrupted; the same command continues', file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _plan(command: Plan) -> None:
    from jaxprune.sweep import keep_compiled, load_spec, make_plan, use_all_cores
    from jaxprune.sweep.costs import estimate
    from jaxprune.sweep.groups import chosen_anew
    from jaxprune.sweep.plan_tables import plan_tables, probe_table
    from jaxprune.sweep.probe import trial_line
    from jaxprune.sweep.sweep_plan import checked_groups
    from jaxprune.sweep.trials import measure

    use_all_cores()
    spec = load_spec(command.spec, command.set)
    groups = checked_groups(spec, str(command.spec))
    plan = make_plan(spec, str(command.spec), groups)
    if command.probe:
        keep_compiled()

        def on_trial(measured) -> None:
            print(f'jaxprune: {trial_line(measured)}', file=sys.stderr, flush=True)

        for found in measure(spec, groups, plan, on_trial, always=True).values():
            _print(probe_table(found))
        plan = make_plan(spec, str(command.spec), chosen_anew(spec, groups))
    _print(*plan_tables(plan, estimate(plan, spec)))


def _sweep(command: Sweep) -> None:
    import polars as pl

    from jaxprune import report
    from jaxprune.report import tables
    from jaxprune.report.terminal import summary_table
    from jaxprune.sweep import (
        default_out,
        keep_compiled,
        load_spec,
        run_sweep,
        store,
        use_all_cores,
    )
    from jaxprune.sweep.plan_tables import time_line
    from jaxprune.sweep.progress import shown_on

    use_all_cores()
    keep_compiled()
    spec = load_spec(command.spec, command.set)
    out = default_out(spec) if command.out is None else Path(command.out)
    results = run_sweep(
        spec,
        command.out,
        data_dir=command.data_dir,
        progress=shown_on(sys.stderr),
        source=str(command.spec),
    )
    _print(summary_table(tables.summary(results, store.read_layers(out))))
    failed = tables.final(results).filter(pl.col('error').is_not_null())
    for run in failed.head(_MOST_FAILED).iter_rows(named=True):
        print(
            f'failed: {run["label"]}, compression {run["target_compression"]:g}, seed '
            f'{run["seed"]} ({run["run_id"]}): {run["error"]}'
        )
    if failed.height > _MOST_FAILED:
        print(f'failed: {failed.height - _MOST_FAILED} more, see the report')
    print(time_line(store.read_timing(out)))
    print(f'report: {report.write(out)}')


def _status(command: Status) -> None:
    from jaxprune.sweep import status
    from jaxprune.sweep.plan_tables import time_line

    found = status(command.directory)
    state = 'running' if found['running'] else 'not running'
    print(f'{found["name"]}: {found["runs_finished"]}/{found["runs"]} runs, {state}')
    print(f'chunks: {found["chunks_finished"]}/{found["chunks"]} finished')
    for chunk, runs, step, steps in found['saved']:
        share = f'{100 * step / steps:.0f} %'
        print(f'chunk {chunk}, {runs} runs: saved after {step:,} of {steps:,} steps ({share})')
    for line in found['broken']:
        print(f'broken: {line}')
    print(f'sessions: {found["sessions"]}, last started {found["last_started"]}')
    if found['runs_finished']:
        print(time_line(found['timing']))
    if found['runs_finished'] < found['runs'] and not found['running']:
        print('to continue, give the same `jaxprune sweep` command again')
    if found['report']:
        print(f'report: {command.directory / "report.html"}')


def _report(command: Report) -> None:
    from jaxprune import report

    print(f'report: {report.write(command.directory)}')


def _list(command: List) -> None:
    from rich.markup import escape
    from rich.table import Table

    from jaxprune.catalogue import KINDS, entries

    if not command.kind:
        for kind, (title, _) in KINDS.items():
            print(f'{kind:12} {title}: {len(entries(kind))}')
        print('\nThen: jaxprune list methods, jaxprune explain synflow')
        return
    found = entries(command.kind)
    table = Table(
        box=None, title=KINDS[command.kind][0], title_justify='left', padding=(0, 2, 0, 0)
    )
    several = len({entry.kind for entry in found}) > 1
    shown = {
        'name': lambda entry: entry.name,
        'kind': lambda entry: entry.kind if several else '',
        'what': lambda entry: entry.text,
        'default': lambda entry: (
            ', '.join(map(str, entry.defaults.values())) if entry.kind == 'key' else ''
        ),
        'paper': lambda entry: entry.paper,
    }
    columns = {name: of for name, of in shown.items() if any(map(of, found))}
    for name in columns:
        table.add_column(name, no_wrap=name == 'name')
    for entry in found:
        table.add_row(*(escape(of(entry)) for of in columns.values()))
    _print(table)


def _explain(command: Explain) -> None:
    from jaxprune.catalogue import explain

    for place, entry in enumerate(explain(command.name)):
        print(('\n' if place else '') + f'{entry.name} ({entry.kind})')
        print(textwrap.fill(entry.text, 96, initial_indent='  ', subsequent_indent='  '))
        if entry.paper:
            print(f'  Paper: {entry.paper}')
        if entry.limits:
            print(f'  Values: {entry.limits}')
        if entry.defaults:
            values = ', '.join(f'{name} = {value!r}' for name, value in entry.defaults.items())
            print(textwrap.fill(f'Defaults: {values}', 96, initial_indent='  ',
                                subsequent_indent='    '))  # fmt: skip
        for name, meaning in entry.options.items():
            print(textwrap.fill(f'{name}: {meaning}', 96, initial_indent='    ',
                                subsequent_indent='      '))  # fmt: skip
        if entry.snippet:
            print('\n' + textwrap.indent(entry.snippet, '    '))


def _print(*tables) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in tables:
        console.print(table)


_COMMANDS = {
    'plan': (Plan, _plan),
    'sweep': (Sweep, _sweep),
    'status': (Status, _status),
    'report': (Report, _report),
    'list': (List, _list),
    'explain': (Explain, _explain),
}
