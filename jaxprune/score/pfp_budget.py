"""The published allocation of PFP: input channels of each layer for a budget of weights."""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxprune.allocation import bisect
from jaxprune.arguments import least
from jaxprune.errors import PruneError, quoted
from jaxprune.score.edges import check_seen, sensed
from jaxprune.score.sample_sizes import (
    CONSTANT,
    FAILURE,
    expected_unique,
    log_term,
    sample_complexity,
)
from jaxprune.types import Batches, Problem, View


class Channels(NamedTuple):
    """What PFP knows of a layer.

    Attributes:
      sensitivity: `(inputs,)` of its input channels.
      coefficient: S, `2 C log(8 (positions + 1) taps / failure)` times their sum.
      inputs: bool `(inputs,)`: has the channel a weight that is not zero?
      outputs: bool `(outputs,)`, the same of its own units.
      taps: how many weights lead from a channel to an output.
    """

    sensitivity: jax.Array
    coefficient: jax.Array
    inputs: jax.Array
    outputs: jax.Array
    taps: int


class PfpAllocation(NamedTuple):
    """What PFP keeps for a budget.

    Attributes:
      inputs: path -> how many input channels.
      outputs: path -> how many units; those that the layer behind does not read are gone.
      weights: how many weights that leaves.
      epsilon: the error bound that led to it.
    """

    inputs: dict[str, int]
    outputs: dict[str, int]
    weights: int
    epsilon: float


def pfp_channels(
    problem: Problem,
    view: View,
    batches: Batches | None,
    *,
    failure: ArrayLike = FAILURE,
    constant: ArrayLike = CONSTANT,
) -> dict[str, Channels]:
    """The input channels of every prunable kernel, in forward order; pure.

    Args:
      problem: the network, in evaluation mode.
      view: its weights.
      batches: the examples; labels are not used.
      failure: the probability with which a bound may be broken.
      constant: C of the bounds.

    Raises:
      PruneError: no batches; a kernel that is seen in no product, or is used twice, or in groups.
    """
    made: dict[str, Channels] = {}
    for product, values in sensed(problem, view, batches, 'max'):
        (path, *others) = product.leaves(values)
        groups, _, taps, _ = values.shape
        if others or path in made or groups > 1:
            raise PruneError(
                'the budget of pfp is that of layers with a kernel of their own: '
                f'{quoted(path)} is used twice, with another one, or in groups'
            )
        sensitivity = values[0].max((1, 2))
        factor = 2 * constant * log_term(product.positions, taps, failure)
        there = product.kernel[0] != 0
        made[path] = Channels(
            sensitivity, factor * sensitivity.sum(), there.any((1, 2)), there.any((0, 1)), taps
        )
    check_seen(view.weights, made)
    return made


def pfp_proposal(
    channels: Mapping[str, Channels], epsilon: float
) -> tuple[dict[str, int], dict[str, int]]:
    """The input channels and the units of each layer for an error bound, on the host.

    A layer keeps as many input channels as its draws are expected to find, at least one, and loses
    as many units as the layer behind it loses input channels; one stays.

    Args:
      channels: see `pfp_channels`.
      epsilon: the bound.
    """
    inputs: dict[str, int] = {}
    for path, layer in channels.items():
        s = np.asarray(layer.sensitivity, np.float64)
        p = s / s.sum() if s.sum() else s
        found = int(expected_unique(p, sample_complexity(layer.coefficient, epsilon)))
        inputs[path] = max(min(found, int(np.sum(layer.inputs))), 1)
    outputs = {path: int(np.sum(layer.outputs)) for path, layer in channels.items()}
    for path, behind in itertools.pairwise(channels):
        lost = int(np.sum(channels[behind].inputs)) - inputs[behind]
        outputs[path] = max(outputs[path] - lost, 1)
    return inputs, outputs


def pfp_allocation(channels: Mapping[str, Channels], budget: int) -> PfpAllocation:
    """The published allocation of weights: one error bound for all layers; on the host.

    Epsilon is found by bisection. The number of weights falls with it in steps, so a budget is
    mostly not met; of the two sides of a step the nearer one is taken, which may be above the
    budget, as in the authors' code. Input channels of the first layer go as well.

        channels = jax.jit(pfp_channels, static_argnums=0)(problem, view, batches)
        pfp_allocation(jax.device_get(channels), budget=20_000).inputs

    Args:
      channels: see `pfp_channels`; layers in forward order, each reads the one before.
      budget: how many weights of these kernels are to be left.

    Raises:
      PruneError: layers that form no chain; a budget below what one channel of each layer takes.
    """
    least(1, budget=budget)
    for path, behind in itertools.pairwise(channels):
        made, read = np.size(channels[path].outputs), np.size(channels[behind].inputs)
        if made != read:
            raise PruneError(
                f'{quoted(behind)} reads {read} channels, but {quoted(path)} before it makes '
                f'{made}: this budget is that of a chain of layers; other networks take '
                "granularity 'unit' or target 'effective'"
            )

    def weights(epsilon: float) -> int:
        inputs, outputs = pfp_proposal(channels, epsilon)
        return sum(inputs[path] * outputs[path] * int(channels[path].taps) for path in channels)

    # Beyond this one draw is enough for every layer.
    high = 100 + 10 * max(float(layer.coefficient) for layer in channels.values())
    if weights(high) > budget:
        raise PruneError(
            f'pfp keeps an input channel of every layer at least, {weights(high)} weights: '
            f'budget must not be {budget}'
        )
    above = bisect(lambda epsilon: weights(epsilon) >= budget, 1e-9, high)
    below = float(np.nextafter(above, high))
    epsilon = min((above, below), key=lambda e: abs(weights(e) - budget))
    return PfpAllocation(*pfp_proposal(channels, epsilon), weights(epsilon), epsilon)
