"""A small network and its gradients in NumPy, written out: what scores are compared with."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp

SIZES = (5, 7, 6, 3)


def forward(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer['w'] + layer['b'])
    return x @ params[-1]['w'] + params[-1]['b']


def setting(batches: int = 1, examples: int = 6, bias: float = 0.5):
    """Problem, view, data and parameters; a fully connected ReLU network with three layers."""
    draw = np.random.default_rng(3)
    params = [
        {'w': draw.standard_normal((a, b)) / np.sqrt(a), 'b': bias * draw.standard_normal(b)}
        for a, b in itertools.pairwise(SIZES)
    ]
    problem = jp.problem_from_functions(lambda key: jax.tree.map(jnp.asarray, params), forward)
    x = draw.standard_normal((batches, examples, SIZES[0]))
    y = draw.integers(0, SIZES[-1], (batches, examples))
    view = jp.view(problem, jax.tree.map(jnp.asarray, params))
    return problem, view, jp.Batch(jnp.asarray(x), jnp.asarray(y)), params


def loss(params, x, y) -> float:
    logits = np.asarray(x)
    for layer in params[:-1]:
        logits = np.maximum(logits @ layer['w'] + layer['b'], 0)
    logits = logits @ params[-1]['w'] + params[-1]['b']
    log_sum = np.log(np.exp(logits).sum(-1))
    return (log_sum - logits[np.arange(len(y)), y]).mean()


def gradients(params, x, y):
    """Of every example's own loss: a list like `params` with a leading axis of examples."""
    inputs = [np.asarray(x)]
    for layer in params:
        before = inputs[-1] @ layer['w'] + layer['b']
        inputs.append(np.maximum(before, 0))
    softmax = np.exp(before) / np.exp(before).sum(-1, keepdims=True)
    back = softmax - np.eye(SIZES[-1])[np.asarray(y)]
    result = []
    for layer, value in zip(params[::-1], inputs[-2::-1], strict=True):
        result.insert(0, {'w': value[:, :, None] * back[:, None, :], 'b': back})
        back = (back @ layer['w'].T) * (value > 0)
    return result


def mean_gradient(params, x, y):
    """Of the mean loss of one batch, a list like `params`."""
    return jax.tree.map(lambda g: g.mean(0), gradients(params, x, y))


def kernels(layers) -> dict[str, np.ndarray]:
    """By the paths the problem gives them."""
    return {f'{i}/w': np.asarray(layer['w']) for i, layer in enumerate(layers)}
