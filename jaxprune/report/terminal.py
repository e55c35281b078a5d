"""The summary as a table for a terminal."""

import polars as pl
from rich import box
from rich.table import Table

from jaxprune.report.tables import setting_columns


def summary_table(summary: pl.DataFrame) -> Table:
    """Mean test accuracy in percent, methods down and compressions across.

    Args:
      summary: from `report.tables.summary`.

    Returns:
      A table; `!` marks a cell where a seed lost a whole layer.
    """
    keys = setting_columns(summary)
    compressions = summary['target_compression'].unique().sort().to_list()
    table = Table(box=box.SIMPLE, title='test accuracy in %, mean over seeds, by compression')
    for column in (*keys, 'method'):
        table.add_column(column)
    for compression in compressions:
        table.add_column(f'{compression:g}', justify='right')
    for group, rows in summary.group_by(*keys, 'label', maintain_order=True):
        cells = dict.fromkeys(compressions, '')
        for row in rows.iter_rows(named=True):
            accuracy = '-' if row['accuracy'] is None else f'{100 * row["accuracy"]:.1f}'
            cells[row['target_compression']] = accuracy + ('!' if row['collapsed'] else '')
        table.add_row(*map(str, group), *cells.values())
    if summary['collapsed'].sum():
        table.caption = '! = a whole layer was pruned away in at least one seed'
    return table
