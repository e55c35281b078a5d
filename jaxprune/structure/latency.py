"""How long a network takes: seconds per call, and two networks in turns."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxprune.errors import PruneError
from jaxprune.types import PyTree

#: Calls before the clock starts, the one that compiles among them.
_WARM_UP = 3


def latency(
    apply: Callable[..., PyTree],
    params: PyTree,
    x: PyTree,
    *,
    model_state: PyTree = None,
    repeats: int = 30,
) -> float:
    """The median of the seconds that a call of the compiled network takes, start to result.

    Arguments are on the device before; each call waits for its result. So a small network takes
    as long as it takes to start a program. To compare two networks use `latency_ratio`.

    Args:
      apply: `(params, x) -> outputs`, or `(params, model_state, x)` if there is a state.
      params: parameters, arrays.
      x: inputs, arrays; the time is that of the whole batch.
      model_state: batch statistics and the like.
      repeats: timed calls; three more come first.

    Raises:
      PruneError: `repeats` below 1.
    """
    network = (apply, params) if model_state is None else (apply, params, model_state)
    [times] = in_turns([_call(network, x)], repeats)
    return statistics.median(times)


def latency_ratio(
    dense: tuple[Any, ...], small: tuple[Any, ...], x: PyTree, *, repeats: int = 30
) -> float:
    """How many times longer one network takes than another: the median over calls in turns.

        jp.structure.latency_ratio((apply, params), (small.apply, small.params), x)

    The networks are called one after the other, and each pair gives a ratio, so a machine that
    slows down meanwhile slows down both.

    Args:
      dense: `(apply, params)`, or `(apply, params, model_state)`.
      small: the other network, of the same form.
      x: inputs of both, arrays.
      repeats: timed calls of each; three more come first.

    Raises:
      PruneError: `repeats` below 1, a network that is not such a tuple.
    """
    before, after = in_turns([_call(network, x) for network in (dense, small)], repeats)
    return statistics.median(a / b for a, b in zip(before, after, strict=True))


def in_turns(calls: Sequence[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """The seconds of each call of each function, called in turns until its result is there."""
    if repeats < 1:
        raise PruneError(f'repeats must be at least 1, not {repeats}')
    for call in list(calls) * _WARM_UP:
        jax.block_until_ready(call())
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, mine in zip(calls, times, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(call())
            mine.append(time.perf_counter() - began)
    return times


def _call(network: tuple[Any, ...], x: PyTree) -> Callable[[], PyTree]:
    """A compiled network with its arguments on the device."""
    if not isinstance(network, tuple) or len(network) not in (2, 3) or not callable(network[0]):
        raise PruneError('a network is (apply, params) or (apply, params, model_state)')
    apply, *arguments = network
    compiled, arguments = jax.jit(apply), jax.device_put([*arguments, x])
    return lambda: compiled(*arguments)
