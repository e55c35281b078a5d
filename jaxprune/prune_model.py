"""One call that prunes someone's own model: `jp.prune`."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import problem as problems
from jaxprune import structure, tree
from jaxprune.errors import PruneError, nearest
from jaxprune.method import build, method
from jaxprune.plan import at_init
from jaxprune.quota import ORDERED
from jaxprune.types import Batch, Key, LossFn, Masks, Problem, PyTree, Rule

_TARGETS = ('direct', 'effective')


class Leaf(NamedTuple):
    """What became of one prunable leaf.

    Attributes:
      path: its path.
      size: how many weights it has.
      kept: how many the mask keeps.
      active: how many of these lie on a path from input to output; None if not looked at.
    """

    path: str
    size: int
    kept: int
    active: int | None


class Report(NamedTuple):
    """What a call of `prune` did; print it.

    Attributes:
      method: name of the method.
      leaves: one entry per prunable leaf, in forward order where that is known.
      untouched: paths of the parameters that no mask can touch.
      collapsed: paths of the leaves without any weight left.
      density: weights kept / weights before.
      compression: its inverse.
      effective_compression: weights before / weights on a path from input to output; None if not
        looked at, infinite if the network is cut in two.
      note: why paths were not looked at, or ''.
    """

    method: str
    leaves: tuple[Leaf, ...]
    untouched: tuple[str, ...]
    collapsed: tuple[str, ...]
    density: float
    compression: float
    effective_compression: float | None
    note: str

    def __str__(self) -> str:
        width = max(len(leaf.path) for leaf in self.leaves)
        lines = [f'{"leaf":{width}}  {"weights":>12} {"kept":>12} {"density":>8} {"active":>12}']
        for leaf in self.leaves:
            active = '-' if leaf.active is None else f'{leaf.active:,}'
            share = f'{leaf.kept / leaf.size:.4f}' if leaf.size else '-'
            lines.append(
                f'{leaf.path:{width}}  {leaf.size:>12,} {leaf.kept:>12,} {share:>8} {active:>12}'
            )
        effective = self.effective_compression
        lines.append(
            f'{self.method}: density {self.density:.6g}, compression {self.compression:.6g}'
            + ('' if effective is None else f', effective {effective:.6g}')
        )
        if self.collapsed:
            lines.append(f'collapsed, no weight left: {", ".join(self.collapsed)}')
        if self.untouched:
            lines.append(f'untouched: {", ".join(self.untouched)}')
        return '\n'.join([*lines, self.note] if self.note else lines)


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
    loss: LossFn = problems.cross_entropy,
    prunable: Rule | None = None,
    masks: Masks | None = None,
    key: Key | None = None,
    allocation: str = 'global',
    target: str = 'direct',
    floor: int | Mapping[str, int] = 0,
    cap: float | Mapping[str, float] = 1.0,
    rounds: int | None = None,
    over: str | None = None,
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
      loss: per-example loss of `(logits, y)`, for a `model` that is a function.
      prunable: which leaves may be pruned; by default those of the `Problem`, or `kernels`.
      masks: masks already in force; what they prune never returns.
      key: for methods that draw random numbers; by default that of seed 0.
      allocation: 'global', or the name of a quota: how the weights are shared among the layers.
      target: 'direct', or 'effective': the density is that of weights on a path from input to
        output, see `structure.prune_to_active`.
      floor: fewest weights of a layer, one number or path -> number.
      cap: largest density of a layer, likewise.
      rounds: pruning rounds; None for the published number.
      over: schedule of densities over the rounds; None for the published one.
      train: batch-norm mode while scoring; None for the published one.
      **options: the method's own options.

    Raises:
      PruneError: an unknown name, missing data, a density that cannot be, scores that are NaN,
        infinite or all zero, masks that do not fit.
    """
    card = method(method_name)
    if target not in _TARGETS:
        raise PruneError(f"unknown target '{target}': {nearest(target, _TARGETS)}")
    if isinstance(model, Problem):
        net = model if prunable is None else model._replace(prunable=prunable)
    else:
        net = problems.plain(
            lambda key: params, model or _no_model, loss=loss, prunable=prunable or tree.kernels
        )
    looks = card.needs | ({'shape'} if target == 'effective' else set())
    if looks and (model is None or data is None):
        missing = ' and '.join(n for n, v in (('model=', model), ('data=', data)) if v is None)
        what = 'target effective' if not card.needs else f"method '{method_name}'"
        raise PruneError(f'{what} needs {missing}')
    batches = _batches(data, 'data' in card.needs)
    view = problems.view(net, params, model_state, masks)

    connect, note = None, ''
    shapes = tree.shapes(view.weights)
    if model is not None and batches is not None:
        try:
            connect, shapes = _paths(net, view, batches)
        except PruneError as error:
            if target == 'effective' or allocation in ORDERED:
                raise
            note = f'paths not looked at: {error}'
    if allocation in ORDERED and connect is None:
        raise PruneError(
            f"allocation '{allocation}' needs model= and data= to see which layer is first"
        )
    make = structure.rounds_before if target == 'effective' else at_init
    plan = make(
        shapes,
        density,
        allocation=allocation,
        rounds=card.rounds if rounds is None else rounds,
        over=card.over if over is None else over,
        floor=floor,
        cap=cap,
    )
    pruner = build(
        net,
        method_name,
        allocation=allocation,
        train=train,
        shapes=shapes,
        floor=floor,
        cap=cap,
        connect=connect if target == 'effective' else None,
        **options,
    )
    key = jax.random.key(0) if key is None else key
    state, update = pruner.init(key, view), jax.jit(pruner.update)
    now = view
    for number in range(len(plan.steps)):
        counts = {path: jnp.int32(column[number]) for path, column in plan.counts.items()}
        state, found, info = update(jax.random.fold_in(key, number), state, now, counts, batches)
        _check_scores(info, method_name, number)
        now = problems.view(net, params, model_state, found)
    if pruner.finish is not None:
        size = sum(math.prod(shape) for shape in shapes.values())
        wanted = structure.active_wanted(size, 1 / density)
        found = jax.jit(pruner.finish)(state, jnp.int32(wanted))
    report = _report(method_name, params, found, shapes, connect, note)
    if target == 'effective' and report.effective_compression > 1 / density * (1 + 1e-6):
        raise PruneError(
            f'effective compression {1 / density:.6g} cannot be met: with all weights of this '
            f'allocation kept it is {report.effective_compression:.6g}'
        )
    return Pruned(tree.apply_masks(params, found), found, report)


def _no_model(params: PyTree, x: jax.Array) -> jax.Array:
    raise PruneError('this needs model=, a function (params, x) -> logits')


def _batches(data: Any, labels: bool) -> Batch | None:
    """Whatever a user passes as data, as batches with leaves `(batches, batch, ...)`."""
    if data is None:
        return None
    if isinstance(data, Batch):
        return data
    if isinstance(data, (tuple, list)):
        if len(data) != 2:
            raise PruneError(f'data must be a pair (x, y), not {len(data)} values')
        x, y = data
    else:
        x, y = data, None
    x = jnp.asarray(x)
    if not x.ndim or not x.shape[0]:
        raise PruneError('data holds no example')
    if y is None:
        if labels:
            raise PruneError('this method needs labels: pass data=(x, y)')
        y = np.zeros(x.shape[0], np.int32)
    y = jnp.asarray(y)
    if y.shape[:1] != x.shape[:1]:
        raise PruneError(f'data holds {x.shape[0]} inputs, but {y.shape[:1]} labels')
    return Batch(x[None], y[None])


def _paths(net: Problem, view, batches: Batch):
    """`(connect, shapes in forward order)` of a network."""

    def forward(params, x, model_state):
        return net.apply(params, model_state, x, train=False, key=None)[0]

    x = jax.ShapeDtypeStruct((1, *batches.x.shape[2:]), batches.x.dtype)
    args = forward, view.frozen, x, view.model_state
    prunable = net.prunable
    shapes = structure.shapes_in_order(*args, prunable=prunable)
    return structure.connectivity(*args, prunable=prunable), shapes


def _check_scores(info, name: str, number: int) -> None:
    if int(info.nonfinite):
        raise PruneError(f"{int(info.nonfinite):,} scores of '{name}' were NaN or infinite")
    if number == 0 and not int(info.nonzero):
        raise PruneError(f"all scores of '{name}' are zero: there is nothing to rank by")


def _report(name: str, params: PyTree, masks: Masks, shapes, connect, note: str) -> Report:
    active = None if connect is None else jax.device_get(jax.jit(connect)(masks))
    leaves = tuple(
        Leaf(
            path,
            math.prod(shape),
            int(masks[path].sum()),
            None if active is None else int(active[path].sum()),
        )
        for path, shape in shapes.items()
    )
    size, kept = sum(leaf.size for leaf in leaves), sum(leaf.kept for leaf in leaves)
    working = None if active is None else sum(leaf.active for leaf in leaves)
    return Report(
        method=name,
        leaves=leaves,
        untouched=tuple(path for path, _ in tree.paths(params) if path not in shapes),
        collapsed=tuple(leaf.path for leaf in leaves if leaf.size and not leaf.kept),
        density=kept / size,
        compression=_ratio(size, kept),
        effective_compression=None if working is None else _ratio(size, working),
        note=note,
    )


def _ratio(before: int, after: int) -> float:
    return before / after if after else math.inf
