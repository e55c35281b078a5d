"""The coordinator, with engines that are made up: they run chunks, lose them, lie, and fail."""

import pytest
from fake_engine import nothing_trained

from jaxprune.errors import Interrupted, JaxpruneError, ReadError
from jaxprune.fleet import coordinator
from jaxprune.fleet.coordinator import run_elsewhere
from jaxprune.fleet.launcher import Ended, Launcher
from jaxprune.stop import Stop
from jaxprune.sweep import plan_sweep, run_chunks, store
from jaxprune.sweep.load import make_spec

TABLE = {
    'name': 'coordinated',
    'model': {'name': 'mlp', 'widths': [8]},
    'data': {'name': 'mnist_small', 'train_examples': 60, 'test_examples': 50},
    'train': {'epochs': 1, 'batch_size': 10},
    'grid': {'method': ['magnitude'], 'compression': [1, 5], 'seed': [0, 1, 2]},
    'engine': {'chunk': 2},
}


@pytest.fixture(scope='module')
def planned(tmp_path_factory):
    """A directory with a plan of three chunks."""
    out = tmp_path_factory.mktemp('planned') / 'out'
    plan_sweep(make_spec(TABLE), out)
    return out


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(coordinator, '_LOOK', 0.0)
    monkeypatch.setattr(coordinator, '_SHOWN_AFTER', -1.0)
    with nothing_trained():
        yield


class Engine:
    """An engine whose tasks end by a plan.

    Attributes:
      submitted: the chunks of each submission.
      closed: how often it was closed.
    """

    def __init__(self, out, ends, held=()):
        self.out, self.ends, self.held = out, ends, [set(held), set()]
        self.submitted, self.commands, self.closed, self._waiting = [], [], 0, []

    def launcher(self):
        def submit(tasks):
            self.submitted.append([task.chunk for task in tasks])
            self.commands += [task.command for task in tasks]
            self._waiting += [task.chunk for task in tasks]

        def ended():
            waiting, self._waiting = self._waiting, []
            return [end for chunk in waiting if (end := self.end(chunk)) is not None]

        def close():
            self.closed += 1

        def held():
            return set(self.held[0] if len(self.held) == 1 else self.held.pop(0))

        return Launcher(held, submit, ended, close)

    def end(self, chunk):
        ends = self.ends.get(chunk, [])
        end = ends.pop(0) if ends else 'finish'
        if end == 'finish':
            run_chunks(self.out, chunk)
            return Ended(chunk, 0)
        return Ended(chunk, end, '' if end is None else f'exit {end}')


def test_all_chunks_are_submitted_once_and_finished(copied_plan):
    out = copied_plan
    engine = Engine(out, {})
    run_elsewhere(out, engine.launcher(), ['--grace', '9'])
    chunks = store.chunk_ids(out)
    assert engine.submitted == [chunks] and engine.closed == 1
    assert store.finished_chunks(out) == set(chunks)
    assert engine.commands[0][1:] == (
        *('-m', 'jaxprune', 'chunk', str(out), chunks[0]),
        *('--grace', '9'),
    )
    again = Engine(out, {})
    run_elsewhere(out, again.launcher())
    assert again.submitted == []


def test_interruptions_lost_machines_and_lies_are_tried_again(copied_plan):
    """75 as often as it comes, faults twice; an exit code 0 without results is a fault."""
    out = copied_plan
    first, second, third = store.chunk_ids(out)
    engine = Engine(out, {first: [75] * 9, second: [None, 1], third: [0]})
    run_elsewhere(out, engine.launcher())
    tries = [chunk for chunks in engine.submitted for chunk in chunks]
    assert [tries.count(chunk) for chunk in (first, second, third)] == [10, 3, 2]
    assert store.finished_chunks(out) == {first, second, third}


def test_results_may_appear_after_the_command_ended(copied_plan, monkeypatch):
    """As on a shared disk that remembers what was not there: the chunk is not submitted again."""
    out = copied_plan
    monkeypatch.setattr(coordinator, '_SHOWN_AFTER', 60.0)
    first = store.chunk_ids(out)[0]
    engine, looks = Engine(out, {first: [0]}), []

    def asked():
        looks.append(0)
        if len(looks) == 4:
            run_chunks(out, first)
        return False

    run_elsewhere(out, engine.launcher(), stop=Stop(asked, lambda: False))
    assert len(engine.submitted) == 1 and len(looks) >= 4


def test_a_directory_that_cannot_be_read_for_a_while_is_waited_for(copied_plan, monkeypatch):
    out, listed, calls = copied_plan, store.listed, []

    def failing(folder, suffix=''):
        calls.append(folder)
        if len(calls) in (3, 4):
            raise ReadError(f'{folder}: cannot be listed (stale file handle)')
        return listed(folder, suffix)

    monkeypatch.setattr('jaxprune.sweep.store.listed', failing)
    run_elsewhere(out, Engine(out, {}).launcher())
    assert len(calls) > 4
    for chunk in store.chunk_ids(out):
        store.results_path(out, chunk).unlink()
    calls[:] = [None] * 9
    failing_end = Engine(out, {store.chunk_ids(out)[0]: [1]})
    plain = failing_end.launcher()

    def ended():  # the disk is lost while a fault is looked at
        ends = plain.ended()
        calls[:] = [None] * (2 if ends and ends[0].code else 9)
        return ends

    run_elsewhere(out, plain._replace(ended=ended))
    monkeypatch.setattr(coordinator, '_PATIENCE', -1.0)
    calls[:] = [None] * 2
    store.results_path(out, store.chunk_ids(out)[0]).unlink()
    with pytest.raises(ReadError, match='stale file handle'):
        run_elsewhere(out, Engine(out, {}).launcher())


def test_a_chunk_that_always_fails_is_given_up_and_the_others_finish(copied_plan):
    out = copied_plan
    first, second, third = store.chunk_ids(out)
    engine = Engine(out, {second: [1] * 9})
    with pytest.raises(JaxpruneError, match=f'1 of 3 chunks were given up .* {second}: exit 1'):
        run_elsewhere(out, engine.launcher())
    assert store.finished_chunks(out) == {first, third} and engine.closed == 1


def test_a_mistake_ends_the_sweep_at_once(copied_plan):
    out = copied_plan
    first = store.chunk_ids(out)[0]
    engine = Engine(out, {first: [2]})
    with pytest.raises(JaxpruneError, match=f'chunk {first}: exit 2'):
        run_elsewhere(out, engine.launcher())
    assert len(engine.submitted) == 1 and engine.closed == 1


def test_chunks_of_an_earlier_coordinator_are_left_to_it(copied_plan):
    """Until the engine does not hold them any more; then those that are missing are submitted."""
    out = copied_plan
    first, second, third = store.chunk_ids(out)
    engine = Engine(out, {}, held=[first])
    run_elsewhere(out, engine.launcher())
    assert engine.submitted == [[second, third], [first]]


def test_who_is_asked_to_leave_cancels_nothing(copied_plan):
    engine = Engine(copied_plan, {})
    with pytest.raises(Interrupted):
        run_elsewhere(copied_plan, engine.launcher(), stop=Stop(lambda: True, lambda: False))
    assert engine.closed == 0 and len(engine.submitted) == 1


@pytest.fixture
def copied_plan(planned, tmp_path):
    import shutil

    return shutil.copytree(planned, tmp_path / 'out')
