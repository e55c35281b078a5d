"""Scores of coupled groups, against Torch-Pruning's numbers and by hand.

`golden/structured/depgraph_*` holds the importances of Torch-Pruning 1.6.1, for groups that are
listed with them; `golden/structured/README.md` describes both. Tolerances are those of that file.

Not reproduced, being errors of that code:
  - 'max' and 'prod' of a layer behind a flattened map: the last position of the map that is
    written wins. Here the positions of a unit are added first, as for every other reduction:
    `test_flattened_maps`.
  - the Hessian's diagonal of all but the last example is lost. The numbers are those of the last
    example alone, and are compared with its gradient. `test_the_mean_over_examples` has what was
    meant.
  - scales of batch norm are left out of Taylor's importance, by a wrong type in a comparison;
    those of layer norm are in. Here what counts is what has values.
  - FPGM and the regularisation fail for grouped convolutions.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import more_but
from structured_nets import load

import jaxprune as jp
from jaxprune import PruneError, tree
from jaxprune.score.group_importance import (
    GROUP_MEASURES,
    REDUCTIONS,
    group_decay,
    group_importance,
    group_values,
    local_scores,
    reduced,
)

NAMES = ('convnet', 'densenet', 'encoder', 'grouped', 'mlp', 'mobilenet')
NAMES += tuple(pytest.param(name, marks=pytest.mark.slow) for name in ('resnet20', 'vgg'))
NORMS = {'BatchNorm2d', 'LayerNorm'}
#: Their name for a normalisation -> ours.
NORMALISE = {'standarization': 'min_max', 'sentinel_0.5': 'sentinel'}
TOLERANCES = {'gaussian': 1e-4, 'lamp': 1e-4}


class Member(NamedTuple):
    path: str
    axis: int
    indices: tuple


class Family(NamedTuple):
    name: str
    size: int
    members: tuple


@functools.cache
def families(name):
    """The groups that the file lists, with biases after what they belong to."""
    meta, params = load(f'depgraph_{name}')[1], load(f'depgraph_{name}')[3]
    found = []
    for group in meta['groups']:
        members = []
        for m in group['members']:
            if not m['counted_in_importance']:
                continue
            norm = m['kind'] in NORMS
            leaf = f'{m["layer"]}/{"scale" if norm else "kernel"}'
            array = params[m['layer']][leaf.rsplit('/', 1)[1]]
            axis = 0 if norm else array.ndim - 1 - (m['side'] == 'in')
            at = [[] for _ in range(group['num'])]
            for index, root in zip(m['idxs'], m['root_idxs'], strict=True):
                # A channel of a grouped convolution is read by one row of each of its groups.
                at[root].append(index % array.shape[axis])
            indices = tuple(map(np.array, at))
            members.append(Member(leaf, axis, indices))
            if m['side'] == 'out' and 'bias' in params[m['layer']]:
                members.append(Member(f'{m["layer"]}/bias', 0, indices))
        found.append(Family(group['root'].replace('/', '.'), group['num'], tuple(members)))
    return found


def flattened(family):
    return any(len(at) > 1 for m in family.members for at in m.indices)


@functools.cache
def leaves(name):
    """Weights and their gradients, by path, as NumPy arrays."""
    file = load(f'depgraph_{name}')[0]
    return (
        {key[7:]: file[key] for key in file if key.startswith('params/')},
        {key[13:]: file[key] for key in file if key.startswith('grads/params/')},
    )


@functools.cache
def counted(name, norms=(), biases=False, layers=True):
    """The paths of what counts: kernels, scales of norms of some kinds, biases of both."""
    found = set()
    for group in load(f'depgraph_{name}')[1]['groups']:
        for m in group['members']:
            if m['kind'] in norms or (layers and m['kind'] not in NORMS):
                found.add(f'{m["layer"]}/{"scale" if m["kind"] in NORMS else "kernel"}')
                if biases:
                    found.add(f'{m["layer"]}/bias')
    return found


def settings(name):
    """Key of the file -> measure, paths of what counts, reduction, normalisation."""
    everything = counted(name, ('BatchNorm2d', 'LayerNorm'))
    taylor = counted(name, ('LayerNorm',))  # see the docstring
    scales = counted(name, ('BatchNorm2d',), layers=False)
    found = {
        'fpgm/mean_none': ('distance', counted(name), 'mean', 'none'),
        'bnscale/mean_none': ('magnitude', scales, 'mean', 'none'),
        'bnscale/mean_mean': ('magnitude', scales, 'mean', 'mean'),
        'lamp/default': ('square', everything, 'mean', 'lamp'),
        'taylor/default': ('taylor', taylor, 'mean', 'mean'),
    }
    with_biases = counted(name, ('BatchNorm2d', 'LayerNorm'), biases=True)
    found['magnitude/p2_mean_none_bias'] = ('square', with_biases, 'mean', 'none')
    with_biases = counted(name, ('LayerNorm',), biases=True)
    found['taylor/mean_none_bias'] = ('taylor', with_biases, 'mean', 'none')
    for reduce in REDUCTIONS:
        for p, measure in ((1, 'magnitude'), (2, 'square')):
            for norm in ('mean', 'none'):
                found[f'magnitude/p{p}_{reduce}_{norm}'] = (measure, everything, reduce, norm)
    for norm in ('gaussian', 'lamp', 'max', 'sentinel_0.5', 'standarization', 'sum'):
        found[f'magnitude/p2_mean_{norm}'] = ('square', everything, 'mean', norm)
    for reduce in ('mean', 'sum', 'first'):
        for key, measure in (('', 'taylor'), ('_multivariable', 'taylor_sum')):
            found[f'taylor/{reduce}_none{key}'] = (measure, taylor, reduce, 'none')
    return found


def relative(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize('name', more_but(['convnet', 'encoder', 'grouped', 'mlp'], NAMES))
def test_torch_pruning(name):
    """Every importance in the file but those that the docstring lists."""
    file = load(f'depgraph_{name}')[0]
    keys = settings(name)
    known = {key.removeprefix('imp/').rsplit('/', 1)[0] for key in file if key.startswith('imp/')}
    assert known - {'hessian/mean_none'} <= keys.keys()

    @jax.jit
    def ours(weights, gradients):
        found = {}
        for family in families(name):
            local = {}  # most settings share theirs
            for key, (measure, paths, reduce, norm) in keys.items():
                unsound = reduce in ('max', 'prod') and flattened(family)
                if unsound or f'imp/{key}/{family.name}' not in file:
                    continue
                share = measure, frozenset(paths)
                if share not in local:
                    kept = {p: w for p, w in weights.items() if p in paths}
                    values = group_values(measure, kept, gradients)
                    local[share] = local_scores(values, family, GROUP_MEASURES[measure].slices)
                options = {'reduce': reduce, 'normalise': NORMALISE.get(norm, norm)}
                found[key, family.name] = reduced(local[share], **options)
        return found

    results = jax.device_get(ours(*leaves(name)))
    assert len(results) > 20 * len(families(name))
    for (key, root), scores in results.items():
        error = relative(scores, file[f'imp/{key}/{root}'])
        assert error < TOLERANCES.get(keys[key][3], 1e-5), (key, root, error)


@pytest.mark.parametrize('name', more_but(['grouped', 'mlp', 'encoder'], NAMES))
def test_the_hessian_of_the_last_example(name):
    """Theirs keeps no other example's gradient; kernels and scales of all norms count."""
    file, _, forward, params, stats = load(f'depgraph_{name}')
    paths = counted(name, ('BatchNorm2d', 'LayerNorm'))

    @jax.jit
    def ours(params, x, y):
        def loss(params):
            return -jax.nn.log_softmax(forward(params, stats, x))[0, y[0]]

        weights, gradients = (dict(tree.paths(t)) for t in (params, jax.grad(loss)(params)))
        values = group_values('hessian', {p: weights[p] for p in paths}, gradients)
        return {f.name: group_importance(values, f, normalise='none') for f in families(name)}

    last = jax.device_get(ours(params, file['x'][-1:], file['labels'][-1:]))
    for root, scores in last.items():
        assert relative(scores, file[f'imp/hessian/mean_none/{root}']) < 1e-3, root


@pytest.mark.parametrize('name', [name for name in NAMES if name not in ('encoder', 'grouped')])
def test_group_decay(name):
    """What `GroupNormPruner.regularize` adds; biases and depthwise kernels get nothing."""
    file, weights = load(f'depgraph_{name}')[0], leaves(name)[0]
    paths = counted(name, ('BatchNorm2d', 'LayerNorm'))
    decay = jax.jit(lambda weights: group_decay(weights, families(name)))
    ours = jax.device_get(decay({p: w for p, w in weights.items() if p in paths}))
    for path in weights:
        theirs = file[f'group_norm_reg_delta/params/{path}']
        depthwise = any(
            f'{m["layer"]}/kernel' == path and m['depthwise']
            for group in load(f'depgraph_{name}')[1]['groups']
            for m in group['members']
        )
        if path.endswith('bias') or depthwise:
            assert not theirs.any()
        else:
            assert relative(ours[path], theirs) < 1e-3, path


# --- by hand ------------------------------------------------------------------------------------


def alone(size, path='w', axis=0, each=1):
    """A family of one member; `each` indices go with a group, spaced as behind a flattened map."""
    at = tuple(np.arange(n, size * each, size) for n in range(size))
    return Family('one', size, (Member(path, axis, at),))


def score(values, family, **options):
    return jax.jit(lambda values: group_importance(values, family, **options))(values)


def test_distances():
    """Slices 0, 1, 1, 5: the distances to all others are 7, 5, 5 and 13."""
    values = {'w': np.float32([[0], [1], [1], [5]])}
    scores = score(values, alone(4), slices='distance', normalise='none')
    np.testing.assert_array_equal(scores, [7, 5, 5, 13])


@pytest.mark.parametrize(
    ('normalise', 'expected'),
    [
        ('none', [4, 1, 9]),
        ('mean', [12 / 14, 3 / 14, 27 / 14]),
        ('sum', [4 / 14, 1 / 14, 9 / 14]),
        ('max', [4 / 9, 1 / 9, 1]),
        ('min_max', [3 / 8, 0, 1]),
        (
            'gaussian',
            [-2 / 3 / np.sqrt(49 / 3), -11 / 3 / np.sqrt(49 / 3), 13 / 3 / np.sqrt(49 / 3)],
        ),
        ('sentinel', [1, 1 / 4, 9 / 4]),
        ('lamp', [4 / 13, 1 / 14, 1]),
    ],
)
def test_normalisations(normalise, expected):
    """Of the squares 4, 1 and 9, by hand; their sample variance is 49/3."""
    values = group_values('square', {'w': np.float32([2, -1, 3])})
    scores = score(values, alone(3), normalise=normalise)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_the_sentinel_has_a_rank():
    """A fraction of 0 divides by the lowest of four, of 0.75 by the highest."""
    values = {'w': np.float32([8, 2, 4, 6])}
    for fraction, divisor in ((0, 2), (0.25, 4), (0.5, 6), (0.75, 8)):
        scores = score(values, alone(4), normalise='sentinel', fraction=fraction)
        np.testing.assert_allclose(scores, np.array([8, 2, 4, 6]) / divisor, rtol=1e-6)


def test_flattened_maps():
    """Indices of a unit are added before members are compared: 3 positions of 2 channels."""
    values = {'a': np.float32([[1, 2], [3, 4]]), 'b': np.float32(np.arange(6))[:, None]}
    behind = alone(2, 'b', each=3).members
    family = Family('two', 2, (Member('a', 1, (np.array([0]), np.array([1]))), *behind))
    columns, positions = np.array([4.0, 6]), np.array([0 + 2 + 4.0, 1 + 3 + 5])
    for reduce, expected in (
        ('sum', columns + positions),
        ('mean', (columns + positions) / 2),
        ('max', np.maximum(columns, positions)),
        ('prod', columns * positions),
        ('first', columns),
    ):
        scores = score(values, family, reduce=reduce, normalise='none')
        np.testing.assert_array_equal(scores, expected, err_msg=reduce)


def test_signs_cancel_within_an_index():
    """|sum w g| for each index: 3 - 1 and -2 - 2, then added up for a unit of two positions."""
    weights, gradients = (
        {'w': jnp.array([[3.0, 1], [2, 2]])},
        {'w': jnp.array([[1.0, -1], [-1, -1]])},
    )
    changes = group_values('taylor_sum', weights, gradients)
    sizes = group_values('taylor', weights, gradients)
    options = {'normalise': 'none', 'reduce': 'sum'}
    for family, expected in ((alone(2), [2, 4]), (alone(1, each=2), [6])):
        scores = score(changes, family, slices='absolute', **options)
        np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(score(sizes, alone(2), **options), [4, 4])


def test_the_mean_over_examples():
    """The Hessian's diagonal as meant: values of each example's gradient, then their mean."""
    rng = np.random.default_rng(0)
    w, g = rng.normal(size=(4, 3)), rng.normal(size=(5, 4, 3))

    @jax.jit
    def ours(w, g):
        of_each = jax.vmap(lambda g: group_values('hessian', {'w': w}, {'w': g})['w'])(g)
        return group_importance({'w': of_each.mean(0)}, alone(4), normalise='none')

    scores = ours(w, g)
    np.testing.assert_allclose(scores, np.einsum('nij,ij->i', g**2, w**2) / 5, rtol=1e-5)


def test_families_of_a_network():
    """The families of `jp.groups` as they are: two layers, by the sums that make and read them."""
    rng = np.random.default_rng(1)
    params = {'a': {'kernel': rng.normal(size=(3, 4)), 'bias': rng.normal(size=4)}}
    params['b'] = {'kernel': rng.normal(size=(4, 2))}
    params = jax.tree.map(np.float32, params)

    def apply(p, x):
        return jax.nn.relu(x @ p['a']['kernel'] + p['a']['bias']) @ p['b']['kernel']

    [family] = [f for f in jp.groups(apply, params, np.ones((2, 3))).families if not f.reason]
    squares = group_values('square', dict(tree.paths(params)))
    kernels = {path: v for path, v in squares.items() if 'kernel' in path}
    scores = score(kernels, family, reduce='sum', normalise='none')
    both = (params['a']['kernel'] ** 2).sum(0) + (params['b']['kernel'] ** 2).sum(1)
    np.testing.assert_allclose(scores, both, rtol=1e-5)
    scores = score(squares, family, reduce='mean', normalise='none')
    np.testing.assert_allclose(scores, (both + params['a']['bias'] ** 2) / 3, rtol=1e-5)


@pytest.mark.parametrize('slices', ['sum', 'absolute', 'distance'])
def test_many_runs_at_once(slices):
    """Scores of three networks under `vmap` are those of each alone."""
    rng = np.random.default_rng(2)
    values = {'a': rng.normal(size=(3, 5, 4)), 'b': rng.normal(size=(3, 12, 2))}
    values = jax.tree.map(np.float32, values)
    first = Member('a', 1, tuple(np.arange(4)[:, None]))
    family = Family('two', 4, (first, *alone(4, 'b', each=3).members))

    def one(values):
        return group_importance(values, family, slices=slices, normalise='sentinel')

    together, single = jax.device_get(jax.jit(jax.vmap(one))(values)), jax.jit(one)
    for i, scores in enumerate(together):
        np.testing.assert_allclose(scores, single({k: v[i] for k, v in values.items()}), rtol=1e-5)


def test_decay_of_equal_groups():
    """Where no group is weaker than another all decay at the rate."""
    decay = jax.jit(lambda weights: group_decay(weights, [alone(2)], rate=0.1))
    made = decay({'w': np.float32([2, -2]), 'v': np.ones(3, np.float32)})
    np.testing.assert_allclose(made['w'], [0.2, -0.2], rtol=1e-6)
    np.testing.assert_array_equal(made['v'], np.zeros(3))


def test_decay_grows_with_weakness():
    """Norms 1, 2 and 3: factors 9, 3 and 1, with strongest=9; from two families, both."""
    weights = {'w': np.float32([1, 2, -3])}
    for count in (1, 2):
        families = [alone(3)] * count
        decay = jax.jit(lambda w, f=families: group_decay(w, f, rate=0.5, strongest=9))
        expected = count * 0.5 * np.array([9 * 1, 3 * 2, 1 * -3])
        np.testing.assert_allclose(decay(weights)['w'], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'slices': 'sums'}, "unknown slices 'sums': did you mean 'sum'?"),
        ({'reduce': 'average'}, "unknown reduce 'average'"),
        ({'normalise': 'standardise'}, "unknown normalise 'standardise'"),
        ({'fraction': 1}, 'fraction must be at least 0 and below 1, not 1'),
        ({'values': {'other': jnp.ones(3)}}, 'no member of the family has values; its members: w'),
        (
            {'values': {'w': jnp.ones((2, 3))}},
            r"the values of 'w' have shape \(2, 3\); its 3 groups",
        ),
        ({'family': alone(3, axis=1)}, 'its 3 groups of 3 along axis 1 do not fit'),
    ],
)
def test_wrong_arguments(change, message):
    """One line that names what is wrong."""
    arguments = {'values': {'w': jnp.ones(3)}, 'family': alone(3), **change}
    with pytest.raises(PruneError, match=message) as error:
        group_importance(**arguments)
    assert len(str(error.value).splitlines()) == 1


def test_gradients_are_asked_for():
    with pytest.raises(PruneError, match="taylor takes gradients, also of 'w'"):
        group_values('taylor', {'w': jnp.ones(3)})
    with pytest.raises(PruneError, match="unknown measure 'tailor': did you mean 'taylor'"):
        group_values('tailor', {'w': jnp.ones(3)})
    with pytest.raises(PruneError, match='strongest must be above 0'):
        group_decay({'w': jnp.ones(3)}, [alone(3)], strongest=0)
