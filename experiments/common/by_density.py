"""Accuracies of a sweep's runs at their ends, by the density that was asked for."""

import numpy as np
import polars as pl


def last_rows(results: pl.DataFrame) -> pl.DataFrame:
    """The last row of each run, with the compression that was asked for as a density in percent."""
    rows = results.filter(pl.col('step') == pl.col('step').max().over('run_id'))
    return rows.with_columns(percent=(100 / pl.col('target_compression')).round(6))


def densities(rows: pl.DataFrame) -> list[float]:
    """Densities of pruned runs in percent, falling."""
    return sorted(set(rows.filter(pl.col('method') != 'dense')['percent']), reverse=True)


def by_seed(rows: pl.DataFrame, label: str, percent: float = 100.0) -> np.ndarray:
    """Accuracies in percent, by seed."""
    own = rows.filter(pl.col('label') == label, pl.col('percent') == percent)
    return 100 * own.sort('seed')['test_accuracy'].to_numpy()
