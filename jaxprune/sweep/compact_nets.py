"""The network of a run without what its masks prune: cut out, timed, tested and compared."""

from typing import Any

import jax
import numpy as np

from jaxprune import structure
from jaxprune.errors import PruneError
from jaxprune.structure.function import function_of
from jaxprune.types import Batch, Problem, RunState

#: Examples in a batch that a latency is measured on, and in one that is tested.
_TIMED, _TESTED = 64, 500


def compact_outcome(
    net: Problem, tests: Batch, state: RunState, full: RunState | None = None
) -> dict[str, Any]:
    """Columns of a run's last row of results.

    Args:
      net: the network.
      tests: all test examples, host arrays.
      state: of the run at its end, host arrays.
      full: the same before the rounds that came after the last step; None if none did.

    Returns:
      `latency_ratio`, how many times longer the dense network takes on 64 examples, the median of
      calls in turns; `compact_accuracy`, `full_accuracy` on the test set; `compact_difference`, the
      largest difference of their logits. Nothing where the network cannot be compacted.
    """
    full = state if full is None else full
    apply, model_state = function_of(net, state.model_state)
    few = tests.x[:_TIMED]
    try:
        small = structure.compact(
            apply, state.params, state.masks, few, model_state=model_state, partial='keep'
        )
    except PruneError:
        return {}
    compact = small.apply, small.params, small.model_state
    ratio = structure.latency_ratio((apply, state.params, model_state), compact, few)
    wanted = _logits((apply, full.params, full.model_state), tests.x)
    found = _logits(compact, tests.x)
    return {
        'latency_ratio': ratio,
        'full_accuracy': float((wanted.argmax(-1) == tests.y).mean()),
        'compact_accuracy': float((found.argmax(-1) == tests.y).mean()),
        'compact_difference': float(np.abs(wanted - found).max()),
    }


def _logits(network: tuple[Any, ...], x: np.ndarray) -> np.ndarray:
    apply, *arguments = network
    compiled = jax.jit(apply)
    parts = [x[i : i + _TESTED] for i in range(0, len(x), _TESTED)]
    return np.concatenate([np.asarray(compiled(*arguments, part)) for part in parts])
