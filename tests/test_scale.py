"""The benchmark of very many runs works, and its own checks hold."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
        small, large, _, *_ = map(str.strip, parts[part])
        assert float(small) > 0 and float(large) > 0, part
