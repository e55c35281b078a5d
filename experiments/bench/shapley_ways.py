"""The networks of `shapley.py`, and the ways in JAX to get the Shapley values of one layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from jaxprune import data, nn, tree
from jaxprune.problem import view
from jaxprune.score.coalitions import LOOPS, Game
from jaxprune.score.shapley import shapley
from jaxprune.score.unit_loss import unit_game
from jaxprune.types import Batch, Gates, Groups, Problem, View

SIDE = 28


class Net(NamedTuple):
    """A network whose layers are scored.

    Attributes:
      make: the flax module, or None for `channels_first`.
      layer: number of the layer whose units are removed, in forward order.
      orders, examples: how many the tables take.
    """

    make: Callable[[], Any] | None
    layer: int
    orders: int
    examples: int


NETS = {
    'LeNet-300-100': Net(lambda: nn.build('lenet300100', 10), 0, 16, 200),
    'LeNet-5': Net(lambda: nn.build('lenet5', 10), 0, 64, 100),
    'small VGG': Net(lambda: nn.build('small_vgg', 10), 1, 16, 50),
    'LeNet-5, channels first': Net(None, 0, 8, 100),
}


class Case(NamedTuple):
    """A network with its arrays, and one layer with the orders in which its units go.

    Attributes:
      by: the units of all layers that compete.
      gated: gates after the activations.
      layer: name of the layer.
      n: how many units it has.
      view: parameters and batch statistics.
      batch: images `(examples, 28, 28, 1)` and labels.
      orders: `(orders, n)`.
    """

    name: str
    problem: Problem
    by: Groups
    gated: Gates
    layer: str
    n: int
    view: View
    batch: Batch
    orders: np.ndarray


def images(split: Any, count: int) -> Batch:
    x = split.images[:count].reshape(-1, SIDE, SIDE, 1).astype(np.float32)
    return Batch(jnp.asarray((x / 255 - 0.13) / 0.31), jnp.asarray(split.labels[:count]))


def problem_of(make: Callable[[], Any] | None) -> Problem:
    if make is not None:
        return jp.problem_from_flax(make(), (SIDE, SIDE, 1))
    return jp.problem_from_flax(nn.build('lenet5', 10), (SIDE, SIDE, 1))._replace(
        apply=lambda params, state, x, **_: (channels_first(params, x), state)
    )


def channels_first(params: Any, x: jax.Array) -> jax.Array:
    """LeNet-5 as PyTorch and equinox lay out images: (batch, maps, height, width)."""
    x = x.transpose(0, 3, 1, 2)
    for layer in ('conv_0', 'conv_1'):
        own, layout = params[layer], ('NCHW', 'HWIO', 'NCHW')
        x = jax.lax.conv_general_dilated(
            x, own['kernel'], (1, 1), 'VALID', dimension_numbers=layout
        )
        x = jax.nn.relu(x + own['bias'][:, None, None])
        batch, maps, height, width = x.shape
        x = x.reshape(batch, maps, height // 2, 2, width // 2, 2).mean((3, 5))
    x = x.transpose(0, 2, 3, 1).reshape(len(x), -1)
    for layer in ('dense_0', 'dense_1'):
        x = jax.nn.relu(x @ params[layer]['kernel'] + params[layer]['bias'])
    return x @ params['dense_2']['kernel'] + params['dense_2']['bias']


def case_of(name: str, orders: int | None = None, examples: int | None = None) -> Case:
    """A case with random weights, biases and batch statistics: none is 0 or 1."""
    net = NETS[name]
    problem = problem_of(net.make)
    params, state = jax.jit(problem.init)(jax.random.key(0))
    draw = np.random.default_rng(0)

    def drawn(path: str, leaf: jax.Array) -> jax.Array:
        if path.endswith(('scale', 'var')):
            return jnp.asarray(draw.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        if path.endswith(('bias', 'mean')):
            return jnp.asarray(0.1 * draw.standard_normal(leaf.shape), leaf.dtype)
        return leaf

    params, state = (
        tree.put(leaves, {path: drawn(path, leaf) for path, leaf in tree.paths(leaves)})
        for leaves in (params, state)
    )
    batch = images(data.load('mnist_small').train, examples or net.examples)
    return case_from(name, problem, params, state, batch, net.layer, orders or net.orders)


def case_from(
    name: str, problem: Problem, params: Any, state: Any, batch: Batch, layer: int, orders: int
) -> Case:
    def apply(params, state, x):
        return problem.apply(params, state, x, train=False, key=None)[0]

    read = jp.groups(apply, params, batch.x[:1], state)
    seen = view(problem, params, state)
    shapes = {path: leaf.shape for path, leaf in seen.weights.items()}
    by = jp.competing('unit', shapes, lambda: read)
    gated = by.gates('activation')
    path, n = list(gated.sizes.items())[layer]
    draw = np.random.default_rng(1)
    rows = np.stack([draw.permutation(n) for _ in range(orders)])
    return Case(name, problem, by, gated, path, n, seen, batch, rows)


def game_of(case: Case) -> Game:
    return unit_game(case.problem, case.gated, case.layer, case.view, [case.batch])


def ways(case: Case, at_once: tuple[int, ...]) -> dict[str, Callable[[], jax.Array]]:
    """Name -> a function that returns the values `(n, examples)` along the case's orders."""
    game = game_of(case)

    def through(loop: str, size: int) -> Callable[[], jax.Array]:
        def values(orders: Any) -> jax.Array:
            how = {'loop': loop, 'batch_size': size}
            return shapley(game, case.n, orders=orders, **how).per_example

        called = jax.jit(values) if loop == 'map' else values
        return lambda: called(case.orders)

    @jax.jit
    def whole(mask: jax.Array, view: View, batch: Batch) -> jax.Array:
        # All arrays are arguments: of constants XLA would compute the first layers beforehand.
        params = tree.put(view.params, view.weights)
        gates = {case.layer: mask.astype(jnp.float32)}
        logits = case.gated.apply(gates, params, batch.x, view.model_state)
        return case.problem.loss(logits, batch.y)

    return {
        'JAX loop, network': one_by_one(
            lambda mask: whole(mask, case.view, case.batch), case.orders
        ),
        'JAX loop, tail': one_by_one(jax.jit(game), case.orders),
        **{f'jaxprune {loop}, {size}': through(loop, size) for loop in LOOPS for size in at_once},
    }


def one_by_one(losses: Callable[[Any], Any], orders: np.ndarray) -> Callable[[], np.ndarray]:
    """The algorithm as it stands in a paper: a loop over orders and removals.

    Args:
      losses: mask -> losses of all examples.
    """

    def values() -> np.ndarray:
        total: Any = 0
        for order in orders:
            mask = np.ones(len(order), bool)
            seen = [losses(mask)]
            for unit in order:
                mask = mask.copy()  # JAX may still read the last one
                mask[unit] = False
                seen.append(losses(mask))
            credits = np.empty((len(order), len(seen[0])), np.float32)
            credits[order] = np.diff(np.stack([np.asarray(loss) for loss in seen]), axis=0)
            total = total + credits
        return total / len(orders)

    return values
