"""The models a specification may name. To add one: a module, a line here, a test."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from jaxprune.errors import JaxpruneError, nearest
from jaxprune.nn.conv import LeNet5, SmallVGG
from jaxprune.nn.dense import MLP


class Model(NamedTuple):
    """A model's name card.

    Attributes:
      build: `(classes, **options) -> flax module`.
      options: the model's options with their defaults.
      min_side: smallest height and width of an image it takes.
    """

    build: Callable[..., nn.Module]
    options: Mapping[str, Any] = {}
    min_side: int = 1


MODELS: dict[str, Model] = {
    'lenet300100': Model(lambda classes: MLP((300, 100), classes)),
    'mlp': Model(lambda classes, widths: MLP(tuple(widths), classes), {'widths': [256, 256]}),
    'lenet5': Model(LeNet5, min_side=16),
    'small_vgg': Model(
        lambda classes, widths: SmallVGG(tuple(widths), classes), {'widths': [16, 32, 64]}, 8
    ),
}


def model(name: str) -> Model:
    """The name card of a model."""
    if name not in MODELS:
        raise JaxpruneError(f"unknown model '{name}': {nearest(name, MODELS)}")
    return MODELS[name]


def build(name: str, classes: int, **options: Any) -> nn.Module:
    """The flax module of a registered model."""
    card = model(name)
    for option in options:
        if option not in card.options:
            raise JaxpruneError(
                f"model '{name}' has no option '{option}': {nearest(option, card.options)}"
            )
    return card.build(classes, **{**card.options, **options})
