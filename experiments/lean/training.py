"""Training and testing a network that scores every pixel."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from shapes import CLASSES, Drawn

import jaxprune as jp
from jaxprune.types import Masks, Problem, PyTree

#: Images that are tested at a time.
_TESTED_AT_ONCE = 100


class Net(NamedTuple):
    """A network: its parameters and batch statistics."""

    params: PyTree
    model_state: PyTree


class Measured(NamedTuple):
    """How well a network labels the pixels of the test images.

    Attributes:
      iou: the mean over classes of the pixels that are rightly labelled as a class, over those that
        have or get that label; in %.
      accuracy: pixels labelled rightly, in %.
      labels: the label of each pixel, `(n, height, width)`, uint8.
    """

    iou: float
    accuracy: float
    labels: np.ndarray


#: `(net, masks, draw, steps, rate) -> net`: trains with Adam, from a rate that falls to zero.
TrainFn = Callable[[Net, Masks, np.random.Generator, int, float], Net]


def make_train(problem: Problem, train: Drawn, batch: int) -> TrainFn:
    """Training on some images; what masks prune stays zero, and batches are drawn on the host."""
    tx = jp.sparse(optax.scale_by_adam())
    images, truth = jax.device_put(train)

    @jax.jit
    def step(net: Net, opt_state: PyTree, masks: Masks, at: jax.Array, rate: jax.Array):
        def loss(params: PyTree):
            scores, model_state = problem.apply(
                params, net.model_state, images[at], train=True, key=None
            )
            return problem.loss(scores, truth[at]).mean(), model_state

        (value, model_state), grads = jax.value_and_grad(loss, has_aux=True)(net.params)
        updates, opt_state = tx.update(grads, opt_state, net.params, masks=masks)
        params = jax.tree.map(lambda w, u: w - rate * u, net.params, updates)
        return Net(params, model_state), opt_state, value

    def trained(net: Net, masks: Masks, draw: np.random.Generator, steps: int, rate: float) -> Net:
        opt_state, value = tx.init(net.params), 0.0
        # A loop of calls: inside a compiled loop convolutions are many times slower on the CPU.
        for number, at in zip(range(steps), _batches(draw, len(train.truth), batch), strict=False):
            now = np.float32(rate * (1 - number / steps))
            net, opt_state, value = step(net, opt_state, masks, at, now)
        if not np.isfinite(value):
            raise SystemExit('the loss is not finite: training diverged')
        return net

    return trained


def _batches(draw: np.random.Generator, count: int, batch: int) -> Iterator[np.ndarray]:
    """Indices of one batch after another; every image once in an epoch."""
    while True:
        order = draw.permutation(count)
        for first in range(0, count - batch + 1, batch):
            yield order[first : first + batch]


def make_measure(problem: Problem, test: Drawn) -> Callable[[Net], Measured]:
    """Measures a network on some images."""

    @jax.jit
    def labelled(net: Net, images: jax.Array) -> jax.Array:
        scores, _ = problem.apply(net.params, net.model_state, images, train=False, key=None)
        return scores.argmax(-1).astype(jnp.uint8)

    def measure(net: Net) -> Measured:
        firsts = range(0, len(test.images), _TESTED_AT_ONCE)
        labels = [labelled(net, test.images[k : k + _TESTED_AT_ONCE]) for k in firsts]
        found = np.concatenate(jax.device_get(labels))
        return Measured(mean_iou(found, test.truth), 100 * (found == test.truth).mean(), found)

    return measure


def mean_iou(labels: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of each class over all images, the mean over classes; in %."""
    shares = []
    for number in range(len(CLASSES)):
        given, right = labels == number, truth == number
        shares.append((given & right).sum() / max((given | right).sum(), 1))
    return 100 * float(np.mean(shares))
