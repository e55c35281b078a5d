"""The CIFAR-10 study of VGG-11: its specifications, and a small one from end to end."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from prepared import prepared

from jaxprune.sweep import load_spec, make_plan, status, store

FOLDER = Path(__file__).parents[1] / 'experiments' / 'cifar_vgg11'
SMALL = {
    'data.train_examples': '512',
    'data.test_examples': '200',
    'train.epochs': '2',
    'train.milestones': '[1]',
    'grid.method': '["snip", {name = "random", allocation = "erk", label = "random, ERK"}]',
    'grid.compression': '[1, 10]',
    'grid.seed': '[0, 1]',
    'model.width': '0.05',
    'engine.chunk': '2',
}


@pytest.mark.script
def test_the_specifications_plan_what_the_study_says():
    """Expectation: 8 methods x 6 compressions x 3 seeds and 3 dense runs in one program; the two
    files alike but for what they say differs.
    """
    full, small = (load_spec(FOLDER / f'{name}.toml') for name in ('recipe', 'cpu'))
    for spec in (full, small):
        table = make_plan(spec)
        assert len(table['runs']) == 8 * 6 * 3 + 3 and len(table['programs']) == 1
    assert full.model == small.model and full.grid == small.grid and full.prune == small.prune
    assert full.train.weight_decay == small.train.weight_decay
    assert full.data.augment == small.data.augment and not full.data.train_examples


@pytest.mark.slow
def test_a_small_one_runs_resumes_and_reports(tmp_path):
    """Expectation: killed after its first chunk, the same command finishes the rest and draws the
    curves that were recorded along training.
    """
    place = prepared('cifar10')
    out = tmp_path / 'out'
    command = [
        *(sys.executable, '-c', 'import sys; from jaxprune.cli import main; sys.exit(main())'),
        *('sweep', str(FOLDER / 'cpu.toml'), '--out', str(out), '--data-dir', place),
        *(word for key, value in SMALL.items() for word in ('--set', f'{key}={value}')),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < until:
        if list(out.glob('results/*.parquet')):
            break
        time.sleep(0.01)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = status(out)
    assert 0 < before['runs_finished'] < before['runs'] == 6
    subprocess.run(command, check=True, timeout=600, stdout=subprocess.DEVNULL)
    assert status(out)['runs_finished'] == 6
    results, curves = store.read_results(out), store.read_curves(out)
    assert results['error'].null_count() == len(results) == 12
    # Four steps an epoch; rows at its end, as five steps are more than it has.
    assert curves.group_by('run_id').agg(pl.col('step').sort())['step'].to_list() == [[4, 8]] * 6
    figures = {path.name for path in (out / 'figures').iterdir()}
    assert {'accuracy.png', 'learning_loss.png'} <= figures
