"""The rounds of a method for a few rows of a chunk: one compiled loop, or calls from the host."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxprune.method import Rounds, host_calls, run_rounds
from jaxprune.sweep.advance import Rows, Trainer
from jaxprune.sweep.device_data import DeviceData
from jaxprune.sweep.event_calls import EventCall
from jaxprune.sweep.grid import event_program
from jaxprune.sweep.layout import jitted, on_host
from jaxprune.sweep.program import MethodFacts, Program, method_facts
from jaxprune.sweep.slots import Slots, in_parts
from jaxprune.sweep.spec import MethodSpec
from jaxprune.types import PruneInfo, RunState


class PruneFn(Protocol):
    def __call__(
        self, rows: Rows, call: EventCall, states: Any
    ) -> tuple[Any, Callable[[], PruneInfo]]:
        """Prunes some rows; the states handed in are used up.

        Returns:
          The states, and a function that fetches the info: of the last round, but `nonfinite` of
          all rounds and `nonzero` of the first, host arrays `(len(at), ...)`. The function waits
          for the devices. Until it is called, nothing does, and more work may be queued for them.
        """


class Compiled(NamedTuple):
    """Some rounds of a method for a few rows, compiled.

    Attributes:
      run: `(before, clock, data, keys, hyper, order, counts, active, states) -> (states, fetch)`,
        where `fetch()` gives the infos, host arrays `(rows, rounds)`; `before` is the number of
        rounds before. The states are used up.
      once: the compiled function that scores and selects.
    """

    run: Callable
    once: Callable


def make_prune(
    program: Program,
    mesh: Mesh,
    data: DeviceData,
    slots: Slots,
    trainer: Trainer,
    batching: str,
    hosted: bool,
    at_once: int,
) -> tuple[PruneFn, dict[str, Compiled]]:
    """The pruning of a program's rows, and its compiled functions by name, as they are made."""
    compiled: dict[str, Compiled] = {}
    facts: dict[str, MethodFacts] = {}

    def known_of(call: EventCall) -> MethodFacts:
        kind = event_program(call.method)
        if kind not in facts:
            facts[kind] = method_facts(program, call.method)
        return facts[kind]

    def of(call: EventCall) -> Compiled:
        event, kind, known = call.event, event_program(call.method), known_of(call)
        # A method that carries nothing from round to round begins anew in each of them.
        carries = bool(jax.tree.leaves(known.state))
        begin, finish = event.begin or not carries, event.finish
        name = ', '.join(
            [kind]
            + [f'{event.count} rounds'] * (event.count > 1)
            + ['later'] * (not begin)
            + ['earlier'] * (not finish and (carries or known.finishes))
        )
        if name not in compiled:
            make = _hosted if hosted else _looped
            ends = finish and known.finishes
            compiled[name] = make(
                program, call.method, batching, mesh, begin, ends, finish or not carries
            )
        return compiled[name]

    def orders(call: EventCall, rows: Rows) -> Sequence[jax.Array | None]:
        """The batches of the epoch per slot, as in training; None if no round looks at one."""
        if known_of(call).looks_ahead:
            return trainer.orders(rows, call.event.clock // program.steps)
        return [None] * len(slots.of(len(rows.keys)))

    def at_event(
        call: EventCall, chosen: np.ndarray, rows: Rows, order: jax.Array | None, states: Any
    ) -> tuple:
        """The event on chosen ones of its rows, which are handed in with their states."""
        method = {name: np.asarray(v)[chosen] for name, v in call.numbers.items()}
        return of(call).run(
            np.int32(call.event.first),
            np.int32(call.event.clock),
            data,
            rows.keys,
            rows.hyper._replace(method=method),
            order,
            {path: np.asarray(c)[chosen] for path, c in call.counts.items()},
            np.asarray(call.active)[chosen],
            states,
        )

    def prune(rows, call, states):
        states, fetches = list(states), []
        at, runs = np.asarray(call.at), len(rows.keys)
        parts = zip(slots.of(runs), orders(call, rows), strict=True)
        for number, (slot, order) in enumerate(parts):
            inside = np.flatnonzero((at >= slot.start) & (at < slot.stop))
            # An event on all rows of a slot needs no copies. 'map' takes the same memory for more.
            if len(inside) == len(slot) and (len(slot) <= at_once or batching == 'map'):
                own = trainer.by_slot(rows)[number]
                states[number], fetch = at_event(call, inside, own, order, states[number])
                fetches.append((fetch, len(inside)))
                continue
            made = []
            for chosen, real in in_parts(inside, min(at_once, runs)):
                where = at[chosen]
                batches, taken = slots.take((order, states[number]), where - slot.start)
                new, fetch = at_event(call, chosen, slots.take(rows, where), batches, taken)
                made.append((where - slot.start, real, new))
                fetches.append((fetch, real))
            states[number] = _placed(slots, states[number], made)
        return states, functools.partial(_summary, fetches)

    return prune, compiled


def _placed(slots: Slots, states: RunState, made: Sequence[tuple]) -> RunState:
    """The states of a slot with the rows that an event made."""
    if not made:
        return states
    before, after = (jax.tree.structure(s.method_state) for s in (states, made[0][2]))
    carried = states.method_state
    if before != after:
        # All rows of a slot begin and end together, part by part in their order.
        parts = [
            jax.tree.map(lambda leaf, real=real: leaf[:real], new.method_state)
            for _, real, new in made
        ]
        carried = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
        states = states._replace(method_state=())
        made = [(where, real, new._replace(method_state=())) for where, real, new in made]
    for where, _, new in made:
        states = slots.place(states, where, new)
    return states if before == after else states._replace(method_state=carried)


def _summary(fetches: Sequence[tuple[Callable[[], PruneInfo], int]]) -> PruneInfo:
    """What `PruneFn` fetches.

    Args:
      fetches: for some rows each, what fetches their infos, and how many rows are no padding.
    """
    real = [
        jax.tree.map(lambda leaf, count=count: leaf[:count], fetch()) for fetch, count in fetches
    ]
    infos = jax.tree.map(lambda *leaves: np.concatenate(leaves), *real)
    last = jax.tree.map(lambda leaf: leaf[:, -1], infos)
    return last._replace(nonfinite=infos.nonfinite.sum(1), nonzero=infos.nonzero[:, 0])


def _looped(
    program: Program, method: MethodSpec, batching: str, mesh: Mesh, begin: bool, finish: bool,
    drop: bool,
) -> Compiled:  # fmt: skip
    """Rounds as a loop inside one program.

    Args:
      begin: they are the method's first.
      finish: they are its last, and something happens after them.
      drop: the method's state ends with them: states that all methods share have none.
    """
    events = program.events(method)

    def rounds(before, clock, data, key, hyper, order, counts, active, state, carried):
        rounds = events(clock, data, key, hyper, order)
        state = state._replace(method_state=carried)
        state, infos = run_rounds(
            rounds, state, counts, before=before, begin=begin, finish=finish, active=active
        )
        return state._replace(method_state=()) if drop else state, infos

    # A state that is dropped has no output that could take its memory.
    donated = (8,) if drop else (8, 9)
    compiled = jitted(
        rounds, (None, None, None, 0, 0, 0, 0, 0, 0, 0), batching, mesh, donate_argnums=donated
    )

    def run(*args):
        *shared, states = args
        states, infos = compiled(*shared, states._replace(method_state=()), states.method_state)
        return states, functools.partial(on_host, infos)

    return Compiled(run, compiled)


def _hosted(
    program: Program, method: MethodSpec, batching: str, mesh: Mesh, begin: bool, finish: bool,
    drop: bool,
) -> Compiled:  # fmt: skip
    """Rounds as calls from the host; arguments as in `_looped`."""
    events = program.events(method)

    def start(clock, data, key, hyper, state):
        return events(clock, data, key, hyper).begin(state)

    def once(number, clock, data, key, hyper, order, counts, state):
        return events(clock, data, key, hyper, order).once(number, counts, state)

    def end(clock, data, key, hyper, active, state):
        return events(clock, data, key, hyper).finish(state, active)

    started = jitted(start, (None, None, 0, 0, 0), batching, mesh, donate_argnums=4)
    single = jitted(once, (None, None, None, 0, 0, 0, 0, 0), batching, mesh, donate_argnums=7)
    ended = jitted(end, (None, None, 0, 0, 0, 0), batching, mesh, donate_argnums=5)

    def run(before, clock, data, keys, hyper, order, counts, active, states):
        shared = (clock, data, keys, hyper)
        rounds = Rounds(
            lambda states: started(*shared, states),
            lambda number, now, states: single(number, *shared, order, now, states),
        )
        by_round = {path: np.swapaxes(column, 0, 1) for path, column in counts.items()}
        states, infos = run_rounds(
            rounds, states, by_round, before=before, begin=begin, loop=host_calls
        )
        if finish:
            states, kept = ended(*shared, active, states)
            infos[-1] = infos[-1]._replace(kept={**infos[-1].kept, **kept})
        states = states._replace(method_state=()) if drop else states
        return states, functools.partial(_stacked, infos)

    return Compiled(run, single)


def _stacked(infos: Sequence[PruneInfo]) -> PruneInfo:
    """The infos of rounds, leaves `(rows,)` on the devices, as host arrays `(rows, rounds)`."""
    return jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *on_host(infos))
