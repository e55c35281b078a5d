# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Pruned, and really smaller
#
# "I pruned 80 %, and my network is neither smaller nor faster." A mask puts zeros into dense
# arrays. The arrays keep their size, and products with them take as long. To gain something, whole
# filters have to go, with everything that belongs to them. This notebook prunes a ResNet in both
# ways, cuts the filters out, and measures.

# %%
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxprune as jp
from jaxprune import data, nn, structure

digits = data.load('mnist_small')


def images(split):
    """Digits of 14 x 14 pixels, means of 2 x 2: so a CPU trains a ResNet within a minute."""
    pixels = split.images.astype('float32').reshape(-1, 14, 2, 14, 2, 1).mean((2, 4))
    return jnp.asarray((pixels / 255 - 0.13) / 0.31)


x, y = images(digits.train), jnp.asarray(digits.train.labels)
test_x, test_y = images(digits.test), jnp.asarray(digits.test.labels)
problem = jp.problem_from_flax(nn.build('resnet20', 10), input_shape=(14, 14, 1))

# %% [markdown]
# Training is SGD with momentum; the rate falls along half a cosine. The loop over steps is one of
# Python: on a CPU, convolutions inside of `lax.scan` are slow.


# %%
def trainer(problem):
    """`fit(params, state, steps, rate)`, with a test accuracy every 50 steps."""

    @jax.jit
    def step(params, state, speed, rate, at):
        def loss(params):
            logits, new = problem.apply(params, state, x[at], train=True, key=None)
            return problem.loss(logits, y[at]).mean(), new

        gradient, state = jax.grad(loss, has_aux=True)(params)
        speed = jax.tree.map(lambda v, g: 0.9 * v + g, speed, gradient)
        return jax.tree.map(lambda p, v: p - rate * v, params, speed), state, speed

    @jax.jit
    def accuracy(params, state):
        logits = problem.apply(params, state, test_x, train=False, key=None)[0]
        return 100 * (logits.argmax(-1) == test_y).mean()

    def fit(params, state, steps, rate):
        speed = jax.tree.map(jnp.zeros_like, params)
        curve = [accuracy(params, state)]
        for i, at in enumerate(np.random.default_rng(0).integers(0, len(x), (steps, 64))):
            now = rate * (1 + np.cos(np.pi * i / steps)) / 2
            params, state, speed = step(params, state, speed, now, at)
            if (i + 1) % 50 == 0:
                curve.append(accuracy(params, state))
        return params, state, np.array(curve)

    return fit


def network(params, state, x):
    """What is pruned, measured and made smaller: the network as it is used, not trained."""
    return problem.apply(params, state, x, train=False, key=None)[0]


params, state = problem.init(jax.random.key(0))
params, state, curve = trainer(problem)(params, state, steps=300, rate=0.1)

# %% [markdown]
# ## A mask makes nothing smaller
#
# Half of the weights, and 80 % of them, by magnitude. `jp.cost` counts what a call for one image
# takes. `structure.latency_ratio` calls two networks in turns, here with 100 images. The first row
# compares the dense network with itself: it shows the noise of this machine.

# %%
one, hundred = test_x[:1], test_x[:100]
rows = {}


def measure(name, apply, params, state):
    """Prints a row: accuracy, size, multiply-accumulates, and how much faster than dense."""
    correct = jax.jit(apply)(params, state, test_x).argmax(-1) == test_y
    cost = jp.cost(apply, params, one, state)
    faster = structure.latency_ratio((network, *dense), (apply, params, state), hundred)
    rows[name] = (100 * float(correct.mean()), cost.params, cost.macs, faster)
    print(f'{name:30} {rows[name][0]:5.1f} % {cost.params:10,} parameters, {cost.bytes:10,} bytes,')
    print(f'{"":30} {cost.macs:19,} MACs, {faster:.2f} x as fast as dense')


dense = params, state
measure('dense', network, params, state)
for name, density in (('half of the weights masked', 0.5), ('80 % masked', 0.2)):
    masked = jp.prune(params, 'magnitude', density)
    measure(name, network, masked.params, state)

# %% [markdown]
# The zeros save nothing: same bytes, same MACs, same time up to noise. Half of the weights go for
# almost no accuracy. With 80 % gone, and no training after it, most of the accuracy is gone too.
#
# ## What goes together
#
# A filter has more than its kernel: a norm, and a slice of every kernel that reads its map. A
# residual sum ties layers: what is added must have as many maps. `jp.groups` reads all this off the
# traced function.

# %%
coupled = jp.groups(network, params, one, state)
print(coupled)

# %% [markdown]
# The picture shows the same: layers from top to bottom, a rail for what goes together. Each block
# has a short rail of its own between its two convolutions. The long rails are the residual streams,
# one per stage.

# %%
jp.draw_groups(coupled)

# %% [markdown]
# ## Half of the filters
#
# `granularity='unit'` prunes whole groups: half of each rail, by the sum of |w| over what makes the
# filter. A ranking over all rails (`allocation='global'`, the default) would compare sums of
# different lengths and empty the narrow layers. `jp.compact` then cuts out what the masks prune.

# %%
units = jp.prune(
    params,
    'magnitude',
    0.5,
    model=problem,
    data=hundred,
    model_state=state,
    granularity='unit',
    allocation='uniform',
)
small = jp.compact(network, params, units.masks, one, model_state=state)
before = jax.jit(network)(units.params, state, hundred)
after = jax.jit(small.apply)(small.params, small.model_state, hundred)
print('largest logit:', abs(before).max(), ' largest difference:', abs(before - after).max())
for path in ('stage0_block0_a_conv', 'stage2_block2_b_conv', 'dense_0'):
    print(path, params[path]['kernel'].shape, '->', small.params[path]['kernel'].shape)

# %%
measure('half of the filters masked', network, units.params, state)
measure('compact', small.apply, small.params, small.model_state)

# %% [markdown]
# The compact network computes what the masked one does, with about a quarter of the parameters and
# of the MACs: a kernel loses half of its inputs and half of its outputs. The time falls by less
# than the MACs. How much less depends on the machine and on the widths. Here is the same cut
# for ResNets with half and with twice as many filters; time does not ask for values, so the
# parameters are fresh.

# %%
for width in (0.5, 1, 2):
    pair = []
    for factor in (width, width / 2):
        net = jp.problem_from_flax(nn.build('resnet20', 10, width=factor), input_shape=(14, 14, 1))
        apply = lambda p, s, x, net=net: net.apply(p, s, x, train=False, key=None)[0]
        pair.append((apply, *net.init(jax.random.key(0))))
    macs = [jp.cost(apply, p, one, s).macs for apply, p, s in pair]
    ratio = structure.latency_ratio(*pair, hundred, repeats=15)
    print(f'width {width}: MACs / {macs[0] / macs[1]:.2f}, time / {ratio:.2f}')

# %% [markdown]
# ## Fine-tuning, and the control
#
# One cut of this size leaves no useful accuracy, so the network needs training. `small.apply` is
# for use: it has no batch statistics to update. The models of `jaxprune.nn` take `layer_widths`, so
# the same shape can be built as a module (`jp.compact_spec` does this for a sweep). It takes the
# compact parameters, or fresh ones: the control. One control gets as many steps as fine-tuning, one
# those of the dense training as well.

# %%
widths = {
    path.removesuffix('/kernel'): kernel.shape[-1]
    for path, kernel in jp.pick(small.params).items()
    if path.endswith('conv/kernel')
}
module = nn.build('resnet20', 10, layer_widths=widths)
same_shape = jp.problem_from_flax(module, input_shape=(14, 14, 1))
logits = same_shape.apply(small.params, small.model_state, hundred, train=False, key=None)[0]
print('module and small.apply differ by', abs(logits - after).max())

fresh = same_shape.init(jax.random.key(1))
fit = trainer(same_shape)
tuned = fit(small.params, small.model_state, steps=150, rate=0.05)
scratch = fit(*fresh, steps=150, rate=0.1)
longer = fit(*fresh, steps=450, rate=0.1)
for name, found in (
    ('compact, fine-tuned', tuned),
    ('from scratch, 150 steps', scratch),
    ('from scratch, 450 steps', longer),
):
    measure(name, small.apply, *found[:2])

# %%
figure, ax = plt.subplots(figsize=(8, 3.8), layout='constrained')
for label, start, values, color in (
    ('dense', 0, curve, '0.3'),
    ('compact, fine-tuned', 300, tuned[2], 'C0'),
    ('from scratch, 150 steps', 0, scratch[2], 'C1'),
    ('from scratch, 450 steps', 0, longer[2], 'C3'),
):
    ax.semilogy(start + 50 * np.arange(len(values)), 100 - values, 'o-', color=color, label=label)
ax.axvline(300, color='0.6', linewidth=0.8)
ax.text(294, 60, 'half of the\nfilters removed', color='0.4', ha='right')
ax.set(xlabel='steps of training', ylabel='test error (%)', ylim=(1.5, 120))
ticks = [2, 5, 10, 20, 50, 100]
ax.set_yticks(ticks, ticks)
ax.set_yticks([], minor=True)
ax.legend(loc='upper left', bbox_to_anchor=(1.01, 1))
plt.show()

# %% [markdown]
# ## All of it together

# %%
figure, axes = plt.subplots(1, 4, figsize=(12, 3.4), sharey=True, layout='constrained')
columns = (
    ('test accuracy (%)', 1, '%.1f'),
    ('parameters (thousands)', 1e3, '%.0f'),
    ('MACs (millions)', 1e6, '%.1f'),
    ('speed (dense = 1)', 1, '%.2f'),
)
colors = ['0.3', *3 * ['0.6'], 'C9', 'C0', 'C1', 'C3']
for ax, (title, unit, form), values in zip(
    axes, columns, zip(*rows.values(), strict=True), strict=True
):
    bars = ax.barh(list(rows), np.array(values) / unit, color=colors)
    ax.bar_label(bars, fmt=form, padding=3)
    ax.set(title=title)
    ax.margins(x=0.25)
axes[0].invert_yaxis()
plt.show()

# %% [markdown]
# What makes a network smaller and faster is its shape, not its zeros. The last four rows are one
# program, so the differences of their speed are noise. Fine-tuning brings almost all of the
# accuracy back. So does training the same shape from scratch for as many steps. With as many steps
# as dense training and fine-tuning have together, it ends no lower than either. Liu et al.
# (arXiv:1810.05270) report the same for larger networks. This is one seed, and with 2000 test
# images the standard error is 0.4 points: the last three rows have no ranking. But a pruned network
# needs such a control beside it.

# %% [markdown]
# ## A file
#
# `jp.save_compact` writes parameters and function into one file, which runs without jaxprune and
# without the code of the network.

# %%
final = small._replace(params=tuned[0], model_state=tuned[1])
with tempfile.TemporaryDirectory() as folder:
    saved = jp.save_compact(f'{folder}/small.safetensors', final, one)
    loaded = jp.load_compact(saved.file)
print(f'{saved.size:,} bytes, for {", ".join(saved.platforms)}')
logits = loaded.apply(loaded.params, loaded.model_state, hundred)
expected = final.apply(final.params, final.model_state, hundred)
print('largest difference after loading:', abs(logits - expected).max())
