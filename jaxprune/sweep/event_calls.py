"""What each event of a chunk hands to the rows of each method."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune.sweep.counts import active_of, counts_of, kind_of_counts
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
    """The calls of each event: one for all runs that share an event program and a number of rounds.

    Counts of all rounds are planned here, once. An event takes its own from them, and training
    never waits for a plan.

    Args:
      runs: rows of a chunk, padding included. Those of the dense control are left alone.

    Raises:
      PruneError: a run would keep nothing, or cannot keep to its bounds.
    """
    alike: dict[tuple[str, int], list[int]] = {}
    for i, run in enumerate(runs):
        if run.method != DENSE:
            alike.setdefault((event_program(run.method), run.method.rounds), []).append(i)
    makers = [_maker(program, [runs[i] for i in at], at) for at in alike.values()]
    return lambda event: [make(event) for make in makers]


def _maker(
    program: Program, runs: Sequence[Run], at: Sequence[int]
) -> Callable[[Event], EventCall]:
    """The calls of runs of one event program and with one number of rounds."""
    method = runs[0].method
    different = {kind_of_counts(run): run for run in runs}
    planned = {kind: counts_of(program, run).counts for kind, run in different.items()}
    plans = [planned[kind_of_counts(run)] for run in runs]
    counts = {path: np.stack([plan[path] for plan in plans]) for path in plans[0]}
    active = np.array([active_of(program, run) for run in runs], np.int32)
    options = [method_numbers(run) for run in runs]
    numbers = {name: np.stack([of[name] for of in options]) for name in options[0]}

    def call(event: Event) -> EventCall:
        # Runs of one timeline have their rounds at the same steps. But where all rounds happen at
        # once, methods differ in how many they have.
        if event.begin and event.finish:
            event = event._replace(count=method.rounds)
        now = slice(event.first, event.first + event.count)
        of_event = {path: column[:, now] for path, column in counts.items()}
        return EventCall(method, event, at, of_event, active, numbers)

    return call
