"""An interrupted chunk goes on from its checkpoint and ends with the numbers of an undisturbed one.

Every expectation is the same chunk run without interruption, compared value for value.
"""

import functools
import os
import signal
import subprocess
import sys
import time

import pytest
import tomli_w
from polars.testing import assert_frame_equal
from sweeps import engine_of
from test_hooked_methods import granularity

from jaxprune import method
from jaxprune.errors import WriteError
from jaxprune.stop import Stop
from jaxprune.sweep import make_spec, store
from jaxprune.sweep.checkpoint import Checkpoint, checkpoint, every, remove, saved_places
from jaxprune.sweep.chunk import run_chunk
from jaxprune.sweep.progress import ignored
from jaxprune.sweep.strategy import Strategy
from jaxprune.sweep.sweep_plan import checked_groups

TABLE = {
    'name': 'saved',
    'model': {'name': 'mlp', 'widths': [16]},
    'data': {'name': 'mnist_small', 'train_examples': 500, 'test_examples': 200},
    'train': {'epochs': 5, 'batch_size': 50, 'optimizer': 'adam', 'learning_rate': 0.01},
    'prune': {'samples_per_class': 2},
    'grid': {
        'method': [
            {'name': 'snip', 'label': 'before'},
            # Rounds after epochs 1, 2 and 3: before a checkpoint, at it, and after it.
            {
                'name': 'gradient_norm',
                'rounds': 3,
                'start': 1,
                'every': 1,
                'restart': True,
                'label': 'along',
            },
            # What these carry from round to round is in the checkpoint.
            {'name': 'force', 'rounds': 3, 'start': 1.5, 'every': 1.2, 'label': 'returning'},
            {
                'name': 'tpp',
                'start': 1.5,
                'end': 4.3,
                'granularity': 'unit',
                'label': 'hooked',
                'increment': 0.01,
            },
            # The state to rewind to is in it too; the last level ends within an epoch.
            {
                'name': 'magnitude',
                'rounds': 2,
                'start': 3,
                'rewind': 'weights',
                'rewind_to': 1.5,
                'label': 'rewound',
            },
            {
                'name': 'magnitude',
                'start': 2,
                'label': 'tuned',
                'finetune': {'epochs': 3, 'learning_rate': 0.001},
            },
        ],
        'compression': [1, 5],
        'seed': [0],
    },
    # Evaluated after epochs 2, 4 and 5: a checkpoint after epoch 3 holds a loss yet to be averaged.
    'record': {
        'every_epochs': 2,
        'every': 3,
        'evaluate': True,
        'rounds': True,
        'flow': ['gradient_norm'],
    },
}
#: Methods that move masks or pull at weights; a new one gets its case without a line here.
MOVING = sorted(n for n, entry in method.METHODS.items() if entry.hooked and not entry.coupled)
#: Those tested by default; the others are further instances.
FEW = ('spp', 'movement')
ALWAYS = 1e-9  # minutes
ONE = Strategy('map', 'scan', 'native', 1)
PIECE = '0-2'


class Interrupt(Exception):
    pass


def table_of(names):
    """Methods from the middle of an epoch to the middle of another, with all that is recorded."""
    entries = [
        {
            'name': name,
            'label': name,
            'granularity': granularity(name),
            'start': 0.5,
            'end': 4.3,
            'rounds': 6,
        }
        for name in names
    ]
    return {
        **TABLE,
        'record': {**TABLE['record'], 'churn': True},
        'grid': {**TABLE['grid'], 'method': entries},
    }


@functools.cache
def groups(label):
    spec = make_spec(table_of([label]) if label in MOVING else TABLE)
    return spec, checked_groups(spec)


def made(label):
    """`(spec, group)` of a method by its label."""
    spec, found = groups(label if label in MOVING else '')
    return spec, next(g for g in found if any(r.method.label == label for r in g.runs))


@functools.cache
def engine(label, strategy):
    """Shared by the cases, so that its programs are compiled once."""
    return engine_of(*made(label), strategy)[0]


def interrupted(after):
    """A listener that stops the chunk when so many run-steps have been taken."""
    taken = []

    def steps(count):
        taken.append(count)
        if sum(taken) >= after:
            raise Interrupt

    return ignored()._replace(steps=steps)


def check_goes_on(label, tmp_path, strategy, first, second, after):
    """A chunk that is stopped at the end of an epoch and goes on, against one that is not."""
    spec, group = made(label)
    engines = {n: engine(label, strategy._replace(devices=n)) for n in {first, second}}
    program, members, count = group.program, group.runs, len(group.runs)
    expected = run_chunk(spec, program, engines[second], members, count)
    place = tmp_path / 'checkpoints' / 'chunk'
    with pytest.raises(Interrupt):
        run_chunk(
            spec,
            program,
            engines[first],
            members,
            count,
            shown=interrupted(after * program.steps * count),
            saved=checkpoint(place, 'first', PIECE, every(ALWAYS)),
        )
    resumed, taken = [], []
    shown = ignored()._replace(resume=resumed.append, steps=taken.append)
    saved = checkpoint(place, 'second', PIECE, every(ALWAYS))
    got = run_chunk(spec, program, engines[second], members, count, shown=shown, saved=saved)
    for a, b in zip(got[:4], expected[:4], strict=True):
        assert len(a) and a.columns == b.columns
        assert_frame_equal(a, b, check_exact=True)
    # The last epoch before the interruption is not yet saved.
    before = (after - 1) * program.steps * count
    assert got.timing['run_steps'] == program.timeline.steps * count - before
    assert resumed == [before]
    assert sum(taken) == program.timeline.steps * count - before
    # What the first one left went when the second one had saved.
    who = {saved.attempt for saved in saved_places(place, PIECE)}
    assert who == ({'second'} if after < spec.train.epochs else {'first'})
    remove(place)
    assert not place.exists()


@pytest.mark.parametrize(
    ('strategy', 'first', 'second'),
    [
        (ONE, 2, 1),
        pytest.param(Strategy('unroll', 'host', 'native', 1), 1, 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize('after', [3, *(pytest.param(n, marks=pytest.mark.more) for n in (2, 5))])
def test_a_chunk_goes_on_where_it_stopped(tmp_path, strategy, first, second, after):
    """Runs on two devices, then on one: padding is no part of a checkpoint."""
    check_goes_on('before', tmp_path, strategy, first, second, after)


@pytest.mark.parametrize(
    ('label', 'after'),
    [
        pytest.param('hooked', 4, marks=pytest.mark.more),
        ('rewound', 4),
        pytest.param('along', 3, marks=pytest.mark.more),
        pytest.param('returning', 3, marks=pytest.mark.more),
        pytest.param('tuned', 4, marks=pytest.mark.more),
        *(pytest.param(n, 3, marks=() if n in FEW else pytest.mark.more) for n in MOVING),
    ],
)
def test_a_method_goes_on_in_the_middle_of_its_life(tmp_path, label, after):
    """Between its first round and its last: what it carries, and the state to rewind to."""
    check_goes_on(label, tmp_path, ONE, 1, 1, after)


def test_nothing_is_saved_before_its_time_or_at_zero_minutes(tmp_path):
    spec, group = made('before')
    members, one = group.runs, engine('before', ONE)
    for minutes in (0, 10):
        saved = checkpoint(tmp_path / 'c', 'first', PIECE, every(minutes))
        run_chunk(spec, group.program, one, members, len(members), saved=saved)
        assert not (tmp_path / 'c').exists()


def test_a_broken_checkpoint_is_left_out(tmp_path):
    """Expectation: an older one is taken, of whatever attempt, and then none; each time a line says
    which one cannot be read, and the results are those of a chunk that nobody stopped."""
    spec, group = made('before')
    program, members, one = group.program, group.runs, engine('before', ONE)
    count = len(members)
    expected = run_chunk(spec, program, one, members, count)
    place, notes, resumed = tmp_path / 'c', [], []
    for attempt, after in (('older', 2), ('newer', 3)):
        with pytest.raises(Interrupt):
            run_chunk(
                spec,
                program,
                one,
                members,
                count,
                shown=interrupted(after * program.steps * count),
                saved=checkpoint(place / attempt, attempt, PIECE, every(ALWAYS)),
            )
    for attempt in ('older', 'newer'):  # both began anew; now they stand side by side
        (place / attempt / attempt).rename(place / f'{attempt}-')
        (place / attempt).rmdir()
    assert [saved.step for saved in saved_places(place, PIECE)] == [10, 20]
    for broken, steps in (('newer-', 10), ('older-', None)):
        for file in (place / broken).rglob('*'):
            if file.is_file():
                file.write_bytes(b'broken')
        found = run_chunk(
            spec,
            program,
            one,
            members,
            count,
            shown=ignored()._replace(resume=resumed.append),
            saved=checkpoint(place, 'last', PIECE, every(0), notes.append),
        )
        assert resumed == ([steps * count] if steps else [])
        assert broken in notes[-1] and 'left out' in notes[-1] and '\n' not in notes[-1]
        assert_frame_equal(found.results, expected.results, check_exact=True)
        resumed.clear()


def test_a_checkpoint_that_cannot_be_written_ends_nothing_but_a_farewell(tmp_path):
    """Expectation: a full disk raises `ValueError` in TensorStore: a line, and training goes on;
    whoever is asked to leave hears of it."""
    spec, group = made('before')
    program, members, one = group.program, group.runs, engine('before', ONE)

    def full(saved):
        raise WriteError('no space left')

    notes = []
    saved = Checkpoint(lambda abstract_of: None, lambda: True, full)
    shown = ignored()._replace(note=notes.append)
    found = run_chunk(spec, program, one, members, len(members), shown=shown, saved=saved)
    assert notes == ['not saved: no space left'] * 4 and len(found.results)
    asked = Stop(lambda: True, lambda: False)
    with pytest.raises(WriteError, match='no space left'):
        run_chunk(spec, program, one, members, len(members), saved=saved, stop=asked)
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(WriteError, match='cannot be written'),
    ):

        def raises(*_):
            raise ValueError('RESOURCE_EXHAUSTED: no space left on device')

        patch.setattr('jaxprune.sweep.checkpoint._save', raises)
        checkpoint(tmp_path, 'a', PIECE, every(0)).save(None)


TICKET = {'name': 'magnitude', 'start': 20, 'rounds': 2, 'rewind': 'weights', 'rewind_to': 1.5}
#: Tested with `pytest -m script`; the others are slow.
KILLED = ('ticket', 'movement')


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(n, marks=pytest.mark.script if n in KILLED else pytest.mark.slow)
        for n in ('ticket', *MOVING)
    ],
)
def test_a_killed_process_goes_on_within_its_chunk(tmp_path, name):
    """SIGKILL while epochs are saved, before a round and between two: what a method carries is in
    the checkpoint, as is the state to rewind to. The only chunk is never finished before."""
    entry = TICKET
    if name in MOVING:
        moving = {'name': name, 'granularity': granularity(name), 'rounds': 6}
        entry = {**moving, 'start': 0.5, 'end': 18.3}
    grid = {'method': [entry], 'compression': [5], 'seed': [0, 1]}
    table = {**TABLE, 'grid': grid, 'engine': {'checkpoint_minutes': ALWAYS}}
    table['train'] = {**TABLE['train'], 'epochs': 20}
    (tmp_path / 'spec.toml').write_text(tomli_w.dumps(table))
    environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'compiled')}

    def start(out, **kwargs):
        command = 'import sys; from jaxprune.cli import main; sys.exit(main())'
        arguments = ['sweep', str(tmp_path / 'spec.toml'), '--out', str(out)]
        return subprocess.Popen(
            [sys.executable, '-c', command, *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    out = tmp_path / 'killed'
    kills = 0
    for wanted in (30, 250 if name == 'ticket' else 110):  # steps, ten an epoch
        process = start(out)
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            saved = [int(p.name) for p in out.glob('checkpoints/*/*/*/*') if p.name.isdigit()]
            if max(saved, default=0) >= wanted:
                break
            time.sleep(0.002)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not list(out.glob('results/*.parquet'))
    assert kills == 2
    assert start(out).wait(timeout=300) == 0
    assert start(tmp_path / 'whole').wait(timeout=300) == 0
    for read in (store.read_results, store.read_layers):
        assert_frame_equal(read(out), read(tmp_path / 'whole'), check_exact=True)
    assert not (out / 'checkpoints').exists()
