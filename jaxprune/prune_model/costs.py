"""What a model costs before and after `jp.prune`, for its report."""

from collections.abc import Callable
from typing import Any

import jax

from jaxprune import structure
from jaxprune.errors import PruneError
from jaxprune.prune_model import check_arguments as check
from jaxprune.prune_model.summary import Report
from jaxprune.structure.compact import removed_groups
from jaxprune.types import Masks, Problem, PyTree


def with_costs(
    report: Report,
    read: Callable[[], structure.Coupled],
    net: Problem,
    masked: PyTree,
    model_state: PyTree,
    masks: Masks,
    like: jax.ShapeDtypeStruct,
) -> Report:
    """The report with the cost of one example; if the model cannot be read a note says why.

    Args:
      read: reads the coupled groups of the model.
      masked: the parameters under the masks.
      like: one example, without the batch axis.
    """
    try:
        coupled = read()
        without = structure.cost_of_kept(coupled)
    except PruneError as error:
        x = jax.ShapeDtypeStruct((1, *like.shape), like.dtype)
        args = net, masked, x, model_state
        known = str(error) in report.note  # why paths were not followed
        note = '' if known else f'cost without pruned groups not known: {error}'
        return report._replace(
            dense_cost=_known(check.tried, 'the model on one input', structure.cost, *args),
            note='; '.join(filter(None, [report.note, note])),
        )
    removed = _known(removed_groups, coupled, masked, masks, 'keep')
    return report._replace(
        dense_cost=without({}), compact_cost=None if removed is None else without(removed)
    )


def _known(function: Callable, *args: Any) -> Any:
    """The result of a function; None where it cannot be."""
    try:
        return function(*args)
    except PruneError:
        return None
