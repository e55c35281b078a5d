"""The command line: plan, sweep, status, report. Thin; all work is done by the rooms below."""

import importlib.metadata
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxprune.errors import JaxpruneError

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
    out: Annotated[Path | None, tyro.conf.arg(metavar='DIR')] = None
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


def main(argv: list[str] | None = None) -> int:
    """The entry point; returns the exit code: 0, 2 for a mistake in what was asked."""
    if (sys.argv[1:] if argv is None else argv) == ['--version']:
        print('jaxprune', importlib.metadata.version('jaxprune'))
        return 0
    command = tyro.extras.subcommand_cli_from_dict(
        {'plan': Plan, 'sweep': Sweep, 'status': Status, 'report': Report},
        args=argv,
        prog='jaxprune',
        description='Pruning research at accelerator scale: many runs in one compiled program.',
    )
    try:
        {Plan: _plan, Sweep: _sweep, Status: _status, Report: _report}[type(command)](command)
    except JaxpruneError as error:
        # One line, even where it quotes a name that has line breaks in it.
        print('jaxprune:', ' '.join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('jaxprune: interrupted; the same command continues', file=sys.stderr)
        return 130
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
    from jaxprune.report.tables import summary
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
    out = command.out or default_out(spec)
    results = run_sweep(
        spec,
        out,
        data_dir=command.data_dir,
        progress=shown_on(sys.stderr),
        source=str(command.spec),
    )
    _print(summary_table(summary(results, store.read_layers(out))))
    failed = results.filter(pl.col('error').is_not_null()).unique('run_id', maintain_order=True)
    for run in failed.iter_rows(named=True):
        print(
            f'failed: {run["label"]}, compression {run["target_compression"]:g}, seed '
            f'{run["seed"]} ({run["run_id"]}): {run["error"]}'
        )
    print(time_line(store.read_timing(out)))
    print(f'report: {report.write(out)}')


def _status(command: Status) -> None:
    from jaxprune.sweep import status
    from jaxprune.sweep.plan_tables import time_line

    found = status(command.directory)
    state = 'running' if found['running'] else 'not running'
    print(f'{found["name"]}: {found["runs_finished"]}/{found["runs"]} runs, {state}')
    print(f'chunks: {found["chunks_finished"]}/{found["chunks"]} finished')
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


def _print(*tables) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in tables:
        console.print(table)
