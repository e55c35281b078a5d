"""The engine: several devices, memory, donation, batch statistics, records along training."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import polars as pl
import pytest
from fake_engine import make_fake_engine, nothing_trained
from polars.testing import assert_frame_equal
from sweeps import parts, planned_here, trained_here

import jaxprune as jp
from jaxprune import flow, nn, tree
from jaxprune.errors import Interrupted, JaxpruneError, SpecError, StoreError
from jaxprune.stop import Stop
from jaxprune.sweep import make_plan, make_spec, store, sweep_plan
from jaxprune.sweep.chunk import rows_of
from jaxprune.sweep.chunk_tables import Moment, curves_rows, flow_rows
from jaxprune.sweep.devices import keep_compiled
from jaxprune.sweep.engine import make_engine
from jaxprune.sweep.grid import runs
from jaxprune.sweep.observe import Recorded
from jaxprune.sweep.pieces import pieces_of, read_piece, write_piece
from jaxprune.sweep.probe import Measured, _Trial, probe, remember, remembered
from jaxprune.sweep.program import hyper_of, make_program
from jaxprune.sweep.progress import ignored
from jaxprune.sweep.strategy import Strategy
from jaxprune.sweep.sweep_plan import checked_groups
from jaxprune.sweep.this_machine import this_machine
from jaxprune.sweep.timing import covered, stopwatch
from jaxprune.sweep.trials import measure

DENSE = {
    'name': 'engine',
    'model': {'name': 'mlp', 'widths': [12]},
    'data': {'name': 'mnist_small', 'train_examples': 240, 'test_examples': 60},
    'train': {'epochs': 2, 'batch_size': 24, 'momentum': 0.9},
    'prune': {'samples_per_class': 1},
    'grid': {'method': ['magnitude', 'snip'], 'compression': [1, 4], 'seed': [0]},
}
CONV = {**DENSE, 'model': {'name': 'small_vgg', 'widths': [3]}}
ONE = Strategy('vmap', 'scan', 'taps', 1)
NUMBERS = ('train_loss', 'test_loss', 'test_accuracy')


# --- devices ------------------------------------------------------------------------------------

FOUR = """
import json, sys
import jax, jaxprune as jp
assert jax.local_device_count() == 4
for name, table in json.load(open(sys.argv[1])).items():
    jp.run_sweep(table, f'{sys.argv[2]}/{name}').write_parquet(f'{sys.argv[2]}/{name}.parquet')
"""


@pytest.mark.script
def test_four_devices_train_what_one_trains(tmp_path):
    """Expectation: the same sweep on one of four devices. Three runs, so there is padding; bit for
    bit where runs are looped over, up to rounding where they or their batches are split.
    """
    cases = {
        'one': (DENSE, {'batching': 'map', 'devices': 1}),
        'map': (DENSE, {'batching': 'map'}),
        'vmap': (DENSE, {'batching': 'vmap'}),
        'shared': (DENSE, {'batching': 'map', 'batch_devices': 4}),
        'conv_one': (CONV, {'devices': 1}),
        'conv': (CONV, {}),
        'conv_shared': (
            CONV,
            {'batching': 'vmap', 'stepping': 'scan', 'convolution': 'taps', 'batch_devices': 2},
        ),
    }
    tables = {name: {**table, 'engine': engine} for name, (table, engine) in cases.items()}
    (tmp_path / 'tables.json').write_text(json.dumps(tables))
    environment = {
        **os.environ,
        'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',  # compiles three times as fast
    }
    command = [sys.executable, '-c', FOUR, str(tmp_path / 'tables.json'), str(tmp_path)]
    subprocess.run(command, env=environment, check=True, timeout=400)
    found = {n: pl.read_parquet(tmp_path / f'{n}.parquet').sort('run_id', 'step') for n in cases}
    strategies = {n: trained_here(tmp_path / n)[0]['strategy'] for n in cases}
    assert strategies['map']['devices'] == 4 and strategies['shared']['batch_devices'] == 4
    assert len(found['one']) == 6
    for name, exactly in (('map', True), ('vmap', False), ('shared', False)):
        assert_frame_equal(found[name], found['one'], check_exact=exactly, rel_tol=1e-4)
    assert_frame_equal(found['conv'], found['conv_one'], check_exact=True)
    assert_frame_equal(found['conv_shared'], found['conv_one'], rel_tol=5e-3)


#: Small forms of every registered model that a few seconds suffice to compile.
SMALL = {
    'mlp': {'widths': [8]},
    'small_vgg': {'widths': [2]},
    'vit': {'patch': 14, 'dim': 8, 'depth': 1, 'heads': 2},
    'transformer': {'dim': 8, 'depth': 1, 'heads': 2},
}
DEEP = (
    'vgg11',
    'resnet20',
    'vgg13',
    'vgg16',
    'vgg19',
    'resnet32',
    'resnet56',
    'resnet18',
    'mobilenet',
)


def marks(name):
    """By default a net with batch norm and one with attention."""
    if name in ('small_vgg', 'vit'):
        return ()
    return pytest.mark.slow if name in DEEP else pytest.mark.more


@pytest.mark.parametrize(
    'name',
    [pytest.param(m, marks=marks(m)) for m in nn.MODELS],
)
def test_no_model_makes_devices_talk(name):
    """Law: runs are independent: no collective in what two devices train, whatever the network."""
    options = SMALL.get(name, {'width': 0.05} if 'width' in nn.model(name).options else {})
    table = {
        **DENSE,
        'model': {'name': name, **options},
        'data': {'name': 'cifar10', 'train_examples': 32},
        'train': {'batch_size': 8},
    }
    if name in ('vit', 'small_vgg', 'mlp', 'lenet300100'):
        table['data']['name'] = 'mnist_small'
    spec = make_spec(table)
    run = runs(spec)[0]
    for strategy in {'vmap': 'taps', 'unroll': 'native'}.items():
        batching, convolution = strategy
        found = _compiled(spec, run, Strategy(batching, 'host', convolution, 2))
        assert 'num_partitions=2' in found
        for word in ('all-', 'collective-', 'reduce-scatter'):
            assert word not in found, (batching, word)


def _compiled(spec, run, strategy):
    """The training step of two runs, as the compiler leaves it."""
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxprune.sweep.abstract import abstract_data
    from jaxprune.sweep.layout import mesh_of, training

    program = make_program(spec, run, strategy.convolution)
    mesh = mesh_of(strategy, jax.local_devices())
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    hyper = jax.tree.map(lambda leaf: np.stack([leaf] * 2), hyper_of(run))
    state = jax.eval_shape(jax.vmap(program.init), keys, hyper)
    order = jax.ShapeDtypeStruct((2, 1, run.train.batch_size), np.int32)
    by_run = NamedSharding(mesh, PartitionSpec('run'))
    args = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_run),
        (keys, hyper, order, state),
    )
    step = training(strategy, program.stages[False].step, mesh, 1)
    return step.lower(np.int32(0), np.int32(0), abstract_data(spec), *args).compile().as_text()


def test_a_run_on_more_devices_than_there_are_is_refused():
    """Expectation: one line, before anything is written."""
    with pytest.raises(SpecError, match='batch_devices: a run on 3 devices, where 2 are used'):
        make_plan(make_spec({**DENSE, 'engine': {'batch_devices': 3}}))
    [here] = planned_here(make_spec({**DENSE, 'engine': {'batch_devices': 2}}))
    assert here.strategy.batch_devices == 2


# --- memory -------------------------------------------------------------------------------------


def _exhausted():
    """What JAX raises when it asks for more memory than there is."""
    try:
        jax.numpy.zeros(2**50, np.float32).block_until_ready()
    except jax.errors.JaxRuntimeError as error:
        return error
    raise AssertionError('four petabytes were found')


def _failing_above(monkeypatch, most, devices=1):
    """Makes epochs run out of memory where more rows are trained at once on so many devices."""
    real, error, made = make_fake_engine, _exhausted(), []
    assert 'RESOURCE_EXHAUSTED' in str(error)

    def engine(strategy, *args, **kwargs):
        built = real(strategy, *args, **kwargs)
        made.append(strategy)

        def advance(start, stop, rows, states, **rest):
            # In the second epoch, of ten steps.
            if start == 10 and len(rows.keys) > most * strategy.batch_devices // devices:
                raise error
            return built.advance(start, stop, rows, states, **rest)

        return built._replace(advance=advance)

    monkeypatch.setattr('jaxprune.sweep.worker.make_engine', engine)
    return made


SIX = {
    **DENSE,
    'grid': {'method': ['magnitude'], 'compression': [4], 'seed': [0, 1, 2, 3, 4, 5]},
    'engine': {'batching': 'map', 'chunk': 6},
}


def test_out_of_memory_halves_the_runs_at_once_and_goes_on(tmp_path, monkeypatch):
    """Expectation: the sweep that never ran out, value for value, in the same chunk; no plan knows
    of it, the attempt does; a finished sweep is not touched again. Steps are not counted twice.
    """
    with nothing_trained():
        whole = jp.run_sweep(SIX, tmp_path / 'whole')
    _failing_above(monkeypatch, most=2)
    notes, steps = [], []

    def progress(plan, out):
        shown = ignored()._replace(note=notes.append, steps=steps.append)
        return contextlib.nullcontext(shown)

    out = tmp_path / 'halved'
    found = jp.run_sweep(SIX, out, progress=progress)
    assert_frame_equal(found, whole, check_exact=True)
    for read in (store.read_layers, store.read_plan):
        ours, theirs = read(out), read(tmp_path / 'whole')
        assert ours.equals(theirs) if isinstance(ours, pl.DataFrame) else ours == theirs
    [how] = trained_here(out)
    assert (how['at_once'], how['pieces'], how['state']) == (2, 3, 'finished')
    assert [('with 6' in n, 'with 4' in n) for n in notes] == [(True, True), (False, True)]
    assert sum(steps) == 6 * 2 * 10
    assert not list(out.glob('checkpoints/*'))
    again = jp.run_sweep(SIX, out)
    assert_frame_equal(again, found, check_exact=True)


def test_a_run_too_large_for_a_device_is_split_over_several(tmp_path, monkeypatch):
    """Expectation: two devices per run once one run per device fails; then one clear line."""
    made = _failing_above(monkeypatch, most=0.5)
    table = {**SIX, 'engine': {'batching': 'map', 'chunk': 2}}
    jp.run_sweep(table, tmp_path / 'split')
    assert [s.batch_devices for s in made] == [1, 2]
    made = _failing_above(monkeypatch, most=0)
    with pytest.raises(
        JaxpruneError, match=r'not even one run on all 2 devices fits.*RESOURCE_EXHAUSTED'
    ):
        jp.run_sweep(table, tmp_path / 'never')


def test_what_the_compiler_says_is_too_large_is_not_started(tmp_path, monkeypatch):
    """Expectation: halved before a step is taken, and the training program compiled but once."""
    engine, _, rows = parts(DENSE, Strategy('map', 'scan', 'native', 1))
    with stopwatch() as watch:
        with watch.phase('train'):
            needed = engine.bytes_needed(rows)
        first = watch.seconds()['compile']
        with watch.phase('train'):
            states = engine.init(rows)
            engine.advance(0, 10, rows, states)
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.pack(engine.init(rows))))
    images = 300 * 28 * 28
    assert needed > state + images  # and not much more: a batch and its activations
    assert needed < 3 * state + 2 * images
    assert first > 0 and engine.traces()['steps 10'] == 1
    limits = iter([0.5 * needed, *[100 * needed] * 10])
    monkeypatch.setattr('jaxprune.sweep.worker.memory_limit', lambda: next(limits))
    jp.run_sweep(SIX, tmp_path)
    assert trained_here(tmp_path)[0]['at_once'] == 4


# --- runs keep to themselves --------------------------------------------------------------------


def trained(engine, rows):
    """The states after an epoch; the engine hands on what it is given, and reads none again."""
    states = engine.init(rows)
    given = jax.tree.leaves(states)
    states, _ = engine.advance(0, 10, rows, states)
    assert all(leaf.is_deleted() for leaf in given)
    with pytest.raises(RuntimeError, match='deleted'):
        np.asarray(given[0])
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(states))
    return engine.pack(states)


@pytest.mark.parametrize(
    'strategy',
    [ONE, pytest.param(Strategy('unroll', 'host', 'native', 2), marks=pytest.mark.more)],
    ids=str,
)
def test_batch_statistics_belong_to_their_run(strategy):
    """Expectation: each run's running averages are those it has when it is trained alone, and no
    two runs of different seeds have the same; donated states are used up.
    """
    grid = {'method': ['magnitude'], 'compression': [4], 'seed': [0, 1]}
    # An epoch is two calls, so that states are donated by the engine too.
    table = {**CONV, 'grid': grid, 'record': {'every': 5, 'evaluate': True}}
    engine, _, rows = parts(table, strategy)
    together = trained(engine, rows)
    alone = engine
    if strategy.devices > 1:
        alone, *_ = parts(table, strategy._replace(devices=1))
    for i in range(2):
        single = trained(alone, jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], rows))
        for (path, a), (_, b) in zip(
            tree.paths(together.model_state), tree.paths(single.model_state), strict=True
        ):
            np.testing.assert_allclose(a[i], b[0], rtol=1e-3, atol=1e-5, err_msg=path)
    means = together.model_state['batch_stats']['bn_0']['mean']
    assert np.abs(means[0] - means[1]).max() > 1e-3


# --- records along training ---------------------------------------------------------------------


def test_records_along_training(tmp_path, monkeypatch):
    """Expectation: rows at step 0 of the network as it was pruned, at every third step of an epoch
    of ten and at its end; the last agrees with the epoch's own evaluation and mean loss; norms as
    numpy has them; and training itself is the same, bit for bit, with and without.
    """
    watched = {'every': 3, 'evaluate': True, 'flow': ['weight_norm', 'gradient_norm']}
    made = []

    def kept_engine(*args, **kwargs):
        made.append(make_engine(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr('jaxprune.sweep.worker.make_engine', kept_engine)
    results = jp.run_sweep({**DENSE, 'record': watched}, tmp_path / 'watched')
    plain = jp.run_sweep(DENSE, tmp_path / 'plain')
    assert_frame_equal(results, plain, check_exact=True)
    curves, flows = store.read_curves(tmp_path / 'watched'), store.read_flow(tmp_path / 'watched')
    steps = [0, 3, 6, 9, 10, 13, 16, 19, 20]
    assert curves['step'].unique().sort().to_list() == steps and len(curves) == 3 * 9
    start = curves.filter(pl.col('step') == 0)
    assert start['train_loss'].is_null().all() and start['test_loss'].is_not_null().all()
    pruned = dict(results.select('run_id', pl.col('method') != 'dense').iter_rows())
    for run_id, rounds in start.select('run_id', 'rounds').iter_rows():
        assert rounds == pruned[run_id]
    both = results.join(curves, on=['run_id', 'step'], suffix='_curve')
    assert len(both) == len(results) == 6
    for column in ('test_loss', 'test_accuracy'):
        assert both[column].to_list() == both[f'{column}_curve'].to_list()
    weights = pl.Series([3, 3, 3, 1])
    for run in results.filter(pl.col('epoch') == 1).iter_rows(named=True):
        losses = curves.filter(
            (pl.col('run_id') == run['run_id']) & pl.col('step').is_between(1, 10)
        )
        mean = (losses['train_loss'] * weights).sum() / 10
        assert mean == pytest.approx(run['train_loss'], rel=1e-5)
    assert len(flows) == 3 * 9 * 2 * 2 and set(flows['quantity']) == set(watched['flow'])
    assert store.read_curves(tmp_path / 'plain').is_empty()
    assert not (tmp_path / 'plain' / 'curves').exists()
    # The norms of a run, from its state.
    engine, members = made[0], runs(make_spec(DENSE))
    rows, _ = rows_of(members, len(members), engine)
    begun = tree.pick(engine.pack(engine.init(rows)).params)
    dense = next(run_id for run_id, rounds in pruned.items() if not rounds)
    at_start = flows.filter(
        (pl.col('run_id') == dense) & (pl.col('step') == 0) & (pl.col('quantity') == 'weight_norm')
    )
    for path, value in at_start.select('path', 'value').iter_rows():
        assert value == pytest.approx(np.linalg.norm(begun[path][0]), rel=1e-5)
    states, _ = engine.advance(0, 10, rows, engine.init(rows))
    recorded, state = engine.record(10, rows, states)(), engine.pack(states)
    for i in range(3):
        for path, kernel in tree.paths(state.params):
            if path.endswith('kernel'):
                found = recorded.flow['weight_norm'][path][i]
                assert found == pytest.approx(np.linalg.norm(kernel[i]), rel=1e-5)
                assert recorded.flow['gradient_norm'][path][i] > 0


def test_gradient_norms_are_those_of_the_loss():
    """Expectation: jax.grad of the mean loss on the batch, pruned weights left out."""
    problem = jp.problem_from_flax(nn.MLP((5,), classes=3), (4,))
    key = jax.random.key(0)
    params, model_state = jax.jit(problem.init)(key)
    draw = np.random.default_rng(0)
    x = draw.normal(size=(1, 20, 4)).astype(np.float32)
    y = np.arange(20, dtype=np.int32)[None] % 3
    masks = {
        path: jax.numpy.asarray(draw.random(leaf.shape) < 0.5)
        for path, leaf in tree.pick(params).items()
    }
    view = jp.view(problem, params, model_state, masks)
    found = jax.jit(flow.gradient_norm(problem))(key, view, jp.Batch(x, y))

    def loss(p):
        logits = problem.apply(tree.apply_masks(p, masks), {}, x[0], train=True, key=None)[0]
        return problem.loss(logits, y[0]).mean()

    expected = tree.pick(jax.jit(jax.grad(loss))(params))
    for path, value in found.items():
        # The mask's own derivative takes the pruned weights out.
        np.testing.assert_allclose(value, np.linalg.norm(expected[path]), rtol=1e-5)


@pytest.mark.parametrize(
    ('record', 'message'),
    [
        ({'flow': ['weight_norms'], 'every': 2}, r"record\.flow\[0\].*did you mean 'weight_norm'"),
        ({'flow': ['weight_norm']}, r'record\.every: expected after how many steps'),
        ({'evaluate': True}, r'record\.every: expected after how many steps'),
    ],
)
def test_what_cannot_be_recorded_is_an_error(record, message):
    """Expectation: one line with the key and the nearest name."""
    with pytest.raises(SpecError, match=message):
        make_spec({**DENSE, 'record': record})


# --- time ---------------------------------------------------------------------------------------


def test_compiling_counts_apart_from_running():
    """Expectation: intervals by hand; a new program compiles within its phase, a known one not."""
    assert covered([(0, 4), (1, 2), (6, 7), (6.5, 9)]) == 7 and covered([]) == 0
    square = jax.jit(lambda x: (x @ x).sum() ** 2)
    with stopwatch() as watch:
        with watch.phase('train'):
            square(np.ones((7, 7))).block_until_ready()
        once = watch.seconds()
        with watch.phase('train'):
            square(np.ones((7, 7))).block_until_ready()
            time.sleep(0.05)
        twice = watch.seconds()
    assert 0 < once['compile'] == twice['compile']
    assert twice['train'] - once['train'] >= 0.05 and twice['prune'] == 0


def test_a_sweep_stores_where_its_time_went(tmp_path):
    """Expectation: all phases, the runs times steps, and the sum of all chunks."""
    table = {**DENSE, 'engine': {'chunk': 1}}
    began = time.perf_counter()
    jp.run_sweep(table, tmp_path)
    whole = time.perf_counter() - began
    timing = store.read_timing(tmp_path)
    assert timing.pop('run_steps') == 3 * 2 * 10
    assert all(seconds > 0 for seconds in timing.values()) and sum(timing.values()) < whole


@pytest.fixture
def instant_trials(monkeypatch, quick_trials):
    """Trials in which nothing is compiled: every strategy takes the same time."""
    trial = _Trial(lambda: 0.2, 0.1, 1.0)
    monkeypatch.setattr('jaxprune.sweep.probe._begun', lambda spec, run, strategy: trial)


def trials(spec, on_trial):
    """The trials of a sweep before it begins."""
    groups = checked_groups(spec)
    return measure(spec, groups, make_plan(spec, groups=groups), on_trial)


@nothing_trained()
def test_a_signal_ends_the_trials(tmp_path, monkeypatch, instant_trials):
    """Expectation: the sweep leaves after the trial at hand, whose outcome is remembered."""
    monkeypatch.setattr('jaxprune.sweep.trials._WORTH_PROBING', 0.0)
    spec, notes = make_spec(DENSE), []

    def progress(plan, out):
        return contextlib.nullcontext(ignored()._replace(note=notes.append))

    stop = Stop(lambda: bool(notes), lambda: False)
    with pytest.raises(Interrupted):
        jp.run_sweep(spec, tmp_path / 'out', progress=progress, stop=stop)
    assert len(notes) == 1 == len(remembered(spec, runs(spec)[0]))


@pytest.mark.more
@nothing_trained()
def test_a_long_sweep_tries_the_ways_to_train_first(tmp_path, monkeypatch, quick_trials):
    """Expectation: with the threshold at nothing any sweep is long: all ways are tried, reported,
    remembered, the plan takes one of them, the next plan knows it; not if [engine] says never, nor
    if it leaves no choice.
    """
    monkeypatch.setattr('jaxprune.sweep.trials._WORTH_PROBING', 0.0)
    spec = make_spec(DENSE)
    for engine in ({'probe': 'never'}, {'batching': 'map', 'devices': 1}):
        quiet = make_spec({**DENSE, 'engine': engine})
        assert trials(quiet, lambda found: None) == {}
    assert planned_here(spec)[0].chosen == 'usual'
    notes = []

    def progress(plan, out):
        return contextlib.nullcontext(ignored()._replace(note=notes.append))

    jp.run_sweep(spec, tmp_path / 'out', progress=progress)
    how = trained_here(tmp_path / 'out')[0]
    best = remembered(spec, runs(spec)[0])[0]
    assert how['chosen'] == 'measured' and how['strategy'] == best.strategy._asdict()
    assert sum('tried' in note for note in notes) == len(remembered(spec, runs(spec)[0])) >= 1
    here = planned_here(spec)[0]
    assert here.chosen == 'measured' and here.seconds == best.seconds > 0
    # What was measured is taken only where [engine] allows it.
    [other] = planned_here(make_spec({**DENSE, 'engine': {'stepping': 'host'}}))
    assert other.chosen == 'forced' and other.strategy.stepping == 'host'


def test_trying_stops_when_it_costs_too_much(instant_trials):
    """Expectation: of a sweep of one step, the share is over after the first trial."""
    spec = make_spec(DENSE)
    tried = [Strategy(b, 'scan', 'native', 1) for b in ('map', 'vmap')]
    assert len(probe(spec, runs(spec)[0], tried, run_steps=1)) == 1
    found = probe(spec, runs(spec)[0], tried)
    assert len(found) == 2
    # What is known already is weighed too: nothing is tried for a sweep that is over at once.
    assert probe(spec, runs(spec)[0], tried, run_steps=1, known=found) == []


def test_compiled_programs_are_kept_unless_someone_said_where(tmp_path, monkeypatch):
    """Expectation: a directory under the cache of ours, but never over a setting of the user's."""
    monkeypatch.setenv('JAXPRUNE_CACHE_DIR', str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == before
    names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
    settings = {name: getattr(jax.config, name) for name in names}
    jax.config.update('jax_compilation_cache_dir', None)  # as in a new process
    try:
        keep_compiled()
        assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path / 'compiled'))
    finally:
        for name, value in settings.items():
            jax.config.update(name, value)


# --- going on elsewhere, or with other settings ---------------------------------------------------


def test_a_plan_knows_no_machine(tmp_path, monkeypatch):
    """Expectation: by hand: the same plan whatever devices, memory and [engine] there are, apart
    from `chunk`; 6 runs of 1e12 operations each are one chunk, of 1e13 two of the fewest."""
    spec = make_spec(SIX)
    plan = make_plan(spec)
    words = json.dumps(plan)
    assert not any(word in words for word in ('strategy', 'device', 'platform', 'seconds', 'cpu'))
    for engine in ({'batching': 'vmap', 'devices': 1}, {'probe': 'never', 'batch_devices': 2}):
        assert make_plan(make_spec({**SIX, 'engine': {'chunk': 6, **engine}})) == plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('jaxprune.sweep.this_machine.memory_limit', lambda: 1)
        assert make_plan(spec) == plan
    sizes = {1e8: 512, 1e11: 100, 1e12: 10, 1e14: 8, float('nan'): 512}
    for flops, size in sizes.items():
        assert sweep_plan._chunk_size(0, 512 * 100 * size, flops) == size
    assert sweep_plan._chunk_size(0, 9, 1e14) == 5  # shared out evenly
    assert sweep_plan._chunk_size(3, 9, 1e14) == 3


def test_pieces_fill_the_devices():
    """Expectation: by hand: per device two unrolled runs, 16 mapped ones at most; no padding."""
    spec = make_spec({**DENSE, 'grid': {**DENSE['grid'], 'seed': list(range(300))}})
    group = checked_groups(spec)[0]
    planned = {'bytes_per_run': 1000, 'chunk': 300}
    for batching, devices, at_once in (('unroll', 8, 16), ('map', 3, 45), ('vmap', 2, 8)):
        strategy = Strategy(batching, 'scan', 'native', devices)
        here = this_machine(group._replace(strategy=strategy), planned)
        assert here.at_once == at_once and here.strategy == strategy
    assert pieces_of(300, 48)[-1] == (288, 12)
    # A saved piece keeps its borders where it fits.
    assert pieces_of(10, 4, [(2, 3), (5, 5), (0, 9)]) == [(0, 4), (4, 4), (8, 2)]
    assert pieces_of(10, 4, [(0, 2), (2, 3), (5, 5)]) == [(0, 2), (2, 3), (5, 4), (9, 1)]
    # A finished one keeps them whatever its size.
    assert pieces_of(10, 4, [], [(4, 6)]) == [(0, 4), (4, 6)]


@nothing_trained()
def test_a_broken_piece_is_made_anew(tmp_path):
    """Expectation: a piece whose file was cut short is none, and the next one takes its place."""
    jp.run_sweep(SIX, tmp_path / 'out')
    chunk = store.chunk_ids(tmp_path / 'out')[0]
    where = (store.read_results, store.read_layers, store.read_curves, store.read_flow)
    tables = [read(tmp_path / 'out') for read in where]
    made = store.Chunk(*tables, {'run_steps': 3.0})
    write_piece(tmp_path, '0-6', made)
    path = tmp_path / '0-6.zip'
    path.write_bytes(path.read_bytes()[:100])
    assert read_piece(tmp_path, '0-6') is None and read_piece(tmp_path, chunk) is None
    write_piece(tmp_path, '0-6', made)
    for ours, theirs in zip(read_piece(tmp_path, '0-6')[:4], tables, strict=True):
        assert_frame_equal(ours, theirs, check_exact=True)


def test_quantities_without_data_need_none(tmp_path):
    """Expectation: neither method nor quantity looks at examples, so none are laid out."""
    methods = {**DENSE['grid'], 'method': ['magnitude']}
    record = {'every': 5, 'flow': ['weight_norm']}
    jp.run_sweep({**DENSE, 'grid': methods, 'record': record}, tmp_path)
    assert len(store.read_flow(tmp_path)) == 2 * 5 * 2


def test_a_run_with_broken_scores_has_no_quantities():
    """Expectation: its mask means nothing, nor do norms under it; other runs keep theirs."""
    members = runs(make_spec(DENSE))[:2]
    recorded = Recorded(None, {'weight_norm': {'a': np.array([1.0, 2.0])}})
    moments = [Moment(10, False, recorded)]
    program = make_program(make_spec({**DENSE, 'record': {'every': 10}}), members[0])
    values = [row[-1] for row in flow_rows(program, members, [None, 'broken'], moments)]
    assert values[0] == 1.0 and np.isnan(values[1])
    rows = curves_rows(program, members, [None, 'broken'], 0, np.ones((2, 10)), moments)
    assert rows[0][3] == 1.0 and np.isnan(rows[1][3])


@nothing_trained()
def test_files_in_the_way_are_errors_of_one_line(tmp_path):
    """Expectation: a StoreError; timing, on which nothing depends, is left out where it is broken,
    and a broken curves file takes its results along when it is made anew.
    """
    table = {**DENSE, 'record': {'every': 5}}
    out = tmp_path / 'out'
    jp.run_sweep(table, out)
    chunk = store.chunk_ids(out)[0]
    store.results_path(out, chunk).unlink()
    shutil.rmtree(out / 'curves')
    (out / 'curves').touch()
    with pytest.raises(StoreError, match=r'curves.*cannot be written'):
        jp.run_sweep(table, out)
    (out / 'curves').unlink()
    jp.run_sweep(table, out)
    store.timing_path(out, chunk).write_text('junk')
    assert store.read_timing(out)['run_steps'] == 0
    curves = store.read_curves(out)
    store.curves_path(out, chunk).write_bytes(b'junk')
    with pytest.raises(StoreError, match=f'delete it and .*results/{chunk}.parquet'):
        store.read_curves(out)
    store.curves_path(out, chunk).unlink()
    store.results_path(out, chunk).unlink()
    jp.run_sweep(table, out)
    assert_frame_equal(store.read_curves(out), curves, check_exact=True)


def test_what_is_remembered_adds_up(monkeypatch, quick_trials, instant_trials):
    """Expectation: trials under a forced [engine] do not stand for the others; rows that no version
    wrote are no rows; two devices may share a run although one alone was fastest.
    """
    monkeypatch.setattr('jaxprune.sweep.trials._WORTH_PROBING', 0.0)
    spec = make_spec({**DENSE, 'train': {**DENSE['train'], 'epochs': 10**6}})
    run = runs(spec)[0]
    slow = Measured(Strategy('unroll', 'host', 'native', 1), 0.5, 1.0, 100.0, '')
    fast = Measured(Strategy('map', 'scan', 'native', 1), 0.1, 1.0, 100.0, '')
    remember(spec, run, [slow])
    remember(spec, run, [fast])
    assert remembered(spec, run) == [fast, slow]
    [shared] = planned_here(make_spec({**DENSE, 'engine': {'batch_devices': 2}}))
    assert shared.strategy.batch_devices == 2
    tried = []
    trials(spec, lambda found: tried.append(found.strategy))
    assert tried and fast.strategy not in tried
    assert {m.strategy for m in remembered(spec, run)} == {*tried, fast.strategy, slow.strategy}
    key = next(iter(json.loads((quick_trials / 'probes.json').read_text())))
    for row in (
        [],
        [['bogus', 'scan', 'native', 2, 1], 0.1, 1, 1, ''],
        [['map', 'scan', 'native', '2', 1], 0.1, 1, 1, ''],
        [['map'], 0.1],
    ):
        (quick_trials / 'probes.json').write_text(json.dumps({key: [row]}))
        assert remembered(spec, run) == []
        assert planned_here(spec)[0].chosen == 'usual'
