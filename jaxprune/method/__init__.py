"""Pruners: pure pairs `init`, `update`, called at pruning events; and their registry."""

from jaxprune.method.pruner import pruner
from jaxprune.method.registry import METHODS, Method, build, method

__all__ = ['METHODS', 'Method', 'build', 'method', 'pruner']
