"""The networks of the golden files on structured pruning, as plain functions of their parameters.

`golden/structured/README.md` describes them; names of layers are those of the files.
"""

import ast
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from published import described, golden


def load(name):
    """File, metadata, forward function, parameters, statistics."""
    file, meta = golden(f'structured/{name}'), described(f'structured/{name}')
    forward = network(meta['net'])
    params, stats = tree_of(file, 'params/'), tree_of(file, 'batch_stats/')
    return file, meta, forward, params, stats


def tree_of(file, prefix):
    """`{layer: {leaf: array}}` of the arrays whose names begin so."""
    found = {}
    for key in file:
        if key.startswith(prefix):
            layer, leaf = key[len(prefix) :].rsplit('/', 1)
            found.setdefault(layer, {})[leaf] = jnp.asarray(file[key])
    return found


def network(text):
    """`(params, stats, x) -> logits` of a network as the files name it."""
    name, arguments = re.fullmatch(r'(\w+)\((.*)\)', text).groups()
    call = ast.parse(f'f({arguments})', mode='eval').body
    given = [ast.literal_eval(a) for a in call.args]
    named = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    return functools.partial(NETS[name], *given, **named)


def dense(p, x):
    y = x @ p['kernel']
    return y + p['bias'] if 'bias' in p else y


def conv(p, x, stride=1, pad=1, groups=1):
    if groups == 'depthwise':
        groups = x.shape[-1]
    y = lax.conv_general_dilated(
        x,
        p['kernel'],
        (stride, stride),
        [(pad, pad), (pad, pad)],
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
    )
    return y + p['bias'] if 'bias' in p else y


def batch_norm(p, s, x):
    return (x - s['mean']) * lax.rsqrt(s['var'] + 1e-5) * p['scale'] + p['bias']


def layer_norm(p, x):
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(var + 1e-12) * p['scale'] + p['bias']


def pool(x, reduce):
    if reduce == 'max':
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), 'VALID')
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), 'VALID') / 4


def flatten(x):
    return x.reshape(x.shape[0], -1)


def convnet(p, s, x, **_):
    for i, stride in ((1, 1), (2, 2), (3, 2)):
        x = jax.nn.relu(batch_norm(p[f'bn{i}'], s[f'bn{i}'], conv(p[f'conv{i}'], x, stride)))
    return dense(p['fc2'], jax.nn.relu(dense(p['fc1'], flatten(x))))


def resnet(p, s, x, *, widths, blocks, **_):
    x = jax.nn.relu(batch_norm(p['stem_bn'], s['stem_bn'], conv(p['stem_conv'], x)))
    for stage in range(len(widths)):
        for block in range(blocks):
            n = f's{stage}b{block}_'
            stride = 2 if stage and not block else 1
            y = conv(p[n + 'conv1'], x, stride)
            y = jax.nn.relu(batch_norm(p[n + 'bn1'], s[n + 'bn1'], y))
            y = batch_norm(p[n + 'bn2'], s[n + 'bn2'], conv(p[n + 'conv2'], y))
            if n + 'proj' in p:
                x = conv(p[n + 'proj'], x, stride, pad=0)
                x = batch_norm(p[n + 'projbn'], s[n + 'projbn'], x)
            x = jax.nn.relu(x + y)
    return dense(p['head'], x.mean((1, 2)))


def mlp(p, s, x):
    for i in range(1, len(p) + 1):
        x = dense(p[f'fc{i}'], x)
        x = jax.nn.relu(x) if i < len(p) else x
    return x


def vgg(p, s, x, *, cfg, fc, **_):
    number = 0
    for item in cfg:
        if item == 'M':
            x = pool(x, 'max')
            continue
        number += 1
        y = conv(p[f'conv{number}'], x)
        x = jax.nn.relu(batch_norm(p[f'bn{number}'], s[f'bn{number}'], y))
    x = flatten(x)
    for i in range(1, len(fc) + 2):
        x = dense(p[f'fc{i}'], x)
        x = jax.nn.relu(x) if i <= len(fc) else x
    return x


def mobilenet(p, s, x, *, blocks, grouped=None, **_):
    x = jax.nn.relu(batch_norm(p['stem_bn'], s['stem_bn'], conv(p['stem_conv'], x)))
    for i, (_, stride) in enumerate(blocks):
        y = conv(p[f'b{i}_dw'], x, stride, groups='depthwise')
        y = jax.nn.relu(batch_norm(p[f'b{i}_dwbn'], s[f'b{i}_dwbn'], y))
        y = conv(p[f'b{i}_pw'], y, pad=0)
        x = jax.nn.relu(batch_norm(p[f'b{i}_pwbn'], s[f'b{i}_pwbn'], y))
    if grouped:
        y = conv(p['gc'], x, groups=grouped[1])
        x = jax.nn.relu(batch_norm(p['gcbn'], s['gcbn'], y))
    return dense(p['head'], x.mean((1, 2)))


def densenet(p, s, x, *, layers, **_):
    x = conv(p['stem'] if 'stem' in p else p['stem_conv'], x)
    for d, count in enumerate(layers):
        for i in range(count):
            n = f'd{d}l{i}_'
            y = jax.nn.relu(batch_norm(p[n + 'bn'], s[n + 'bn'], x))
            x = jnp.concatenate([x, conv(p[n + 'conv'], y)], -1)
        if d + 1 < len(layers):
            y = jax.nn.relu(batch_norm(p[f't{d}_bn'], s[f't{d}_bn'], x))
            x = pool(conv(p[f't{d}_conv'], y, pad=0), 'mean')
    x = jax.nn.relu(batch_norm(p['final_bn'], s['final_bn'], x))
    return dense(p['head'], x.mean((1, 2)))


def encoder(p, s, x, *, hid, nh, blocks, **_):
    size = hid // nh
    x = dense(p['embed'], x)
    for b in range(blocks):
        n = f'attention{b}/'

        def heads(name, n=n, x=x):
            y = dense(p[n + f'self/{name}'], x)
            return y.reshape(*y.shape[:2], -1, size)

        q, k, v = map(heads, ('query', 'key', 'value'))
        weights = jax.nn.softmax(jnp.einsum('bqhd,bkhd->bhqk', q, k) / np.sqrt(size), -1)
        y = jnp.einsum('bhqk,bkhd->bqhd', weights, v)
        y = dense(p[n + 'output/dense'], y.reshape(*y.shape[:2], -1))
        x = layer_norm(p[n + 'output/LayerNorm'], x + y)
        y = dense(p[f'down{b}'], jax.nn.gelu(dense(p[f'up{b}'], x), approximate=False))
        x = layer_norm(p[f'ln{b}'], x + y)
    return dense(p['head'], x.mean(1))


def gnet(p, s, x, **_):
    x = jax.nn.relu(batch_norm(p['bn1'], s['bn1'], conv(p['conv1'], x)))
    x = jax.nn.relu(batch_norm(p['bn2'], s['bn2'], conv(p['conv2'], x, 2)))
    return dense(p['fc2'], jax.nn.relu(dense(p['fc1'], flatten(x))))


def gres(p, s, x, **_):
    h = jax.nn.relu(batch_norm(p['bn0'], s['bn0'], conv(p['stem'], x)))
    y = jax.nn.relu(batch_norm(p['bn1'], s['bn1'], conv(p['conv1'], h)))
    h = jax.nn.relu(h + batch_norm(p['bn2'], s['bn2'], conv(p['conv2'], y)))
    return dense(p['fc'], h.mean((1, 2)))


def tconv(p, s, x, **_):
    x = jax.nn.relu(batch_norm(p['bn1'], s['bn1'], conv(p['conv1'], x, 1, pad=0)))
    x = jax.nn.relu(batch_norm(p['bn2'], s['bn2'], conv(p['conv2'], x, 2, pad=0)))
    return dense(p['fc2'], jax.nn.relu(dense(p['fc1'], flatten(x))))


def pnet(p, s, x, **_):
    x = jax.nn.relu(conv(p['conv1'], x, 1, pad=0))
    x = jax.nn.relu(conv(p['conv2'], x, 2))
    return dense(p['fc2'], jax.nn.relu(dense(p['fc1'], x.mean((1, 2)))))


def _named(forward, *names):
    """A network whose first options may be given by position."""

    def call(*arguments, **options):
        *first, p, s, x = arguments
        return forward(p, s, x, **dict(zip(names, first, strict=False)), **options)

    return call


NETS = {
    'ConvNet': _named(convnet, 'w'),
    'ResNet': _named(resnet, 'widths', 'blocks'),
    'MLP': lambda *a, **k: mlp(*a[-3:]),
    'VGG': _named(vgg),
    'MobileNet': _named(mobilenet),
    'DenseNet': _named(densenet),
    'Encoder': _named(encoder),
    'GNet': _named(gnet),
    'GRes': _named(gres),
    'TMLP': lambda *a, **k: mlp(*a[-3:]),
    'TConv': _named(tconv),
    'PNet': _named(pnet),
}
