# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # What Shapley values see that gradients don't
#
# What is a unit worth? A gradient tells how the loss changes when the unit becomes a little weaker,
# with all others in place. But pruning removes units whole, and many of them. The Shapley value
# measures that: remove the units one by one in a random order, note how much the loss grows each
# time, and average over orders. Ancona, Öztireli & Gross (arXiv:2006.01795) rank units by it.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxprune as jp
from jaxprune import data, nn, score
from jaxprune.score.coalitions import evaluated
from jaxprune.score.shapley import aggregated
from jaxprune.score.unit_loss import unit_game

# %% [markdown]
# ## A network that gradients are blind to
#
# Four ReLU units compute the maximum of two numbers, without any error:
# max(x, y) = relu(y - x) / 2 + relu(x - y) / 2 + relu(x + y) / 2. The fourth unit copies the third
# one, and nothing reads it. A game is a function of a mask: the loss of each example with only some
# of the units there.

# %%
x = jnp.array([[0.0, 1], [1, 0], [1, 2], [2, 1]])
into = jnp.array([[-0.5, 1, 1, 1], [0.5, -1, 1, 1]])
hidden = jax.nn.relu(x @ into)


def game(out):
    """`mask (4,) -> squared errors (4 examples,)` for these output weights."""
    return lambda mask: ((hidden * mask) @ out - x.max(1)) ** 2


def table(out):
    losses, ones = game(out), jnp.ones(4)
    rows = {
        'norm of the weights': jnp.abs(into).sum(0),
        'Taylor': jnp.abs(jax.grad(lambda gates: losses(gates).mean())(ones)),
        'loss without it': score.leave_one_out(losses, 4).mean(1),
        'Shapley': score.exact_shapley(losses, 4).mean(1),
    }
    for name, values in rows.items():
        print(f'{name:20}', *(f'{value:7.3f}' for value in values), f'  sum {values.sum():.3f}')
    return rows


exact = table(jnp.array([1, 0.5, 0.5, 0]))

# %% [markdown]
# The fit is perfect, so all gradients are zero: by Taylor no unit is worth anything. By the norm
# the fourth unit, which nothing reads, is worth as much as the third. The Shapley values are 0.375,
# 0.375, 1.75 and exactly 0, as in the paper. They add up to 2.5, the loss of the network without
# any unit. This holds for every network: along any order the increases add up to the loss without
# all units, less that with all.
#
# ## Two units that stand in for each other
#
# Now the fourth unit does half of the third one's work. The function is the same.

# %%
shared = table(jnp.array([1, 0.5, 0.25, 0.25]))
one, both = (float(game(jnp.array([1, 0.5, 0.25, 0.25]))(jnp.array(mask)).mean())
             for mask in ([1, 1, 1, 0], [1, 1, 0, 0]))  # fmt: skip
print(f'\nloss without one of them {one:.3f}, without both {both:.3f}')

# %% [markdown]
# The squared error without one of them is a quarter of that without both. Single removals say that
# the two units are worth 0.62 together, and both are missed for 1.25. In half of all orders a unit
# goes after its copy, and then it is missed more. The two Shapley values are equal, and they share
# all of the 1.75 that the third unit had alone.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True, layout='constrained')
for ax, rows, title in zip(
    axes, (exact, shared), ('nothing reads unit 4', 'units 3 and 4 share the work'), strict=True
):
    for i, (name, values) in enumerate(rows.items()):
        ax.bar(np.arange(4) + 0.2 * (i - 1.5), values, 0.18, label=name)
    ax.set(title=title, xticks=range(4), xticklabels=[f'unit {i}' for i in range(1, 5)])
figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right upper')
plt.show()

# %% [markdown]
# ## A trained network
#
# Digits, two hidden layers of 100 and 50 units, some hundred steps of Adam. In Python, a loop over
# compiled steps.

# %%
digits = data.load('mnist_small')


def batch(split, count):
    """The first `count` digits as a `Batch`."""
    images = split.images[:count].reshape(count, -1).astype('float32')
    return jp.Batch(jnp.asarray((images / 255 - 0.13) / 0.31), jnp.asarray(split.labels[:count]))


problem = jp.problem_from_flax(nn.MLP((100, 50), classes=10), input_shape=(784,))
params, state = problem.init(jax.random.key(0))
train, tx = batch(digits.train, len(digits.train.labels)), optax.adam(2e-3)


def network(params, state, x):
    return problem.apply(params, state, x, train=False, key=None)[0]


@jax.jit
def step(params, opt_state, at):
    loss = lambda p: problem.loss(network(p, state, train.x[at]), train.y[at]).mean()
    updates, opt_state = tx.update(jax.grad(loss)(params), opt_state)
    return optax.apply_updates(params, updates), opt_state


opt_state = tx.init(params)
for at in np.random.default_rng(0).integers(0, len(train.y), (600, 64)):
    params, opt_state = step(params, opt_state, at)

some, test = batch(digits.train, 500), batch(digits.test, 1000)
right = jax.jit(network)(params, state, test.x).argmax(-1) == test.y
print(f'{100 * right.mean():.1f} % of the test digits are right')

# %% [markdown]
# All scores see the same 500 training digits. `jp.competing` says what competes: the units of both
# layers. High scores are kept. Taylor comes in two forms. In the signed one, examples that gain
# from a removal make up for those that lose. In the absolute one both count. Shapley values come
# from 20 random orders, and in two forms as well: the mean over examples, and the mean plus twice
# the standard deviation. The second form spares units that few examples need badly. The authors
# found it the better one.

# %%
view, batches, key = jp.view(problem, params, state), [some], jax.random.key(1)
units = jp.competing(
    'unit', jp.shapes(view.weights), lambda: jp.groups(network, params, some.x[:1], state)
)
taylor = {'by': units, 'per': 'example', 'place': 'activation'}
functions = {
    'Taylor, absolute': score.gate_taylor(problem, sign='absolute', **taylor),
    'Taylor, signed': score.gate_taylor(problem, sign='signed', **taylor),
    'loss without it': score.unit_leave_one_out(problem, by=units, loop='map'),
}
scores = {
    'random': {k: jax.random.uniform(key, shape) for k, shape in units.shapes.items()},
    'norm': units.gather(jax.tree.map(jnp.abs, view.weights)),
}
scores |= {name: jax.jit(function)(key, view, batches) for name, function in functions.items()}
values = jax.jit(score.unit_shapley_values(problem, by=units, permutations=20, loop='map'))(
    key, view, batches
)
for how in ('mean', 'mean_plus_2std'):
    name = f'Shapley, {how.replace("_plus_2std", " + 2 std")}'
    scores[name] = {layer: aggregated(own, how) for layer, own in values.items()}
first, second = units.shapes

# %% [markdown]
# ## Rankings against each other
#
# Each dot is a unit. The numbers are rank correlations, 1 for the same ranking and 0 for none. The
# scores have little in common, although all but the norm speak about the same loss.

# %%
names = list(scores)[1:-2]
figure, axes = plt.subplots(1, len(names), figsize=(12, 3.2), sharey=True, layout='constrained')
for ax, name in zip(axes, names, strict=True):
    for layer in (first, second):
        a, b = scores[name][layer], scores['Shapley, mean'][layer]
        rank = np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1]
        ax.plot(a / a.max(), b / b.max(), '.', label=f'{layer.split("/")[0]}, ranks {rank:.2f}')
    ax.set(xlabel=f'{name} (largest = 1)')
    ax.legend(fontsize=8, loc='lower right')
axes[0].set_ylabel('Shapley, mean (largest = 1)')
plt.show()

# %% [markdown]
# ## Units removed, nothing trained
#
# The units of one layer go in the order of their scores, the lowest first, and the loss is measured
# on 1000 test digits after each. `unit_game` keeps what comes before the layer. The number beside
# each name is the mean increase of the loss over all removals, so low is good.

# %%
gated = units.gates('activation')
figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout='constrained')
for ax, layer in zip(axes, (first, second), strict=True):
    (n,) = units.shapes[layer]
    losses = unit_game(problem, gated, layer, view, [test])
    curve = jax.jit(lambda masks, losses=losses: evaluated(losses, masks, 64).mean(1))
    for number, (name, own) in enumerate(scores.items()):
        rank = own[layer].argsort().argsort()
        loss = curve(rank >= jnp.arange(n + 1)[:, None])
        color = f'C{number - 1}' if number else '0.7'
        label = f'{name}: {(loss - loss[0]).mean():.2f}'
        ax.plot(100 * jnp.arange(n + 1) / n, loss, label=label, color=color)
    ax.set(title=layer.split('/')[0], xlabel='units removed (%)', ylabel='test loss', yscale='log')
    ax.set_yticks([0.2, 0.5, 1, 2], ['0.2', '0.5', '1', '2'])
    ax.set_yticks([], minor=True)
    ax.legend(fontsize=8, loc='upper left', bbox_to_anchor=(0, -0.16), ncols=2)
plt.show()

# %% [markdown]
# Without half of the units, the loss is lowest with `mean + 2 std`, in both layers.
# On average over all removals they are the best in the second layer and close to it in the first.
# Two things to know before you use them:
#
# - The plain mean starts with a jump: the units that go first have a negative mean. Averaged over
#   orders, the loss falls when such a unit goes. But in most orders many units are gone by then. In
#   the full network it is needed, as the lines below show for one.
# - Signed Taylor is worse than random here. It first removes units along which the loss falls, but
#   that holds for a small step. A removal is a large one.
#
# This is one network, so differences of a tenth mean little: with two other seeds the best score of
# the first layer was another one. The jump of the plain mean in the second layer came back with
# both, and so did signed Taylor: as bad as random, or worse.

# %%
own, alone = values[second], scores['loss without it'][second]
unit = int(own.mean.argmin())
print(f'unit {unit}: Shapley mean {own.mean[unit]:.3f}, std over examples {own.std[unit]:.3f}')
print(
    f'removed alone, it adds {alone[unit]:.3f} to the loss, a median unit {jnp.median(alone):.3f}'
)
print(f'on average over orders, {(own.per_example[unit] > 0).mean():.0%} of the examples need it')

# %% [markdown]
# ## What it costs
#
# A Taylor score takes one gradient. A layer of n units takes n + 1 losses for each order, here
# 20 x (101 + 51) = 3,040 of 500 examples, each from the layer on. More orders make the error
# smaller, as 1 / sqrt(orders). `estimator='antithetic'` makes it smaller still for as many losses.
