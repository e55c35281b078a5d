"""Prunable leaves by path, on the parameter trees of the common libraries."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import tree
from jaxprune.errors import PruneError


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    """A layer as equinox keeps it: a dataclass that is a pytree, with one static field."""

    weight: jax.Array
    bias: jax.Array
    name: str = dataclasses.field(metadata={'static': True}, default='')


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    layers: list
    norm: jax.Array


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(3, (2, 2), name='conv')(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.MultiHeadDotProductAttention(2, name='attention')(x.reshape(x.shape[0], -1, 3 * 2))
        return nn.Dense(4, name='head')(nn.Embed(5, 6, name='embed')(jnp.zeros(1, int)) + x)


def flax_params():
    abstract = jax.eval_shape(Net().init, jax.random.key(0), jnp.zeros((1, 4, 4, 1)))['params']
    return jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), abstract)  # cheaper than to draw


def plain_params():
    """A list in a dict, with the names of haiku and of hand-written code."""
    return {
        'layers': [{'w': jnp.ones((2, 3)), 'b': jnp.ones(3)}, {'w': jnp.ones((3, 1))}],
        'deep': {'very': ({'kernel': jnp.full((2, 2), 2.0)},)},
        'scale': jnp.ones((2, 2)),
    }


def module_params():
    return Model(
        [Linear(jnp.ones((3, 2)), jnp.ones(3), 'a'), Linear(jnp.ones((1, 3)), jnp.ones(1), 'b')],
        jnp.ones(2),
    )


TREES = {
    'flax': (
        flax_params,
        [
            *(f'attention/{name}/kernel' for name in ('key', 'out', 'query', 'value')),
            'conv/kernel',
            'head/kernel',
        ],
    ),
    'plain': (plain_params, ['deep/very/0/kernel', 'layers/0/w', 'layers/1/w']),
    'dataclass': (module_params, ['layers/0/weight', 'layers/1/weight']),
}
each_tree = pytest.mark.parametrize(('make', 'expected'), TREES.values(), ids=TREES)


@each_tree
def test_kernels_are_picked_in_sorted_order(make, expected):
    """Expectation: all kernels with the classifier; no biases (attention's have two axes), no
    normalisation, no embedding."""
    assert list(jp.pick(make())) == expected == sorted(expected)


@each_tree
def test_put_is_the_inverse_of_pick(make, expected):
    """Expectation: the same tree; and with other values only the picked leaves change."""
    params = make()
    weights = jp.pick(params)
    same = jp.put(params, weights)
    assert jax.tree.structure(same) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, same, params))
    new = jp.put(params, {path: leaf + 5 for path, leaf in weights.items()})
    for (path, before), (_, after) in zip(tree.paths(params), tree.paths(new), strict=True):
        np.testing.assert_array_equal(after, before + 5 if path in expected else before)


@each_tree
def test_masks_zero_what_they_prune(make, expected):
    """Expectation: exact zeros, also where the weight is NaN or infinite; nothing else changes."""
    params = make()
    weights = jp.pick(params)
    masks = {p: jnp.arange(w.size).reshape(w.shape) % 3 > 0 for p, w in weights.items()}
    broken = jp.put(params, {p: jnp.where(masks[p], w, jnp.nan) for p, w in weights.items()})
    masked = jax.jit(jp.apply_masks)(broken, masks)
    assert jax.tree.structure(masked) == jax.tree.structure(params)
    for (path, before), (_, after) in zip(tree.paths(params), tree.paths(masked), strict=True):
        if path in expected:
            before = np.where(masks[path], before, 0)
        np.testing.assert_array_equal(after, before)
        assert after.dtype == before.dtype
    # Some masks only: the other leaves stay.
    one = {expected[0]: masks[expected[0]]}
    for path, leaf in jp.pick(jp.apply_masks(params, one)).items():
        assert bool((leaf == weights[path]).all()) == (path not in one)


@each_tree
def test_mask_tree_and_ones(make, expected):
    """Expectation: the masks in the shape of the tree, True elsewhere; `ones` keeps everything."""
    params = make()
    masks = tree.ones(jp.pick(params))
    assert list(masks) == expected
    assert all(m.dtype == bool and bool(m.all()) for m in masks.values())
    masks = jax.tree.map(jnp.logical_not, masks)
    whole = tree.mask_tree(params, masks)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    for path, leaf in tree.paths(whole):
        assert bool(leaf.any()) == (path not in expected)


def test_lower_precision_stays():
    """Expectation: a mask does not change the type of a weight."""
    params = {'kernel': jnp.ones((2, 2), jnp.bfloat16)}
    masked = jp.apply_masks(params, {'kernel': jnp.eye(2, dtype=bool)})
    assert masked['kernel'].dtype == jnp.bfloat16


def test_sorted_by_path_not_by_layer():
    """Expectation: plain string order, '10' before '2', the same in `pick` and `shapes`."""
    params = {'layers': [{'w': jnp.ones((1, i + 1))} for i in range(11)]}
    expected = ['layers/0/w', 'layers/1/w', 'layers/10/w', 'layers/2/w']
    assert list(jp.pick(params))[:4] == expected
    found = jp.shapes(dict(reversed(jp.pick(params).items())))
    assert list(found)[:4] == expected
    assert found['layers/10/w'] == (1, 11)


def test_abstract_trees():
    """Expectation: shapes are enough: no array is made to learn what is prunable."""
    abstract = jax.eval_shape(flax_params)
    assert jp.shapes(jp.pick(abstract)) == jp.shapes(jp.pick(flax_params()))


# --- rules ------------------------------------------------------------------------------------


def test_rules():
    """Expectation: the first pattern that is found anywhere in a path decides, else `kernels`."""
    params = plain_params()
    assert list(jp.pick(params, jp.rules(('layers/1', False)))) == [
        'deep/very/0/kernel',
        'layers/0/w',
    ]
    assert list(jp.pick(params, jp.rules(('scale', True), ('/b$', True)))) == [
        'deep/very/0/kernel',
        'layers/0/b',
        'layers/0/w',
        'layers/1/w',
        'scale',
    ]
    ordered = jp.rules(('layers/0/w', True), ('layers', False), ('deep', False))
    assert list(jp.pick(params, ordered)) == ['layers/0/w']


def test_any_function_is_a_rule():
    """Expectation: the type: (path, leaf) -> bool, on all leaves."""
    assert list(jp.pick(plain_params(), lambda path, leaf: leaf.ndim == 1)) == ['layers/0/b']


def test_a_pattern_that_matches_nothing_is_an_error():
    """Expectation: the misspelt pattern and the paths there are."""
    with pytest.raises(PruneError, match=r"pattern 'haed' matches no parameter.*head/kernel"):
        jp.pick(flax_params(), jp.rules(('conv', False), ('haed', False)))


def test_nothing_prunable_is_an_error():
    """Expectation: the paths there are; 'none' for an empty tree."""
    with pytest.raises(PruneError, match=r'no parameter is prunable.*deep/very/0/kernel'):
        jp.pick(plain_params(), lambda path, leaf: False)
    with pytest.raises(PruneError, match='there are: none'):
        jp.pick({})


# --- mismatches -------------------------------------------------------------------------------


@pytest.mark.parametrize('use', [jp.put, jp.apply_masks, tree.mask_tree])
def test_an_unknown_path_is_an_error(use):
    """Expectation: the path, and the nearest one there is."""
    with pytest.raises(
        PruneError, match=r"no parameter 'layers/0/v': did you mean 'layers/0/[wb]'"
    ):
        use(plain_params(), {'layers/0/v': jnp.ones((2, 3), bool)})


@pytest.mark.parametrize('use', [jp.put, jp.apply_masks, tree.mask_tree])
def test_another_shape_is_an_error(use):
    """Expectation: the path and both shapes; no silent broadcast."""
    with pytest.raises(PruneError, match=r"'layers/0/w' has shape \(2, 3\), not \(1, 3\)"):
        use(plain_params(), {'layers/0/w': jnp.ones((1, 3), bool)})


def test_path_sets_must_be_equal():
    """Expectation: what is missing and what is too much, sorted."""
    tree.check_same_paths('masks', ['b', 'a'], {'a': 0, 'b': 1})
    with pytest.raises(PruneError, match=r'^masks lack a, c and have unknown x$'):
        tree.check_same_paths('masks', ['x', 'b'], ['a', 'b', 'c'])
    with pytest.raises(PruneError, match=r'^scores have unknown x$'):
        tree.check_same_paths('scores', ['x', 'b'], ['b'])


def test_a_view_needs_all_masks():
    """Expectation: a view with masks for some of the leaves is an error, not half a view."""
    problem = jp.problem_from_functions(lambda key: plain_params(), lambda params, x: x)
    with pytest.raises(PruneError, match='masks lack deep/very/0/kernel, layers/1/w'):
        jp.view(problem, plain_params(), masks={'layers/0/w': jnp.ones((2, 3), bool)})


def test_two_leaves_with_one_path_are_refused():
    """`pick` would otherwise drop one of them silently."""
    clash = {'a/b': {'kernel': jnp.ones((2, 2))}, 'a': {'b': {'kernel': jnp.ones((2, 2))}}}
    with pytest.raises(PruneError, match="'a/b/kernel'"):
        tree.pick(clash)


def test_nnx_paths_count_as_kernels():
    """flax nnx keeps an array under `value`; the name before it identifies a kernel."""
    params = {'conv': {'kernel': {'value': jnp.ones((2, 2))}, 'bias': {'value': jnp.ones((2, 2))}}}
    assert list(tree.pick(params)) == ['conv/kernel/value']
