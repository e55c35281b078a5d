"""What a run costs: parameters, bytes, floating-point operations, and estimates of time."""

import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import data, structure
from jaxprune.errors import PruneError
from jaxprune.sweep.grid import Run, has_lasting_state
from jaxprune.sweep.program import Program, method_facts
from jaxprune.sweep.spec import SweepSpec
from jaxprune.sweep.this_machine import Here


def costs(spec: SweepSpec, program: Program, run: Run) -> dict[str, Any]:
    """Parameters, bytes and floating-point operations of one run, from abstract values.

    Bytes: the state, what its method carries, one gradient, and every intermediate of one forward
    pass held for the backward pass; an estimate, as the compiler fuses and reuses. Operations are
    those of the gradient as `structure.cost` counts them; NaN where it cannot.

    Args:
      run: one of the program's.
    """
    facts = data.facts(spec.data.name)
    key = jax.random.key(0)
    state = jax.eval_shape(program.init, key, program.hyper)
    batch = run.train.batch_size
    carried = 0
    if has_lasting_state(run.method):
        carried = _bytes(method_facts(program, run.method).state)
    x = jax.ShapeDtypeStruct((batch, *facts.shape), jnp.float32)
    y = jax.ShapeDtypeStruct((batch,), jnp.int32)

    def loss(params, model_state, x, y):
        logits, _ = program.problem.apply(params, model_state, x, train=True, key=key)
        return program.problem.loss(logits, y).mean()

    forward = jax.make_jaxpr(loss)(state.params, state.model_state, x, y)
    activations = sum(
        math.prod(var.aval.shape) * var.aval.dtype.itemsize
        for equation in forward.eqns
        for var in equation.outvars
    )
    try:
        # Not the compiler's count: on GPUs there is none before the program is compiled.
        inputs = (state.model_state, x, y)
        flops = structure.cost(
            lambda params, inputs: jax.grad(loss)(params, *inputs), state.params, inputs
        ).flops
    except PruneError:
        flops = math.nan
    return {
        'parameters': sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        'bytes_per_run': _bytes(state) + _bytes(state.params) + carried + int(activations),
        'flops_per_step': float(flops),
    }


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def data_bytes(spec: SweepSpec) -> int:
    """Bytes of the data set on the device, uint8 pixels and int32 labels."""
    facts = data.facts(spec.data.name)
    examples = (spec.data.train_examples or facts.train_size) + (
        spec.data.test_examples or facts.test_size
    )
    return examples * (math.prod(facts.shape) + 4)


def estimate(
    plan_table: dict[str, Any], spec: SweepSpec, here: Mapping[str, Here]
) -> dict[str, float]:
    """Peak memory in bytes and training time in seconds on this machine, both rough.

    Time is that of measured steps; where nothing was measured, the arithmetic of all steps at the
    speed of one short matrix product on this machine. Convolutions and small layers reach less.
    """
    speed = matmul_speed()
    seconds, peak = 0.0, 0
    for program in plan_table['programs']:
        own = here[program['id']]
        step = own.seconds or program['flops_per_step'] / speed
        seconds += program['runs'] * program['steps'] * step
        peak = max(peak, own.at_once * own.bytes_per_run)
    return {'seconds': seconds, 'bytes': peak + data_bytes(spec), 'flops_per_second': speed}


def matmul_speed(seconds: float = 0.3) -> float:
    """Floating-point operations per second of float32 matrix products, measured briefly."""
    side = 512
    a = jnp.asarray(np.random.default_rng(0).normal(size=(side, side)), jnp.float32)
    product = jax.jit(lambda a: a @ a / side)
    product(a).block_until_ready()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        product(a).block_until_ready()
        count += 1
    return count * 2 * side**3 / (time.perf_counter() - start)
