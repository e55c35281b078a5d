"""When things happen in a run: its rounds, where its clock stands, where a chunk stops on the way.

Two counts run along a run. Its *step* counts all steps taken and never falls; results are filed
under it. Its *clock* says where the run stands in its schedule: the learning rate, the order of the
data and all random draws follow the clock. The clock runs with the steps, but a round may set it
back (rewinding) or on to the phase after pruning. That phase begins where training ends on the
clock, at `epochs * steps_per_epoch`, whether training got that far or not.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from jaxprune.errors import SpecError
from jaxprune.sweep.spec import MethodSpec, RecordSpec, TrainSpec


class Event(NamedTuple):
    """A step at which a run is pruned, in one round or in several one after another.

    Attributes:
      step: steps taken before.
      clock: where the clock stands.
      first: how many rounds of the method happened before.
      count: how many happen here.
      begin: the method begins here.
      finish: the method ends here.
      rewind: 'weights', 'rate' or '', what the run takes back afterwards.
    """

    step: int
    clock: int
    first: int
    count: int
    begin: bool
    finish: bool
    rewind: str


class Span(NamedTuple):
    """Training without a round in between.

    Attributes:
      step: steps taken before.
      clock: where the clock stands before.
      length: steps.
      hooked: the method is between its first round and its last.
    """

    step: int
    clock: int
    length: int
    hooked: bool


class Timeline(NamedTuple):
    """A run from its first step to its last.

    Attributes:
      events: where rounds happen, in order; empty for the dense control.
      spans: the training between them, in order; together all of it.
      steps: of training in all.
      anchor: the step before which the run's state is kept for rewinding; None for never.
      train_steps: the length of training on the clock, where the phase after pruning begins.
    """

    events: tuple[Event, ...]
    spans: tuple[Span, ...]
    steps: int
    anchor: int | None
    train_steps: int


def round_steps(method: MethodSpec, epoch: int) -> tuple[int, ...]:
    """The step before which each round happens.

    Without `every` and `end` all rounds happen at `start`. But where each round sets the clock, by
    rewinding or with a phase of its own, the next one happens when the clock is where it was at
    the first, or when the phase is over.

    Args:
      method: with its number of rounds.
      epoch: steps per epoch.

    Raises:
      SpecError: keys of *when* that contradict each other; the message begins with the key.
    """
    unit = epoch if method.time_unit == 'epochs' else 1
    start, every, end, rounds = method.start, method.every, method.end, method.rounds
    if end and not every and rounds > 1:
        every = (end - start) / (rounds - 1)
    last = start + (rounds - 1) * every
    if end and last > end * (1 + 1e-12):
        raise SpecError(
            f'end: round {rounds} happens at {last:g}, later than end, {end:g}: leave out one of '
            'rounds, every and end'
        )
    first = round(unit * start)
    if every or (end and rounds > 1):
        steps = tuple(round(unit * (start + i * every)) for i in range(rounds))
    elif method.rewind:
        steps = tuple(first + i * (first - round(unit * method.rewind_to)) for i in range(rounds))
    elif method.finetune.each_round:
        steps = tuple(first + i * method.finetune.epochs * epoch for i in range(rounds))
    else:
        return (first,) * rounds
    for number, (before, step) in enumerate(itertools.pairwise(steps), 1):
        if before == step:
            key = 'every' if method.every else 'end' if end else 'start'
            both = f'rounds {number} and {number + 1} of {rounds}'
            raise SpecError(f'{key}: {both} fall on one step, {step}')
    return steps


def rounds_until(method: MethodSpec) -> int:
    """How many rounds `start`, `every` and `end` make."""
    return int((method.end - method.start) / method.every * (1 + 1e-12)) + 1


def timeline_of(train: TrainSpec, method: MethodSpec | None, epoch: int) -> Timeline:
    """The timeline of a run.

    Args:
      train: its training settings.
      method: how it is pruned; None for the dense control.
      epoch: steps per epoch.

    Raises:
      SpecError: a round would come after the end of training, or rewinding would go forward; the
        message begins with the key of the method.
    """
    length = train.epochs * epoch
    if method is None:
        return Timeline((), (Span(0, 0, length, False),), length, None, length)
    steps = round_steps(method, epoch)
    back = _rewind_to(method, epoch, steps[0])
    events, spans = [], []
    step = clock = done = 0
    limit = length  # how far the clock may run
    for at, together in itertools.groupby(steps):
        count, taken = len(list(together)), at - step
        if clock + taken > limit:
            over = (step + limit - clock) / epoch
            key = 'start' if not done else 'every' if method.every or not method.end else 'end'
            raise SpecError(
                f'{key}: round {done + 1} happens after epoch '
                f'{at / epoch:g}, but training is over after {over:g}'
            )
        if taken:
            spans.append(Span(step, clock, taken, bool(done)))
        step, clock = at, clock + taken
        finish = done + count == len(steps)
        events.append(Event(at, clock, done, count, not done, finish, method.rewind))
        done += count
        if method.rewind:
            clock = back
        if method.finetune.epochs and (finish or method.finetune.each_round):
            clock, limit = length, length + method.finetune.epochs * epoch
    if limit > clock:
        spans.append(Span(step, clock, limit - clock, False))
    total = step + limit - clock
    anchor = back if method.rewind == 'weights' else None
    return Timeline(tuple(events), tuple(spans), total, anchor, length)


def clocks_of(timeline: Timeline) -> tuple[int, ...]:
    """Where the clock stands in each round."""
    return tuple(event.clock for event in timeline.events for _ in range(event.count))


def _rewind_to(method: MethodSpec, epoch: int, first: int) -> int:
    """The clock to which rewinding goes back."""
    back = round(method.rewind_to * (epoch if method.time_unit == 'epochs' else 1))
    if method.rewind and back > first:
        raise SpecError(
            f'rewind_to: {method.rewind_to:g} is after the first round, at {method.start:g}'
        )
    return back


class Border(NamedTuple):
    """A step at which a chunk stops to do something.

    Attributes:
      step: steps taken before.
      epoch_end: the losses since the last such border are summed up, and a checkpoint may be saved.
      record: quantities along training are recorded; at step 0 of the network after its rounds.
      evaluate: a row of results is made.
      keep: the state is kept for rewinding.
      event: the rounds that happen here, or None.
    """

    step: int
    epoch_end: bool
    record: bool
    evaluate: bool
    keep: bool
    event: Event | None


def borders_of(timeline: Timeline, record: RecordSpec, epoch: int) -> list[Border]:
    """All borders of a timeline, in order; what is recorded is recorded at step 0 too.

    Losses alone need no border to be recorded: they come back from training step by step.
    """
    watching = bool(record.every and (record.evaluate or record.flow))
    events = {event.step: event for event in timeline.events}
    epochs = {min(end, timeline.steps) for end in range(epoch, timeline.steps + epoch, epoch)}
    marks = {0, *recorded_steps(timeline.steps, record.every, epoch)} if watching else set()
    found = []
    for step in sorted({*epochs, *marks, *events, *_kept(timeline)}):
        number = -(-step // epoch)
        ends = step in epochs
        found.append(
            Border(
                step=step,
                epoch_end=ends,
                record=step in marks,
                evaluate=ends and (number % record.every_epochs == 0 or step == timeline.steps),
                keep=step == timeline.anchor,
                event=events.get(step),
            )
        )
    return found


def recorded_steps(steps: int, every: int, epoch: int, first: int = 0) -> list[int]:
    """Steps after `first` at which [record] records: every so many of an epoch, and at its end."""
    return [
        step
        for step in range(first + 1, steps + 1)
        if step % epoch % every == 0 or step == steps or step % epoch == 0
    ]


def _kept(timeline: Timeline) -> Sequence[int]:
    return () if timeline.anchor is None else (timeline.anchor,)


class Stretch(NamedTuple):
    """Training from one border to the next: from `start` to `stop` on the clock."""

    start: int
    stop: int
    hooked: bool


def stretches_of(timeline: Timeline, borders: Sequence[Border]) -> list[Stretch | None]:
    """What is trained before each border; None where nothing is."""
    found, before = [], 0
    for border in borders:
        stretch = None
        if border.step > before:
            # Rounds are borders, so a stretch lies within one span.
            span = next(s for s in timeline.spans if s.step <= before < s.step + s.length)
            start = span.clock + before - span.step
            stretch = Stretch(start, start + border.step - before, span.hooked)
        found.append(stretch)
        before = border.step
    return found
