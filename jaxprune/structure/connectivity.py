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
- so is a product of two signals: it may depend on either, as long as no constant, such as a causal
  mask, makes the other zero;
- a matrix product with factors that are never negative (softmax, exp) is mixing: open wherever no
  constant closes it, and live where what it mixes is. Hence attention mixes all tokens that its
  constant mask lets it see; query and key weights are active where a score can reach the output;
- a statistic of a tensor (its mean, variance, maximum, norm) subtracted from it, or dividing it, is
  normalisation, and counts as elementwise: batch, layer, group and RMS norm, softmax. What reaches
  the output only through such a statistic does no work;
- pooling is live where any entry of the window is.

Zeros are known where the trace holds the constant that makes them; a mask handed in as an argument
counts as ones.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
    """A prunable leaf, or a mere rearrangement of one or several.

    Attributes:
      kept: float array, 1 where the mask keeps, else 0.
      leaves: their paths.
    """

    kept: jax.Array
    leaves: tuple[str, ...]

    def __str__(self) -> str:
        return ' and '.join(f"'{leaf}'" for leaf in self.leaves)


class Signal(NamedTuple):
    """A value that depends on the input.

    Attributes:
      live: float array, 1 where some input reaches, else 0.
      root: number of the tensor of which this is an elementwise function; tensors of one root are
        live at the same entries.
      of: numbers of the tensors of which this is a statistic.
      inverse: a statistic by whose inverse a tensor is scaled: one over it, or over its root.
      open: never negative, and zero only where `shut` says so.
      shut: bool array, True where a constant makes it zero; None for nowhere.
      low: bool array, True where a constant makes it so negative that `exp` of it is zero; None
        for nowhere.
    """

    live: jax.Array
    root: int
    of: frozenset[int] = frozenset()
    inverse: bool = False
    open: bool = False
    shut: jax.Array | None = None
    low: jax.Array | None = None


@jax.custom_vjp
def binarise(x: jax.Array) -> jax.Array:
    """1 where x > 0, else 0; backwards the same of the cotangent.

    Counts are whole numbers, and some devices round those of a convolution.
    """
    return (x > 0.5).astype(x.dtype)


binarise.defvjp(lambda x: (binarise(x), None), lambda _, ct: ((ct > 0.5).astype(ct.dtype),))


def _opened(signal: Signal) -> jax.Array:
    """1 where an open factor is not shut; backwards the cotangent itself, for it may matter."""
    return lax.stop_gradient(_not(signal.shut, signal.live) - signal.live) + signal.live


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
            Weight(kept[path], (path,)) if path in shapes else Const(leaf=path)
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
_RUN_TIME = _names('cond while')
_RUN_TIME_ADVICE = (
    'what it does is known only when it runs; choose in Python, and write a loop of known length '
    'as a scan'
)
_WINDOWS = _names('reduce_window_sum reduce_window_max reduce_window_min reduce_window')
#: Those that change no number, or only its precision.
SAME = _names(
    'convert_element_type copy copy_p stop_gradient reduce_precision sharding_constraint '
    'mesh_cast reshard pvary'
)
_POSITIVE = _names('exp exp2 logistic')
#: What a statistic may pass through and still be one that normalises.
_OF_STATISTICS = SAME | _names('neg abs log sqrt rsqrt square integer_pow pow')
#: Masks of attention are minus infinity, the smallest number, -1e9 or -1e4 where they shut.
_LOW = -1e4


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
            return [_unary(equation, signals[0], roots)]
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
        with jax.ensure_compile_time_eval():  # numbers, also while something is traced
            out = _bind(equation, *[v.value for v in given])
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


# Zeros that constants make are few and known at the trace: patterns are None almost everywhere.


def _not(pattern: jax.Array | None, like: jax.Array) -> jax.Array:
    """1 where a pattern is False; ones where there is none."""
    return jnp.ones_like(like) if pattern is None else 1 - jnp.asarray(pattern, like.dtype)


def _pattern(found: jax.Array) -> jax.Array | None:
    """None for a pattern that is known to be False everywhere."""
    return found if isinstance(found, jax.core.Tracer) or bool(found.any()) else None


def _some(patterns: Sequence[jax.Array | None], shape, combine=jnp.logical_or) -> Any:
    """Patterns of several arguments, broadcast and combined; None is False everywhere."""
    if all(p is None for p in patterns):
        return None
    with jax.ensure_compile_time_eval():
        each = [jnp.broadcast_to(False if p is None else p, shape) for p in patterns]
        return _pattern(functools.reduce(combine, each))


def _all(patterns: Sequence[jax.Array | None], shape) -> Any:
    return None if any(p is None for p in patterns) else _some(patterns, shape, jnp.logical_and)


def _shifted(pattern: jax.Array | None, equation: JaxprEqn) -> list[Any]:
    """A pattern after the rearrangement that an equation is."""
    if pattern is None:
        return [None] * len(equation.outvars)
    with jax.ensure_compile_time_eval():
        out = _bind(equation, pattern)
        return [_pattern(p) for p in (out if equation.primitive.multiple_results else [out])]


def _zero_stays(equation: JaxprEqn, given: Sequence[Any]) -> jax.Array | bool:
    """Where an elementwise function of one signal and known constants is zero at zero."""
    if not all(isinstance(v, Signal) or v.value is not None for v in given):
        return False
    with jax.ensure_compile_time_eval():
        zeros = [
            jnp.zeros(x.aval.shape, x.aval.dtype) if isinstance(v, Signal) else v.value
            for v, x in zip(given, equation.invars, strict=True)
        ]
        return _bind(equation, *zeros) == 0


def _test(value: Any, test: Callable[[Any], Any], aval) -> jax.Array | None:
    """Where a constant of known numbers passes a test; None where it nowhere does."""
    number = jnp.issubdtype(aval.dtype, jnp.number) or aval.dtype == bool
    if not isinstance(value, Const) or value.value is None or not number:
        return None
    with jax.ensure_compile_time_eval():
        return _pattern(jnp.asarray(test(jnp.asarray(value.value))))


def _rearranged(equation: JaxprEqn, given: list[Any], weights: list[Weight]) -> list[Any]:
    """Weights among themselves and constants, before any input meets them."""
    name, first = equation.primitive.name, weights[0]
    constants = [v for v in given if isinstance(v, Const)]
    leaves = tuple(dict.fromkeys(leaf for w in weights for leaf in w.leaves))
    if name in MOVES and len(given) == 1:
        out = _bind(equation, first.kept)
        outs = out if equation.primitive.multiple_results else [out]
        return [Weight(kept, leaves) for kept in outs]
    if name in SAME or name in ('neg', 'abs'):
        return [first]
    scaled = name == 'mul' or (name == 'div' and given[0] is first)
    if scaled and len(weights) == 1:
        at = next(i for i, v in enumerate(given) if v is constants[0])
        pattern = _open_pattern(given[at], equation.invars[at].aval)
        return [Weight(_fit(first.kept * pattern, equation), leaves)]
    if name in ('dynamic_slice', 'gather') and all(v.value is not None for v in constants):
        places = [v.value for v in constants]
        return [Weight(_bind(equation, first.kept, *places), leaves)]
    if name == 'concatenate' and not constants:
        return [Weight(_bind(equation, *[w.kept for w in weights]), leaves)]
    if name == 'select_n' and isinstance(given[0], Const) and given[0].value is not None:
        cases = [
            v.kept if isinstance(v, Weight) else _open_pattern(v, x.aval)
            for v, x in zip(given[1:], equation.invars[1:], strict=True)
        ]
        return [Weight(_bind(equation, given[0].value, *cases), leaves)]
    if name in _RUN_TIME:
        raise Unknown(_RUN_TIME_ADVICE)
    raise Unknown(
        f'paths through {first._replace(leaves=leaves)} after it are not known; keep it out of the '
        'prunable ones'
    )


def _product(equation: JaxprEqn, a: Any, b: Any, roots: itertools.count) -> Any:
    """A matrix product or a convolution: live where some pair of live factors meets."""
    pair = (a, b)
    signals = [v for v in pair if isinstance(v, Signal)]
    if not signals:
        if all(isinstance(v, Weight) for v in pair):
            raise Unknown(f'the prunable leaves {a} and {b} are multiplied: which is a path?')
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
        live = product(_opened(a), right) if a.open else product(left, _opened(b))
    else:
        live = product(left, _not(b.shut, right)) + product(_not(a.shut, left), right)
    return Signal(binarise(live), next(roots))


def _with_weight(
    equation: JaxprEqn, given: list[Any], signals: list[Signal], roots: itertools.count
) -> Signal:
    """A signal and a weight meet entry by entry."""
    weights = [v for v in given if isinstance(v, Weight)]
    if equation.primitive.name == 'mul' and len(given) == 2:
        return Signal(binarise(_fit(signals[0].live * weights[0].kept, equation)), next(roots))
    raise Unknown(
        f'{weights[0]} is not multiplied with what comes in, so no path runs through it; '
        'leave it out of the prunable ones',
    )


def _unary(equation: JaxprEqn, signal: Signal, roots: itertools.count) -> Signal:
    name = equation.primitive.name
    live, shape = _fit(signal.live, equation), equation.outvars[0].aval.shape
    power = equation.params.get('y', 1) if name == 'integer_pow' else 1
    if name in _POSITIVE:
        if signal.low is None:
            return Signal(live, signal.root, open=True)
        return Signal(live * _not(signal.low, live), next(roots), open=True, shut=signal.low)
    shut = None
    if signal.shut is not None:
        zero = _zero_stays(equation, [signal])
        shut = _some([signal.shut, zero], shape, jnp.logical_and)
    same = name in SAME
    return Signal(
        live,
        signal.root,
        of=signal.of if name in _OF_STATISTICS else frozenset(),
        inverse=name == 'rsqrt' or power < 0 or (same and signal.inverse),
        open=signal.open and same,
        shut=shut,
        low=signal.low if same else None,
    )


def _nary(
    equation: JaxprEqn, given: list[Any], signals: list[Signal], roots: itertools.count
) -> Signal:
    """Elementwise functions of several arguments; see the head of the module."""
    name = equation.primitive.name
    if len(signals) == 1:
        return _with_constants(equation, given, signals[0], roots)
    a, b, shape = signals[0], signals[1], equation.outvars[0].aval.shape
    for whole, statistic in ((a, b), (b, a)):
        if whole.root in statistic.of and (
            (name in ('sub', 'div') and statistic is b) or (name == 'mul' and statistic.inverse)
        ):
            kept = whole.open and statistic.open and name != 'sub'
            low = _lower(whole, statistic, shape) if name == 'sub' else None
            return whole._replace(live=_fit(whole.live, equation), open=kept, low=low)
    lives = [_fit(s.live, equation) for s in signals]
    shuts = [s.shut for s in signals]
    same_root = len({s.root for s in signals}) == 1
    if name == 'mul':
        live = lives[0] * _not(b.shut, lives[1]) + lives[1] * _not(a.shut, lives[0])
        shut = _some(shuts, shape)
    elif name == 'div':
        live = lives[0] + lives[1] * _not(a.shut, lives[0])
        shut = a.shut
    else:
        live = sum(lives)
        zero_stays = name in ('add', 'add_any', 'sub', 'max', 'min')
        shut = _all(shuts, shape) if zero_stays else None
    low = None
    if name in ('add', 'add_any', 'sub'):
        low = _lower(a, b, shape) if name == 'sub' else _some([a.low, b.low], shape)
    return Signal(
        binarise(live),
        a.root if same_root else next(roots),
        of=a.of if len({s.of for s in signals}) == 1 else frozenset(),
        inverse=name == 'mul' and a.inverse and b.inverse,
        open=a.open and b.open and name in ('add', 'mul', 'div', 'max', 'min'),
        shut=shut,
        low=low,
    )


def _lower(a: Signal, b: Signal, shape) -> Any:
    """Where `a - b` is very negative: not where both are, as in a row that is low as a whole."""
    if a.low is None or b.low is None:
        return _some([a.low], shape)
    with jax.ensure_compile_time_eval():
        return _pattern(jnp.broadcast_to(a.low & ~b.low, shape))


def _with_constants(
    equation: JaxprEqn, given: list[Any], signal: Signal, roots: itertools.count
) -> Signal:
    """An elementwise function of one signal and constants."""
    name, leads = equation.primitive.name, given[0] is signal
    live, shape = _fit(signal.live, equation), equation.outvars[0].aval.shape

    def where(test):
        return [_test(v, test, x.aval) for v, x in zip(given, equation.invars, strict=True)]

    zeros = low = None  # entries that the constants alone make zero, or very negative
    if name == 'mul' or (name == 'div' and not leads):
        zeros = _some(where(lambda v: v == 0), shape)
    elif name == 'add' or (name == 'sub' and leads):
        sign = 1 if name == 'add' else -1
        low = _some([signal.low, *where(lambda v: sign * v <= _LOW)], shape)
    scaled = name == 'mul' or (name == 'div' and leads)
    shut = None
    if signal.shut is not None:
        stays = True if scaled else _zero_stays(equation, given)
        shut = _some([signal.shut, stays], shape, jnp.logical_and)
    turned = name == 'div' and not leads
    if name == 'pow' and leads:
        turned = _some(where(lambda v: v >= 0), shape) is None and given[1].value is not None
    return Signal(
        live if zeros is None else live * _not(zeros, live),
        signal.root if zeros is None else next(roots),
        of=signal.of,
        inverse=signal.inverse != turned,
        open=signal.open and name in ('mul', 'div'),
        shut=_some([shut, zeros], shape),
        low=low,
    )


def _moved(equation: JaxprEqn, signal: Signal, roots: itertools.count) -> list[Signal]:
    out = _bind(equation, signal.live)
    shuts, lows = _shifted(signal.shut, equation), _shifted(signal.low, equation)
    if equation.primitive.name in _WHOLE:
        return [signal._replace(live=out, shut=shuts[0], low=lows[0])]
    outs = out if equation.primitive.multiple_results else [out]
    return [
        Signal(live, next(roots), open=signal.open, shut=shut, low=low)
        for live, shut, low in zip(outs, shuts, lows, strict=True)
    ]


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
        axes = tuple(params['axes'])
        sums = name in ('reduce_sum', 'reduce_max', 'reduce_min')
        with jax.ensure_compile_time_eval():
            shut, low = (
                None if p is None or not sums else _pattern(p.all(axes))
                for p in (first.shut, first.low)
            )
        total = binarise(first.live.sum(axis=axes))
        of = first.of | {first.root}
        return Signal(total, next(roots), of, open=first.open and sums, shut=shut, low=low)
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
        return Signal(binarise(total), next(roots))
    if name in ('concatenate', 'pad'):
        joined = [live(v, i) for i, v in enumerate(given)]
        return Signal(_bind(equation, *joined), next(roots), shut=_zeros(equation, given))
    if name == 'select_n':
        return _select(equation, given, live, roots)
    if name in ('dynamic_slice', 'dynamic_update_slice'):
        arrays = 1 if name == 'dynamic_slice' else 2
        starts = given[arrays:]
        if all(isinstance(v, Const) and v.value is not None for v in starts):
            parts = [live(v, i) for i, v in enumerate(given[:arrays])]
            return Signal(_bind(equation, *parts, *[v.value for v in starts]), next(roots))
        raise Unknown('its position is not known before running')
    if name in _RUN_TIME:
        raise Unknown(_RUN_TIME_ADVICE)
    raise Unknown('its effect on paths from input to output is not known')


def _same_everywhere(choice: jax.Array) -> int | None:
    """The one case that a known choice takes, if it is one everywhere."""
    if isinstance(choice, jax.core.Tracer):
        return None
    found = np.unique(choice)
    return int(found[0]) if len(found) == 1 else None


def _zeros(equation: JaxprEqn, given: Sequence[Any], *first: Any) -> Any:
    """Where arguments that a constant makes zero end up, in a join or a known choice."""
    avals = [x.aval for x in equation.invars[len(first) :]]
    patterns = [
        v.shut if isinstance(v, Signal) else _test(v, lambda v: v == 0, aval)
        for v, aval in zip(given, avals, strict=True)
    ]
    return _placed_where(equation, patterns, avals, *first)


def _placed_where(equation: JaxprEqn, patterns: Sequence[Any], avals, *first: Any) -> Any:
    """Patterns moved by an equation that only picks among its arguments."""
    if all(p is None for p in patterns):
        return None
    with jax.ensure_compile_time_eval():
        each = [
            jnp.broadcast_to(False if p is None else p, aval.shape)
            for p, aval in zip(patterns, avals, strict=True)
        ]
        return _pattern(_bind(equation, *first, *each))


def _select(equation: JaxprEqn, given: list[Any], live, roots: itertools.count) -> Signal:
    choice, cases = given[0], given[1:]
    lives = [_fit(live(v, i + 1), equation) for i, v in enumerate(cases)]
    signals = [v for v in cases if isinstance(v, Signal)]
    positive = all(v.open for v in signals)
    if isinstance(choice, Const) and choice.value is not None:
        only = _same_everywhere(choice.value)
        if only is not None and isinstance(cases[only], Signal):
            return cases[only]
        avals = [x.aval for x in equation.invars[1:]]
        lows = [
            v.low if isinstance(v, Signal) else _test(v, lambda v: v <= _LOW, aval)
            for v, aval in zip(cases, avals, strict=True)
        ]
        return Signal(
            _bind(equation, choice.value, *lives),
            next(roots),
            open=positive,
            shut=_zeros(equation, cases, choice.value),
            low=_placed_where(equation, lows, avals, choice.value),
        )
    if isinstance(choice, Signal):
        lives.append(_fit(choice.live, equation))
        signals.append(choice)
    root = signals[0].root if len({s.root for s in signals}) == 1 else next(roots)
    of = signals[0].of if len({s.of for s in signals}) == 1 else frozenset()
    shut = _all([v.shut if isinstance(v, Signal) else None for v in cases], lives[0].shape)
    return Signal(binarise(sum(lives)), root, of, open=positive, shut=shut)


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
