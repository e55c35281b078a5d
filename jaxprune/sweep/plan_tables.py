"""A plan as tables for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from jaxprune.sweep.probe import Measured
from jaxprune.sweep.progress import clock
from jaxprune.sweep.this_machine import Here


def plan_tables(
    plan: dict[str, Any], estimate: dict[str, float], here: Mapping[str, Here]
) -> list[Any]:
    """Runs, programs and why they differ, chunks, parameters, memory and time on this machine."""
    head = Table(box=box.SIMPLE, show_header=False, title=f'plan of {plan["name"]}')
    per_label: dict[str, int] = {}
    for run in plan['runs']:
        per_label[run['label']] = per_label.get(run['label'], 0) + 1
    head.add_row('runs', f'{len(plan["runs"])}')
    head.add_row('', ', '.join(f'{count} {label}' for label, count in per_label.items()))
    head.add_row('training programs', f'{len(plan["programs"])}')
    head.add_row('chunks', f'{len(plan["chunks"])}')
    head.add_row('memory', f'about {human_bytes(estimate["bytes"])} for runs at once and data')
    head.add_row(
        'training time',
        f'roughly {clock(estimate["seconds"])}'
        + (
            ', as measured'
            if all(own.seconds for own in here.values())
            else f' if all of it ran at the {estimate["flops_per_second"] / 1e9:,.0f} GFLOP/s of a '
            'matrix product here; small layers and convolutions take longer'
        ),
    )
    programs = Table(box=box.SIMPLE, title='programs')
    columns = ('program', 'differs in', 'strategy here', 'runs', 'per chunk', 'at once')
    for column in (*columns, 'steps', 'events'):
        programs.add_column(column)
    for program in plan['programs']:
        own = {k: v for k, v in program['differs'].items() if v is not None}
        differs = ', '.join(f'{k}={v}' for k, v in own.items())
        if not differs:
            differs = 'pruned before training' if len(plan['programs']) > 1 else 'the only one'
        programs.add_row(
            program['id'],
            differs,
            f'{here[program["id"]].strategy} ({here[program["id"]].chosen})',
            str(program['runs']),
            str(program['chunk']),
            str(here[program['id']].at_once),
            str(program['steps']),
            '\n'.join(program['events']) or 'none',
        )
    layers = Table(box=box.SIMPLE, title='parameters')
    for column, justify in (('prunable leaf', 'left'), ('weights', 'right')):
        layers.add_column(column, justify=justify)
    first = plan['programs'][0]
    for path, size in first['prunable'].items():
        layers.add_row(path, f'{size:,}')
    layers.add_row('all prunable', f'{sum(first["prunable"].values()):,}')
    layers.add_row('all parameters', f'{first["parameters"]:,}')
    return [head, programs, layers]


def probe_table(found: Sequence[Measured]) -> Table:
    """What each strategy took, the fastest first."""
    table = Table(box=box.SIMPLE, title='ways to train, measured')
    table.add_column('strategy')
    for column in ('ms per run and step', 'compiling', 'memory per run'):
        table.add_column(column, justify='right')
    for measured in found:
        if measured.error:
            table.add_row(str(measured.strategy), measured.error, '', '')
            continue
        table.add_row(
            str(measured.strategy),
            f'{1e3 * measured.seconds:.3g}',
            f'{measured.compile_seconds:.1f} s',
            human_bytes(measured.bytes_per_run),
        )
    return table


def human_bytes(count: float) -> str:
    """`12.3 MB`, in powers of 1000."""
    for unit in ('B', 'kB', 'MB', 'GB'):
        if count < 1000:
            return f'{count:.3g} {unit}'
        count /= 1000
    return f'{count:.3g} TB'
