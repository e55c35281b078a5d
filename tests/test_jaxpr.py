"""The interpreter: with a rule that computes, it is the function; calls, scans, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Literal, jaxprs_in_params

from jaxprune.errors import PruneError
from jaxprune.jaxpr import Unknown, bind, interpret, trace

X = jnp.array([[0.5, -2.0, 1.0], [3.0, 0.25, -1.0]])
W = jnp.linspace(-1.0, 1.0, 36).reshape(4, 3, 3)
TABLE = np.arange(6.0, dtype=np.float32).reshape(2, 3)


@jax.custom_jvp
def with_jvp(x):
    return jnp.sin(x) + 1


with_jvp.defjvp(lambda x, dx: (with_jvp(*x), 3 * dx[0]))


@jax.custom_vjp
def with_vjp(x):
    return jnp.cos(x) * 2


with_vjp.defvjp(lambda x: (with_vjp(x), x), lambda x, ct: (ct * x,))


def recurrent(x, w, **options):
    """Constants (the literal and x), a carry, rows of w, and rows of two kinds."""

    def step(h, row):
        h = jnp.tanh(h @ row + x[:1])
        return h, (h.sum(0), jnp.argmax(h))

    return lax.scan(step, x, w, **options)


def nested(x, w):
    def outer(h, row):
        return lax.scan(lambda g, r: (g * r + h, g.sum()), h, row)

    return lax.scan(outer, x[0], w, reverse=True)


#: Name -> function of X and W.
FUNCTIONS = {
    'operations': lambda x, w: (jax.nn.relu(x @ w[0] + TABLE) * 2, jnp.split(x, 3, axis=1)),
    'an argument and a literal': lambda x, w: (x, 3.0),
    'nested jit': jax.jit(lambda x, w: jax.jit(lambda a: a + TABLE)(x @ w[1]).sum()),
    'custom_jvp': lambda x, w: with_jvp(x) @ w[2],
    'custom_vjp': lambda x, w: jax.jit(with_vjp)(x),
    'remat': jax.checkpoint(lambda x, w: jnp.sin(x @ w[0]) + TABLE),
    'gradient': jax.grad(lambda x, w: jax.checkpoint(with_vjp)(with_jvp(x @ w[0])).sum()),
    'scan': recurrent,
    'scan in reverse': lambda x, w: recurrent(x, w, reverse=True),
    'scan without steps': lambda x, w: recurrent(x, w[:0]),
    'scan without rows': lambda x, w: lax.scan(lambda h, _: (h * 2, None), x, length=3)[0],
    'scan in a scan': nested,
    'gradient of a scan': jax.grad(lambda x, w: recurrent(x, w)[0].sum(), argnums=(0, 1)),
    'map': lambda x, w: lax.map(lambda row: x @ row, w),
    'cond': lambda x, w: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x),
    'while': lambda x, w: lax.fori_loop(0, x.astype(int)[1, 0], lambda i, h: h @ w[0], x),
}


def compute(equation, values, step=None):
    return bind(equation, *values)


def held(array, atom):
    return array


def interpreted(fn, *args, rule=compute, constant=held, scan=None):
    """`fn(*args)` by the interpreter."""
    jaxpr, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    found = interpret(jaxpr, jax.tree.leaves(args), rule, constant, scan)
    return jax.tree.unflatten(jax.tree.structure(shape), found)


def met(fn, *args, scan=None) -> list[str]:
    """The names of the operations that the rule meets."""
    names = []

    def rule(equation, values):
        names.append(equation.primitive.name)
        return bind(equation, *values)

    interpreted(fn, *args, rule=rule, scan=scan)
    return names


@pytest.mark.parametrize('scan', [None, compute])
@pytest.mark.parametrize('name', FUNCTIONS)
def test_a_rule_that_computes_is_the_function(name, scan):
    """Expectation: `fn(X, W)` by JAX itself, up to the rounding of a compiled program."""
    fn = FUNCTIONS[name]
    found, wanted = interpreted(fn, X, W, scan=scan), fn(X, W)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert jnp.shape(ours) == jnp.shape(theirs)
        assert jnp.result_type(ours) == jnp.result_type(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_it_can_be_compiled_and_differentiated():
    """Expectation: values may be tracers, so JAX transforms the interpreter like the function;
    but a custom derivative is left out: that of `with_jvp` is 3, of what it computes cos."""

    def ours(x):
        return interpreted(recurrent, x, W)[0].sum()

    gradient = jax.jit(jax.grad(ours))(X)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: recurrent(x, W)[0].sum())(X), rtol=1e-5)
    plain = jax.grad(lambda x: interpreted(with_jvp, x))(0.5)
    np.testing.assert_allclose(plain, np.cos(0.5), rtol=1e-6)


CALLS = ('nested jit', 'custom_jvp', 'custom_vjp', 'remat', 'gradient', 'scan', 'scan in a scan')


@pytest.mark.parametrize('name', CALLS)
def test_the_rule_meets_operations_only(name):
    """Expectation: the module's promise: an operation holds no other jaxpr."""
    names = []

    def rule(equation, values):
        names.append(equation.primitive.name)
        assert not list(jaxprs_in_params(equation.params)), names[-1]
        return bind(equation, *values)

    interpreted(FUNCTIONS[name], X, W, rule=rule)
    assert names


def test_choices_and_loops_of_unknown_length_go_to_the_rule():
    """Expectation: the docstring of `interpret`; only the rule can say what a choice does."""
    assert met(FUNCTIONS['cond'], X, W)[-1] == 'cond'
    assert 'while' in met(FUNCTIONS['while'], X, W)
    assert not {'sin', 'cos'} & set(met(FUNCTIONS['cond'], X, W))


def test_a_scan_is_unrolled_or_left_to_its_rule():
    """Expectation: by hand: four steps of one `tanh`, in the order of the direction; with a rule
    for scans one call of it, and the other rule meets no step."""
    assert met(recurrent, X, W).count('tanh') == 4
    rows = jnp.arange(1.0, 4.0)

    def digits(x, **options):
        return lax.scan(lambda h, row: (10 * h + row, h), x, rows, **options)

    # Horner's rule: 123 forward, 321 in reverse; a row is the carry before its step.
    last, before = interpreted(digits, 0.0)
    assert float(last) == 123 and before.tolist() == [0, 1, 12]
    last, before = interpreted(lambda x: digits(x, reverse=True), 0.0)
    assert float(last) == 321 and before.tolist() == [32, 3, 0]

    scans = []

    def scan(equation, values, step):
        scans.append(equation.params['length'])
        return [v + 1 for v in bind(equation, *values)]

    assert 'tanh' not in met(recurrent, X, W, scan=scan)
    assert scans == [4]
    last, before = interpreted(digits, 0.0, scan=scan)  # what the rule returns is what counts
    assert float(last) == 124 and before.tolist() == [1, 2, 13]


def test_values_of_any_kind():
    """Expectation: by hand: a value here is the set of arguments that it depends on."""

    def rule(equation, values):
        return [frozenset().union(*values)] * len(equation.outvars)

    def fn(a, b, c):
        a, rows = lax.scan(lambda h, row: (h + 1, row * 2), a, b)
        return a, rows, jax.jit(lambda v: v @ rows)(c), 2.0

    args = (X[0], W[0], X)
    found = interpret(
        jax.make_jaxpr(fn)(*args), [frozenset(n) for n in 'abc'], rule, lambda *_: frozenset()
    )
    assert [''.join(sorted(names)) for names in found] == ['a', 'b', 'bc', '']


def test_literals_and_constants_go_through_the_callers_function():
    """Expectation: the function's own text: the literal 2 with its dtype, and the table."""
    known = []

    def constant(array, atom):
        known.append((isinstance(atom, Literal), tuple(atom.aval.shape), str(atom.aval.dtype)))
        np.testing.assert_array_equal(array, 2 if isinstance(atom, Literal) else TABLE)
        return array * 10

    found = interpreted(lambda x: jax.jit(lambda a: 2 * (a + TABLE))(x), X, constant=constant)
    np.testing.assert_allclose(found, 20 * (X + 10 * TABLE))
    assert sorted(known) == [(False, (2, 3), 'float32'), (True, (), 'float32')]


def refuse(*names):
    def rule(equation, values, step=None):
        if equation.primitive.name in names:
            raise Unknown('not here')
        return bind(equation, *values)

    return rule


def sorts(x, w):
    with jax.named_scope('layer'):
        return jax.jit(lambda a: jnp.sort(a) + 1)(x)


def sorts_in_a_loop(x, w):
    with jax.named_scope('loop'):

        def step(h, row):
            with jax.named_scope('step'):
                return jnp.sort(h), row

        return lax.scan(step, x, w)


def grows(x, w):
    return lax.scan(lambda h, row: (h * 2, h), x, w)


def line_of(fn) -> int:
    return fn.__code__.co_firstlineno


@pytest.mark.parametrize(
    ('fn', 'operation', 'line', 'scope'),
    [
        (sorts, 'sort', 2, 'layer'),
        (sorts_in_a_loop, 'sort', 5, 'loop/step'),
        (grows, 'concatenate', 1, None),  # the interpreter's own, where it unrolls
        (grows, 'slice', 1, None),
    ],
)
def test_an_unknown_operation_is_named_with_its_place(fn, operation, line, scope):
    """Expectation: the line of the operation in this file, counted from its `def`, and the scopes
    around it; for what unrolling adds the line of the scan."""
    with pytest.raises(PruneError) as caught:
        interpreted(fn, X, W, rule=refuse(operation))
    message = str(caught.value)
    assert message.startswith(f"operation '{operation}' at ")
    assert f'test_jaxpr.py:{line_of(fn) + line}' in message
    assert message.endswith(': not here') and '\n' not in message
    assert scope is None or f' in {scope}' in message


def test_a_scan_rule_may_refuse():
    """Expectation: the same error from the rule for scans."""
    with pytest.raises(PruneError, match=r"operation 'scan' at .*test_jaxpr.py:\d+.*: not here"):
        interpreted(grows, X, W, scan=refuse('scan'))


def test_traced_arguments_have_names():
    """Expectation: by hand: leaves of params by path, then two inputs, then one constant; shapes
    suffice, and NumPy's float64 becomes what JAX computes in."""
    params = {'b': {'w': np.ones((3, 2))}, 'a': jax.ShapeDtypeStruct((2,), jnp.float32)}

    def forward(p, x, shift):
        return x['left'] @ p['b']['w'] + p['a'] + x['right'] + shift

    x = {'left': X, 'right': jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    traced = trace(forward, params, x, 1.0)
    assert traced.paths == ['a', 'b/w'] and traced.inputs == 2 and traced.constants == 1
    shapes = [tuple(aval.shape) for aval in traced.jaxpr.in_avals]
    assert shapes == [(2,), (3, 2), (2, 3), (2, 2), ()]
    assert all(aval.dtype == jnp.float32 for aval in traced.jaxpr.in_avals)
