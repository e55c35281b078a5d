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
from jaxprune.errors import PruneError
from jaxprune.method import (
    COUPLED,
    Choices,
    Method,
    check_choices,
    competing,
    cost_of,
    get_pruner,
    host_loop,
    limits,
    method,
    plan_groups,
    plural,
    prune_rounds,
)
from jaxprune.plan import Plan, density_of
from jaxprune.prune_model import check_arguments as check
from jaxprune.prune_model.costs import with_costs
from jaxprune.prune_model.summary import Report, report_of
from jaxprune.score.loss import one_input, split
from jaxprune.structure import Connect
from jaxprune.types import Batches, Groups, Key, LossFn, Masks, Problem, Pruner, PyTree, Rule, View


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
    multiple: int = 1,
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
      model: the network, `(params, x) -> logits` or a `Problem`, for methods that use data or
        gradients; with it and `data` the report has the effective compression.
      data: what scores use: a pair `(x, y)`, one batch; a list of pairs, several batches of any
        size; a `Batch` with leaves `(batches, batch, ...)`; or `x` alone for methods without
        labels. A single round averages over all batches, every example once. Several rounds take
        one batch each, in turn; if there is only one, all rounds score it, and the report says so.
      model_state: batch statistics and the like, for a `Problem` that has them.
      init: `key -> params`, for methods that draw fresh weights; a `Problem` has its own.
      loss: per-example loss of `(logits, y)`; by default the `Problem`'s, or cross-entropy.
      prunable: which leaves may be pruned; by default the `Problem`'s rule, or `kernels`.
      masks: masks already in force; what they prune never returns.
      key: for methods that draw random numbers; by default that of seed 0.
      allocation, batch_norm, repair, repair_gain: see `get_pruner`.
      target: 'direct'; 'effective': the density is that of weights on a path from input to output,
        see `structure.prune_to_active`; 'params' or 'flops': it is the share of the network's
        parameters or operations that its groups leave.
      granularity: 'weight'; 'kernel', all taps of a convolution from one input to one output;
        'unit' (neurons and filters), 'head', 'head_dim' or 'group' (units and heads), each with all
        that goes along, read off the traced model; '2:4' and the like, n of every m along the
        inputs; '8x128' and the like, blocks of inputs x outputs. Density, floor and cap count
        these. Without a model the last two axes of a kernel are its inputs and
        outputs, as in flax and haiku.
      keep_all_units: regular expression of layers that keep all units.
      floor: fewest weights (or units, ...) of a layer, one number or path -> number.
      cap: largest density of a layer, one number or path -> number.
      multiple: of units every layer keeps a multiple of so many, rounded up: 8 or 128, which matrix
        hardware needs to be fast.
      rounds: pruning rounds; None for the published number.
      density_schedule: schedule of densities over the rounds; None for the published one.
      **options: the method's own options.

    Raises:
      PruneError: an unknown name, an argument of the wrong type, missing data, labels or inputs
        that do not fit the model, a density that cannot be, scores that are NaN, infinite or all
        zero, masks that do not fit or leave too few weights.
    """
    if not isinstance(method_name, str):
        raise PruneError(f'method_name must be a name such as snip, not {method_name!r}')
    check.options(options, method(method_name).options, inspect.signature(prune).parameters)
    given = _Given(params, model, data, model_state, init, loss, prunable, masks, key)
    extent = _Extent(density, compression, floor, cap, rounds, density_schedule)
    what = (method_name, allocation, target, granularity, keep_all_units, 0.0, cap)
    how = {'batch_norm': batch_norm, 'repair': repair, 'repair_gain': repair_gain}
    how['multiple'] = arguments.whole('multiple', multiple)
    return _pruned(given, Choices(*what, **how), extent, options)


class _Given(NamedTuple):
    """The model and what comes with it; see `prune`."""

    params: PyTree
    model: Any
    data: Any
    model_state: PyTree
    init: Callable[[Key], PyTree] | None
    loss: LossFn | None
    prunable: Rule | None
    masks: Masks | None
    key: Key | None


class _Extent(NamedTuple):
    """How much is pruned, and in how many rounds; see `prune`."""

    density: float | None
    compression: float | None
    floor: int | Mapping[str, int]
    cap: float | Mapping[str, float]
    rounds: int | None
    density_schedule: str | None


def _pruned(given: _Given, choices: Choices, extent: _Extent, options: Mapping[str, Any]) -> Pruned:
    """The pruned model of a request whose options are known ones."""
    entry = method(choices.name)
    net, view, batches, density = _checked(entry, given, choices, extent)
    must = choices.target == 'effective' or choices.allocation in ORDERED
    connect, shapes, note = _paths(net, view, batches, given.model is not None, must, choices)
    read = _reader(net, view, batches, given.model is not None)
    groups = competing(choices.granularity, shapes, read, choices.keep_all_units)
    plan = _planned(entry, choices, extent, groups, density)
    pruner = get_pruner(
        net,
        choices.name,
        allocation=choices.allocation,
        batch_norm=choices.batch_norm,
        shapes=shapes,
        floor=extent.floor,
        cap=extent.cap,
        connect=connect if choices.target == 'effective' else None,
        groups=groups,
        repair=choices.repair,
        repair_gain=choices.repair_gain,
        multiple=choices.multiple,
        cost=cost_of(choices.target),
        **options,
    )
    size = sum(math.prod(shape) for shape in shapes.values())
    wanted = structure.active_wanted(size, 1 / density)
    found, kept = _in_rounds(pruner, choices.name, given.key, view, plan, batches, wanted)
    if pruner.final_masks is None and choices.multiple == 1 and choices.target == 'direct':
        check.kept(kept, plan, plural(choices.granularity))
    rounds = len(plan.steps)
    if 'data' in entry.needs and rounds > 1 and len(split(batches)) == 1:
        note = '; '.join(filter(None, [note, f'all {rounds} rounds scored the same batch']))
    report = report_of(choices.name, given.params, found.masks, shapes, connect, note)
    effective = report.effective_compression
    if choices.target == 'effective' and effective > 1 / density * (1 + 1e-6):
        raise PruneError(
            f'effective compression {1 / density:.6g} cannot be met: with all weights of this '
            f'allocation kept it is {effective:.6g}'
        )
    # One program for all of them; parameters without a mask stay as they are.
    leaves = {path: leaf for path, leaf in tree.paths(given.params) if path in found.masks}
    kept = tree.put(given.params, jax.jit(tree.apply_masks)(leaves, found.masks))
    if choices.repair:
        kept = tree.put(kept, found.weights)
    if given.model is not None and batches is not None:
        like = one_input(batches, 'what the model costs')
        report = with_costs(report, read, net, kept, view.model_state, found.masks, like)
    return Pruned(kept, found.masks, report)


def _checked(
    entry: Method, given: _Given, choices: Choices, extent: _Extent
) -> tuple[Problem, View, Batches | None, float]:
    """The problem, its view, the batches and the density of a request that can be met."""
    check.types(
        given.params,
        given.model,
        given.model_state,
        given.init,
        given.loss,
        given.masks,
        given.key,
    )
    check_choices(entry, choices._replace(density_schedule=extent.density_schedule or ''))
    density = density_of(extent.density, extent.compression)
    net = _problem(given)
    _check_needs(entry, given, choices)
    batches = check.batches_of(given.data, 'data' in entry.needs)
    view = check.tried(
        'prunable=', problems.view, net, given.params, given.model_state, given.masks
    )
    check.weights(view.weights)
    if given.masks is not None and not any(bool(mask.any()) for mask in given.masks.values()):
        raise PruneError('masks keep no weight')
    if given.model is not None and batches is not None:
        check.model(net, view, batches, labels='data' in entry.needs)
    return net, view, batches, density


def _planned(
    entry: Method,
    choices: Choices,
    extent: _Extent,
    groups: Groups,
    density: float,
) -> Plan:
    """The keep counts of all rounds."""
    floor, cap = limits(groups, extent.floor, cap=extent.cap)
    rounds = entry.rounds if extent.rounds is None else extent.rounds
    schedule = extent.density_schedule
    shared = {
        'allocation': choices.allocation,
        'rounds': rounds,
        'density_schedule': entry.density_schedule if schedule is None else schedule,
        'floor': floor,
        'cap': cap,
    }
    if choices.target == 'effective':
        return structure.rounds_before(groups.shapes, density, **shared)
    cost = cost_of(choices.target)
    return plan_groups(groups, density, cost=cost, multiple=choices.multiple, **shared)


def _in_rounds(
    pruner: Pruner,
    name: str,
    key: Key | None,
    view: View,
    plan: Plan,
    batches: Batches | None,
    active: int,
) -> tuple[View, dict[str, int]]:
    """The view after all rounds, and what the last one kept; bad scores are an error."""
    # A loop of calls: inside a compiled loop a convolution is many times slower on the CPU.
    parts = ('init', 'update', 'regrown_values', 'final_masks', 'repaired_values')
    functions = {name: getattr(pruner, name) for name in parts}
    compiled = pruner._replace(**{name: f and jax.jit(f) for name, f in functions.items()})
    found, infos = check.tried(
        f"scoring by '{name}'",
        prune_rounds,
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
    return found, {layer: int(count[-1]) for layer, count in infos.kept.items()}


def _check_needs(entry: Method, given: _Given, choices: Choices) -> None:
    """Raises PruneError where the model, its data or its initialiser is missing."""
    coupled = choices.granularity in COUPLED
    needed = (entry.needs & {'data', 'shape'}) or coupled or choices.target == 'effective'
    if needed and (given.model is None or given.data is None):
        both = (('model=', given.model), ('data=', given.data))
        missing = ' and '.join(name for name, value in both if value is None)
        what = f"method '{choices.name}'"
        if not entry.needs:
            what = f"granularity '{choices.granularity}'" if coupled else 'target effective'
        raise PruneError(f'{what} needs {missing}')
    has_init = isinstance(given.model, Problem) or given.init is not None
    if 'fresh_init' in entry.needs and not has_init:
        raise PruneError(
            f"method '{choices.name}' draws fresh weights: it needs init=, a function key -> "
            'params, or a model that is a Problem'
        )


def _problem(given: _Given) -> Problem:
    """The problem behind the arguments of `prune`."""
    init, model = given.init, given.model
    if isinstance(model, Problem):
        fresh = None if init is None else lambda key: (init(key), model.init(key)[1])
        own = {'init': fresh, 'loss': given.loss, 'prunable': given.prunable}
        return model._replace(**{name: f for name, f in own.items() if f is not None})
    return problems.problem_from_functions(
        init or (lambda key: given.params),
        model or _no_model,
        loss=given.loss or problems.cross_entropy,
        prunable=given.prunable or tree.kernels,
    )


def _no_model(params: PyTree, x: jax.Array) -> jax.Array:
    raise PruneError('this needs model=, a function (params, x) -> logits')


def _paths(
    net: Problem,
    view: View,
    batches: Batches | None,
    has_model: bool,
    must: bool,
    choices: Choices,
) -> tuple[Connect | None, dict[str, tuple[int, ...]], str]:
    """Paths through the network where they can be followed: `(connect, shapes in order, note)`.

    Args:
      must: the call cannot do without.
    """
    shapes = tree.shapes(view.weights)
    if not has_model or batches is None:
        if choices.allocation in ORDERED:
            raise PruneError(
                f"allocation '{choices.allocation}' needs model= and data= to see which layer is "
                'first'
            )
        lacks = batches is not None
        return None, shapes, 'paths not followed: this needs model= as well' if lacks else ''
    like = one_input(batches, 'following paths')
    x = jax.ShapeDtypeStruct((1, *like.shape), like.dtype)
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


def _reader(
    net: Problem, view: View, batches: Batches | None, has_model: bool
) -> Callable[[], structure.Coupled] | None:
    """Reads the coupled groups of the model, once; None where there is no model or no input."""
    if not has_model or batches is None:
        return None

    @functools.cache
    def read() -> structure.Coupled:
        like = one_input(batches, 'reading what goes together')
        x = jax.ShapeDtypeStruct((1, *like.shape), like.dtype)
        args = net, view.params, x, view.model_state
        return check.tried('the model on one input', structure.groups, *args)

    return read
