# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Norms of a pruned network, predicted
#
# `flow.norm_dynamics` gives the norm of every layer, filter or weight with its first and second
# time derivative under gradient flow. `flow.predicted_change` turns them into what steps of SGD
# with momentum and weight decay will do: an expansion of the iteration, so the step size counts. It
# is good for as long as the loss is well described by its slope and curvature here.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxprune as jp
from jaxprune import data, flow, nn

digits = data.load('mnist_small')
x = jnp.asarray((digits.train.images[:500].astype('float32') / 255 - 0.13) / 0.31)
y = jnp.asarray(digits.train.labels[:500])
batches = jp.Batch(x[None], y[None])
problem = jp.problem_from_flax(nn.MLP((100, 50), classes=10), input_shape=(28, 28, 1))
params, state = problem.init(jax.random.key(0))
pruned = jp.prune(params, 'snip', 0.05, model=problem, data=(x, y))
view = jp.view(problem, pruned.params, state, pruned.masks)

# %% [markdown]
# Full-batch gradient descent from here, with the momentum and the decay that one would use. The
# prediction for k steps uses derivatives at the starting point only. Along the sharpest direction,
# of curvature λ, the flow's slope decays within a time 1/λ, and the slope of the expansion to
# second order changes sign there: it is not valid after that.

# %%
rate, momentum, decay = 0.001, 0.9, 1e-3
key = jax.random.key(1)


def at(params):
    return jp.view(problem, params, state, pruned.masks)


@jax.jit
def step(params, speed):
    def loss(p):
        return problem.loss(problem.apply(p, state, x, train=True, key=None)[0], y).mean()

    gradient = jax.tree.map(lambda g, p: g + decay * p, jax.grad(loss)(params), params)
    gradient = jp.apply_masks(gradient, pruned.masks)
    speed = jax.tree.map(lambda v, g: momentum * v + g, speed, gradient)
    return jax.tree.map(lambda p, v: p - rate * v, params, speed), speed


dynamics = jax.jit(flow.norm_dynamics(problem, weight_decay=decay))(key, view, batches)
sharpest = jax.jit(flow.hessian_eigenvalues(problem))(key, view, batches)[0]
steps = range(1, 16)
walked = rate * np.cumsum(np.cumsum(momentum ** np.arange(15)))  # η times what steps add up to
end = np.argmax(walked * sharpest > 1) + 1
measured, predicted, first_order = [], [], []
params, speed = view.params, jax.tree.map(jnp.zeros_like, view.params)
for k in steps:
    params, speed = step(params, speed)
    measured.append(flow.measured_change(view, at(params)))
    predicted.append(flow.predicted_change(dynamics, rate, steps=k, momentum=momentum))
    zero = dynamics._replace(
        second=jax.tree.map(jnp.zeros_like, dynamics.second),
        gradient=jax.tree.map(jnp.zeros_like, dynamics.gradient),
    )
    first_order.append(flow.predicted_change(zero, rate, steps=k, momentum=momentum))

# %%
layers = list(view.weights)
figure, axes = plt.subplots(1, len(layers), figsize=(11, 3.3), layout='constrained')
for ax, path in zip(axes, layers, strict=True):
    ax.plot(steps, [m[path] for m in measured], 'k-', label='measured')
    ax.plot(steps, [p[path] for p in predicted], 'C1--', label='to second order')
    ax.plot(steps, [p[path] for p in first_order], 'C0:', label='to first order')
    ax.axvline(end, color='0.6', linewidth=0.8)
    ax.set(title=path, xlabel='steps of momentum SGD')
axes[-1].text(end, axes[-1].get_ylim()[1], ' time 1/λ', color='0.4', va='top')
axes[0].set_ylabel('change of ‖W‖²')
axes[0].legend()
plt.show()

# %% [markdown]
# What gradient flow conserves is a test of everything at once. Between ReLU layers, with the bias
# counted on the input side, ‖W_l‖² + ‖b_l‖² - ‖W_(l+1)‖² is constant; every discrete step moves it
# by η² times a difference of squared gradients. There are 1/η steps to a time, so half the step is
# half the drift, once steps are small. A mask changes nothing about that.

# %%
biases = [path.replace('kernel', 'bias') for path in layers]
figure, ax = plt.subplots(figsize=(6.4, 3.6), layout='constrained')
for eta, color in ((0.02, 'C3'), (0.01, 'C1'), (0.005, 'C0')):
    params, drift = view.params, []
    gradient = jax.jit(
        jax.grad(
            lambda p: problem.loss(problem.apply(p, state, x, train=True, key=None)[0], y).mean()
        )
    )
    start = flow.imbalance(view, layers, biases=biases)
    for _ in range(int(2 / eta)):
        moved = jp.apply_masks(gradient(params), pruned.masks)
        params = jax.tree.map(lambda p, g, eta=eta: p - eta * g, params, moved)
        now = flow.imbalance(at(params), layers, biases=biases)
        drift.append(sum(abs(now[path] - start[path]) for path in now))
    ax.plot(eta * np.arange(1, len(drift) + 1), drift, color=color, label=f'η = {eta}')
change = abs(flow.measured_change(view, at(params))[layers[0]])
ax.set(
    xlabel='time η k', ylabel='drift of the imbalance', title=f'(‖W‖² itself moved by {change:.1f})'
)
ax.legend()
plt.show()
