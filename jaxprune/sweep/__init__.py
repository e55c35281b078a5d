"""Sweeps: specification -> plan -> run -> store."""

from jaxprune.sweep.compact_spec import compact_spec
from jaxprune.sweep.devices import keep_compiled, use_all_cores
from jaxprune.sweep.load import load_spec, make_spec, to_toml
from jaxprune.sweep.run import default_out, plan_sweep, run_chunks, run_sweep
from jaxprune.sweep.spec import SweepSpec
from jaxprune.sweep.status import status
from jaxprune.sweep.sweep_plan import make_plan

__all__ = [
    'SweepSpec',
    'compact_spec',
    'default_out',
    'keep_compiled',
    'load_spec',
    'make_plan',
    'make_spec',
    'plan_sweep',
    'run_chunks',
    'run_sweep',
    'status',
    'to_toml',
    'use_all_cores',
]
