"""How this machine trains the runs of a program: in which way, and how many at once."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxprune.errors import JaxpruneError
from jaxprune.sweep.devices import memory_limit
from jaxprune.sweep.groups import Group
from jaxprune.sweep.strategy import Strategy, most_runs

#: The part of a device's memory that the runs may take by estimate; the compiler's own account is
#: looked at before the first step.
_ESTIMATE_SHARE = 0.5


class Here(NamedTuple):
    """How this machine trains a program.

    Attributes:
      strategy: in which way.
      chosen: why so: 'measured', 'usual' or 'forced'.
      seconds: per step of one run, as measured; None where nothing was.
      at_once: how many runs of a chunk.
      bytes_per_run: memory that a run takes, measured or estimated.
    """

    strategy: Strategy
    chosen: str
    seconds: float | None
    at_once: int
    bytes_per_run: int


def this_machine(group: Group, planned: Mapping[str, Any]) -> Here:
    """How this machine trains the runs of a group.

    Args:
      planned: the program in the plan.
    """
    taken = planned['bytes_per_run']
    if group.measured and group.measured.bytes_per_run > 0:
        taken = round(group.measured.bytes_per_run)
    places = group.strategy.devices // group.strategy.batch_devices
    fits = int(_ESTIMATE_SHARE * memory_limit() / taken) * places
    most = min(most_runs(group.strategy.batching, jax.default_backend()) * places, fits)
    most = max(most // places * places, places)  # more would be padding
    runs = planned['chunk']
    even = math.ceil(runs / math.ceil(runs / most))  # shared out evenly
    at_once = min(math.ceil(even / places) * places, most)
    seconds = group.measured and group.measured.seconds
    return Here(group.strategy, group.chosen, seconds, at_once, taken)


def machine_of(groups: Sequence[Group], plan: Mapping[str, Any]) -> dict[str, Here]:
    """Program -> how this machine trains it, for all programs of a plan."""
    planned = {program['id']: program for program in plan['programs']}
    return {group.id: this_machine(group, planned[group.id]) for group in groups}


def with_less_memory(here: Here, reason: str) -> Here:
    """Half as many runs at once, or more devices for each run.

    Raises:
      JaxpruneError: there is nothing left to halve.
    """
    strategy = here.strategy
    places = strategy.devices // strategy.batch_devices
    if here.at_once > places:
        return here._replace(at_once=math.ceil(here.at_once / 2 / places) * places)
    more = range(strategy.batch_devices + 1, strategy.devices + 1)
    shared = next((n for n in more if strategy.devices % n == 0), None)
    if shared is None:
        where = f'all {strategy.devices} devices' if strategy.devices > 1 else 'the device'
        raise JaxpruneError(
            f'not even one run on {where} fits into memory ({reason}); a smaller '
            'train.batch_size or model.dtype = "bfloat16" may help'
        )
    return here._replace(
        strategy=strategy._replace(batch_devices=shared), at_once=strategy.devices // shared
    )
