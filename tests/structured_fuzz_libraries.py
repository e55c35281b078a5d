"""Random networks of flax linen, flax nnx and equinox, of the layers that these libraries bring."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from structured_fuzz import WIDTHS, Case, drawn

_KEY = jax.random.key(0)


def _filled(tree, rng, dtype, low=None):
    """The same tree with random numbers; those above `low` where variances must be positive."""

    def fill(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        numbers = rng.normal(size=leaf.shape) * 0.5
        return jnp.asarray(numbers if low is None else np.abs(numbers) + low, dtype)

    return jax.tree.map(fill, tree)


# --- flax linen ---------------------------------------------------------------------------------


class _Step(nn.Module):
    """A residual layer that `nn.scan` repeats."""

    width: int

    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(x.shape[-1])(nn.relu(nn.Dense(self.width)(x))), None


class Linen(nn.Module):
    seed: int

    @nn.compact
    def __call__(self, x):
        rng = np.random.default_rng(self.seed)
        x = nn.Dense(drawn(rng, (4, 6, 8)))(x)
        for _ in range(rng.integers(1, 4)):
            x = self.block(drawn(rng, sorted(self.blocks)), rng, x)
        if rng.integers(2):
            x = x.mean(1)
        else:
            x = x.reshape(x.shape[0], -1)
        return nn.Dense(3)(x)

    blocks = frozenset(
        {'dense', 'conv', 'depthwise', 'batch', 'train', 'group', 'attention', 'lstm', 'gru'}
        | {'scan', 'general', 'transposed', 'pool', 'remat', 'weights', 'glu', 'embed', 'einsum'}
    )

    def block(self, name, rng, x):
        n, width = x.shape[-1], drawn(rng, WIDTHS)
        made = {
            'dense': lambda: nn.gelu(nn.Dense(width, use_bias=bool(rng.integers(2)))(x)),
            'conv': lambda: nn.relu(nn.Conv(width, (2,), drawn(rng, (1, 2)))(x)),
            'depthwise': lambda: nn.Conv(2 * n, (3,), feature_group_count=n)(x),
            'batch': lambda: nn.silu(nn.BatchNorm(use_running_average=True)(nn.Dense(width)(x))),
            'train': lambda: nn.relu(nn.BatchNorm(use_running_average=False)(x)),
            'group': lambda: nn.GroupNorm(2)(nn.Dense(8)(x)),
            'attention': lambda: x + nn.MultiHeadDotProductAttention(2, qkv_features=8)(x, x),
            'lstm': lambda: nn.RNN(nn.OptimizedLSTMCell(width, param_dtype=x.dtype))(x),
            'gru': lambda: nn.Bidirectional(
                *(nn.RNN(nn.GRUCell(i, param_dtype=x.dtype)) for i in (3, width))
            )(x),
            'scan': lambda: nn.scan(
                _Step, variable_axes={'params': 0}, split_rngs={'params': True}, length=2
            )(width)(x, None)[0],
            'general': lambda: nn.DenseGeneral(n, (-2, -1))(nn.DenseGeneral((2, width))(x)),
            'transposed': lambda: nn.ConvTranspose(width, (2,), (2,))(x[:, :3]),
            'pool': lambda: nn.max_pool(x, (2,), (1,)) + nn.avg_pool(x, (2,), (1,)),
            'remat': lambda: nn.remat(nn.Dense)(width)(x),
            'weights': lambda: nn.WeightNorm(nn.Dense(width))(x),
            'glu': lambda: nn.glu(nn.Dense(2 * width)(x)),
            'embed': lambda: nn.Embed(3, n)(jnp.argmax(nn.Dense(3)(x), -1)) + x,
            'einsum': lambda: nn.Einsum((n, width), 'btc,cd->btd')(x),
        }
        return made[name]()


def linen(seed, dtype):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(2, 4, 3)), dtype)
    net = Linen(seed)
    variables = jax.eval_shape(net.init, _KEY, x)
    params = _filled(variables['params'], rng, dtype)
    stats = {k: v for k, v in variables.items() if k != 'params'}
    if not stats:
        return Case(lambda p, x: net.apply({'params': p}, x), params, None, x, f'linen {seed}')
    train = bool(rng.integers(2))

    def apply(params, state, x):
        # In training the function returns the next statistics too.
        out, after = net.apply({'params': params, **state}, x, mutable=list(state))
        return (out, dict(after)) if train else out

    return Case(apply, params, _filled(stats, rng, dtype, low=0.5), x, f'linen {seed}', train)


# --- flax nnx -----------------------------------------------------------------------------------


class Nnx(nnx.Module):
    def __init__(self, rng, rngs):
        n, width, hidden = 3, drawn(rng, (4, 6, 8)), drawn(rng, WIDTHS)
        self.first = nnx.Linear(n, width, rngs=rngs)
        self.kinds = [
            drawn(rng, ('dense', 'conv', 'attention', 'norm', 'lora', 'gru')) for _ in '12'
        ]
        self.layers = nnx.List([self.layer(kind, width, hidden, rngs) for kind in self.kinds])
        self.back = nnx.LinearGeneral((4, width), (3,), axis=(-2, -1), rngs=rngs)

    def layer(self, kind, n, hidden, rngs):
        if kind == 'dense':
            return nnx.Sequential(
                nnx.Linear(n, hidden, rngs=rngs), nnx.relu, nnx.Linear(hidden, n, rngs=rngs)
            )
        if kind == 'conv':
            return nnx.Conv(n, n, (3,), feature_group_count=2, rngs=rngs)
        if kind == 'attention':
            return nnx.MultiHeadAttention(2, n, 8, decode=False, rngs=rngs)
        if kind == 'norm':
            return nnx.BatchNorm(n, use_running_average=True, rngs=rngs)
        if kind == 'lora':
            return nnx.LoRALinear(n, n, lora_rank=hidden, rngs=rngs)
        return nnx.RNN(nnx.GRUCell(n, n, rngs=rngs))

    def __call__(self, x):
        x = jnp.tanh(self.first(x))
        for i, layer in enumerate(self.layers):
            if isinstance(layer, nnx.RNN):
                y = layer(x, initial_carry=jnp.zeros((len(x), x.shape[-1]), x.dtype))
            else:
                y = layer(x)
            x = x + y if i else y
        return self.back(x)


def nnx_net(seed, dtype):
    rng = np.random.default_rng(seed)
    net = nnx.eval_shape(lambda: Nnx(np.random.default_rng(seed), nnx.Rngs(0)))
    graph, params, stats, rest = nnx.split(net, (nnx.Param, nnx.LoRAParam), nnx.BatchStat, ...)
    rest = jax.tree.map(lambda s: _KEY if s.shape == () and s.dtype == _KEY.dtype else 0, rest)
    params = _filled(params, rng, dtype)
    x = jnp.asarray(rng.normal(size=(2, 4, 3)), dtype)
    if not jax.tree.leaves(stats):
        apply = lambda p, x: nnx.merge(graph, p, stats, rest)(x)  # noqa: E731
        return Case(apply, params, None, x, f'nnx {seed} {net.kinds}')
    stats = _filled(stats, rng, dtype, low=0.5)
    apply = lambda p, s, x: nnx.merge(graph, p, s, rest)(x)  # noqa: E731
    return Case(apply, params, stats, x, f'nnx {seed} {net.kinds}')


# --- equinox ------------------------------------------------------------------------------------


def equinox(seed, dtype):
    import equinox as eqx

    rng = np.random.default_rng(seed)
    width, hidden, t = drawn(rng, (4, 6, 8)), drawn(rng, WIDTHS), 4

    def every(layer):
        return lambda x: jax.vmap(layer)(x)

    def channels_first(layer):
        return lambda x: layer(x.T).T

    choices = {
        'mlp': (eqx.nn.MLP(width, width, hidden, 2, key=_KEY), every),
        'conv': (eqx.nn.Conv1d(width, width, 3, padding=1, groups=2, key=_KEY), channels_first),
        'attention': (
            eqx.nn.MultiheadAttention(2, width, key=_KEY),
            lambda f: lambda x: f(x, x, x),
        ),
        'norm': (eqx.nn.LayerNorm(width), every),
        'group': (eqx.nn.GroupNorm(2, width), channels_first),
        'prelu': (eqx.nn.PReLU(), lambda f: f),
        'gru': (eqx.nn.GRUCell(width, width, key=_KEY), _over_time),
        'pool': (eqx.nn.AvgPool1d(3, 1, 1), channels_first),
        'deconv': (eqx.nn.ConvTranspose1d(width, width, 3, padding=1, key=_KEY), channels_first),
    }
    names = [drawn(rng, list(choices)) for _ in range(3)]
    net = [
        eqx.nn.Linear(3, width, key=_KEY),
        *(choices[name][0] for name in names),
        eqx.nn.Linear(t * width, 3, key=_KEY),
    ]
    params, static = eqx.partition(net, eqx.is_inexact_array)
    params = _filled(params, rng, dtype)

    def apply(params, x):
        first, *layers, last = eqx.combine(params, static)

        def one(x):
            x = jax.nn.gelu(jax.vmap(first)(x))
            for i, (name, layer) in enumerate(zip(names, layers, strict=True)):
                y = choices[name][1](layer)(x)
                x = y if i % 2 else x + y
            return last(x.ravel())

        return jax.vmap(one)(x)

    x = jnp.asarray(rng.normal(size=(2, t, 3)), dtype)
    return Case(apply, params, None, x, f'equinox {seed} {names}')


def _over_time(cell):
    def run(x):
        def step(h, row):
            h = cell(row, h)
            return h, h

        return jax.lax.scan(step, jnp.zeros(x.shape[-1], x.dtype), x)[1]

    return run


LIBRARIES = {'linen': linen, 'nnx': nnx_net, 'equinox': equinox}
