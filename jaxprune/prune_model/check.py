"""Checks of what someone hands to `jp.prune`, each told in one line."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import problem as problems
from jaxprune import tree
from jaxprune.errors import PruneError, first_line, nearest
from jaxprune.plan import Plan
from jaxprune.types import GLOBAL, Batch, Masks, Problem, PruneInfo, View


def options(given: Iterable[str], known: Iterable[str], keywords: Iterable[str]) -> None:
    """A keyword that is none of the call's own must be an option of the method."""
    for option in given:
        if option not in known:
            tail = nearest(option, [*known, *(k for k in keywords if k != 'options')])
            raise PruneError(f"'{option}' is no argument, nor an option of this method: {tail}")


def types(params, model, loss, prunable, masks, key) -> None:
    """Whatever would only fail deep inside, where nobody finds out why."""
    for path, leaf in tree.paths(params):
        if not hasattr(leaf, 'dtype'):
            raise PruneError(
                f"params must hold arrays only, but '{path}' is a {type(leaf).__name__}: split off "
                'the arrays, as by equinox.partition or flax.nnx.split'
            )
    if model is not None and not callable(model) and not isinstance(model, Problem):
        raise PruneError(
            f'model must be a function (params, x) -> logits or a Problem, not {model!r}'
        )
    for name, function in (('loss', loss), ('prunable', prunable)):
        if function is not None and not callable(function):
            form = '(logits, y) -> loss' if name == 'loss' else '(path, leaf) -> bool'
            raise PruneError(f'{name} must be a function {form}, not a {type(function).__name__}')
    if masks is not None and not isinstance(masks, Mapping):
        raise PruneError(f'masks must be a dict, path -> bool array, not a {type(masks).__name__}')
    for path, mask in (masks or {}).items():
        if not hasattr(mask, 'dtype'):
            raise PruneError(f"the mask of '{path}' must be an array, not a {type(mask).__name__}")
    if key is not None and not _is_key(key):
        raise PruneError(f'key must be a random key such as jax.random.key(0), not {key!r}')


def _is_key(key: Any) -> bool:
    dtype = getattr(key, 'dtype', None)
    if dtype is None:
        return False
    raw = dtype == jnp.uint32 and key.shape == (2,)
    return raw or (jnp.issubdtype(dtype, jax.dtypes.prng_key) and key.shape == ())


def batches_of(data: Any, labels: bool) -> Batch | None:
    """Whatever a user passes as data, as batches with leaves `(batches, batch, ...)`."""
    if data is None:
        return None
    if isinstance(data, Batch):
        if min(jnp.ndim(data.x), jnp.ndim(data.y)) < 2 or data.x.shape[:2] != data.y.shape[:2]:
            raise PruneError(
                'a Batch holds several batches, leaves (batches, batch, ...), not '
                f'x {jnp.shape(data.x)} and y {jnp.shape(data.y)}: one batch is a pair (x, y)'
            )
        return data
    if isinstance(data, (tuple, list)):
        if len(data) != 2:
            raise PruneError(f'data must be a pair (x, y), not {len(data)} values')
        x, y = data
    else:
        x, y = data, None
    for value in (x, y):
        if value is not None and not hasattr(value, '__array__') and not isinstance(value, list):
            raise PruneError(
                f'data must be a pair of arrays (x, y), a Batch or an array x, not a '
                f'{type(value).__name__}'
            )
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


def model(net: Problem, view: View, batches: Batch, labels: bool) -> None:
    """Runs the model on shapes alone, and looks at the labels where the loss takes classes."""
    x, y = (jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in (batches.x, batches.y))

    def outputs(params, model_state, x):
        return net.apply(params, model_state, x, train=False, key=None)[0]

    logits = _tried(f'the model on inputs {x.shape}', outputs, view.frozen, view.model_state, x)
    if not hasattr(logits, 'dtype') or not jnp.issubdtype(logits.dtype, jnp.floating):
        made = getattr(logits, 'dtype', type(logits).__name__)
        raise PruneError(f'the model must return one float array, its logits, not {made}')
    if not labels:
        return
    classes = net.loss is problems.cross_entropy
    if classes:
        if logits.ndim != 2:
            raise PruneError(f'cross-entropy takes logits (batch, classes), not {logits.shape}')
        if y.ndim != 1 or not jnp.issubdtype(y.dtype, jnp.integer):
            raise PruneError(
                f'labels must be whole numbers, one per example, not {y.dtype} of {y.shape}; '
                'other targets need loss='
            )
        least, largest = int(batches.y.min()), int(batches.y.max())
        if least < 0 or largest >= logits.shape[1]:
            raise PruneError(
                f'labels go from {least} to {largest}, but the model tells {logits.shape[1]} '
                f'classes apart, 0 to {logits.shape[1] - 1}'
            )
    losses = _tried('the loss', net.loss, logits, y)
    if getattr(losses, 'shape', None) != x.shape[:1]:
        raise PruneError(f'the loss must be one number per example, {x.shape[:1]}, not {losses}')


def _tried(what: str, function: Callable, *args: Any) -> Any:
    """The abstract result of someone's function, or its failure in one line."""
    try:
        return jax.eval_shape(function, *args)
    except PruneError:
        raise
    except Exception as error:  # it is their code: anything may come
        raise PruneError(f'{what} fails: {type(error).__name__}: {first_line(error)}') from error


def kept(masks: Masks, plan: Plan) -> None:
    """Masks in force may leave fewer weights than a density, or its share of a layer, asks for."""
    for path, column in plan.counts.items():
        left = sum(int(m.sum()) for p, m in masks.items() if path in (p, GLOBAL))
        if left < column[-1]:
            where = '' if path == GLOBAL else f" of '{path}'"
            raise PruneError(f'masks leave only {left} weights{where}, {column[-1]} are asked for')


def scores(info: PruneInfo, name: str, number: int) -> None:
    """Scores of a round that cannot be ranked."""
    if int(info.nonfinite):
        raise PruneError(f"{int(info.nonfinite):,} scores of '{name}' were NaN or infinite")
    if number == 0 and not int(info.nonzero):
        raise PruneError(f"all scores of '{name}' are zero: there is nothing to rank by")
