"""What is read and cut: a function of parameters, state and inputs, or the network of a problem."""

from collections.abc import Callable

from jaxprune.types import Problem, PyTree


def function_of(
    apply: Problem | Callable[..., PyTree], model_state: PyTree
) -> tuple[Callable[..., PyTree], PyTree]:
    """`(params, [model_state,] x) -> outputs`, and the state that it takes; None for none.

    Args:
      apply: such a function, or a problem: its network in evaluation mode.
      model_state: batch statistics and the like; None if there are none.
    """
    if not isinstance(apply, Problem):
        return apply, model_state

    def network(params: PyTree, model_state: PyTree, x: PyTree) -> PyTree:
        return apply.apply(params, model_state, x, train=False, key=None)[0]

    return network, {} if model_state is None else model_state
