"""A network without its removed groups: smaller arrays and a function that takes them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import arguments, tree
from jaxprune.errors import PruneError, check_choice, quoted, shown
from jaxprune.structure.coupling import walk
from jaxprune.structure.function import function_of
from jaxprune.structure.groups import KINDS, Coupled, Family, Member, groups
from jaxprune.structure.labelled import Source
from jaxprune.structure.resized import Left, resized
from jaxprune.structure.same_program import same_program
from jaxprune.structure.units import Axis
from jaxprune.types import Masks, Problem, PyTree

#: What happens to a group that masks cut in part, or that may not go.
PARTIAL = ('refuse', 'keep')


class Compact(NamedTuple):
    """A network without what its masks prune.

    Attributes:
      apply: `(params, x) -> outputs`, with `model_state` between them if there is one.
      params: the parameters that are left, in a tree of the same structure.
      model_state: the statistics that are left; None if there are none.
      opt_state: the optimizer's state that is left; None if none was given.
      kept: path -> axis -> the original indices that are left, for parameters that lost some.
      removed: family -> how many of its groups are gone.
    """

    apply: Callable[..., PyTree]
    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    kept: dict[str, dict[int, np.ndarray]]
    removed: dict[str, int]


def compact(
    apply: Problem | Callable[..., PyTree],
    params: PyTree,
    masks: Masks,
    x: PyTree,
    *,
    model_state: PyTree = None,
    opt_state: PyTree = None,
    normalisation: str = 'refuse',
    partial: str = 'refuse',
    unknown: str = 'refuse',
    multiple: int | Mapping[str, int] = 1,
) -> Compact:
    """Makes a pruned network really smaller: the groups that its masks prune are cut out.

        small = jp.compact(apply, params, pruned.masks, x)
        small.apply(small.params, x)

    The outputs are those of the masked network, for finite parameters; that nothing removed is
    still heard is proved on the traced program before anything is cut. The function is `apply`
    itself where it reads its sizes from the parameters. Else it is the traced program at smaller
    sizes: it can be jitted, differentiated and called with other batches. Constants of the
    original width, as the scale of a softmax, stay as they are.

    Args:
      apply: `(params, x) -> outputs`, or `(params, model_state, x)` if there is a state; or a
        `Problem`: its network in evaluation mode, which takes a state, `{}` if there is none.
      params: all parameters; what the masks prune may be zero already.
      masks: path -> bool array, True = keep. A group goes if its masks prune all slices that make
        it, or all that read it; see `groups`.
      x: inputs, arrays or shapes; other batches are traced again when they come.
      model_state: batch statistics and the like.
      opt_state: of an optax optimizer of these parameters.
      normalisation: see `groups`.
      partial: 'refuse' raises where masks do not prune whole groups: a group that one of the
        layers that make it loses and another keeps, all of a layer, a group that has to stay, or
        one that still acts. 'keep' leaves such groups in, with their zeros; of a layer that is
        pruned whole it leaves one. What masks prune below a group is no concern of either.
      unknown: see `groups`.
      multiple: the number of units left in a layer is a multiple of this, 8 or 128 say, which
        matrix hardware needs to be fast. The first pruned units stay in for it, with their zeros.
        A mapping has a number for each of `KINDS`: `{'unit': 8, 'head': 2}`.

    Raises:
      PruneError: masks that do not fit, that cut a group in part, that remove all of a layer, or
        whose groups still act in the masked network; an operation that is not known.
    """
    check_choice('partial', partial, PARTIAL)
    _check_numbers(apply, params, model_state)
    if 0 in (size for leaf in jax.tree.leaves(x) for size in jnp.shape(leaf)):
        raise PruneError('compact needs an input with at least one example')
    apply, model_state = function_of(apply, model_state)
    states = () if model_state is None else (model_state,)
    masked = _masked(params, masks)
    options = {'normalisation': normalisation, 'unknown': unknown}
    multiples = _multiples(multiple)

    read = groups(apply, params, x, model_state, **options)
    gone = removed_groups(read, masked, masks, partial, multiples)
    left = _left(read, gone)
    axes = read.coupling.parameter_axes
    small = _cut_tree(masked, axes, left)
    small_states = [_cut_tree(state, read.coupling.state_axes, left) for state in states]
    kept = {
        path: at
        for path, own in axes.items()
        if (at := {i: k for i, axis in enumerate(own) if (k := left.of(axis)) is not None})
    }
    if opt_state is not None:
        opt_state = _cut_optimizer(opt_state, params, kept)
    original = jax.eval_shape(lambda *a: a, params, *states)
    shapes = jax.eval_shape(lambda *a: a, small, *small_states, x)
    sizes = {family.name: family.size for family in read.families if family.name in gone}
    smaller = _function(apply, original, shapes[:-1], _Plan(options, gone, sizes))
    if same_program(apply, smaller, *shapes):
        smaller = apply
    return Compact(
        smaller,
        small,
        small_states[0] if small_states else None,
        opt_state,
        kept,
        {name: len(numbers) for name, numbers in gone.items()},
    )


def _check_numbers(apply: Any, params: PyTree, model_state: PyTree) -> None:
    """Raises where there is no network, or no numbers to look at."""
    if not callable(apply) and not isinstance(apply, Problem):
        raise PruneError(f'apply must be a function (params, x) -> outputs, not {shown(apply)}')
    for path, leaf in tree.paths((params, model_state)):
        name = quoted(path.partition('/')[2])
        if isinstance(leaf, jax.core.Tracer):
            raise PruneError(f'compact looks at numbers: call it outside of jit ({name} is traced)')
        if isinstance(leaf, jax.ShapeDtypeStruct) or not hasattr(leaf, 'dtype'):
            raise PruneError(f'compact needs the numbers of {name}, an array and not {shown(leaf)}')


def _multiples(multiple: int | Mapping[str, int]) -> dict[str, int]:
    """Kind of groups -> what the number left is a multiple of."""
    found = dict(multiple) if isinstance(multiple, Mapping) else {'unit': multiple}
    for kind, number in found.items():
        check_choice('kind of groups', kind, KINDS)
        arguments.least(1, multiple=number)
    return found


def _masked(params: PyTree, masks: Masks) -> PyTree:
    """`tree.apply_masks` by NumPy: nothing is compiled for each shape."""
    tree.check_masks(params, masks)
    on_host = {path: np.asarray(mask) for path, mask in masks.items()}
    leaves = [
        np.where(on_host[path], np.asarray(leaf), np.zeros((), leaf.dtype))
        if path in masks
        else leaf
        for path, leaf in tree.paths(params)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _left(read: Coupled, gone: Mapping[str, Sequence[int]]) -> Left:
    units = [f.units[n] for f in read.families for n in gone.get(f.name, ())]
    return Left(read.coupling, units)


def _cut_tree(leaves: PyTree, axes: Mapping[str, list[Axis]], left: Left) -> PyTree:
    cut = [jnp.asarray(left.cut(leaf, axes[path])) for path, leaf in tree.paths(leaves)]
    return jax.tree.unflatten(jax.tree.structure(leaves), cut)


class _Plan(NamedTuple):
    """What is cut out, for programs of other inputs.

    Attributes:
      options: of `groups`.
      gone: family -> the groups that are gone.
      sizes: family -> how many groups it had.
    """

    options: Mapping[str, str]
    gone: Mapping[str, Sequence[int]]
    sizes: Mapping[str, int]


def _function(
    apply: Callable[..., PyTree], original: PyTree, smaller: PyTree, plan: _Plan
) -> Callable[..., PyTree]:
    """The smaller function; it traces the original for every new shape and type of its arguments.

    Args:
      apply: the original.
      original: shapes of its parameters and states.
      smaller: shapes of what is left of them.
      plan: what is cut out.
    """
    programs: dict[Any, Callable] = {}

    def run(params: PyTree, *rest: PyTree) -> PyTree:
        given = jax.eval_shape(lambda *a: a, params, *rest)
        _check_given(given[:-1], smaller)
        key = jax.tree.structure(given), tuple((s.shape, s.dtype) for s in jax.tree.leaves(given))
        if key not in programs:
            programs[key] = _program(apply, original, given, plan)
        *states, x = rest
        return programs[key](*jax.tree.leaves((params, x, *states)))

    return run


def _program(
    apply: Callable[..., PyTree], original: PyTree, given: PyTree, plan: _Plan
) -> Callable[..., PyTree]:
    """The program of some inputs at smaller sizes."""
    types = [leaf.dtype for leaf in jax.tree.leaves(given[:-1])]
    leaves = [
        jax.ShapeDtypeStruct(leaf.shape, dtype)
        for leaf, dtype in zip(jax.tree.leaves(original), types, strict=True)
    ]
    params, *states = jax.tree.unflatten(jax.tree.structure(original), leaves)
    x, state = given[-1], states[0] if states else None
    read = groups(apply, params, x, state, **plan.options)
    found = {family.name: family.size for family in read.families if family.name in plan.gone}
    if found != plan.sizes:
        raise PruneError('these inputs keep other groups together: compact with such inputs')
    outputs = jax.tree.structure(read.coupling.traced.outputs)
    run = resized(read.coupling, _left(read, plan.gone))
    return lambda *leaves: jax.tree.unflatten(outputs, run(*leaves))


def _check_given(given: PyTree, smaller: PyTree) -> None:
    """Raises where arguments are not what is left of the parameters and states."""
    if jax.tree.structure(given) != jax.tree.structure(smaller):
        raise PruneError('the smaller network takes params (and model_state) as compact made them')
    wanted = dict(tree.paths(smaller))
    for path, leaf in tree.paths(given):
        if leaf.shape != wanted[path].shape:
            name = path.partition('/')[2]
            raise PruneError(
                f"'{name}' of the smaller network has shape {wanted[path].shape}, not {leaf.shape}"
            )


# --- what is removed ----------------------------------------------------------------------------


def removed_groups(
    read: Coupled,
    masked: PyTree,
    masks: Masks,
    partial: str = 'refuse',
    multiples: Mapping[str, int] | None = None,
) -> dict[str, list[int]]:
    """Family -> the groups that masks prune.

    Args:
      read: the groups of the network.
      masked: its parameters under the masks.
      masks, partial: see `compact`.
      multiples: kind of groups -> see `multiple` of `compact`.

    Raises:
      PruneError: see `compact`.
    """
    leaves = dict(tree.paths(masked))
    if partial == 'refuse':
        _check_paths(read, leaves, masks)
    gone = {}
    for family in read.families:
        numbers = _pruned(family, leaves, masks, partial)
        if not numbers:
            continue
        if family.reason:
            if partial == 'keep':
                continue
            raise PruneError(
                f"masks prune group {numbers[0]} of '{family.name}', which has to stay: "
                f"{family.reason}; partial='keep' leaves it in"
            )
        numbers = numbers[len(numbers) == family.size :]  # one stays, with its zeros
        wanted = (multiples or {}).get(family.kind, 1)
        numbers = numbers[-(family.size - len(numbers)) % wanted :]
        if not numbers:
            continue
        gone[family.name] = numbers
    while acting := _acting(read, leaves, gone):
        name, number, where = acting[0]
        if partial == 'refuse':
            raise PruneError(
                f"group {number} of '{name}' still acts in the masked network: {where}; "
                "mask what reads it too, and its biases, or partial='keep' leaves it in"
            )
        gone = _without(read, leaves, gone, acting)
    return gone


def _check_paths(read: Coupled, leaves: Mapping[str, Any], masks: Masks) -> None:
    """Raises where a whole layer is pruned: what it leaves of the next ones looks cut in part."""
    whole = [
        family
        for family in read.families
        if not family.reason and len(_pruned(family, leaves, masks, 'keep')) == family.size
    ]
    if whole:
        names = ', '.join(f"'{family.name}'" for family in whole[:4])
        raise PruneError(
            f'masks prune all groups of {names}{", ..." * (len(whole) > 4)}: no path is left; '
            "a floor keeps some when pruning, partial='keep' leaves one in"
        )


def _pruned(family: Family, leaves: Mapping[str, Any], masks: Masks, partial: str) -> list[int]:
    """The groups of a family that masks prune: all that makes them, or all that reads them."""
    makers = [m for m in family.members if m.role == 'out']
    readers = [m for m in family.members if m.role == 'in']
    if not makers or not any(m.path in masks for m in (*makers, *readers)):
        return []
    made = np.array([_dead(m, masks[m.path]) for m in makers if m.path in masks])
    others = np.array(
        [_dead(m, np.asarray(leaves[m.path]) != 0) for m in makers if m.path not in masks]
    )
    heard = np.zeros(family.size, bool)  # what has no mask reads all groups
    unread = np.array([_dead(m, masks[m.path]) if m.path in masks else heard for m in readers])
    silent = made.all(0) & others.all(0) if len(made) else np.zeros(family.size, bool)
    whole = silent | (unread.all(0) if len(unread) else False)
    cut = made.any(0) & ~whole if len(made) else np.zeros(family.size, bool)
    if cut.any() and partial == 'refuse' and not family.reason:
        number = int(np.flatnonzero(cut)[0])
        masked = [m for m in makers if m.path in masks]
        loses = next(m for m, dead in zip(masked, made, strict=True) if dead[number])
        keeps = [m for m, dead in zip(masked, made, strict=True) if not dead[number]]
        keeps += [m for m in makers if m.path not in masks]
        raise PruneError(
            f"masks cut group {number} of '{family.name}' in part: '{loses.path}' loses it, "
            f"'{keeps[0].path}' keeps it; partial='keep' leaves it in"
        )
    return np.flatnonzero(whole).tolist()


def _dead(member: Member, alive: Any) -> np.ndarray:
    """Of each group, is nothing of its slice alive?"""
    alive = np.moveaxis(np.asarray(alive), member.axis, 0)
    lines = alive.reshape(len(alive), -1).any(1)
    return np.array([not lines[at].any() for at in member.indices])


def _without(
    read: Coupled,
    leaves: Mapping[str, Any],
    gone: Mapping[str, Sequence[int]],
    acting: Sequence[tuple[str, int, str]],
) -> dict[str, list[int]]:
    """The groups to remove without those that act: if it is known which, else without all of them.

    What is heard is an axis: other groups of it may be silent, and are tried again.
    """
    families = {f.name: f for f in read.families}
    makers = {
        name: [m for m in families[name].members if m.role in ('out', 'along')]
        for name, *_ in acting
    }
    alive = {
        name: ~np.all([_dead(m, np.asarray(leaves[m.path]) != 0) for m in members], axis=0)
        for name, members in makers.items()
    }
    named = {(name, number) for name, number, _ in acting}
    kept = {(name, number) for name, number in named if alive[name][number]} or named
    left = {name: [n for n in at if (name, n) not in kept] for name, at in gone.items()}
    return {name: at for name, at in left.items() if at}


def _acting(
    read: Coupled, leaves: Mapping[str, Any], gone: Mapping[str, Sequence[int]]
) -> list[tuple[str, int, str]]:
    """Removed groups that the masked network may still hear: family, number, where it does."""
    if not gone:
        return []
    acting: dict[tuple[str, int], str] = {}
    left = _left(read, gone)
    known: dict[Source, bool] = {}
    axes = read.coupling.parameter_axes

    def silent(source: Source) -> bool:
        if source not in known:
            path, i = source
            at = left.of(axes[path][i])
            lost = () if at is None else np.setdiff1d(np.arange(axes[path][i].size), at)
            known[source] = not np.any(np.take(np.asarray(leaves[path]), lost, axis=i))
        return known[source]

    def goes(axis: Axis) -> bool:
        return left.of(axis) is not None

    def heard(axis: Axis, where: str) -> None:
        units = read.coupling.units.parts_of(axis.units)
        for family in read.families:
            for number in gone.get(family.name, ()):
                if family.units[number] in units:
                    acting.setdefault((family.name, number), where)

    walk(read.coupling, silent, goes, heard)
    return [(name, number, where) for (name, number), where in acting.items()]


# --- optimizer ----------------------------------------------------------------------------------


def _cut_optimizer(
    opt_state: PyTree, params: PyTree, kept: Mapping[str, Mapping[int, np.ndarray]]
) -> PyTree:
    """An optimizer's state without the moments of what is removed."""

    def cut(path: str, leaf: Any, shape: tuple[int, ...]) -> Any:
        first = jnp.ndim(leaf) - len(shape)
        if first < 0 or jnp.shape(leaf)[first:] != shape:
            if path in kept and jnp.size(leaf) > 1:
                raise PruneError(
                    f"the optimizer's state of '{path}' has shape {jnp.shape(leaf)}: which part of "
                    'it belongs to which weight is not known'
                )
            return leaf
        for axis, at in kept.get(path, {}).items():
            leaf = jnp.take(leaf, at, axis=first + axis)
        return leaf

    return tree.map_moments(cut, opt_state, params)
