"""Batches of any size: a mean counts every example once, however the examples are cut."""

import functools
import itertools

import jax
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import flow, score
from jaxprune.errors import PruneError
from jaxprune.method import host_loop
from jaxprune.nn import MLP
from jaxprune.score.loss import examples, one_input, split

KEY = jax.random.key(0)
PROBLEM = jp.problem_from_flax(MLP((7, 5), classes=3), (6,))
PARAMS, STATE = jax.jit(PROBLEM.init)(KEY)
RNG = np.random.default_rng(0)
MASKS = {p: RNG.random(w.shape) < 0.7 for p, w in jp.pick(PARAMS).items()}
VIEW = jax.jit(functools.partial(jp.view, PROBLEM))(PARAMS, STATE, MASKS)
X = RNG.normal(size=(12, 6)).astype(np.float32)
Y = np.arange(12, dtype=np.int32) % 3


def cut(*ends):
    places = [0, *ends, 12]
    pairs = itertools.pairwise(places)
    return [jp.Batch(X[a:b], Y[a:b]) for a, b in pairs]


def some(*names, more):
    """Names of cases: by default, and further ones."""
    return [*names, *(pytest.param(name, marks=pytest.mark.more) for name in more.split())]


WHOLE = jp.Batch(X[None], Y[None])
#: Quantities that are means over examples where nothing couples them.
MEANS = {
    'snip': score.snip(PROBLEM, train=False),
    'grasp': score.grasp(PROBLEM, train=False, temperature=1.0),
    'fisher': score.fisher(PROBLEM),
    'importance': score.importance(PROBLEM, order=2),
    'gradient_norm': flow.gradient_norm(PROBLEM),
    'curvature': flow.gradient_curvature(PROBLEM, train=False),
}


@pytest.mark.parametrize(
    'name', some('grasp', 'fisher', 'curvature', more='snip importance gradient_norm')
)
def test_a_mean_counts_every_example_once(name):
    """Expectation: the same examples in one batch of 12, and in batches of 1, 8 and 3."""
    measure = jax.jit(MEANS[name])
    whole, parts = measure(KEY, VIEW, WHOLE), measure(KEY, VIEW, cut(1, 9))
    for path, expected in whole.items():
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(parts[path], expected, rtol=1e-4, atol=1e-5 * scale)


def test_equal_batches_in_a_list_are_those_of_an_array():
    """Expectation: the same, up to the rounding of two programs."""
    stacked = jp.Batch(X.reshape(3, 4, 6), Y.reshape(3, 4))
    for name, measure in MEANS.items():
        jitted = jax.jit(measure)
        one, other = (jitted(KEY, VIEW, batches) for batches in (stacked, cut(4, 8)))
        for path, expected in one.items():
            scale = float(np.abs(expected).max())
            np.testing.assert_allclose(
                other[path], expected, rtol=1e-5, atol=1e-6 * scale, err_msg=f'{name} {path}'
            )


@pytest.mark.parametrize('name', some('snip', 'prospr', more='taylor synflow ntk_sap lookahead'))
def test_prune_takes_a_list_of_pairs(name):
    """Expectation: the docstring of `prune`; batches as a loader hands them out, the last smaller.
    For SNIP without batch norm it is the mask of all examples together."""
    data = [(np.asarray(X[i : i + 5]), np.asarray(Y[i : i + 5])) for i in (0, 5, 10)]
    found = jp.prune(PARAMS, name, 0.4, model=PROBLEM, data=data, rounds=1)
    assert found.report.density == pytest.approx(0.4, abs=0.01)
    if name == 'snip':
        together = jp.prune(PARAMS, name, 0.4, model=PROBLEM, data=(X, Y), rounds=1)
        for path, mask in together.masks.items():
            np.testing.assert_array_equal(found.masks[path], mask)


def test_rounds_take_one_batch_each_of_any_size():
    """Expectation: two rounds over two batches, written out."""
    pruner = jp.get_pruner(PROBLEM, 'snip')
    update = jax.jit(pruner.update)
    pruner = pruner._replace(update=update)
    plan = jp.plan_rounds(jp.shapes(VIEW.weights), density=0.2, rounds=2)
    batches = cut(4)
    found, _ = jp.prune_rounds(pruner, KEY, VIEW, plan.counts, batches, loop=host_loop)
    view = VIEW
    for i, batch in enumerate(batches):
        counts = {path: column[i] for path, column in plan.counts.items()}
        _, masks, _ = update(KEY, (), view, counts, [batch])
        view = jp.view(PROBLEM, PARAMS, STATE, masks)
    for path, mask in view.masks.items():
        np.testing.assert_array_equal(found.masks[path], mask)
    with pytest.raises(PruneError, match='unequal size need loop=host_loop'):
        jp.prune_rounds(pruner, KEY, VIEW, plan.counts, batches)


def test_what_is_no_batches_is_refused():
    """Expectation: one line each."""
    for batches in ([], [(X, Y)], [X]):
        with pytest.raises(PruneError, match='a list of batches holds a Batch for each'):
            split(batches)
    data = [(X, Y), (X[:, :4], Y)]
    with pytest.raises(PruneError, match='examples of different shapes'):
        jp.prune(PARAMS, 'snip', 0.4, model=PROBLEM, data=data)
    assert examples(cut(1, 9), 'x').shape == (12, 6)
    assert one_input(cut(1, 9), 'x').shape == (6,)
