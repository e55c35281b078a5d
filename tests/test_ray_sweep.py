"""A sweep through a real Ray cluster of two nodes, with faults: it equals the local sweep."""

import os
import signal

import pytest
from fleet_sweeps import CHUNKS, Sweep, kill_and_run_again, local, run_two_at_once, same
from ray_nodes import NODE, head, kill, needs_ray, processes, second, signal_node

pytestmark = [pytest.mark.fleet, needs_ray]


@pytest.fixture(scope='module')
def expected(tmp_path_factory):
    return local(tmp_path_factory.mktemp('local'))


@pytest.fixture
def sweep(head, second, tmp_path):
    """Coordinators of their own name, with no node's."""
    return Sweep(
        tmp_path, '--on', 'ray', '--cpus', '1', '--address', head[1], **{NODE: 'coordinator'}
    )


def of_node(name):
    """Does a record belong to a process of this node?"""
    return lambda record: record['process'] in processes(name)


def test_a_sweep_through_ray_is_the_local_one(sweep, second, expected):
    """Both nodes train; then it is finished, and another coordinator has nothing to do."""
    first = sweep.start()
    sweep.wait_for_training(of_node(second))
    sweep.finish(first)
    same(sweep.out, expected)
    assert len(sweep.records()) == CHUNKS
    sweep.finish(sweep.start())
    assert len(sweep.records()) == CHUNKS


def test_a_node_is_killed(sweep, second, expected):
    coordinator = sweep.start()
    sweep.wait_for_training(of_node(second))
    kill(second)
    sweep.finish(coordinator)
    same(sweep.out, expected)
    assert len(sweep.records()) > CHUNKS


def test_a_node_is_frozen_and_thawed(sweep, second, expected):
    """Its chunk is trained elsewhere; thawed, it trains on and writes what is there already."""
    coordinator = sweep.start()
    [frozen, *_] = sweep.wait_for_training(of_node(second))
    signal_node(second, signal.SIGSTOP)
    sweep.wait_for(lambda: sum(r['chunk'] == frozen['chunk'] for r in sweep.records()) > 1)
    signal_node(second, signal.SIGCONT)
    sweep.finish(coordinator)
    same(sweep.out, expected)
    zombie = lambda: next(r for r in sweep.records() if r['name'] == frozen['name'])  # noqa: E731
    sweep.wait_for(lambda: zombie()['state'] != 'running' or frozen['process'] not in alive())
    same(sweep.out, expected)


def alive():
    return {int(name) for name in os.listdir('/proc') if name.isdigit()}


def test_a_chunk_is_preempted_during_an_epoch(sweep, expected):
    """It saves and leaves with 75, and another task goes on from there."""
    coordinator = sweep.start()
    [record, *_] = sweep.wait_for_training()
    os.kill(record['process'], signal.SIGTERM)
    sweep.finish(coordinator)
    same(sweep.out, expected)
    assert [r['state'] for r in sweep.records() if r['chunk'] == record['chunk']] == [
        'interrupted',
        'finished',
    ]


def test_a_coordinator_is_killed_and_run_again(sweep, expected):
    kill_and_run_again(sweep, expected)


def test_two_coordinators_at_once(sweep, expected):
    run_two_at_once(sweep, expected)
