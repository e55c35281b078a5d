"""The laws every method is held to, in one file: a new registry line is tested without a new line.

The laws are those of the README ("Laws"); none of the expectations below is a recorded number.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KINDS, MORE, POINTS, SETTLED, more_unless
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import pruned

from jaxprune import data, method, plan, structure, tree
from jaxprune.problem import view_of
from jaxprune.rng import run_key
from jaxprune.sweep import chunk, make_spec
from jaxprune.sweep.counts import counts_of
from jaxprune.sweep.device_data import device_data
from jaxprune.sweep.engine import make_engine, stacked
from jaxprune.sweep.grid import DENSE, runs
from jaxprune.sweep.layout import mesh_of, over_runs
from jaxprune.sweep.program import hyper_of, make_program, method_numbers
from jaxprune.sweep.strategy import Strategy
from jaxprune.train import train_segment
from jaxprune.types import Batch

#: Methods whose rounds may all happen before training. Those that change training have laws of
#: their own in `test_hooked_methods.py`, those that rewind in `test_life.py`.
METHODS = sorted(n for n, entry in method.METHODS.items() if not (entry.hooked or entry.rewind))
#: Methods that score coupled groups: here they prune units, and counts are those of units.
COUPLED = {name for name in METHODS if method.METHODS[name].coupled}
#: The dense net has no norm, which this one scores.
OF_WEIGHTS = [name for name in METHODS if name not in COUPLED]
ON_DENSE = [name for name in METHODS if name != 'bn_scale']

#: A published number of rounds costs minutes here and proves nothing more than two do.
ROUNDS = {name: min(method.METHODS[name].rounds, 2) for name in METHODS}


def slow_unless(fast, *values):
    """A case whose last value is a method; slow unless it is fast, or the method is new."""
    slow = not fast and values[-1] in SETTLED
    return pytest.param(*values, marks=[pytest.mark.slow] if slow else [])


def test_a_new_method_gets_every_law_by_default():
    """Expectation: no case of a method that is not in the list of settled ones has a mark."""
    made = [f(False, 'mine') for f in (slow_unless, more_unless)]
    made += [f('mine') for f in (on_dense, on_conv)]
    assert not any(case.marks for case in made)
    assert slow_unless(False, 'lamp').marks


SOME = [slow_unless(m in KINDS, m) for m in ON_DENSE]
#: One, where three engines are compared, each to be compiled.
FEW = [slow_unless(m == 'snip', m) for m in ON_DENSE]
OTHER_WAYS = [('plain', 'global'), ('plain', 'erk'), ('jit', 'erk'), ('vmap', 'global')]


def on_dense(name):
    return slow_unless(name in KINDS, 'dense', name)


def on_dense_as_users(name):
    """As `on_dense`, compiled as users do, where cases share engines that must be."""
    case = on_dense(name)
    return pytest.param(*case.values, marks=[*case.marks, pytest.mark.optimised])


def on_conv(name):
    """On a second net, whose programs take long to compile."""
    if name == 'snip':
        return pytest.param('conv', name, marks=MORE)
    return slow_unless(False, 'conv', name)


def table(model, methods, **grid):
    # One step per epoch for the conv net: batch norm amplifies rounding from step to step.
    examples = 256 if model is DENSE_NET else 64
    return {
        'name': 'contract',
        'model': model,
        'data': {'name': 'mnist_small', 'train_examples': examples, 'test_examples': 100},
        'train': {'epochs': 2, 'batch_size': 64, 'momentum': 0.9, 'weight_decay': 1e-3},
        'prune': {'samples_per_class': 2},
        'grid': {
            'method': [
                {'name': m, 'rounds': ROUNDS[m]} | ({'granularity': 'unit'} if m in COUPLED else {})
                for m in methods
            ],
            'compression': [1, 4],
            'seed': [0, 1, 2],
            **grid,
        },
    }


DENSE_NET = {'name': 'mlp', 'widths': [16, 12]}
CONV_NET = {'name': 'small_vgg', 'widths': [3]}
NETS = {'dense': DENSE_NET, 'conv': CONV_NET}


@pytest.fixture(scope='module')
def dataset():
    return data.load('mnist_small')


#: Of most chunks here, padding included: the same, so that they share programs.
ROWS = 5

#: By the names that the tests below give them.
STRATEGIES = {
    'map': Strategy('map', 'scan', 'native', 1),
    'vmap': Strategy('vmap', 'scan', 'native', 1),
    'host': Strategy('unroll', 'host', 'native', 1),
}


class Bench:
    """A specification with all that is needed to run parts of it."""

    def __init__(self, spec, dataset):
        self.spec = make_spec(spec)
        self.runs = runs(self.spec)
        self.program = make_program(self.spec, self.runs[-1])
        self.data = device_data(self.spec, dataset)

        # Two steps of one run, and of stacked runs: methods share the program that trains.
        def two_steps(key, hyper, state):
            order = self.program.order(key, 0)[:2]
            return segment_of(self.program)(np.int32(0), self.data, key, hyper, order, state)

        self.training = jax.jit(two_steps), jax.jit(jax.vmap(two_steps))

    @functools.cached_property
    def state(self):
        """One run before it is pruned or trained."""
        return jax.jit(self.program.init)(run_key(7), hyper_of(self.runs[0]))

    def engine(self, name, devices=1):
        strategy = STRATEGIES[name]._replace(devices=devices)
        return make_engine(strategy, self.program, self.data, jax.local_devices())

    def pruned(self, engine, members):
        """Rows and states of runs of one method after all its rounds, with info and counts."""
        rows = chunk.rows_of(members, ROWS, engine)[0]
        return rows, *pruned(engine, self.program, rows, members)


def segment_of(program):
    """The compiled loop of training, for one run."""
    return train_segment(program.stages[False].step)


@pytest.fixture(scope='module')
def benches(dataset):
    tables = table(DENSE_NET, ON_DENSE), table(CONV_NET, METHODS)
    return {net: Bench(t, dataset) for net, t in zip(NETS, tables, strict=True)}


@pytest.fixture(scope='module')
def engines(benches):
    """One engine per net and strategy, shared: compiled functions are what tests wait for.

    Only cases marked `optimised` may compile those of the dense net, as some laws hold bit for bit.
    """
    return {
        (net, strategy): benches[net].engine(strategy)
        for net in NETS
        for strategy in ('map', 'vmap', 'host')
    }


def of(bench, name, compression=4.0):
    return [r for r in bench.runs if r.method.name == name and r.compression == compression]


def what_competes(bench, run):
    return bench.program.competing(run.method)


def rows_of(states, i):
    if isinstance(states, list):  # of an engine: slots of as many rows
        size = len(jax.tree.leaves(states[0])[0])
        states, i = states[i // size], i % size
    return jax.tree.map(lambda leaf: leaf[i], jax.device_get(states))


def unrolled(body, carried, xs):
    """`jax.lax.scan` without a loop: on the CPU convolutions in loops compile and run slowly."""
    outputs = []
    for i in range(len(jax.tree.leaves(xs)[0])):
        carried, output = body(carried, jax.tree.map(lambda leaf, i=i: leaf[i], xs))
        outputs.append(output)
    return carried, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


@pytest.mark.parametrize(('net', 'name'), [*map(on_dense, ON_DENSE), *map(on_conv, METHODS)])
def test_many_runs_equal_single_runs(benches, net, name):
    """Law: N vmapped runs = the same N runs one by one, from initialisation to trained weights.

    In float64, where another order of summation cannot move a weight across a threshold.
    """
    bench = benches[net]
    members = of(bench, name)[:2]
    events, numbers = bench.program.events(members[0].method), method_numbers(members[0])
    loop = jax.lax.scan if net == 'dense' else unrolled

    def pruned_run(key, hyper, counts):
        state = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf,
            bench.program.init(key, hyper),
        )
        order = bench.program.order(key, 0)
        rounds = events(0, bench.data, key, hyper._replace(method=numbers), order)
        state, _ = method.run_rounds(rounds, state, counts, loop=loop)
        return state._replace(method_state=())

    with jax.enable_x64(True):
        keys, hypers = stacked(members)
        tables = [counts_of(bench.program, r).counts for r in members]
        counts = {path: np.stack([t[path] for t in tables]) for path in tables[0]}
        together = jax.jit(jax.vmap(pruned_run))(keys, hypers, counts)
        together, losses = bench.training[1](keys, hypers, together)
        alone = jax.jit(pruned_run)
        for i, run in enumerate(members):
            key, hyper = run_key(run.seed), hyper_of(run)
            apart, loss = bench.training[0](key, hyper, alone(key, hyper, tables[i]))
            row = rows_of(together, i)
            chex.assert_trees_all_equal(row.masks, apart.masks)
            assert tree.pick(row.params)[next(iter(row.masks))].dtype == np.float64
            chex.assert_trees_all_close(row, apart, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(losses[i], loss, rtol=1e-9)


@pytest.mark.optimised
@pytest.mark.parametrize('name', FEW)
def test_strategies_agree(benches, engines, name):
    """Law: the numbers do not depend on how runs are batched; float32, so up to rounding."""
    bench = benches['dense']
    members = of(bench, name)
    trained = {}
    for strategy in ('map', 'vmap', 'host'):
        engine = engines['dense', strategy]
        rows, states, *_ = bench.pruned(engine, members)
        trained[strategy], _ = engine.advance(0, bench.program.steps, rows, states)
    for i in range(len(members)):
        first = rows_of(trained['host'], i)
        for strategy in ('map', 'vmap'):
            other = rows_of(trained[strategy], i)
            for path, mask in first.masks.items():
                swapped = (mask & ~other.masks[path]).sum()
                assert swapped <= 0.002 * mask.sum() and mask.sum() == other.masks[path].sum()
            if all(np.array_equal(first.masks[p], other.masks[p]) for p in first.masks):
                chex.assert_trees_all_close(first.params, other.params, rtol=1e-3, atol=1e-5)


@pytest.mark.optimised
@pytest.mark.parametrize(
    'name',
    [
        pytest.param(m, marks=MORE) if m in KINDS[:-1] else slow_unless(m == 'force', m)
        for m in ON_DENSE
    ],
)
def test_chunk_size_position_and_padding_change_nothing(benches, engines, name):
    """Law: a run's rows are the same in any chunk, at any place, with or without padding."""
    bench = benches['dense']
    engine = engines['dense', 'map']
    members = of(bench, name)
    other = of(bench, 'dense', 1.0)
    together, layers, *_ = chunk.run_chunk(bench.spec, bench.program, engine, members, ROWS)
    for arrangement, size in (
        ([members[2], *other, members[0]], ROWS),
        ([members[0]], 1),
        ([members[1]], ROWS),
    ):
        results, kept, *_ = chunk.run_chunk(bench.spec, bench.program, engine, arrangement, size)
        for run in arrangement:
            if run in members:
                mine = {'run_id': run.run_id}
                for first, second in ((together, results), (layers, kept)):
                    a, b = (f.filter(**mine).to_dicts() for f in (first, second))
                    assert a == b and a


@pytest.mark.optimised
@pytest.mark.parametrize('strategy', ['map', pytest.param('vmap', marks=pytest.mark.slow)])
def test_device_count_changes_nothing(benches, engines, strategy):
    """Law: two devices give the rows that one gives; an odd run is padded and dropped."""
    bench = benches['dense']
    members = [*of(bench, 'snip'), *of(bench, 'dense', 1.0)[:2]]
    one, *_ = chunk.run_chunk(bench.spec, bench.program, engines['dense', strategy], members, ROWS)
    two, *_ = chunk.run_chunk(bench.spec, bench.program, bench.engine(strategy, 2), members, ROWS)
    if strategy == 'map':
        assert one.equals(two)
    else:  # a batched product over 3 runs may sum in another order than one over 5
        assert one.select('run_id', 'density').equals(two.select('run_id', 'density'))
        np.testing.assert_allclose(one['train_loss'], two['train_loss'], rtol=1e-4)


@pytest.mark.parametrize(
    ('net', 'name'), [*map(on_dense_as_users, ON_DENSE), *map(on_conv, METHODS)]
)
def test_exact_counts_and_zeros_after_every_segment(benches, engines, net, name):
    """Laws: counts are exact; pruned weights and their moments are zero after every segment.

    And before training every kept weight has its initial value, also one that went and returned.
    """
    bench = benches[net]
    engine = engines[net, 'map' if net == 'dense' else 'host']
    members = of(bench, name)
    rows, states, info, counts = bench.pruned(engine, members)
    for i, dense in enumerate(rows_of(engine.init(rows), i) for i in range(len(members))):
        state = rows_of(states, i)
        chex.assert_trees_all_equal(state.params, tree.apply_masks(dense.params, state.masks))
    for epoch in range(2):
        for i in range(len(members)):
            state = rows_of(states, i)
            masks = state.masks
            kept = {p: int(k[i]) for p, k in info.kept.items()}
            assert sum(kept.values()) == counts['*'][i, -1]
            if name not in COUPLED or all(
                kept.values()
            ):  # behind a layer without units no weight is left
                alive = what_competes(bench, members[i]).alive(masks)
                assert {p: int(m.sum()) for p, m in alive.items()} == kept
            assert int(info.nonfinite[i]) == 0
            assert_zero_where_pruned(bench.program.problem, state)
        start = epoch * bench.program.steps
        states, _ = engine.advance(start, start + bench.program.steps, rows, states)


def assert_zero_where_pruned(problem, state):
    weights = tree.pick(state.params, problem.prunable)
    for path, mask in state.masks.items():
        assert not np.any(weights[path][~mask]), path
        assert np.any(weights[path]) or not mask.any(), path
    moments = [
        (jax.tree_util.keystr(path, simple=True, separator='/'), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    ]
    touched = 0
    for path, mask in state.masks.items():
        for name, leaf in moments:
            if name.endswith(path):
                touched += 1
                assert not np.any(leaf[~mask]), name
    assert touched == len(state.masks), 'momentum keeps one moment per weight'


@pytest.mark.optimised
@pytest.mark.parametrize('name', SOME)
def test_density_one_is_the_dense_control(benches, engines, name):
    """Law: pruning to density 1 leaves every later number as it is without pruning, bit for bit."""
    bench = benches['dense']
    engine = engines['dense', 'map']
    control = of(bench, 'dense', 1.0)
    all_kept = [r._replace(method=of(bench, name)[0].method) for r in control]
    a, *_ = chunk.run_chunk(bench.spec, bench.program, engine, control, ROWS)
    b, *_ = chunk.run_chunk(bench.spec, bench.program, engine, all_kept, ROWS)
    numbers = ['step', 'density', 'train_loss', 'test_loss', 'test_accuracy', 'seed']
    assert a.select(numbers).equals(b.select(numbers))
    assert set(b['density']) == {1.0} and DENSE.label == 'dense'


@pytest.mark.parametrize(
    ('strategy', 'methods'),
    [
        ('vmap', ['snip', 'force', 'gate_taylor']),
        *(pytest.param(s, ON_DENSE, marks=pytest.mark.slow) for s in ('map', 'vmap', 'host')),
    ],
)
def test_two_traces_at_most(dataset, strategy, methods):
    """Law: methods, seeds, densities, learning rates share one trace of every compiled function."""
    spec = table(DENSE_NET, methods, train={'learning_rate': [0.1, 0.01], 'momentum': [0.0, 0.9]})
    bench = Bench(spec, dataset)
    engine = bench.engine(strategy)
    for first in range(0, len(bench.runs), 24):
        members = bench.runs[first : first + 24]
        chunk.run_chunk(bench.spec, bench.program, engine, members, 24)
    traces = engine.traces()
    steps = [count for name, count in traces.items() if name.startswith('steps')]
    assert steps == [1]
    assert all(1 <= count <= 2 for count in traces.values()), traces
    assert len([name for name in traces if name.startswith('prune')]) == len(methods)


@pytest.mark.parametrize('net', NETS)
def test_segment_holds_no_sort_no_score_and_no_cond(benches, net):
    """Law: masks are data. The segment trains, and does nothing else.

    A network of n layers takes n products forward and 2 n - 1 backward (none for the input);
    a score inside would add its own.
    """
    bench = benches[net]
    members = of(bench, METHODS[0])[:1]
    rows = stacked(members)
    key, hyper = jax.tree.map(lambda leaf: leaf[0], rows)
    state = jax.jit(bench.program.init)(key, hyper)
    order = bench.program.order(key, 0)
    jaxpr = jax.make_jaxpr(segment_of(bench.program))(
        np.int32(0), bench.data, key, hyper, order, state
    )
    text = str(jaxpr)
    for word in ('sort', 'top_k', 'cond', 'while'):
        assert not re.search(rf'\b{word}\b', text), word
    layers = len(bench.program.shapes)
    products = len(re.findall(r'\b(dot_general|conv_general_dilated)\b\[', text))
    assert products == 3 * layers - 1


@pytest.mark.parametrize('net', NETS)
@pytest.mark.parametrize('strategy', ['map', 'vmap'])
def test_segment_on_two_devices_has_no_collective(benches, net, strategy):
    """Law: runs are independent, so devices never talk while training."""
    if net == 'conv' and strategy == 'map':
        pytest.skip('a convolution is never put in a loop on CPU')
    bench = benches[net]
    engine = bench.engine(strategy, 2)
    rows = stacked(of(bench, METHODS[0])[:2])
    states = engine.init(rows)
    mesh = mesh_of(Strategy(strategy, 'scan', 'native', 2), jax.local_devices())
    segment = over_runs(segment_of(bench.program), (None, None, 0, 0, 0, 0), strategy, mesh)
    order = jax.vmap(bench.program.order, in_axes=(0, None))(rows.keys, 0)
    data_everywhere = jax.device_put(
        bench.data, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
    compiled = jax.jit(segment).lower(
        np.int32(0), data_everywhere, rows.keys, rows.hyper, order, states[0]
    )
    hlo = compiled.compile().as_text()
    assert 'num_partitions=2' in hlo
    for word in ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute', 'reduce-scatter'):
        assert word not in hlo


@pytest.mark.parametrize(
    ('how', 'allocation', 'name'),
    [
        *(slow_unless(m == 'synflow', 'vmap', 'erk', m) for m in OF_WEIGHTS),
        *(slow_unless(False, 'jit', 'global', m) for m in POINTS),
        *(more_unless(m in KINDS, 'jit', 'global', m) for m in ON_DENSE if m not in POINTS),
        *(slow_unless(False, *case, m) for case in OTHER_WAYS for m in OF_WEIGHTS),
    ],
)
def test_any_density_is_met_exactly_and_nested(benches, how, allocation, name):
    """Laws: exact counts for any traced k; pruned stays pruned; the state keeps its structure."""
    bench = benches['dense']
    problem = bench.program.problem
    competing = what_competes(bench, of(bench, name)[0])
    pruner = method.get_pruner(problem, name, allocation=allocation, groups=competing)
    key, view = run_key(7), view_of(problem, bench.state)
    batches = noise_batches(1)

    def two_events(key, first, second):
        begun = pruner.init(key, view)
        begun, masks, before = pruner.update(key, begun, view, first, batches)
        pruned = view._replace(
            masks=masks, weights={p: jnp.where(masks[p], w, 0) for p, w in view.weights.items()}
        )
        done, again, info = pruner.update(key, begun, pruned, second, batches)
        chex.assert_trees_all_equal_shapes_and_dtypes(begun, done)
        return masks, again, before, info

    def second_of_two(f):
        both = jax.jit(jax.vmap(f))

        def called(*args):
            twice = jax.tree.map(lambda a: jnp.stack([a, a]), args)
            return jax.tree.map(lambda leaf: leaf[1], both(*twice))

        return called

    ways = {'plain': lambda f: f, 'jit': jax.jit, 'vmap': second_of_two}
    transform = ways[how](two_events)

    @settings(max_examples=1 if how == 'plain' else 10, deadline=None, database=None)
    @given(st.floats(0.2 if name in COUPLED else 0.01, 1.0), st.floats(0.05, 1.0))
    def check(density, fraction):
        first = plan.keep_counts(competing.shapes, density, allocation)
        second = {path: int(k * fraction) for path, k in first.items()}
        counts = jax.tree.map(np.int32, (first, second))
        masks, again, before, info = jax.device_get(transform(key, *counts))
        for got, told, wanted in ((masks, before, first), (again, info, second)):
            kept = {p: int(k) for p, k in told.kept.items()}
            if name not in COUPLED or all(
                kept.values()
            ):  # behind a layer without units no weight is left
                alive = competing.alive(got)
                assert {p: int(m.sum()) for p, m in alive.items()} == kept
            assert ({'*': sum(kept.values())} if allocation == 'global' else kept) == wanted
        if method.METHODS[name].monotone:
            assert all(bool((masks[p] | ~again[p]).all()) for p in masks)
        assert {p: m.shape for p, m in masks.items()} == bench.program.shapes

    check()


@pytest.mark.parametrize(
    ('net', 'name'),
    [
        *(slow_unless(False, 'dense', m) for m in POINTS),
        *(more_unless(m in KINDS, 'dense', m) for m in ON_DENSE if m not in POINTS),
        *(slow_unless(m in ('grasp', 'bn_scale'), 'conv', m) for m in METHODS if m != 'prospr'),
        pytest.param('conv', 'prospr', marks=MORE),
    ],
)
def test_what_stands_under_the_mask_changes_no_score(benches, net, name):
    """Law: a kept weight scores the same whether pruned weights stand at zero or do not exist.

    The second time the network multiplies its weights by the masks itself, with noise under them.
    """
    bench = benches[net]
    problem, entry = bench.program.problem, method.METHODS[name]
    view = jax.device_get(view_of(problem, bench.state))
    draw = np.random.default_rng(1)
    masks = {p: draw.random(w.shape) < 0.6 for p, w in view.weights.items()}
    nowhere = {p: np.ones_like(mask) for p, mask in masks.items()}

    def under(masks, noise):
        weights = {p: np.where(masks[p], w, np.float32(0)) for p, w in view.weights.items()}
        noisy = {p: np.where(masks[p], w, np.float32(noise)) for p, w in view.weights.items()}
        params = tree.put(view.params, noisy)
        return view._replace(weights=weights, masks=masks, initial=noisy, params=params)

    def scored(inside, view, batches):
        def apply(params, *args, **kwargs):
            return problem.apply(tree.apply_masks(params, inside), *args, **kwargs)

        other = problem._replace(apply=apply)
        by = {}
        if entry.coupled:
            read = structure.groups_of(other, (28, 28, 1))
            by = {'by': method.competing('unit', bench.program.shapes, lambda: read)}
        options = {k: v for k, v in entry.options.items() if by and k != 'momentum'}
        score = entry.score(other, entry.batch_norm == 'train', **options, **by)
        return jax.jit(functools.partial(score, run_key(3)))(view, batches)

    batches = noise_batches(2)
    found = scored(nowhere, under(masks, 0.0), batches)
    wanted = scored(masks, under(masks, 7.0), batches)
    for path in found:
        mask = np.ones(found[path].shape, bool) if entry.coupled else np.asarray(masks[path])
        one, other = (np.asarray(scores[path])[mask] for scores in (found, wanted))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


def noise_batches(count):
    x = np.random.default_rng(0).normal(size=(count, 20, 28, 28, 1)).astype(np.float32)
    return Batch(jnp.asarray(x), jnp.asarray(np.tile(np.arange(20) % 10, (count, 1)), jnp.int32))


@pytest.mark.optimised
@pytest.mark.parametrize('name', SOME)
def test_a_mask_depends_on_the_seed_alone(benches, engines, name):
    """Same seed, same mask; another seed, another one. (SynFlow and magnitude see the weights.)"""
    bench = benches['dense']
    _, states, *_ = bench.pruned(engines['dense', 'map'], of(bench, name))
    _, again, *_ = bench.pruned(engines['dense', 'map'], of(bench, name))
    chex.assert_trees_all_equal(states[0].masks, again[0].masks)
    first, second = rows_of(states, 0).masks, rows_of(states, 1).masks
    assert any(np.any(first[p] != second[p]) for p in first)
