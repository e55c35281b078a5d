"""The nets of the benchmark in plain PyTorch, from jaxprune's own parameters.

Each net is a function of parameters and images; parameters keep their flax names, and their arrays
are laid out as PyTorch wants them. Batch norm takes the batch's statistics, as in training.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

Parameters = dict[str, torch.Tensor]


def laid_out(path: str, array: np.ndarray) -> np.ndarray:
    """A flax array in PyTorch's layout: `(out, in)`, `(out, in, height, width)`."""
    if path.endswith('kernel') and array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    if path.endswith('kernel') and '/attention_' in path:
        # (dim, heads, part) in, (heads, part, dim) out: either way one matrix of heads x part.
        joined = (
            array.reshape(-1, array.shape[-1])
            if '/out/' in path
            else array.reshape(array.shape[0], -1)
        )
        return joined.T
    if path.endswith('bias'):
        return array.reshape(-1)
    return array.T if path.endswith('kernel') else array


def net(name: str) -> Callable[[Parameters, torch.Tensor], torch.Tensor]:
    """`(parameters, images (batch, channels, height, width)) -> logits`."""
    for start, make in (('lenet300100', mlp), ('vgg', vgg), ('resnet', resnet), ('vit', vit)):
        if name.startswith(start):
            return make
    raise KeyError(name)


def dense(p: Parameters, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p[f'{name}/kernel'], p[f'{name}/bias'])


def conv_bn(p: Parameters, conv: str, norm: str, x: torch.Tensor, stride: int = 1):
    kernel = p[f'{conv}/kernel']
    x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
    return F.batch_norm(x, None, None, p[f'{norm}/scale'], p[f'{norm}/bias'], training=True)


def mlp(p: Parameters, x: torch.Tensor) -> torch.Tensor:
    x = x.permute(0, 2, 3, 1).flatten(1)
    for layer in ('dense_0', 'dense_1'):
        x = F.relu(dense(p, layer, x))
    return dense(p, 'dense_2', x)


def vgg(p: Parameters, x: torch.Tensor) -> torch.Tensor:
    """VGG-11: pools after convolutions 0, 1, 3, 5 and 7."""
    for layer in range(8):
        x = F.relu(conv_bn(p, f'conv_{layer}', f'bn_{layer}', x))
        if layer in (0, 1, 3, 5, 7):
            x = F.max_pool2d(x, 2)
    return dense(p, 'dense_0', x.mean((2, 3)))


def resnet(p: Parameters, x: torch.Tensor) -> torch.Tensor:
    """ResNet-20 with projections."""
    x = F.relu(conv_bn(p, 'stem_conv', 'stem_bn', x))
    for stage in range(3):
        for block in range(3):
            at, stride = f'stage{stage}_block{block}', 2 if stage and not block else 1
            y = F.relu(conv_bn(p, f'{at}_a_conv', f'{at}_a_bn', x, stride))
            y = conv_bn(p, f'{at}_b_conv', f'{at}_b_bn', y)
            if f'{at}_skip_conv/kernel' in p:
                x = conv_bn(p, f'{at}_skip_conv', f'{at}_skip_bn', x, stride)
            x = F.relu(x + y)
    return dense(p, 'dense_0', x.mean((2, 3)))


def vit(p: Parameters, x: torch.Tensor, patch: int = 4, heads: int = 4) -> torch.Tensor:
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // patch, patch, width // patch, patch)
    x = x.permute(0, 2, 4, 3, 5, 1).reshape(batch, (height // patch) * (width // patch), -1)
    x = dense(p, 'embed', x) + p['positions']

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = p[f'encoder/{name}/scale'], p[f'encoder/{name}/bias']
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    depth = sum(path.endswith('_dense/scale') for path in p)
    for i in range(depth):
        y, at = norm(f'norm{i}_attention', x), f'encoder/attention_{i}'
        q, k, v = (split(dense(p, f'{at}/{part}', y)) for part in ('query', 'key', 'value'))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + dense(p, f'{at}/out', y)
        y = F.gelu(dense(p, f'encoder/up_{i}', norm(f'norm{i}_dense', x)), approximate='tanh')
        x = x + dense(p, f'encoder/down_{i}', y)
    return dense(p, 'dense_0', norm('norm', x).mean(1))
