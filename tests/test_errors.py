"""Messages about names and values: one line, short, with the nearest valid name."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import allocation, data, flow, nn, optim, pattern, schedule
from jaxprune.arguments import positive, real, whole
from jaxprune.errors import (
    DataError,
    JaxpruneError,
    PruneError,
    check_choice,
    lookup,
    quoted,
    shown,
)

FRUIT = {'apple': 1, 'pear': 2}
ODD = [
    None,
    3,
    2.5,
    ['apple'],
    {'apple'},
    ('apple', []),
    10**5000,
    'x' * 10_000,
    'two\nlines',
    'two\x85lines',
    np.arange(3),
    jnp.ones((200, 300)),
    object,
]


def test_lookup_finds_the_entry():
    assert lookup('fruit', 'pear', FRUIT) == 2
    assert lookup('fruit', np.str_('pear'), FRUIT) == 2


def test_lookup_offers_the_nearest_name():
    with pytest.raises(PruneError) as caught:
        lookup('fruit', 'aple', FRUIT)
    assert str(caught.value) == "unknown fruit 'aple': did you mean 'apple'? (valid: apple, pear)"
    with pytest.raises(DataError) as caught:
        lookup('fruit', 'quince', FRUIT, DataError)
    assert str(caught.value) == "unknown fruit 'quince': valid: apple, pear"


def test_check_choice():
    check_choice('fruit', 'pear', ('apple', 'pear'))
    with pytest.raises(DataError, match=r"^unknown fruit 'peer': did you mean 'pear'"):
        check_choice('fruit', 'peer', ('apple', 'pear'), DataError)


@pytest.mark.parametrize('name', ODD, ids=lambda name: type(name).__name__)
def test_names_of_any_type_give_one_short_line(name):
    for call in (
        lambda: lookup('fruit', name, FRUIT),
        lambda: check_choice('fruit', name, tuple(FRUIT)),
        lambda: schedule.schedule(name),
        lambda: allocation.layerwise(name),
        lambda: pattern.n_of_m({'w': jnp.ones((4, 4))}, n=2, m=4, ties=name),
        lambda: data.facts(name),
        lambda: data.augmentation(name),
        lambda: nn.model(name),
        lambda: nn.convolution(name),
        lambda: flow.quantity(name),
        lambda: optim.rate_schedule(name, 10),
    ):
        with pytest.raises(JaxpruneError, match=r'^unknown [a-z ]+ .*valid: ') as caught:
            call()
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        assert len(message.partition("': ")[0]) < 130


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        (3, '3'),
        ('no', "'no'"),
        ('a\nb', r"'a\nb'"),
        ('x' * 50, f"'{'x' * 37}...'"),
        pytest.param(10**5000, 'int', id='huge'),
        ([0] * 100, 'list'),
        (np.zeros((20, 30)), 'ndarray of shape (20, 30)'),
        (np.zeros((2, 2)), 'ndarray of shape (2, 2)'),
    ],
)
def test_shown(value, expected):
    assert shown(value) == expected


def test_quoted_names_keep_paths_whole():
    path = 'encoder/layers/11/attention/query_projection/kernel'
    assert quoted(path) == f"'{path}'"
    assert quoted(3) == "'3'"


def test_numbers_beyond_floats():
    with pytest.raises(PruneError, match=r'^density is too large: int$'):
        real('density', 10**5000)
    with pytest.raises(PruneError, match=r'^epsilon must be a number'):
        positive('epsilon', 'x')
    with pytest.raises(PruneError, match=r"^steps must be a whole number, not '3'$"):
        whole('steps', '3')
