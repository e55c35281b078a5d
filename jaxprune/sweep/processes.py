"""Several processes that train one chunk together, where a run needs more than a host.

All compute the same program on the devices of all (`jax.distributed`). The first one, the lead,
reads and writes files and decides; what it decides goes to the others. When one dies, JAX ends the
others, and the chunk is started again as a whole.
"""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.errors import JaxpruneError, SpecError, first_line, quoted
from jaxprune.types import PyTree

#: Seconds in which all processes must have met.
MEETING = 120
#: Variables that name several slices of TPUs. Those of a former allocation make JAX wait for ever.
_SLICES = 'MEGASCALE_'


#: Options of `jaxprune chunk` that set the same.
_FLAGS = {
    'JAX_NUM_PROCESSES': '--processes',
    'JAX_PROCESS_ID': '--process',
    'JAX_COORDINATOR_ADDRESS': '--coordinator',
}


class Processes(NamedTuple):
    """Which process this is.

    Attributes:
      count: of all.
      number: of this one, from 0.
      coordinator: where process 0 listens, `host:port`.
    """

    count: int = 1
    number: int = 0
    coordinator: str = ''


def from_environment(environment: Mapping[str, str]) -> Processes:
    """What JAX_NUM_PROCESSES, JAX_PROCESS_ID and JAX_COORDINATOR_ADDRESS say.

    Raises:
      SpecError: one of them is missing, or no number.
    """
    names = ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID', 'JAX_COORDINATOR_ADDRESS')
    given = [environment.get(name, '') for name in names]
    if given[0] in ('', '1'):
        return Processes()
    for name, value in zip(names, given, strict=True):
        if not value or (name != names[2] and not value.isdigit()):
            raise SpecError(
                f'{given[0]} processes (--processes or {names[0]}) need {_FLAGS[name]} or {name}, '
                f'not {quoted(value) if value else "nothing"}'
            )
    return Processes(int(given[0]), int(given[1]), given[2])


def meet(processes: Processes, seconds: int = MEETING) -> None:
    """Joins the others, before JAX computes anything; one process has nobody to meet.

    Raises:
      JaxpruneError: the others did not come in time. Where JAX itself waits for ever, the process
        says so and ends.
    """
    if processes.count == 1:
        return
    if not 0 <= processes.number < processes.count:
        raise SpecError(f'process {processes.number}: numbers are 0 to {processes.count - 1}')
    stale = sorted(name for name in os.environ if name.startswith(_SLICES))
    for name in stale:  # a chunk has one slice, or none
        del os.environ[name]
    if stale:
        print(f'jaxprune: {", ".join(stale)} of another allocation left out', file=sys.stderr)
    late = f'{processes.count} processes did not meet at {processes.coordinator} in {seconds} s'
    # JAX would take SIGTERM for itself, and nobody would save.
    jax.config.update('jax_enable_preemption_service', False)
    with _ended_after(2 * seconds, late):
        try:
            jax.distributed.initialize(
                processes.coordinator,
                processes.count,
                processes.number,
                initialization_timeout=seconds,
            )
        except (RuntimeError, ValueError) as error:
            raise JaxpruneError(f'{late} ({first_line(error)})') from None


@contextlib.contextmanager
def _ended_after(seconds: float, message: str) -> Iterator[None]:
    """Ends the process if what happens inside takes longer: some waits know no timeout."""

    def end() -> None:
        print(f'jaxprune: {message}', file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_lead() -> bool:
    """Is this the process that reads and writes files?"""
    return jax.process_index() == 0


def agreed(value: Any) -> Any:
    """The lead's value, on all processes; anything that JSON can hold."""
    if jax.process_count() == 1:
        return value
    content = json.dumps(value if is_lead() else None).encode()
    length = int(_from_lead(np.int32(len(content))))
    sent = np.zeros(length, np.uint8)
    if is_lead():
        sent[:] = np.frombuffer(content, np.uint8)
    return json.loads(_from_lead(sent).tobytes())


def agreed_arrays(tree: PyTree, abstract: PyTree) -> PyTree:
    """The lead's host arrays, on all processes.

    Args:
      tree: of the lead; ignored elsewhere.
      abstract: their shapes, known to all.
    """
    if jax.process_count() == 1:
        return tree
    if not is_lead():
        tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    return _from_lead(tree)


def anybody(flag: bool) -> bool:
    """Does any process say so?"""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def _from_lead(tree: PyTree) -> PyTree:
    from jax.experimental import multihost_utils

    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))
