"""Removing inactive weights without changing the function.

A unit that no input reaches still emits a constant, an activation of its bias, and kept weights
pass it on. Effective masks leave those weights out; what they carried goes into the next bias.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import tree
from jaxprune.errors import PruneError
from jaxprune.jaxpr import EquationRule, bind, interpret, trace
from jaxprune.structure.connectivity import connectivity
from jaxprune.structure.operations import JOINS, MOVES, SAME
from jaxprune.structure.rules import liveness
from jaxprune.structure.values import Const, Signal, Weight
from jaxprune.types import Masks, PyTree, Rule

#: How far a folded constant may vary over examples and places, and the outputs may change,
#: relative to their largest value.
_TOLERANCE = {'float32': 1e-4, 'float64': 1e-10}


class Folded(NamedTuple):
    """A network without its inactive weights.

    Attributes:
      params: parameters with adjusted biases; weights outside `masks` are zero.
      constants: the further arguments, with adjusted means where a layer has no bias of its own.
      masks: the effective masks, except for the leaves in `unfolded`.
      unfolded: leaves whose inactive weights had to stay: their constants fit into no bias, as
        next to zero padding, where they differ from place to place.
    """

    params: PyTree
    constants: tuple
    masks: Masks
    unfolded: tuple[str, ...]


class _Pending(NamedTuple):
    """What a layer's inactive weights add to its output, on its way to a bias.

    Attributes:
      leaves: paths of the kernels.
      added: array shaped like the layer's output.
    """

    leaves: tuple[str, ...]
    added: jax.Array


class _Shift(NamedTuple):
    """What a bias takes over.

    Attributes:
      kernels: paths of the layer's kernels.
      bias: ('params' or 'constants', path).
      by: what is added to it.
    """

    kernels: tuple[str, ...]
    bias: tuple[str, str]
    by: jax.Array


class _Node(NamedTuple):
    """A value of the interpreter: its numbers, its liveness and what folding needs to know.

    Attributes:
      number: the array, under the original masks.
      kind: see `connectivity`.
      removed: of a weight, the numbers of its inactive part.
      places: of a parameter, the flat index into its leaf that each entry comes from.
      pending: what waits for a bias.
    """

    number: Any
    kind: Any
    removed: Any = None
    places: Any = None
    pending: _Pending | None = None


def fold_constants(
    forward: Callable[..., PyTree],
    params: PyTree,
    masks: Masks,
    x: PyTree,
    *constants: PyTree,
    prunable: Rule = tree.kernels,
) -> Folded:
    """Prunes to the effective masks and moves the constants of dead units into the next bias.

    Not for `jit`: it looks at numbers. The result is checked on `x`.

    Args:
      forward: `(params, x, *constants) -> outputs`, in evaluation mode.
      params: parameters; masks are applied to them first.
      masks: path -> bool array, True = keep.
      x: a few different examples, a batch.
      constants: further arguments, such as batch statistics.
      prunable: which leaves have masks.

    Raises:
      PruneError: the function would change on `x`. Normalisation over features does that: a unit
        on no path still moves the mean that other units are divided by.
    """
    params = tree.apply_masks(params, masks)
    connect = connectivity(forward, params, x, *constants, prunable=prunable)
    effective = jax.jit(connect)(masks)
    traced = trace(forward, params, x, *constants)
    leaves = dict(tree.paths(params))
    state = dict(tree.paths(constants))
    names = {('params', path): leaf for path, leaf in leaves.items()}
    names |= {('constants', path): leaf for path, leaf in state.items()}

    def parameter(key: tuple[str, str]) -> _Node:
        leaf = jnp.asarray(names[key]) if hasattr(names[key], 'shape') else names[key]
        path = key[1]
        if key[0] == 'params' and path in masks:
            kept = effective[path].astype(jnp.float32)
            gone = masks[path] & ~effective[path]
            return _Node(leaf, Weight(kept, (path,)), removed=jnp.where(gone, leaf, 0))
        places = np.arange(leaf.size).reshape(leaf.shape)
        return _Node(leaf, Const(source=key), places=places)

    roots = itertools.count()
    args = [parameter(('params', path)) for path in traced.paths]
    args += [
        _Node(leaf, Signal(jnp.ones(leaf.shape, jnp.float32), next(roots)))
        for leaf in map(jnp.asarray, jax.tree.leaves(x))
    ]
    args += [parameter(('constants', path)) for path in state]

    shifts: list[_Shift] = []
    unfolded: set[str] = set()
    rule = _rule(liveness(roots), shifts, unfolded, names)
    outputs = interpret(traced.jaxpr, args, rule, lambda array, atom: _Node(array, Const(array)))
    for out in outputs:
        _give_up(out, unfolded)

    # A kernel used twice may have met no bias at one place; what is joined with it stays as well.
    while stay := [s for s in shifts if unfolded & set(s.kernels)]:
        shifts = [s for s in shifts if not unfolded & set(s.kernels)]
        unfolded.update(*(shift.kernels for shift in stay))
    kept = {path: masks[path] if path in unfolded else m for path, m in effective.items()}
    new = tree.apply_masks(params, kept)
    moved = {'params': {}, 'constants': {}}
    for shift in shifts:
        kind, path = shift.bias
        moved[kind][path] = moved[kind].get(path, names[shift.bias]) + shift.by
    new = tree.put(new, moved['params'])
    folded = Folded(new, tree.put(constants, moved['constants']), kept, tuple(sorted(unfolded)))
    _check_same(forward(params, x, *constants), forward(folded.params, x, *folded.constants))
    return folded


def _rule(
    kinds: EquationRule, shifts: list[_Shift], unfolded: set[str], names: dict
) -> EquationRule:
    """The rule for `interpret`: numbers next to liveness; it fills `shifts` and `unfolded`."""

    def rule(equation, given: list[_Node]) -> list[_Node]:
        name = equation.primitive.name
        numbers = bind(equation, *[node.number for node in given])
        made = [
            _Node(number, kind)
            for number, kind in zip(numbers, kinds(equation, [n.kind for n in given]), strict=True)
        ]
        weight = next((n for n in given if isinstance(n.kind, Weight)), None)
        signal = next((n for n in given if isinstance(n.kind, Signal)), None)
        if name in ('dot_general', 'conv_general_dilated') and weight and signal:
            dead = jnp.where(signal.kind.live > 0, 0, signal.number)
            pair = [dead if n is signal else n.removed for n in given]
            (added,) = bind(equation, *pair)
            return [made[0]._replace(pending=_Pending(weight.kind.leaves, added))]
        if weight and not signal:
            parts = bind(equation, *[_removed(name, i, n) for i, n in enumerate(given)])
            return [n._replace(removed=part) for n, part in zip(made, parts, strict=True)]
        if name in MOVES and len(given) == 1:
            node = given[0]
            if node.places is not None:
                parts = bind(equation, node.places)
                return [n._replace(places=p) for n, p in zip(made, parts, strict=True)]
            if node.pending is not None:
                parts = bind(equation, node.pending.added)
                return [
                    n._replace(pending=node.pending._replace(added=p))
                    for n, p in zip(made, parts, strict=True)
                ]
        if name in SAME and len(given) == 1:
            return [made[0]._replace(places=given[0].places, pending=given[0].pending)]
        if name in ('add', 'sub', 'add_any') and len(given) == 2:
            waiting = [n for n in given if n.pending is not None]
            bias = next((n for n in given if n.places is not None and n.kind.source), None)
            if len(waiting) == 1 and bias is not None:
                # `output + bias` raises the bias, `output - mean` lowers the mean.
                sign = 1 if name != 'sub' else -1 if given[1] is bias else 0
                shift = sign and _shift(waiting[0].pending, bias, sign, numbers[0].shape, names)
                if shift:
                    shifts.append(shift)
                    return made
        for node in given:
            _give_up(node, unfolded)
        return made

    return rule


def _removed(name: str, place: int, node: _Node) -> jax.Array:
    """An argument of a rearrangement of weights, for their inactive part."""
    if node.removed is not None:
        return node.removed
    # A constant next to weights scales or places them, except in a join or as a case of a choice.
    beside = name in JOINS or (name == 'select_n' and place)
    return jnp.zeros_like(node.number) if beside else node.number


def _shift(pending: _Pending, bias: _Node, sign: int, shape, names) -> _Shift | None:
    """What a bias takes over; None where it differs among the places of one entry of the bias."""
    added = np.broadcast_to(np.asarray(pending.added), shape).reshape(-1)
    places = np.broadcast_to(np.asarray(bias.places), shape).reshape(-1)
    key = bias.kind.source
    leaf = names[key]
    count = np.maximum(np.bincount(places, minlength=leaf.size), 1)
    mean = np.bincount(places, weights=added, minlength=leaf.size) / count
    limit = _TOLERANCE.get(str(added.dtype), 1e-2) * max(abs(added).max(initial=0), 1e-30)
    if abs(added - mean[places]).max(initial=0) > limit:
        return None
    by = jnp.asarray(sign * mean.reshape(leaf.shape), leaf.dtype)
    return _Shift(pending.leaves, key, by)


def _give_up(node: _Node, unfolded: set[str]) -> None:
    """A constant that meets no bias stays where it is, if it is not zero anyway."""
    if node.pending is not None and bool((node.pending.added != 0).any()):
        unfolded.update(node.pending.leaves)


def _check_same(before: PyTree, after: PyTree) -> None:
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        largest = float(jnp.abs(a).max())
        change = float(jnp.abs(a - b).max())
        if not change <= _TOLERANCE.get(str(a.dtype), 1e-2) * max(largest, 1e-30):
            raise PruneError(
                f'weights on no path still change the outputs, by {change:.3g} of {largest:.3g}: '
                'a normalisation over features lets them in'
            )
