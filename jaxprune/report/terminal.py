"""The summary as a table for a terminal."""

import polars as pl
from rich import box
from rich.table import Table

from jaxprune.report import text
from jaxprune.report.tables import setting_columns


def summary_table(summary: pl.DataFrame) -> Table:
    """Mean test accuracy in percent, methods down and compressions across.

    Args:
      summary: from `report.tables.summary`.

    Returns:
      A table; `!` marks a cell where a seed lost a whole layer or every path from input to output,
      `x` one where a seed diverged.
      The last column is the effective compression at the largest target compression.
    """
    keys = setting_columns(summary)
    compressions = summary['target_compression'].unique().sort().to_list()
    table = Table(box=box.SIMPLE, title='test accuracy in %, mean over seeds, by compression')
    for column in (*keys, 'method'):
        table.add_column(column)
    for compression in compressions:
        table.add_column(f'{compression:g}', justify='right')
    table.add_column(f'effective at {compressions[-1]:g}', justify='right')
    for group, rows in summary.group_by(*keys, 'label', maintain_order=True):
        cells, effective = dict.fromkeys(compressions, ''), ''
        for row in rows.iter_rows(named=True):
            accuracy = '-' if row['accuracy'] is None else f'{100 * row["accuracy"]:.1f}'
            failed = row['collapsed'] or row['disconnected']
            marks = ('!' if failed else '') + ('x' if row['diverged'] else '')
            cells[row['target_compression']] = accuracy + marks
            if row['target_compression'] == compressions[-1]:
                effective = text.effective(row)
        table.add_row(*map(str, group), *cells.values(), effective)
    captions = []
    if summary['collapsed'].sum() or summary['disconnected'].sum():
        captions.append('! = a whole layer, or every path, was pruned away in at least one seed')
    if summary['diverged'].sum():
        captions.append('x = at least one seed diverged: a loss is NaN or infinite')
    table.caption = '\n'.join(captions) or None
    return table
