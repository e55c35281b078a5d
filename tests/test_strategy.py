"""Strategies: the same runs whatever way they are laid out, and which way is taken."""

import functools
import itertools
import math

import jax
import numpy as np
import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import parts, planned_here, pruned

from jaxprune import tree
from jaxprune.cli import main
from jaxprune.errors import SpecError
from jaxprune.sweep import make_spec
from jaxprune.sweep.grid import runs
from jaxprune.sweep.layout import MOST_LENGTHS, call_lengths, calls_of
from jaxprune.sweep.probe import _Trial, cache_file, probe, remember, remembered
from jaxprune.sweep.strategy import Strategy, candidates, usual

TABLE = {
    'name': 'strategies',
    'model': {'name': 'small_vgg', 'widths': [3]},
    'data': {'name': 'mnist_small', 'train_examples': 96, 'test_examples': 60},
    'train': {'epochs': 1, 'batch_size': 32, 'momentum': 0.9},
    'prune': {'samples_per_class': 1},
    'grid': {
        'method': [{'name': 'synflow', 'rounds': 2}],
        'compression': [4],
        'seed': [0, 1, 2, 3],
    },
}
FIRST = Strategy('unroll', 'host', 'native', 1)
OTHERS = [
    (Strategy('vmap', 'host', 'native', 2), 0),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            (Strategy('unroll', 'scan', 'taps', 2), 2),
            (Strategy('unroll', 'host', 'native', 2), 0),
            (Strategy('map', 'scan', 'patches', 2), 0),
            (Strategy('vmap', 'scan', 'patches', 1), 2),
            (Strategy('map', 'host', 'taps', 1), 0),
        )
    ),
]


@functools.cache
def trained(strategy, steps_per_call=0):
    """Four pruned runs after an epoch: states, losses of training, test losses and accuracies."""
    engine, program, rows = parts(TABLE, strategy, steps_per_call)
    states, info, _ = pruned(engine, program, rows, runs(make_spec(TABLE)))
    taken = []
    states, losses = engine.advance(0, program.steps, rows, states, on_steps=taken.append)
    losses = losses()
    assert losses.shape == (4, program.steps)
    assert sum(taken) == 4 * program.steps
    kept = engine.counts(states)[0]
    evaluated = engine.evaluate(program.steps, rows, states)
    packed = engine.pack(states)
    again = engine.pack(engine.unpack(packed))
    jax.tree.map(np.testing.assert_array_equal, again, packed)
    return packed, losses, evaluated, info, kept


@pytest.mark.more
@pytest.mark.parametrize(('strategy', 'steps'), OTHERS, ids=str)
def test_all_strategies_train_the_same(strategy, steps):
    """Expectation: runs one after another, convolved by XLA, stepped from the host."""
    states, losses, evaluated, info, kept = trained(FIRST)
    found, other_losses, other_evaluated, other_info, other_kept = trained(strategy, steps)
    # Events convolve natively whatever training does.
    jax.tree.map(np.testing.assert_array_equal, found.masks, states.masks)
    jax.tree.map(np.testing.assert_array_equal, other_info, info)
    jax.tree.map(np.testing.assert_array_equal, other_kept, kept)
    np.testing.assert_allclose(other_losses, losses, rtol=1e-4)
    np.testing.assert_allclose(other_evaluated[0], evaluated[0], rtol=1e-3)
    for (path, one), (_, other) in zip(
        tree.paths(states.params), tree.paths(found.params), strict=True
    ):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-3, err_msg=path)


def test_calls_are_of_few_lengths():
    """Expectation: by hand. Every length is compiled: an even one, if there is one nearby."""

    def calls(intervals, most):
        lengths = call_lengths(intervals, most)
        assert len(lengths) <= MOST_LENGTHS
        made = [calls_of(n, lengths) for n in intervals]
        assert [sum(found) for found in made] == list(intervals)
        assert max(map(max, made)) <= most
        return made

    assert calls([12], 5) == [[4, 4, 4]]
    assert calls([10], 4) == [[4, 4, 2]]
    assert calls([11], 4) == [[4, 4, 3]] and calls([3], 3) == [[3]]
    assert calls([3, 3, 1], 4) == [[3], [3], [1]]
    assert calls([6, 6], 4) == [[3, 3], [3, 3]]
    assert calls([5], 9) == [[5]]
    # Five different stretches of three lengths: the longest, 1, and 3, which makes fewest calls.
    assert calls([15, 3, 4, 7, 1], 100) == [[15], [3], [3, 1], [3, 3, 1], [1]]
    with pytest.raises(ValueError, match='cannot be made of'):
        calls_of(7, (4, 2))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 40))
@settings(max_examples=50, deadline=None, database=None)
def test_any_stretches_are_made_of_three_lengths(intervals, most):
    """Expectation: every stretch is made up exactly, of at most three lengths within the limit."""
    lengths = call_lengths(intervals, most)
    assert len(lengths) <= MOST_LENGTHS and max(lengths) <= most
    for steps in intervals:
        assert sum(calls_of(steps, lengths)) == steps


def test_which_strategies_there_are():
    """Expectation: the usual one first, none twice, no convolution for nets without one."""
    for convolving in (False, True):
        for platform in ('cpu', 'gpu'):
            found = candidates(convolving, platform, 2)
            assert found[0] == usual(convolving, platform, 2) and len(set(found)) == len(found)
            assert convolving or {s.convolution for s in found} == {'native'}
    assert Strategy('unroll', 'host', 'native', 2) in candidates(True, 'cpu', 2)


def test_a_forced_strategy_is_taken():
    """Expectation: what [engine] says, and the usual way for what it does not say."""
    engine = {'batching': 'vmap', 'stepping': 'scan', 'convolution': 'taps', 'devices': 1}
    [here] = planned_here(make_spec({**TABLE, 'engine': engine}))
    assert here.strategy == Strategy(**engine, batch_devices=1) and here.chosen == 'forced'
    [here] = planned_here(make_spec({**TABLE, 'engine': {'convolution': 'taps'}}))
    assert here.strategy == usual(True, 'cpu', jax.local_device_count())._replace(
        convolution='taps'
    )
    with pytest.raises(SpecError, match=r"engine\.convolution.*did you mean 'taps'"):
        make_spec({**TABLE, 'engine': {'convolution': 'tap'}})


DENSE = {
    'name': 'probed',
    'model': {'name': 'mlp', 'widths': [8]},
    'data': {'name': 'mnist_small', 'train_examples': 96, 'test_examples': 60},
    'train': {'epochs': 1, 'batch_size': 32},
    'grid': {'method': ['magnitude'], 'compression': [4], 'seed': [0]},
}


def test_probing_finds_a_strategy_and_remembers_it(quick_trials):
    """Expectation: sorted by time, a failure last with its reason; the plan takes the first, also
    after a restart, but not for another program; a broken cache is no mistake.
    """
    spec = make_spec(DENSE)
    run = runs(spec)[0]
    tried = [
        Strategy('vmap', 'scan', 'native', 1),
        Strategy('unroll', 'host', 'native', 2),
        Strategy('map', 'scan', 'nonsense', 1),
    ]
    assert remembered(spec, run) == []
    reported = []
    found = probe(spec, run, tried, on_trial=reported.append)
    assert [m.strategy for m in reported] == tried
    assert 0 < found[0].seconds <= found[1].seconds < found[2].seconds == math.inf
    assert "unknown convolution 'nonsense'" in found[2].error
    assert all(m.bytes_per_run > 0 and m.compile_seconds > 0 for m in found[:2])
    remember(spec, run, found)
    assert remembered(spec, run) == found[:2]  # 'nonsense' is nothing to remember
    assert planned_here(spec)[0].strategy == found[0].strategy
    other = make_spec({**DENSE, 'model': {'name': 'mlp', 'widths': [9]}})
    assert remembered(other, runs(other)[0]) == []
    cache_file().write_text('{"torn')
    assert remembered(spec, run) == []
    remember(spec, run, found)
    assert remembered(spec, run) == found[:2]


def test_a_machine_that_slows_down_misleads_no_trial(monkeypatch):
    """Expectation: by hand: the second way takes 0.8 of the first one's time whatever the machine
    does; it halves its speed between the two trials. One way fails beside another, not alone."""
    spec = make_spec(DENSE)
    speed, begun = iter(itertools.chain([1.0], itertools.repeat(0.5))), []
    work = {'map': 1.0, 'vmap': 0.8, 'unroll': 3.0}

    def begin(spec, run, strategy):
        begun.append(strategy.batching)
        if begun[-2:] == ['vmap', 'unroll']:
            raise MemoryError('no room for two')
        return _Trial(lambda: work[strategy.batching] / next(speed), 0.1, 1.0)

    monkeypatch.setattr('jaxprune.sweep.probe._begun', begin)
    monkeypatch.setattr('jaxprune.sweep.probe._SECONDS', 0.0)
    tried = [Strategy(batching, 'scan', 'native', 1) for batching in work]
    found = {m.strategy.batching: m for m in probe(spec, runs(spec)[0], tried)}
    assert found['map'].seconds == 1.0 and found['vmap'].seconds == 0.8
    assert found['unroll'].seconds == 6.0 and not found['unroll'].error


def test_plan_probes_on_request(tmp_path, quick_trials, monkeypatch, capsys):
    """Expectation: a table of all candidates, then the plan with one of them."""
    trial = _Trial(lambda: 0.2, 0.1, 1.0)  # nothing is compiled
    monkeypatch.setattr('jaxprune.sweep.probe._begun', lambda spec, run, strategy: trial)
    file = tmp_path / 'spec.toml'
    file.write_text(tomli_w.dumps(DENSE))
    assert main(['plan', str(file), '--probe']) == 0
    printed = capsys.readouterr()
    tried = candidates(False, 'cpu', jax.local_device_count())
    assert printed.err.count('tried') == len(tried) and 'ms per run and step' in printed.out
    assert 'plan of probed' in printed.out
