"""The call itself."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import arguments, structure, tree
from jaxprune import problem as problems
from jaxprune.allocation import ORDERED
from jaxprune.errors import PruneError, nearest
from jaxprune.method import get_pruner, method, unit_shapes
from jaxprune.plan import plan_rounds
from jaxprune.prune_model import check_arguments as check
from jaxprune.prune_model.summary import Report, report_of
from jaxprune.types import Batch, Key, LossFn, Masks, Problem, PyTree, Rule


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
    density: float,
    *,
    model: Problem | Callable[[PyTree, jax.Array], jax.Array] | None = None,
    data: Any = None,
    model_state: PyTree = None,
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
    train: bool | None = None,
    **options: Any,
) -> Pruned:
    """Prunes a model to a density with a named method.

    Works on any tree of arrays: flax linen's `params`, the state of `flax.nnx.split`, the arrays
    of `equinox.partition`, haiku's parameters.

        pruned = jp.prune(params, 'magnitude', density=0.1)
        pruned = jp.prune(params, 'snip', density=0.05, model=apply, data=(x, y))
        print(pruned.report)

    Args:
      params: all parameters; they are not changed.
      method_name: a key of `METHODS`.
      density: fraction of the prunable weights to keep, in (0, 1].
      model: the network, `(params, x) -> logits` or a `Problem`. Needed by methods that look at
        data or gradients; with it and `data` the report tells effective compression.
      data: what scores look at: a pair `(x, y)`, one batch; a `Batch` of several batches with
        leaves `(batches, batch, ...)`; or `x` alone for methods without labels.
      model_state: batch statistics and the like, for a `Problem` that has them.
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
      cap: largest density of a layer, likewise.
      rounds: pruning rounds; None for the published number.
      density_schedule: schedule of densities over the rounds; None for the published one.
      train: batch-norm mode while scoring; None for the published one.
      **options: the method's own options.

    Raises:
      PruneError: an unknown name, an argument of the wrong type, missing data, labels or inputs
        that do not fit the model, a density that cannot be, scores that are NaN, infinite or all
        zero, masks that do not fit or leave too few weights.
    """
    if not isinstance(method_name, str):
        raise PruneError(f'method_name must be a name such as snip, not {method_name!r}')
    entry = method(method_name)
    if target not in structure.TARGETS:
        raise PruneError(f'unknown target {target!r}: {nearest(str(target), structure.TARGETS)}')
    if granularity == 'unit' and target != 'direct':
        raise PruneError("units are pruned to a density of units: leave target at 'direct'")
    check.options(options, entry.options, inspect.signature(prune).parameters)
    check.types(params, model, model_state, loss, prunable, masks, key)
    density = arguments.real('density', density)
    net = _problem(params, model, loss, prunable)
    by_unit = granularity == 'unit'
    follow = target == 'effective' or by_unit  # paths through the network, that is
    looks = (entry.needs & {'data', 'shape'}) | ({'shape'} if follow else set())
    if looks and (model is None or data is None):
        missing = ' and '.join(n for n, v in (('model=', model), ('data=', data)) if v is None)
        what = f"method '{method_name}'"
        if not entry.needs:
            what = "granularity 'unit'" if by_unit else 'target effective'
        raise PruneError(f'{what} needs {missing}')
    batches = check.batches_of(data, 'data' in entry.needs)
    view = check.tried('prunable=', problems.view, net, params, model_state, masks)
    check.weights(view.weights)
    if masks is not None and not any(bool(mask.any()) for mask in masks.values()):
        raise PruneError('masks keep no weight')
    if model is not None and batches is not None:
        check.model(net, view, batches, labels='data' in entry.needs)

    connect = None
    note = (
        'paths not looked at: this needs model= as well'
        if model is None and data is not None
        else ''
    )
    shapes = tree.shapes(view.weights)
    if model is not None and batches is not None:
        try:
            connect, shapes = _paths(net, view, batches)
        except PruneError as error:
            if follow or allocation in ORDERED:
                raise
            note = f'paths not looked at: {error}'
    if allocation in ORDERED and connect is None:
        raise PruneError(
            f"allocation '{allocation}' needs model= and data= to see which layer is first"
        )
    make = structure.rounds_before if target == 'effective' else plan_rounds
    if by_unit:
        make = functools.partial(plan_rounds, what='units')
    plan = make(
        unit_shapes(shapes, keep_all_units) if by_unit else shapes,
        density,
        allocation=allocation,
        rounds=entry.rounds if rounds is None else rounds,
        density_schedule=entry.density_schedule if density_schedule is None else density_schedule,
        floor=floor,
        cap=cap,
    )
    pruner = get_pruner(
        net,
        method_name,
        allocation=allocation,
        train=train,
        shapes=shapes,
        floor=floor,
        cap=cap,
        connect=connect if follow else None,
        granularity=granularity,
        keep_all_units=keep_all_units,
        **options,
    )
    key = jax.random.key(0) if key is None else key
    state, update = pruner.init(key, view), jax.jit(pruner.update)
    now = view
    for number in range(len(plan.steps)):
        counts = {path: jnp.int32(column[number]) for path, column in plan.counts.items()}
        state, found, info = update(jax.random.fold_in(key, number), state, now, counts, batches)
        check.scores(info, method_name, number)
        now = problems.view(net, params, model_state, found)
    if pruner.final_masks is not None:
        size = sum(math.prod(shape) for shape in shapes.values())
        wanted = structure.active_wanted(size, 1 / density)
        found = jax.jit(pruner.final_masks)(state, jnp.int32(wanted))
    elif not by_unit:  # what reads units that go is not counted beforehand
        check.kept(found, plan)
    report = report_of(method_name, params, found, shapes, connect, note)
    if target == 'effective' and report.effective_compression > 1 / density * (1 + 1e-6):
        raise PruneError(
            f'effective compression {1 / density:.6g} cannot be met: with all weights of this '
            f'allocation kept it is {report.effective_compression:.6g}'
        )
    return Pruned(tree.apply_masks(params, found), found, report)


def _problem(params: PyTree, model: Any, loss: LossFn | None, prunable: Rule | None) -> Problem:
    """The problem behind the arguments of `prune`."""
    if isinstance(model, Problem):
        given = {'loss': loss, 'prunable': prunable}
        return model._replace(**{name: f for name, f in given.items() if f is not None})
    return problems.problem_from_functions(
        lambda key: params,
        model or _no_model,
        loss=loss or problems.cross_entropy,
        prunable=prunable or tree.kernels,
    )


def _no_model(params: PyTree, x: jax.Array) -> jax.Array:
    raise PruneError('this needs model=, a function (params, x) -> logits')


def _paths(net: Problem, view, batches: Batch):
    """`(connect, shapes in forward order)` of a network."""
    x = jax.ShapeDtypeStruct((1, *batches.x.shape[2:]), batches.x.dtype)
    args = structure.forward_of(net), view.params, x, view.model_state
    shapes = check.tried(
        'the model on one input', structure.shapes_in_order, *args, prunable=net.prunable
    )
    return structure.connectivity(*args, prunable=net.prunable), shapes
