"""Models: flax linen modules `(x, *, train) -> logits`, float32, and their registry."""

from jaxprune.nn.conv import LeNet5, SmallVGG
from jaxprune.nn.dense import MLP
from jaxprune.nn.registry import MODELS, Model, build, model

__all__ = ['MLP', 'MODELS', 'LeNet5', 'Model', 'SmallVGG', 'build', 'model']
