"""The call itself."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import problem as problems
from jaxprune import structure, tree
from jaxprune.allocation import ORDERED
from jaxprune.errors import PruneError
from jaxprune.method import (
    Choices,
    Method,
    check_choices,
    get_pruner,
    host_loop,
    method,
    prune_rounds,
    unit_shapes,
)
from jaxprune.plan import Plan, density_of, plan_rounds
from jaxprune.prune_model import check_arguments as check
from jaxprune.prune_model.summary import Report, report_of
from jaxprune.structure import Connect
from jaxprune.types import Batch, Key, LossFn, Masks, Problem, Pruner, PyTree, Rule, View


class Pruned(NamedTuple):
    """A pruned model.

    Attributes:
      params: the parameters with pruned weights set to zero.
      masks: path -> bool array, True = keep.
      report: what was done.
    """

    params: PyTree
    masks: Masks
    report: Report


def prune(
    params: PyTree,
    method_name: str,
    density: float | None = None,
    *,
    compression: float | None = None,
    model: Problem | Callable[[PyTree, jax.Array], jax.Array] | None = None,
    data: Any = None,
    model_state: PyTree = None,
    init: Callable[[Key], PyTree] | None = None,
    loss: LossFn | None = None,
    prunable: Rule | None = None,
    masks: Masks | None = None,
    key: Key | None = None,
    allocation: str = 'global',
    target: str = 'direct',
    granularity: str = 'weight',
    keep_all_units: str = '',
    floor: int | Mapping[str, int] = 0,
    cap: float | Mapping[str, float] = 1.0,
    rounds: int | None = None,
    density_schedule: str | None = None,
    batch_norm: str | None = None,
    repair: str = '',
    repair_gain: str = 'linear',
    **options: Any,
) -> Pruned:
    """Prunes a model to a density with a named method.

    Works on any tree of arrays: flax linen's `params`, the state of `flax.nnx.split`, the arrays
    of `equinox.partition`, haiku's parameters.

        pruned = jp.prune(params, 'magnitude', density=0.1)
        pruned = jp.prune(params, 'snip', compression=20, model=apply, data=(x, y))
        print(pruned.report)

    Args:
      params: all parameters; they are not changed.
      method_name: a key of `METHODS`.
      density: fraction of the prunable weights to keep, in (0, 1].
      compression: 1 / density, in place of it.
      model: the network, `(params, x) -> logits` or a `Problem`. Needed by methods that use data
        or gradients; with it and `data` the report has the effective compression.
      data: what scores use: a pair `(x, y)`, one batch; a `Batch` of several batches with
        leaves `(batches, batch, ...)`; or `x` alone for methods without labels. A single round
        averages over all batches. Several rounds take one batch each, in turn; where there is only
        one, all rounds score it, and the report says so.
      model_state: batch statistics and the like, for a `Problem` that has them.
      init: `key -> params`, for methods that draw fresh weights; a `Problem` has its own.
      loss: per-example loss of `(logits, y)`; by default that of the `Problem`, or cross-entropy.
      prunable: which leaves may be pruned; by default those of the `Problem`, or `kernels`.
      masks: masks already in force; what they prune never returns.
      key: for methods that draw random numbers; by default that of seed 0.
      allocation: how the weights kept are shared among the layers: 'global' or a layerwise rule.
      target: 'direct', or 'effective': the density is that of weights on a path from input to
        output, see `structure.prune_to_active`.
      granularity: 'weight', or 'unit': whole neurons and filters, with all that reads them; density
        and floor then count units. Outputs are on the last axis of a kernel, as in flax and haiku.
      keep_all_units: with units, a regular expression of layers that keep all theirs; the last
        layer always does.
      floor: fewest weights (or units) of a layer, one number or path -> number.
      cap: largest density of a layer, one number or path -> number.
      rounds: pruning rounds; None for the published number.
      density_schedule: schedule of densities over the rounds; None for the published one.
      batch_norm: while scoring, 'train' or 'eval'; None for the published mode.
      repair: what happens to kept weights at the end; with units, 'orthp'.
      repair_gain: the activation whose gain repaired kernels have.
      **options: the method's own options.

    Raises:
      PruneError: an unknown name, an argument of the wrong type, missing data, labels or inputs
        that do not fit the model, a density that cannot be, scores that are NaN, infinite or all
        zero, masks that do not fit or leave too few weights.
    """
    if not isinstance(method_name, str):
        raise PruneError(f'method_name must be a name such as snip, not {method_name!r}')
    entry = method(method_name)
    check.options(options, entry.options, inspect.signature(prune).parameters)
    check.types(params, model, model_state, loss, prunable, masks, key)
    check_choices(
        entry,
        Choices(
            method_name,
            allocation,
            target,
            granularity,
            keep_all_units,
            cap=cap,
            batch_norm=batch_norm,
            repair=repair,
            repair_gain=repair_gain,
        ),
    )
    density = density_of(density, compression)
    net = _problem(params, model, init, loss, prunable)
    follows = target == 'effective' or granularity == 'unit'  # paths through the network
    _check_needs(entry, method_name, model, data, init, granularity, follows)
    batches = check.batches_of(data, 'data' in entry.needs)
    view = check.tried('prunable=', problems.view, net, params, model_state, masks)
    check.weights(view.weights)
    if masks is not None and not any(bool(mask.any()) for mask in masks.values()):
        raise PruneError('masks keep no weight')
    if model is not None and batches is not None:
        check.model(net, view, batches, labels='data' in entry.needs)
    must = follows or allocation in ORDERED
    connect, shapes, note = _paths(net, view, batches, model is not None, must, allocation)
    shared = {'allocation': allocation, 'floor': floor, 'cap': cap}
    make = structure.rounds_before if target == 'effective' else plan_rounds
    if granularity == 'unit':
        make = functools.partial(plan_rounds, what='units')
    plan = make(
        unit_shapes(shapes, keep_all_units) if granularity == 'unit' else shapes,
        density,
        rounds=entry.rounds if rounds is None else rounds,
        density_schedule=density_schedule or entry.density_schedule,
        **shared,
    )
    pruner = get_pruner(
        net,
        method_name,
        batch_norm=batch_norm,
        shapes=shapes,
        connect=connect if follows else None,
        granularity=granularity,
        keep_all_units=keep_all_units,
        repair=repair,
        repair_gain=repair_gain,
        **shared,
        **options,
    )
    size = sum(math.prod(shape) for shape in shapes.values())
    wanted = structure.active_wanted(size, 1 / density)
    found = _in_rounds(pruner, method_name, key, view, plan, batches, wanted)
    if pruner.final_masks is None and granularity == 'weight':
        check.kept(found.masks, plan)
    if 'data' in entry.needs and len(plan.steps) > 1 and batches.x.shape[0] == 1:
        note = '; '.join(
            filter(None, [note, f'all {len(plan.steps)} rounds scored the same batch'])
        )
    report = report_of(method_name, params, found.masks, shapes, connect, note)
    if target == 'effective' and report.effective_compression > 1 / density * (1 + 1e-6):
        raise PruneError(
            f'effective compression {1 / density:.6g} cannot be met: with all weights of this '
            f'allocation kept it is {report.effective_compression:.6g}'
        )
    kept = tree.apply_masks(params, found.masks)
    if repair:
        kept = tree.put(kept, found.weights)
    return Pruned(kept, found.masks, report)


def _in_rounds(
    pruner: Pruner,
    name: str,
    key: Key | None,
    view: View,
    plan: Plan,
    batches: Batch | None,
    active: int,
) -> View:
    """The view after all rounds; scores that cannot be ranked are an error."""
    # A loop of calls: inside a compiled loop a convolution is many times slower on the CPU.
    compiled = pruner._replace(update=jax.jit(pruner.update))
    found, infos = prune_rounds(
        compiled,
        jax.random.key(0) if key is None else key,
        view,
        plan.counts,
        batches,
        active=jnp.int32(active),
        loop=host_loop,
    )
    for number in range(len(plan.steps)):
        check.scores(jax.tree.map(lambda leaf, n=number: leaf[n], infos), name, number)
    return found


def _check_needs(
    entry: Method,
    name: str,
    model: Any,
    data: Any,
    init: Any,
    granularity: str,
    follows: bool,
) -> None:
    """Raises PruneError where the model, its data or its initialiser is missing."""
    needed = (entry.needs & {'data', 'shape'}) or follows
    if needed and (model is None or data is None):
        missing = ' and '.join(n for n, v in (('model=', model), ('data=', data)) if v is None)
        what = f"method '{name}'"
        if not entry.needs:
            what = "granularity 'unit'" if granularity == 'unit' else 'target effective'
        raise PruneError(f'{what} needs {missing}')
    if 'fresh_init' in entry.needs and not isinstance(model, Problem) and init is None:
        raise PruneError(
            f"method '{name}' draws fresh weights: it needs init=, a function key -> params, or a "
            'model that is a Problem'
        )


def _problem(
    params: PyTree,
    model: Any,
    init: Callable[[Key], PyTree] | None,
    loss: LossFn | None,
    prunable: Rule | None,
) -> Problem:
    """The problem behind the arguments of `prune`."""
    if isinstance(model, Problem):
        fresh = None if init is None else lambda key: (init(key), model.init(key)[1])
        given = {'init': fresh, 'loss': loss, 'prunable': prunable}
        return model._replace(**{name: f for name, f in given.items() if f is not None})
    return problems.problem_from_functions(
        init or (lambda key: params),
        model or _no_model,
        loss=loss or problems.cross_entropy,
        prunable=prunable or tree.kernels,
    )


def _no_model(params: PyTree, x: jax.Array) -> jax.Array:
    raise PruneError('this needs model=, a function (params, x) -> logits')


def _paths(
    net: Problem,
    view: View,
    batches: Batch | None,
    has_model: bool,
    must: bool,
    allocation: str,
) -> tuple[Connect | None, dict[str, tuple[int, ...]], str]:
    """Paths through the network where they can be followed: `(connect, shapes in order, note)`.

    Args:
      must: the call cannot do without.
    """
    shapes = tree.shapes(view.weights)
    if not has_model or batches is None:
        if allocation in ORDERED:
            raise PruneError(
                f"allocation '{allocation}' needs model= and data= to see which layer is first"
            )
        lacks = batches is not None
        return None, shapes, 'paths not followed: this needs model= as well' if lacks else ''
    x = jax.ShapeDtypeStruct((1, *batches.x.shape[2:]), batches.x.dtype)
    args = structure.forward_of(net), view.params, x, view.model_state
    try:
        shapes = check.tried(
            'the model on one input', structure.shapes_in_order, *args, prunable=net.prunable
        )
        return structure.connectivity(*args, prunable=net.prunable), shapes, ''
    except PruneError as error:
        if must:
            raise
        return None, shapes, f'paths not followed: {error}'
