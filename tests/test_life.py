"""A run's life in a sweep: rounds at any step, rewinding, phases, batches of training, repairs.

Expectations: the same life driven step by step through the functions of one run, or the numbers of
another run that must agree bit for bit.
"""

import functools

import jax
import numpy as np
import polars as pl
import pytest
from cases import MORE
from fake_engine import nothing_trained
from polars.testing import assert_frame_equal
from sweeps import engine_of, group_of

import jaxprune as jp
from jaxprune import data, flow, tree
from jaxprune.errors import StoreError
from jaxprune.sweep import make_spec, store
from jaxprune.sweep.chunk import rows_of, run_chunk
from jaxprune.sweep.device_data import device_data, examples_of
from jaxprune.sweep.event_calls import event_calls
from jaxprune.sweep.program import hyper_of, make_program, method_numbers
from jaxprune.sweep.strategy import Strategy

ONE = Strategy('map', 'scan', 'native', 1)
TABLE = {
    'name': 'life',
    'model': {'name': 'mlp', 'widths': [12]},
    'data': {'name': 'mnist_small', 'train_examples': 240, 'test_examples': 100},
    'train': {'epochs': 3, 'batch_size': 24, 'momentum': 0.9, 'weight_decay': 1e-3},
    'prune': {'samples_per_class': 1},
    'grid': {'compression': [4], 'seed': [0, 1]},
}
EPOCH = 10


def chunk_of(table):
    """The chunk of all runs of a specification with one group."""
    spec, group = group_of(table)
    engine, program = engine_of(spec, group, ONE)
    return run_chunk(spec, program, engine, group.runs, len(group.runs))


def spied(*entries, record=None, train=None):
    """Runs one group; returns its program, and the states packed after every advance and round."""
    table = {
        **TABLE,
        'train': {**TABLE['train'], **(train or {})},
        'grid': {**TABLE['grid'], 'method': list(entries)},
        'record': record or {},
    }
    spec, group = group_of(table)
    engine, program = engine_of(spec, group, ONE)
    seen = []

    def spy(name, result):
        def call(*args, **kwargs):
            found = result(*args, **kwargs)
            states = found if name in ('init', 'rewind') else found[0]
            seen.append((name, args[:2] if name == 'advance' else None, engine.pack(states)))
            return found

        return call

    watched = engine._replace(
        init=spy('init', engine.init),
        advance=spy('advance', engine.advance),
        prune=spy('prune', engine.prune),
        rewind=spy('rewind', engine.rewind),
    )
    chunk = run_chunk(spec, program, watched, group.runs, len(group.runs))
    return chunk, program, group.runs, seen


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def after(seen, name, number=0):
    return [states for kind, _, states in seen if kind == name][number]


@pytest.mark.parametrize('back', [pytest.param(0.0, marks=MORE), 0.7])
def test_after_each_level_kept_weights_are_those_of_the_rewind_point(back):
    """Expectation: weights of step k bit for bit where kept, zero elsewhere; no momentum; the clock
    goes on from k; the masks are nested and exact (methods reference, lottery tickets)."""
    entry = {'name': 'lottery', 'start': 3, 'rounds': 3, 'rewind_to': back}
    chunk, program, _, seen = spied(entry)
    k = round(back * EPOCH)
    if k:
        start, anchor = next((a, s) for kind, a, s in seen if kind == 'advance' and a[1] == k)
        assert start == (0, k)
    else:
        anchor = after(seen, 'init')
    total = 784 * 12 + 12 * 10
    before = None
    for level in range(3):
        state = after(seen, 'rewind', level)
        masks = state.masks
        for i in range(2):
            wanted = jp.plan_rounds(program.shapes, 0.25, rounds=3).counts['*'][level]
            assert sum(m[i].sum() for m in masks.values()) == wanted < total
        same(state.params, jax.device_get(tree.apply_masks(anchor.params, masks)))
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state[0].trace))
        assert before is None or all(not np.any(masks[p] & ~before[p]) for p in masks)
        before = masks
    starts = [a for kind, a, _ in seen if kind == 'advance']
    assert starts[-1][1] == 3 * EPOCH and sum(b - a for a, b in starts) == program.timeline.steps
    assert chunk.results['step'].max() == 3 * EPOCH + 3 * (3 * EPOCH - k)


def test_taking_back_the_rate_keeps_the_weights():
    """Expectation: no state changes but by pruning; after rewinding, a step at clock k."""
    entry = {'name': 'magnitude', 'start': 3, 'rewind': 'rate', 'rewind_to': 1}
    _, program, _, seen = spied(entry)
    kinds = [kind for kind, *_ in seen]
    assert 'rewind' not in kinds
    place = kinds.index('prune')
    assert seen[place + 1][1] == (EPOCH, 2 * EPOCH)
    trained, pruned = seen[place - 1][2], seen[place][2]
    same(pruned.params, jax.device_get(tree.apply_masks(trained.params, pruned.masks)))
    assert program.timeline.steps == 5 * EPOCH


@pytest.mark.parametrize(
    'entry',
    [
        pytest.param(
            {'name': 'snip', 'start': 7, 'every': 5, 'rounds': 3, 'time_unit': 'steps'},
            id='steps',
            marks=MORE,
        ),
        pytest.param(
            {'name': 'force', 'start': 0.5, 'every': 0.9, 'rounds': 3}, id='force', marks=MORE
        ),
        pytest.param(
            {'name': 'snip', 'start': 1.3, 'score_on': 'train_batch'}, id='train batch', marks=MORE
        ),
        pytest.param(
            {'name': 'grasp', 'start': 2, 'temperature': 10.0, 'restart': True},
            id='restart',
            marks=MORE,
        ),
        pytest.param(
            {
                'name': 'magnitude',
                'start': 2,
                'finetune': {
                    'epochs': 2,
                    'learning_rate': 0.02,
                    'schedule': 'step',
                    'milestones': [1],
                },
            },
            id='finetune',
        ),
    ],
)
def test_a_life_is_what_its_parts_make(entry):
    """Expectation: the life written out for one run, step by step, rounds where the keys say."""
    _, program, runs, seen = spied(entry)
    spec, run = make_spec({**TABLE, 'grid': {**TABLE['grid'], 'method': [entry]}}), runs[1]
    on_device = device_data(spec, data.load('mnist_small'))
    key, hyper = jax.random.key(run.seed), hyper_of(run)
    numbers = hyper._replace(method=method_numbers(run))
    events = program.events(run.method)
    counts = jp.plan_rounds(program.shapes, 0.25, rounds=run.method.rounds).counts['*']
    unit = 1 if entry.get('time_unit') else EPOCH
    times = [
        round(unit * (entry['start'] + i * entry.get('every', 0))) for i in range(run.method.rounds)
    ]
    step = jax.jit(program.stages[False].step)
    once = jax.jit(
        lambda number, clock, counts, state: events(
            clock, on_device, key, numbers, program.order(key, clock // EPOCH)
        ).once(number, counts, state)
    )
    clocks = list(range(3 * EPOCH))
    if 'finetune' in entry:  # the phase begins where training ends on the clock
        clocks = [*range(2 * EPOCH), *range(3 * EPOCH, 5 * EPOCH)]
    begin = jax.jit(lambda state: events(0, on_device, key, numbers).begin(state))
    epochs = np.arange(5, dtype=np.int32)
    orders = np.asarray(jax.jit(jax.vmap(program.order, (None, 0)))(key, epochs))
    state = jax.jit(program.init)(key, hyper)
    for taken, clock in enumerate([*clocks, None]):
        if taken in times:
            number = times.index(taken)
            if not number:
                state = begin(state)
            at = clock if 'finetune' not in entry else taken
            state, _ = once(number, np.int32(at), {'*': np.int32(counts[number])}, state)
            if number + 1 == len(times):
                state = state._replace(method_state=())
        if clock is not None:
            indices = orders[clock // EPOCH, clock % EPOCH]
            state, _ = step(np.int32(clock), on_device, key, hyper, indices, state)
    found = jax.tree.map(lambda leaf: leaf[1], seen[-1][2])
    for path, mask in found.masks.items():
        np.testing.assert_array_equal(mask, state.masks[path], err_msg=path)
        assert mask.sum() < mask.size
    for (path, a), (_, b) in zip(tree.paths(found.params), tree.paths(state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5, err_msg=path)


def test_the_training_batch_is_that_of_the_next_step(monkeypatch):
    """Expectation: |w g| by jax.grad on the very batch that step 13 trains on.

    Only the trainer draws the order of an epoch, a sort of all its examples.
    """
    entry = {'name': 'snip', 'start': 13, 'time_unit': 'steps', 'score_on': 'train_batch'}
    traces, draw = [], data.epoch_order
    monkeypatch.setattr(data, 'epoch_order', lambda *args: traces.append(args) or draw(*args))
    _, program, runs, seen = spied(entry)
    assert len(traces) == 2  # the check of the plan, and the trainer
    spec = make_spec({**TABLE, 'grid': {**TABLE['grid'], 'method': [entry]}})
    on_device = device_data(spec, data.load('mnist_small'))
    trained, pruned = (
        jax.tree.map(lambda leaf: leaf[0], states)
        for states in (after(seen, 'advance', 1), after(seen, 'prune'))
    )
    assert [a for kind, a, _ in seen if kind == 'advance'][:2] == [(0, 10), (10, 13)]
    indices = np.asarray(jax.jit(program.order)(jax.random.key(runs[0].seed), 1))[3]
    facts = data.facts('mnist_small')
    x = np.asarray(on_device.train.images)[indices] / np.float32(255)
    x = (x - np.asarray(facts.mean, np.float32)) / np.asarray(facts.std, np.float32)
    y = np.asarray(on_device.train.labels)[indices]

    def loss(params):
        logits = program.problem.apply(params, {}, x, train=False, key=None)[0]
        return program.problem.loss(logits, y).mean()

    grads = tree.pick(jax.jit(jax.grad(loss))(trained.params))
    weights = tree.pick(trained.params)
    scores = np.concatenate([np.abs(weights[p] * grads[p]).ravel() for p in sorted(weights)])
    kept = np.concatenate([pruned.masks[p].ravel() for p in sorted(weights)])
    limit = np.sort(scores)[::-1][kept.sum() - 1]
    sure = np.abs(scores - limit) > 1e-4 * limit
    np.testing.assert_array_equal(kept[sure], (scores >= limit)[sure])


def test_repaired_kernels_are_orthogonal_right_after_the_last_round():
    """Expectation: orthonormal rows of what is left of each kernel, biases as they were; and the
    mean singular value of the linear network is 1, which [record] rounds shows."""
    train = {**TABLE['train'], 'learning_rate': 0.01}
    model = {'name': 'mlp', 'widths': [16, 16], 'activation': 'linear'}
    table = {**TABLE, 'model': model, 'train': train}
    entry = {
        'name': 'magnitude', 'granularity': 'unit', 'allocation': 'uniform_down', 'start': 3,
        'repair': 'orthp', 'restart': True, 'finetune': {'epochs': 1, 'learning_rate': 0.01},
    }  # fmt: skip
    grid = {'method': [entry], 'density': [0.7], 'seed': [0]}
    record = {'flow': ['jsv_mean', 'jsv_condition'], 'rounds': True, 'evaluate': True}
    spec, group = group_of({**table, 'grid': grid, 'record': record})
    engine, program = engine_of(spec, group, ONE)
    chunk = run_chunk(spec, program, engine, group.runs, 1)
    right_after = chunk.flow.filter(rounds=1, step=30)
    assert right_after.height == 2
    np.testing.assert_allclose(right_after['value'], 1.0, rtol=1e-4)
    rows = chunk.curves.filter(step=30)
    assert rows['rounds'].to_list() == [1] and rows['train_loss'].to_list() == [None]
    kept = dict(chunk.layers.select('path', 'kept').iter_rows())
    assert kept == {
        'dense_0/kernel': 784 * 11, 'dense_1/kernel': 11 * 11, 'dense_2/kernel': 11 * 10
    }  # fmt: skip
    assert flow.GAINS['linear'] == 1


def test_pruning_after_training_is_evaluated_after_the_round(tmp_path):
    """Expectation: the last row is of the pruned network, all before are the dense control's."""
    grid = {'method': [{'name': 'magnitude', 'start': 3}], 'compression': [1, 4], 'seed': [0]}
    frame = jp.run_sweep({**TABLE, 'grid': grid}, tmp_path)
    dense, pruned = (frame.filter(method=m).sort('epoch') for m in ('dense', 'magnitude'))
    assert pruned['density'].to_list()[:2] == [1.0, 1.0]
    assert pruned['density'][2] == pytest.approx(0.25, abs=1e-4)
    assert pruned['test_loss'].to_list()[:2] == dense['test_loss'].to_list()[:2]
    assert pruned['test_loss'][2] != dense['test_loss'][2]
    assert pruned['train_loss'].to_list() == dense['train_loss'].to_list()


@pytest.mark.more
def test_recording_rounds_changes_no_number():
    """Expectation: the same results; at a step with a round, a row from before and one from after,
    the first of which is the control's."""
    entries = [{'name': 'magnitude', 'start': 1, 'every': 1, 'rounds': 2}]
    table = {**TABLE, 'grid': {**TABLE['grid'], 'method': entries}}
    plain = chunk_of(table).results
    record = {'every': 10, 'evaluate': True, 'flow': ['weight_norm'], 'rounds': True}
    watched = chunk_of({**table, 'record': record})
    assert_frame_equal(plain, watched.results, check_exact=True)
    curves = watched.curves.filter(run_id=plain['run_id'][0])
    assert curves.select('step', 'rounds').rows() == [
        *((0, 0), (10, 0), (10, 1), (20, 1), (20, 2), (30, 2))
    ]
    norms = watched.flow.filter(run_id=plain['run_id'][0], step=10)
    by_rounds = norms.group_by('rounds').agg((pl.col('value') ** 2).sum()).sort('rounds')
    assert by_rounds['value'][0] > by_rounds['value'][1] > 0


def test_a_phase_after_pruning_shares_its_program_over_rates():
    """Expectation: two rates of the phase differ only after the round, and share every trace."""
    entries = [
        {'name': 'magnitude', 'start': 2, 'label': str(rate),
         'finetune': {'epochs': 1, 'learning_rate': rate}}
        for rate in (0.1, 0.001)
    ]  # fmt: skip
    chunk, _, runs, _ = spied(*entries)
    assert len(runs) == 4
    first, second = (chunk.results.filter(label=label, seed=0) for label in ('0.1', '0.001'))
    assert first['test_loss'][:2].to_list() == second['test_loss'][:2].to_list()
    assert first['test_loss'][2] != second['test_loss'][2]


@nothing_trained()
def test_directories_of_earlier_formats_are_refused_with_the_reason(tmp_path):
    grid = {**TABLE['grid'], 'method': ['magnitude'], 'seed': [0]}
    table = {**TABLE, 'train': {'epochs': 1, 'batch_size': 24}, 'grid': grid}
    jp.run_sweep(table, tmp_path)
    plan = store.read_plan(tmp_path)
    store.write_json(tmp_path / 'plan.json', {**plan, 'format': 2})
    # As an earlier version wrote it, with keys that are no more.
    spec = (tmp_path / 'spec.toml').read_text()
    (tmp_path / 'spec.toml').write_text(spec.replace('start = 0.0', 'after_epochs = 0'))
    with pytest.raises(StoreError, match=r'format 2.*writes format 6: it says when rounds happen'):
        jp.run_sweep(table, tmp_path)


def test_numbers_of_a_method_are_traced():
    """Expectation: temperatures share one compiled event; each row's mask is that of a pruner with
    its temperature as a constant, and the two differ."""
    entries = [
        {'name': 'grasp', 'temperature': temperature, 'label': str(temperature)}
        for temperature in (0.5, 200.0)
    ]
    spec, group = group_of({**TABLE, 'grid': {**TABLE['grid'], 'method': entries}})
    engine, program = engine_of(spec, group, ONE)
    rows = rows_of(group.runs, 4, engine)[0]
    event = program.timeline.events[0]
    (call,) = event_calls(program, group.runs)(event)
    states, _ = engine.prune(rows, call, engine.init(rows))
    traces = [name for name in engine.traces() if name.startswith('prune')]
    assert len(traces) == 1 and engine.traces()[traces[0]] == 1
    masks = engine.pack(states).masks
    on_device = device_data(spec, data.load('mnist_small'))
    counts = {'*': np.int32(jp.keep_counts(program.shapes, 0.25)['*'])}

    @functools.partial(jax.jit, static_argnums=0)
    def masks_of(temperature, key):
        state = program.init(key, hyper_of(group.runs[0]))
        view = jp.view(program.problem, state.params)
        pruner = jp.get_pruner(program.problem, 'grasp', temperature=temperature)
        return pruner.update(key, (), view, counts, examples(spec, on_device, key))[1]

    for i, run in enumerate(group.runs):
        alone = masks_of(run.method.options['temperature'], jax.random.key(run.seed))
        for path, mask in alone.items():
            agree = (np.asarray(mask) == masks[path][i]).mean()
            assert agree > 0.999, path
    assert any(np.any(masks[p][0] != masks[p][2]) for p in masks)


def examples(spec, on_device, key):
    """The class-balanced examples of a first round."""
    facts = data.facts('mnist_small')
    fetch = data.fetcher(facts.mean, facts.std, ())
    return examples_of(spec.prune, facts.classes, fetch).drawn(on_device, key, 0)


@nothing_trained()
def test_each_program_is_made_once(tmp_path, monkeypatch):
    """Expectation: planning, checking and running a sweep of two programs make two."""
    entries = ['magnitude', {'name': 'magnitude', 'start': 1, 'label': 'later'}]
    grid = {'method': entries, 'compression': [1, 4], 'seed': [0]}
    made = []

    def counted(*args, **kwargs):
        made.append(args[1].method.label)
        return make_program(*args, **kwargs)

    for room in ('groups', 'worker', 'probe'):
        monkeypatch.setattr(f'jaxprune.sweep.{room}.make_program', counted)
    jp.run_sweep({**TABLE, 'train': {'epochs': 2, 'batch_size': 120}, 'grid': grid}, tmp_path)
    assert made == ['magnitude', 'later']


@pytest.mark.parametrize('start', [1.5, pytest.param(3, marks=MORE)])
def test_recording_along_training_changes_no_result(start):
    """Expectation: the same results with and without; every recorded row of the test set has its
    values, and rows are filed in the order of their steps. Also where the last round comes after
    the last step, or in the middle of an epoch."""
    grid = {'method': [{'name': 'magnitude', 'start': start}], 'compression': [50], 'seed': [0]}
    table = {**TABLE, 'grid': grid}
    plain = chunk_of(table).results
    for rounds in (False, True):
        record = {'every': 3, 'evaluate': True, 'rounds': rounds}
        watched = chunk_of({**table, 'record': record})
        assert_frame_equal(plain, watched.results, check_exact=True)
        curves = watched.curves
        assert curves['test_loss'].null_count() == curves['test_accuracy'].null_count() == 0
        moments = curves.select('step', 'rounds').rows()
        assert moments == sorted(moments)
        per_epoch = [3, 6, 9, 10]
        steps = {0, *(10 * epoch + step for epoch in range(3) for step in per_epoch)}
        assert set(curves['step']) == (steps | {int(10 * start)} if rounds else steps)


@pytest.mark.parametrize('strategy', [ONE, Strategy('unroll', 'host', 'native', 1)])
def test_training_goes_on_while_rounds_are_at_work(strategy, monkeypatch):
    """Expectation: between a method's first round and its last, the next steps are queued before
    anything of a round is fetched, and only then losses, those of the steps before; a round itself
    fetches nothing; what is left is counted for evaluations alone."""
    entry = {'name': 'gmp', 'start': 0, 'end': 1, 'rounds': 6}
    grid = {'method': [entry], 'compression': [4], 'seed': [0]}
    spec, group = group_of({**TABLE, 'train': {**TABLE['train'], 'epochs': 1}, 'grid': grid})
    engine, program = engine_of(spec, group, strategy)
    called = []

    def on_host(tree):
        called.append('host')
        return jax.device_get(tree)

    for module in ('advance', 'compiled_events'):
        monkeypatch.setattr(f'jaxprune.sweep.{module}.on_host', on_host)

    def spy(name):
        def call(*args, **kwargs):
            called.append(name)
            number = called.count(name)
            states, fetch = getattr(engine, name)(*args, **kwargs)

            def fetched():
                called.append(f'{name} {number}')
                found = fetch()
                assert called.pop() == 'host'
                return found

            return states, functools.cache(fetched)

        return call

    def counts(states):
        called.append('counts')
        return engine.counts(states)

    watched = engine._replace(advance=spy('advance'), prune=spy('prune'), counts=counts)
    run_chunk(spec, program, watched, group.runs, 1)
    assert [step.step for step in program.timeline.events] == [0, 2, 4, 6, 8, 10]
    first = ['prune', 'prune 1', 'advance', 'prune', 'advance', 'advance 1']
    middle = ['prune', 'advance', 'advance 2', 'prune', 'advance', 'advance 3', 'prune', 'advance']
    rest = ['advance 4', 'advance 5', 'prune 2', 'prune 3', 'prune 4', 'prune 5']
    assert called == [*first, *middle, *rest, 'prune', 'prune 6', 'counts']


def test_train_loss_is_the_mean_over_steps():
    """Expectation: the mean of the losses that training returned, also where the last epoch is a
    part of one."""
    entry = {'name': 'magnitude', 'start': 1, 'rewind': 'weights', 'rewind_to': 0.5}
    table = {**TABLE, 'train': {**TABLE['train'], 'epochs': 1}}
    grid = {'method': [entry], 'compression': [4], 'seed': [0]}
    spec, group = group_of({**table, 'grid': grid, 'record': {'every_epochs': 5}})
    engine, program = engine_of(spec, group, ONE)
    losses = []

    def advance(*args, **kwargs):
        states, found = engine.advance(*args, **kwargs)
        losses.append(found()[0])
        return states, found

    chunk = run_chunk(spec, program, engine._replace(advance=advance), group.runs, 1)
    assert chunk.results['step'].to_list() == [15]
    mean = np.concatenate(losses).mean()
    np.testing.assert_allclose(chunk.results['train_loss'][0], mean, rtol=1e-6)


def test_curves_of_a_control_do_not_depend_on_its_company():
    """Expectation: the same rows of the dense run, alone or beside a method."""
    record = {'every': 10, 'evaluate': True, 'rounds': True}
    found = []
    for compressions in ([1], [1, 4]):
        grid = {'method': ['magnitude'], 'compression': compressions, 'seed': [0]}
        chunk = chunk_of({**TABLE, 'grid': grid, 'record': record})
        dense = chunk.results.filter(method='dense')['run_id'][0]
        found.append(chunk.curves.filter(run_id=dense))
    assert_frame_equal(*found, check_exact=True)
