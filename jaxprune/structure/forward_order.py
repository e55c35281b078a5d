"""In which order a network uses its parameters."""

from collections.abc import Callable

from jaxprune.jaxpr import interpret, scan_counts, trace
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

    def scan(equation, values, step):
        if not equation.params['length']:
            return None
        n_consts, n_carry = scan_counts(equation)
        while True:  # a later step may use what an earlier one carries along
            outputs = step(values)
            carry = values[n_consts : n_consts + n_carry]
            after = [a | b for a, b in zip(carry, outputs, strict=False)]
            if after == carry:
                return outputs
            values = [*values[:n_consts], *after, *values[n_consts + n_carry :]]

    args = [frozenset({path}) for path in traced.paths]
    args += [frozenset()] * (traced.inputs + traced.constants)
    interpret(traced.jaxpr, args, rule, lambda array, atom: frozenset(), scan)
    return list(order)
