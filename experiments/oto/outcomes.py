"""Tables, verdicts and figures of the study, from its sweeps."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from jaxprune.report import markdown, style

HEAD = """\
# Outcomes of the study of Only-Train-Once

Intervals: Student's, of 95 %, for the mean over seeds; differences are paired by seed. "Holds" and
"reversed": the interval lies above or below zero; else "open". Nothing is corrected for how many
intervals there are. The networks and their recipe: [README](README.md)."""

NAMES = {
    'vgg': 'VGG, CIFAR-10',
    'lenet5': 'LeNet-5, Fashion-MNIST',
    'transformer': 'transformer, Fashion-MNIST',
}
ONCE = ('HSPG', 'DHSPG', 'HESSO')
LASSO, BASE = 'group lasso', 'prune, then fine-tune'
METHODS = (*ONCE, LASSO, BASE)
SHORT = ('HSPG', LASSO)
TICKS = (1, 2, 5, 10, 20, 50, 100)
ACCURACY, COSTS = 'compact_accuracy', ('flops_compact', 'params_compact')


class Sweep(NamedTuple):
    """A finished sweep.

    Attributes:
      results: see `store.RESULTS`.
      flow: see `store.FLOW`.
    """

    results: pl.DataFrame
    flow: pl.DataFrame


def last_rows(sweep: Sweep) -> pl.DataFrame:
    """The last row of each run, with the groups that were zero before its last round."""
    rows = sweep.results.filter(pl.col('step') == pl.col('step').max().over('run_id'))
    watched = sweep.flow.filter(quantity='zero_groups')
    before = watched.filter(pl.col('rounds') < pl.col('rounds').max().over('run_id'))
    zero = (
        before.group_by('run_id', 'step', 'rounds')
        .agg(pl.col('value').sum())
        .sort('step', 'rounds')
        .group_by('run_id', maintain_order=True)
        .agg(pl.col('value').last().alias('zero'))
    )
    gone = watched.sort('step', 'rounds').group_by('run_id', 'step', 'rounds', maintain_order=True)
    gone = gone.agg(pl.col('value').sum()).group_by('run_id', maintain_order=True)
    cut = gone.agg(pl.col('value').last().alias('gone'))
    return rows.join(zero, on='run_id', how='left').join(cut, on='run_id', how='left')


def written(sweeps: Mapping[str, Sweep]) -> str:
    """All tables and verdicts as markdown."""
    parts = [HEAD]
    for name, title in NAMES.items():
        rows = last_rows(sweeps[name])
        parts += [f'## {title}', *accuracy_tables(rows, sweeps[name].results)]
        parts += [against_fine_tuning(rows)]
    parts += ['## Zero groups at equal loss', penalties_table(last_rows(sweeps['penalties']))]
    return '\n\n'.join(parts) + '\n'


def densities(rows: pl.DataFrame) -> list[float]:
    """Compressions of the pruned runs, rising."""
    return sorted(set(rows.filter(pl.col('method') != 'dense')['target_compression']))


def percent(values: np.ndarray) -> str:
    return markdown.interval(100 * np.asarray(values, float), 1)


def by_seed(rows: pl.DataFrame, label: str, compression: float, column: str) -> np.ndarray:
    own = rows.filter(pl.col('label') == label, pl.col('target_compression') == compression)
    return own.sort('seed')[column].to_numpy()


def accuracy_tables(rows: pl.DataFrame, results: pl.DataFrame) -> list[str]:
    """Accuracies by share of groups left, and what the networks cost."""
    every = densities(rows)
    dense = results.filter(pl.col('method') == 'dense')
    dense = dense.filter(pl.col('step') == pl.col('step').max())['test_accuracy']
    table = [['method', *(f'{100 / c:.0f} %' for c in every)]]
    for label in present(rows):
        cells = [percent(by_seed(rows, label, c, 'compact_accuracy')) for c in every]
        table.append([label, *cells])
    costs = [
        ['method', 'groups left', 'parameters', 'FLOPs', 'times as fast', 'zero before the cut',
         'full', 'compact', 'largest difference of logits'],
    ]  # fmt: skip
    base = rows.filter(pl.col('method') == 'dense')
    whole = base['params_compact'][0], base['flops_compact'][0]
    for label in present(rows):
        for c in every:
            own = rows.filter(pl.col('label') == label, pl.col('target_compression') == c)
            zero = own['zero'] / own['gone'] if own['zero'].null_count() == 0 else None
            costs.append([
                label, f'{100 / c:.0f} %',
                f'{100 * own["params_compact"].mean() / whole[0]:.1f} %',
                f'{100 * own["flops_compact"].mean() / whole[1]:.1f} %',
                f'{own["latency_ratio"].mean():.2f}',
                '' if zero is None else f'{100 * zero.mean():.0f} %',
                f'{100 * own["full_accuracy"].mean():.1f}',
                f'{100 * own["compact_accuracy"].mean():.1f}',
                f'{own["compact_difference"].max():.1g}',
            ])  # fmt: skip
    return [
        f'Accuracy of the compact network in %, by share of groups left; dense: {percent(dense)}.',
        markdown.table(table[0], table[1:]),
        'Full: the network as training left it. Compact: cut out. Zero before the cut: of the '
        'groups that were removed. Times as fast: the dense network over the compact one, 64 '
        'images on this CPU.',
        markdown.table(costs[0], costs[1:]),
    ]


def present(rows: pl.DataFrame) -> list[str]:
    return [label for label in METHODS if label in set(rows['label'])]


def against_fine_tuning(rows: pl.DataFrame) -> str:
    """Each method against prune-then-fine-tune, in points of accuracy."""
    table = [['method', *(f'{100 / c:.0f} %' for c in densities(rows))]]
    for label in present(rows):
        if label == BASE:
            continue
        cells = []
        for c in densities(rows):
            ours, theirs = (by_seed(rows, name, c, 'compact_accuracy') for name in (label, BASE))
            cells.append(markdown.verdict(100 * (ours - theirs), 1))
        table.append([label, *cells])
    said = f'Points of accuracy above "{BASE}" at equal steps:'
    return f'{said}\n\n{markdown.table(table[0], table[1:])}'


def penalties_table(rows: pl.DataFrame) -> str:
    """Zero groups and losses by penalty; and HSPG's where it has no more loss than the lasso."""
    rows = rows.filter(pl.col('method') != 'dense')
    table = [['method, penalty', 'zero filters of 112', 'training loss', 'accuracy in %']]
    for label in dict.fromkeys(rows['label']):
        own = rows.filter(pl.col('label') == label)
        table.append([
            label, markdown.interval(own['zero'].to_numpy(), 1),
            markdown.interval(own['train_loss'].to_numpy(), 3), percent(own['test_accuracy']),
        ])  # fmt: skip
    lines = []
    for label in (name for name in dict.fromkeys(rows['label']) if name.startswith(LASSO)):
        more = at_equal_loss(rows, label)
        said = 'no HSPG run has so small a loss' if more is None else markdown.verdict(more, 1)
        lines.append(f'- {label}: {said}')
    text = (
        'HSPG minus group lasso, in zero filters: for each seed the HSPG run with most of them '
        'among those whose training loss is no larger.'
    )
    return '\n\n'.join([markdown.table(table[0], table[1:]), text, '\n'.join(lines)])


def at_equal_loss(rows: pl.DataFrame, label: str) -> np.ndarray | None:
    """By seed, how many more zero groups HSPG has at no larger a training loss."""
    more = []
    for row in rows.filter(pl.col('label') == label).sort('seed').iter_rows(named=True):
        rivals = rows.filter(
            pl.col('method') == 'hspg',
            pl.col('seed') == row['seed'],
            pl.col('train_loss') <= row['train_loss'],
        )
        if rivals.is_empty():
            return None
        more.append(rivals['zero'].max() - row['zero'])
    return np.array(more, float)


# --- figures ------------------------------------------------------------------------------------


def figures(sweeps: Mapping[str, Sweep]) -> dict[str, bytes]:
    return {
        'accuracy': style.png(accuracy_figure(sweeps)),
        'zero_groups': style.png(zero_figure(sweeps)),
        'penalties': style.png(penalties_figure(last_rows(sweeps['penalties']))),
    }


def accuracy_figure(sweeps: Mapping[str, Sweep]) -> Figure:
    """Accuracy of compact networks against FLOPs and parameters left."""
    styles = style.lines(METHODS)
    with style.context():
        drawing = style.figure(style.WIDTH, 6.4)
        grid = drawing.subplots(2, len(NAMES), sharey='col')
        shown = {}
        for place, (name, title) in enumerate(NAMES.items()):
            rows = last_rows(sweeps[name])
            dense = rows.filter(pl.col('method') == 'dense')
            for axes, column in zip(
                grid[:, place], ('flops_compact', 'params_compact'), strict=True
            ):
                whole = dense[column][0]
                for label in present(rows):
                    own = rows.filter(pl.col('label') == label)
                    points = own.group_by('target_compression').agg(
                        pl.col(column).mean() / whole * 100, pl.col(ACCURACY).mean() * 100
                    )
                    points = points.sort('target_compression')
                    shown[label] = axes.plot(
                        points[column], points['compact_accuracy'], **styles[label]
                    )[0]
                axes.axhline(100 * dense['test_accuracy'].mean(), color='0.5', linewidth=0.8)
                axes.set_xscale('log')
                axes.set_xticks(TICKS, labels=map(str, TICKS))
                axes.set_xticks([], minor=True)
                axes.set_xlabel(f'{"FLOPs" if column.startswith("f") else "parameters"} left (%)')
            grid[0, place].set_title(title)
        for row in grid:
            row[0].set_ylabel('test accuracy (%)')
        drawing.legend(shown.values(), shown, loc='outside upper center', ncols=3, frameon=False)
        return drawing


def zero_figure(sweeps: Mapping[str, Sweep]) -> Figure:
    """Groups that are zero along training, where 30 % of them are to be left."""
    styles = style.lines(METHODS)
    with style.context():
        drawing = style.figure(style.WIDTH, 3.2)
        panels = drawing.subplots(1, len(NAMES))
        shown = {}
        for axes, (name, title) in zip(panels, NAMES.items(), strict=True):
            sweep = sweeps[name]
            every = densities(sweep.results)
            compression = min(every, key=lambda c: abs(1 / c - 0.3))
            runs = sweep.results.filter(pl.col('target_compression') == compression)
            runs = runs.select('run_id', 'label').unique()
            zero = sweep.flow.filter(quantity='zero_groups').join(runs, on='run_id')
            zero = zero.group_by('run_id', 'label', 'step', 'rounds').agg(pl.col('value').sum())
            means = zero.group_by('label', 'step', 'rounds').agg(pl.col('value').mean())
            for label in present(runs):
                own = means.filter(pl.col('label') == label).sort('step', 'rounds')
                if not own.is_empty():
                    props = {**styles[label], 'marker': ''}
                    shown[label] = axes.plot(own['step'], own['value'], **props)[0]
            axes.set_title(title)
            axes.set_xlabel('step')
        panels[0].set_ylabel('zero groups, 30 % to be left')
        drawing.legend(shown.values(), shown, loc='outside upper center', ncols=4, frameon=False)
        return drawing


def penalties_figure(rows: pl.DataFrame) -> Figure:
    """Zero groups against the training loss, a point for each seed and penalty."""
    styles = style.lines(METHODS)
    with style.context():
        drawing = style.figure(5.0, 3.4)
        axes = drawing.subplots()
        for label in SHORT:
            own = rows.filter(pl.col('label').str.starts_with(label))
            props = {**styles[label], 'linestyle': ''}
            axes.plot(own['train_loss'], own['zero'], label=label, **props)
        axes.set_xlabel('training loss in the last epoch')
        axes.set_ylabel('zero filters of 112')
        axes.legend(frameon=False)
        return drawing
