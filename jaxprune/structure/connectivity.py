"""Which kept weights do any work: those on a path from input to output made of kept weights.

Read off the traced forward function, with Boolean arithmetic on zeros and ones: a weight is
active if, at some place where it is used, its input can be reached from the network's input and
its output can reach the network's output (Vysogorets & Kempe, arXiv:2107.02306, where weights cut
off on either side are called inactivated). One forward and one backward pass of one example; every
intermediate is cut back to zero or one, so nothing overflows at any depth.

What an operation means for paths:

- constants, biases and normalisation parameters carry no input, so no path starts there; frozen
  kernels, which no mask can touch, are open everywhere;
- activations and other elementwise functions pass liveness on; a sum is live where a term is;
- so is a product of two signals (it may depend on either), unless one of them is always positive
  (sigmoid, exp, softmax): such a gate is open, and matters where what it gates is live;
- hence attention mixes all tokens; query and key weights are active where a score can reach the
  output;
- a statistic of a tensor (its mean, variance, maximum) subtracted from it, or scaling it, is
  normalisation, and counts as elementwise: batch, layer, group and RMS norm, softmax;
- pooling is live where any entry of the window is.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from jaxprune import tree
from jaxprune.errors import PruneError
from jaxprune.structure.walk import Unknown, trace, walk
from jaxprune.types import Masks, PyTree
from jaxprune.types import Rule as PrunableRule


class Const(NamedTuple):
    """A value that no input reaches.

    Attributes:
      value: the array, where the trace holds it; None for parameters and what is made of them.
      leaf: path of the parameter it is a mere reshaping of, if any.
    """

    value: Any = None
    leaf: str | None = None


class Weight(NamedTuple):
    """A prunable leaf, or a mere rearrangement of one.

    Attributes:
      kept: float array, 1 where the mask keeps, else 0.
      leaf: its path.
    """

    kept: jax.Array
    leaf: str


class Signal(NamedTuple):
    """A value that depends on the input.

    Attributes:
      live: float array, 1 where some input reaches, else 0.
      root: number of the tensor of which this is an elementwise function.
      of: numbers of the tensors of which this is a statistic.
      open: always positive, so a factor of this kind lets everything through.
    """

    live: jax.Array
    root: int
    of: frozenset[int] = frozenset()
    open: bool = False


@jax.custom_vjp
def binarise(x: jax.Array) -> jax.Array:
    """1 where x > 0, else 0; backwards the same of the cotangent.

    Counts are whole numbers, and some devices round those of a convolution.
    """
    return (x > 0.5).astype(x.dtype)


binarise.defvjp(lambda x: (binarise(x), None), lambda _, ct: ((ct > 0.5).astype(ct.dtype),))


@jax.custom_vjp
def _opened(x: jax.Array) -> jax.Array:
    """Ones; backwards the cotangent itself: an open gate that still may matter."""
    return jnp.ones_like(x)


_opened.defvjp(lambda x: (jnp.ones_like(x), None), lambda _, ct: (ct,))

Connect = Callable[[Masks], Masks]


def connectivity(
    forward: Callable[..., PyTree],
    params: PyTree,
    x: PyTree,
    *constants: PyTree,
    prunable: PrunableRule = tree.kernels,
) -> Connect:
    """Traces a forward function once; returns `masks -> effective masks`.

    The result is a pure function for `jit` and for `vmap` over masks: it keeps of each mask the
    weights on a path from input to output. It is idempotent, monotone and never adds a weight;
    values of parameters and data do not matter, every input entry counts as live. In convolutions
    it is exact in space: a kernel entry that only ever meets padding is inactive, so even the
    dense masks may lose some weights on small feature maps.

    Args:
      forward: `(params, x, *constants) -> outputs`, the network in evaluation mode. Every output
        counts.
      params: parameters, arrays or `jax.ShapeDtypeStruct`.
      x: one example with its batch axis of 1, arrays or shapes (a larger batch costs more and
        says the same).
      constants: further arguments that no input reaches, such as batch statistics.
      prunable: which leaves have masks.

    Raises:
      PruneError: an operation whose effect on paths is not known, by name and place; or, when
        called, masks that do not fit.
    """
    traced = trace(forward, params, x, *constants)
    shapes = tree.shapes(tree.pick(params, prunable))
    arguments = traced.jaxpr.in_avals

    def total(kept: dict[str, jax.Array]) -> jax.Array:
        roots = itertools.count()
        args: list[Any] = [
            Weight(kept[path], path) if path in shapes else Const(leaf=path)
            for path in traced.paths
        ]
        args += [
            Signal(jnp.ones(aval.shape, jnp.float32), next(roots))
            for aval in arguments[len(traced.paths) :][: traced.inputs]
        ]
        args += [Const()] * traced.constants
        outputs = walk(traced.jaxpr, args, liveness(roots), Const)
        return sum((out.live.sum() for out in outputs if isinstance(out, Signal)), jnp.zeros(()))

    def connect(masks: Masks) -> Masks:
        tree.check_same_paths('masks', masks, shapes)
        for path, mask in masks.items():
            if tuple(mask.shape) != shapes[path] or mask.dtype != bool:
                raise PruneError(
                    f"the mask of '{path}' must be boolean of shape {shapes[path]}, not "
                    f'{mask.dtype} of {tuple(mask.shape)}'
                )
        ones = {path: mask.astype(jnp.float32) for path, mask in masks.items()}
        uses = jax.grad(total)(ones)
        return {path: mask & (uses[path] > 0.5) for path, mask in sorted(masks.items())}

    # An unknown operation is told now, not at the first call inside someone's jit.
    jax.eval_shape(total, {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in shapes.items()})
    return connect


# --- the rules --------------------------------------------------------------------------------


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_UNARY = _names(
    'abs neg sign floor ceil round exp exp2 expm1 log log1p sqrt rsqrt cbrt square integer_pow '
    'logistic tanh sin cos tan asin acos atan sinh cosh asinh acosh atanh erf erfc erf_inv lgamma '
    'digamma is_finite not real imag convert_element_type reduce_precision stop_gradient copy '
    'copy_p sharding_constraint mesh_cast reshard pvary population_count clz bitcast_convert_type'
)
_NARY = _names(
    'add sub mul div rem max min pow atan2 nextafter add_any and or xor eq ne lt le gt ge '
    'shift_left shift_right_logical shift_right_arithmetic clamp'
)
#: Rearrangements: each output entry is one input entry. With these, liveness moves as numbers do.
_WHOLE = _names('reshape transpose broadcast_in_dim squeeze expand_dims rev')
#: Those after which a tensor is no longer the whole of what it was.
_PARTS = _names('slice split')
MOVES = _WHOLE | _PARTS
_REDUCTIONS = _names(
    'reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin'
)
_CUMULATIVE = _names('cumsum cumprod cummax cummin cumlogsumexp')
_WINDOWS = _names('reduce_window_sum reduce_window_max reduce_window_min reduce_window')
#: Those that change no number, or only its precision.
SAME = _names(
    'convert_element_type copy copy_p stop_gradient reduce_precision sharding_constraint '
    'mesh_cast reshard pvary'
)
_POSITIVE = _names('exp exp2 logistic')


def liveness(roots: itertools.count) -> Callable[[JaxprEqn, list[Any]], Sequence[Any]]:
    """The rule for `walk` that carries `Const`, `Weight` and `Signal` values.

    Args:
      roots: gives every new tensor its number.
    """

    def rule(equation: JaxprEqn, given: list[Any]) -> Sequence[Any]:
        name = equation.primitive.name
        signals = [v for v in given if isinstance(v, Signal)]
        weights = [v for v in given if isinstance(v, Weight)]
        if not signals and not weights:
            return _constants(equation, given)
        if name in ('dot_general', 'conv_general_dilated'):
            return [_product(equation, *given, roots)]
        if not signals:
            return _rearranged(equation, given, weights)
        if name == 'gather':
            return [_gather(equation, *given, roots)]
        if weights:
            return [_with_weight(equation, given, signals, roots)]
        if name == 'optimization_barrier':
            return given
        if name in _UNARY:
            return [_unary(equation, signals[0])]
        if name in _NARY:
            return [_nary(equation, given, signals, roots)]
        if name in MOVES:
            return _moved(equation, signals[0], roots)
        return [_other(equation, given, roots)]

    return rule


def _constants(equation: JaxprEqn, given: Sequence[Const]) -> list[Const]:
    """What no input reaches stays so; computed where its parts are at hand."""
    name = equation.primitive.name
    if name in MOVES and len(given) == 1 and given[0].leaf:
        return [Const(leaf=given[0].leaf)] * len(equation.outvars)
    size = sum(math.prod(getattr(v.aval, 'shape', ())) for v in equation.outvars)
    # A large constant would only sit in memory: what rules read are indices and small masks.
    if all(v.value is not None for v in given) and size <= 2**22 and not equation.effects:
        out = equation.primitive.bind(*[v.value for v in given], **equation.params)
        return [Const(v) for v in (out if equation.primitive.multiple_results else [out])]
    return [Const()] * len(equation.outvars)


def _bind(equation: JaxprEqn, *arrays: jax.Array) -> Any:
    return equation.primitive.bind(*arrays, **equation.params)


def _fit(live: jax.Array, equation: JaxprEqn) -> jax.Array:
    return jnp.broadcast_to(live, equation.outvars[0].aval.shape)


def _open_pattern(const: Const, aval) -> jax.Array:
    """1 where a constant factor is not zero, as far as is known."""
    number = jnp.issubdtype(aval.dtype, jnp.number) or aval.dtype == bool
    if const.value is None or not number:
        return jnp.ones(aval.shape, jnp.float32)
    return (jnp.asarray(const.value) != 0).astype(jnp.float32)


def _rearranged(equation: JaxprEqn, given: list[Any], weights: list[Weight]) -> list[Any]:
    """Weights among themselves and constants, before any input meets them."""
    name, first = equation.primitive.name, weights[0]
    constants = [v for v in given if isinstance(v, Const)]
    if name in MOVES and len(given) == 1:
        out = _bind(equation, first.kept)
        outs = out if equation.primitive.multiple_results else [out]
        return [Weight(kept, first.leaf) for kept in outs]
    if name in SAME or name in ('neg', 'abs'):
        return [first]
    scaled = name == 'mul' or (name == 'div' and given[0] is first)
    if scaled and len(weights) == 1:
        at = next(i for i, v in enumerate(given) if v is constants[0])
        pattern = _open_pattern(given[at], equation.invars[at].aval)
        return [Weight(_fit(first.kept * pattern, equation), first.leaf)]
    if name in ('dynamic_slice', 'gather') and all(v.value is not None for v in constants):
        places = [v.value for v in constants]
        return [Weight(_bind(equation, first.kept, *places), first.leaf)]
    if name == 'concatenate' and not constants:
        return [Weight(_bind(equation, *[w.kept for w in weights]), first.leaf)]
    leaves = ', '.join(f"'{w.leaf}'" for w in weights)
    raise Unknown(
        f'paths through {leaves} after it are not known; keep it out of the prunable ones'
    )


def _product(equation: JaxprEqn, a: Any, b: Any, roots: itertools.count) -> Any:
    """A matrix product or a convolution: live where some pair of live factors meets."""
    pair = (a, b)
    signals = [v for v in pair if isinstance(v, Signal)]
    if not signals:
        if all(isinstance(v, Weight) for v in pair):
            leaves = f"'{a.leaf}' and '{b.leaf}'"
            raise Unknown(f'the prunable leaves {leaves} are multiplied: which is a path?')
        return Const()
    params = {**equation.params, 'preferred_element_type': None}

    def product(left, right):
        return equation.primitive.bind(left, right, **params)

    def factor(value, aval):
        if isinstance(value, Signal):
            return value.live
        return value.kept if isinstance(value, Weight) else _open_pattern(value, aval)

    left, right = (factor(v, x.aval) for v, x in zip(pair, equation.invars, strict=True))
    if len(signals) < 2:
        live = product(left, right)
    elif a.open != b.open:  # attention: the mixing is open, what it mixes need not be
        live = product(_opened(left), right) if a.open else product(left, _opened(right))
    else:
        live = product(left, jnp.ones_like(right)) + product(jnp.ones_like(left), right)
    return Signal(binarise(live), next(roots))


def _with_weight(
    equation: JaxprEqn, given: list[Any], signals: list[Signal], roots: itertools.count
) -> Signal:
    """A signal and a weight meet entry by entry."""
    weights = [v for v in given if isinstance(v, Weight)]
    if equation.primitive.name == 'mul' and len(given) == 2:
        return Signal(binarise(_fit(signals[0].live * weights[0].kept, equation)), next(roots))
    raise Unknown(
        f"'{weights[0].leaf}' is not multiplied with what comes in, so no path runs through it; "
        'leave it out of the prunable ones',
    )


def _unary(equation: JaxprEqn, signal: Signal) -> Signal:
    name = equation.primitive.name
    kept_open = signal.open and name in SAME
    return signal._replace(live=_fit(signal.live, equation), open=name in _POSITIVE or kept_open)


def _nary(
    equation: JaxprEqn, given: list[Any], signals: list[Signal], roots: itertools.count
) -> Signal:
    """Elementwise functions of several arguments; see the head of the module."""
    name = equation.primitive.name
    if len(signals) == 1:
        signal, live = signals[0], _fit(signals[0].live, equation)
        if name == 'mul':
            at = next(i for i, v in enumerate(given) if isinstance(v, Const))
            live = live * _open_pattern(given[at], equation.invars[at].aval)
        scaled = (name in ('mul', 'div') and given[-1] is not signal) or name == 'mul'
        return signal._replace(live=live, open=signal.open and scaled)
    a, b = signals[0], signals[1]
    if name in ('sub', 'mul', 'div') and (a.root in b.of or (name == 'mul' and b.root in a.of)):
        whole = a if a.root in b.of else b
        return whole._replace(
            live=_fit(whole.live, equation), open=a.open and b.open and name != 'sub'
        )
    both_open = all(s.open for s in signals) and name in ('add', 'mul', 'div', 'max', 'min')
    if name in ('mul', 'div') and a.open != b.open and (name == 'mul' or b.open):
        gate, gated = (a, b) if a.open else (b, a)
        live = _opened(_fit(gate.live, equation)) * _fit(gated.live, equation)
        return Signal(live, a.root if a.root == b.root else next(roots))
    live = binarise(sum(_fit(s.live, equation) for s in signals))
    same_root = len({s.root for s in signals}) == 1
    same_of = signals[0].of if len({s.of for s in signals}) == 1 else frozenset()
    return Signal(live, a.root if same_root else next(roots), same_of, both_open)


def _moved(equation: JaxprEqn, signal: Signal, roots: itertools.count) -> list[Signal]:
    out = _bind(equation, signal.live)
    if equation.primitive.name in _WHOLE:
        return [signal._replace(live=out)]
    outs = out if equation.primitive.multiple_results else [out]
    return [Signal(live, next(roots), open=signal.open) for live in outs]


def _other(equation: JaxprEqn, given: list[Any], roots: itertools.count) -> Signal:
    """Reductions, windows, joins and choices."""
    name, params = equation.primitive.name, equation.params

    def live(value, place):
        """Liveness of one argument; constants are dead."""
        if isinstance(value, Signal):
            return value.live
        return jnp.zeros(equation.invars[place].aval.shape, jnp.float32)

    first = given[0]
    if name in _REDUCTIONS:
        total = binarise(first.live.sum(axis=tuple(params['axes'])))
        of = first.of | {first.root}
        positive = first.open and name in ('reduce_sum', 'reduce_max', 'reduce_min', 'reduce_prod')
        return Signal(total, next(roots), of, positive)
    if name in _CUMULATIVE:
        total = lax.cumsum(first.live, params['axis'], params['reverse'])
        return Signal(binarise(total), next(roots))
    if name in _WINDOWS and sum(isinstance(v, Signal) for v in given) == 1:
        total = lax.reduce_window_sum_p.bind(
            first.live,
            **{
                key: tuple(params[key])
                for key in (
                    'window_dimensions',
                    'window_strides',
                    'padding',
                    'base_dilation',
                    'window_dilation',
                )
            },
        )
        return Signal(binarise(total), next(roots), open=first.open)
    if name == 'concatenate':
        joined = _bind(equation, *[live(v, i) for i, v in enumerate(given)])
        return Signal(joined, next(roots))
    if name == 'pad':
        padded = lax.pad(live(first, 0), jnp.float32(0), params['padding_config'])
        return Signal(padded, next(roots))
    if name == 'select_n':
        return _select(equation, given, live, roots)
    if name in ('dynamic_slice', 'dynamic_update_slice'):
        arrays = 1 if name == 'dynamic_slice' else 2
        starts = given[arrays:]
        if all(isinstance(v, Const) and v.value is not None for v in starts):
            parts = [live(v, i) for i, v in enumerate(given[:arrays])]
            return Signal(_bind(equation, *parts, *[v.value for v in starts]), next(roots))
        raise Unknown('its position is not known before running')
    raise Unknown('its effect on paths from input to output is not known')


def _select(equation: JaxprEqn, given: list[Any], live, roots: itertools.count) -> Signal:
    choice, cases = given[0], given[1:]
    lives = [_fit(live(v, i + 1), equation) for i, v in enumerate(cases)]
    signals = [v for v in given if isinstance(v, Signal)]
    root = signals[0].root if len({s.root for s in signals}) == 1 else next(roots)
    of = signals[0].of if len({s.of for s in signals}) == 1 else frozenset()
    positive = all(v.open for v in cases if isinstance(v, Signal))
    if isinstance(choice, Const) and choice.value is not None:
        return Signal(_bind(equation, choice.value, *lives), root, of, positive)
    if isinstance(choice, Signal):
        lives.append(_fit(choice.live, equation))
    return Signal(binarise(sum(lives)), root, of, positive)


def _gather(equation: JaxprEqn, operand: Any, indices: Any, roots: itertools.count) -> Any:
    """Indexing: by known places, or an embedding looked up by the input."""
    params = equation.params
    if isinstance(indices, Const) and indices.value is not None and isinstance(operand, Signal):
        filled = {**params, 'fill_value': 0}
        return Signal(equation.primitive.bind(operand.live, indices.value, **filled), next(roots))
    if isinstance(indices, Signal) and isinstance(operand, Const):
        reached = binarise(indices.live.sum())  # a table of constants, read where the input says
        return Signal(jnp.broadcast_to(reached, equation.outvars[0].aval.shape), next(roots))
    if isinstance(indices, Signal) and isinstance(operand, Weight):
        dims, table = params['dimension_numbers'], operand.kept
        rows_of_axis_0 = (
            tuple(dims.start_index_map) == (0,)
            and tuple(dims.collapsed_slice_dims) == (0,)
            and tuple(params['slice_sizes'])[1:] == table.shape[1:]
        )
        if rows_of_axis_0:
            # Any row may be asked for: an entry of the embedding is live if some row keeps it.
            any_row = binarise(table.sum(axis=0)) * binarise(indices.live.sum())
            shape = equation.outvars[0].aval.shape
            return Signal(
                binarise(lax.broadcast_in_dim(any_row, shape, tuple(dims.offset_dims))),
                next(roots),
            )
    raise Unknown('only indexing by known places and embedding look-ups are understood')
