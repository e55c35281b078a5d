"""The laws of `test_contract.py` for methods that change training: a new one gets all of them."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MORE, more_unless
from sweeps import engine_of, group_of

from jaxprune import data, method, tree
from jaxprune.method import run_rounds
from jaxprune.sweep.chunk import run_chunk
from jaxprune.sweep.counts import counts_of
from jaxprune.sweep.device_data import device_data
from jaxprune.sweep.engine import stacked
from jaxprune.sweep.strategy import Strategy
from jaxprune.train import train_segment

METHODS = sorted(name for name, entry in method.METHODS.items() if entry.hooked)
CASES = [more_unless(name == 'hesso', name) for name in METHODS]
#: So strong that groups become zero within ten steps.
OPTIONS = {
    'hspg': {'penalty': 5.0, 'half_space': 0.9, 'half_space_dense': 0.9},
    'dhspg': {'penalty': 5.0, 'half_space': 0.9, 'half_space_dense': 0.9},
    'proximal': {'penalty': 2.0},
    # Else the optimizer rests where weights are dropped and grown, pruned or not.
    'rigl': {'skip': False},
    'set': {'skip': False},
    # Without ADMM and ties it is pruning of blocks, which the law of the dense control is about.
    'unify': {'unified': 0.0},
    'greg1': {'interval': 1, 'increment': 0.01},
    'greg2': {'interval': 1, 'pick_increment': 0.01, 'pick_ceiling': 0.1, 'increment': 0.1},
    'tpp': {'interval': 1, 'increment': 0.01, 'weight': 1.0},
}
#: Slimming needs a norm behind every layer that it prunes.
NORMED = {'name': 'small_vgg', 'widths': [4]}


def granularity(name):
    """What the example of the method prunes, if not weights or a pattern of them."""
    found = re.search('granularity = "(.*?)"', method.METHODS[name].example)
    return found[1] if found and ':' not in found[1] else 'weight'


def table(name):
    """A sweep of one method on a small net that keeps half of its units, or of its weights."""
    coupled = method.METHODS[name].coupled
    entry = {
        'name': name,
        'label': name,
        'granularity': granularity(name),
        'allocation': 'global',
        'start': 1,
        'end': 7,
        'time_unit': 'steps',
        **({'rounds': 3} if name == 'hesso' or not coupled else {}),
        **({'keep_all_units': 'dense'} if name == 'slimming' else {}),
        **OPTIONS.get(name, {}),
    }
    return {
        'name': 'hooked',
        'model': NORMED if name == 'slimming' else {'name': 'mlp', 'widths': [8]},
        'data': {'name': 'mnist_small', 'train_examples': 200, 'test_examples': 50},
        'train': {'epochs': 2, 'batch_size': 25, 'momentum': 0.9, 'weight_decay': 1e-3},
        'record': {'every': 8, 'flow': list(method.WATCHED) if coupled else ['weight_norm']},
        'grid': {'method': [entry], 'compression': [2], 'seed': [0]},
    }


def states_of(spec, group):
    """The program of a group, the packed states of its runs at their end, and their tables."""
    engine, program = engine_of(spec, group, Strategy('unroll', 'host', 'native', 1))
    found = []

    def keep(*args, **kwargs):
        found.append(engine.pack(args[2]))
        return engine.evaluate(*args, **kwargs)

    chunk = run_chunk(spec, program, engine._replace(evaluate=keep), group.runs, len(group.runs))
    return program, found[-1], chunk


@pytest.mark.parametrize('name', CASES)
def test_counts_and_zeros(name):
    """Laws: exact counts; pruned weights and their moments are zero. What is recorded at the end
    are the groups that are gone."""
    spec, group = group_of(table(name), name)
    program, states, chunk = states_of(spec, group)
    assert chunk.results['error'].is_null().all()
    pruned = jax.tree.map(lambda leaf: leaf[0], states)
    alive = jax.device_get(program.competing(group.runs[0].method).alive(pruned.masks))
    wanted = counts_of(program, group.runs[0]).counts['*'][-1]
    assert sum(int(mask.sum()) for mask in alive.values()) == wanted
    shapes = program.competing(group.runs[0].method).shapes.values()
    assert wanted == sum(math.prod(shape) for shape in shapes) // 2
    params, moments = (dict(tree.paths(t)) for t in (pruned.params, pruned.opt_state))
    for path, mask in pruned.masks.items():
        assert not np.any(params[path][~mask]), path
        [moment] = [leaf for place, leaf in moments.items() if place.endswith(path)]
        assert not np.any(moment[~mask]) and np.any(moment[mask]), path
    if method.METHODS[name].coupled:
        zero = chunk.flow.filter(step=16, quantity='zero_groups')
        assert zero['value'].sum() == 4


UNCOUPLED = [name for name in METHODS if not method.METHODS[name].coupled]


@pytest.mark.parametrize(
    ('name', 'epoch', 'end'),
    [
        pytest.param(
            name, epoch, (place + epoch) % 2, marks=() if place % 3 == epoch - 1 == 0 else MORE
        )
        for place, name in enumerate(UNCOUPLED)
        for epoch in (1, 2, 3)
    ],
)
def test_the_last_density_is_exact_in_tiny_epochs(name, epoch, end):
    """Law: epochs of one to three steps, the last round before or at the last step: as many weights
    are left as planned, and pruned ones are zero."""
    steps = 4 * epoch
    entry = {
        'name': name,
        'label': name,
        'granularity': granularity(name),
        'allocation': 'uniform',
        'rounds': 4,
        'end': steps - 1 + end,
        'time_unit': 'steps',
        **OPTIONS.get(name, {}),
    }
    short = {
        **table(name),
        'data': {'name': 'mnist_small', 'train_examples': 10 * epoch, 'test_examples': 20},
        'train': {'epochs': 4, 'batch_size': 10, 'optimizer': 'adam', 'learning_rate': 0.01},
        'record': {},
    }
    short['grid'] = {'method': [entry], 'density': [0.21], 'seed': [0]}
    spec, group = group_of(short, name)
    program, states, chunk = states_of(spec, group)
    assert chunk.results['error'].is_null().all()
    pruned = jax.tree.map(lambda leaf: leaf[0], states)
    alive = jax.device_get(program.competing(group.runs[0].method).alive(pruned.masks))
    for layer, column in counts_of(program, group.runs[0]).counts.items():
        assert int(alive[layer].sum()) == column[-1], layer
    params = dict(tree.paths(pruned.params))
    assert not any(np.any(params[path][~mask]) for path, mask in pruned.masks.items())
    size = sum(mask.size for mask in pruned.masks.values())
    kept = sum(int(mask.sum()) for mask in pruned.masks.values())
    assert chunk.results['density'][-1] == kept / size


@pytest.mark.parametrize('name', CASES)
def test_many_runs_equal_single_runs(name):
    """Laws, in float64 and from the first round to the last: N vmapped runs = the same runs one by
    one; a run that is to keep all groups = the dense control."""
    spec, group = group_of(table(name), name)
    program, run = group.program, group.runs[0]
    on_device = device_data(spec, data.load('mnist_small'))
    events, segment = program.events(run.method), train_segment(program.stages[True].step)
    groups = program.competing(run.method)
    every = np.int32(sum(math.prod(shape) for shape in groups.shapes.values()))
    few = np.int32(every // 2)

    def init(key, hyper):
        return jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf,
            program.init(key, hyper),
        )

    def life(key, hyper, kept):
        state = init(key, hyper)
        order, clocks = program.order(key, 0), program.timeline.events
        for number, event in enumerate(clocks):
            rounds = events(event.clock, on_device, key, hyper, order)
            begin = {'begin': not number, 'before': number, 'finish': event.finish}
            state, _ = run_rounds(rounds, state, {'*': kept[None]}, **begin)
            if not event.finish:
                steps = order[event.clock : clocks[number + 1].clock]
                clock = np.int32(event.clock)
                state, _ = segment(clock, on_device, key, hyper, steps, state)
        return state

    def dense(key, hyper):
        first, last = (program.timeline.events[i].clock for i in (0, -1))
        steps = program.order(key, 0)[first:last]
        plain = train_segment(program.stages[False].step)
        return plain(np.int32(first), on_device, key, hyper, steps, init(key, hyper))[0]

    with jax.enable_x64(True):
        rows, single = stacked([run._replace(seed=seed) for seed in range(2)]), jax.jit(life)
        together = jax.jit(jax.vmap(life, (0, 0, None)))(*rows, few)
        for i in range(2):
            one = jax.tree.map(lambda leaf, i=i: leaf[i], rows)
            close(jax.tree.map(lambda leaf, i=i: leaf[i], together), single(*one, few))
        whole, plain = single(*one, every), jax.jit(dense)(*one)
        close(whole.params, plain.params)
        assert all(bool(mask.all()) for mask in whole.masks.values())


def close(ours, theirs):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-11), ours, theirs)
