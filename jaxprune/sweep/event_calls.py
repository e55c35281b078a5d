"""What each event of a chunk hands to the rows of each method."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune.sweep.counts import active_of, counts_of
from jaxprune.sweep.grid import DENSE, Run, event_program
from jaxprune.sweep.program import Program, method_numbers
from jaxprune.sweep.spec import MethodSpec
from jaxprune.sweep.timeline import Event


class EventCall(NamedTuple):
    """What an event hands to the rows of one method.

    Attributes:
      method: the method.
      event: which of its rounds, and when.
      at: numbers of the rows, rising.
      counts: path -> keep counts `(len(at), rounds)`.
      active: `(len(at),)`, how many active weights are wanted, for methods that target them.
      numbers: the method's traced options, name -> `(len(at),)`.
    """

    method: MethodSpec
    event: Event
    at: Sequence[int]
    counts: Mapping[str, np.ndarray]
    active: np.ndarray
    numbers: Mapping[str, np.ndarray]


def event_calls(program: Program, runs: Sequence[Run]) -> Callable[[Event], list[EventCall]]:
    """The calls of each event, one per event program.

    Counts of all rounds are planned here, once: an event only takes its own from them, so that
    training need not wait for plans.

    Args:
      runs: rows of a chunk, padding included. Those of the dense control are left alone.

    Raises:
      PruneError: a run would keep nothing, or cannot keep to its bounds.
    """
    by_program: dict[tuple[str, int], list[int]] = {}
    for i, run in enumerate(runs):
        if run.method != DENSE:
            by_program.setdefault((event_program(run.method), run.method.rounds), []).append(i)
    whole = [_all_rounds(program, [runs[i] for i in at], at) for at in by_program.values()]
    return lambda event: [_part(call, event) for call in whole]


def _all_rounds(program: Program, runs: Sequence[Run], at: Sequence[int]) -> EventCall:
    """All rounds of runs of one event program, as one event."""
    plans = [counts_of(program, run).counts for run in runs]
    numbers = [method_numbers(run) for run in runs]
    method = runs[0].method
    return EventCall(
        method=method,
        event=Event(0, 0, 0, method.rounds, True, True, ''),
        at=at,
        counts={path: np.stack([plan[path] for plan in plans]) for path in plans[0]},
        active=np.array([active_of(program, run) for run in runs], np.int32),
        numbers={name: np.stack([n[name] for n in numbers]) for name in numbers[0]},
    )


def _part(whole: EventCall, event: Event) -> EventCall:
    """The rounds of an event.

    Runs of one timeline have their rounds at the same steps. But where all rounds happen at once,
    methods differ in how many they have.
    """
    if event.begin and event.finish:
        event = event._replace(count=whole.event.count)
    now = slice(event.first, event.first + event.count)
    return whole._replace(
        event=event, counts={path: column[:, now] for path, column in whole.counts.items()}
    )
