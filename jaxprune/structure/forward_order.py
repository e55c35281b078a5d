"""In which order a network uses its parameters."""

from collections.abc import Callable

from jaxprune.jaxpr import interpret, trace
from jaxprune.types import PyTree


def forward_order(
    forward: Callable[..., PyTree], params: PyTree, x: PyTree, *constants: PyTree
) -> list[str]:
    """The paths of all parameters that a forward function uses, in the order of their first use.

    What allocations that speak of first and last layers need: a parameter tree is sorted by name.

    Args:
      forward: `(params, x, *constants) -> outputs`.
      params: parameters, arrays or shapes.
      x: inputs, arrays or shapes.
      constants: further arguments.

    Returns:
      Paths, each once; those of parameters that nothing uses are left out.
    """
    traced = trace(forward, params, x, *constants)
    order: dict[str, None] = {}

    def rule(equation, values):
        used = frozenset().union(*values)
        if len(values) > 1:  # a reshape or a cast passes the leaf on; whatever mixes it, uses it
            order.update(dict.fromkeys(sorted(used)))
            used = frozenset()
        return [used] * len(equation.outvars)

    args = [frozenset({path}) for path in traced.paths]
    args += [frozenset()] * (traced.inputs + traced.constants)
    interpret(traced.jaxpr, args, rule, lambda array, atom: frozenset())
    return list(order)
