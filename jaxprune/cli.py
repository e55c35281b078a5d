"""The command line. Thin; all work is done by the rooms below."""

import importlib.metadata
import os
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxprune.errors import (
    DataError,
    Interrupted,
    JaxpruneError,
    ReadError,
    SpecError,
    StoreError,
    WriteError,
    nearest,
    quoted,
)
from jaxprune.fleet.launcher import FAULT, INTERRUPTED, MISTAKE, SAVING, Resources
from jaxprune.fleet.manifest_options import ManifestOptions

#: Failed runs that a sweep lists at its end.
_MOST_FAILED = 10
#: Seconds between two looks of `jaxprune status --follow`.
_FOLLOW = 5.0

Spec = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar='SPEC')]
#: A string: `s3://bucket/sweep` is no `Path`.
Directory = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar='DIR')]
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
    plan_only: bool = False
    """Write the plan into the directory and stop: other machines do its chunks."""
    on: Literal['local', 'ray', 'slurm'] = 'local'
    """Where the chunks are trained: here, by a Ray cluster, or by SLURM. All machines must see the
    directory under the same name."""
    cpus: int = 0
    """Ray, SLURM: cores of each chunk; 0 for the engine's own."""
    gpus: int = 0
    """Ray, SLURM: GPUs of each chunk."""
    tpus: int = 0
    """Ray: TPU chips of each chunk, all those of a host."""
    address: str = ''
    """Ray: an existing cluster, as host:port or 'auto'; none starts one on this machine."""
    slurm: Set = field(default_factory=list)
    """SLURM: an option of sbatch such as partition=low or time=120; may be repeated."""
    per_job: int = 1
    """SLURM: chunks that one job trains, one after the other."""
    at_once: int = 0
    """SLURM: most jobs that run at the same time; 0 for no limit."""
    grace: float = 25.0
    """Seconds after a signal in which a chunk waits for the end of an epoch, to save there."""


@dataclass(frozen=True)
class Chunk:
    """Train one chunk of a planned sweep, on any machine that sees its directory.

    Exit codes: 0 the chunk is finished; 75 interrupted by SIGTERM or SIGUSR2, start it again; 2 a
    mistake in what was asked; 1 a fault.

    Example: jaxprune chunk runs/quickstart-... --index 0
    """

    directory: Directory
    """A directory that `jaxprune sweep` wrote, perhaps with --plan-only; s3:// and gs:// too."""
    id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar='ID')] = ''
    """The chunk's id, as in plan.json."""
    index: int | None = None
    """The chunk's place in the plan, from 0."""
    all: bool = False
    """Train all chunks that are not finished, one after the other; those at which other processes
    work come last."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar='DIR')] = None
    """Where prepared TFDS data lie; by default $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    grace: float = 25.0
    """Seconds after a signal in which the chunk waits for the end of an epoch, to save there."""
    processes: int | None = None
    """Processes that train the chunk together, each of which gets this command; by default
    $JAX_NUM_PROCESSES or one."""
    process: int | None = None
    """The number of this one, from 0; by default $JAX_PROCESS_ID."""
    coordinator: str = ''
    """Where process 0 listens, host:port; by default $JAX_COORDINATOR_ADDRESS."""


@dataclass(frozen=True)
class Launch:
    """Write files that run the chunks of a planned sweep on Kubernetes, on TPUs or by SkyPilot.

    Plan first: jaxprune sweep SPEC --out DIR --plan-only

    Example: jaxprune launch k8s gs://bucket/sweep --image registry/jaxprune:1 --gpus 1
    """

    kind: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar='KIND')]
    """k8s, tpu or sky."""
    directory: Directory
    """The directory of the sweep, as the machines see it."""
    options: Annotated[ManifestOptions, tyro.conf.arg(name='')]
    to: Annotated[Path | None, tyro.conf.arg(metavar='DIR')] = None
    """Where the files go; by default launch-KIND in the working directory."""


@dataclass(frozen=True)
class Merge:
    """Unite sweeps of one specification, from several directories, in a new one.

    Example: jaxprune merge runs/here runs/there --out runs/all
    """

    directories: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar='DIR')]
    """Directories that `jaxprune sweep` wrote."""
    out: Annotated[str, tyro.conf.arg(metavar='DIR')]
    """The new directory; one that `merge` wrote gets what has finished since."""


@dataclass(frozen=True)
class Log:
    """Write the curves of a sweep's runs for TensorBoard or Weights & Biases (offline).

    Again, it adds what has finished since.

    Example: jaxprune log runs/quickstart-... --to tensorboard
    """

    directory: Directory
    """A directory that `jaxprune sweep` wrote."""
    to: Literal['tensorboard', 'wandb']
    """For which of them."""
    out: Annotated[str | None, tyro.conf.arg(metavar='DIR')] = None
    """Where the logs go; by default DIRECTORY/logs/TO."""


@dataclass(frozen=True)
class Status:
    """Show how far a sweep directory is: finished chunks, who works at which chunk, what failed."""

    directory: Directory
    """A directory that `jaxprune sweep` wrote."""
    follow: bool = False
    """Look again every few seconds until all is finished."""


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

    kind: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar='KIND')] = ''
    """methods, models, data, quantities, allocations, schedules, optimizers or keys; none for all
    kinds."""


@dataclass(frozen=True)
class Explain:
    """Explain a name or a key of a specification, with its defaults and a piece of TOML.

    Example: jaxprune explain synflow
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar='NAME')]
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
        return _code(command, error)
    except KeyboardInterrupt:
        print('jaxprune: interrupted; the same command continues', file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _code(command: object, error: JaxpruneError) -> int:
    if isinstance(error, Interrupted):
        return INTERRUPTED
    asked = isinstance(error, (SpecError, DataError, StoreError))
    later = isinstance(error, (ReadError, WriteError))
    if isinstance(command, (Chunk, Sweep)) and (later or not asked):
        return FAULT  # elsewhere, or later, it may work
    return MISTAKE


def _plan(command: Plan) -> None:
    from jaxprune.sweep import keep_compiled, load_spec, make_plan, use_all_cores
    from jaxprune.sweep.costs import estimate
    from jaxprune.sweep.groups import chosen_anew
    from jaxprune.sweep.plan_tables import plan_tables, probe_table
    from jaxprune.sweep.probe import trial_line
    from jaxprune.sweep.sweep_plan import checked_groups
    from jaxprune.sweep.this_machine import machine_of
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
        groups = chosen_anew(spec, groups)
    here = machine_of(groups, plan)
    _print(*plan_tables(plan, estimate(plan, spec, here), here))


def _sweep(command: Sweep) -> None:
    import polars as pl

    from jaxprune import report
    from jaxprune.report import tables
    from jaxprune.report.terminal import summary_table
    from jaxprune.stop import on_signals
    from jaxprune.sweep import (
        default_out,
        keep_compiled,
        load_spec,
        plan_sweep,
        run_sweep,
        store,
        use_all_cores,
    )
    from jaxprune.sweep.progress import shown_on
    from jaxprune.sweep.timing import time_line

    _check_engine(command)
    use_all_cores()
    keep_compiled()
    spec = load_spec(command.spec, command.set)
    out = default_out(spec) if command.out is None else store.directory(command.out)
    if command.plan_only:
        plan = plan_sweep(spec, out, str(command.spec))
        print(f'{out}: {len(plan["chunks"])} chunks; for each: jaxprune chunk {out} --index N')
        return
    with on_signals(command.grace) as stop:
        if command.on == 'local':
            results = run_sweep(
                spec,
                out,
                data_dir=command.data_dir,
                progress=shown_on(sys.stderr),
                source=str(command.spec),
                stop=stop,
            )
        else:
            plan_sweep(spec, out, str(command.spec))
            _elsewhere(command, out, shown_on(sys.stderr), stop)
            results = store.read_results(out)
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


#: Options of `jaxprune sweep` that only some engines have.
_ENGINES_OF = {
    **dict.fromkeys(('cpus', 'gpus'), ('ray', 'slurm')),
    **dict.fromkeys(('tpus', 'address'), ('ray',)),
    **dict.fromkeys(('slurm', 'per_job', 'at_once'), ('slurm',)),
}


def _check_engine(command: Sweep) -> None:
    """Are the options numbers that make sense, of the engine that is asked for?"""
    _check_least(0, cpus=command.cpus, gpus=command.gpus, tpus=command.tpus)
    _check_least(0, at_once=command.at_once, grace=command.grace)
    _check_least(1, per_job=command.per_job)
    defaults = Sweep(command.spec, [])
    for name, engines in _ENGINES_OF.items():
        if getattr(command, name) != getattr(defaults, name) and command.on not in engines:
            raise SpecError(f'--{name.replace("_", "-")}: needs --on {" or --on ".join(engines)}')
    for option in command.slurm:
        if not option.partition('=')[0].strip('-'):
            raise SpecError(f'--slurm: write {quoted(option)} like partition=low')


def _check_least(low: int, **numbers: float) -> None:
    for name, value in numbers.items():
        if not value >= low:
            raise SpecError(f'--{name.replace("_", "-")}: must be at least {low}, not {value:g}')


def _elsewhere(command: Sweep, out: Path, progress, stop) -> None:
    """Has Ray or SLURM train what is missing."""
    from jaxprune.files import is_remote
    from jaxprune.fleet.coordinator import run_elsewhere

    out = out if is_remote(out) else out.absolute()
    resources = Resources(command.cpus, command.gpus, command.tpus)
    if command.on == 'ray':
        from jaxprune.fleet.ray_cluster import ray_launcher

        launcher = ray_launcher(resources, command.address)
    else:
        from jaxprune.fleet.slurm import slurm_launcher

        if is_remote(out):
            raise SpecError(f'--on slurm: {out} is no directory on a disk that the nodes share')
        given = [option.partition('=') for option in command.slurm]
        sbatch = {key: value for key, _, value in given}
        grace = round(command.grace) + SAVING
        launcher = slurm_launcher(out, resources, sbatch, command.per_job, command.at_once, grace)
    options = ['--grace', f'{command.grace:g}']
    if command.data_dir is not None:
        options += ['--data-dir', str(command.data_dir.absolute())]
    run_elsewhere(out, launcher, options, progress=progress, stop=stop)


def _chunk(command: Chunk) -> None:
    from jaxprune.stop import on_signals

    _check_least(0, grace=command.grace)
    # Before the imports, which take seconds: a signal in them must not count as a fault.
    with on_signals(command.grace) as stop:
        _train_chunk(command, stop)


def _train_chunk(command: Chunk, stop) -> None:
    from jaxprune.sweep import keep_compiled, run_chunks, use_all_cores
    from jaxprune.sweep.processes import from_environment, meet
    from jaxprune.sweep.progress import shown_on

    given = [bool(command.id), command.index is not None, command.all]
    if sum(given) != 1:
        raise SpecError('chunk: give an id, --index N or --all')
    wanted = None if command.all else command.id or command.index
    asked = {
        'JAX_NUM_PROCESSES': command.processes,
        'JAX_PROCESS_ID': command.process,
        'JAX_COORDINATOR_ADDRESS': command.coordinator or None,
    }
    asked = {name: str(value) for name, value in asked.items() if value is not None}
    use_all_cores()
    meet(from_environment({**os.environ, **asked}))
    keep_compiled()
    count = run_chunks(
        command.directory,
        wanted,
        data_dir=command.data_dir,
        progress=shown_on(sys.stderr),
        stop=stop,
    )
    print('finished' if count else 'finished before')


def _status(command: Status) -> None:
    import time

    from jaxprune.sweep import status, store

    while True:
        found = status(store.place(command.directory))
        _show_status(found, command.directory)
        if not command.follow or found['chunks_finished'] + len(found['broken']) == found['chunks']:
            return
        time.sleep(_FOLLOW)
        print()


def _show_status(found: dict, directory: str) -> None:
    from jaxprune.sweep.progress import clock
    from jaxprune.sweep.timing import time_line

    state = 'running' if found['running'] else 'not running'
    print(f'{found["name"]}: {found["runs_finished"]}/{found["runs"]} runs, {state}')
    eta = found['eta'] and f', about {clock(found["eta"])} left'
    print(f'chunks: {found["chunks_finished"]}/{found["chunks"]} finished{eta or ""}')
    for chunk in found['unfinished']:
        print(_chunk_line(chunk))
    for line in found['broken']:
        print(f'broken: {line}')
    print(f'sessions: {found["sessions"]}, last started {found["last_started"]}')
    if found['runs_finished']:
        print(time_line(found['timing']))
    if found['runs_finished'] < found['runs'] and not found['running']:
        print('to continue, give the same `jaxprune sweep` command again')
    if found['report']:
        print(f'report: {directory.rstrip("/")}/report.html')


def _chunk_line(chunk: dict) -> str:
    """One line on a chunk that was begun and is not finished."""
    from jaxprune.sweep.progress import clock

    line = f'chunk {chunk["chunk"]}, {chunk["runs"]} runs: {chunk["state"]}'
    if chunk['host']:
        line += f' on {chunk["host"]} since {chunk["started"]}'
    if chunk['state'] in ('running', 'lost'):
        line += f', last sign of life {clock(chunk["silent"])} ago'
        line += ', epoch {:.3g} of {:.3g}'.format(*chunk['epoch'])
    line += f', {100 * chunk["share"]:.0f} % saved'
    if chunk['attempts'] > 1:
        line += f', attempt {chunk["attempts"]}'
    return line + (f': {chunk["error"]}' if chunk['error'] else '')


def _launch(command: Launch) -> None:
    from jaxprune.files import is_remote
    from jaxprune.fleet.manifests import manifests, name_of
    from jaxprune.sweep import store

    place = store.place(command.directory)
    plan = store.read_plan(place)
    sweep = command.directory if is_remote(place) else str(place.absolute())
    name = name_of(plan['name'])
    made = manifests(command.kind, sweep, len(plan['chunks']), name, command.options)
    to = command.to or Path(f'launch-{command.kind}')
    for file, text in made.items():
        store.write_bytes(to / file, text.encode())
        print(to / file)


def _merge(command: Merge) -> None:
    from jaxprune.sweep.merge import merge

    found = merge(command.directories, command.out)
    for line in found.broken:
        print(f'broken: {line}')
    print(f'{command.out}: {found.finished} of {found.chunks} chunks finished')


def _log(command: Log) -> None:
    from jaxprune.sweep.sinks import log_sweep

    found = log_sweep(command.directory, command.to, command.out)
    print(f'{found.where}: {found.runs} runs, {found.added} of them new')


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
    'chunk': (Chunk, _chunk),
    'launch': (Launch, _launch),
    'merge': (Merge, _merge),
    'log': (Log, _log),
    'status': (Status, _status),
    'report': (Report, _report),
    'list': (List, _list),
    'explain': (Explain, _explain),
}
