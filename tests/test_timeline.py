"""When things happen in a run. Expectations are worked out by hand from the keys of *when*."""

import pytest

from jaxprune.errors import SpecError
from jaxprune.sweep import make_plan, make_spec
from jaxprune.sweep.grid import program_settings, runs
from jaxprune.sweep.spec import FinetuneSpec, MethodSpec, RecordSpec, TrainSpec
from jaxprune.sweep.timeline import (
    Span,
    Stretch,
    borders_of,
    round_steps,
    stretches_of,
    timeline_of,
)

#: Ten steps per epoch, four epochs.
EPOCH, TRAIN = 10, TrainSpec(epochs=4)
TUNED = FinetuneSpec(epochs=2, learning_rate=0.01)


def timeline(**when):
    return timeline_of(TRAIN, MethodSpec(name='magnitude', **{'rounds': 1, **when}), EPOCH)


def spans(found):
    return [(s.step, s.clock, s.length) for s in found.spans]


def rounds(found):
    return [(r.step, r.clock, r.first, r.count) for r in found.events]


@pytest.mark.parametrize(
    ('when', 'steps'),
    [
        ({'rounds': 3}, (0, 0, 0)),
        ({'rounds': 3, 'start': 1, 'every': 1}, (10, 20, 30)),
        ({'rounds': 3, 'start': 0.5, 'every': 0.25}, (5, 8, 10)),
        ({'rounds': 3, 'start': 7, 'every': 4, 'time_unit': 'steps'}, (7, 11, 15)),
        ({'rounds': 3, 'start': 1, 'end': 3}, (10, 20, 30)),
        ({'rounds': 2, 'end': 4}, (0, 40)),
        ({'rounds': 2, 'start': 4, 'rewind': 'weights', 'rewind_to': 1}, (40, 70)),
        ({'rounds': 1, 'start': 4}, (40,)),
    ],
)
def test_steps_of_rounds(when, steps):
    assert round_steps(MethodSpec(name='magnitude', **when), EPOCH) == steps


def test_the_dense_control_and_pruning_before_training_are_one_span():
    assert spans(timeline_of(TRAIN, None, EPOCH)) == [(0, 0, 40)]
    before = timeline(rounds=5)
    assert spans(before) == [(0, 0, 40)] and rounds(before) == [(0, 0, 0, 5)]
    assert before.steps == 40 and before.anchor is None


def test_rounds_cut_the_training_and_keep_the_clock():
    found = timeline(rounds=3, start=1.5, every=1)
    assert spans(found) == [(0, 0, 15), (15, 15, 10), (25, 25, 10), (35, 35, 5)]
    assert rounds(found) == [(15, 15, 0, 1), (25, 25, 1, 1), (35, 35, 2, 1)]
    assert [r.begin for r in found.events] == [True, False, False]
    assert [r.finish for r in found.events] == [False, False, True]
    assert [s.hooked for s in found.spans] == [False, True, True, False]


def test_rewinding_sets_the_clock_back():
    """A lottery ticket: to the end, back to half an epoch, to the end again, twice."""
    found = timeline(rounds=2, start=4, rewind='weights', rewind_to=0.5)
    assert spans(found) == [(0, 0, 40), (40, 5, 35), (75, 5, 35)]
    assert rounds(found) == [(40, 40, 0, 1), (75, 40, 1, 1)]
    assert found.steps == 110 and found.anchor == 5
    rate = timeline(rounds=2, start=4, rewind='rate', rewind_to=0.5)
    assert spans(rate) == spans(found) and rate.anchor is None


def test_a_phase_after_pruning_begins_where_training_ends():
    assert spans(timeline(start=4, finetune=TUNED)) == [(0, 0, 40), (40, 40, 20)]
    # Pruned early: what is left of training is replaced by the phase.
    early = timeline(start=1, finetune=TUNED)
    assert spans(early) == [(0, 0, 10), (10, 40, 20)] and early.steps == 30
    each = FinetuneSpec(epochs=2, learning_rate=0.01, each_round=True)
    again = timeline(rounds=2, start=4, every=2, finetune=each)
    assert spans(again) == [(0, 0, 40), (40, 40, 20), (60, 40, 20)]
    last = timeline(rounds=2, start=2, every=2, finetune=TUNED)
    assert spans(last) == [(0, 0, 20), (20, 20, 20), (40, 40, 20)]


def test_a_run_may_end_with_a_round():
    found = timeline(start=4)
    assert spans(found) == [(0, 0, 40)] and found.steps == 40
    borders = borders_of(found, RecordSpec(), EPOCH)
    assert borders[-1].event == found.events[0] and borders[-1].evaluate


def test_borders_and_stretches():
    """An epoch is summed up at its end and at the end of the run; rewinding starts mid-epoch."""
    found = timeline(rounds=1, start=2, rewind='weights', rewind_to=0.5)
    record = RecordSpec(every_epochs=2, every=6, evaluate=True)
    borders = borders_of(found, record, EPOCH)
    assert [b.step for b in borders] == [0, 5, 6, 10, 16, 20, 26, 30, 36, 40, 46, 50, 55]
    assert [b.step for b in borders if b.keep] == [5]
    assert [b.step for b in borders if b.epoch_end] == [10, 20, 30, 40, 50, 55]
    assert [b.step for b in borders if b.evaluate] == [20, 40, 55]
    assert [b.step for b in borders if b.record] == [0, 6, 10, 16, 20, 26, 30, 36, 40, 46, 50, 55]
    stretches = stretches_of(found, borders)
    assert stretches[5:7] == [Stretch(16, 20, False), Stretch(5, 11, False)]
    assert sum(s.stop - s.start for s in stretches[1:]) == found.steps == 55
    # Without anything to measure, losses come back step by step: no border for them.
    assert [b.step for b in borders_of(found, RecordSpec(every=6), EPOCH)] == [
        *(5, 10, 20, 30, 40, 50, 55)
    ]
    assert found.spans[0] == Span(0, 0, 20, False)


TABLE = {
    'name': 'when',
    'model': {'name': 'mlp', 'widths': [4]},
    'data': {'name': 'mnist_small', 'train_examples': 100, 'test_examples': 20},
    'train': {'epochs': 4, 'batch_size': 10},
}


def spec_of(*entries, **train):
    methods = [{'name': 'magnitude', 'label': str(i), **e} for i, e in enumerate(entries)]
    grid = {'method': methods, 'compression': [2], 'seed': [0]}
    return make_spec({**TABLE, 'train': {**TABLE['train'], **train}, 'grid': grid})


@pytest.mark.parametrize(
    ('entry', 'message'),
    [
        ({'start': 4.5}, 'start: round 1 happens after epoch 4.5, but training is over after 4'),
        ({'start': 3, 'every': 1, 'rounds': 3}, 'every: round 3 happens after epoch 5'),
        ({'start': 3, 'end': 2}, 'end: 2 is before start, 3'),
        (
            {'start': 1, 'every': 1, 'rounds': 3, 'end': 2},
            'end: round 3 happens at 3, later than end, 2: leave out one',
        ),
        ({'rewind': 'weights'}, 'rewind: is for rounds during training'),
        ({'start': 1, 'rewind': 'weights', 'rewind_to': 2}, 'rewind_to: 2 is after the first'),
        ({'start': 1, 'rewind_to': 1}, "rewind_to: goes with rewind = 'weights' or 'rate'"),
        ({'start': 1, 'rewind': 'wights'}, "rewind: 'wights' is unknown, did you mean 'weights'"),
        ({'start': 1, 'rewind': 'weights', 'restart': True}, 'restart: rewind = '),
        (
            {'start': 1, 'rewind': 'rate', 'finetune': {'epochs': 1, 'learning_rate': 0.1}},
            'rewind: does not go with finetune',
        ),
        ({'start': 1, 'finetune': {'epochs': 2}}, 'finetune.learning_rate: missing'),
        ({'finetune': {'learning_rate': 0.1}}, 'finetune.epochs: expected the length'),
        (
            {'start': 1, 'finetune': {'epochs': 2, 'learning_rate': 0.1, 'schedule': 'step'}},
            "finetune.milestones: expected the epochs of schedule 'step'",
        ),
        ({'finetune': {'epoch': 2}}, "finetune.epoch: unknown key, did you mean 'epochs'"),
        ({'start': 1.5, 'time_unit': 'steps'}, 'start: expected a whole number of steps'),
        ({'stat': 1}, "stat: unknown key or option of 'magnitude', did you mean 'start'"),
        ({'over': 'linear'}, 'over: is no key any more: write density_schedule'),
        ({'score_on': 'train_batch'}, "score_on: 'magnitude' uses no data"),
        (
            {'name': 'rigl', 'score_on': 'train_batch'},
            "score_on: 'rigl' always uses the training batch: leave score_on out",
        ),
        ({'repair': 'orthp'}, "repair: 'orthp' goes with granularity unit"),
        ({'name': 'tpp', 'end': 2}, "granularity: 'tpp' prunes coupled groups"),
        (
            {'name': 'tpp', 'granularity': 'unit'},
            "end: 'tpp' acts between its first round and its last",
        ),
    ],
)
def test_what_cannot_be_is_one_line_with_the_key(entry, message):
    with pytest.raises(SpecError) as error:
        spec_of(entry)
    assert str(error.value).startswith(f'spec: grid.method[0].{message}')
    assert '\n' not in str(error.value)


def test_every_and_end_give_the_number_of_rounds():
    assert spec_of({'start': 1, 'every': 0.5, 'end': 3}).grid.method[0].rounds == 5
    assert spec_of({'start': 1, 'every': 0.5, 'end': 2.9}).grid.method[0].rounds == 4


def test_which_runs_share_a_program():
    """Numbers and names are traced or data; times, phases and lasting states are not."""
    spec = spec_of(
        {},
        {'name': 'snip', 'rounds': 3},
        {'start': 2},
        {'name': 'random', 'start': 2},
        {'start': 2, 'finetune': {'epochs': 1, 'learning_rate': 0.1}},
        {'start': 2, 'finetune': {'epochs': 1, 'learning_rate': 0.2}},
        {'start': 2, 'finetune': {'epochs': 2, 'learning_rate': 0.1}},
        {'name': 'force', 'start': 1, 'every': 1, 'rounds': 2},
        {'name': 'iter_snip', 'start': 1, 'every': 1, 'rounds': 2},
        {'name': 'snip', 'start': 1, 'every': 1, 'rounds': 2},
    )
    found = [repr(program_settings(run)) for run in runs(spec)]
    numbers = [found.index(settings) for settings in found]
    assert numbers == [0, 0, 2, 2, 4, 4, 6, 7, 8, 8]


def test_density_in_place_of_compression():
    """Expectation: 1 / density, and one of the two."""
    grid = {'method': ['magnitude'], 'seed': [0]}
    found = make_spec({**TABLE, 'grid': {**grid, 'density': [1, 0.5, 0.1]}}).grid
    assert found.compression == (1, 2, 10) and found.density == ()
    for wrong, message in (
        ({'density': [0.5], 'compression': [2]}, r'grid\.density: expected either density or'),
        ({}, r'grid\.compression: expected at least one value'),
        ({'density': [0.5, 0.5]}, r'grid\.density: 0.5 is listed twice'),
        ({'density': [0]}, r'grid\.density\[0\]: expected more than 0'),
    ):
        with pytest.raises(SpecError, match=message):
            make_spec({**TABLE, 'grid': {**grid, **wrong}})


@pytest.mark.parametrize('epoch', range(5, 30))
@pytest.mark.parametrize('back', [0, 0.1, 0.5, 1.3])
def test_every_level_of_a_lottery_ticket_is_as_long(epoch, back):
    """Expectation: rounds where the clock is at the end, whatever the rounding of fractions."""
    entry = MethodSpec(name='magnitude', start=4, rounds=5, rewind='weights', rewind_to=back)
    found = timeline_of(TRAIN, entry, epoch)
    assert {event.clock for event in found.events} == {4 * epoch}
    assert len({span.length for span in found.spans[1:]}) == 1


def test_phases_after_each_round_follow_one_another():
    """Expectation: the next round at the end of the phase, without `every`."""
    each = FinetuneSpec(epochs=2, learning_rate=0.01, each_round=True)
    found = timeline(rounds=3, start=4, finetune=each)
    assert spans(found) == [(0, 0, 40), (40, 40, 20), (60, 40, 20), (80, 40, 20)]


@pytest.mark.parametrize(
    ('entry', 'message'),
    [
        (
            {'start': 1, 'every': 0.01, 'rounds': 2},
            'every: rounds 1 and 2 of 2 fall on one step, 10',
        ),
        ({'start': 1, 'end': 1, 'rounds': 2}, 'end: rounds 1 and 2 of 2 fall on one step'),
        (
            {'start': 0.01, 'rounds': 2, 'rewind': 'weights'},
            'start: rounds 1 and 2 of 2 fall on one',
        ),
        (
            {'name': 'snip', 'start': 4, 'score_on': 'train_batch'},
            'score_on: no training step follows the last round',
        ),
        (
            {'name': 'snip', 'start': 2, 'score_on': 'train_batch', 'rewind': 'rate'},
            "score_on: 'train_batch' is the batch of the next step",
        ),
        (
            {'finetune': {'epochs': 1, 'learning_rate': 0.1}},
            'start: missing; finetune replaces the training',
        ),
        (
            {'name': 'tpp', 'granularity': 'unit', 'end': 2, 'interval': 2.5},
            'interval: expected a whole number, not 2.5',
        ),
        ({'name': 'taylor', 'power': 2.0}, 'power: expected a whole number, not 2.0'),
    ],
)
def test_what_would_go_wrong_in_silence_is_refused(entry, message):
    with pytest.raises(SpecError) as error:
        spec_of(entry)
    assert str(error.value).startswith(f'spec: grid.method[0].{message}')


@pytest.mark.parametrize(('key', 'value'), [('interval', 0), ('increment', -1.0)])
def test_values_of_tpp_are_checked_before_anything_runs(key, value):
    entry = {'name': 'tpp', 'granularity': 'unit', 'end': 2, key: value}
    with pytest.raises(SpecError, match=rf'grid.method\[0\].{key}: expected'):
        make_plan(spec_of(entry))
