"""Floating point with a wider range: every array carries a power of two of its own.

Products over many layers leave float32: twenty layers of width 1000 overflow, a hundred of width
ten may vanish. Here a function is traced and its operations are carried out on pairs
`array * 2**exponent`, the array brought back to an ordinary magnitude after every product. Scaling
by powers of two is exact, so where the plain computation stays in range the numbers are the same.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var

from jaxprune.jaxpr import bind, interpret
from jaxprune.types import PyTree

#: The exponent of zero, so low that zero never decides to which exponent others are aligned; and
#: of infinities, which are the same at every exponent as well.
ZERO = -(2**28)


class Scaled(NamedTuple):
    """The number `array * 2**exponent`.

    Attributes:
      array: of any shape.
      exponent: int32 scalar, or the Python integer `ZERO` for what is zero or infinite already
        when the function is traced.
      normal: whether the largest magnitude of the array is known to be in [2, 4), or 0.
    """

    array: jax.Array
    exponent: Any
    normal: bool = False


#: The number is moved, not changed.
_MOVES = frozenset(
    {'reshape', 'transpose', 'broadcast_in_dim', 'squeeze', 'expand_dims', 'rev', 'copy', 'neg'}
    | {'abs', 'pvary', 'sharding_constraint'}
)
#: The result scales with the first operand; the others are integers, or not looked at.
_KEEPS = _MOVES | {
    *('slice', 'dynamic_slice', 'gather', 'split', 'reduce_sum', 'reduce_max', 'reduce_min'),
    *('reduce_window_sum', 'reduce_window_max', 'reduce_window_min', 'cumsum', 'cummax', 'cummin'),
    'select_and_scatter_add',
}
#: All floating-point operands must have one exponent, which the result has too.
_ALIGNS = frozenset(
    {'add', 'add_any', 'sub', 'max', 'min', 'clamp', 'select_n', 'concatenate', 'pad'}
    | {'dynamic_update_slice', 'scatter', 'scatter-add'}
)
_COMPARES = frozenset({'eq', 'ne', 'lt', 'le', 'gt', 'ge'})
_MULTIPLIES = frozenset({'mul', 'dot_general', 'conv_general_dilated'})
#: The same for a number and any positive multiple of it.
_SCALELESS = frozenset({'sign', 'is_finite', 'argmax', 'argmin'})


def evaluate(fn: Callable[..., PyTree], scaled: PyTree, *plain: PyTree) -> PyTree:
    """`fn(scaled, *plain)` in scaled numbers.

    Known are the operations of ordinary networks and of their gradients. Any other (exp, a loop)
    is computed as written, on plain arrays, and so within the range of its type.

    Args:
      fn: a function of arrays.
      scaled: tree of `Scaled`, passed as the arrays they stand for.
      plain: further arguments, trees of arrays.

    Returns:
      What `fn` returns, with `Scaled` in place of arrays.
    """
    arrays = jax.tree.map(lambda s: s.array, scaled, is_leaf=_is_scaled)
    jaxpr, shape = jax.make_jaxpr(fn, return_shape=True)(arrays, *plain)
    args = [*jax.tree.leaves(scaled, is_leaf=_is_scaled), *jax.tree.leaves(plain)]
    outputs = interpret(jaxpr, args, _rule, _constant, scan=_scan_as_written)
    return jax.tree.unflatten(jax.tree.structure(shape), [_number(v) for v in outputs])


def normalise(array: jax.Array) -> Scaled:
    """The array as a scaled number with its largest magnitude in [2, 4)."""
    return _normal(Scaled(array, jnp.int32(0)))


def product(a: Scaled, b: Scaled) -> Scaled:
    """The elementwise product."""
    return _normal(Scaled(a.array * b.array, _add(a.exponent, b.exponent)))


def common(numbers: dict[str, Scaled]) -> dict[str, jax.Array]:
    """The numbers as plain arrays, all multiplied by one power of two.

    That power is 1 where the largest number lies well inside the range of its type (for float32
    from 2**-32 to 2**64), and else brings it to the nearer end of that interval. What the type
    cannot hold beside it becomes zero.
    """
    numbers = {path: _normal(number) for path, number in numbers.items()}
    top = 1 + _largest_exponent(numbers.values())  # of the leading bit
    limit = min(jnp.finfo(number.array.dtype).maxexp for number in numbers.values())
    power = jnp.clip(top, -limit // 4, limit // 2) - top
    return {
        path: n.array * _two_to(n.exponent + power, n.array.dtype) for path, n in numbers.items()
    }


def _is_scaled(value: Any) -> bool:
    return isinstance(value, Scaled)


def _is_zero(number: Scaled) -> bool:
    return isinstance(number.exponent, int)


def _array(value: Any) -> Any:
    return value.array if _is_scaled(value) else value


def _floating(dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _number(value: Any) -> Scaled:
    return value if _is_scaled(value) else Scaled(jnp.asarray(value), jnp.int32(0))


# --- the rules of the operations ----------------------------------------------------------------


def _constant(array: Any, atom: Literal | Var) -> Any:
    """Literals with their dtype, zero and infinity as scaled numbers; other arrays as they are."""
    if not isinstance(atom, Literal) or not _floating(atom.aval.dtype):
        return array
    value = np.asarray(array, atom.aval.dtype)
    return Scaled(jnp.asarray(value), ZERO, True) if value == 0 or np.isinf(value) else value


def _rule(equation: JaxprEqn, given: list[Any]) -> list[Any]:
    name = equation.primitive.name
    if name == 'optimization_barrier':
        return given
    numbers = [v for v in given if _is_scaled(v)]
    converts = name == 'convert_element_type' and _floating(equation.params['new_dtype'])
    if numbers and converts:
        return _keep(equation, given)
    if not numbers or (all(map(_is_zero, numbers)) and name not in _MOVES):
        return _as_written(equation, given)
    return _RULES.get(name, _as_written)(equation, given)


def _as_written(equation, given):
    return bind(equation, *[_plain(v) for v in given])


def _scan_as_written(equation, given, step):
    return _as_written(equation, given)


def _keep(equation, given):
    first = _number(given[0])
    arrays = [_array(v) for v in given]
    normal = first.normal and equation.primitive.name in _MOVES
    return [Scaled(out, first.exponent, normal) for out in bind(equation, *arrays)]


def _scaleless(equation, given):
    return bind(equation, *[_array(v) for v in given])


def _multiply(equation, given):
    exponents = [v.exponent for v in given if _is_scaled(v)]
    (out,) = bind(equation, *[_array(v) for v in given])
    result = Scaled(out, _add(*exponents))
    # A product with an ordinary array, like a batch norm's scale, stays near where it was.
    return [_normal(result) if len(exponents) > 1 or equation.primitive.name != 'mul' else result]


def _divide(equation, given):
    above, below = map(_number, given)
    (out,) = bind(equation, above.array, below.array)
    exponent = above.exponent if _is_zero(above) else above.exponent - below.exponent
    return [_normal(Scaled(out, exponent))]


def _power(equation, given):
    power = 2 if equation.primitive.name == 'square' else equation.params['y']
    (out,) = bind(equation, given[0].array)
    # The exponent of zero would overflow.
    return [_normal(Scaled(out, jnp.clip(given[0].exponent, -(2**20), 2**20) * power))]


def _align(equation, given):
    arrays, exponent = _aligned(given)
    return [Scaled(out, exponent) for out in bind(equation, *arrays)]


def _compare(equation, given):
    return bind(equation, *_aligned(given)[0])


_RULES = {
    **dict.fromkeys(_KEEPS, _keep),
    **dict.fromkeys(_ALIGNS, _align),
    **dict.fromkeys(_COMPARES, _compare),
    **dict.fromkeys(_MULTIPLIES, _multiply),
    **dict.fromkeys(_SCALELESS, _scaleless),
    'div': _divide,
    'square': _power,
    'integer_pow': _power,
}


# --- arithmetic of exponents ------------------------------------------------------------------


def _aligned(values: list[Any]) -> tuple[list[Any], Any]:
    """The arrays of all values at one exponent, the largest; integers and masks as they are."""
    values = [_number(v) if _floating(jnp.result_type(_array(v))) else v for v in values]
    numbers = [v for v in values if _is_scaled(v) and not _is_zero(v)]
    if len(numbers) == 1:  # nothing to align with
        return [_array(v) for v in values], numbers[0].exponent
    values = [_normal(v) if _is_scaled(v) else v for v in values]
    top = _largest_exponent(values)

    def array(value):
        if not _is_scaled(value) or _is_zero(value):
            return _array(value)
        return value.array * _two_to(value.exponent - top, value.array.dtype)

    return [array(value) for value in values], top


def _largest_exponent(values: list[Any]) -> Any:
    exponents = [v.exponent for v in values if _is_scaled(v) and not _is_zero(v)]
    return functools.reduce(jnp.maximum, exponents) if exponents else ZERO


def _add(*exponents: Any) -> Any:
    if any(isinstance(e, int) for e in exponents):
        return ZERO
    return functools.reduce(jnp.add, exponents)


def _plain(value: Any) -> Any:
    """What the published code holds: it may overflow, or vanish."""
    if not _is_scaled(value) or _is_zero(value):
        return _array(value)
    # In two steps: an array that overflows has entries that do not.
    dtype = value.array.dtype
    half = value.exponent >> 1
    return value.array * _two_to(half, dtype) * _two_to(value.exponent - half, dtype)


def _normal(number: Scaled) -> Scaled:
    if number.normal or _is_zero(number) or not number.array.size:
        return number._replace(normal=True)
    array, exponent = number.array, number.exponent
    wide, integer, fraction, bias = _layout(array.dtype)
    array = array.astype(wide)
    bits = jax.lax.bitcast_convert_type(array, integer) & jnp.iinfo(integer).max  # of the magnitude
    field = (bits >> fraction).astype(jnp.int32)
    # To [2, 4): from there and back the factor is a normal number for every array of normal ones.
    # The exponent so far is added within the reduction: XLA would repeat a sum over all layers
    # before in every operation that needs it, but it does not repeat a reduction.
    ordinary = (field > 0) & (field <= 2 * bias)  # not zero, not infinite
    new = jnp.max(jnp.where(ordinary, field + (exponent - (bias + 1)), ZERO))
    scaled = array * _two_to(exponent - new, wide)
    return Scaled(scaled.astype(number.array.dtype), new, True)


def _two_to(power: jax.Array, dtype) -> jax.Array:
    """`2**power` by its bits, as `exp2` need not be exact; 0 below the type's normal numbers.

    1 for the exponent `ZERO`: an infinity must not meet a 0.
    """
    wide, integer, fraction, bias = _layout(dtype)
    power = jnp.where(power < ZERO // 4, 0, power)
    field = jnp.clip(power + bias, 0, 2 * bias).astype(integer)
    return jax.lax.bitcast_convert_type(field << fraction, wide).astype(dtype)


def _layout(dtype) -> tuple[Any, Any, int, int]:
    """Of float64, else float32: the type, an integer as wide, bits of the fraction, bias."""
    if dtype == jnp.float64:
        return jnp.float64, jnp.int64, 52, 1023
    return jnp.float32, jnp.int32, 23, 127
