"""The loss without each unit, and what claims to know it beforehand, for all units of a network."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
import polars as pl
from scores import AT_ONCE, joined, shapley_per_example, weight_norm
from trained import Net, Settings, scored_on, view_of

from jaxprune.rng import run_key, stream
from jaxprune.score import activation_score, coupled_score, gate_taylor, unit_leave_one_out
from jaxprune.types import Batch, ScoreFn, Scores, View

ORACLE = 'oracle'
FIRST, SECOND, SHAPLEY = 'Taylor 1', 'Taylor 2', 'Shapley'
BATCHES, EXAMPLES = 'Taylor 1, squared per batch of 100', 'Taylor 1, squared per example'
AFTER, BEFORE = 'Taylor 1, after the ReLU', 'Taylor 1, before the norm'
WEIGHTS, OUTPUTS = 'Taylor of single weights', 'Taylor 2017, outputs'
NORM, SCALE = 'weight norm', 'batch-norm scale'
#: In the order of tables and figures.
ESTIMATES = (
    *(FIRST, AFTER, BEFORE, SECOND, BATCHES, EXAMPLES),
    *(WEIGHTS, OUTPUTS, SHAPLEY, NORM, SCALE),
)
#: Units whose second derivatives are computed at once: more than any layer has.
_ALL = 128


class Scored(NamedTuple):
    """An estimate of what the loss gains without a unit.

    Attributes:
      signed: of the change, or a size where there is no sign; None where only a square is.
      square: of the squared change.
    """

    signed: Scores | None
    square: Scores


def make_estimates(net: Net, settings: Settings) -> Callable[[int], pl.DataFrame]:
    """`number of a seed -> a row per estimate and unit`.

    Columns: `estimate`, 'oracle' among them, `layer`, `depth` (its number), `unit`, `signed` and
    `square`.
    """
    batches = scored_on(net, max(settings.examples))
    scores = {name: jax.jit(score) for name, score in _scores(net).items()}
    oracle = unit_leave_one_out(net.problem, by=net.units, at_once=AT_ONCE[net.name])

    def estimates(number: int) -> pl.DataFrame:
        view, key = view_of(net, number), stream(run_key(net.seeds[number]), 'rank')
        mean = {name: _mean(score, key, view, batches) for name, score in scores.items()}
        made = {ORACLE: _squared(jax.device_get(oracle(key, view, [joined(batches)])))}
        for name in (FIRST, AFTER, BEFORE, SECOND, OUTPUTS, SCALE):
            if name in mean:
                made[name] = _squared(mean[name])
        made |= {name: Scored(None, mean[name]) for name in (BATCHES, EXAMPLES, WEIGHTS)}
        made[NORM] = Scored({n: np.sqrt(s) for n, s in mean[NORM].items()}, mean[NORM])
        each = shapley_per_example(net, view, batches, key, settings.permutations)
        made[SHAPLEY] = _squared({layer: values.mean(1) for layer, values in each.items()})
        return _table(made, list(net.units.shapes))

    return estimates


def _scores(net: Net) -> dict[str, ScoreFn]:
    """What is averaged over batches of 100 examples; signed changes are linear in the loss."""

    def taylor(**options) -> ScoreFn:
        return gate_taylor(net.problem, by=net.units, at_once=_ALL, **options)

    def single(**options) -> ScoreFn:
        return coupled_score(
            net.problem, by=net.units, members='out', reduce='sum', normalise='none', **options
        )

    found = {
        FIRST: taylor(sign='signed'),
        AFTER: taylor(sign='signed', place='activation'),
        BEFORE: taylor(sign='signed', place='output'),
        SECOND: taylor(sign='signed', order=2),
        BATCHES: taylor(),
        EXAMPLES: taylor(per='example'),
        WEIGHTS: single(measure='hessian'),
        OUTPUTS: activation_score(net.problem, by=net.units, measure='taylor_output', place='norm'),
        NORM: weight_norm(net, 'square'),
    }
    if 'batch_stats' in net.model_state:
        found[SCALE] = single(measure='magnitude', parameters='scale$')
    return found


def _mean(
    score: ScoreFn, key: jax.Array, view: View, batches: Sequence[Batch]
) -> dict[str, np.ndarray]:
    found = [jax.device_get(score(key, view, [batch])) for batch in batches]
    return {layer: np.mean([one[layer] for one in found], axis=0) for layer in found[0]}


def _squared(signed: Scores) -> Scored:
    return Scored(signed, {layer: np.square(own) for layer, own in signed.items()})


def _table(made: dict[str, Scored], layers: Sequence[str]) -> pl.DataFrame:
    frames = []
    for name, (signed, square) in made.items():
        for depth, layer in enumerate(layers):
            count = len(square[layer])
            columns = {
                'unit': np.arange(count),
                'signed': np.full(count, np.nan) if signed is None else signed[layer],
                'square': square[layer],
            }
            named = {'estimate': name, 'layer': layer, 'depth': depth}
            frame = pl.DataFrame(columns).with_columns(pl.col('signed', 'square').cast(pl.Float64))
            frames.append(frame.select(*(pl.lit(v).alias(k) for k, v in named.items()), pl.all()))
    return pl.concat(frames)
