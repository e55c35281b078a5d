"""Tables, verdicts and figures of the study, from its estimates."""

from collections.abc import Sequence

import numpy as np
import polars as pl
from estimates import BATCHES, BEFORE, ESTIMATES, EXAMPLES, FIRST, NORM, ORACLE, SECOND, SHAPLEY
from matplotlib.axes import Axes
from scipy.stats import pearsonr, spearmanr
from trained import TITLES

from jaxprune.report import markdown, style
from jaxprune.stats import student_interval

HEAD = """\
# Outcomes of the study of Taylor's importance

Intervals: Student's, of 95 %, for the mean over seeds; differences are paired by seed. The
networks, and what all this says: [README](README.md)."""
#: Pearson's correlation of Taylor on gates with the oracle that the paper gives.
PUBLISHED = 0.93
#: Smaller changes are drawn here.
LEAST = 1e-6
KINDS = {'Pearson': pearsonr, 'Spearman': spearmanr}


def written(table: pl.DataFrame) -> str:
    """Everything as markdown."""
    nets = [net for net in TITLES if net in set(table['net'])]
    return (
        '\n\n'.join(
            [HEAD, sizes_text(table, nets), *_tables(table, nets), claims_text(table, nets)]
        )
        + '\n'
    )


def correlation(table: pl.DataFrame, net: str, estimate: str, column: str, kind: str) -> np.ndarray:
    """Of an estimate with the oracle over all units of the network, by seed; NaN if it has none."""
    found = []
    of_net = table.filter(pl.col('net') == net)
    for (_,), own in of_net.sort('seed').group_by('seed', maintain_order=True):
        values = [
            own.filter(pl.col('estimate') == name).sort('depth', 'unit')[column].to_numpy()
            for name in (ORACLE, estimate)
        ]
        there = len(values[1]) and np.isfinite(values[1]).all()
        found.append(KINDS[kind](*values).statistic if there else np.nan)
    return np.array(found)


def sizes_text(table: pl.DataFrame, nets: Sequence[str]) -> str:
    """How large the exact changes are."""
    rows = []
    for net in nets:
        own = table.filter((pl.col('net') == net) & (pl.col('estimate') == ORACLE))
        for (layer,), of in own.sort('depth').group_by('layer', maintain_order=True):
            by_seed = of.group_by('seed').agg(
                units=pl.len(),
                mean=pl.col('signed').mean(),
                largest=pl.col('signed').max(),
                negative=100 * (pl.col('signed') < 0).mean(),
            )
            cells = [f'{by_seed[c].mean():.3g}' for c in ('mean', 'largest', 'negative')]
            rows.append([TITLES[net], layer, by_seed['units'][0], *cells])
    head = ['net', 'layer', 'units', 'mean', 'largest', 'below zero (%)']
    return '\n'.join(
        [
            '## What the loss gains without a unit',
            '',
            'On the training examples that estimates see; means over seeds.',
            '',
            markdown.table(head, rows),
        ]
    )


def _tables(table: pl.DataFrame, nets: Sequence[str]) -> list[str]:
    parts = []
    for net in nets:
        rows = []
        for name in ESTIMATES:
            cells = [
                _cell(correlation(table, net, name, column, kind))
                for column in ('square', 'signed')
                for kind in KINDS
            ]
            if any(cells):
                rows.append([name, *cells])
        head = [
            '',
            *(f'{kind}, {what}' for what in ('squares', 'signed changes') for kind in KINDS),
        ]
        parts.append(
            '\n'.join(
                [
                    f'## Correlations with the oracle: {TITLES[net]}',
                    '',
                    'Over all units: of squared changes, as in the paper, and of signed ones.',
                    '',
                    markdown.table(head, rows),
                ]
            )
        )
    return parts


def _cell(values: np.ndarray) -> str:
    if not np.isfinite(values).all():
        return ''
    return markdown.interval(values, 3)


def claims_text(table: pl.DataFrame, nets: Sequence[str]) -> str:
    """What the paper says, by number."""
    rows = []
    for net in nets:

        def of(name: str, kind: str = 'Pearson', net=net) -> np.ndarray:
            return correlation(table, net, name, 'square', kind)

        claims = {
            f'{n}: Pearson above {PUBLISHED}': of(n) - PUBLISHED
            for n in (FIRST, BATCHES, EXAMPLES, SECOND)
        }
        for kind in KINDS:
            claims |= {
                f'{SECOND} above {FIRST}, {kind}': of(SECOND, kind) - of(FIRST, kind),
                f'{FIRST} above {NORM}, {kind}': of(FIRST, kind) - of(NORM, kind),
                f'{FIRST} above {SHAPLEY}, {kind}': of(FIRST, kind) - of(SHAPLEY, kind),
                f'{BATCHES} above {FIRST}, {kind}': of(BATCHES, kind) - of(FIRST, kind),
                f'{EXAMPLES} above {FIRST}, {kind}': of(EXAMPLES, kind) - of(FIRST, kind),
                f'{BATCHES} above {EXAMPLES}, {kind}': of(BATCHES, kind) - of(EXAMPLES, kind),
                f'{FIRST} above {BEFORE}, {kind}': of(FIRST, kind) - of(BEFORE, kind),
            }
        rows += [[TITLES[net], claim, markdown.verdict(v, 3)] for claim, v in claims.items()]
    return '\n'.join(
        [
            '## Claims',
            '',
            'Of squares. "holds" if the interval lies above zero, "reversed" if below, "open" if '
            'neither.',
            '',
            markdown.table(['net', 'claim', ''], rows),
        ]
    )


# --- figures ------------------------------------------------------------------------------------


def figures(table: pl.DataFrame) -> dict[str, bytes]:
    """Name -> PNG."""
    nets = [net for net in TITLES if net in set(table['net'])]
    return {'correlations': draw_correlations(table, nets), 'scatter': draw_scatter(table, nets)}


def draw_correlations(table: pl.DataFrame, nets: Sequence[str]) -> bytes:
    """Pearson's and Spearman's correlations of squares, with intervals."""
    colors = {'Pearson': '#0072B2', 'Spearman': '#D55E00'}
    with style.context():
        drawing = style.figure(style.WIDTH, 4.4)
        grid = drawing.add_gridspec(1, len(nets))
        for column, net in enumerate(nets):
            axes = drawing.add_subplot(grid[0, column])
            for place, name in enumerate(ESTIMATES):
                for (kind, color), shift in zip(colors.items(), (-0.15, 0.15), strict=True):
                    values = correlation(table, net, name, 'square', kind)
                    label = kind if place == 0 else None
                    if np.isfinite(values).all():
                        low, high = student_interval(values)
                        at = place + shift
                        axes.plot([low, min(high, 1)], [at, at], color=color, linewidth=1.2)
                        axes.plot(values.mean(), at, 'o', color=color, markersize=5, label=label)
            axes.axvline(PUBLISHED, color=style.QUIET, linewidth=0.8, linestyle=':')
            axes.set_yticks(
                range(len(ESTIMATES)), ESTIMATES if column == 0 else [''] * len(ESTIMATES)
            )
            axes.set_ylim(len(ESTIMATES) - 0.5, -0.5)
            axes.set_xlim(-0.4, 1.03)
            axes.set_title(TITLES[net])
            axes.set_xlabel(f'correlation of squares with the oracle; dotted: {PUBLISHED}')
        handles, labels = axes.get_legend_handles_labels()
        drawing.legend(handles, labels, loc='outside upper center', ncols=2)
        return style.png(drawing)


def draw_scatter(table: pl.DataFrame, nets: Sequence[str]) -> bytes:
    """The units of the first seed behind the correlations."""
    shown = (FIRST, SECOND, SHAPLEY, NORM)
    seed = table['seed'].min()
    with style.context():
        drawing = style.figure(style.WIDTH, 0.4 + 2.6 * len(nets))
        grid = drawing.add_gridspec(len(nets), len(shown))
        for row, net in enumerate(nets):
            own = table.filter((pl.col('net') == net) & (pl.col('seed') == seed))
            exact = own.filter(pl.col('estimate') == ORACLE).sort('depth', 'unit')
            for column, name in enumerate(shown):
                axes = drawing.add_subplot(grid[row, column])
                of = own.filter(pl.col('estimate') == name).sort('depth', 'unit')
                _scatter(axes, exact, of)
                axes.set_title(f'{TITLES[net].split(",")[0]}: {name}')
                axes.set_xlabel('exact change of the loss')
                axes.set_ylabel('weight norm' if name == NORM else 'estimate')
                if name != NORM:
                    _identity(axes)
        drawing.suptitle(
            f'A point per unit, without its sign, at least {LEAST:g}; paler: nearer to the input; '
            'line: equal',
            fontsize=10,
        )
        return style.png(drawing)


def _scatter(axes: Axes, exact: pl.DataFrame, of: pl.DataFrame) -> None:
    """Sizes on logarithmic axes: a few units change the loss a thousand times as much as most."""
    depth = exact['depth'].to_numpy()
    for layer in np.unique(depth):
        here, shade = depth == layer, 0.75 - 0.75 * layer / max(depth.max(), 1)
        x, y = (np.abs(f['signed'].to_numpy()[here]).clip(LEAST) for f in (exact, of))
        axes.plot(x, y, '.', markersize=4, color=str(shade))
    axes.set_xscale('log')
    axes.set_yscale('log')
    if np.abs(of['signed'].to_numpy()).min() > 0.1:  # less than two decades
        axes.set_yscale('linear')


def _identity(axes: Axes) -> None:
    low, high = axes.get_xlim()
    axes.plot(
        [low, high],
        [low, high],
        color='#0072B2',
        linewidth=0.8,
        zorder=0,
        scalex=False,
        scaley=False,
    )
