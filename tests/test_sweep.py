"""Sweeps from end to end on small data: tables, resuming, independence, refusals, the terminal."""

import functools
import io
import json
import math
import os
import pty
import re
import resource
import subprocess
import sys
from pathlib import Path

import changed_table
import jax
import numpy as np
import polars as pl
import pytest
import tomli_w
from polars.testing import assert_frame_equal
from rich.console import Console
from sweeps import planned_here

import jaxprune as jp
from jaxprune import plan, report
from jaxprune.method import MASK_FIGURES
from jaxprune.report import tables
from jaxprune.report.terminal import summary_table
from jaxprune.sweep import make_plan, make_spec, store, to_toml
from jaxprune.sweep.chunk_tables import COMPACT_COLUMNS
from jaxprune.sweep.compact_costs import COST_COLUMNS
from jaxprune.sweep.load import spec_hash

ROOT = Path(__file__).parents[1]
TABLE = {
    'name': 'tiny',
    'model': {'name': 'mlp', 'widths': [32]},
    'data': {'name': 'mnist_small', 'train_examples': 600, 'test_examples': 200},
    'train': {'epochs': 2, 'batch_size': 100, 'momentum': 0.9, 'weight_decay': 1e-3},
    'prune': {'samples_per_class': 2},
    'grid': {
        'method': [
            'magnitude',
            'snip',
            {'name': 'random', 'allocation': 'erk'},
            {'name': 'synflow', 'rounds': 3},
        ],
        'compression': [1, 5, 50],
        'seed': [0, 1],
    },
    'engine': {'chunk': 3},
}
ONE = [{'name': 'magnitude'}]
SHAPES = {'dense_0/kernel': (784, 32), 'dense_1/kernel': (32, 10)}
RUN_COMMAND = 'import sys; from jaxprune.cli import main; sys.exit(main())'


changed = functools.partial(changed_table.changed, TABLE)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A finished sweep: its directory, never changed by a test, and what `run_sweep` returned."""
    out = tmp_path_factory.mktemp('sweep') / 'out'
    return out, jp.run_sweep(TABLE, out)


def ordered(frame):
    return frame.sort('run_id', *[c for c in ('epoch', 'path') if c in frame.columns])


# Tables


def test_columns_and_rows(finished):
    out, results = finished
    assert_frame_equal(results, store.read_results(out), check_exact=True)
    # What a run is, what it was asked for and what it measured; null 'error' = nothing went wrong.
    assert results.columns == [
        *('run_id', 'model', 'dataset', 'label', 'method', 'allocation', 'seed'),
        *('target', 'target_compression', 'density', 'compression', 'effective_compression'),
        *COST_COLUMNS,
        *COMPACT_COLUMNS,
        *MASK_FIGURES,
        *('learning_rate', 'weight_decay'),
        *('step', 'epoch', 'train_loss', 'test_loss', 'test_accuracy', 'churn', 'error'),
    ]
    assert dict(results.schema) == store.RESULTS
    pruned, dense, epochs = 4 * 2 * 2, 2, 2
    assert len(results) == (pruned + dense) * epochs
    assert results['run_id'].n_unique() == pruned + dense
    assert not results.select('run_id', 'epoch').is_duplicated().any()
    assert results['error'].is_null().all()
    unknown = ('error', 'churn', *COMPACT_COLUMNS, *MASK_FIGURES)
    assert not any(results.drop(*unknown).null_count().row(0))
    assert set(results['epoch']) == {1, 2}
    assert (results['step'] == results['epoch'] * 6).all()
    for column in ('train_loss', 'test_loss'):
        assert results[column].is_finite().all()
    assert results['test_accuracy'].is_between(0, 1).all()
    assert results.filter(epoch=2, method='dense')['test_accuracy'].min() > 0.5
    assert set(results['model']) == {'mlp'} and set(results['dataset']) == {'mnist_small'}

    layers = store.read_layers(out)
    assert layers.columns == ['run_id', 'path', 'size', 'kept', 'active']
    assert dict(layers.schema) == store.LAYERS
    assert len(layers) == (pruned + dense) * len(SHAPES)
    assert set(layers['path']) == set(SHAPES)


def test_dense_once_per_seed(finished):
    dense = finished[1].filter(target_compression=1.0, epoch=2)
    assert sorted(dense['seed']) == [0, 1]
    assert set(dense['method']) == set(dense['label']) == {'dense'}
    assert set(dense['allocation']) == {'none'}
    assert set(dense['density']) == {1.0}


def test_achieved_densities_are_the_planned_counts(finished):
    out, results = finished
    layers = store.read_layers(out)
    total = sum(map(math.prod, SHAPES.values()))
    for row in results.filter(epoch=2).iter_rows(named=True):
        kept = dict(layers.filter(run_id=row['run_id']).select('path', 'kept').iter_rows())
        sizes = dict(layers.filter(run_id=row['run_id']).select('path', 'size').iter_rows())
        assert sizes == {path: math.prod(shape) for path, shape in SHAPES.items()}
        if row['method'] == 'dense':
            assert kept == sizes
            continue
        wanted = plan.keep_counts(SHAPES, 1 / row['target_compression'], row['allocation'])
        assert (kept if '*' not in wanted else {'*': sum(kept.values())}) == wanted
        assert row['density'] == sum(kept.values()) / total
        assert row['compression'] == total / sum(kept.values())


def test_only_last_and_every_so_many_epochs(finished, tmp_path):
    """What is recorded changes no number: equal ids, equal rows."""
    table = changed(record__every_epochs=5, grid__method=ONE, grid__compression=[5])
    results = jp.run_sweep(table, tmp_path / 'out')
    assert set(results['epoch']) == {2}
    both = ['run_id', 'test_loss', 'test_accuracy', 'density']
    assert_frame_equal(
        ordered(results).select(both),
        ordered(
            finished[1].filter(pl.col('run_id').is_in(results['run_id'].to_list()), epoch=2)
        ).select(both),
        check_exact=True,
    )


# A run's numbers depend on the run alone

OTHERWISE = {
    'grid__method': [
        {'name': 'synflow', 'rounds': 3},
        {'name': 'random', 'allocation': 'erk', 'label': 'a name'},
        'snip',
        'magnitude',
    ],
    'grid__compression': [50, 1, 5],
    'grid__seed': [1],
}


@pytest.mark.parametrize(
    ('changes', 'shared'),
    [
        ({**OTHERWISE, 'engine__chunk': 1}, 9),
        pytest.param({'engine__chunk': 8}, 18, marks=pytest.mark.slow),
        pytest.param(
            {'grid__method': ['snip'], 'grid__compression': [2, 5], 'grid__seed': [3, 1]},
            1,
            marks=pytest.mark.more,
        ),
    ],
    ids=['chunk 1, other order, other label', 'chunk 8', 'other company'],
)
def test_values_are_independent_of_company(finished, tmp_path, changes, shared):
    results = jp.run_sweep(changed(**changes), tmp_path / 'out')
    both = set(results['run_id']) & set(finished[1]['run_id'])
    assert len(both) == shared
    one, other = (
        ordered(f.filter(pl.col('run_id').is_in(list(both))).drop('label'))
        for f in (results, finished[1])
    )
    assert_frame_equal(one, other, check_exact=True)


@pytest.mark.slow
@pytest.mark.parametrize('strategy', ['unroll', 'vmap'])
def test_values_agree_between_strategies(finished, tmp_path, strategy):
    """Masks are equal bit for bit; losses up to the order of float32 sums."""
    out = tmp_path / 'out'
    results = jp.run_sweep(changed(engine__batching=strategy, engine__chunk=0), out)
    assert set(results['run_id']) == set(finished[1]['run_id'])
    assert_frame_equal(
        ordered(store.read_layers(out)), ordered(store.read_layers(finished[0])), check_exact=True
    )
    floats = ['train_loss', 'test_loss']
    one, other = ordered(results), ordered(finished[1])
    assert_frame_equal(one.drop(floats), other.drop(floats), check_exact=True)
    assert_frame_equal(one.select(floats), other.select(floats), rel_tol=1e-5, abs_tol=0)


@pytest.mark.more
def test_training_grid(finished, tmp_path):
    """Numbers share a program; shapes make another. Each swept key is a column."""
    grid = {'learning_rate': [0.1, 0.05], 'momentum': [0.9, 0.5], 'batch_size': [100, 150]}
    table = changed(grid__method=ONE, grid__compression=[5], grid__seed=[1], grid__train=grid)
    made = make_plan(make_spec(table))
    assert [p['runs'] for p in made['programs']] == [4, 4]
    assert sorted(p['differs']['batch_size'] for p in made['programs']) == [100, 150]
    results = jp.run_sweep(table, tmp_path / 'out')
    assert results.columns == [*store.RESULTS, 'momentum', 'batch_size']
    assert results['momentum'].dtype == pl.Float64 and results['batch_size'].dtype == pl.Int64
    last = results.filter(epoch=2)
    swept = last.select('learning_rate', 'momentum', 'batch_size').rows()
    assert len(set(swept)) == len(swept) == 8
    assert last['train_loss'].n_unique() == 8
    assert set(last.filter(batch_size=100)['step']) == {12}
    assert set(last.filter(batch_size=150)['step']) == {8}
    same = results.filter(learning_rate=0.1, momentum=0.9, batch_size=100)
    before = finished[1].filter(pl.col('run_id').is_in(same['run_id'].to_list()))
    assert len(before) == 2
    assert_frame_equal(same.select(before.columns), before, check_exact=True)


@pytest.mark.more
def test_schedules(tmp_path):
    def rows(swept, **train):
        table = changed(grid__method=ONE, grid__compression=[5], grid__seed=[0], grid__train=swept)
        table['train'] = {**table['train'], 'momentum': 0.0, 'weight_decay': 0.0, **train}
        frame = jp.run_sweep(table, tmp_path / '-'.join(swept)).sort('epoch')
        ((key, values),) = swept.items()
        return [frame.filter(pl.col(key) == value, target_compression=5) for value in values]

    constant, cosine = rows({'schedule': ['constant', 'cosine']})
    # From the milestone on nothing moves.
    step = {'schedule': 'step', 'milestones': [1], 'factor': 1e-30}
    stopped, warm = rows({'warmup_epochs': [0, 1]}, **step)
    same = ['test_loss', 'test_accuracy', 'train_loss']
    assert stopped[0].select(same).row(0) == constant[0].select(same).row(0)
    assert stopped['test_loss'][1] == stopped['test_loss'][0]
    assert constant['test_loss'][1] != constant['test_loss'][0]
    # Cosine begins like constant and ends slower; warm-up begins slower.
    values = [f['train_loss'][0] for f in (constant, cosine, warm)]
    assert len(set(values)) == 3 and np.isfinite(values).all()
    assert warm['train_loss'][0] > constant['train_loss'][0]


@pytest.mark.parametrize(
    ('model', 'method'),
    [({'name': 'lenet5'}, 'magnitude'), ({'name': 'small_vgg', 'widths': [3]}, 'snip')],
    ids=['lenet5', 'small_vgg'],
)
@pytest.mark.slow
def test_convolutions_and_augmentation(tmp_path, model, method):
    def rows(name, **data):
        table = {
            **changed(grid__method=[method], grid__compression=[1, 5], grid__seed=[0]),
            'model': model,
            'data': {'name': 'mnist_small', 'train_examples': 200, 'test_examples': 100, **data},
        }
        table['train'] = {**table['train'], 'epochs': 1, 'batch_size': 50}
        assert planned_here(make_spec(table))[0].strategy.stepping == 'host'
        return jp.run_sweep(table, tmp_path / name)

    plain, moved = rows('plain'), rows('moved', augment=['crop', 'flip'])
    for frame in (plain, moved):
        assert frame['train_loss'].is_finite().all() and frame['test_loss'].is_finite().all()
        assert frame['density'][1] == pytest.approx(0.2, rel=1e-2)
    # Scores see plain examples, so only training differs.
    assert plain['density'].to_list() == moved['density'].to_list()
    assert (plain['train_loss'] != moved['train_loss']).all()
    kept = [store.read_layers(tmp_path / name)['kept'].to_list() for name in ('plain', 'moved')]
    assert kept[0] == kept[1]


COUNT_DEVICES = """
import sys, jax
jax.config.update('jax_num_cpu_devices', int(sys.argv[1]))
import jaxprune as jp
jp.run_sweep(sys.argv[2], sys.argv[3])
assert jax.local_device_count() == int(sys.argv[1])
"""


@pytest.mark.slow
def test_values_are_independent_of_the_number_of_devices(tmp_path):
    """Five runs on one, two and three devices: two of six rows are padding on three."""
    table = changed(grid__method=ONE, grid__compression=[5], grid__seed=[0, 1, 2, 3, 4])
    table['engine'] = {}
    (tmp_path / 'spec.toml').write_text(tomli_w.dumps(table))
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', COUNT_DEVICES, str(n), tmp_path / 'spec.toml', tmp_path / str(n)]
        )
        for n in (1, 2, 3)
    ]
    assert [p.wait(timeout=120) for p in processes] == [0, 0, 0]
    frames = [ordered(store.read_results(tmp_path / str(n))) for n in (1, 2, 3)]
    assert len(frames[0]) == 10
    for other in frames[1:]:
        assert_frame_equal(frames[0], other, check_exact=True)


# What is written beside the tables


def test_plan_and_provenance(finished):
    out, results = finished
    spec = make_spec(TABLE)
    assert (out / 'spec.toml').read_text() == to_toml(spec)
    stored = json.loads((out / 'plan.json').read_text())
    assert stored == json.loads(json.dumps(make_plan(spec)))
    assert stored['spec'] == spec_hash(spec)
    assert [r['run_id'] for r in stored['runs']] == results['run_id'].unique(
        maintain_order=True
    ).to_list()
    assert [p['prunable'] for p in stored['programs']] == [
        {path: math.prod(shape) for path, shape in SHAPES.items()}
    ]
    assert stored['programs'][0]['parameters'] == 784 * 32 + 32 + 32 * 10 + 10
    assert stored['programs'][0]['steps'] == 12
    assert [len(c['runs']) for c in stored['chunks']] == [3] * 6
    record = store.read_provenance(out)
    assert record['seeds'] == [0, 1] and record['name'] == 'tiny'
    [session] = record['sessions']
    assert session['versions']['jax'] == jax.__version__
    assert session['versions']['jaxprune']
    assert session['device']['platform'] == jax.default_backend()
    assert session['device']['count'] == jax.local_device_count()
    assert {'started', 'command', 'git', 'environment'} <= session.keys()
    assert not list(out.rglob('*.tmp'))


# The terminal


def test_command_line_sweep(finished, copied, tmp_path, command):
    """Plain lines where there is no terminal, a summary, a report; a chunk is still to be run."""
    spec, out = tmp_path / 'spec.toml', copied
    spec.write_text(tomli_w.dumps(TABLE))
    store.results_path(out, store.chunk_ids(out)[3]).unlink()
    code, stdout, stderr = command('sweep', spec, '--out', out)
    assert code == 0
    lines = stderr.splitlines()
    assert lines[0] == f'jaxprune: 18 runs -> {out}'
    for line in lines[1:]:
        assert re.fullmatch(r'\d+/18 runs  ([\d,]+|-) steps/s x runs  ETA (\d+:\d\d|-:--)', line)
    assert lines[-1].startswith('18/18 runs')
    assert '\x1b' not in stdout + stderr and '\r' not in stdout + stderr
    for word in ('dense', 'magnitude', 'SNIP', 'random (ERK)', 'SynFlow', f'report: {out}'):
        assert word in stdout
    assert (out / 'report.html').stat().st_size > 10_000
    assert list((out / 'figures').glob('*.png'))
    assert_frame_equal(store.read_results(out), finished[1], check_exact=True)
    code, stdout, stderr = command('status', out)
    assert code == 0 and stderr == ''
    assert 'tiny: 18/18 runs, not running' in stdout and 'report.html' in stdout


@pytest.mark.more
def test_diverged_runs_are_stored_and_reported(tmp_path):
    """A rate so high that float32 overflows: a row of NaN, not a crash."""
    table = changed(
        grid__method=ONE,
        grid__compression=[1, 5],
        grid__seed=[0],
        train__learning_rate=1e30,
        train__schedule='constant',
    )
    results = jp.run_sweep(table, tmp_path / 'out')
    assert len(results) == 4 and results['test_loss'].is_nan().all()
    assert set(results['error']) == {'diverged: training and test loss NaN or infinite'}
    assert report.write(tmp_path / 'out').exists()
    shown = io.StringIO()
    table = summary_table(tables.summary(results, store.read_layers(tmp_path / 'out')))
    Console(file=shown, width=120).print(table)
    assert 'x = at least one seed diverged' in shown.getvalue()
    assert re.search(r'dense +\d+\.\dx', shown.getvalue())


@pytest.fixture
def on_terminal():
    """Runs a command line in a process of its own under a pseudo-terminal; returns its output."""

    def run(*arguments):
        controller, terminal = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, '-c', RUN_COMMAND, *map(str, arguments)],
            stdout=terminal,
            stderr=terminal,
            stdin=terminal,
            env={**os.environ, 'TERM': 'xterm-256color', 'COLUMNS': '100'},
        )
        os.close(terminal)
        output = b''
        try:
            while chunk := os.read(controller, 65536):
                output += chunk
        except OSError:  # the other end is closed
            pass
        os.close(controller)
        return process.wait(timeout=60), output.decode()

    return run


@pytest.mark.script
def test_bar_on_a_terminal(copied, tmp_path, on_terminal):
    (tmp_path / 'spec.toml').write_text(tomli_w.dumps(TABLE))
    for chunk in store.chunk_ids(copied)[:2]:
        store.results_path(copied, chunk).unlink()
    code, output = on_terminal('sweep', tmp_path / 'spec.toml', '--out', copied)
    assert code == 0
    text = re.sub(r'\x1b\[[0-9;?]*[a-zA-Z]', '', output)
    assert '━' in text
    assert re.search(r'18/18 runs +[\d,]+ steps/s x runs +ETA \d+:\d\d', text)
    assert 'report:' in text


# Start-up


def fresh(code, *arguments):
    return subprocess.run(
        [sys.executable, '-c', code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )


def test_import_is_light():
    heavy = ('tensorflow', 'matplotlib', 'flax', 'optax', 'polars', 'rich', 'jax')
    done = fresh(f'import jaxprune, sys; print([m for m in {heavy} if m in sys.modules])')
    assert done.stdout.strip() == '[]', done.stderr


@pytest.mark.more
def test_plan_of_quickstart_takes_seconds(tmp_path):
    """Expectation: seconds of the processor, since a clock on the wall counts what else runs."""
    code = (
        'import sys; from jaxprune.cli import main; code = main(); '
        "print([m for m in ('tensorflow', 'matplotlib') if m in sys.modules]); sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = fresh(code, 'plan', 'experiments/quickstart.toml')
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 8
    assert done.returncode == 0, done.stderr
    for word in ('220', 'training programs   1', '266,200', 'memory', 'training time', 'chunks'):
        assert word in done.stdout
    assert done.stdout.rstrip().endswith('[]')


def test_broken_scores_fail_their_run_and_no_other(tmp_path, capsys):
    """A temperature of 1e-38 overflows GraSP's logits: NaN scores, a mask that means nothing."""
    table = {
        'name': 'broken',
        'model': {'name': 'mlp', 'widths': [8]},
        'data': {'name': 'mnist_small', 'train_examples': 200, 'test_examples': 100},
        'train': {'epochs': 1, 'batch_size': 50},
        'prune': {'samples_per_class': 2},
        'grid': {
            'method': ['magnitude', {'name': 'grasp', 'temperature': 1e-38}],
            'compression': [4],
            'seed': [0, 1],
        },
    }
    frame = jp.run_sweep(table, tmp_path / 'out')
    good, bad = (frame.filter(method=m) for m in ('magnitude', 'grasp'))
    assert good['error'].to_list() == [None, None]
    assert good['test_accuracy'].is_finite().all()
    assert all('NaN or infinite' in error for error in bad['error'])
    assert bad.select('train_loss', 'test_loss', 'test_accuracy').unpivot()['value'].is_nan().all()


def test_a_sweep_that_looks_at_no_data_needs_none(tmp_path):
    """SynFlow reads the shape of an input only: 60 examples are enough, whatever [prune] says."""
    table = {
        'name': 'few',
        'model': {'name': 'mlp', 'widths': [8]},
        'data': {'name': 'mnist_small', 'train_examples': 60, 'test_examples': 100},
        'train': {'epochs': 1, 'batch_size': 20},
        'grid': {
            'method': [{'name': 'synflow', 'rounds': 2}],
            'compression': [2],
            'seed': [0],
        },
    }
    assert jp.run_sweep(table, tmp_path / 'out')['test_accuracy'].is_finite().all()
