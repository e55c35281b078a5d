"""Checks of what someone hands to `jp.prune`; each error is one line."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import arguments, tree
from jaxprune import problem as problems
from jaxprune.errors import PruneError, first_line, nearest
from jaxprune.plan import Plan
from jaxprune.score.loss import split
from jaxprune.structure import forward_of
from jaxprune.types import GLOBAL, Batch, Batches, Problem, PruneInfo, PyTree, View


def options(given: Iterable[str], known: Iterable[str], keywords: Iterable[str]) -> None:
    """A keyword that is none of the call's own must be an option of the method."""
    for option in given:
        if option not in known:
            tail = nearest(option, [*known, *(k for k in keywords if k != 'options')])
            raise PruneError(f"'{option}' is no argument, nor an option of this method: {tail}")


def types(params, model, model_state, init, loss, masks, random) -> None:
    """Whatever would only fail deep inside, where nobody finds out why."""
    for path, leaf in tree.paths(params):
        if isinstance(leaf, jax.core.Tracer):
            raise PruneError(
                'prune needs numbers: call it outside jit, or see jaxprune.prune_rounds'
            )
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            raise PruneError(
                f"params must hold arrays only, but '{path}' is a {type(leaf).__name__}: split off "
                'the arrays, as by equinox.partition or flax.nnx.split'
            )
    if model_state is not None and not isinstance(model, Problem):
        raise PruneError(
            'model_state= is for a model that is a Problem, see jaxprune.problem_from_flax'
        )
    if model is not None and not callable(model) and not isinstance(model, Problem):
        raise PruneError(
            f'model must be a function (params, x) -> logits or a Problem, not {model!r}'
        )
    forms = {'init': 'key -> params', 'loss': '(logits, y) -> loss'}
    for name, function in (('init', init), ('loss', loss)):
        if function is not None and not callable(function):
            kind = type(function).__name__
            raise PruneError(f'{name} must be a function {forms[name]}, not a {kind}')
    if init is not None:
        fresh = tried('init=', jax.eval_shape, init, jax.random.key(0))
        given = jax.tree.map(lambda leaf: leaf.shape, (fresh, params), is_leaf=None)
        if jax.tree.structure(fresh) != jax.tree.structure(params) or given[0] != given[1]:
            raise PruneError('init= makes other parameters than params')
    if masks is not None and not isinstance(masks, Mapping):
        raise PruneError(f'masks must be a dict, path -> bool array, not a {type(masks).__name__}')
    for path, mask in (masks or {}).items():
        if not hasattr(mask, 'dtype'):
            raise PruneError(f"the mask of '{path}' must be an array, not a {type(mask).__name__}")
    key(random)


def key(given: Any) -> None:
    """A random key, or None."""
    if given is not None and not _is_key(given):
        raise PruneError(f'key must be a random key such as jax.random.key(0), not {given!r}')


def rate(name: str, value: Any) -> None:
    """A learning rate or a weight decay; traced ones are not looked at."""
    number = arguments.real(name, value)
    if not isinstance(number, jax.core.Tracer) and not 0 <= number < math.inf:
        raise PruneError(f'{name} must be 0 or more, not {number:g}')


def step(grads: PyTree, state: Any, params: PyTree, kind: type) -> None:
    """What `update` is called with."""
    if not isinstance(state, kind):
        raise PruneError(
            f'update takes (gradients, state, params), and a state made by init, not a '
            f'{type(state).__name__}'
        )
    if jax.tree.structure(grads) != jax.tree.structure(params):
        have, want = ({path for path, _ in tree.paths(leaves)} for leaves in (grads, params))
        odd = ', '.join(sorted(have ^ want)[:3])
        raise PruneError(f'gradients must be a tree like params: they differ in {odd or "type"}')


def _is_key(key: Any) -> bool:
    dtype = getattr(key, 'dtype', None)
    if dtype is None:
        return False
    plain = jax.random.key_data(jax.random.key(0)).shape  # what jax.random.PRNGKey makes
    shape = () if jnp.issubdtype(dtype, jax.dtypes.prng_key) else plain
    return key.shape == shape and (shape == () or dtype == jnp.uint32)


def weights(prunable: Mapping[str, Any]) -> None:
    """Only floating-point numbers can be scored."""
    for path, leaf in prunable.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise PruneError(f"'{path}' holds {leaf.dtype}: only floating-point weights are pruned")


def batches_of(data: Any, labels: bool) -> Batches | None:
    """Whatever a user passes as data, as batches."""
    if data is None:
        return None
    if _several(data):
        each = [batches_of(tuple(one), labels) for one in data]
        if len({one.x.shape for one in each}) == 1:
            return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *each)
        shapes = {one.x.shape[2:] for one in each}
        if len(shapes) > 1:
            raise PruneError(f'the batches hold examples of different shapes: {sorted(shapes)}')
        return [jax.tree.map(lambda leaf: leaf[0], one) for one in each]
    if isinstance(data, Batch):
        x = _array('x', data.x)
        y = np.zeros(x.shape[:2], np.int32) if data.y is None else _array('y', data.y)
        if data.y is None and labels:
            raise PruneError('this method needs labels: pass Batch(x, y)')
        if min(x.ndim, y.ndim) < 2 or x.shape[:2] != y.shape[:2]:
            raise PruneError(
                'a Batch holds several batches, leaves (batches, batch, ...), not '
                f'x {x.shape} and y {y.shape}: one batch is a pair (x, y)'
            )
        if 0 in x.shape[:2]:
            raise PruneError('data holds no example')
        return Batch(x, jnp.asarray(y))
    if isinstance(data, (tuple, list)):
        if len(data) != 2:
            raise PruneError(f'data must be a pair (x, y), not {len(data)} values')
        x, y = data
    else:
        x, y = data, None
    x = _array('x', x)
    if not x.ndim or not x.shape[0]:
        raise PruneError('data holds no example')
    if y is None:
        if labels:
            raise PruneError('this method needs labels: pass data=(x, y)')
        y = np.zeros(x.shape[0], np.int32)
    y = _array('y', y)
    if y.shape[:1] != x.shape[:1]:
        raise PruneError(f'data holds {x.shape[0]} inputs, but {y.shape[:1]} labels')
    return Batch(x[None], y[None])


def _several(data: Any) -> bool:
    """Is it a list of batches, pairs (x, y) or `Batch` each, rather than one pair?"""
    return (
        isinstance(data, (list, tuple))
        and not isinstance(data, Batch)
        and bool(data)
        and all(isinstance(one, tuple) and len(one) == 2 for one in data)
    )


def _array(name: str, value: Any) -> jax.Array:
    """What is or can be an array of numbers."""
    if hasattr(value, '__array__') or isinstance(value, list):
        try:
            return jnp.asarray(value)
        except (TypeError, ValueError) as error:
            raise PruneError(f'data: {name} is no array of numbers: {first_line(error)}') from None
    raise PruneError(
        f'data must be a pair of arrays (x, y), a Batch or an array x, not a {type(value).__name__}'
    )


def model(net: Problem, view: View, batches: Batches, labels: bool) -> None:
    """Runs the model on shapes alone, and checks the labels where the loss takes classes."""
    separate = split(batches)
    x, y = (jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in separate[0])

    logits = tried(
        f'the model on inputs {x.shape}',
        jax.eval_shape,
        forward_of(net),
        view.params,
        x,
        view.model_state,
    )
    if not hasattr(logits, 'dtype') or not jnp.issubdtype(logits.dtype, jnp.floating):
        made = getattr(logits, 'dtype', type(logits).__name__)
        raise PruneError(f'the model must return one float array, its logits, not {made}')
    if not labels:
        return
    classes = net.loss is problems.cross_entropy
    if classes:
        if logits.ndim != 2 or logits.shape[0] != x.shape[0]:
            raise PruneError(
                f'cross-entropy takes logits ({x.shape[0]}, classes), not {logits.shape}'
            )
        if y.ndim != 1 or not jnp.issubdtype(y.dtype, jnp.integer):
            raise PruneError(
                f'labels must be whole numbers, one per example, not {y.dtype} of {y.shape}; '
                'other targets need loss='
            )
        least = min(int(batch.y.min()) for batch in separate)
        largest = max(int(batch.y.max()) for batch in separate)
        if least < 0 or largest >= logits.shape[1]:
            raise PruneError(
                f'labels go from {least} to {largest}, but the model has {logits.shape[1]} '
                f'classes, 0 to {logits.shape[1] - 1}'
            )
    losses = tried('the loss', jax.eval_shape, net.loss, logits, y)
    if getattr(losses, 'shape', None) != x.shape[:1]:
        made = getattr(losses, 'shape', type(losses).__name__)
        raise PruneError(f'the loss must be one number per example, {x.shape[:1]}, not {made}')


def tried(what: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """The result of something that calls someone's code, or its failure in one line."""
    try:
        return function(*args, **kwargs)
    except PruneError:
        raise
    except Exception as error:  # anything may come
        stateless = 'ScopeCollection' in type(error).__name__ or 'batch_stats' in str(error)
        hint = ' (does it need model_state=?)' if stateless else ''
        raise PruneError(
            f'{what} fails: {type(error).__name__}: {first_line(error)}{hint}'
        ) from error


def kept(counts: Mapping[str, int], plan: Plan, what: str) -> None:
    """Masks in force may leave less than a density, or its share of a layer, asks for.

    Args:
      counts: layer -> how much is kept.
      what: is counted, for the message.
    """
    for path, column in plan.counts.items():
        # A count of '*' is one of all leaves together.
        left = sum(count for p, count in counts.items() if path in (p, GLOBAL))
        if left < column[-1]:
            where = '' if path == GLOBAL else f" of '{path}'"
            raise PruneError(f'masks leave only {left} {what}{where}, {column[-1]} are asked for')


def scores(info: PruneInfo, name: str, number: int) -> None:
    """Scores of a round that cannot be ranked."""
    if int(info.nonfinite):
        raise PruneError(f"{int(info.nonfinite):,} scores of '{name}' were NaN or infinite")
    if number == 0 and not int(info.nonzero):
        raise PruneError(f"all scores of '{name}' are zero: there is nothing to rank by")
