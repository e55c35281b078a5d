# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # What does an importance measure?
#
# Under gradient flow, dθ/dt = -g, the squared norm of a group of weights changes as
#
# $$ \frac{d\lVert\theta\rVert^2}{dt} = -2\,\theta^\top g, \qquad
#    \frac{d^2\lVert\theta\rVert^2}{dt^2} = 2\lVert g\rVert^2 + 2\,\theta^\top H g . $$
#
# Magnitude is the norm itself (order 0), loss preservation |θ g| the first derivative (order 1),
# GraSP's θ Hg stands in the second (order 2): one family (Lubana & Dick, ICLR 2021,
# arXiv:2009.11839), and one function here.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxprune as jp
from jaxprune import data, flow, nn
from jaxprune.score import MEASURES, importance

digits = data.load('mnist_small')
x = (digits.train.images.astype('float32') / 255 - 0.13) / 0.31
y = digits.train.labels
batches = jp.Batch(x[None, :500], y[None, :500])
problem = jp.problem_from_flax(nn.MLP((100, 50), classes=10), input_shape=(28, 28, 1))
print(*MEASURES.items(), sep='\n')

# %% [markdown]
# A network before and after some training.

# %%
start, state = problem.init(jax.random.key(0))
tx = optax.sgd(0.05, momentum=0.9)


@jax.jit
def train(params, opt_state, rows):
    def step(carry, at):
        params, opt_state = carry
        loss = lambda p: problem.loss(
            problem.apply(p, state, jnp.asarray(x)[at], train=True, key=None)[0], jnp.asarray(y)[at]
        ).mean()
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, (params, opt_state), rows)[0][0]


rows = np.random.default_rng(0).integers(0, len(x), (200, 128))
views = {
    'at initialisation': jp.view(problem, start, state),
    'after 200 steps': jp.view(problem, train(start, tx.init(start), rows), state),
}

# %% [markdown]
# The signed measures of order 1 and 2 of the loss itself (temperature 1), weight by weight. They go
# together, more so in a trained network: removing the weights with the most negative θ Hg, to
# increase the gradient norm, removes mostly those with a very negative θ g, and to first order the
# loss changes by -θ g on removal: upwards.

# %%
signed = {order: jax.jit(importance(problem, order=order, mode='signed')) for order in (1, 2)}
figure, axes = plt.subplots(1, 2, figsize=(9.5, 4), layout='constrained')
for ax, (name, view) in zip(axes, views.items(), strict=True):
    first, second = (score(jax.random.key(1), view, batches) for score in signed.values())
    agreed = flow.agreement(first, second)
    for path in first:
        keep = np.random.default_rng(0).permutation(first[path].size)[:3000]
        ax.plot(np.ravel(first[path])[keep], np.ravel(second[path])[keep], '.', markersize=3,
                alpha=0.5, label=path.split('/')[0])  # fmt: skip
    ax.set(xlabel='θ g', ylabel='θ Hg', title=f'{name}: correlation {agreed.pearson["*"]:.2f}')
axes[0].legend()
plt.show()

# %% [markdown]
# And what happens to the loss? Prune by each measure, and compare the loss with its Taylor
# expansion: to first order, and to second order with a single Hessian product for the whole
# set of weights removed. GraSP divides the logits by a temperature of 200; the last panel is its
# measure without that.

# %%
change = jax.jit(flow.loss_change(problem))
view = views['after 200 steps']
total = sum(w.size for w in view.weights.values())
compressions = np.array([1.05, 1.2, 1.5, 2, 3, 5, 10])
increase = MEASURES['gradient_norm_increase']
measures = {**MEASURES, 'increase, T = 1': {**increase, 'temperature': 1.0}}
figure, axes = plt.subplots(1, len(measures), figsize=(14, 3.2), sharey=True, layout='constrained')
for ax, (name, options) in zip(axes, measures.items(), strict=True):
    scores = jax.jit(importance(problem, **options))(jax.random.key(1), view, batches)
    found = [
        change(jax.random.key(1), view, jp.global_top_k(scores, {'*': int(total / c)}), batches)
        for c in compressions
    ]
    for kind, style in (('exact', 'k-'), ('first', 'C0--'), ('second', 'C1:')):
        ax.plot(compressions, [getattr(f, kind) for f in found], style, label=f'{kind}')
    ax.set(
        title=name.replace('_', ' ').replace('preservation', 'pres.'),
        xscale='log',
        xlabel='compression',
        ylim=(-0.15, 1000),
    )
    ax.set_yscale('symlog', linthresh=0.1)
axes[0].set_ylabel('change of the loss')
axes[0].legend()
plt.show()

# %% [markdown]
# Increase at temperature 1 is the one whose first order is large, as the correlation above implies.
# At 200 the first order is small, and the loss rises by higher orders. The others keep the first
# order near zero, loss preservation by its definition, and lose by higher orders. Whether that
# matters after retraining is the question of `experiments/gradient_flow`.
