# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # How many of the kept weights do any work?
#
# A weight that no path of kept weights connects to input and output carries nothing of the input
# to the output. At high compression most random masks are full of such weights, and comparing
# methods at equal *direct* compression compares how many they waste (Vysogorets & Kempe,
# arXiv:2107.02306).

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxprune as jp
from jaxprune import nn

problem = jp.problem_from_flax(nn.MLP((300, 100), classes=10), input_shape=(28, 28, 1))
params, model_state = problem.init(jax.random.key(0))
view = jp.view(problem, params, model_state)
shapes = jp.shapes(view.weights)
forward = lambda p, x: problem.apply(p, {}, x, train=False, key=None)[0]
connect = jp.connectivity(forward, params, jnp.zeros((1, 28, 28, 1)))

# %% [markdown]
# `connect` maps masks to effective masks. It is a pure function, so it is vmapped over random masks
# as anything else. The allocations below say how many weights each layer keeps; masks are random.

# %%
compressions = np.geomspace(3, 1000, 14)
total = sum(np.prod(shape) for shape in shapes.values())


@jax.jit
def effective(seeds, counts):
    def one(seed):
        scores = jp.random()(jax.random.key(seed), view, None)
        masks = connect(jp.layerwise_top_k(scores, counts))
        return total / sum(mask.sum() for mask in masks.values())

    return jax.vmap(one)(seeds)


curves = {}
for allocation in ('uniform', 'erk', 'igq'):
    rows = []
    for compression in compressions:
        counts = jp.keep_counts(shapes, 1 / compression, allocation)
        rows.append(effective(jnp.arange(10), {p: jnp.int32(n) for p, n in counts.items()}))
    curves[allocation] = np.array(rows)

# %%
figure, ax = plt.subplots(figsize=(6.4, 4.4), layout='constrained')
for allocation, values in curves.items():
    finite = np.where(np.isfinite(values), values, np.nan)
    alive = np.isfinite(values).mean(1)
    (line,) = ax.loglog(compressions, np.nanmedian(finite, 1), 'o-', label=allocation)
    ax.fill_between(
        compressions, np.nanmin(finite, 1), np.nanmax(finite, 1), color=line.get_color(), alpha=0.15
    )
    if alive[-1] < 1:
        ax.annotate(
            f'only {alive[-1]:.0%} of the masks\nconnect input and output',
            (compressions[-1], np.nanmedian(finite[-1])),
            textcoords='offset points',
            xytext=(-150, -4),
            fontsize=8,
        )
ax.loglog(compressions, compressions, color='0.4', linewidth=0.8, label='nothing wasted')
ax.set(xlabel='direct compression: weights kept', ylabel='effective compression: weights that work')
ax.legend()
plt.show()

# %% [markdown]
# Uniform random pruning at 100× leaves a network that is really compressed ten times more. ERK and
# IGQ waste far less, IGQ the least at extreme compressions. To compare methods fairly, prune to an
# effective compression: `target = "effective"` in a sweep, or in Python:

# %%
x = np.random.default_rng(0).normal(size=(32, 28, 28, 1)).astype('float32')
fair = jp.prune(
    params, 'random', 0.01, model=problem, data=x, allocation='uniform', target='effective'
)
print(fair.report)
