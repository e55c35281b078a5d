# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Your own score, pruner and recorder
#
# Everything that `jaxprune` ships is made the way shown here. Nothing has to be registered to be
# used from Python; a name for specifications is one line in a registry, at the end.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxprune as jp
from jaxprune import data, nn
from jaxprune.types import Batch, Key, View

digits = data.load('mnist_small')
images = lambda split: (split.images.astype('float32') / 255 - 0.13) / 0.31
x, y = jnp.asarray(images(digits.train)[:3000]), jnp.asarray(digits.train.labels[:3000])
problem = jp.problem_from_flax(nn.MLP((100, 50), classes=10), input_shape=(28, 28, 1))
params, state = problem.init(jax.random.key(0))
view = jp.view(problem, params, state)
batches = Batch(x[None, :300], y[None, :300])

# %% [markdown]
# ## A score
#
# `(key, view, batches) -> one number per weight`, high = keep. This one is |w| times how far the
# unit that reads the input moves the loss, by its gradient: blame distributed by size. The view
# holds all that a score may use: weights, masks, model state, initial weights where they are
# kept.


# %%
def blame(problem, *, train=False):
    """`|w| * sqrt(Σ over the unit's weights of g²)`; batch statistics if `train`."""

    def score(key: Key, view: View, batches: Batch | None):
        def loss(weights):
            params = jp.put(view.params, weights)
            logits, _ = problem.apply(params, view.model_state, batches.x[0], train=train, key=key)
            return problem.loss(logits, batches.y[0]).mean()

        gradient = jax.grad(loss)(view.weights)
        return {
            path: jnp.abs(w) * jnp.linalg.norm(gradient[path], axis=0, keepdims=True)
            for path, w in view.weights.items()
        }

    return score


# %% [markdown]
# ## A pruner
#
# A score and a selection, called once per round by `jp.prune_rounds`. Counts come from a plan, as
# exact integers. All rounds are one pure function, here jitted. A pruner of its own kind is two
# functions, `init` and `update`: see `jp.Pruner`.

# %%
pruner = jp.pruner(blame(problem), needs={'data'})
plan = jp.plan_rounds(jp.shapes(view.weights), density=0.02, rounds=10)


@jax.jit
def rounds(params):
    view = jp.view(problem, params, state)
    return jp.prune_rounds(pruner, jax.random.key(0), view, plan.counts, batches)


pruned, infos = rounds(params)
masks, kept = pruned.masks, infos.kept
figure, ax = plt.subplots(figsize=(6, 3.4), layout='constrained')
for path, by_round in kept.items():
    size = view.weights[path].size
    ax.semilogy(range(1, 11), by_round / size, 'o-', label=path)
ax.set(xlabel='round', ylabel='share of the layer kept')
ax.legend()
plt.show()

# %% [markdown]
# ## A recorder
#
# A quantity is measured as a score is, `problem -> (key, view, batches) -> path -> scalar`: here,
# how evenly a layer spreads its squared length over the weights it has left. It is a pure function
# of the network, so it can be jitted next to training, and vmapped over runs.


# %%
def evenness(problem):
    """`(Σw²)² / (n Σw⁴)` over the n unpruned weights: 1 if all are alike, 1/n if one has it all."""
    del problem

    def measure(key: Key, view: View, batches: Batch | None):
        del key, batches
        return {
            path: (w**2).sum() ** 2 / (view.masks[path].sum() * (w**4).sum())
            for path, w in view.weights.items()
        }

    return measure


tx = jp.sparse(optax.sgd(0.1, momentum=0.9))


@jax.jit
def train(params, opt_state, rows, masks):
    def step(carry, at):
        params, opt_state = carry
        loss = lambda p: problem.loss(
            problem.apply(p, state, x[at], train=True, key=None)[0], y[at]
        ).mean()
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params, masks=masks)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, (params, opt_state), rows)[0]


measure = jax.jit(lambda view: evenness(problem)(jax.random.key(0), view, batches))
now, opt_state = jp.apply_masks(params, masks), tx.init(params)
recorded = [measure(jp.view(problem, now, state, masks))]
for part in np.random.default_rng(0).integers(0, len(x), (12, 10, 100)):
    now, opt_state = train(now, opt_state, part, masks)
    recorded.append(measure(jp.view(problem, now, state, masks)))

# %%
figure, ax = plt.subplots(figsize=(6, 3.4), layout='constrained')
for path in recorded[0]:
    ax.plot(range(0, 130, 10), [s[path] for s in recorded], 'o-', label=path)
ax.set(xlabel='step', ylabel='evenness of the weights', ylim=(0, 1))
ax.legend()
plt.show()

# %% [markdown]
# ## A name in specifications
#
# A score moves to `jaxprune/score/blame.py`, `jaxprune/score/__init__.py` exports it, and one entry
# in `jaxprune/method/methods.py` names it, with a sentence on what it keeps:
#
#     'blame': Method('blame', _of(score.blame), 'The weights that the loss blames.', '', _data),
#
# The tests of `tests/test_contract.py` then hold it to all laws: N vmapped runs equal N single
# runs, exact counts, nothing pruned comes back. A quantity moves to `jaxprune/flow/`, with a line
# in its registry, and `[record] flow = ["evenness"]` records it along every run of a sweep:
#
#     'evenness': Quantity(_of(norms.evenness), 'how alike the weights are', needs_data=False),
