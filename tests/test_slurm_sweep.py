"""A sweep through a real SLURM of two nodes, with faults: it equals the local sweep."""

import os
import signal
import subprocess

import pytest
from fleet_sweeps import CHUNKS, Sweep, kill_and_run_again, local, run_two_at_once, same
from slurm_nodes import answer, cluster, kill_node, preempt, shared_cluster

pytestmark = pytest.mark.fleet


@pytest.fixture(scope='module')
def expected(tmp_path_factory):
    return local(tmp_path_factory.mktemp('local'))


@pytest.fixture
def sweep(cluster, tmp_path):
    return Sweep(tmp_path, '--on', 'slurm', '--slurm', 'partition=low')


def test_a_sweep_through_slurm_is_the_local_one(sweep, expected):
    """Another coordinator has nothing to do."""
    sweep.finish(sweep.start())
    same(sweep.out, expected)
    assert len(sweep.records()) == CHUNKS
    sweep.finish(sweep.start())
    assert len(sweep.records()) == CHUNKS


def test_jobs_are_preempted_during_an_epoch(sweep, expected):
    """They save, are requeued, and go on from there."""
    coordinator = sweep.start()
    sweep.wait_for_training()
    preempt()
    sweep.finish(coordinator)
    same(sweep.out, expected)
    assert 'interrupted' in [record['state'] for record in sweep.records()]


def test_a_node_is_killed(sweep, cluster, expected):
    coordinator = sweep.start()
    busy = sweep.wait_for(lambda: answer('squeue', '-h', '-t', 'R', '-o', '%N').splitlines())
    sweep.wait_for_training()
    with kill_node(cluster, busy[0]):
        sweep.finish(coordinator)
    same(sweep.out, expected)


@pytest.mark.slow  # test_ray_sweep freezes a node
def test_a_chunk_is_frozen_and_thawed(sweep, expected):
    """A successor trains the chunk of a frozen process, which is thawed and trains on."""
    coordinator = sweep.start()
    [record, *_] = sweep.wait_for_training()
    os.kill(record['process'], signal.SIGSTOP)
    successor = subprocess.Popen(sweep.chunk_command(record['chunk']), stdout=subprocess.DEVNULL)
    sweep.wait_for(lambda: sum(r['chunk'] == record['chunk'] for r in sweep.records()) > 1)
    os.kill(record['process'], signal.SIGCONT)
    assert successor.wait(200) == 0
    sweep.finish(coordinator)
    same(sweep.out, expected)


def test_a_coordinator_is_killed_and_run_again(sweep, expected):
    """Its jobs go on; the next one leaves them their chunks."""
    kill_and_run_again(sweep, expected)
    assert len(sweep.records()) == CHUNKS


@pytest.mark.slow  # as in test_ray_sweep
def test_two_coordinators_at_once(sweep, expected):
    run_two_at_once(sweep, expected)
