"""Models: flax linen modules `(x, *, train) -> logits`, float32, and their registry."""

from jaxprune.nn.conv import CONVOLUTIONS, convolution
from jaxprune.nn.dense import MLP
from jaxprune.nn.initial import INITIALISATIONS, initialisation
from jaxprune.nn.lenet import LeNet5
from jaxprune.nn.mobilenet import MobileNet
from jaxprune.nn.models import MODELS, Model, build, convolves, convolving, model
from jaxprune.nn.options import OPTIONS
from jaxprune.nn.resnet import ResNet
from jaxprune.nn.transformer import Transformer, ViT
from jaxprune.nn.vgg import VGG, SmallVGG

__all__ = [
    'CONVOLUTIONS',
    'INITIALISATIONS',
    'MLP',
    'MODELS',
    'OPTIONS',
    'VGG',
    'LeNet5',
    'MobileNet',
    'Model',
    'ResNet',
    'SmallVGG',
    'Transformer',
    'ViT',
    'build',
    'convolution',
    'convolves',
    'convolving',
    'initialisation',
    'model',
]
