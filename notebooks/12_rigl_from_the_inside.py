# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # RigL from the inside
#
# RigL (Evci et al., 2020) trains a sparse network from the first step to the last. It begins with a
# random mask. Every so many steps it drops the smallest weights and grows as many others, where the
# gradient is largest. This notebook looks at a network of digits while that happens: which weights
# move, when, and where they come to rest.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxprune as jp
from jaxprune import data, nn

digits = data.load('mnist_small')


def images(split):
    return jnp.asarray((split.images.astype('float32') / 255 - 0.13) / 0.31)


x, y = images(digits.train), jnp.asarray(digits.train.labels)
test_x, test_y = images(digits.test), jnp.asarray(digits.test.labels)

module = nn.build('mlp', 10, widths=[100])
FIRST = 'dense_0/kernel'


def apply(params, x):
    return module.apply({'params': params}, x)


# %% [markdown]
# `jp.train_sparse` wraps an optimizer. The loss is differentiated through `seen`, `update` takes
# the place of the optimizer's, and the state holds the masks. Five per cent of the weights are
# kept. A round comes every 50 steps, up to step 1500 of 2000; the share that is dropped falls like
# a cosine from 0.3 to 0. Every ten steps we keep the mask and the weights of the first layer.

# %%
STEPS, STOP, EVERY, DENSITY = 2000, 1500, 50, 0.05
rate = optax.cosine_decay_schedule(0.1, STEPS)


def trainer(name, **options):
    """A function of the seed: test accuracy, and the first layer every 10 steps."""
    shapes = jax.eval_shape(lambda key: module.init(key, x[:1])['params'], jax.random.key(0))
    sparse = jp.train_sparse(
        shapes, optax.sgd(rate, 0.9), name, learning_rate=rate, density=DENSITY, allocation='erk',
        start=0, stop=STOP, rounds=STOP // EVERY + 1, **options,
    )  # fmt: skip

    def step(carried, at):
        params, state = carried

        def loss(params):
            return jp.cross_entropy(apply(sparse.seen(params, state), x[at]), y[at]).mean()

        params, state = sparse.update(jax.grad(loss)(params), state, params)
        return (params, state), (state.run.masks[FIRST], params['dense_0']['kernel'])

    def ten_steps(carried, ats):
        carried, seen = jax.lax.scan(step, carried, ats)
        return carried, jax.tree.map(lambda leaf: leaf[-1], seen)

    @jax.jit
    def run(seed):
        key = jax.random.key(seed)
        params = module.init(key, x[:1])['params']
        order = jax.random.randint(jax.random.key(seed + 100), (STEPS // 10, 10, 64), 0, len(x))
        begun = params, sparse.init(params, key)
        (params, state), (masks, weights) = jax.lax.scan(ten_steps, begun, order)
        found = apply(sparse.seen(params, state, train=False), test_x).argmax(-1)
        return 100 * (found == test_y).mean(), masks, weights

    return run


accuracy, masks, weights = jax.device_get(trainer('rigl')(0))
print(f'test accuracy {accuracy:.1f} % with {masks[-1].sum():,} of {masks[-1].size:,} weights')

# %% [markdown]
# ## Where connections go
#
# A pixel's brightness is the number of its connections. At first they lie anywhere, also at the
# border of the image, where digits hardly ever are and gradients are small. Round by round they
# move to the pixels that say something.

# %%
moments = [0, 10, 40, 90, len(masks) - 1]
counts = [masks[i].sum(1).reshape(28, 28) for i in moments]
figure, panels = plt.subplots(1, len(moments) + 1, figsize=(11, 2.4))
for axes, i, count in zip(panels, moments, counts, strict=False):
    axes.imshow(count, vmin=0, vmax=counts[-1].max(), cmap='magma')
    axes.set_title(f'step {10 * (i + 1)}')
panels[-1].imshow(np.asarray(x.std(0)).reshape(28, 28), cmap='gray')
panels[-1].set_title('spread of the pixels')
for axes in panels:
    axes.axis('off')
figure.tight_layout()
plt.show()

spread = np.asarray(x.std(0)).ravel()
blank = spread < 0.1 * spread.max()
for i in (0, len(masks) - 1):
    share = masks[i][blank].sum() / masks[i].sum()
    print(f'step {10 * (i + 1)}: {100 * share:.0f} % of the connections read the border, '
          f'{100 * blank.mean():.0f} % of the pixels')  # fmt: skip

# %% [markdown]
# ## When they move
#
# Each bar is a round: how much of the mask is new. The line is what the schedule drops. The bars
# stay a little below it: a weight that was dropped may have one of the largest gradients, and then
# it grows again at once. The mask moves most at first, and comes to rest before training ends.

# %%
rounds = np.arange(EVERY, STOP + 1, EVERY)
before, after = masks[rounds // 10 - 1], masks[np.minimum(rounds // 10 + 1, len(masks) - 1)]
new = [(a & ~b).sum() / a.sum() for a, b in zip(after, before, strict=True)]
used = np.logical_or.accumulate(masks, axis=0).reshape(len(masks), -1).mean(1)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.bar(rounds, 100 * np.array(new), width=35, label='new in the mask')
left.plot(rounds, 30 / 2 * (1 + np.cos(np.pi * rounds / STOP)), color='black', label='may go')
left.set_xlabel('step')
left.set_ylabel('% of the kept weights')
left.legend(frameon=False)
right.plot(10 * (1 + np.arange(len(masks))), 100 * used)
right.axhline(100 * masks[-1].mean(), color='0.5', linewidth=0.8)
right.set_xlabel('step')
right.set_ylabel('weights used so far (%)')
figure.tight_layout()
plt.show()

# %% [markdown]
# On the right: the share of all weights that were in some mask by then. The grey line is the share
# that is in the mask at any time. RigL trains with a few weights, but tries many more.

# %% [markdown]
# ## What becomes of a weight
#
# Three kinds of weights: those that stayed from the first mask to the last, those that grew later
# and stayed, and those that grew and were dropped again. New weights start at 0. Those that stay
# become large within a few rounds; those that go never do. Two in three connections of the trained
# network were not in its first mask.

# %%
first, last, ever = masks[0], masks[-1], masks.any(0)
kinds = {
    'stayed all along': masks.all(0),
    'grew and stayed': ~first & last,
    'grew and went': ~first & ~last & ever,
}
figure, panels = plt.subplots(1, 3, figsize=(11, 2.8), sharex=True, sharey=True)
rng = np.random.default_rng(0)
for axes, (label, kind) in zip(panels, kinds.items(), strict=True):
    rows, columns = np.nonzero(kind)
    chosen = rng.choice(len(rows), min(40, len(rows)), replace=False)
    paths = np.where(masks, weights, np.nan)[:, rows[chosen], columns[chosen]]
    axes.plot(10 * (1 + np.arange(len(masks))), paths, linewidth=0.6)
    axes.set_title(f'{label}: {kind.sum():,}')
    axes.set_xlabel('step')
panels[0].set_ylabel('weight')
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Is it the gradient?
#
# SET does the same and grows at random. A mask that stands still is RigL with a drop share of 0.
# Three seeds each.

# %%
ways = {
    'RigL': ('rigl', {}),
    'SET': ('set', {}),
    'still': ('rigl', {'drop': 0.0}),
}
for label, (name, options) in ways.items():
    run = trainer(name, **options)
    values = [float(run(seed)[0]) for seed in range(3)]
    print(f'{label:6} {np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}')

# %% [markdown]
# Three seeds of a small network on digits prove little. `experiments/dynamic` compares many such
# methods with seeds and intervals, at densities down to 1 %.
