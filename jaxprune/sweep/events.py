"""All rounds of a method for a few rows, compiled: as one loop, or as calls from the host."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.select import count_kept
from jaxprune.sweep.program import Program


class Compiled(NamedTuple):
    """All events of a method for a few rows.

    Attributes:
      run: `(first, data, keys, hyper, counts, active, states) -> (states, info)`; `first` is the
        number of rounds before.
      once: the compiled function that scores and selects.
    """

    run: Callable
    once: Callable


def compiled_events(
    program: Program, method, program_of: Callable, batching: str, hosted: bool
) -> Compiled:
    """The rounds of a method, as a loop inside one program, or as calls from the host."""
    begin, once, last_event = program.prune(method)

    def rounds(before, data, key, hyper, counts, active, state):
        def body(state, at):
            return once(at[0], data, key, hyper, at[1], state)

        number = before + jnp.arange(len(next(iter(counts.values()))), dtype=jnp.int32)
        state, infos = jax.lax.scan(body, begin(key, state), (number, counts))
        last = jax.tree.map(lambda leaf: leaf[-1], infos)
        if last_event is not None:
            state = last_event(hyper, state, active)
            last = last._replace(kept=count_kept(state.masks))
        # What later events carry is not part of a state that all methods share.
        info = last._replace(nonfinite=infos.nonfinite.sum(), nonzero=infos.nonzero[0])
        return state._replace(method_state=()), info

    if not hosted:
        compiled = program_of(rounds, (None, None, 0, 0, 0, 0, 0), batching)
        return Compiled(compiled, compiled)

    first = program_of(begin, (0, 0), batching)
    single = program_of(once, (None, None, 0, 0, 0, 0), batching)
    last = last_event and program_of(last_event, (0, 0, 0), batching)
    keeps = program_of(lambda state: count_kept(state.masks), (0,), batching)

    def run(before, data, keys, hyper, counts, active, states):
        states, seen = first(keys, states), []
        for number in range(next(iter(counts.values())).shape[1]):
            now = {path: column[:, number] for path, column in counts.items()}
            states, info = single(np.int32(before + number), data, keys, hyper, now, states)
            seen.append(info)
        if last is not None:
            states = last(hyper, states, active)
            info = info._replace(kept=keeps(states))
        nonfinite = np.sum(jax.device_get([s.nonfinite for s in seen]), axis=0)
        info = info._replace(nonfinite=nonfinite, nonzero=seen[0].nonzero)
        return states._replace(method_state=()), info

    return Compiled(run, single)
