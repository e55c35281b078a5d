"""Small networks written once and run in both JAX and PyTorch, with the same arrays.

A network is a table of layers and a forward function of operations `f`; arrays are laid out as in
PyTorch (batch, channels, height, width). `PAIRS` names them. Nothing here imports torch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Conv(NamedTuple):
    inputs: int
    outputs: int
    side: int = 3
    stride: int = 1
    groups: int = 1


class Linear(NamedTuple):
    inputs: int
    outputs: int


class BatchNorm(NamedTuple):
    maps: int


class LayerNorm(NamedTuple):
    size: int


class Embedding(NamedTuple):
    words: int
    size: int


class Tied(NamedTuple):
    """A linear layer whose weight is that of an embedding."""

    to: str
    inputs: int
    outputs: int


class Free(NamedTuple):
    """A parameter that belongs to no layer."""

    shape: tuple[int, ...]


Layers = dict[str, NamedTuple]


class Pair(NamedTuple):
    """A network for both frameworks.

    Attributes:
      layers: name -> what it is.
      forward: `(f, x) -> outputs`, where `f` has the operations of a framework.
      shape: of the inputs; integers where `words` is not 0.
      words: how many different tokens there are.
      normalisation: of `jp.groups`.
      only: the families that lose groups; all of them if there are none.
    """

    layers: Layers
    forward: Callable[[Any, Any], Any]
    shape: tuple[int, ...]
    words: int = 0
    normalisation: str = 'refuse'
    only: tuple[str, ...] = ()

    def inputs(self) -> np.ndarray:
        random = np.random.default_rng(1)
        if self.words:
            return random.integers(0, self.words, self.shape)
        return random.standard_normal(self.shape, np.float32)


class JaxOps(NamedTuple):
    """The operations in JAX, on parameters `{layer: {'weight', 'bias'}}` and running statistics."""

    layers: Layers
    params: dict[str, Any]
    state: dict[str, Any]

    def layer(self, name: str, x: jax.Array) -> jax.Array:
        kind = self.layers[name]
        p = self.params[kind.to if isinstance(kind, Tied) else name]
        if isinstance(kind, Conv):
            groups = kind.groups
            if groups == kind.inputs > 1:
                groups = x.shape[1]  # depthwise: one for each input that is left
            pad = [(kind.side // 2,) * 2 if kind.side % 2 else (0, 0)] * 2
            return lax.conv_general_dilated(
                x, p['weight'], (kind.stride,) * 2, pad, feature_group_count=groups
            )
        if isinstance(kind, Embedding):
            return jnp.take(p['weight'], x, axis=0)
        if isinstance(kind, BatchNorm):
            s, shape = self.state[name], (1, -1, 1, 1)
            x = (x - s['running_mean'].reshape(shape)) * lax.rsqrt(s['running_var'] + 1e-5).reshape(
                shape
            )
            return x * p['weight'].reshape(shape) + p['bias'].reshape(shape)
        if isinstance(kind, LayerNorm):
            mean = x.mean(-1, keepdims=True)
            var = ((x - mean) ** 2).mean(-1, keepdims=True)
            return (x - mean) * lax.rsqrt(var + 1e-5) * p['weight'] + p['bias']
        y = x @ p['weight'].T
        return y if isinstance(kind, Tied) else y + p['bias']

    def free(self, name: str) -> jax.Array:
        return self.params[name]

    relu = staticmethod(jax.nn.relu)

    def gelu(self, x: jax.Array) -> jax.Array:
        return jax.nn.gelu(x, approximate=False)

    def softmax(self, x: jax.Array) -> jax.Array:
        return jax.nn.softmax(x, -1)

    def cat(self, parts: list[jax.Array]) -> jax.Array:
        return jnp.concatenate(parts, 1)

    def halves(self, x: jax.Array) -> list[jax.Array]:
        return jnp.split(x, 2, -1)

    def permute(self, x: jax.Array, *order: int) -> jax.Array:
        return x.transpose(order)

    def flatten(self, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1)

    def tokens(self, x: jax.Array) -> jax.Array:
        """(batch, channels, height, width) -> (batch, positions, channels)."""
        return x.reshape(x.shape[0], x.shape[1], -1).transpose(0, 2, 1)

    def heads(self, x: jax.Array, size: int) -> jax.Array:
        return x.reshape(x.shape[0], x.shape[1], -1, size).transpose(0, 2, 1, 3)

    def joined(self, x: jax.Array) -> jax.Array:
        x = x.transpose(0, 2, 1, 3)
        return x.reshape(x.shape[0], x.shape[1], -1)

    def max_pool(self, x: jax.Array) -> jax.Array:
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), 'VALID')

    def pixel_shuffle(self, x: jax.Array) -> jax.Array:
        n, c, h, w = x.shape
        x = x.reshape(n, c // 4, 2, 2, h, w).transpose(0, 1, 4, 2, 5, 3)
        return x.reshape(n, c // 4, 2 * h, 2 * w)


# --- the networks -------------------------------------------------------------------------------


def mlp(f, x):
    return f.layer('fc3', f.relu(f.layer('fc2', f.relu(f.layer('fc1', x)))))


def convnet(f, x):
    for i in (1, 2):
        x = f.max_pool(f.relu(f.layer(f'bn{i}', f.layer(f'conv{i}', x))))
    return f.layer('fc2', f.relu(f.layer('fc1', f.flatten(x))))


def resnet20(f, x):
    x = f.relu(f.layer('stem_bn', f.layer('stem', x)))
    for at, stride in RESNET_BLOCKS:
        y = f.relu(f.layer(f'{at}_bn1', f.layer(f'{at}_conv1', x)))
        y = f.layer(f'{at}_bn2', f.layer(f'{at}_conv2', y))
        if stride == 2:
            x = f.layer(f'{at}_skip_bn', f.layer(f'{at}_skip', x))
        x = f.relu(x + y)
    return f.layer('head', x.mean((2, 3)))


RESNET_BLOCKS = [(f's{s}b{b}', 2 if s and not b else 1) for s in range(3) for b in range(3)]


def resnet20_layers() -> Layers:
    made: Layers = {'stem': Conv(3, 16), 'stem_bn': BatchNorm(16)}
    inputs = 16
    for at, stride in RESNET_BLOCKS:
        maps = inputs * stride
        made |= {f'{at}_conv1': Conv(inputs, maps, 3, stride), f'{at}_bn1': BatchNorm(maps)}
        made |= {f'{at}_conv2': Conv(maps, maps), f'{at}_bn2': BatchNorm(maps)}
        if stride == 2:
            made[f'{at}_skip'] = Conv(inputs, maps, 1, 2)
            made[f'{at}_skip_bn'] = BatchNorm(maps)
        inputs = maps
    return made | {'head': Linear(64, 10)}


def densenet(f, x):
    x = f.layer('stem', x)
    for i in range(DENSE_LAYERS):
        y = f.layer(f'conv{i}', f.relu(f.layer(f'bn{i}', x)))
        x = f.cat([x, y])
    return f.layer('head', f.relu(f.layer('bn', x)).mean((2, 3)))


DENSE_LAYERS = 6


def densenet_layers() -> Layers:
    made: Layers = {'stem': Conv(3, 16)}
    for i in range(DENSE_LAYERS):
        made |= {f'bn{i}': BatchNorm(16 + 8 * i), f'conv{i}': Conv(16 + 8 * i, 8)}
    last = 16 + 8 * DENSE_LAYERS
    return made | {'bn': BatchNorm(last), 'head': Linear(last, 10)}


def mobilenet(f, x):
    x = f.relu(f.layer('stem_bn', f.layer('stem', x)))
    for i in range(3):
        x = f.relu(f.layer(f'depth{i}_bn', f.layer(f'depth{i}', x)))
        x = f.relu(f.layer(f'point{i}_bn', f.layer(f'point{i}', x)))
    return f.layer('head', x.mean((2, 3)))


def mobilenet_layers() -> Layers:
    made: Layers = {'stem': Conv(3, 16), 'stem_bn': BatchNorm(16)}
    for i in range(3):
        maps = 16 * 2**i
        made |= {f'depth{i}': Conv(maps, maps, 3, 2, maps), f'depth{i}_bn': BatchNorm(maps)}
        made |= {f'point{i}': Conv(maps, 2 * maps, 1), f'point{i}_bn': BatchNorm(2 * maps)}
    return made | {'head': Linear(128, 10)}


def grouped(f, x):
    for i in (1, 2, 3):
        x = f.relu(f.layer(f'bn{i}', f.layer(f'conv{i}', x)))
    return f.layer('head', x.mean((2, 3)))


def vit(f, x):
    x = f.tokens(f.layer('embed', x)) + f.free('positions')
    for i in range(2):
        y = f.layer(f'norm{i}a', x)
        q, k, v = (f.heads(f.layer(f'{part}{i}', y), HEAD) for part in ('query', 'key', 'value'))
        weights = f.softmax(q @ f.permute(k, 0, 1, 3, 2) * HEAD**-0.5)
        x = x + f.layer(f'out{i}', f.joined(weights @ v))
        y = f.gelu(f.layer(f'up{i}', f.layer(f'norm{i}b', x)))
        x = x + f.layer(f'down{i}', y)
    return f.layer('head', f.layer('norm', x).mean(1))


WIDTH, HEAD = 64, 16


def vit_layers() -> Layers:
    made: Layers = {'embed': Conv(3, WIDTH, 4, 4), 'positions': Free((1, 64, WIDTH))}
    for i in range(2):
        made |= {f'norm{i}a': LayerNorm(WIDTH), f'norm{i}b': LayerNorm(WIDTH)}
        made |= {f'{part}{i}': Linear(WIDTH, WIDTH) for part in ('query', 'key', 'value', 'out')}
        made |= {f'up{i}': Linear(WIDTH, 128), f'down{i}': Linear(128, WIDTH)}
    return made | {'norm': LayerNorm(WIDTH), 'head': Linear(WIDTH, 10)}


def shared(f, x):
    x = f.relu(f.layer('first', x))
    for _ in range(2):
        x = f.relu(f.layer('again', x))
    return f.layer('head', x)


def tied(f, x):
    return f.layer('words', f.relu(f.layer('down', f.relu(f.layer('up', f.layer('lookup', x))))))


def shuffled(f, x):
    x = f.pixel_shuffle(f.relu(f.layer('conv1', x)))
    return f.layer('conv2', x)


def gated(f, x):
    a, b = f.halves(f.layer('both', x))
    return f.layer('head', f.relu(a) * b)


IMAGE = (2, 3, 32, 32)
CONVNET: Layers = {'conv1': Conv(3, 16), 'bn1': BatchNorm(16)}
CONVNET |= {'conv2': Conv(16, 32), 'bn2': BatchNorm(32)}
CONVNET |= {'fc1': Linear(32 * 64, 64), 'fc2': Linear(64, 10)}
GROUPED: Layers = {'conv1': Conv(3, 32), 'bn1': BatchNorm(32)}
GROUPED |= {'conv2': Conv(32, 32, groups=4), 'bn2': BatchNorm(32)}
GROUPED |= {'conv3': Conv(32, 32), 'bn3': BatchNorm(32), 'head': Linear(32, 10)}
TIED: Layers = {'lookup': Embedding(100, 32), 'up': Linear(32, 64), 'down': Linear(64, 32)}
TIED |= {'words': Tied('lookup', 32, 100)}
PAIRS: dict[str, Pair] = {
    'MLP': Pair(
        {'fc1': Linear(784, 300), 'fc2': Linear(300, 100), 'fc3': Linear(100, 10)}, mlp, (2, 784)
    ),
    'conv-BN, flatten': Pair(CONVNET, convnet, IMAGE),
    'ResNet-20': Pair(resnet20_layers(), resnet20, IMAGE),
    'concatenation': Pair(densenet_layers(), densenet, IMAGE),
    'depthwise': Pair(mobilenet_layers(), mobilenet, IMAGE),
    'grouped, whole groups': Pair(GROUPED, grouped, IMAGE, only=('conv1/weight',)),
    'grouped, one of each': Pair(
        GROUPED, grouped, IMAGE, only=('conv1/weight:2', 'conv2/weight', 'conv3/weight')
    ),
    'attention': Pair(vit_layers(), vit, IMAGE),
    'attention, width': Pair(
        vit_layers(), vit, IMAGE, normalisation='sliced', only=('embed/weight',)
    ),
    'shared layer': Pair(
        {'first': Linear(32, 64), 'again': Linear(64, 64), 'head': Linear(64, 10)}, shared, (2, 32)
    ),
    'tied weight': Pair(TIED, tied, (2, 8), words=100),
    'gate': Pair({'both': Linear(32, 128), 'head': Linear(64, 10)}, gated, (2, 32)),
    'pixel shuffle': Pair({'conv1': Conv(3, 64), 'conv2': Conv(16, 3)}, shuffled, (2, 3, 16, 16)),
}


# --- what is removed ------------------------------------------------------------------------------


def chosen(read, fraction: float, only: tuple[str, ...] = ()) -> dict[str, list[int]]:
    """Family -> groups drawn at random; of attention whole heads, not dimensions of heads.

    Args:
      read: of `jp.groups`.
      fraction: of each family, at least one group and never all.
      only: of these families, of all if there are none.
    """
    random = np.random.default_rng(0)
    made = {}
    for family in read.families:
        if family.reason or family.kind == 'head_dim' or (only and family.name not in only):
            continue
        count = min(max(round(fraction * family.size), 1), family.size - 1)
        made[family.name] = sorted(random.choice(family.size, count, replace=False).tolist())
    return made


def masks_of(read, removed: dict[str, list[int]], shapes: dict[str, tuple[int, ...]]):
    """Masks that prune all slices of these groups: what makes them, goes along and reads them."""
    masks = {path: np.ones(shape, bool) for path, shape in shapes.items()}
    for family in read.families:
        for member in family.members if family.name in removed else ():
            if member.role == 'state':
                continue
            lines = np.moveaxis(masks[member.path], member.axis, 0)
            for number in removed[family.name]:
                lines[member.indices[number]] = False
    return masks
