"""LEAN: keeps the kernels on paths of large products (Schoonhoven et al., 2020, arXiv:2011.06923).

What competes is a single kernel, from one channel to another: granularity 'kernel'.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import tree
from jaxprune.arguments import least
from jaxprune.score.loss import one_input
from jaxprune.structure.channel_graph import ChannelGraph, Weighted, channel_graph, per_kernel
from jaxprune.structure.longest_paths import path_order
from jaxprune.types import Batches, Groups, Key, Problem, ScoreFn, Scores, View, Weights


def lean(problem: Problem, *, side: int = 16, by: Groups | None = None) -> ScoreFn:
    """The place of each single kernel in the order of paths, the first one highest.

    The kernels on the path of the largest product come first, then those of the best path of what
    is left, see `path_order`; a kernel's weight is its operator norm times the scale of the batch
    norm on its way, see `channel_graph`. So the masks of all densities are nested. A path that is
    longer than what is left to keep is cut, and its beginning stays; the authors' code does the
    same. Zero kernels have the score 0.

    Kernels that are not prunable lie on paths like others. The search runs on the host, run by run;
    numbers above 2**24 in float32 are rounded, so that many kernels are ordered in small groups.
    Uses the shape of an input, no data.

    Args:
      problem: the network.
      side: of the periodic images that operator norms are taken on, 16 in the authors' code.
      by: what is removed together: one score for each; of whole units and blocks the sum over their
        kernels. None for a score of each weight, that of its kernel.

    Raises:
      PruneError: a side below 1; when called, a prunable parameter that is no kernel between
        channels.
    """
    least(1, side=side)

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        del key
        graph, weighted = _read(problem, view, batches, side)
        shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), weighted)

        def places(bits: Weighted) -> list[np.ndarray]:
            order = path_order(graph.layers, *jax.tree.map(_numbers, bits, shapes))
            place = np.empty(len(order), np.int32)
            place[order] = np.arange(len(order), 0, -1)
            return [place[layer.edges] for layer in graph.layers]

        # As bits: the host's thread does not know whether float64 is enabled here.
        bits = jax.tree.map(lambda w: jax.lax.bitcast_convert_type(w, jnp.uint32), weighted)
        like = [jax.ShapeDtypeStruct(w.shape, jnp.int32) for w in weighted.edges]
        found = jax.pure_callback(places, like, bits, vmap_method='sequential')
        pairs = zip(found, weighted.edges, strict=True)
        values = [
            jnp.where(jnp.isfinite(w), jnp.where(w > 0, p.astype(w.dtype), 0), jnp.nan)
            for p, w in pairs
        ]
        return _scores(view, per_kernel(graph, tree.shapes(view.weights), values), by)

    return score


def operator_norm(
    problem: Problem, *, side: int = 16, scaled: bool = True, by: Groups | None = None
) -> ScoreFn:
    """The operator norm of each single kernel: what LEAN is compared with.

    Args:
      problem: the network.
      side: of the periodic images that the norm is taken on.
      scaled: times the scale of the batch norm on its way, as LEAN and its authors' baseline
        have it.
      by: see `lean`.

    Raises:
      PruneError: as `lean`.
    """
    least(1, side=side)

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        del key
        graph, weighted = _read(problem, view, batches, side, scaled)
        return _scores(view, per_kernel(graph, tree.shapes(view.weights), weighted.edges), by)

    return score


def _read(
    problem: Problem, view: View, batches: Batches | None, side: int, scaled: bool = True
) -> tuple[ChannelGraph, Weighted]:
    """The graph of channels of a network, and its weights."""
    like = one_input(batches, 'the graph of channels')
    x = jax.ShapeDtypeStruct((1, *like.shape), like.dtype)
    params = tree.put(view.params, view.weights)
    graph = channel_graph(problem, params, x, view.model_state)
    weights = functools.partial(graph.weights, side=side, scaled=scaled)
    return graph, jax.jit(weights)(params, view.model_state)


def _numbers(bits: jax.Array, like: jax.ShapeDtypeStruct) -> np.ndarray:
    return np.asarray(bits).view(like.dtype).reshape(like.shape)


def _scores(view: View, each: Weights, by: Groups | None) -> Scores:
    """Values of single kernels as scores of weights, or of what competes."""
    if by is not None and by.kind == 'kernel':
        return each
    shapes = tree.shapes(view.weights)
    whole = {path: jnp.broadcast_to(leaf, shapes[path]) for path, leaf in each.items()}
    if by is None:
        return whole
    taps = {path: math.prod(shapes[path]) // leaf.size for path, leaf in each.items()}
    return by.gather({path: leaf / taps[path] for path, leaf in whole.items()})
