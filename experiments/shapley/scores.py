"""What ranks units: the methods that the study compares, on any number of training examples."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from trained import SCORED_AT_ONCE, Net, Settings, scored_on, view_of

from jaxprune.rng import run_key, stream
from jaxprune.score import (
    activation_score,
    coupled_score,
    gate_taylor,
    unit_shapley_values,
)
from jaxprune.score.coalitions import leave_one_out
from jaxprune.score.unit_loss import unit_game
from jaxprune.types import Batch, ScoreFn, Scores, View

#: In the order of tables and figures.
METHODS = (
    'Shapley',
    'Shapley, mean + 2 std',
    'leave one out',
    'Taylor, signed',
    'Taylor, absolute',
    'sensitivity',
    'APoZ',
    'weight norm',
    'random',
)
#: These look at no data.
WITHOUT_DATA = ('weight norm', 'random')
#: Coalitions of a layer that are evaluated at once: the maps of VGG fill the cache.
AT_ONCE = {'small_vgg': 1, 'lenet5': 8}


class Ranking(NamedTuple):
    """Scores of all units, high = keep.

    Attributes:
      method: one of `METHODS`.
      examples: how many training examples it saw.
      draw: of a random ranking.
      scores: layer -> `(units,)`.
    """

    method: str
    examples: int
    draw: int
    scores: dict[str, np.ndarray]


def make_rankings(net: Net, settings: Settings) -> Callable[[int], list[Ranking]]:
    """`number of a seed -> all rankings`; scores are compiled once for all seeds."""
    most = max(settings.examples)
    batches = scored_on(net, most)
    by_batch = {name: jax.jit(score) for name, score in _quick_scores(net).items()}
    norms = jax.jit(weight_norm(net))

    def rankings(number: int) -> list[Ranking]:
        view, key = view_of(net, number), stream(run_key(net.seeds[number]), 'rank')
        made = [Ranking('weight norm', 0, 0, jax.device_get(norms(key, view, None)))]
        made += [
            Ranking('random', 0, draw, _random(net, key, draw)) for draw in range(settings.draws)
        ]
        shapley = shapley_per_example(net, view, batches, key, settings.permutations)
        alone = {layer: left_out(net, view, batches, layer) for layer in net.units.shapes}
        each = {name: _each(score, key, view, batches) for name, score in by_batch.items()}
        for count in settings.examples:
            seen = {layer: values[:, :count] for layer, values in shapley.items()}
            mean = {layer: values.mean(1) for layer, values in seen.items()}
            spared = {layer: v.mean(1) + 2 * v.std(1) for layer, v in seen.items()}
            made.append(Ranking('Shapley', count, 0, mean))
            made.append(Ranking('Shapley, mean + 2 std', count, 0, spared))
            loss = {layer: values[:, :count].mean(1) for layer, values in alone.items()}
            made.append(Ranking('leave one out', count, 0, loss))
            for name, values in each.items():
                some = {n: v[: count // SCORED_AT_ONCE].mean(0) for n, v in values.items()}
                made.append(Ranking(name, count, 0, some))
        return [r._replace(scores={n: r.scores[n] for n in net.units.shapes}) for r in made]

    return rankings


def table_of(rankings: Sequence[Ranking]) -> pl.DataFrame:
    """A row per unit and ranking: `method`, `examples`, `draw`, `layer`, `unit`, `score`."""
    rows = [
        (r.method, r.examples, r.draw, layer, unit, float(score))
        for r in rankings
        for layer, scores in r.scores.items()
        for unit, score in enumerate(scores)
    ]
    names = ['method', 'examples', 'draw', 'layer', 'unit', 'score']
    return pl.DataFrame(rows, schema=names, orient='row')


def rankings_of(table: pl.DataFrame) -> list[Ranking]:
    """The way back."""
    found = []
    for (method, examples, draw), own in table.group_by(
        'method', 'examples', 'draw', maintain_order=True
    ):
        layers = own.group_by('layer', maintain_order=True)
        scores = {layer: of.sort('unit')['score'].to_numpy() for (layer,), of in layers}
        found.append(Ranking(method, examples, draw, scores))
    return found


def _quick_scores(net: Net) -> dict[str, ScoreFn]:
    """Scores that take a few passes over the data; means over examples."""
    given = {'by': net.units, 'place': 'activation'}
    single = {**given, 'per': 'example'}
    return {
        'Taylor, signed': gate_taylor(net.problem, sign='signed', **single),
        'Taylor, absolute': gate_taylor(net.problem, sign='absolute', **single),
        'sensitivity': activation_score(net.problem, measure='sensitivity', **given),
        'APoZ': activation_score(net.problem, measure='apoz', **given),
    }


def weight_norm(net: Net, measure: str = 'magnitude') -> ScoreFn:
    """The sum of |w| over a filter, or another measure's."""
    return coupled_score(
        net.problem, by=net.units, measure=measure, members='out', reduce='sum', normalise='none'
    )


def shapley_per_example(
    net: Net, view: View, batches: Sequence[Batch], key: jax.Array, permutations: int
) -> dict[str, np.ndarray]:
    """Layer -> `(units, examples)`; all examples see the same orders of removal."""
    values = unit_shapley_values(
        net.problem, by=net.units, permutations=permutations, at_once=AT_ONCE[net.name]
    )
    found = values(stream(key, 'shapley'), view, [joined(batches)])
    return {layer: np.asarray(own.per_example) for layer, own in found.items()}


def left_out(net: Net, view: View, batches: Sequence[Batch], layer: str) -> np.ndarray:
    """The increase of each example's loss when a unit alone is removed, `(units, examples)`."""
    game = unit_game(net.problem, net.units.gates('activation'), layer, view, [joined(batches)])
    units = net.units.shapes[layer][0]
    at_once = AT_ONCE[net.name]
    return np.asarray(leave_one_out(game, units, batch_size=at_once, loop='unrolled'))


def joined(batches: Sequence[Batch]) -> Batch:
    """All examples as one batch."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches)


def _each(
    score: ScoreFn, key: jax.Array, view: View, batches: Sequence[Batch]
) -> dict[str, np.ndarray]:
    """Layer -> scores of each batch, `(batches, units)`."""
    found = [jax.device_get(score(key, view, [batch])) for batch in batches]
    return {layer: np.stack([one[layer] for one in found]) for layer in found[0]}


def _random(net: Net, key: jax.Array, draw: int) -> Scores:
    rng = np.random.default_rng([*np.asarray(jax.random.key_data(key)).tolist(), draw])
    return {layer: rng.random(shape) for layer, shape in net.units.shapes.items()}
