"""The paper's central figure from finished sweeps, and its claims with a number each.

    python experiments/effective_sparsity/figure.py runs/direct runs/effective runs/uniform_plus

Writes figure.png beside this script (or to `--out`), prints the claims, and exits with 1 if
one of them fails. What this shorter recipe is known not to reproduce is printed as a note.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from jaxprune.report import style, tables, text
from jaxprune.stats import student_interval
from jaxprune.sweep import store

#: (method, allocation) -> its name in the figure, in the order of the legend.
NAMES = {
    ('random', 'uniform'): 'random, uniform',
    ('random', 'uniform_plus'): 'random, uniform+',
    ('random', 'erk'): 'random, ERK',
    ('random', 'igq'): 'random, IGQ',
    ('magnitude', 'global'): 'magnitude',
    ('snip', 'global'): 'SNIP',
    ('synflow', 'global'): 'SynFlow',
}
LAYERWISE = [name for (method, _), name in NAMES.items() if method == 'random']
IGQ = 'random, IGQ'
SCORES = [name for name in NAMES.values() if name not in LAYERWISE]
SHOWN = {'direct': 'compression', 'effective': 'effective_compression'}
"""Against which compression the runs that were pruned to a target are drawn."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('directories', nargs='+', type=Path, help='finished sweeps')
    parser.add_argument('--out', type=Path, default=Path(__file__).with_name('figure.png'))
    arguments = parser.parse_args()
    frame = load(arguments.directories)
    arguments.out.write_bytes(draw(frame))
    print(f'figure: {arguments.out}')
    failed = False
    for check in CLAIMS:
        print(check.__doc__.splitlines()[0])
        for claim in check(frame):
            print(f'  {claim.verdict}  {claim.finding}')
            failed |= claim.verdict == FAIL
    return 1 if failed else 0


def load(directories: Sequence[Path]) -> pl.DataFrame:
    """One row per run: `name`, `target`, `at` (its target compression), `seed`, compressions, and
    `accuracy` in percent."""
    parts = []
    for directory in directories:
        runs = tables.final(store.read_results(directory))
        if broken := runs.filter(pl.col('error').is_not_null()).height:
            raise SystemExit(f'{directory}: {broken} runs have no valid mask')
        parts.append(
            runs.select(
                'run_id',
                'method',
                'allocation',
                'target',
                'seed',
                'compression',
                'effective_compression',
                at='target_compression',
                accuracy=100 * pl.col('test_accuracy'),
            )
        )
    names = pl.struct('method', 'allocation').map_elements(
        lambda run: NAMES.get((run['method'], run['allocation']), run['method']),
        return_dtype=pl.String,
    )
    # Two sweeps have dense runs, the same ones.
    frame = pl.concat(parts).with_columns(name=names).unique('run_id', maintain_order=True)
    there = set(frame.select('name', 'target').iter_rows())
    for name in NAMES.values():
        for target in SHOWN:
            if (name, target) not in there:
                raise SystemExit(f'no runs of {name} to {target} compression: give all directories')
    return frame


# --- the figure -----------------------------------------------------------------------------------


def draw(frame: pl.DataFrame) -> bytes:
    """The figure as PNG."""
    styles = style.lines(list(NAMES.values()))
    with style.context():
        drawing = style.figure(style.WIDTH, 8.0)
        rows = drawing.add_gridspec(2, 2, height_ratios=[1, 1.1])
        left = drawing.add_subplot(rows[0, 0])
        right = drawing.add_subplot(rows[0, 1], sharex=left, sharey=left)
        both = rows[1, 0].subgridspec(2, 1, height_ratios=[1, 4.2], hspace=0)
        below = drawing.add_subplot(both[1])
        strip = drawing.add_subplot(both[0], sharex=below)
        key = drawing.add_subplot(rows[1, 1])

        for axes, names, title in (
            (left, LAYERWISE, 'random pruning: layerwise allocations'),
            (right, [*SCORES, IGQ], 'the best random allocation and scores'),
        ):
            _accuracies(axes, frame, {name: styles[name] for name in names})
            axes.set_title(title)
        left.set_ylabel('test accuracy (%)')
        right.tick_params(labelleft=False)
        _compressions(below, strip, frame, styles)
        _key(key, styles)
        grid = sorted(set(frame.filter(pl.col('at') > 1)['at']))
        for axes in (left, right):
            axes.set_xlabel('compression: effective (solid) or direct (dashed)')
        style.compression_axis([left, right], grid, limits=(grid[0], grid[-1]))
        finite = frame.filter(pl.col('effective_compression').is_finite())
        ends = grid[0], max(grid[-1], finite['effective_compression'].max())
        style.compression_axis([below], style.round_values(*ends), limits=ends, vertical=True)
        style.compression_axis([below], grid, limits=(grid[0], grid[-1]))
        return style.png(drawing)


def _accuracies(axes: Axes, frame: pl.DataFrame, styles: dict[str, dict]) -> None:
    """Mean accuracy with its range over seeds, of both sweeps."""
    dense = frame.filter(pl.col('name') == tables.DENSE)['accuracy']
    axes.axhspan(dense.min(), dense.max(), color=style.INK, alpha=0.25, linewidth=0)
    axes.axhline(dense.mean(), color=style.INK, linewidth=0.8)
    for name, props in styles.items():
        for target, x in SHOWN.items():
            rows = _over_seeds(frame, name, target)
            if rows.is_empty():
                continue
            line = '-' if target == 'effective' else (0, (3, 1.6))
            alpha = 0.16 if target == 'effective' else 0.07
            low, high = rows['lowest'], rows['highest']
            axes.fill_between(rows[x], low, high, color=props['color'], alpha=alpha, linewidth=0)
            axes.plot(
                rows[x],
                rows['accuracy'],
                color=props['color'],
                linestyle=line,
                linewidth=1.6 if target == 'effective' else 1.1,
            )
            for row in rows.iter_rows(named=True):
                axes.plot(
                    row[x],
                    row['accuracy'],
                    color=props['color'],
                    marker=props['marker'],
                    markersize=5.5 if target == 'effective' else 4,
                    markerfacecolor='white' if row['cut'] else props['color'],
                    zorder=3,
                )
    axes.set_ylim(0, 102)


def _over_seeds(frame: pl.DataFrame, name: str, target: str) -> pl.DataFrame:
    """Per target compression: mean accuracy and its ends, geometric mean compressions, and `cut`,
    how many networks are disconnected. Where all are, effective compression is null."""
    effective = pl.col('effective_compression')
    connected = effective.filter(effective.is_finite())
    return (
        frame.filter(pl.col('name') == name, pl.col('target') == target)
        .group_by('at')
        .agg(
            pl.col('accuracy').mean(),
            pl.col('compression').log().mean().exp(),
            lowest=pl.col('accuracy').min(),
            highest=pl.col('accuracy').max(),
            effective_compression=connected.log().mean().exp(),
            least=connected.min(),
            most=connected.max(),
            cut=effective.is_infinite().sum(),
            seeds=pl.len(),
        )
        .sort('at')
    )


def _compressions(axes: Axes, strip: Axes, frame: pl.DataFrame, styles: dict[str, dict]) -> None:
    """Effective against direct compression of the runs pruned to a direct one; ∞ in the strip."""
    axes.axline((1, 1), (10, 10), color=style.QUIET, linestyle=(0, (1, 1.5)), linewidth=1.2)
    axes.grid(True, axis='both')
    for place, (name, props) in enumerate(styles.items()):
        rows = _over_seeds(frame, name, 'direct')
        finite = rows.filter(pl.col('cut') < pl.col('seeds'))
        x, mark = finite['compression'], {'color': props['color'], 'marker': props['marker']}
        band = {'color': props['color'], 'alpha': 0.16, 'linewidth': 0}
        axes.fill_between(x, finite['least'], finite['most'], **band)
        axes.plot(x, finite['effective_compression'], color=props['color'])
        for row in rows.iter_rows(named=True):
            part = style.SOME if 0 < row['cut'] < row['seeds'] else {}
            if row['cut'] < row['seeds']:
                axes.plot(row['compression'], row['effective_compression'], **mark, **part)
            if row['cut']:
                strip.plot(row['compression'], -place, **mark, **part)
    strip.set_ylim(0.8 - len(styles), 0.8)
    strip.set_yticks([(1 - len(styles)) / 2], [f'disconnected\n{text.INFINITE}'])
    strip.set_facecolor('#f4f4f4')
    strip.spines[:].set_visible(False)
    strip.tick_params(which='both', length=0, labelbottom=False)
    strip.grid(False)
    strip.set_title('runs pruned to a direct compression')
    axes.set_xlabel('direct compression')
    axes.set_ylabel('effective compression')


def _key(axes: Axes, styles: dict[str, dict]) -> None:
    """What lines and markers mean."""
    ink = {'color': style.INK}
    handles = [Line2D([], [], linewidth=5, alpha=0.3, **ink, label='dense')]
    handles += [
        Line2D([], [], color=props['color'], marker=props['marker'], label=name)
        for name, props in styles.items()
    ]
    handles += [
        Line2D([], [], **ink, label='pruned to an effective compression,\nagainst it'),
        Line2D([], [], **ink, linestyle='--', label='pruned to a direct compression,\nagainst it'),
        Line2D(
            *([], []),
            **ink,
            linestyle='none',
            marker='o',
            markerfacecolor='white',
            label='hollow: a seed is disconnected (at chance)',
        ),
        Line2D(
            *([], []),
            **ink,
            linestyle='none',
            marker='o',
            **style.SOME,
            label='half-filled: some of the seeds only',
        ),
    ]
    axes.axis('off')
    axes.legend(handles=handles, loc='center', handlelength=2.8, labelspacing=0.6)


# --- the claims -----------------------------------------------------------------------------------
#
# Each check states a claim of the paper in the first line of its docstring, which is printed. One
# method is more accurate than another where the 95 % Student interval of their mean difference
# over seeds, run by run, does not hold zero; otherwise they are equal.

PASS, FAIL, NOTE = 'PASS', 'FAIL', 'note'


class Claim(NamedTuple):
    """What was found.

    Attributes:
      verdict: PASS or FAIL, or NOTE for a finding that no claim depends on.
      finding: what was measured, in words.
    """

    verdict: str
    finding: str


def _judged(holds: bool, finding: str) -> Claim:
    return Claim(PASS if holds else FAIL, finding)


def _cells(frame: pl.DataFrame, name: str, target: str, column: str) -> dict[float, np.ndarray]:
    """Compression -> the column of all runs there, in order of their seeds."""
    rows = frame.filter(pl.col('name') == name, pl.col('target') == target).sort('at', 'seed')
    return {at: part[column].to_numpy() for (at,), part in rows.group_by('at', maintain_order=True)}


def _ratios(frame: pl.DataFrame, name: str) -> dict[float, np.ndarray]:
    """Direct compression -> effective / direct compression of every seed."""
    direct = _cells(frame, name, 'direct', 'compression')
    effective = _cells(frame, name, 'direct', 'effective_compression')
    return {at: effective[at] / direct[at] for at in direct}


def _better(frame: pl.DataFrame, ours: str, theirs: str, target: str) -> dict[float, str]:
    """Compression -> `'+'` where ours is more accurate than theirs, `'-'` where less, or `'='`."""
    first = _cells(frame, ours, target, 'accuracy')
    second = _cells(frame, theirs, target, 'accuracy')
    signs = {}
    for at in sorted(first.keys() & second.keys()):
        low, high = student_interval(first[at] - second[at])
        signs[at] = '+' if low > 0 else '-' if high < 0 else '='
    return signs


def _from_100(signs: dict[float, str]) -> dict[float, str]:
    return {at: sign for at, sign in signs.items() if at >= 100}


def _in_words(signs: dict[float, str]) -> str:
    """`better at 100×, 300×; equal at 1000×`, from the signs of `_better`."""
    words = {'+': 'better', '=': 'equal', '-': 'worse'}
    parts = []
    for sign, word in words.items():
        found = [text.times(at) for at, mark in signs.items() if mark == sign]
        parts += [f'{word} at {", ".join(found)}'] if found else []
    return '; '.join(parts)


def _list(found: Iterable[tuple[str, float]]) -> str:
    return ', '.join(f'{value} at {text.times(at)}' for value, at in found)


def random_weights_are_idle(frame: pl.DataFrame) -> list[Claim]:
    """Random pruning's effective compression is orders of magnitude above its direct one.

    At 100 the known median of 20 networks is 10.4 times, their smallest 7.8 times (`table.py`).
    """
    median = {at: float(np.median(r)) for at, r in _ratios(frame, 'random, uniform').items()}
    holds = median[100] >= 7.78 and all(median[at] >= 10 for at in median if at > 100)
    found = _list((f'{m:.3g}', at) for at, m in median.items())
    return [_judged(holds, f'random, uniform: effective / direct compression, medians: {found}')]


def synflow_weights_work(frame: pl.DataFrame) -> list[Claim]:
    """SynFlow's effective compression is its direct one, up to what the last cut leaves."""
    worst = max(ratio.max() for ratio in _ratios(frame, 'SynFlow').values())
    return [_judged(worst < 1.05, f'SynFlow: effective / direct compression at most {worst:.3f}')]


def igq_is_the_best_allocation(frame: pl.DataFrame) -> list[Claim]:
    """IGQ loses the fewest weights of all allocations, and is the most accurate, from 100 on."""
    ratios = {name: _ratios(frame, name) for name in LAYERWISE}
    others = [name for name in LAYERWISE if name != IGQ]
    claims = []
    for other in others:
        pairs = [
            (at, np.median(ratios[IGQ][at]), np.median(ratios[other][at]))
            for at in ratios[other]
            if at >= 100
        ]
        # Where most networks of both are disconnected neither is better.
        holds = all(
            ours < theirs or (math.isinf(ours) and math.isinf(theirs)) for _, ours, theirs in pairs
        )
        found = _list((f'{ours:.3g} : {theirs:.3g}', at) for at, ours, theirs in pairs)
        claims.append(_judged(holds, f'IGQ : {other[8:]}, effective / direct compression: {found}'))
    for other in others:
        signs = _from_100(_better(frame, IGQ, other, 'direct'))
        holds = '+' in signs.values() and '-' not in signs.values()
        finding = f'IGQ against {other[8:]}, accuracy at direct compression: {_in_words(signs)}'
        claims.append(_judged(holds, finding))
    for other in others:
        signs = _from_100(_better(frame, IGQ, other, 'effective'))
        finding = f'IGQ against {other[8:]}, accuracy at effective compression: {_in_words(signs)}'
        claims.append(Claim(NOTE, finding))
    return claims


def methods_part(frame: pl.DataFrame) -> list[Claim]:
    """Methods differ little up to 30 and much beyond."""
    cells = {name: _cells(frame, name, 'direct', 'accuracy') for name in NAMES.values()}
    spread = {}
    for at in cells[IGQ]:
        means = [of[at].mean() for of in cells.values() if at in of]
        spread[at] = max(means) - min(means)
    holds = all(points <= 5 for at, points in spread.items() if at <= 30) and spread[100] >= 20
    found = _list((f'{points:.1f}', at) for at, points in spread.items())
    return [_judged(holds, f'best minus worst mean accuracy, points, at direct: {found}')]


def igq_against_scores(frame: pl.DataFrame) -> list[Claim]:
    """Random pruning with a good allocation is as good as scores, or better."""
    claims = []
    for other in ('magnitude', 'SNIP'):
        for target in SHOWN:
            signs = _from_100(_better(frame, IGQ, other, target))
            finding = f'IGQ against {other}, accuracy at {target} compression: {_in_words(signs)}'
            if (other, target) == ('magnitude', 'direct'):
                claims.append(_judged('-' not in signs.values(), finding))
            else:
                claims.append(Claim(NOTE, finding))
    return claims


def the_order_changes(frame: pl.DataFrame) -> list[Claim]:
    """Which of two methods is more accurate depends on which compression is equal."""
    names, found = list(NAMES.values()), []
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            direct = _better(frame, first, second, 'direct')
            effective = _better(frame, first, second, 'effective')
            for at in direct.keys() & effective.keys():
                if {direct[at], effective[at]} == {'+', '-'}:
                    over = (first, second) if direct[at] == '+' else (second, first)
                    found.append(
                        (' over '.join(name.removeprefix('random, ') for name in over), at)
                    )
    found.sort(key=lambda pair: pair[1])
    finding = 'better at equal direct but worse at equal effective compression'
    return [_judged(bool(found), f'{finding}: {_list(found) or "no method"}')]


CLAIMS: tuple[Callable[[pl.DataFrame], list[Claim]], ...] = (
    random_weights_are_idle,
    synflow_weights_work,
    igq_is_the_best_allocation,
    methods_part,
    igq_against_scores,
    the_order_changes,
)


if __name__ == '__main__':
    sys.exit(main())
