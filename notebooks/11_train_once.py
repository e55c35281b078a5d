# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Train once
#
# The usual way to a small network is to train, to prune and to fine-tune. Only-Train-Once (OTO)
# wants one training. Meanwhile whole neurons are driven to exactly zero. At the end they are cut
# out, and nothing changes: a neuron at zero computes nothing. This notebook watches neurons die
# under two methods, cuts the networks, and compares.

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

module = nn.build('mlp', 10, widths=[64, 32])
start = module.init(jax.random.key(0), x[:1])['params']


def apply(params, x):
    return module.apply({'params': params}, x)


# %% [markdown]
# A *zero-invariant group* is a neuron with its bias, and the scale and bias of its norm if there is
# one. If all of that is zero, so is its output, whatever the input is. `jp.groups` reads them off
# the traced network. What reads a neuron belongs to it too, but need not be zero.

# %%
print(jp.groups(apply, start, x[:1]))

# %% [markdown]
# `jp.train_once` makes three functions: `init`, `update` in place of the optimizer's, `compact`.
# HESSO finds redundant neurons in every round and lets them shrink along a line. HSPG penalises the
# length of all neurons. From a quarter of the way on, it sets a neuron to zero as soon as a step
# would turn it around.

# %%
STEPS, STOP = 900, 700
rate = optax.cosine_decay_schedule(0.1, STEPS)
options = {
    'HESSO': {'method_name': 'hesso', 'rounds': 8},
    'HSPG': {'method_name': 'hspg', 'penalty': 0.02},
}


def train(density, method_name, **more):
    """The trained network, its compact one, and what was seen every 20 steps."""
    once = jp.train_once(
        apply, start, x[:1], optax.sgd(rate, 0.9), learning_rate=rate,
        density=density, start=100, stop=STOP, method_name=method_name, **more,
    )  # fmt: skip

    @jax.jit
    def step(params, state, at):
        def loss(params):
            return jp.cross_entropy(apply(params, x[at]), y[at]).mean()

        return once.update(jax.grad(loss)(params), state, params)

    params, state, seen = start, once.init(start), []
    for i, at in enumerate(np.random.default_rng(0).integers(0, len(x), (STEPS, 64))):
        if i % 20 == 0:
            lengths = neurons(params)
            seen.append((i, lengths, int((lengths == 0).sum())))
        params, state = step(params, state, at)
    return params, once.compact(params, state), int(state.forced), seen


@jax.jit
def neurons(params):
    """The length of each neuron's weights: a column of the kernel."""
    kernels = [params[f'dense_{i}']['kernel'] for i in (0, 1)]
    return jnp.concatenate([jnp.linalg.norm(kernel, axis=0) for kernel in kernels])


found = {label: train(0.3, **own) for label, own in options.items()}

# %% [markdown]
# Each line is a neuron; those that die are red. HESSO's fall in groups, straight to zero, one
# period after the other. HSPG's fall together, pulled by the penalty, and jump to zero at the end
# of their way. The dashed lines are where the method ends, and the number of neurons to remove.

# %%
figure, panels = plt.subplots(1, 3, figsize=(11, 3.2))
for axes, (label, (_, _, _, seen)) in zip(panels, found.items(), strict=False):
    steps = [i for i, _, _ in seen]
    lengths = np.stack([leaf for _, leaf, _ in seen])
    dead = lengths[-1] == 0
    axes.plot(steps, lengths[:, ~dead], color='tab:blue', linewidth=0.6)
    axes.plot(steps, lengths[:, dead], color='tab:red', linewidth=0.6)
    axes.set_title(label)
    axes.set_xlabel('step')
    axes.axvline(STOP, color='0.5', linestyle='--', linewidth=0.8)
    panels[2].plot(steps, [count for _, _, count in seen], label=label)
panels[0].set_ylabel('length of a neuron')
panels[2].axhline(round(0.7 * 96), color='0.5', linestyle='--', linewidth=0.8)
panels[2].set_xlabel('step')
panels[2].set_title('neurons at zero, of 96')
panels[2].legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# Now cut. The compact network has 30 % of the neurons and computes the same logits, since nothing
# that was cut was heard. `forced` counts the neurons that were not zero yet at the dashed line, and
# were removed nevertheless: with them the accuracy may fall there, and the last steps repair it.


# %%
def accuracy(network, params):
    return 100 * float((network(params, test_x).argmax(-1) == test_y).mean())


for label, (params, small, forced, _) in found.items():
    difference = jnp.abs(apply(params, test_x) - small.apply(small.params, test_x)).max()
    size = sum(leaf.size for leaf in jax.tree.leaves(small.params))
    print(
        f'{label}: full {accuracy(apply, params):.1f} %, compact '
        f'{accuracy(small.apply, small.params):.1f} % with {size:,} of '
        f'{sum(leaf.size for leaf in jax.tree.leaves(start)):,} parameters, '
        f'logits differ by {difference:.0e}, forced: {forced}'
    )

# %% [markdown]
# Does it cost accuracy? The other way: train for half of the steps, remove the neurons with the
# lowest score at once, train the rest of the steps. All have the same number of steps.


# %%
def prune_then_tune(density):
    """`jp.prune` halfway, with DepGraph's score."""
    tx = jp.sparse(optax.sgd(rate, 0.9))
    masks = {path: jnp.ones(leaf.shape, bool) for path, leaf in jp.pick(start).items()}

    @jax.jit
    def step(params, opt_state, masks, at):
        def loss(params):
            return jp.cross_entropy(apply(params, x[at]), y[at]).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params, masks=masks)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = start, tx.init(start)
    for i, at in enumerate(np.random.default_rng(0).integers(0, len(x), (STEPS, 64))):
        if i == STEPS // 2:
            pruned = jp.prune(
                params, 'group_score', density=density, granularity='unit',
                model=apply, data=(x[:100], y[:100]),
            )  # fmt: skip
            params, masks = pruned.params, pruned.masks
            opt_state = jp.mask_opt_state(tx, opt_state, params, masks)
        params, opt_state = step(params, opt_state, masks, at)
    return accuracy(apply, params)


densities = (0.6, 0.3, 0.15)
curves = {
    label: [accuracy(apply, train(density, **own)[0]) for density in densities]
    for label, own in options.items()
}
curves['prune, then fine-tune'] = [prune_then_tune(density) for density in densities]

figure, axes = plt.subplots(figsize=(5, 3.2))
for label, values in curves.items():
    axes.plot([100 * d for d in densities], values, marker='o', label=label)
    print(label, [f'{value:.1f}' for value in values])
axes.set_xlabel('neurons left (%)')
axes.set_ylabel('test accuracy (%)')
axes.legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# One seed of a small network on digits proves little. `experiments/oto` asks the question with
# seeds and intervals, on convolutions, and on a transformer's heads.
