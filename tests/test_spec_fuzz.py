"""Ten thousand broken specifications: each is read, or refused in one line; nothing is half begun.

`test_spec.py` replaces values in the table of one specification. Here the files themselves are
broken, as bytes and as text, all that the repository has, with `--set` strings beside them.
"""

import copy
import datetime
import shutil
import tempfile
import tomllib
from pathlib import Path

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxprune.catalogue import KINDS, entries
from jaxprune.errors import JaxpruneError
from jaxprune.sweep import plan_sweep, status, store, to_toml
from jaxprune.sweep.grid import runs
from jaxprune.sweep.load import read_spec
from jaxprune.sweep.open_sweep import stored_spec

BASE = {
    'name': 'tiny',
    'model': {'name': 'mlp', 'widths': [8]},
    'data': {'name': 'mnist_small', 'train_examples': 300, 'test_examples': 100},
    'train': {'epochs': 2, 'batch_size': 100},
    'grid': {'method': ['magnitude', 'snip'], 'compression': [1, 4], 'seed': [0, 1]},
}
#: Cases of the default run and of `pytest -m more`; those of whole files take the longest.
COUNTS = [pytest.param(60, id='few'), pytest.param(4500, id='many', marks=pytest.mark.more)]
FEWER = [pytest.param(60, id='few'), pytest.param(1200, id='many', marks=pytest.mark.more)]


def with_key(snippet):
    """The small specification with a piece of TOML from `jaxprune explain` laid over it."""
    table = copy.deepcopy(BASE)
    for key, value in tomllib.loads(snippet).items():
        table[key] = {**table.get(key, {}), **value} if isinstance(value, dict) else value
    if 'density' in table['grid']:
        del table['grid']['compression']
    return tomli_w.dumps(table)


EXPERIMENTS = sorted((Path(__file__).parents[1] / 'experiments').rglob('*.toml'))
SNIPPETS = [entry.snippet for entry in entries('keys') if entry.snippet]
FILES = [*(path.read_text() for path in EXPERIMENTS), *map(with_key, SNIPPETS)]
#: As `--set` takes them: those of methods in the table that all methods share.
KEYS = [entry.name.replace('grid.method.', 'grid.every_method.') for entry in entries('keys')]

WORDS = [
    '',
    ' ',
    '.',
    '..',
    '\n',
    '\r',
    '\x1c',
    '\0',
    'ä',
    '\u2028',
    '🂡',
    'x' * 10_000,
    '[',
    'params',
    'unit',
]
WORDS += [
    'snip',
    'mlp',
    'vgg11',
    'sgd',
    'adam',
    'step',
    'cifar10',
    '2:4',
    '8x128',
    '0x0',
    '99999x1',
]
NUMBERS = [0, -1, 1, 2, 2**31 - 1, 2**31, -(2**63), 2**64, 10**400, 0.0, -0.0, 0.5, -1e-300]
NUMBERS += [5e-324, 1e39, 1e308, float('nan'), float('inf'), -float('inf')]
words, numbers = st.sampled_from(WORDS), st.sampled_from(NUMBERS)
moments = st.sampled_from(
    [datetime.date(2026, 1, 1), datetime.time(1, 2), datetime.datetime(2026, 1, 1, 1, 2)]
)
values = st.recursive(
    st.one_of(st.booleans(), numbers, words, st.text(max_size=4), moments),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.text(max_size=4), words), inner, max_size=3),
    ),
    max_leaves=5,
)


def written(value):
    """A value as TOML."""
    return tomli_w.dumps({'value': value}).removeprefix('value = ').strip()


def deep(depth, opening, closing):
    return opening * depth + closing * depth


#: Values that many keys take: otherwise hardly a specification would get as far as `check_spec`.
NAMES = [entry.name for kind in KINDS if kind != 'keys' for entry in entries(kind)]
usual = st.one_of(
    st.integers(0, 5),
    st.sampled_from([0.5, 1.0, 0.1, 20.0]),
    st.booleans(),
    st.sampled_from(NAMES),
    st.sampled_from([[1], [2, 4], [0.5], ['flip'], ['snip', 'magnitude'], [0], [1.0, 2.0]]),
)
raw_values = st.one_of(
    usual.map(written),
    usual.map(written),
    usual.map(written),
    values.map(written),
    st.text(max_size=8),
    st.builds(deep, st.sampled_from([3, 50, 3000]), st.just('['), st.sampled_from([']', ''])),
    st.builds(deep, st.sampled_from([3, 50, 3000]), st.just('{a='), st.sampled_from(['1}', '}'])),
    st.sampled_from(['nan', '-inf', '1e999999', '0x' + 'f' * 5000, '"""', "'''", '1979-99-99']),
)


def read_whole(content, overrides):
    """The specification, or None after an error of one line."""
    try:
        spec = read_spec(content, 'my.toml', tempfile.gettempdir(), overrides)
    except JaxpruneError as error:
        assert str(error).startswith(('my.toml: ', '--set ')), error
        assert len(str(error).splitlines()) == 1, repr(str(error))
        assert len(str(error)) < 5000
        return None
    assert read_spec(to_toml(spec).encode(), 'again') == spec
    return spec


def is_read_or_refused(content, overrides):
    """A check of one case."""
    read_whole(content, overrides)


def cases(count, *strategies):
    """A decorator that tries a check at so many cases."""
    quiet = settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    return lambda check: quiet(given(*strategies)(check))()


@st.composite
def broken_bytes(draw):
    """A file that was cut off, mixed up, or is no text."""
    content = draw(st.sampled_from(FILES)).encode()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        end = min(len(content), at + draw(st.sampled_from([0, 1, 2, 10])))
        how = draw(st.sampled_from(['cut', 'insert', 'replace', 'double', 'head']))
        noise = draw(
            st.one_of(
                st.binary(max_size=4),
                st.sampled_from(
                    [b'\xff\xfe', b'\0', b'\xef\xbb\xbf', b'\r', b'"', b'[', b'=', b'#']
                ),
            )
        )
        content = {
            'cut': content[:at],
            'insert': content[:at] + noise + content[at:],
            'replace': content[:at] + noise + content[end:],
            'double': content[:end] + content[at:],
            'head': noise + content,
        }[how]
    return content


@st.composite
def broken_lines(draw):
    """A file with lines that are doubled, lost, moved, or have another value."""
    lines = draw(st.sampled_from(FILES)).splitlines()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(lines) - 1, 0)))
        line = lines[at] if lines else ''
        how = draw(st.sampled_from(['value', 'value', 'value', 'double', 'drop', 'move', 'key']))
        if how == 'value' and '=' in line:
            lines[at] = f'{line.partition("=")[0]}= {draw(raw_values)}'
        elif how == 'drop':
            del lines[at : at + 1]
        elif how == 'move':
            lines.insert(draw(st.integers(0, len(lines))), line)
            del lines[at : at + 1]
        elif how == 'key':
            within = st.sampled_from(KEYS).map(lambda key: key.rpartition('.')[2])
            name = draw(st.one_of(within, within, words.map(written), st.text(max_size=5)))
            lines.insert(at, f'{name} = {draw(raw_values)}')
        else:
            lines.insert(at, line)
    return '\n'.join(lines)


DEFAULTS = [
    (entry.name.replace('grid.method.', 'grid.every_method.'), value)
    for entry in entries('keys')
    for value in entry.defaults.values()
    if value is not None
]
SIGNS = ['=', '=', '=', '=', ' = ', '', '==']


@st.composite
def overrides(draw):
    """A `--set` string, some of them with the default that a key has anyway."""
    if draw(st.booleans()):
        key, value = draw(st.sampled_from(DEFAULTS))
        return f'{key}={written(value)}'
    key = draw(
        st.one_of(
            st.sampled_from(KEYS),
            st.sampled_from(KEYS),
            st.sampled_from(KEYS),
            st.sampled_from(KEYS).map(lambda key: key.split('.', 1)[-1]),
            st.tuples(st.sampled_from(KEYS), words).map('.'.join),
            st.text(max_size=6),
        )
    )
    return f'{key}{draw(st.sampled_from(SIGNS))}{draw(raw_values)}'


def encoded(text):
    return text.encode('utf-8', 'surrogatepass')


@pytest.mark.parametrize('count', COUNTS)
def test_broken_bytes(count):
    """Expectation: a specification that survives its round trip, or one line."""
    cases(count, broken_bytes(), st.just(()))(is_read_or_refused)


@pytest.mark.parametrize('count', COUNTS)
def test_broken_lines(count):
    """Expectation: as above."""
    cases(count, broken_lines().map(encoded), st.just(()))(is_read_or_refused)


@pytest.mark.parametrize('count', FEWER)
def test_any_set_string(count):
    """Expectation: as above, for one or two `--set` strings on a file that is whole."""
    files = st.sampled_from(FILES).map(encoded)
    cases(count, files, st.lists(overrides(), min_size=1, max_size=2))(is_read_or_refused)


def is_cheap(spec):
    """Is planning it a matter of a second?"""
    small = spec.model.name == 'mlp' and max(spec.model.options['widths']) <= 1000
    rounds = max(method.rounds for method in spec.grid.method)
    return small and len(runs(spec)) <= 100 and rounds <= 100 and spec.train.epochs <= 1000


@pytest.mark.parametrize(
    'count', [pytest.param(6, id='few'), pytest.param(60, id='many', marks=pytest.mark.more)]
)
def test_a_plan_is_whole_or_not_there(count):
    """Expectation: a directory that opens again as the same sweep, or none at all."""

    def check(changed):
        spec = read_whole(tomli_w.dumps(BASE).encode(), changed)
        if spec is None or not is_cheap(spec):
            return
        folder = Path(tempfile.mkdtemp())
        try:
            plan_sweep(spec, folder / 'out', 'my.toml')
        except JaxpruneError as error:
            assert len(str(error).splitlines()) == 1
            assert not list(folder.iterdir())
        else:
            assert stored_spec(folder / 'out') == spec
            plan = store.read_plan(folder / 'out')
            assert sum(len(chunk['runs']) for chunk in plan['chunks']) == len(runs(spec))
            assert status(folder / 'out')['runs_finished'] == 0
        finally:
            shutil.rmtree(folder)

    cases(count, st.lists(likely_overrides(), min_size=1, max_size=3))(check)


def likely_overrides():
    """`--set` strings of which many can be, so that something is planned."""
    lists = st.lists(st.sampled_from([1, 2, 5, 30, 1e3, 1e9]), min_size=1, max_size=3, unique=True)
    methods = [entry.name for entry in entries('methods')]
    return st.one_of(
        st.sampled_from(methods).map(lambda name: f'grid.method=["{name}"]'),
        lists.map(lambda found: f'grid.compression={found}'),
        st.lists(st.integers(1, 1000), max_size=3).map(lambda found: f'model.widths={found}'),
        st.sampled_from(['adam', 'lion', 'lars', 'noisy_sgd']).map('train.optimizer={}'.format),
        st.floats(1e-9, 1e9).map('train.learning_rate={}'.format),
        st.integers(0, 2**31).map('engine.chunk={}'.format),
        st.integers(1, 400).map('prune.samples_per_class={}'.format),
        st.floats(0, 3).map(
            lambda start: f'grid.every_method={{start={start}, granularity="unit"}}'
        ),
        overrides(),
    )
