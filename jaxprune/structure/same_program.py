"""Do two functions trace to the same operations?"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from jaxprune.jaxpr import bind, interpret
from jaxprune.types import PyTree

#: Parameters of equations that change no number.
_IGNORED = frozenset({'sharding', 'out_sharding', 'jaxpr', 'branches', 'cond_jaxpr', 'body_jaxpr'})


def same_program(one: Callable[..., PyTree], other: Callable[..., PyTree], *shapes: PyTree) -> bool:
    """Whether two functions do the same operations in the same order; False if one cannot run.

    Args:
      shapes: their arguments, arrays or shapes.
    """
    try:
        traced = [jax.make_jaxpr(f, return_shape=True)(*shapes) for f in (one, other)]
    except Exception as error:  # libraries raise errors of their own where sizes do not fit
        if isinstance(error, (MemoryError, RecursionError)):
            raise
        return False
    outputs = [jax.tree.structure(shape) for _, shape in traced]
    return outputs[0] == outputs[1] and _written(traced[0][0]) == _written(traced[1][0])


class _Known(NamedTuple):
    """A constant, to be compared."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def array(self) -> np.ndarray:
        return np.frombuffer(self.data, np.dtype(self.dtype)).reshape(self.shape)


def _known(array: np.ndarray) -> _Known:
    return _Known(str(array.dtype), array.shape, array.tobytes())


def _written(jaxpr: ClosedJaxpr | Jaxpr) -> list[Any]:
    """The operations of a function, calls entered, with numbers for what they take and make."""
    lines: list[Any] = []
    names = itertools.count()

    def rule(equation: JaxprEqn, values: list[Any]) -> list[Any]:
        keys = any(_is_key(var) for var in equation.outvars)
        if values and not keys and all(isinstance(v, _Known) for v in values):
            # Computed once, while tracing.
            with jax.ensure_compile_time_eval():
                out = bind(equation, *(v.array() for v in values))
            return [_known(np.asarray(array)) for array in out]
        made = [next(names) for _ in equation.outvars]
        params = {k: str(v) for k, v in equation.params.items() if k not in _IGNORED}
        inner = [equation.params[k] for k in ('cond_jaxpr', 'body_jaxpr') if k in equation.params]
        inner += equation.params.get('branches', ())
        lines.append((equation.primitive.name, sorted(params.items()), values, made))
        lines.extend(_written(j) for j in inner)
        return made

    def constant(array: Any, atom: Any) -> Any:
        if _is_key(atom):
            return 'key'
        return _known(np.asarray(array))

    def scan(equation: JaxprEqn, values: list[Any], step: Callable) -> list[int]:
        lines.append(('scan', equation.params['length'], equation.params['reverse'], values))
        lines.append(_written(equation.params['jaxpr']))
        return [next(names) for _ in equation.outvars]

    arguments = [next(names) for _ in getattr(jaxpr, 'jaxpr', jaxpr).invars]
    lines.append(interpret(jaxpr, arguments, rule, constant, scan))
    return lines


def _is_key(atom: Any) -> bool:
    """Random keys are no numbers."""
    return jax.dtypes.issubdtype(atom.aval.dtype, jax.dtypes.extended)
