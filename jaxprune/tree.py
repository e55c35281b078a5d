"""Pick prunable leaves out of a parameter tree by path, and put them back.

A path is the tree's keys joined by '/': `block1/conv/kernel`, `0/w`. Works on any pytree of
arrays: nested dicts (flax, haiku), lists and tuples, registered dataclasses (equinox).
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.errors import PruneError, nearest, quoted, shown
from jaxprune.types import Masks, PyTree, Rule, Weights

#: Names under which the common libraries keep the weights of a linear or convolution layer.
KERNEL_NAMES = frozenset({'kernel', 'weight', 'w'})


def paths(params: PyTree) -> list[tuple[str, jax.Array]]:
    """All leaves with their paths, in tree order.

    Raises:
      PruneError: two leaves would share a path, as `{'a/b': x, 'a': {'b': y}}` would.
    """
    leaves = [(_join(p), leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(params)]
    names = [path for path, _ in leaves]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PruneError(f"two parameters have the path '{twice}': rename a key that holds a '/'")
    return leaves


def _join(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator='/')


def kernels(path: str, leaf) -> bool:
    """The default rule: kernels of dense and convolution layers, classifier included.

    Biases, normalisation scales and embeddings are left alone: a leaf counts if its name is in
    `KERNEL_NAMES` and it has at least two axes. (A leaf's rank alone would not do: attention
    biases have two axes.)
    """
    names = path.split('/')
    if names[-1] == 'value':  # flax nnx: `conv/kernel/value`
        names.pop()
    return bool(names) and names[-1] in KERNEL_NAMES and len(leaf.shape) >= 2


def rules(*pairs: tuple[str, bool]) -> Rule:
    """A rule from `(regular expression, prunable)` pairs; the first that matches a path wins.

    A path that no pattern matches falls back to `kernels`. Patterns are searched anywhere in the
    path. A misspelt pattern, one that matches no path, is caught by `pick`.
    """
    compiled = [(re.compile(pattern), prunable) for pattern, prunable in pairs]

    def rule(path, leaf):
        for pattern, prunable in compiled:
            if pattern.search(path):
                return prunable
        return kernels(path, leaf)

    rule.patterns = compiled
    return rule


def pick(params: PyTree, rule: Rule = kernels) -> Weights:
    """The prunable leaves of a tree, by path, in sorted order.

    Raises:
      PruneError: nothing matches, a pattern of `rules` matches no leaf, or it is no function.
    """
    if not callable(rule):
        raise PruneError(
            f'prunable must be a function (path, leaf) -> bool, not a {type(rule).__name__}'
        )
    leaves = paths(params)
    names = [path for path, _ in leaves]
    for pattern, _ in getattr(rule, 'patterns', ()):
        if not any(pattern.search(name) for name in names):
            raise PruneError(
                f"pattern '{pattern.pattern}' matches no parameter; there are: {', '.join(names)}"
            )
    chosen = {path: leaf for path, leaf in leaves if rule(path, leaf)}
    if not chosen:
        raise PruneError(
            f'no parameter is prunable under this rule; there are: {", ".join(names) or "none"}'
        )
    return dict(sorted(chosen.items()))


def put(params: PyTree, flat: Weights) -> PyTree:
    """The tree with the leaves named in `flat` replaced.

    Raises:
      PruneError: a path that the tree lacks, or a shape that differs.
    """
    check_fits(params, flat)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: flat.get(_join(path), leaf), params)


def apply_masks(params: PyTree, masks: Masks) -> PyTree:
    """The tree with pruned weights set to exactly zero.

    Args:
      params: any tree of arrays.
      masks: path -> bool array, True = keep; leaves without one stay as they are.

    Raises:
      PruneError: a mask that is not boolean, or fits no leaf.
    """
    check_masks(params, masks)

    def keep(path, leaf):
        mask = masks.get(_join(path))
        return leaf if mask is None else jnp.where(mask, leaf, jnp.zeros_like(leaf))

    return jax.tree_util.tree_map_with_path(keep, params)


def mask_tree(params: PyTree, masks: Masks) -> PyTree:
    """A tree shaped like `params` that holds the masks, and True for leaves without one."""
    check_masks(params, masks)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: masks.get(_join(path), jnp.ones((), bool)), params
    )


def map_moments(
    change: Callable[[str, Any, tuple[int, ...]], Any], opt_state: PyTree, params: PyTree
) -> PyTree:
    """An optimizer's state with what belongs to single parameters changed.

    A moment lies at the path of its parameter in the state and has its shape, perhaps with axes
    before it (L-BFGS remembers several). `optax.flatten` keeps one vector of all weights. This
    holds under `optax.chain`, `optax.masked`, `optax.partition` and other wrappers.

    Args:
      change: `(path, leaf, shape of the parameter) -> leaf`, for every leaf at a parameter's path
        or below it; the leaf may have another shape (novograd's scalars, adafactor's rows and
        columns, sm3's list of one vector per axis).
      opt_state: the state; it is not changed.
      params: all parameters.
    """
    by_keys = dict(jax.tree_util.tree_leaves_with_path(params))
    named = {
        keys: (_join(keys), tuple(jnp.shape(leaf)), jnp.size(leaf))
        for keys, leaf in by_keys.items()
    }
    depths = sorted({len(keys) for keys in named}, reverse=True)
    ends = list(itertools.accumulate(size for *_, size in named.values()))

    def changed(keys: tuple, leaf: Any) -> Any:
        ends_here = range(len(keys), 0, -1)
        parts = (keys[end - depth : end] for end in ends_here for depth in depths if depth <= end)
        part = next((part for part in parts if part in named), None)
        if part is not None:
            return change(named[part][0], leaf, named[part][1])
        if jnp.shape(leaf) != (ends[-1],):
            return leaf
        pieces = zip(named.values(), jnp.split(leaf, ends[:-1]), strict=True)
        made = [change(path, piece.reshape(shape), shape) for (path, shape, _), piece in pieces]
        return jnp.concatenate([piece.ravel() for piece in made])

    return jax.tree_util.tree_map_with_path(changed, opt_state)


def ones(weights: Weights) -> Masks:
    """The masks that keep everything."""
    return {path: jnp.ones(leaf.shape, bool) for path, leaf in weights.items()}


def shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    """Path -> shape, in sorted path order."""
    return {path: tuple(leaf.shape) for path, leaf in sorted(weights.items())}


def check_fits(params: PyTree, flat: Weights) -> None:
    """Raises PruneError where a path of `flat` is not in the tree or its shape differs."""
    found = dict(paths(params))
    for path, leaf in flat.items():
        if path not in found:
            raise PruneError(f'no parameter {quoted(path)}: {nearest(path, found)}')
        if tuple(found[path].shape) != tuple(leaf.shape):
            raise PruneError(
                f"'{path}' has shape {tuple(found[path].shape)}, not {tuple(leaf.shape)}"
            )


def check_masks(params: PyTree, masks: Masks) -> None:
    """`check_fits`, and every mask is boolean: a soft mask would silently count as all True."""
    if not isinstance(masks, Mapping):
        raise PruneError(f'masks must be a dict, path -> bool array, not {shown(masks)}')
    for path, mask in masks.items():
        if not hasattr(mask, 'dtype') or not hasattr(mask, 'shape'):
            raise PruneError(f'the mask of {quoted(path)} must be a bool array, not {shown(mask)}')
    check_fits(params, masks)
    for path, mask in masks.items():
        if mask.dtype != bool:
            raise PruneError(f"the mask of '{path}' must be boolean, not {mask.dtype}")


def check_masks_of(weights: Weights, masks: Masks) -> None:
    """`check_masks`, and every weight has one."""
    check_same_paths('masks', masks, weights)
    check_masks(weights, masks)


def check_same_paths(kind: str, flat: Iterable[str], expected: Iterable[str]) -> None:
    """Raises PruneError unless two path sets are equal; `kind` names the first in the message."""
    flat, expected = set(flat), set(expected)
    if flat != expected:
        missing, surplus = sorted(expected - flat), sorted(flat - expected)
        parts = [f'lack {", ".join(missing)}'] if missing else []
        parts += [f'have unknown {", ".join(surplus)}'] if surplus else []
        raise PruneError(f'{kind} {" and ".join(parts)}')
