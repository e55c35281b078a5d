"""The benchmark scripts run, and one failure does not stop them."""

import collections
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxprune.method import METHODS

BENCH = Path(__file__).parents[1] / 'experiments' / 'bench'
SCORING = BENCH / 'scoring.py'
QUICK = {**os.environ, 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}


def cells(page: str) -> list[list[str]]:
    """The rows of all tables; [] for a line that is not a row."""
    return [[cell.strip() for cell in line.split('|')[1:-1]] for line in page.splitlines()]


@pytest.mark.script
def test_scoring_runs_and_all_ways_agree(tmp_path):
    """Expectation: the script's own checks, that counting, argsort and top_k give one mask (with
    ties, vmapped) and that all ways of counting paths agree; it exits with 1 where one does not.
    Iter-SNIP's round is SNIP's."""
    out = tmp_path / 'scoring.md'
    command = [sys.executable, SCORING, '--quick', '--methods', 'snip', 'iter_snip', '--out', out]
    done = subprocess.run(command, env=QUICK, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split('|')[1:-1] for line in out.read_text().splitlines() if '266,200' in line]
    assert len(rows) == 3 + 6 + 4
    reasons = [row[-1].strip() for row in rows]
    assert [reason for reason in reasons if reason] == ['the same program as snip']


@pytest.mark.script
def test_the_engine_benchmark_runs_and_all_train_the_same(tmp_path):
    """Expectation: the script's own check that all ways reach the same training losses (PyTorch
    among them where it is installed), the table, and the figure beside it.
    """
    out = tmp_path / 'engine.md'
    nets = ('LeNet-300-100', 'VGG-11 (1/4)')
    command = [sys.executable, BENCH / 'engine.py', '--quick', '--nets', *nets, '--out', out]
    done = subprocess.run(command, env=QUICK, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for net in nets:
        row = next(line for line in out.read_text().splitlines() if line.startswith(f'| {net}'))
        assert row.split('|')[2].strip() == '2' and 'WRONG' not in row
    assert out.with_suffix('.png').stat().st_size > 10_000


@pytest.mark.script
def test_the_cost_of_recording_is_measured(tmp_path):
    """Expectation: one row for every kind of recording, each with a number."""
    out = tmp_path / 'recording.md'
    command = [sys.executable, BENCH / 'engine.py', '--quick', '--recording', '--out', out]
    done = subprocess.run([*command, '--nets', 'LeNet-300-100'], env=QUICK, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    table = out.read_text().split('### What recording along training costs')[1]
    rows = [line.split('|') for line in table.splitlines() if line.startswith('| LeNet-300-100')]
    assert len(rows) == 6 and all(float(row[4]) > -100 for row in rows)


@pytest.mark.script
def test_the_structure_benchmark_runs_and_compact_equals_masked(tmp_path):
    """Expectation: the script's own check that compact networks equal masked ones; a row for each
    part, and below 5 s for the groups of ResNet-56. Peers take part where they are installed, and
    what they cannot do does not fail the script.
    """
    out = tmp_path / 'structure.md'
    nets = ('ResNet-56', 'ResNet-20', 'shared layer', 'pixel shuffle')
    command = [sys.executable, BENCH / 'structure.py', '--quick', '--nets', *nets, '--out', out]
    done = subprocess.run(command, env=QUICK, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = out.read_text()
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines()]
    traced = [row for row in rows if row and row[0] == 'ResNet-56']
    assert len(traced) == 4 and len({row[3] for row in traced}) == 1
    assert 'above the target of 5 s: none' in text
    assert any(row and row[0] == 'ResNet-20' and float(row[-1]) < 1e-5 for row in rows)
    if 'not installed' not in text:
        assert any(row and row[:4] == ['shared layer', '19', 'equal', 'equal'] for row in rows)


@pytest.mark.script
def test_the_block_benchmark_runs_and_products_agree(tmp_path):
    """Expectation: the script's own check that block-sparse products equal dense ones; a row for a
    product and for each of two kernels, whose best blocks hold more after pivoting than before.
    """
    out = tmp_path / 'blocks.md'
    command = [sys.executable, BENCH / 'blocks.py', '--quick', '--out', out]
    done = subprocess.run(command, env=QUICK, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = out.read_text().splitlines()
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines]
    [product] = [row for row in rows if row and row[0] == '512']
    assert float(product[-1]) < 1e-6 and float(product[5]) > 0
    kernels = [row for row in rows if row and row[0].startswith('dense_')]
    assert len(kernels) == 2
    for row in kernels:
        before, after = (float(cell.rstrip('%')) for cell in row[7:9])
        assert 0 < before < after <= 100
    [accuracies] = [row for row in rows if row and row[0] == '32']
    assert len(accuracies) == 8 and all(cell.endswith('%') for cell in accuracies[2:])


@pytest.mark.script
def test_the_shapley_benchmark_runs_and_all_ways_agree(tmp_path):
    """Expectation: the script's own check that all ways get the same values along the same orders,
    PyTorch among them where it is installed; errors that fall; the figure beside the tables.
    """
    out = tmp_path / 'shapley.md'
    command = [sys.executable, BENCH / 'shapley.py', '--quick', '--out', out]
    done = subprocess.run(command, env=QUICK, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = out.read_text()
    ways = 4 if 'not installed' in text else 7
    speeds = text.split('### Evaluations per second')[1].split('###')[0]
    own = [row for row in cells(speeds) if row[-1:] == ['equal']]
    nets = collections.Counter(row[0] for row in own)
    assert nets == dict.fromkeys(('LeNet-300-100', 'LeNet-5', 'small VGG'), ways)
    rows = cells(text)
    estimates = [row for row in rows if len(row) == 7 and 'second layer' in row[0]]
    falls = {row[1]: row[4].split(', ') for row in estimates}
    assert len(falls) == 6
    for errors in falls.values():
        assert [float(error) for error in errors] == sorted(map(float, errors), reverse=True)
    assert out.with_suffix('.png').stat().st_size > 10_000


def test_the_shapley_benchmark_marks_other_values(monkeypatch):
    """Expectation: by hand. A loss of 2 rounds at 2e-7, so a difference of 1e-4 is a mistake, one
    of 1e-6 is not. An array of another shape is one, and a value that is no number.
    """
    monkeypatch.syspath_prepend(BENCH)
    spec = importlib.util.spec_from_file_location('shapley_bench', BENCH / 'shapley.py')
    shapley = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shapley)
    expected = np.linspace(0, 1, 6).reshape(3, 2)
    missing = np.where(expected > 0, expected, np.nan)

    def told(*found):
        return shapley.agreement(found, expected, 2.0)

    assert told(expected, expected + 1e-6) == 'equal'
    assert told(expected, expected + 1e-4) == 'WRONG: 5e-05 of the loss'
    assert told(expected[:2]).startswith('WRONG: shapes')
    assert told(expected, missing) == told(missing, expected) == 'WRONG: nan of the loss'


def test_a_failure_is_told_and_the_rest_goes_on():
    """Expectation: by the definition of the four ways an item can end."""
    spec = importlib.util.spec_from_file_location('scoring', SCORING)
    scoring = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scoring)
    program = scoring.Program(None, 0.0, 0, 0)

    def broken():
        raise ValueError('out of luck\nat great length')

    def differs(value):
        raise scoring.Wrong(f'{value} is not 2')

    items = {
        'fails': scoring.Item(program, broken),
        'wrong': scoring.Item(program, lambda: 1, differs),
        'works': scoring.Item(program, lambda: 2),
    }
    makers = {name: lambda results, item=item: item for name, item in items.items()}
    settings = SimpleNamespace(rounds=3, limit=1.0)
    results = scoring.in_turns(settings, 'toy', makers, scoring.time.monotonic() + 60, len)
    assert results['fails'] == scoring.Left('ValueError: out of luck')
    assert results['wrong'] == scoring.Left('WRONG: 1 is not 2')
    assert results['works'].turns == 3
    late = scoring.in_turns(settings, 'toy', makers, 0.0, len)
    assert late['works'] == scoring.Left('no time left (--minutes)')


@pytest.mark.script
def test_the_cost_of_pruning_while_training_is_measured(tmp_path):
    """Expectation: the script's own check that rows of one program end as runs one by one; a row
    for every method that a net without norms has."""
    out = tmp_path / 'once.md'
    command = [sys.executable, BENCH / 'once.py', '--quick', '--out', out]
    done = subprocess.run(command, env=QUICK, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    steps, together = out.read_text().split('### ')[1:]
    hooked = [n for n, m in METHODS.items() if m.hooked and m.coupled and n != 'slimming']
    rows = [row for row in cells(steps) if row and row[0] == 'LeNet-300-100']
    assert len(rows) == len(hooked) and all(float(row[5]) > 0 for row in rows)
    assert [row[-1] for row in cells(together) if row and row[0] == 'LeNet-300-100'] == ['equal']
