# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Hundreds of runs in one program
#
# A run is a row of an array. Initialise, score, prune and train are pure functions of a seed, a
# count and a learning rate, so `vmap` over all three gives one program for the whole grid. A sweep
# does this for you; here it is in the open, in one cell.

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxprune as jp
from jaxprune import data, nn

digits = data.load('mnist_small')
images = lambda split: (split.images.astype('float32') / 255 - 0.13) / 0.31
x, y = jnp.asarray(images(digits.train)[:2000]), jnp.asarray(digits.train.labels[:2000])
test_x, test_y = jnp.asarray(images(digits.test)), jnp.asarray(digits.test.labels)
problem = jp.problem_from_flax(nn.MLP((32,), classes=10), input_shape=(28, 28, 1))
score = jp.snip(problem, train=False)


def run(seed, count, rate):
    """Test accuracy of one run, from its initialisation on."""
    key = jax.random.key(seed)
    params, state = problem.init(key)
    view = jp.view(problem, params, state)
    masks = jp.global_top_k(score(key, view, jp.Batch(x[None, :100], y[None, :100])), {'*': count})
    params = jp.apply_masks(params, masks)
    tx = jp.sparse(optax.sgd(rate, momentum=0.9))  # pruned weights get no gradients and no updates

    def step(carry, at):
        params, opt_state = carry
        loss = lambda p: problem.loss(
            problem.apply(p, state, x[at], train=True, key=None)[0], y[at]
        ).mean()
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params, masks=masks)
        return (optax.apply_updates(params, updates), opt_state), None

    order = jax.random.randint(jax.random.fold_in(key, 1), (100, 50), 0, len(x))
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), order)
    logits = problem.apply(params, state, test_x, train=False, key=None)[0]
    return 100 * (logits.argmax(-1) == test_y).mean()


# %% [markdown]
# 4 seeds × 7 densities × 7 learning rates: 196 networks. The keep count is traced, so all densities
# share the program; the mask is data.

# %%
total = 784 * 32 + 32 * 10
compressions = np.array([1, 3, 10, 30, 100, 300, 1000])
rates = jnp.logspace(-3, 0, 7)
counts = jnp.asarray(np.round(total / compressions).astype(int))
many = jax.vmap(run, (0, None, None))
many = jax.vmap(many, (None, 0, None))
many = jax.jit(jax.vmap(many, (None, None, 0)))

began = time.perf_counter()
accuracy = many(jnp.arange(4), counts, rates).block_until_ready()  # (rates, counts, seeds)
together = time.perf_counter() - began
print(f'{accuracy.size} runs in {together:.1f} s, compilation included')

# %%
mean = np.asarray(accuracy.mean(-1))
figure, ax = plt.subplots(figsize=(6.2, 4.2), layout='constrained')
drawn = ax.imshow(mean, origin='lower', aspect='auto', cmap='viridis')
ax.set_xticks(range(len(compressions)), compressions)
ax.set_yticks(range(len(rates)), [f'{r:.3g}' for r in rates])
for column in range(len(compressions)):
    ax.plot(column, mean[:, column].argmax(), 'w*', markersize=10)
ax.set(
    xlabel='compression (SNIP)',
    ylabel='learning rate',
    title='test accuracy (%), stars: the best rate',
)
figure.colorbar(drawn)
plt.show()

# %% [markdown]
# The best rate for the dense network is not the best one for a sparse one, so a comparison at a
# single rate can favour any method. Rows of `grid.train` in a sweep's specification sweep it in
# the same program.
#
# A law worth checking on your own functions: a vmapped run equals the run alone.

# %%
alone = jax.jit(run)(2, counts[3], rates[4])
print(f'alone {alone:.2f} %, in company {accuracy[4, 3, 2]:.2f} %')
