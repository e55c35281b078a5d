"""Summary frames of a sweep, from the rows that `jaxprune.sweep.store` reads.

A *setting* is a combination of everything that is trained differently: model, data set, learning
rate, weight decay and any further column of a grid. Nothing here averages over settings: whichever
of these columns varies becomes a leading key of every frame.
"""

import math

import polars as pl

from jaxprune.stats import student_interval
from jaxprune.sweep import store

DENSE = 'dense'
"""The method of the control runs."""

LIMITS = (1, 5)
"""How many points below dense still count as working."""

_SETTINGS = ('model', 'dataset', 'learning_rate', 'weight_decay')
_DENSE_ROW = pl.col('method') == DENSE
_EFFECTIVE = pl.col('effective_compression')
_COMPUTED = _EFFECTIVE.filter(_EFFECTIVE.is_not_nan())
_SPEEDUP = pl.col('speedup_theoretical')
_CONNECTED = _COMPUTED.filter(_COMPUTED.is_finite())


def settings(results: pl.DataFrame) -> list[str]:
    """Names of the columns that distinguish settings: those that vary."""
    known = {*store.RESULTS, *store.CURVES} - {*_SETTINGS}
    candidates = [c for c in results.columns if c not in known]
    return [column for column in candidates if results[column].n_unique() > 1]


def labels(frame: pl.DataFrame) -> list[str]:
    """Method labels in order of appearance, the dense control left out."""
    return frame.filter(~_DENSE_ROW)['label'].unique(maintain_order=True).to_list()


def final(results: pl.DataFrame) -> pl.DataFrame:
    """The last evaluation of every run, one row per run, in the order of `results`.

    Adds `diverged`: a loss or the accuracy that was measured last is not a finite number.
    """
    diverged = pl.any_horizontal(
        pl.col('train_loss', 'test_loss', 'test_accuracy').is_finite().not_().fill_null(False)
    )
    return (
        results.group_by('run_id', maintain_order=True)
        .agg(pl.exclude('run_id').sort_by('step').last())
        .with_columns(
            diverged=diverged,
            target_compression=pl.when(_DENSE_ROW).then(1.0).otherwise('target_compression'),
        )
    )


def collapsed(results: pl.DataFrame, layers: pl.DataFrame) -> pl.DataFrame:
    """Runs that lost a whole layer.

    Returns:
      `run_id`, settings, `label`, `target_compression`, `compression`, `seed`, and `layers`, the
      list of paths with no weight left.
    """
    empty = (
        layers.filter((pl.col('kept') == 0) & (pl.col('size') > 0))
        .group_by('run_id', maintain_order=True)
        .agg(layers='path')
    )
    return (
        final(results)
        .select(
            'run_id',
            *settings(results),
            'label',
            'target_compression',
            'compression',
            'seed',
        )
        .join(empty, on='run_id', how='inner', maintain_order='left')
    )


def _geometric(values: pl.Expr) -> pl.Expr:
    """Compressions are read on a logarithmic axis; there their middle is the geometric mean."""
    return values.log().mean().exp()


def _with_params_ratio(runs: pl.DataFrame, keys: list[str]) -> pl.DataFrame:
    """Adds `params_ratio`: parameters of the dense control over those of the compact network.

    Both are of the same setting, where the network may be another. Null if no control of the
    setting has finished, or if the parameters were not counted.
    """
    dense = pl.col('params_compact').filter(_DENSE_ROW).max()
    ratio = (dense / pl.col('params_compact')).alias('params_ratio')
    parts = [part.with_columns(ratio) for _, part in split(runs, keys)]
    return pl.concat(parts) if parts else runs.with_columns(ratio)


def _in_order(frame: pl.DataFrame, keys: list[str], names: list[str], *last) -> pl.DataFrame:
    """By setting; in each, dense first, then labels as in `names` with rising compression."""
    order = {label: place for place, label in enumerate(names)}
    return frame.sort(
        *keys,
        pl.col('label').replace_strict(order, default=-1, return_dtype=pl.Int64),
        'target_compression',
        *last,
    )


def _with_interval(frame: pl.DataFrame, column: str) -> pl.DataFrame:
    """Replaces a list column by its mean and the ends of the mean's 95 % Student interval."""

    def ends(values):
        if len(values) < 2:
            return (None, None)
        return tuple(map(float, student_interval(values)))

    both = [ends(values) for values in frame[column].to_list()]
    return frame.with_columns(
        pl.col(column).list.mean(),
        pl.Series(f'{column}_low', [low for low, _ in both], pl.Float64),
        pl.Series(f'{column}_high', [high for _, high in both], pl.Float64),
    )


def summary(results: pl.DataFrame, layers: pl.DataFrame) -> pl.DataFrame:
    """One row per setting, label and target compression; accuracies are fractions of one.

    Columns after the settings:

        label, method
        target                  what target_compression means, 'direct' or 'effective'
        target_compression
        compression             achieved, geometric mean over runs
        effective_compression   geometric mean over runs where it is finite, null if none
        params_ratio, speedup   parameters, and operations, of the dense network over those without
                                the groups that are pruned whole, geometric mean over connected
                                runs; null if they were not counted, and the first without a control
        disconnected            runs where it is infinite: no path from input to output is left;
                                null if it was computed for no run
        seeds                   finished runs
        accuracy, _low, _high   mean test accuracy after training and its 95 % Student interval
        pairs                   runs compared with a dense run of the same seed
        deficit, _low, _high    mean of dense minus accuracy over these pairs, and its interval
        collapsed               runs that lost a whole layer
        diverged                runs whose loss or accuracy is not finite

    An accuracy that is not finite is left out of means. An accuracy that is finite counts even if
    the run diverged or collapsed: leaving failures out would flatter the method. Intervals of one
    run are null, and so is the deficit of the dense control, or without one.

    Args:
      results: rows of `store.read_results`, at least one.
      layers: rows of `store.read_layers`.

    Returns:
      Rows sorted by setting; in each, dense first, then labels in order of appearance with rising
      compression.
    """
    keys = settings(results)
    runs = _with_params_ratio(final(results), keys).join(
        collapsed(results, layers).select('run_id', collapsed=pl.lit(True)),
        on='run_id',
        how='left',
        maintain_order='left',
    )
    control = (
        runs.filter(_DENSE_ROW).group_by(*keys, 'seed').agg(control=pl.col('test_accuracy').mean())
    )
    deficit = (pl.col('control') - pl.col('test_accuracy')).filter(~_DENSE_ROW)
    frame = (
        runs.join(control, on=[*keys, 'seed'], how='left', nulls_equal=True)
        .sort('seed')
        .group_by(*keys, 'label', 'method', 'target', 'target_compression')
        .agg(
            _geometric(pl.col('compression')),
            _geometric(_CONNECTED),
            params_ratio=_geometric(pl.col('params_ratio').filter(_EFFECTIVE.is_finite())),
            speedup=_geometric(_SPEEDUP.filter(_EFFECTIVE.is_finite())),
            disconnected=pl.when(_COMPUTED.len() > 0).then(_COMPUTED.is_infinite().sum()),
            seeds=pl.len(),
            accuracy=pl.col('test_accuracy').filter(pl.col('test_accuracy').is_finite()),
            deficit=deficit.filter(deficit.is_finite()),
            collapsed=pl.col('collapsed').fill_null(False).sum(),
            diverged=pl.col('diverged').sum(),
        )
        .with_columns(pairs=pl.col('deficit').list.len())
    )
    frame = _in_order(frame, keys, labels(runs))
    frame = _with_interval(_with_interval(frame, 'accuracy'), 'deficit')
    return frame.select(
        *keys,
        'label',
        'method',
        'target',
        'target_compression',
        'compression',
        'effective_compression',
        'params_ratio',
        'speedup',
        'disconnected',
        'seeds',
        'accuracy',
        'accuracy_low',
        'accuracy_high',
        'pairs',
        'deficit',
        'deficit_low',
        'deficit_high',
        'collapsed',
        'diverged',
    )


def connectivity(results: pl.DataFrame) -> pl.DataFrame:
    """Direct against effective compression, and the accuracy that goes with them.

    A row of `summary` whose runs are disconnected in part is two rows here, so that accuracy and
    compression are always those of the same runs.

    Columns after the settings:

        label, method, target, target_compression
        disconnected            whether no path from input to output is left in these runs
        runs, seeds             how many runs these are, and of how many
        compression             direct, geometric mean; the target where no weight is left at all
        effective_compression   geometric mean; infinite if disconnected
        effective_low, _high    smallest and largest
        accuracy, _low, _high   mean test accuracy after training and its 95 % Student interval
        diverged                runs whose loss or accuracy is not finite

    Runs whose effective compression was not computed are left out. Rows are sorted as in
    `summary`, connected ones first.
    """
    keys = settings(results)
    group = [*keys, 'label', 'method', 'target', 'target_compression']
    direct = pl.col('compression')
    frame = (
        final(results)
        .filter(_EFFECTIVE.is_not_null(), _EFFECTIVE.is_not_nan())
        .with_columns(
            seeds=pl.len().over(group),
            disconnected=_EFFECTIVE.is_infinite(),
            compression=pl.when(direct.is_finite()).then(direct).otherwise('target_compression'),
        )
        .sort('seed')
        .group_by(*group, 'disconnected')
        .agg(
            pl.col('seeds').first(),
            _geometric(direct),
            _geometric(_EFFECTIVE),
            runs=pl.len(),
            effective_low=_EFFECTIVE.min(),
            effective_high=_EFFECTIVE.max(),
            accuracy=pl.col('test_accuracy').filter(pl.col('test_accuracy').is_finite()),
            diverged=pl.col('diverged').sum(),
        )
    )
    frame = _with_interval(_in_order(frame, keys, labels(results), 'disconnected'), 'accuracy')
    return frame.select(
        *group,
        'disconnected',
        'runs',
        'seeds',
        'compression',
        'effective_compression',
        'effective_low',
        'effective_high',
        'accuracy',
        'accuracy_low',
        'accuracy_high',
        'diverged',
    )


def sizes(results: pl.DataFrame) -> pl.DataFrame:
    """What compact networks save, and the accuracy that goes with it; dense control included.

    A compact network is without the groups that a run's masks remove. As in `connectivity`, a row
    of `summary` whose runs are disconnected in part is two rows here.

    Columns after the settings:

        label, method, target, target_compression
        disconnected            whether no path from input to output is left in these runs
        runs, seeds             how many runs these are, and of how many
        params_ratio            parameters, dense / compact, geometric mean; null if disconnected
        speedup                 operations, dense / compact, geometric mean; null if disconnected
        accuracy, _low, _high   mean test accuracy after training and its 95 % Student interval
        diverged                runs whose loss or accuracy is not finite

    Left out are runs of which any of this is not known, and settings whose dense control has not
    finished. Rows are sorted as in `summary`, connected ones first.
    """
    keys = settings(results)
    group = [*keys, 'label', 'method', 'target', 'target_compression']
    ratios = ('params_ratio', 'speedup')
    frame = (
        _with_params_ratio(final(results), keys)
        .rename({'speedup_theoretical': 'speedup'})
        .filter(_EFFECTIVE.is_not_null(), _EFFECTIVE.is_not_nan())
        .drop_nulls(ratios)
        .with_columns(seeds=pl.len().over(group), disconnected=_EFFECTIVE.is_infinite())
        .sort('seed')
        .group_by(*group, 'disconnected')
        .agg(
            pl.col('seeds').first(),
            *(_geometric(pl.col(ratio)) for ratio in ratios),
            runs=pl.len(),
            accuracy=pl.col('test_accuracy').filter(pl.col('test_accuracy').is_finite()),
            diverged=pl.col('diverged').sum(),
        )
        .with_columns(pl.when(~pl.col('disconnected')).then(pl.col(ratios)))
    )
    frame = _with_interval(_in_order(frame, keys, labels(results), 'disconnected'), 'accuracy')
    return frame.select(
        *group,
        'disconnected',
        'runs',
        'seeds',
        *ratios,
        'accuracy',
        'accuracy_low',
        'accuracy_high',
        'diverged',
    )


def setting_columns(frame: pl.DataFrame) -> list[str]:
    """The settings of a frame of this module, which are its columns before the label."""
    return frame.columns[: frame.columns.index('label')]


def breaking_points(summary: pl.DataFrame) -> pl.DataFrame:
    """At which compression each method stops working; one row per setting and label.

    Columns after the settings, for each limit `p` of 1 and 5 points:

        label
        tested          largest target compression with a finished run
        compared        whether any row could be compared with dense
        within_p        largest target compression whose mean deficit is at most p points, or null
        missed_p        smaller ones where it is more (a curve need not fall steadily)
        collapsed       smallest target compression where a run lost a whole layer, or null
        disconnected    smallest where a run has no path from input to output left, or null
        traced          whether that is known at every compression

    Args:
      summary: a frame made by `summary`.
    """
    target = pl.col('target_compression')
    columns = {}
    for limit in LIMITS:
        # The tolerance admits a deficit of exactly one point, which floats miss either way.
        works = (pl.col('deficit') <= limit / 100 + 1e-9).fill_null(False)
        known = pl.col('deficit').is_not_null() | (pl.col('diverged') > 0)
        best = target.filter(works).max()
        columns[f'within_{limit}'] = best
        columns[f'missed_{limit}'] = target.filter(~works & known & (target < best)).sort()
    return (
        summary.filter(~_DENSE_ROW)
        .group_by(*setting_columns(summary), 'label', maintain_order=True)
        .agg(
            tested=target.max(),
            compared=pl.col('deficit').is_not_null().any(),
            **columns,
            collapsed=target.filter(pl.col('collapsed') > 0).min(),
            disconnected=target.filter(pl.col('disconnected') > 0).min(),
            traced=pl.col('disconnected').is_not_null().all(),
        )
    )


def along(results: pl.DataFrame, curves: pl.DataFrame) -> pl.DataFrame:
    """The rows of `results` at every step that was recorded; `results` itself if none was.

    Args:
      curves: rows of `store.read_curves`.
    """
    if curves.is_empty():
        return results
    values = ['train_loss', 'test_loss', 'test_accuracy']
    # Steps of an epoch; the last epoch of a run may be a part of one.
    epoch = pl.max_horizontal('epoch', 1)
    steps = ((pl.col('step') + epoch - 1) // epoch).max().over('run_id')
    runs = results.with_columns(steps=steps).drop('step', 'epoch', *values)
    runs = runs.unique('run_id', maintain_order=True)
    # Where training was not evaluated along the way, the ends of epochs still were.
    ends = results.select('run_id', 'step', *values)
    rows = curves.join(
        ends, on=['run_id', 'step'], how='left', suffix='_end', maintain_order='left'
    )
    # Right after a pruning round there is no training loss.
    tests = [pl.coalesce(v, f'{v}_end') for v in values[1:]]
    rows = rows.select('run_id', 'step', 'rounds', 'train_loss', *tests)
    rows = runs.join(rows, on='run_id', maintain_order='left_right')
    return rows.with_columns(epoch=(pl.col('step') - 1) // pl.col('steps') + 1).drop('steps')


def learning(results: pl.DataFrame) -> pl.DataFrame:
    """Mean curves over training.

    Args:
      results: rows of `store.read_results`, or of `along`.

    Returns:
      Settings, `label`, `method`, `target`, `target_compression`, `time`, `rounds` (pruning rounds
      before, 0 if unknown), and the means over seeds of `train_loss` and `test_accuracy`, numbers
      that are not finite left out (null if none is). `time` is the epoch, or the step where one
      epoch holds several evaluations.
    """
    keys = [*settings(results), 'label', 'method', 'target', 'target_compression', 'time', 'rounds']
    if 'rounds' not in results.columns:
        results = results.with_columns(rounds=0)
    return (
        results.with_columns(
            time=time_unit(results),
            target_compression=pl.when(_DENSE_ROW).then(1.0).otherwise('target_compression'),
        )
        .group_by(keys, maintain_order=True)
        .agg(
            pl.col(column).filter(pl.col(column).is_finite()).mean()
            for column in ('train_loss', 'test_accuracy')
        )
        .sort('time', 'rounds', maintain_order=True)
    )


def time_unit(results: pl.DataFrame) -> str:
    """`'epoch'`, or `'step'` where one epoch of a run holds several evaluations."""
    moments = [c for c in ('run_id', 'epoch', 'rounds') if c in results.columns]
    return 'step' if results.select(moments).is_duplicated().any() else 'epoch'


def densities(results: pl.DataFrame, layers: pl.DataFrame) -> pl.DataFrame:
    """Share of weights kept in every layer.

    Returns:
      Settings, `label`, `method`, `target`, `target_compression`, `path`, `size`, `density` (mean
      over seeds), `seeds` and `empty`, the number of them that kept nothing of the layer.
    """
    keys = settings(results)
    group = [*keys, 'label', 'method', 'target', 'target_compression']
    return (
        final(results)
        .select('run_id', *group)
        .join(layers, on='run_id', how='inner', maintain_order='left_right')
        .filter(pl.col('size') > 0)
        .group_by(*group, 'path', 'size', maintain_order=True)
        .agg(
            density=(pl.col('kept') / pl.col('size')).mean(),
            seeds=pl.len(),
            empty=(pl.col('kept') == 0).sum(),
        )
    )


def split(frame: pl.DataFrame, keys: list[str]) -> list[tuple[dict, pl.DataFrame]]:
    """The frame cut by setting: `[(setting, rows), ...]`, in order of appearance."""
    if not keys:
        return [({}, frame)]
    parts = frame.partition_by(keys, maintain_order=True)
    return [(part.select(keys).row(0, named=True), part) for part in parts]


def at(frame: pl.DataFrame, setting: dict) -> pl.DataFrame:
    """The rows of one setting."""
    same = [pl.col(column).eq_missing(value) for column, value in setting.items()]
    return frame.filter(*same) if same else frame


def evenly(items: list, most: int) -> list:
    """At most `most` of the items, evenly spread over their places, both ends kept."""
    if len(items) <= most:
        return list(items)
    if most == 1:
        return [items[-1]]
    return [items[math.floor(i * (len(items) - 1) / (most - 1) + 0.5)] for i in range(most)]
