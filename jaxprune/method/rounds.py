"""The rounds of a pruner: begin, score and select once per round, finish.

One function runs them for everyone: `jp.prune`, sweeps, and a user's own code. What is carried
from round to round is the caller's: a view with the method's state, or the state of a training run.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxprune.errors import PruneError, shown
from jaxprune.select import count_kept
from jaxprune.types import Batch, Batches, Counts, Key, PruneInfo, Pruner, PyTree, View

Carried = TypeVar('Carried')


class Rounds(NamedTuple):
    """What happens to something carried from round to round.

    Attributes:
      begin: `carried -> carried`, before the first round.
      once: `(number, counts, carried) -> (carried, info)`, one round.
      finish: `(carried, active) -> (carried, kept)` after the last round; None where there is
        nothing to do. `active` is the number of weights on a path that is asked for.
    """

    begin: Callable[[Any], Any]
    once: Callable[[jax.Array, Counts, Any], tuple[Any, PruneInfo]]
    finish: Callable[[Any, ArrayLike], tuple[Any, dict[str, jax.Array]]] | None = None


class OnView(NamedTuple):
    """A pruner's state and the network it sees.

    Attributes:
      method_state: of the pruner.
      view: the network under the masks so far.
    """

    method_state: PyTree
    view: View


def run_rounds(
    rounds: Rounds,
    carried: Carried,
    counts: Mapping[str, ArrayLike],
    *,
    before: ArrayLike = 0,
    begin: bool = True,
    finish: bool = True,
    active: ArrayLike = 0,
    loop: Callable = jax.lax.scan,
) -> tuple[Carried, PruneInfo]:
    """Runs rounds of pruning, all of a method's or some.

    Args:
      rounds: what happens in them.
      carried: what they start from.
      counts: path -> keep counts with a leading axis of rounds.
      before: rounds of this method that happened earlier.
      begin: the first of these rounds is the method's first.
      finish: the last of these rounds is the method's last.
      active: see `Rounds.finish`.
      loop: `jax.lax.scan`, or `host_loop` to call each round from the host. With `host_calls`
        infos are a list, and nothing may come after the last round.

    Returns:
      What is carried after the last round, and the info of every round, stacked.
    """
    if begin:
        carried = rounds.begin(carried)
    # Host numbers stay on the host: a loop of calls hands them over one by one.
    numbers = before + np.arange(len(next(iter(counts.values()))), dtype=np.int32)
    carried, infos = loop(
        lambda carried, at: rounds.once(*at, carried), carried, (numbers, dict(counts))
    )
    if finish and rounds.finish is not None:
        carried, kept = rounds.finish(carried, active)
        last = {
            path: jnp.concatenate([infos.kept[path][:-1], jnp.asarray(count)[None]])
            for path, count in kept.items()
        }
        infos = infos._replace(kept={**infos.kept, **last})
    return carried, infos


def host_calls(body: Callable, carried: Carried, xs: PyTree) -> tuple[Carried, list[PyTree]]:
    """A loop of calls for bodies that are compiled on their own; it waits for none of them.

    Returns:
      What is carried after the last call, and the output of each.
    """
    outputs = []
    for i in range(len(jax.tree.leaves(xs)[0])):
        carried, output = body(carried, jax.tree.map(lambda leaf, i=i: leaf[i], xs))
        outputs.append(output)
    return carried, outputs


def host_loop(body: Callable, carried: Carried, xs: PyTree) -> tuple[Carried, PyTree]:
    """`jax.lax.scan` as a loop of calls; the outputs are host arrays."""
    carried, outputs = host_calls(body, carried, xs)
    return carried, jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(outputs))


def prune_rounds(
    pruner: Pruner,
    key: Key,
    view: View,
    counts: Mapping[str, ArrayLike],
    batches: Batches | None = None,
    *,
    active: ArrayLike = 0,
    loop: Callable = jax.lax.scan,
) -> tuple[View, PruneInfo]:
    """Prunes a network in rounds: a pure function for `jit`, and for `vmap` over seeds and counts.

        plan = jp.plan_rounds(jp.shapes(view.weights), density=0.01, rounds=100)
        view, info = jp.prune_rounds(jp.get_pruner(problem, 'synflow'), key, view, plan.counts, x)
        view.masks

    Args:
      pruner: see `get_pruner`.
      key: round i draws from `fold_in(key, i)`.
      view: the network, see `jaxprune.view`.
      counts: path -> keep counts with a leading axis of rounds, as `plan_rounds` makes them.
      batches: what scores use, see `types.Batches`. A single round averages over all of them;
        several rounds take one each, in turn.
      active: fewest weights on a path from input to output, for pruners with `final_masks`.
      loop: see `run_rounds`.

    Returns:
      The view under the last masks, pruned weights zero; and the info of every round, leaves with
      a leading axis of rounds.

    Raises:
      PruneError: no pruner, or counts that are no table of rounds.
    """
    _check_arguments(pruner, counts)
    several = len(next(iter(counts.values()))) > 1

    def seen_in(number: jax.Array) -> Batches | None:
        if batches is None or not several:
            return batches
        if not isinstance(batches, Batch):
            if isinstance(number, jax.core.Tracer):
                raise PruneError('rounds over batches of unequal size need loop=host_loop')
            return [batches[int(number) % len(batches)]]
        at = number % batches.x.shape[0]
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, at, 1), batches)

    def begin(carried: OnView) -> OnView:
        return carried._replace(method_state=pruner.init(key, carried.view))

    def once(number: jax.Array, now: Counts, carried: OnView) -> tuple[OnView, PruneInfo]:
        draw = jax.random.fold_in(key, number)
        state, view, info = prune_once(pruner, draw, *carried, now, seen_in(number))
        return OnView(state, view), info

    def finish(carried: OnView, active: ArrayLike) -> tuple[OnView, dict[str, jax.Array]]:
        view = finished(pruner, *carried, active)
        kept = {} if pruner.final_masks is None else count_kept(view.masks)
        return carried._replace(view=view), kept

    rounds = Rounds(begin, once, finish if has_finish(pruner) else None)
    carried, infos = run_rounds(rounds, OnView((), view), counts, active=active, loop=loop)
    return carried.view, infos


def _check_arguments(pruner: Pruner, counts: Mapping[str, ArrayLike]) -> None:
    if not isinstance(pruner, Pruner):
        raise PruneError(f'expected a Pruner, see jaxprune.get_pruner, not {shown(pruner)}')
    rounds = 'path -> counts of each round, as the counts of jaxprune.plan_rounds'
    if not isinstance(counts, Mapping) or not counts:
        raise PruneError(f'counts must be {rounds}, not {shown(counts)}')
    for path, column in counts.items():
        if np.ndim(column) != 1:
            raise PruneError(f"counts must be {rounds}; '{path}' has no axis of rounds")


def prune_once(
    pruner: Pruner,
    key: Key,
    method_state: PyTree,
    view: View,
    counts: Counts,
    batches: Batches | None,
) -> tuple[PyTree, View, PruneInfo]:
    """One round: `(method_state, view under the new masks, info)`.

    Weights that return take their values; pruned weights are zero.
    """
    method_state, masks, info = pruner.update(key, method_state, view, counts, batches)
    weights = view.weights
    if pruner.regrown_values is not None:
        weights = pruner.regrown_values(method_state, view)
    return method_state, _under(view, weights, masks), info


def has_finish(pruner: Pruner) -> bool:
    """Does something happen after the last round?"""
    return pruner.final_masks is not None or pruner.repaired_values is not None


def finished(pruner: Pruner, method_state: PyTree, view: View, active: ArrayLike) -> View:
    """The view after the last round: its final masks, then its repaired weights."""
    masks, weights = view.masks, view.weights
    if pruner.final_masks is not None:
        masks = pruner.final_masks(method_state, active)
        if pruner.regrown_values is not None:
            weights = pruner.regrown_values(method_state, view)
        view = _under(view, weights, masks)
    if pruner.repaired_values is not None:
        view = _under(view, pruner.repaired_values(view.weights, view.masks), view.masks)
    return view


def _under(view: View, weights: dict[str, jax.Array], masks: dict[str, jax.Array]) -> View:
    kept = {path: jnp.where(masks[path], w, jnp.zeros_like(w)) for path, w in weights.items()}
    return view._replace(weights=kept, masks=masks)
