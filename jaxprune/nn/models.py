"""The models a specification may name. To add one: a module, a line here, a test."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jaxprune.errors import JaxpruneError, check_choice, lookup, nearest, quoted
from jaxprune.nn.conv import ConvFn
from jaxprune.nn.dense import MLP
from jaxprune.nn.initial import initialisation
from jaxprune.nn.lenet import LeNet5
from jaxprune.nn.mobilenet import MobileNet
from jaxprune.nn.resnet import ResNet, cifar_blocks
from jaxprune.nn.transformer import Transformer, ViT
from jaxprune.nn.vgg import VGG, SmallVGG

DTYPES = ('float32', 'bfloat16')


class Model(NamedTuple):
    """A model's registry entry.

    Attributes:
      build: `(classes, **options) -> flax module`.
      options: the model's options with their defaults.
      min_side: smallest height and width of an image it takes.
    """

    build: Callable[..., nn.Module]
    options: Mapping[str, Any] = {}
    min_side: int = 1


_drawn = {'init': 'kaiming_normal'}
_wide = {'width': 1.0, 'dtype': 'float32', **_drawn}


def _vgg(depth: int) -> Model:
    return Model(
        lambda classes, **options: VGG(depth, classes, **options),
        {**_wide, 'order': 'conv_bn_relu'},
        32,
    )


def _cifar_resnet(depth: int) -> Model:
    return Model(
        lambda classes, **options: ResNet(cifar_blocks(depth), (16, 32, 64), classes, **options),
        {**_wide, 'shortcut': 'projection'},
        4,
    )


MODELS: dict[str, Model] = {
    'lenet300100': Model(lambda classes, **options: MLP((300, 100), classes, **options), _drawn),
    'mlp': Model(
        lambda classes, widths, **options: MLP(tuple(widths), classes, **options),
        {'widths': [256, 256], 'activation': 'relu', **_drawn},
    ),
    'lenet5': Model(LeNet5, {'activation': 'relu', 'pool': 'average', **_drawn}, 16),
    'small_vgg': Model(
        lambda classes, widths, **options: SmallVGG(tuple(widths), classes, **options),
        {'widths': [16, 32, 64], **_drawn},
        8,
    ),
    **{f'vgg{depth}': _vgg(depth) for depth in (11, 13, 16, 19)},
    **{f'resnet{depth}': _cifar_resnet(depth) for depth in (20, 32, 56)},
    'resnet18': Model(
        lambda classes, **options: ResNet((2,) * 4, (64, 128, 256, 512), classes, **options),
        {**_wide, 'shortcut': 'projection'},
        8,
    ),
    'mobilenet': Model(MobileNet, _wide, 16),
    'vit': Model(ViT, {'patch': 4, 'dim': 96, 'depth': 6, 'heads': 4, 'dtype': 'float32'}, 4),
    'transformer': Model(Transformer, {'dim': 64, 'depth': 2, 'heads': 4, 'dtype': 'float32'}),
}


def model(name: str) -> Model:
    """The registry entry of a model."""
    return lookup('model', name, MODELS, JaxpruneError)


def build(name: str, classes: int, **options: Any) -> nn.Module:
    """The flax module of a registered model."""
    entry = model(name)
    for option in options:
        if option not in entry.options:
            raise JaxpruneError(
                f'model {quoted(name)} has no option {quoted(option)}: '
                f'{nearest(option, entry.options)}'
            )
    options = {**entry.options, **options}
    if 'init' in options:
        options['kernel_init'] = initialisation(options.pop('init'))
    if 'dtype' in options:
        check_choice('dtype', options['dtype'], DTYPES, JaxpruneError)
        options['dtype'] = jnp.dtype(options['dtype'])
    return entry.build(classes, **options)


def convolves(module: nn.Module) -> bool:
    """Whether a network has convolutions; if so, its field `conv` computes them."""
    return hasattr(module, 'conv')


def convolving(module: nn.Module, conv: ConvFn) -> nn.Module:
    """The network with another implementation of convolution; unchanged if it has none."""
    return module.clone(conv=conv) if convolves(module) else module
