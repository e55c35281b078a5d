"""Quantities recorded along training: a panel for each quantity and compression."""

import polars as pl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxprune import flow, method
from jaxprune.report import style, tables, text
from jaxprune.report.curves import CONTROL
from jaxprune.types import GLOBAL

#: Compressions a figure shows, evenly chosen.
MOST_COLUMNS = 3


def whole(recorded: pl.DataFrame) -> pl.DataFrame:
    """A value per run, moment and quantity: layers combined as the quantity's entry requires.

    A step at which a run is pruned may hold two moments, which differ in `rounds`.

    Args:
      recorded: rows of `store.read_flow`.
    """
    together = {name: entry.together for name, entry in flow.QUANTITIES.items()}
    together |= dict.fromkeys(method.WATCHED, 'sum')
    how = pl.col('quantity').replace_strict(together, default='mean')
    own = (pl.col('path') == GLOBAL).any().over('run_id', 'step', 'rounds', 'quantity')
    rows = recorded.with_columns(how=how).filter((pl.col('path') == GLOBAL) | ~own)
    value = pl.col('value')
    return (
        rows.group_by('run_id', 'step', 'rounds', 'quantity', 'how', maintain_order=True)
        .agg(norm=(value**2).sum().sqrt(), sum=value.sum(), mean=value.mean())
        .with_columns(
            value=pl.when(pl.col('how') == 'norm')
            .then('norm')
            .when(pl.col('how') == 'sum')
            .then('sum')
            .otherwise('mean')
        )
        .select('run_id', 'step', 'rounds', 'quantity', 'value')
    )


def means(results: pl.DataFrame, recorded: pl.DataFrame) -> pl.DataFrame:
    """Means over seeds, numbers that are not finite left out (null if none is).

    Returns:
      Settings, `label`, `method`, `target_compression`, `quantity`, `step`, `rounds`, `value`.
    """
    keys = [*tables.settings(results), 'label', 'method', 'target_compression']
    runs = results.select('run_id', *keys).unique(maintain_order=True)
    return (
        whole(recorded)
        .join(runs, on='run_id', maintain_order='left')
        .group_by([*keys, 'quantity', 'step', 'rounds'], maintain_order=True)
        .agg(pl.col('value').filter(pl.col('value').is_finite()).mean())
        .sort('step', 'rounds', maintain_order=True)
    )


def of_masks(results: pl.DataFrame) -> pl.DataFrame:
    """What masks and predictions have done by each evaluation, as rows of `means`.

    Runs whose masks do not move have no row but for churn.

    Args:
      results: rows of `store.read_results`.
    """
    keys = [*tables.settings(results), 'label', 'method', 'target_compression']
    moving = pl.col('mask_change').is_not_null()
    density = pl.when(moving).then(pl.col('density')).alias('density')
    names = ['density', *method.MASK_FIGURES, 'churn']
    return (
        results.with_columns(density)
        .unpivot(names, index=[*keys, 'step'], variable_name='quantity')
        .filter(pl.col('value').is_finite())
        .group_by([*keys, 'quantity', 'step'], maintain_order=True)
        .agg(pl.col('value').mean())
        .with_columns(rounds=pl.lit(0))
        .sort('step', maintain_order=True)
    )


def quantities(frame: pl.DataFrame, styles: dict[str, dict]) -> Figure:
    """Rows of quantities, columns of compressions, a line per method and the dense control.

    Args:
      frame: rows of `means`, of one setting.
      styles: label -> line, see `style.lines`.
    """
    names = frame['quantity'].unique(maintain_order=True).to_list()
    pruned = frame.filter(pl.col('method') != tables.DENSE)
    every = sorted(set(pruned['target_compression'])) or [1.0]
    columns = tables.evenly(every, MOST_COLUMNS)
    control = frame.filter(pl.col('method') == tables.DENSE)
    with style.context():
        drawing = style.figure(style.WIDTH, 2.1 * len(names) + 0.6)
        grid = drawing.add_gridspec(len(names), len(columns))
        shown: dict = {}
        tops: dict = {}  # one time axis for all rows of a column
        for row, name in enumerate(names):
            first = None
            for column, compression in enumerate(columns):
                axes = drawing.add_subplot(grid[row, column], sharey=first, sharex=tops.get(column))
                first = first or axes
                tops.setdefault(column, axes)
                here = pruned.filter(
                    (pl.col('quantity') == name) & (pl.col('target_compression') == compression)
                )
                for label in tables.labels(here):
                    of = here.filter(pl.col('label') == label)
                    props = {**styles[label], 'marker': ''}
                    shown[label] = axes.plot(of['step'], of['value'], **props)[0]
                of = control.filter(pl.col('quantity') == name)
                if of.height:
                    shown[tables.DENSE] = axes.plot(of['step'], of['value'], **CONTROL)[0]
                axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
                axes.tick_params(labelleft=column == 0, labelbottom=row == len(names) - 1)
                if not row:
                    axes.set_title(f'compression {text.number(compression)}')
                if not column:
                    axes.set_ylabel(name.replace('_', ' '))
                if row == len(names) - 1:
                    axes.set_xlabel('step')
        drawing.legend(
            shown.values(),
            [style.wrapped(label) for label in shown],
            loc='outside upper center',
            ncols=min(len(shown), 4),
            frameon=False,
        )
        return drawing
