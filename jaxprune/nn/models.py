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
from jaxprune.nn.options import DTYPES
from jaxprune.nn.resnet import ResNet, cifar_blocks
from jaxprune.nn.transformer import Transformer, ViT
from jaxprune.nn.vgg import VGG, SmallVGG
from jaxprune.nn.widths import pairs


class Model(NamedTuple):
    """A model's registry entry.

    Attributes:
      build: `(classes, **options) -> flax module`.
      doc: what it is, in a few words.
      paper: authors, year and identifier.
      options: the model's options with their defaults.
      min_side: smallest height and width of an image it takes.
    """

    build: Callable[..., nn.Module]
    doc: str
    paper: str = ''
    options: Mapping[str, Any] = {}
    min_side: int = 1


_drawn = {'init': 'kaiming_normal'}
_wide = {'width': 1.0, 'dtype': 'float32', **_drawn}


_VGG = 'Simonyan & Zisserman 2015, arXiv:1409.1556'
_RESNET = 'He et al. 2016, arXiv:1512.03385'
_LECUN = 'LeCun et al. 1998, Proc. IEEE 86(11)'


def _vgg(depth: int) -> Model:
    return Model(
        lambda classes, **options: VGG(depth, classes, **options),
        f'VGG-{depth} with batch norm and one linear layer at the end, as pruning studies have it.',
        _VGG,
        {**_wide, 'order': 'conv_bn_relu'},
        32,
    )


def _cifar_resnet(depth: int) -> Model:
    return Model(
        lambda classes, **options: ResNet(cifar_blocks(depth), (16, 32, 64), classes, **options),
        f'ResNet-{depth} in its CIFAR form: three stages of 16, 32 and 64 maps.',
        _RESNET,
        {**_wide, 'shortcut': 'projection'},
        4,
    )


MODELS: dict[str, Model] = {
    'lenet300100': Model(
        lambda classes, **options: MLP((300, 100), classes, **options),
        'LeNet-300-100: two hidden layers of 300 and 100 units.',
        _LECUN,
        _drawn,
    ),
    'mlp': Model(
        lambda classes, widths, **options: MLP(tuple(widths), classes, **options),
        'A fully connected network.',
        '',
        {'widths': [256, 256], 'activation': 'relu', **_drawn},
    ),
    'lenet5': Model(
        LeNet5,
        'LeNet-5: two 5x5 convolutions and three dense layers.',
        _LECUN,
        {'activation': 'relu', 'pool': 'average', **_drawn},
        16,
    ),
    'small_vgg': Model(
        lambda classes, widths, **options: SmallVGG(tuple(widths), classes, **options),
        'Two 3x3 convolutions with batch norm per width, then max pooling.',
        _VGG,
        {'widths': [16, 32, 64], **_drawn},
        8,
    ),
    **{f'vgg{depth}': _vgg(depth) for depth in (11, 13, 16, 19)},
    **{f'resnet{depth}': _cifar_resnet(depth) for depth in (20, 32, 56)},
    'resnet18': Model(
        lambda classes, **options: ResNet((2,) * 4, (64, 128, 256, 512), classes, **options),
        'ResNet-18 with a 3x3 stem, for small images.',
        _RESNET,
        {**_wide, 'shortcut': 'projection'},
        8,
    ),
    'mobilenet': Model(
        MobileNet,
        'MobileNet-V1 with a stride of 1 in the stem, for small images.',
        'Howard et al. 2017, arXiv:1704.04861',
        _wide,
        16,
    ),
    'vit': Model(
        ViT,
        'A small vision transformer that averages its tokens.',
        'Dosovitskiy et al. 2021, arXiv:2010.11929',
        {'patch': 4, 'dim': 96, 'depth': 6, 'heads': 4, 'dtype': 'float32'},
        4,
    ),
    'transformer': Model(
        Transformer,
        'A small transformer; the rows of an image are its tokens.',
        'Vaswani et al. 2017, arXiv:1706.03762',
        {'dim': 64, 'depth': 2, 'heads': 4, 'dtype': 'float32'},
    ),
}


def model(name: str) -> Model:
    """The registry entry of a model."""
    return lookup('model', name, MODELS, JaxpruneError)


def build(
    name: str, classes: int, *, layer_widths: Mapping[str, int] | None = None, **options: Any
) -> nn.Module:
    """The flax module of a registered model.

    Args:
      layer_widths: layer -> units, where not the usual number, see `nn.widths`; every model takes
        them. The layers are looked up when the module is called.
      options: the model's own.
    """
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
    return entry.build(classes, layer_widths=pairs(layer_widths or {}), **options)


def convolves(module: nn.Module) -> bool:
    """Whether a network has convolutions; if so, its field `conv` computes them."""
    return hasattr(module, 'conv')


def convolving(module: nn.Module, conv: ConvFn) -> nn.Module:
    """The network with another implementation of convolution; unchanged if it has none."""
    return module.clone(conv=conv) if convolves(module) else module
