"""Sweeps: specification -> plan -> run -> store."""

import lazy_loader

#: As in `jaxprune`: a look at a directory loads no engine.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
