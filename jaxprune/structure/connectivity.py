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
  constant mask lets it see; query and key weights are active where a score can reach the output.
  Values that no input reaches count as equal: mixed, they are a constant;
- a statistic of a tensor (its mean, variance, maximum, norm) subtracted from it, or dividing it, is
  normalisation, and counts as elementwise: batch, layer, group and RMS norm, softmax. What reaches
  the output only through such a statistic does no work;
- pooling is live where any entry of the window is;
- a scan is followed as a scan, so the cost of tracing it does not grow with its length.

Zeros, and scores of minus infinity, are known where the trace holds the constant that makes them:
numbers in the function's own code or closure. What is handed in as an argument counts as not zero,
so parameters that may change belong among the arguments.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import tree
from jaxprune.errors import PruneError
from jaxprune.jaxpr import interpret, trace
from jaxprune.structure.loops import through_scans
from jaxprune.structure.rules import liveness
from jaxprune.structure.values import Const, Signal, Weight
from jaxprune.types import Masks, PyTree, Rule

Connect = Callable[[Masks], Masks]


def connectivity(
    forward: Callable[..., PyTree],
    params: PyTree,
    x: PyTree,
    *constants: PyTree,
    prunable: Rule = tree.kernels,
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
            Weight(kept[path], (path,)) if path in shapes else Const(source=path)
            for path in traced.paths
        ]
        args += [
            Signal(jnp.ones(aval.shape, jnp.float32), next(roots))
            for aval in arguments[len(traced.paths) :][: traced.inputs]
        ]
        args += [Const()] * traced.constants
        rule = liveness(roots)
        outputs = interpret(
            traced.jaxpr, args, rule, lambda array, atom: Const(array), through_scans(rule, roots)
        )
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
