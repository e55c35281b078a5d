"""An untrained network that learns by losing units: those with a negative Shapley value go.

The second demonstration of the authors' code: a multilayer perceptron with random weights, leaky
ReLUs and PyTorch's initialisation. The last hidden layer goes first; no weight is ever changed.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from trained import Settings

from jaxprune import data, problem, tree
from jaxprune.method import competing
from jaxprune.rng import run_key, stream
from jaxprune.score import shapley
from jaxprune.score.unit_loss import unit_game
from jaxprune.structure import groups
from jaxprune.types import Batch, Groups, Key, Masks, Problem, PyTree

EXAMPLES, TESTED, INPUTS, CLASSES, SLOPE = 1000, 2000, 784, 10, 0.01
FIRST, LAST = '0/kernel', '1/kernel'


def network(width: int) -> Problem:
    """Two hidden layers of leaky ReLUs; weights and biases uniform up to 1 / sqrt(fan_in)."""
    sizes = (INPUTS, width, width, CLASSES)

    def init(key: Key) -> PyTree:
        params = {}
        for i, (fan_in, units) in enumerate(itertools.pairwise(sizes)):
            keys = jax.random.split(jax.random.fold_in(key, i))
            most = fan_in**-0.5
            params[str(i)] = {
                'kernel': jax.random.uniform(keys[0], (fan_in, units), minval=-most, maxval=most),
                'bias': jax.random.uniform(keys[1], (units,), minval=-most, maxval=most),
            }
        return params

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for i in range(3):
            x = x @ params[str(i)]['kernel'] + params[str(i)]['bias']
            x = jnp.where(x > 0, x, SLOPE * x) if i < 2 else x
        return x

    return problem.problem_from_functions(init, apply)


def demonstration(settings: Settings) -> pl.DataFrame:
    """A row per seed and stage: `seed`, `stage`, `accuracy` in %, `left` of the parameters in %,
    `first` and `last`, the units left in the two hidden layers in %."""
    net = network(settings.untrained_width)
    dataset, facts = data.load('mnist_small'), data.facts('mnist_small')
    fetch = data.fetcher(facts.mean, facts.std, ())
    scored = fetch(data.to_device(dataset.train), None, jnp.arange(EXAMPLES))
    tested = fetch(data.to_device(dataset.test), None, jnp.arange(TESTED))
    seeds = range(settings.untrained_seeds)
    return pl.DataFrame(
        [row for seed in seeds for row in _of_seed(net, seed, scored, tested, settings)]
    )


def _of_seed(
    net: Problem, seed: int, scored: Batch, tested: Batch, settings: Settings
) -> list[dict]:
    key, rng = run_key(seed), np.random.default_rng(seed)
    params, _ = net.init(stream(key, 'init'))
    units = competing(
        'unit', tree.shapes(tree.pick(params)), partial(groups, net, params, scored.x[:1])
    )
    kept: Masks = {layer: np.ones(shape, bool) for layer, shape in units.shapes.items()}
    chance = dict(kept)
    stages = [_row(net, units, params, kept, tested, 'as initialised')]
    for layer, stage in ((LAST, 'last hidden layer pruned'), (FIRST, 'both pruned')):
        view = problem.view(net, params, None, units.spread(kept))
        game = unit_game(net, units.gates('activation'), layer, view, [scored])
        values = shapley(
            game,
            len(kept[layer]),
            stream(key, layer),
            permutations=settings.permutations,
            batch_size=settings.permutations,
            per_example=False,
        )
        kept = {**kept, layer: np.asarray(values.mean) >= 0}
        chance = {**chance, layer: rng.permutation(kept[layer])}
        stages.append(_row(net, units, params, kept, tested, stage))
    stages.append(_row(net, units, params, chance, tested, 'as many units at random'))
    return [{'seed': seed, **row} for row in stages]


def _row(
    net: Problem, units: Groups, params: PyTree, kept: Masks, tested: Batch, stage: str
) -> dict:
    masked = tree.apply_masks(params, units.spread(kept))
    logits, _ = net.apply(masked, {}, tested.x, train=False, key=None)
    width, first, last = len(kept[FIRST]), kept[FIRST].sum(), kept[LAST].sum()

    def parameters(a: int, b: int) -> int:
        return (INPUTS + 1) * a + (a + 1) * b + (b + 1) * CLASSES

    return {
        'stage': stage,
        'accuracy': 100 * float((logits.argmax(-1) == tested.y).mean()),
        'left': 100 * float(parameters(first, last) / parameters(width, width)),
        'first': 100 * float(first / width),
        'last': 100 * float(last / width),
    }
