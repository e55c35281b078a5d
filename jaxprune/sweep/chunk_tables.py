"""The rows of the tables that a chunk leaves behind."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from jaxprune.method import MASK_FIGURES, plural
from jaxprune.sweep import store
from jaxprune.sweep.churn import packed
from jaxprune.sweep.grid import DENSE, Run, split_options
from jaxprune.sweep.observe import Recorded
from jaxprune.sweep.parse import plain
from jaxprune.sweep.program import Program
from jaxprune.sweep.spec import MethodSpec, SweepSpec
from jaxprune.sweep.timeline import recorded_steps, round_steps

#: Columns of a run's last row, see `compact_nets`.
COMPACT_COLUMNS = ('latency_ratio', 'full_accuracy', 'compact_accuracy', 'compact_difference')


class Moment(NamedTuple):
    """What was recorded of all runs of a chunk at one moment.

    Attributes:
      step: steps taken before.
      after_round: recorded right after a round, and not on the way.
      recorded: the values.
    """

    step: int
    after_round: bool
    recorded: Recorded


class Counted(NamedTuple):
    """What is left of a run's network.

    Attributes:
      kept: path -> weights that the mask keeps.
      active: path -> those of them on a path from input to output.
      compact: columns of what it costs without the groups that the mask prunes.
      moved: columns of what its masks have been, see `MASK_FIGURES`; {} where they do not move.
    """

    kept: Mapping[str, int]
    active: Mapping[str, int]
    compact: Mapping[str, Any]
    moved: Mapping[str, float]


def results_rows(
    spec: SweepSpec,
    program: Program,
    members: Sequence[Run],
    counted: Sequence[Counted],
    errors: Sequence[str | None],
    step: int,
    train_loss: np.ndarray,
    test: tuple[np.ndarray, np.ndarray],
    labels: np.ndarray | None,
) -> list[dict[str, Any]]:
    """Rows of `store.RESULTS_FILE` of an evaluation.

    Args:
      counted: what is left of the network of each run.
      train_loss: `(runs,)`, the mean since the evaluation before.
      test: test losses and accuracies, each `(runs,)`.
      labels: `(runs, examples)`, predictions on the test set; None where nobody asks.
    """
    test_loss, accuracy = test
    known = [None if labels is None else packed(labels[i]) for i in range(len(members))]
    return [
        {
            **identity_columns(spec, program, run, counted[i]),
            'step': step,
            'epoch': -(-step // program.steps),
            # A mask from broken scores means nothing, and neither does its accuracy.
            'train_loss': math.nan if errors[i] else float(train_loss[i]),
            'test_loss': math.nan if errors[i] else float(test_loss[i]),
            'test_accuracy': math.nan if errors[i] else float(accuracy[i]),
            'predictions': None if errors[i] else known[i],
            'error': errors[i] or _diverged(train_loss[i], test_loss[i]),
        }
        for i, run in enumerate(members)
    ]


def _diverged(train_loss: float, test_loss: float) -> str | None:
    """What is wrong with a run whose losses are no numbers any more; None if nothing is."""
    losses = {'training': train_loss, 'test': test_loss}
    broken = [name for name, loss in losses.items() if not math.isfinite(loss)]
    return f'diverged: {" and ".join(broken)} loss NaN or infinite' if broken else None


def curves_rows(
    program: Program,
    members: Sequence[Run],
    errors: Sequence[str | None],
    before: int,
    losses: np.ndarray,
    moments: Sequence[Moment],
) -> list[list]:
    """Rows of `store.CURVES` of an epoch, or of what there is of the last one.

    Args:
      before: steps before the epoch.
      losses: `(runs, steps)` of the epoch.
      moments: what was recorded in it.
    """
    every, rows = program.record.every, []
    tests = {m.step: m for m in moments if not m.after_round}
    end = before + losses.shape[1]
    first = before
    begun = tests.get(0)
    if begun and begun.recorded.test:  # where no loss was before
        rows += _curve(program, members, errors, 0, False, None, begun.recorded.test)
    for step in recorded_steps(end, every, program.steps, before) if every else ():
        loss = losses[:, first - before : step - before].mean(axis=1)
        moment = tests.get(step)
        test = moment and moment.recorded.test
        rows += _curve(program, members, errors, step, False, loss, test)
        first = step
    return rows


def curves_rows_after_rounds(
    program: Program,
    members: Sequence[Run],
    errors: Sequence[str | None],
    moments: Sequence[Moment],
) -> list[list]:
    """Rows of `store.CURVES` of what was recorded right after pruning rounds."""
    rows = []
    for m in moments:
        if m.after_round and m.recorded.test:
            rows += _curve(program, members, errors, m.step, True, None, m.recorded.test)
    return rows


def _curve(
    program: Program,
    members: Sequence[Run],
    errors: Sequence[str | None],
    step: int,
    after_round: bool,
    loss: np.ndarray | None,
    test: tuple[np.ndarray, np.ndarray] | None,
) -> list[list]:
    rows = []
    for i, run in enumerate(members):
        if _not_its_own(program, run, after_round):
            continue
        values = [
            None if loss is None else float(loss[i]),
            *([float(t[i]) for t in test] if test else [None, None]),
        ]
        kept = [math.nan if errors[i] and value is not None else value for value in values]
        rows.append([run.run_id, step, _rounds(program, run, step, after_round), *kept])
    return rows


def _not_its_own(program: Program, run: Run, after_round: bool) -> bool:
    """Is this a moment that the dense control would not have without the company of its chunk?"""
    return run.method == DENSE and after_round and program.record.rounds


def _rounds(program: Program, run: Run, step: int, after: bool) -> int:
    """How many pruning rounds a run has been through: before a step's own, or `after` them."""
    if run.method == DENSE:
        return 0
    return sum(s < step + after for s in round_steps(run.method, program.steps))


def flow_rows(
    program: Program,
    members: Sequence[Run],
    errors: Sequence[str | None],
    moments: Sequence[Moment],
) -> list[list]:
    """Rows of `store.FLOW` of what was recorded."""
    rows = []
    for m in moments:
        rounds = [_rounds(program, run, m.step, m.after_round) for run in members]
        for quantity, by_path in m.recorded.flow.items():
            for path, values in by_path.items():
                rows += [
                    [run.run_id, m.step, rounds[i], path, quantity, _value(values[i], errors[i])]
                    for i, run in enumerate(members)
                    if not _not_its_own(program, run, m.after_round)
                ]
    return rows


def _value(value: Any, error: str | None) -> float:
    return math.nan if error else float(value)


def identity_columns(
    spec: SweepSpec,
    program: Program,
    run: Run,
    counted: Counted,
) -> dict[str, Any]:
    """The columns of a results row that say which run it is."""
    size = program.size
    left, working = sum(counted.kept.values()), sum(counted.active.values())
    numbers, flags = split_options(run.train)
    settings = {**plain(run.train), **numbers, **flags}
    return {
        'run_id': run.run_id,
        'model': spec.model.name,
        'dataset': spec.data.name,
        'label': run.method.label,
        'method': run.method.name,
        'allocation': run.method.allocation,
        'seed': run.seed,
        'target': _target(run.method),
        'target_compression': run.compression,
        'density': left / size,
        'compression': size / left if left else math.inf,
        'effective_compression': size / working if working else math.inf,
        **counted.compact,
        **dict.fromkeys(COMPACT_COLUMNS),
        **dict.fromkeys(MASK_FIGURES),
        **counted.moved,
        'learning_rate': run.train.learning_rate,
        'weight_decay': run.train.weight_decay,
        **{key: _cell(settings[key]) for key in grid_columns(spec)},
    }


def _target(spec: MethodSpec) -> str:
    """What a compression of the grid counts."""
    counted = plural(spec.granularity)
    counts_groups = spec.target == 'direct' and counted != 'weights'
    return counted if counts_groups else spec.target


def grid_columns(spec: SweepSpec) -> dict[str, Any]:
    """Column -> type of the swept training settings that have no column of their own."""
    types = {bool: pl.Boolean, int: pl.Int64, float: pl.Float64}
    return {
        key: types.get(type(values[0]), pl.String)
        for key, values in spec.grid.train.items()
        if key not in store.RESULTS
    }


def _cell(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def layers_table(
    program: Program, members: Sequence[Run], counted: Sequence[Counted]
) -> pl.DataFrame:
    rows = [
        (run.run_id, path, math.prod(shape), left.kept[path], left.active[path])
        for run, left in zip(members, counted, strict=True)
        for path, shape in program.shapes.items()
    ]
    return pl.DataFrame(rows, schema=store.LAYERS, orient='row')
