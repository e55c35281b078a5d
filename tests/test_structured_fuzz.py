"""Random networks: what `compact` cuts out is what the masks prune, and groups are what they say.

The networks are drawn in `structured_fuzz`; `group_oracle` finds out by trying what acts together.
"""

import collections
import functools

import group_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import structured_fuzz as fuzz
from structured_fuzz_libraries import LIBRARIES

import jaxprune as jp
from jaxprune import tree
from jaxprune.errors import PruneError

LIMITS = {'float32': 1e-5, 'float64': 1e-10}


def _names(text):
    return text.split()


#: Blocks whose groups need all their slices: each index depends on the others.
SINGLE = _names(
    'layer conv norm bias_and_scale position_table residual concat stacked_branches gated_linear '
    'squeeze_excite bilinear experts flip channel_slice other_layout mix_space flatten twice '
    'checkpointed compiled scan_of_layers recurrent autoencoder scaled_kernel gram space_pad '
    'neighbours associative updated'
)
#: Blocks in which an axis is split: slices hold together by their shape too.
SPLIT = _names(
    'attention linear_attention rotary cross_attention talking_heads window_attention depthwise '
    'grouped_conv pixel_shuffle repeat blocks_of_kernels kronecker dynamic_kernel many_axes mapped '
    'nested_loops vmapped_conv'
)


def tried(make, seed, dtype, kind):
    """What becomes of a random network; a wrong number is an error."""
    with jax.enable_x64(dtype == 'float64'):
        case = make(seed, np.dtype(dtype))
        outcome = fuzz.compared(case, np.random.default_rng(seed), kind)
    assert outcome.error < LIMITS[dtype], (case.name, outcome)
    return outcome


@pytest.mark.parametrize(
    'seed', [*range(6), *(pytest.param(n, marks=pytest.mark.more) for n in range(6, 20))]
)
def test_few_networks(seed):
    """Expectation: the compact network's outputs are those of the masked one."""
    dtype = 'float64' if seed % 2 else 'float32'
    small = functools.partial(fuzz.plain, most=2)
    outcome = tried(small, seed, dtype, fuzz.MASKS[seed % 3])
    assert not outcome.refused


@pytest.mark.parametrize('library', LIBRARIES)
def test_few_networks_of_libraries(library):
    """Expectation: as above, for networks of layers that others wrote."""
    pytest.importorskip(library.replace('linen', 'flax').replace('nnx', 'flax'))
    assert tried(LIBRARIES[library], 3, 'float32', 'groups').removed


#: How many random networks the slow run draws, besides those of libraries.
ARCHITECTURES = 500


@pytest.mark.slow
@pytest.mark.parametrize('part', range(10))
def test_many_networks(part):
    """Expectation: as above or a refusal in one line; refusals are few."""
    outcomes = {}
    for seed in range(1000 + part, 1000 + ARCHITECTURES, 10):
        dtype = 'float64' if seed // 10 % 2 else 'float32'
        for kind in fuzz.MASKS:
            outcomes[seed, kind] = tried(fuzz.plain, seed, dtype, kind)
    for library, make in LIBRARIES.items():
        for seed in range(10 * part, 10 * part + 10):
            dtype = 'float64' if seed % 2 else 'float32'
            outcomes[library, seed] = tried(make, seed, dtype, fuzz.MASKS[seed % 3])
    report(outcomes.values())
    jax.clear_caches()


def report(outcomes):
    """Prints what became of networks; few may be refused."""
    reasons = collections.Counter(fuzz.kind_of(o.refused) for o in outcomes if o.refused)
    removed, worst = sum(o.removed for o in outcomes), max(o.error for o in outcomes)
    print(f'\n{len(outcomes)} networks, {removed} groups removed, largest error {worst:.1e}')
    for reason, count in reasons.most_common():
        print(f'  {count} refused: {reason}')
    assert sum(reasons.values()) <= 0.05 * len(outcomes)
    assert removed > len(outcomes)


# --- groups by trying ---------------------------------------------------------------------------


def faults(seed, choices, apart):
    with jax.enable_x64(True):
        case = fuzz.plain(seed, np.float64, choices, most=3)
        found = jp.groups(case.apply, case.params, case.x, case.state)
        rng = np.random.default_rng(seed)
        return case.name, group_oracle.faults(case, found.families, rng, apart)


@pytest.mark.parametrize('seed', [3, 5])
def test_groups_are_what_acts_together(seed):
    """Expectation: nothing that dies with a group is missing; its slices need each other."""
    assert faults(seed, SINGLE, apart=True)[1] == []


@pytest.mark.slow
@pytest.mark.parametrize('choices', ['single', 'split'])
def test_many_groups_are_what_acts_together(choices):
    """Expectation: as above."""
    blocks = SINGLE if choices == 'single' else SINGLE + 2 * SPLIT
    for seed in range(60):
        name, wrong = faults(seed, blocks, apart=choices == 'single')
        assert not wrong, (name, wrong)
        if seed % 20 == 19:
            jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize('part', range(4))
def test_each_group_goes_alone(part):
    """Expectation: one group of each family without the others; compact is masked."""
    with jax.enable_x64(True):
        for seed in range(part, 60, 4):
            case = fuzz.plain(seed, np.float64, most=2)
            found = jp.groups(case.apply, case.params, case.x, case.state)
            compiled = jax.jit(case.apply)
            for family in found.families:
                if not family.reason:
                    alone(case, compiled, family, family.size - 1)


def alone(case, compiled, family, number):
    masks = {path: np.ones(a.shape, bool) for path, a in tree.paths(case.params)}
    fuzz.cut(masks, family, number)
    small = jp.compact(case.apply, case.params, masks, case.x, model_state=case.state)
    assert small.removed == {family.name: 1}
    masked = tree.apply_masks(case.params, masks)
    want = compiled(*fuzz.arguments(masked, case.state, case.x))
    got = jax.jit(small.apply)(*fuzz.arguments(small.params, small.model_state, case.x))
    assert fuzz.largest_error(got, want) < 1e-10, (case.name, family.name)


# --- the smaller function is a function ---------------------------------------------------------

DIFFERENTIATED = [1, 3, 5, 7, 11, 13, 15, 17, 19, 23, 25, 27]


@pytest.mark.parametrize('seed', DIFFERENTIATED[:1])
def test_derivatives(seed):
    """Expectation: derivatives are those of the masked network, cut; a batch may be mapped over."""
    derivatives(seed)


@pytest.mark.slow
@pytest.mark.parametrize('seed', DIFFERENTIATED[1:])
def test_more_derivatives(seed):
    """Expectation: as above."""
    derivatives(seed)


def derivatives(seed):
    with jax.enable_x64(True):
        case = fuzz.plain(seed, np.float64, SINGLE + SPLIT)
        rng = np.random.default_rng(seed)
        found = jp.groups(case.apply, case.params, case.x, case.state)
        masks, _ = fuzz.random_masks(case, found.families, rng)
        small = jp.compact(case.apply, case.params, masks, case.x, model_state=case.state)
        masked = tree.apply_masks(case.params, masks)

        def slopes(apply, params, state):
            def total(params):
                out = jax.tree.leaves(apply(*fuzz.arguments(params, state, case.x)))
                return sum(jnp.sin(o).sum() for o in out)

            return jax.jit(jax.value_and_grad(total))(params)

        want, whole = slopes(case.apply, masked, case.state)
        got, cut = slopes(small.apply, small.params, small.model_state)
        assert abs(got - want) < 1e-10 * abs(want)
        for path, slope in tree.paths(cut):
            wanted = np.asarray(dict(tree.paths(whole))[path])
            for axis, at in small.kept.get(path, {}).items():
                wanted = np.take(wanted, at, axis)
            np.testing.assert_allclose(slope, wanted, rtol=1e-9, atol=1e-9, err_msg=path)
        many = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), small.params)
        each = jax.jit(
            jax.vmap(lambda p: small.apply(*fuzz.arguments(p, small.model_state, case.x)))
        )(many)
        first = jax.tree.map(lambda a: a[0], each)
        assert fuzz.largest_error(
            first, jax.jit(small.apply)(*fuzz.arguments(small.params, small.model_state, case.x))
        ) < 1e-10  # fmt: skip


_RNG = np.random.default_rng(0)
_X = _RNG.normal(size=(2, 5)).astype(np.float32)
_SHAPES = {
    'in': (5, 6),
    'out': (6, 3),
    'over': (2, 6),
    'long': (12, 3),
    'mix': (2,),
    'kernel': (6, 6),
}
_PARAMS = {k: _RNG.normal(size=s).astype(np.float32) for k, s in _SHAPES.items()}


def _hidden(p, x):
    return jnp.tanh(x @ p['in'])


def _over_time(p, x):
    return jnp.tanh(jnp.einsum('bt,dc->btc', x, p['over']))


#: How single operations were followed wrongly, or not at all: what is computed, whether units go.
OPERATIONS = {
    'one channel for all': (lambda p, x: (_hidden(p, x)[:, 3:4] * _hidden(p, x)) @ p['out'], True),
    'one channel, reshaped': (lambda p, x: _hidden(p, x)[:, 3:4].reshape(2, 1, 1) + p['out'], True),
    'cumlogsumexp': (lambda p, x: jax.lax.cumlogsumexp(_over_time(p, x), axis=1) @ p['out'], True),
    'sort': (lambda p, x: jnp.sort(_over_time(p, x), axis=1) @ p['out'], True),
    'argsort': (lambda p, x: jnp.argsort(_over_time(p, x), axis=1) * 1.0 @ p['out'], True),
    'take_along_axis': (
        lambda p, x: jnp.take_along_axis(h := _over_time(p, x), jnp.argsort(h, 1), 1) @ p['out'],
        True,
    ),
    'stack': (
        lambda p, x: jnp.einsum('kbc,k->bc', jnp.stack([_hidden(p, x)] * 2), p['mix']) @ p['out'],
        True,
    ),
    'unstack': (lambda p, x: sum(jnp.unstack(_hidden(p, x), axis=1)), False),
    'tile': (lambda p, x: jnp.tile(_hidden(p, x), (1, 2)) @ p['long'], True),
    'low rank': (lambda p, x: x @ (p['in'] @ p['out']), True),
    'prod': (lambda p, x: _over_time(p, x).prod(1) @ p['out'], True),
    'set': (lambda p, x: jnp.zeros((2, 4, 6)).at[:, 1].set(_hidden(p, x)) @ p['out'], True),
    'set a channel': (lambda p, x: _hidden(p, x).at[:, 2].set(1.0) @ p['out'], False),
    'segment_sum': (
        lambda p, x: jax.ops.segment_sum(_hidden(p, x), jnp.array([1, 1]), 3) @ p['out'],
        True,
    ),
    'complex': (
        lambda p, x: jnp.real(jax.lax.complex(h := _hidden(p, x), h) * 1j) @ p['out'],
        True,
    ),
}


@pytest.mark.parametrize('name', OPERATIONS)
def test_operations(name):
    """Expectation: the compact network is the masked one, and units go where they can."""
    apply, goes = OPERATIONS[name]
    used = fuzz.used(apply, _PARAMS, _X)
    case = fuzz.Case(apply, used, None, _X, name)
    outcome = fuzz.compared(case, np.random.default_rng(1), 'groups')
    assert not outcome.refused and outcome.error < 1e-5
    assert bool(outcome.removed) == goes


def test_unknown_operations_in_library_loops_have_a_place():
    """Expectation: `expm` has a loop of operations without a place: that of the call is named."""

    def apply(params, x):
        return _hidden(params, x) @ jax.scipy.linalg.expm(params['kernel']) @ params['out']

    with pytest.raises(PruneError, match=r"operation '\w+' at .*test_structured_fuzz.py:\d+"):
        jp.groups(apply, _PARAMS, _X)


def test_unknown_operations_are_named():
    """Expectation: the error has the operation and its place, in one line."""

    def apply(params, x):
        return jnp.real(jnp.fft.fft(x @ params['a'], axis=0)) @ params['b']

    params = {'a': np.ones((3, 4), np.float32), 'b': np.ones((4, 2), np.float32)}
    with pytest.raises(PruneError, match=r"operation 'fft' at .*test_structured_fuzz.py:\d+"):
        jp.groups(apply, params, np.ones((2, 3), np.float32))
