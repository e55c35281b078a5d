# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Masks and scores are functions
#
# A score is a pure function of a network: one number per weight, high = keep. A selection turns
# scores and a count into a mask. Both are plain JAX, so seeds, densities and methods are axes of an
# array: here 52 masks come out of one call.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxprune as jp
from jaxprune import data, nn

digits = data.load('mnist_small')
x = digits.train.images[:200].astype('float32') / 255  # not centred: a dark pixel is 0
batch = jp.Batch(x[None], digits.train.labels[None, :200])
problem = jp.problem_from_flax(nn.MLP((100, 50), classes=10), input_shape=(28, 28, 1))

params, model_state = problem.init(jax.random.key(0))
view = jp.view(problem, params, model_state)
methods = {
    'random': jp.random(),
    'magnitude': jp.magnitude(),
    'SNIP': jp.snip(problem, train=False),
    'GraSP': jp.grasp(problem, train=False),
    'SynFlow': jp.synflow(problem),
}
scores = {name: score(jax.random.key(1), view, batch) for name, score in methods.items()}
{path: leaf.shape for path, leaf in scores['SNIP'].items()}

# %% [markdown]
# SNIP on the first layer: a score per weight, so an image per hidden unit. Weights of
# pixels that are never lit score zero, whatever their size; magnitude ignores that.

# %%
figure, axes = plt.subplots(1, len(methods), figsize=(11, 2.6), layout='constrained')
for ax, (name, by_path) in zip(axes, scores.items(), strict=True):
    image = np.abs(np.asarray(by_path['dense_0/kernel'])).sum(1).reshape(28, 28)
    ax.imshow(image, cmap='magma')
    ax.set_title(name)
    ax.axis('off')
figure.suptitle('score of each input pixel, summed over hidden units')
plt.show()

# %% [markdown]
# The count is traced, so a mask for every density and seed is two `vmap`s away.

# %%
sizes = {path: leaf.size for path, leaf in view.weights.items()}
total = sum(sizes.values())
densities = jnp.logspace(0, -3, 13)
counts = (total * densities).astype(int)


def kept_by_layer(score, seed, count):
    """The share of each layer that is kept, for one initialisation and one count."""
    params, model_state = problem.init(jax.random.key(seed))
    view = jp.view(problem, params, model_state)
    masks = jp.global_top_k(score(jax.random.key(1), view, batch), {'*': count})
    return {path: mask.mean() for path, mask in masks.items()}


figure, axes = plt.subplots(1, len(methods), figsize=(11, 2.8), sharey=True, layout='constrained')
for ax, (name, score) in zip(axes, methods.items(), strict=True):
    one = lambda seed, count, score=score: kept_by_layer(score, seed, count)
    many = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
    for path, share in many(jnp.arange(4), counts).items():
        (line,) = ax.loglog(1 / densities, share.mean(0), label=path.split('/')[0])
        ax.fill_between(
            1 / densities, share.min(0), share.max(0), color=line.get_color(), alpha=0.2
        )
    ax.set(title=name, xlabel='compression', ylim=(1e-4, 1.5))
axes[0].set_ylabel('share of the layer kept')
axes[0].legend()
plt.show()

# %% [markdown]
# One ranking over all layers decides by itself which layers lose weights. Where a curve falls off
# the bottom, the layer is gone and the network with it: layerwise allocations and SynFlow's rounds
# prevent that.
#
# How far do the methods agree on which weights to keep, at 5 %?

# %%
masks = {name: jp.global_top_k(s, {'*': total // 20}) for name, s in scores.items()}
flat = {name: np.concatenate([np.ravel(m[p]) for p in sizes]) for name, m in masks.items()}
overlap = [[(a & b).sum() / a.sum() for b in flat.values()] for a in flat.values()]
figure, ax = plt.subplots(figsize=(4.6, 3.8), layout='constrained')
drawn = ax.imshow(overlap, vmin=0, vmax=1, cmap='viridis')
ax.set_xticks(range(len(flat)), flat, rotation=45)
ax.set_yticks(range(len(flat)), flat)
figure.colorbar(drawn, label='share of kept weights in common')
plt.show()
