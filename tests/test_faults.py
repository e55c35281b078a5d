"""The soak of injected faults runs, and a few faults cost nothing.

Expectation: the script's own checks. Tables equal those of an undisturbed sweep value for value,
no row is lost or doubled, no reader meets half a file, and processes end with the codes that they
should; it exits with 1 otherwise.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).parents[1] / 'experiments' / 'bench' / 'faults.py'
#: Compiled quickly: what counts here is how files are written.
QUICK = {**os.environ, 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}


def cells(page: str) -> list[list[str]]:
    """The rows of all tables; [] for a line that is not a row."""
    return [[cell.strip() for cell in line.split('|')[1:-1]] for line in page.splitlines()]


@pytest.mark.fleet
def test_a_sweep_survives_faults(tmp_path):
    out, place = tmp_path / 'faults.md', tmp_path / 'sweeps'
    command = [sys.executable, FAULTS, '--quick', '--soak', '--directory', place, '--out', out]
    done = subprocess.run(command, env=QUICK, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    text = out.read_text()
    rows = cells(text)
    by_kind = {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}
    assert by_kind.pop('all') == sum(by_kind.values()) >= 14
    assert sum(count > 0 for count in by_kind.values()) >= 8, by_kind
    head = next(row for row in rows if row and row[0] == 'directory')
    directories = [dict(zip(head, row, strict=True)) for row in rows if len(row) == len(head)]
    all_together = directories[-1]
    assert all_together['directory'] == 'all'
    assert all_together['rows lost'] == all_together['rows doubled'] == '0'
    assert int(all_together['attempts']) > int(all_together['chunks'])
    assert int(all_together['looks of a reader']) > 0
    seen = re.search(r'Exit codes: (.*)', text)
    assert seen and re.search(r'\d+ x 0\b', seen[1])


@pytest.mark.fleet
def test_the_cost_of_checkpoints_is_measured(tmp_path):
    """Expectation: below the target of 2 % with a checkpoint every ten minutes."""
    out = tmp_path / 'cost.md'
    command = [sys.executable, FAULTS, '--quick', '--cost', '--out', out]
    done = subprocess.run(command, env=QUICK, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    [row] = [row for row in cells(out.read_text()) if row and row[0] == '4 x LeNet-300-100']
    assert int(row[2]) > 0 and float(row[-1].removesuffix(' %')) < 2
