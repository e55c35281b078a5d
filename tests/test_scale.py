"""The benchmark of very many runs works; tables that are read in one go are those of each file."""

import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from jaxprune.sweep import store

SCRIPT = Path(__file__).parents[1] / 'experiments' / 'bench' / 'scale.py'


@pytest.mark.script
def test_simulated_hosts_finish_every_run_once(tmp_path):
    """Expectation: the script's own check that the tables hold every run once after a coordinator
    was told to leave; a number for every part at both sizes."""
    out = tmp_path / 'scale.md'
    command = [sys.executable, SCRIPT, '--quick', '--out', out]
    quick = {**os.environ, 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
    done = subprocess.run(command, env=quick, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split('|')[1:-1] for line in out.read_text().splitlines() if line[:1] == '|']
    parts = {row[0].strip(): row[1:] for row in lines[2:]}
    for part in ('plan: checked_groups', 'coordinator: one look', 'status, half finished',
                 'status, all finished', 'read_results', 'report'):  # fmt: skip
        small, large, *_ = (cell.split('/')[0] for cell in parts[part])
        assert float(small) > 0 and float(large) > 0, part


@pytest.fixture
def stored(tmp_path):
    """A directory with three finished chunks, of one run each."""
    chunks = [{'id': f'chunk{i}', 'program': 'p', 'runs': [f'run{i}']} for i in range(3)]
    plan = {'name': 'stored', 'programs': [], 'chunks': chunks, 'runs': []}
    store.write_json(tmp_path / 'plan.json', plan)
    nothing = [pl.DataFrame(schema=schema) for schema in (store.LAYERS, store.CURVES, store.FLOW)]
    for chunk in chunks:
        row = {'run_id': chunk['runs'][0], 'seed': 3, 'test_accuracy': 0.5, 'params_compact': None}
        results = pl.DataFrame([row], schema=store.RESULTS_FILE)
        store.write_chunk(tmp_path, chunk['id'], store.Chunk(results, *nothing, {}))
    return tmp_path


@pytest.mark.parametrize('which', [[1], [0, 1, 2]], ids=['one', 'all'])
@pytest.mark.parametrize('lost', [[], ['params_compact', 'latency_ratio']], ids=['moved', 'lost'])
def test_tables_of_other_versions(stored, which, lost):
    """Expectation: columns in another order, or that came later, change nothing in what is read."""
    before = store.read_results(stored)
    for i in which:
        path = store.results_path(stored, f'chunk{i}')
        table = pl.read_parquet(path)
        table.select(reversed([name for name in table.columns if name not in lost])).write_parquet(
            path
        )
    assert_frame_equal(store.read_results(stored), before)
    assert set(store.all_unreadable(stored, store.chunk_ids(stored)).values()) == {''}


def test_broken_ends_are_found_without_reading_rows(stored):
    """Expectation: what `unreadable` says, which reads all, for every kind of broken file."""
    whole = store.results_path(stored, 'chunk0').read_bytes()
    other = store.parquet(pl.DataFrame({'a': [1]}))
    chunks = store.chunk_ids(stored)
    for broken in (b'', b'PAR1', b'PAR1PAR1', whole[:-1], whole[: len(whole) // 2], other):
        store.results_path(stored, 'chunk1').write_bytes(broken)
        said = store.all_unreadable(stored, chunks)
        assert said == {chunk: store.unreadable(stored, chunk) for chunk in chunks}
        assert [bool(text) for text in said.values()] == [False, True, False]
