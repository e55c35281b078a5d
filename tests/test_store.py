"""Stores, resuming and refusals, on an engine that trains nothing."""

import functools
import json
import os
import shutil
import types
from pathlib import Path

import changed_table
import polars as pl
import pytest
import tomli_w
from fake_engine import nothing_trained
from matplotlib.layout_engine import ConstrainedLayoutEngine
from polars.testing import assert_frame_equal
from sweeps import trained_here

import jaxprune as jp
from jaxprune import report
from jaxprune.errors import StoreError
from jaxprune.files import machine_token
from jaxprune.report import style
from jaxprune.sweep import make_spec, status, store
from jaxprune.sweep.load import spec_hash, to_toml
from jaxprune.sweep.sweep_plan import checked_groups

TABLE = {
    'name': 'stored',
    'model': {'name': 'mlp', 'widths': [8]},
    'data': {'name': 'mnist_small', 'train_examples': 60, 'test_examples': 50},
    'train': {'epochs': 2, 'batch_size': 10},
    'grid': {
        'method': [
            'magnitude',
            *({'name': 'random', 'allocation': a} for a in ('uniform', 'erk', 'igq')),
        ],
        'compression': [1, 5, 50],
        'seed': [0, 1],
    },
    'engine': {'chunk': 3},
}

changed = functools.partial(changed_table.changed, TABLE)


@pytest.fixture(scope='module', autouse=True)
def fake():
    """Nothing is trained, and what is planned is traced once for each specification."""
    known = {}

    def checked_once(spec, *args):
        text = to_toml(spec)
        if text not in known:
            known[text] = checked_groups(spec, *args)
        return known[text]

    with nothing_trained(), pytest.MonkeyPatch.context() as patch:
        patch.setattr('jaxprune.sweep.run.checked_groups', checked_once)
        yield


@pytest.fixture
def words_only(monkeypatch):
    """Reports without layout and pixels."""
    monkeypatch.setattr(style, 'png', lambda drawing: b'\x89PNG')
    monkeypatch.setattr(ConstrainedLayoutEngine, 'execute', lambda engine, drawing: None)


@pytest.fixture(scope='module')
def finished(fake, tmp_path_factory):
    """A finished sweep: its directory, never changed by a test, and what `run_sweep` returned."""
    out = tmp_path_factory.mktemp('sweep') / 'out'
    return out, jp.run_sweep(TABLE, out)


def test_the_fake_keeps_what_is_planned(finished):
    """Expectation: tables as a real sweep has them: whole, different for every run, and counts."""
    out, results = finished
    assert len(results) == 18 * 2 and results['error'].is_null().all()
    assert results['test_loss'].n_unique() == 18 * 2
    layers = store.read_layers(out).group_by('run_id').agg(pl.col('kept').sum())
    kept = dict(layers.select('run_id', 'kept').iter_rows())
    size = 784 * 8 + 8 * 10
    for run_id, compression in results.select('run_id', 'target_compression').iter_rows():
        assert kept[run_id] == pytest.approx(size / compression, abs=1)


def test_resume_runs_only_what_is_missing(finished, copied):
    out, results = finished
    times = {p: p.stat().st_mtime_ns for p in copied.glob('*/*.parquet')}
    chunks = store.chunk_ids(copied)
    gone = chunks[1::2]
    for chunk in gone:
        store.results_path(copied, chunk).unlink()
    store.layers_path(copied, gone[0]).unlink()
    store.layers_path(copied, chunks[0]).unlink()  # half a chunk is no chunk
    dead = f'{machine_token()}-{2**22 + 1}-0123abcd.tmp'  # no process has this number
    leftovers = [
        copied / f'.plan.json.{dead}',
        store.results_path(copied, chunks[1]).with_name(f'.{chunks[1]}.parquet.{dead}'),
        copied / '.plan.json.ffffffff-1-0123abcd.tmp',
        copied / 'attempts' / chunks[0] / f'.monday.json.{dead}',
    ]
    for leftover in leftovers:
        leftover.write_bytes(b'half a file')
    os.utime(leftovers[2], (0, 0))  # of another machine, years ago
    others = [
        copied / '.mine.tmp',
        copied / f'.plan.json.{machine_token()}-{os.getpid()}-0123abcd.tmp',
        copied / '.plan.json.ffffffff-1-0123abce.tmp',
    ]
    for other in others:
        other.write_text('not ours to delete')

    before = status(copied)
    assert before['chunks_finished'] == len(chunks) - len(gone) - 1
    assert before['runs_finished'] < before['runs'] == 18
    assert len(store.read_results(copied)) == 2 * before['runs_finished']

    again = jp.run_sweep(TABLE, copied)
    assert_frame_equal(again, results, check_exact=True)
    assert_frame_equal(store.read_layers(copied), store.read_layers(out), check_exact=True)
    for chunk in set(chunks) - set(gone) - {chunks[0]}:
        for where in (store.results_path, store.layers_path):
            path = where(copied, chunk)
            assert path.stat().st_mtime_ns == times[path]
    assert not any(leftover.exists() for leftover in leftovers)
    assert all(other.exists() for other in others)
    after = status(copied)
    assert after['runs_finished'] == after['runs'] == 18
    assert after['sessions'] == 2 and not after['running']


def test_finished_sweep_trains_nothing(finished, copied, monkeypatch):
    monkeypatch.setattr('jaxprune.sweep.worker.make_engine', None)
    assert_frame_equal(jp.run_sweep(TABLE, copied), finished[1], check_exact=True)


def test_order_of_keys_is_the_same_sweep(copied):
    jp.run_sweep(dict(reversed(TABLE.items())), copied)


@pytest.mark.parametrize('changes', [{'train__epochs': 3}, {'grid__seed': [0]}], ids=str)
def test_other_specification_is_refused(copied, changes):
    before = {p: p.read_bytes() for p in copied.rglob('*') if p.is_file()}
    with pytest.raises(StoreError, match='holds another sweep'):
        jp.run_sweep(changed(**changes), copied)
    assert {p: p.read_bytes() for p in copied.rglob('*') if p.is_file()} == before


BROKEN = {
    'plan.json': ['', '{', '[]', '{}', 'null', b'\xff\xfe'],
    'sessions': ['{', '{}'],
    'results': [b'', b'PAR1', 'text'],
    'layers': [b'', b'half'],
}


@pytest.mark.parametrize(
    ('kind', 'content'), [(kind, c) for kind, contents in BROKEN.items() for c in contents], ids=str
)
def test_broken_file_is_named(copied, command, tmp_path, kind, content):
    path = copied / kind
    if path.is_dir():
        path = sorted(path.iterdir())[0]
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    spec = tmp_path / 'spec.toml'
    spec.write_text(tomli_w.dumps(TABLE))
    for arguments in (['sweep', spec, '--out', copied], ['report', copied], ['status', copied]):
        if arguments[0] == 'status' and kind in ('results', 'layers'):
            code, out, _ = command(*arguments)  # it goes on with what can be read
            assert code == 0 and f'broken: {path}: cannot be read' in out
            assert '15/18 runs' in out and '5/6 finished' in out
            continue
        if kind == 'sessions' and arguments[0] == 'status':  # only the report shows them
            assert command(*arguments)[0] == 0
            continue
        code, _, err = command(*arguments)
        assert code == 2
        line = err.splitlines()[-1]
        assert line.startswith('jaxprune: ') and str(path) in line
        assert 'Traceback' not in err


@pytest.mark.parametrize('part', [0.1, 0.5, 0.9])
def test_truncated_parquet_is_named_and_can_be_mended(finished, copied, part):
    path = sorted((copied / 'results').iterdir())[-1]
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(StoreError, match=f'{path.name}: cannot be read .* delete it'):
        store.read_results(copied)
    path.unlink()
    if part == 0.5:
        assert_frame_equal(jp.run_sweep(TABLE, copied), finished[1], check_exact=True)


def test_other_programs_are_refused(copied):
    """Expectation: a plan whose programs this version would not make has another origin."""
    table = json.loads((copied / 'plan.json').read_text())
    table['programs'][0]['id'] = 'other'
    (copied / 'plan.json').write_text(json.dumps(table))
    with pytest.raises(StoreError, match='another version'):
        jp.run_sweep(TABLE, copied)


def test_other_format_is_refused(copied):
    table = json.loads((copied / 'plan.json').read_text())
    (copied / 'plan.json').write_text(json.dumps({**table, 'format': 0}))
    with pytest.raises(StoreError, match='holds a sweep of format 0, and this version'):
        jp.run_sweep(TABLE, copied)
    (copied / 'plan.json').write_text(json.dumps({**table, 'format': 99}))
    with pytest.raises(StoreError, match='of format 99, by a newer jaxprune'):
        jp.run_sweep(TABLE, copied)


def test_several_processes_share_a_directory(copied, command, finished):
    """Expectation: a chunk that another process is at is left to it, as long as it gives signs of
    life; then it is taken over. `status` says who is where."""
    first, second = store.chunk_ids(copied)[:2]
    for chunk in (first, second):
        store.results_path(copied, chunk).unlink()
    record = {'state': 'running', 'host': 'elsewhere', 'machine': 'ffffffff', 'process': 1}
    other = copied / 'attempts' / first / '20260101T000000+0000-0123abcd.json'
    store.write_json(other, {**record, 'started': 'monday'})
    assert status(copied)['running']
    out = command('status', copied)[1]
    assert f'chunk {first}, 3 runs: running on elsewhere since monday, last sign of life 0:0' in out
    looks = []

    def silent_at_last(seconds):  # it waits for the other one, and time goes by
        assert store.finished(copied, second) and not store.finished(copied, first)
        looks.append(seconds)
        if len(looks) == 2:
            os.utime(other, (0, 0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('jaxprune.sweep.run.time', types.SimpleNamespace(sleep=silent_at_last))
        assert_frame_equal(jp.run_sweep(TABLE, copied), finished[1], check_exact=True)
    assert len(looks) == 2 and not status(copied)['running']


def test_out_with_files_of_somebody_else_is_refused(tmp_path, command):
    """Expectation: one line, and their report is still there; no name is no directory."""
    spec, theirs = tmp_path / 'spec.toml', tmp_path / 'theirs'
    spec.write_text(tomli_w.dumps(TABLE))
    theirs.mkdir()
    (theirs / 'report.html').write_text('a year of work')
    for out, says in ((theirs, "there is 'report.html'"), ('', 'needs a name'), (' ', 'a name')):
        code, stdout, err = command('sweep', spec, '--out', out)
        assert (code, stdout) == (2, '') and err.count('\n') == 1 and says in err
    assert [p.name for p in theirs.iterdir()] == ['report.html']
    assert (theirs / 'report.html').read_text() == 'a year of work'


def test_a_directory_of_a_sweep_that_was_killed_early_is_taken(tmp_path):
    """Expectation: what is written before the plan does not stand in the way."""
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'sessions').mkdir()
    for name in ('sessions/monday.json', 'spec.toml', '.plan.json.ffffffff-1-0123abcd.tmp'):
        (out / name).write_text('')
    assert store.directory(out) == out


def test_status_counts_what_a_checkpoint_holds(copied, command):
    """Expectation: by hand: of a chunk of three runs, one is finished and two are saved after half
    of their steps, by two attempts; `1 + 2 / 2` of 3."""
    chunk = store.chunk_ids(copied)[-1]
    store.results_path(copied, chunk).unlink()
    steps, folder = store.read_plan(copied)['programs'][0]['steps'], copied / 'checkpoints' / chunk
    (folder / 'a' / '1-2' / str(steps // 2)).mkdir(parents=True)
    (folder / 'b' / '1-2' / str(steps // 4)).mkdir(parents=True)
    (folder / 'b' / '1-2' / f'{steps - 1}.orbax-checkpoint-tmp').mkdir()  # never finished
    (folder / '0-1.zip').touch()
    out = command('status', copied)[1]
    assert f'chunk {chunk}, 3 runs: finished on ' in out and ', 67 % saved' in out


def test_out_that_is_a_file(tmp_path, command):
    spec = tmp_path / 'spec.toml'
    spec.write_text(tomli_w.dumps(TABLE))
    for out in (spec, spec / 'deeper'):
        code, stdout, err = command('sweep', spec, '--out', out)
        assert (code, stdout) == (2, '') and err.count('\n') == 1
        assert f'{out}: cannot be made a directory' in err


@pytest.mark.parametrize(
    'name',
    [
        'lr[0.1]',
        'Größe',
        *(pytest.param(n, marks=pytest.mark.more) for n in ('a*b?', '{x}', 'with space')),
    ],
)
def test_any_directory_name(finished, tmp_path, name, words_only):
    out = shutil.copytree(finished[0], tmp_path / name)
    assert_frame_equal(jp.run_sweep(TABLE, out), finished[1], check_exact=True)
    if name in ('lr[0.1]', 'Größe'):  # one that is a pattern, one that is not ASCII
        assert report.write(out).exists()


def test_default_directory(tmp_path, monkeypatch, finished):
    monkeypatch.chdir(tmp_path)
    Path('runs').mkdir()
    shutil.copytree(finished[0], f'runs/stored-{spec_hash(make_spec(TABLE))}')
    assert_frame_equal(jp.run_sweep(TABLE), finished[1], check_exact=True)


def test_report_of_half_a_sweep(copied, command, words_only):
    for chunk in store.chunk_ids(copied)[1:]:
        store.results_path(copied, chunk).unlink()
    code, _, _ = command('report', copied)
    assert code == 0 and (copied / 'report.html').exists()
    assert '3/18 runs' in command('status', copied)[1]


def test_engine_settings_may_change_between_sessions(tmp_path):
    """[engine] is no part of a sweep's identity: the chunks stay as they were planned, what is left
    of them is trained as it says now."""
    table = {
        'name': 'again',
        'model': {'name': 'mlp', 'widths': [8]},
        'data': {'name': 'mnist_small', 'train_examples': 200, 'test_examples': 100},
        'train': {'epochs': 1, 'batch_size': 50},
        'grid': {'method': ['magnitude'], 'compression': [1, 2, 4], 'seed': [0, 1]},
        'engine': {'chunk': 4, 'batching': 'map'},
    }
    out = tmp_path / 'out'
    whole = jp.run_sweep(table, out)
    first, second = store.chunk_ids(out)
    plan = (out / 'plan.json').read_bytes()
    store.results_path(out, second).unlink()
    written = store.results_path(out, first).stat().st_mtime_ns
    engine = {'chunk': 1, 'batching': 'unroll', 'devices': 1}
    again = jp.run_sweep({**table, 'engine': engine}, out)
    assert_frame_equal(again, whole, check_exact=True)
    assert store.results_path(out, first).stat().st_mtime_ns == written
    assert (out / 'plan.json').read_bytes() == plan
    assert [how['strategy']['batching'] for how in trained_here(out)] == ['map', 'unroll']
