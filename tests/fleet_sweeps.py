"""A sweep that engines train, and what it is compared with: a sweep that this process trained.

Its chunks train for a few seconds each and save at every end of an epoch, so that faults hit them.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import tomli_w
from polars.testing import assert_frame_equal

import jaxprune as jp
from jaxprune.sweep import store
from jaxprune.sweep.attempts import attempts_of

TABLE = {
    'name': 'fleet',
    'model': {'name': 'mlp', 'widths': [16]},
    'data': {'name': 'mnist_small', 'train_examples': 400, 'test_examples': 100},
    'train': {'epochs': 300, 'batch_size': 20, 'momentum': 0.9},
    'prune': {'samples_per_class': 1},
    'grid': {'method': ['magnitude', 'snip'], 'compression': [10], 'seed': [0, 1]},
    'record': {'every_epochs': 100},
    'engine': {'chunk': 1, 'batching': 'map', 'checkpoint_minutes': 1e-3},
}
CHUNKS = 4


class Sweep:
    """A sweep in a directory that coordinators work at.

    Attributes:
      out: the directory.
      log: what coordinators print.
    """

    def __init__(self, place: Path, *options: str, **environment: str):
        self.out, self.log = place / 'out', place / 'log'
        self._spec, self._options = place / 'spec.toml', options
        self._environment = {**os.environ, **environment}
        self._spec.write_text(tomli_w.dumps(TABLE))

    def start(self):
        """A coordinator, `jaxprune sweep`."""
        arguments = ['sweep', str(self._spec), '--out', str(self.out), *self._options]
        with open(self.log, 'a') as log:
            return subprocess.Popen(
                [sys.executable, '-m', 'jaxprune', *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
            )

    def chunk_command(self, chunk):
        """What trains a chunk by itself."""
        return [sys.executable, '-m', 'jaxprune', 'chunk', str(self.out), chunk]

    def records(self):
        """The attempts at all chunks so far."""
        chunks = store.chunk_ids(self.out) if (self.out / 'plan.json').exists() else []
        return [record for chunk in chunks for record in attempts_of(self.out, chunk)]

    def wait_for(self, condition, seconds=120):
        """Waits until something holds, and returns it."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)
        return found

    def wait_for_training(self, host=lambda record: True):
        """Waits until a chunk trains, and has saved what it did: signs of life are too rare."""

        def trains():
            at_work = [record for record in self.records() if record['state'] == 'running']
            return [record for record in at_work if self._saved(record) and host(record)]

        return self.wait_for(trains)

    def _saved(self, record):
        return list(self.out.glob(f'checkpoints/{record["chunk"]}/{record["name"]}/*/*'))

    def finish(self, *coordinators, seconds=300):
        """Waits for coordinators; all must succeed."""
        for coordinator in coordinators:
            assert coordinator.wait(seconds) == 0, self.log.read_text()


def kill_and_run_again(sweep: Sweep, expected: Path) -> None:
    """The first coordinator is killed while a chunk trains; the second one goes on."""
    first = sweep.start()
    sweep.wait_for_training()
    first.kill()
    first.wait()
    sweep.finish(sweep.start())
    same(sweep.out, expected)


def run_two_at_once(sweep: Sweep, expected: Path) -> None:
    sweep.finish(sweep.start(), sweep.start())
    same(sweep.out, expected)


def local(place: Path) -> Path:
    """The same sweep, trained by this process."""
    out = place / 'local'
    jp.run_sweep(TABLE, out)
    return out


def same(out: Path, expected: Path) -> None:
    """Value for value: no row is lost, none is there twice."""
    for read in (store.read_results, store.read_layers):
        assert_frame_equal(read(out), read(expected), check_exact=True)
    assert len(store.finished_chunks(out)) == CHUNKS
    assert (out / 'plan.json').read_bytes() == (expected / 'plan.json').read_bytes()
