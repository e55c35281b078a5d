"""Neural-network pruning research in JAX: many seeds, sparsities and methods in one program.

A mask is data, a method is a pure function, a run is a row of an array.
"""

import lazy_loader

#: A name loads its module on first use: `jaxprune --help` needs no JAX. The stub lists them.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
