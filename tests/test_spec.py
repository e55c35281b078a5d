"""Specifications: every mistake is told in one line, nothing is written, none passes silently."""

import copy
import re
import tomllib
from pathlib import Path

import pytest
import tomli_w
from changed_table import changed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxprune.errors import JaxpruneError, SpecError, shown
from jaxprune.sweep import load_spec, make_plan, make_spec, to_toml
from jaxprune.sweep.grid import runs
from jaxprune.sweep.load import resolved, spec_hash
from jaxprune.sweep.spec import SweepSpec

QUICKSTART = Path(__file__).parents[1] / 'experiments' / 'quickstart.toml'
BASE = {
    'name': 'tiny',
    'model': {'name': 'mlp', 'widths': [8]},
    'data': {'name': 'mnist_small', 'train_examples': 300, 'test_examples': 100},
    'train': {'optimizer': 'sgd', 'momentum': 0.9, 'epochs': 2, 'batch_size': 100},
    'grid': {'method': ['magnitude', 'snip'], 'compression': [1, 4], 'seed': [0, 1]},
}
NAN, INF, HUGE = float('nan'), float('inf'), 10**400


def without(table, name):
    table = copy.deepcopy(table)
    *outer, last = name.split('__')
    inner = table
    for key in outer:
        inner = inner[key]
    del inner[last]
    return table


#: Dotted key of the message -> (changes, what the message must say).
BAD = [
    # names, with the nearest valid one
    ('trian', {'trian': {}}, "did you mean 'train'"),
    ('data.nmae', {'data__nmae': 'x'}, "did you mean 'name'"),
    ('train.lerning_rate', {'train__lerning_rate': 0.1}, "did you mean 'learning_rate'"),
    ('train.momentun', {'train__momentun': 0.1}, "did you mean 'momentum'"),
    ('grid.methods', {'grid__methods': []}, "did you mean 'method'"),
    ('record.every_epoch', {'record__every_epoch': 1}, "did you mean 'every_epochs'"),
    ('engine.chunks', {'engine__chunks': 1}, "did you mean 'chunk'"),
    ('prune.batch', {'prune__batch': 1}, "did you mean 'batches'"),
    ('model.name', {'model__name': 'lenet300'}, "did you mean 'lenet300100'"),
    ('model.width', {'model__width': [3]}, "did you mean 'widths'"),
    ('data.name', {'data__name': 'minst'}, "did you mean 'mnist'"),
    ('data.augment[1]', {'data__augment': ['flip', 'crpo']}, "did you mean 'crop'"),
    ('train.optimizer', {'train__optimizer': 'sdg'}, "did you mean 'sgd'"),
    ('train.schedule', {'train__schedule': 'cosin'}, "did you mean 'cosine'"),
    ('grid.method[0].name', {'grid__method': ['snipp']}, "did you mean 'snip'"),
    (
        'grid.method[1].temprature',
        {'grid__method': ['snip', {'name': 'grasp', 'temprature': 1}]},
        "did you mean 'temperature'",
    ),
    (
        'grid.method[0].rate',
        {'grid__method': [{'name': 'snip', 'rate': 1}]},
        "unknown key or option of 'snip', valid: ",
    ),
    (
        'grid.method[0].allocation',
        {'grid__method': [{'name': 'snip', 'allocation': 'unifrom'}]},
        "did you mean 'uniform'",
    ),
    (
        'grid.method[0].density_schedule',
        {'grid__method': [{'name': 'snip', 'density_schedule': 'liner'}]},
        "did you mean 'linear'",
    ),
    (
        'grid.method[0].batch_norm',
        {'grid__method': [{'name': 'snip', 'batch_norm': 'trian'}]},
        "did you mean 'train'",
    ),
    ('engine.batching', {'engine__batching': 'vmp'}, "did you mean 'vmap'"),
    (
        'grid.method[0].allocaton',
        {'grid__method': [{'name': 'snip', 'allocaton': 'igq'}]},
        "did you mean 'allocation'",
    ),
    (
        'grid.method[0].flor',
        {'grid__method': [{'name': 'snip', 'flor': 1}]},
        "did you mean 'floor'",
    ),
    ('model.activation', {'model__activation': 'rely'}, "did you mean 'relu'"),
    ('model.init', {'model__init': 'kaiming'}, "did you mean 'kaiming_"),
    (
        'model.order',
        {'model': {'name': 'vgg11', 'order': 'bn'}, 'data__name': 'cifar10'},
        'conv_bn_relu',
    ),
    # types
    ('name', {'name': 3}, 'expected a string, not 3'),
    ('model', {'model': 'mlp'}, 'expected a table'),
    ('train', {'train': [1]}, 'expected a table'),
    ('train.epochs', {'train__epochs': True}, 'expected a whole number, not True'),
    ('train.epochs', {'train__epochs': 2.0}, 'expected a whole number, not 2.0'),
    ('train.epochs', {'train__epochs': '2'}, "expected a whole number, not '2'"),
    ('train.learning_rate', {'train__learning_rate': '0.1'}, "expected a number, not '0.1'"),
    ('train.learning_rate', {'train__learning_rate': False}, 'expected a number, not False'),
    ('train.momentum', {'train__momentum': True}, 'expected a number, not True'),
    ('train.nesterov', {'train__nesterov': 1}, 'expected true or false, not 1'),
    ('model.widths', {'model__widths': 8}, 'expected a list of positive whole numbers'),
    ('model.widths', {'model__widths': [8.0]}, 'expected a list of positive whole numbers'),
    ('model.widths', {'model__widths': [0]}, 'expected a list of positive whole numbers'),
    ('data.augment', {'data__augment': 'crop'}, "expected a list, not 'crop'"),
    ('grid.method', {'grid__method': 'snip'}, "expected a list, not 'snip'"),
    ('grid.method[0]', {'grid__method': [3]}, 'expected a table, not 3'),
    ('grid.method[0].name', {'grid__method': [{}]}, 'such as name = "snip"'),
    ('model.widths', {'model__widths': []}, 'expected a list of positive whole numbers'),
    ('grid.seed', {'grid__seed': []}, 'expected at least one value'),
    # values are shown, but never whole pages of them
    ('train.epochs', {'train__epochs': [1] * 10_000}, 'expected a whole number, not list'),
    ('train.epochs', {'train__epochs': 10**5000}, 'expected less than 2**31, not int'),
    ('model.widths[0]', {'model__widths': [10**5000]}, 'expected less than 2**31, not int'),
    ('train.optimizer', {'train__optimizer': 'x' * 10_000}, 'xxx...'),
    ('name', {'name': {'a': 'b' * 1000}}, 'expected a string, not dict'),
    # amounts that no machine has
    ('prune.batches', {'prune__batches': 2**31 - 1}, 'expected at most 1000, not 2147483647'),
    (
        'grid.method[0].rounds',
        {'grid__method': [{'name': 'snip', 'rounds': 2**31 - 1}]},
        'expected at most 10000',
    ),
    (
        'grid.method[0].steps',
        {'grid__method': [{'name': 'prospr', 'steps': 2**31 - 1}]},
        'expected at most 100',
    ),
    (
        'grid.method[0].repeats',
        {'grid__method': [{'name': 'ntk_sap', 'repeats': 10**6}]},
        'expected at most 100',
    ),
    (
        'grid.method[0].every',
        {
            'train__epochs': 200_000,
            'grid__method': [
                {'name': 'snip', 'start': 1, 'every': 1, 'end': 500_000, 'time_unit': 'steps'}
            ],
        },
        'makes 500,000 rounds up to end, more than 10,000',
    ),
    ('model.depth', {'model': {'name': 'vit', 'depth': 2**31 - 1}}, 'expected at most 100'),
    ('model.heads', {'model': {'name': 'vit', 'dim': 10}}, '4 heads do not divide a token of 10'),
    ('model.patch', {'model': {'name': 'vit', 'patch': 5}}, 'do not tile 28 x 28 images'),
    ('model.heads', {'model': {'name': 'vit', 'heads': 0}}, 'expected at least 1, not 0'),
    ('grid.seed', {'grid__seed': list(range(600_000))}, '2,400,000 runs, more than 1,000,000'),
    ('record.every_epochs', {'train__epochs': 2**29}, 'rows for each run are more than'),
    ('grid.compression', {'grid__compression': 4}, 'expected a list, not 4'),
    ('grid.compression[0]', {'grid__compression': ['4']}, "expected a number, not '4'"),
    ('grid.seed[1]', {'grid__seed': [0, True]}, 'expected a whole number, not True'),
    ('grid.train', {'grid__train': [1]}, 'expected a table of lists'),
    # ranges
    ('grid.compression[1]', {'grid__compression': [2, 0.5]}, 'expected at least 1'),
    ('grid.compression[0]', {'grid__compression': [NAN]}, 'expected a finite number'),
    ('grid.compression[0]', {'grid__compression': [INF]}, 'expected a finite number'),
    ('grid.compression[0]', {'grid__compression': [HUGE]}, 'expected a finite number'),
    ('grid.seed[0]', {'grid__seed': [-1]}, 'expected at least 0'),
    ('grid.seed[0]', {'grid__seed': [2**31]}, 'expected less than 2**31'),
    ('train.epochs', {'train__epochs': 0}, 'expected at least 1'),
    ('train.epochs', {'train__epochs': 2**31}, 'expected less than 2**31'),
    ('train.epochs', {'train__epochs': 2**30}, 'more than 2**31 steps'),
    ('train.batch_size', {'train__batch_size': 0}, 'expected at least 1'),
    ('train.batch_size', {'train__batch_size': 301}, 'more than 300 examples'),
    ('train.learning_rate', {'train__learning_rate': 0}, 'expected more than 0'),
    ('train.learning_rate', {'train__learning_rate': NAN}, 'expected a finite number'),
    ('train.learning_rate', {'train__learning_rate': 1e39}, 'expected a finite number'),
    ('train.learning_rate', {'train__learning_rate': HUGE}, 'expected a finite number'),
    ('train.momentum', {'train__momentum': INF}, 'expected a finite number'),
    ('train.momentum', {'train__momentum': HUGE}, 'expected a finite number'),
    ('train.weight_decay', {'train__weight_decay': -1e-3}, 'expected at least 0'),
    ('train.warmup_epochs', {'train__warmup_epochs': 2}, 'fewer than the 2 epochs'),
    ('train.milestones', {'train__schedule': 'step'}, 'expected the epochs'),
    (
        'train.milestones[0]',
        {'train__schedule': 'step', 'train__milestones': [0]},
        'expected a positive epoch',
    ),
    ('model.widths[0]', {'model__widths': [2**31]}, 'expected less than 2**31'),
    ('model', {'model__widths': [50_000, 50_000]}, 'more than 2**31'),
    ('model', {'model': {'name': 'small_vgg', 'widths': [1] * 5}}, 'images of 32 x 32'),
    ('data.train_examples', {'data__train_examples': 10_001}, 'only 10000'),
    ('data.test_examples', {'data__test_examples': 2_001}, 'only 2000'),
    ('prune.samples_per_class', {'prune__samples_per_class': 31}, '31 of each of 10 classes'),
    ('prune.samples_per_class', {'prune__batches': 4}, '40 of each of 10 classes'),
    ('grid.compression', {'grid__compression': [1e5]}, 'keeps none of 6352'),
    ('engine.chunk', {'engine__chunk': -1}, 'expected at least 0'),
    ('record.every_epochs', {'record__every_epochs': 0}, 'expected at least 1'),
    # empty, twice, missing
    ('grid.method', {'grid__method': []}, 'expected at least one value'),
    ('grid.compression', {'grid__compression': []}, 'expected at least one value'),
    ('grid.seed', {'grid__seed': []}, 'expected at least one value'),
    ('grid.compression', {'grid__compression': [2, 2.0]}, 'listed twice'),
    ('grid.seed', {'grid__seed': [1, 1]}, 'listed twice'),
    ('grid.method', {'grid__method': ['snip', 'snip']}, "two entries are called 'SNIP'"),
    (
        'grid.method',
        {'grid__method': ['snip', {'name': 'random', 'label': 'SNIP'}]},
        "two entries are called 'SNIP'",
    ),
    (
        'grid.method[0].label',
        {'grid__method': [{'name': 'snip', 'label': 'dense'}]},
        'the name of the control',
    ),
    # [grid.train]
    (
        'grid.train.learnin_rate',
        {'grid__train': {'learnin_rate': [0.1]}},
        "did you mean 'learning_rate'",
    ),
    ('grid.train.learning_rate', {'grid__train': {'learning_rate': [[0.1]]}}, 'expected a number'),
    ('grid.train.learning_rate', {'grid__train': {'learning_rate': 0.1}}, 'expected a list'),
    ('grid.train.learning_rate', {'grid__train': {'learning_rate': []}}, 'expected a list'),
    ('grid.train.learning_rate', {'grid__train': {'learning_rate': [0.1, 0.1]}}, 'twice'),
    ('grid.train.momentum', {'grid__train': {'momentum': [NAN]}}, 'finite'),
    ('grid.train.epochs', {'grid__train': {'epochs': [1, 2.5]}}, 'expected a whole number'),
    ('train.batch_size', {'grid__train': {'batch_size': [100, 500]}}, 'more than 300'),
    ('grid.train.nesterov', {'grid__train': {'nesterov': [1]}}, 'expected true or false'),
    # combinations: momentum is sgd's and no argument of adam
    ('train.momentum', {'grid__train': {'optimizer': ['sgd', 'adam']}}, "no argument of 'adam'"),
    ('train.warmup_epochs', {'train__warmup_epochs': 1, 'grid__train': {'epochs': [1, 2]}}, ''),
    ('train.milestones', {'grid__train': {'schedule': ['cosine', 'step']}}, ''),
    # file names
    *[('name', {'name': n}, 'plain file name') for n in ('', ' ', '.', '..', 'a/b', 'a\nb', 'a\0')],
    ('name', {'name': 'x' * 201}, 'plain file name'),
]


def name_of(number, key, changes):
    values = ' '.join(shown(value) for value in changes.values())
    return f'{number}-{key}-{re.sub("[^ -~]", "?", values)[:40]}'


@pytest.mark.parametrize(
    ('key', 'changes', 'says'),
    BAD,
    ids=[name_of(i, key, changes) for i, (key, changes, _) in enumerate(BAD)],
)
def test_one_line_names_file_key_and_remedy(key, changes, says):
    with pytest.raises(SpecError) as caught:
        make_plan(make_spec(changed(BASE, **changes), 'my.toml'), 'my.toml')
    message = str(caught.value)
    assert message.startswith(f'my.toml: {key}: '), message
    assert says in message
    assert '\n' not in message


@pytest.mark.parametrize('name', ['name', 'model', 'data', 'grid', 'model__name', 'grid__seed'])
def test_missing_required_key(name):
    with pytest.raises(SpecError, match=rf'^spec: {name.replace("__", ".")}: missing; expected'):
        make_spec(without(BASE, name))


def test_every_mistake_is_of_a_valid_table():
    assert isinstance(make_spec(BASE), SweepSpec)
    assert len(make_plan(make_spec(BASE))['runs']) == 2 + 2 * 2


def test_small_data_is_enough_where_no_score_looks_at_it():
    table = changed(BASE, data__train_examples=100, prune__samples_per_class=50)
    with pytest.raises(SpecError, match='samples_per_class'):
        make_plan(make_spec(table))
    make_plan(make_spec(changed(table, grid__method=['magnitude', 'random'])))


def test_arguments_of_a_swept_optimizer():
    """They are read beside the optimizers of the grid, not the one of [train]."""
    grid = {'optimizer': ['adam', 'adamw'], 'b1': [0.9, 0.8]}
    table = changed(without(BASE, 'train__momentum'), grid__train=grid)
    assert len(make_plan(make_spec(table))['programs']) == 2


# Through the command line


@pytest.fixture
def command(command, monkeypatch, tmp_path):
    """The command line in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return command


FILES = {
    'unknown key': ('name = "x"\nseeds = 3', 'seeds: unknown key'),
    'key with a line break': ('name = "x"\n"se\\neds" = 3', 'se eds: unknown key'),
    'broken': ('name = ', 'not valid TOML'),
    'twice': ('name = "x"\nname = "y"', 'not valid TOML'),
    'empty': ('', 'missing; expected'),
    'deep': (f'name = {"[" * 5000}', 'not valid TOML'),
    'long number': (f'name = {"9" * 5000}', 'not valid TOML'),
    'long hexadecimal': (f'name = 0x{"f" * 5000}', 'expected a string, not int'),
    'byte-order mark': ('\ufeffname = "x"', 'model: missing; expected'),
    'latin-1': ('name = "\xe9"'.encode('latin-1'), 'cannot be read'),
}


@pytest.mark.parametrize('verb', ['plan', 'sweep'])
@pytest.mark.parametrize('kind', FILES)
def test_bad_file(command, tmp_path, kind, verb):
    content, says = FILES[kind]
    (tmp_path / 'my.toml').write_bytes(content if isinstance(content, bytes) else content.encode())
    _is_refused(command, tmp_path, says, verb, 'my.toml')


@pytest.mark.parametrize('verb', ['plan', 'sweep'])
def test_no_file(command, tmp_path, verb):
    _is_refused(command, tmp_path, 'nowhere.toml: no such file', verb, 'nowhere.toml')
    _is_refused(command, tmp_path, f'{tmp_path}: cannot be read', verb, tmp_path)


SETS = {
    'train.epochs': 'expected key=value',
    '=3': 'expected key=value',
    'train.epoch=3': "train.epoch: unknown key, and no argument of 'sgd', did you mean 'epochs'",
    'trian.epochs=3': "trian: unknown key, did you mean 'train'",
    'train.epochs=two': "train.epochs: expected a whole number, not 'two'",
    'train.epochs=': "train.epochs: expected a whole number, not ''",
    'train.epochs=1\nbatch_size=2': 'expected one value',
    'train.epochs.deep=1': "'epochs' is not a section",
    'grid.seed.0=1': "'seed' is not a section",
    'grid.method.0.name=snip': "'method' is not a section",
    'grid.method[0].name=snip': 'method[0]: unknown key',
    'grid.seed=[0,': '--set grid.seed=[0,: not valid TOML: ',
    'name="x': '--set name="x: not valid TOML: ',
    'grid.compression=[1e9]': 'grid.compression: 1e+09 with magnitude: density 1e-09 keeps none',
    'model.name=mlpp': "did you mean 'mlp'",
    'data.train_examples=100000': 'mnist_small has only 10000',
}


@pytest.mark.parametrize('verb', ['plan', 'sweep'])
@pytest.mark.parametrize('override', SETS)
def test_bad_override(command, tmp_path, override, verb):
    (tmp_path / 'my.toml').write_text(tomli_w.dumps(BASE))
    _is_refused(command, tmp_path, SETS[override], verb, 'my.toml', '--set', override)


def test_override_replaces_nested_and_absent_values(tmp_path):
    path = tmp_path / 'my.toml'
    path.write_text(tomli_w.dumps(BASE))
    sets = ['grid.train.momentum=[0.0, 0.5]', 'data.name=mnist', 'engine.chunk=3', 'grid.seed=[7]']
    spec = load_spec(path, sets)
    assert spec.grid.train == {'momentum': (0.0, 0.5)}
    assert (spec.data.name, spec.engine.chunk, spec.grid.seed) == ('mnist', 3, (7,))


def test_scores_may_want_more_than_the_smallest_class_has(command, tmp_path):
    """Only the data tell: 30 of each class would be 300 examples, but the classes are uneven."""
    (tmp_path / 'my.toml').write_text(tomli_w.dumps(changed(BASE, prune__samples_per_class=30)))
    says = 'my.toml: prune.samples_per_class: 30 of each class'
    _is_refused(command, tmp_path, says, 'sweep', 'my.toml')


def test_missing_data_is_told_before_anything_is_written(command, tmp_path):
    (tmp_path / 'my.toml').write_text(
        tomli_w.dumps(changed(BASE, data__name='cifar10', data__train_examples=0))
    )
    says = 'no prepared cifar10'
    _is_refused(command, tmp_path, says, 'sweep', 'my.toml', '--data-dir', tmp_path / 'none')


@pytest.mark.parametrize('verb', ['status', 'report'])
def test_not_a_sweep_directory(command, tmp_path, verb):
    (tmp_path / 'my.toml').write_text('')
    for place in (tmp_path, tmp_path / 'none', tmp_path / 'my.toml'):
        _is_refused(command, tmp_path, 'is not a sweep directory', verb, place)


def _is_refused(command, directory, says, *arguments):
    before = sorted(directory.rglob('*'))
    code, out, err = command(*arguments)
    assert (code, out) == (2, '')
    assert err.startswith('jaxprune: ')
    assert err.count('\n') == 1 and err.endswith('\n')
    assert says in err
    assert sorted(directory.rglob('*')) == before, 'something was written'


# Random mistakes


def places(table, at=()):
    """Every key and list place of a nested table."""
    items = table.items() if isinstance(table, dict) else enumerate(table)
    for key, value in items:
        yield (*at, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*at, key))


WHOLE = {**tomllib.loads(QUICKSTART.read_text()), 'prune': {'batches': 1}, 'engine': {'chunk': 3}}
WHOLE['grid']['train'] = {'learning_rate': [0.1, 0.2], 'batch_size': [64]}
values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([0, -1, 2**31, 2**63, HUGE, 'sgd', 'step', 'adam', 'snip', 'small_vgg']),
        st.floats(),
        st.text(max_size=4),
        st.dates(),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_mutated_quickstart_is_read_or_refused(data):
    """Whatever stands in a file: a specification that survives a round trip, or a SpecError."""
    table = copy.deepcopy(WHOLE)
    for _ in range(data.draw(st.integers(1, 2))):
        *outer, last = data.draw(st.sampled_from(sorted(places(table), key=repr)))
        inner = table
        for key in outer:
            inner = inner[key]
        action = data.draw(st.sampled_from(['replace', 'delete', 'add']))
        if action == 'delete':
            del inner[last]
        elif action == 'add' and isinstance(inner, dict):
            inner[data.draw(st.text(max_size=5))] = data.draw(values)
        else:
            inner[last] = data.draw(values)
    try:
        spec = make_spec(table, 'my.toml')
    except SpecError as error:
        assert str(error).startswith('my.toml: ')
        return
    assert make_spec(resolved(spec)) == spec
    assert make_spec(tomllib.loads(to_toml(spec))) == spec


@settings(max_examples=25, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            'model__widths': st.lists(st.integers(1, 2**31 - 1), max_size=3),
            'train__learning_rate': st.floats(min_value=0, exclude_min=True),
            'train__momentum': st.floats(),
            'train__epochs': st.integers(1, 2**40),
            'train__batch_size': st.integers(1, 400),
            'train__optimizer': st.sampled_from(['sgd', 'adam', 'sm3', 'lars', 'noisy_sgd']),
            'grid__compression': st.lists(st.floats(1, 1e6), min_size=1, max_size=3, unique=True),
            'prune__samples_per_class': st.integers(1, 2**40),
            'engine__chunk': st.integers(0, 2**40),
            'engine__batching': st.sampled_from(['vmap', 'map', 'unroll']),
        },
    )
)
def test_any_plan_is_made_or_refused(changes):
    try:
        plan = make_plan(make_spec(changed(BASE, **changes)))
    except JaxpruneError as error:
        assert '\n' not in str(error)
        return
    assert sorted(r for c in plan['chunks'] for r in c['runs']) == sorted(
        r['run_id'] for r in plan['runs']
    )


# Round trips and identities


def test_round_trip():
    spec = load_spec(QUICKSTART)
    assert make_spec(resolved(spec)) == spec
    again = make_spec(tomllib.loads(to_toml(spec)))
    assert again == spec
    assert to_toml(again) == to_toml(spec)
    assert spec_hash(again) == spec_hash(spec)
    assert 'options' not in to_toml(spec)


def test_resolved_file_can_be_swept_again(tmp_path):
    spec = make_spec(BASE)
    path = tmp_path / 'spec.toml'
    path.write_text(to_toml(spec))
    assert load_spec(path) == spec


def test_hash_tells_specifications_apart_and_ignores_what_is_default():
    base = spec_hash(make_spec(BASE))
    assert spec_hash(make_spec(dict(reversed(BASE.items())))) == base
    assert spec_hash(make_spec(changed(BASE, prune__batches=1))) == base
    assert spec_hash(make_spec(changed(BASE, train__epochs=3))) != base


def ids(table):
    """(method, compression, seed) -> run_id."""
    return {(r.method.name, r.compression, r.seed): r.run_id for r in runs(make_spec(table))}


@pytest.mark.parametrize(
    'changes',
    [
        {'name': 'other'},
        {'engine__chunk': 3},
        {'engine__batching': 'vmap'},
        {'record__every_epochs': 2},
        {'grid__method': ['snip', {'name': 'magnitude', 'label': 'by size'}]},
        {'grid__method': ['snip', {'name': 'magnitude', 'rounds': 1}, 'random']},
        {'grid__compression': [4, 1.0, 8]},
        {'grid__seed': [2, 1, 0]},
        {'train__learning_rate': 0.1},
        {'grid__train': {'momentum': [0.9, 0.5]}},
    ],
    ids=str,
)
def test_run_id_ignores_what_changes_no_result(changes):
    other = changed(BASE, **changes)
    if 'grid__train' in changes:
        found = {r.run_id for r in runs(make_spec(other))}
    else:
        found = set(ids(other).values())
    assert set(ids(BASE).values()) <= found
    assert len(found) == len(runs(make_spec(other)))


@pytest.mark.parametrize(
    'changes',
    [
        {'model__widths': [9]},
        {'data__train_examples': 301},
        {'data__test_examples': 99},
        {'data__augment': ['flip']},
        {'data__name': 'mnist'},
        {'train__momentum': 0.8},
        {'train__nesterov': True},
        {'train__learning_rate': 0.2},
        {'train__schedule': 'constant'},
        {'train__warmup_epochs': 0.5},
        {'train__epochs': 3},
        {'train__batch_size': 99},
        {'train__weight_decay': 1e-4},
        {'prune__samples_per_class': 2},
        {'prune__batches': 2},
    ],
    ids=str,
)
def test_run_id_follows_what_changes_results(changes):
    assert not set(ids(changed(BASE, **changes)).values()) & set(ids(BASE).values())


def test_run_id_follows_the_method():
    kinds = [
        'grasp',
        {'name': 'grasp', 'temperature': 1.0, 'label': 'b'},
        {'name': 'grasp', 'batch_norm': 'eval', 'label': 'c'},
        {'name': 'grasp', 'rounds': 2, 'label': 'd'},
        {'name': 'grasp', 'rounds': 2, 'density_schedule': 'linear', 'label': 'e'},
        {'name': 'grasp', 'allocation': 'erk', 'label': 'f'},
        {'name': 'grasp', 'allocation': 'uniform', 'label': 'g'},
        'snip',
    ]
    found = [r.run_id for r in runs(make_spec(changed(BASE, grid__method=kinds)))]
    assert len(set(found)) == len(found) == 2 + len(kinds) * 2


def test_what_a_library_refuses_is_told_in_one_line(monkeypatch):
    """Whatever flax or optax raise while the program is traced is a mistake in the file."""

    def build(*args, **kwargs):
        raise ValueError('no such thing\nand a long story')

    monkeypatch.setattr('jaxprune.sweep.program.nn.build', build)
    with pytest.raises(SpecError) as caught:
        make_plan(make_spec(BASE, 'my.toml'), 'my.toml')
    expected = 'my.toml: model or train: refused by the library: no such thing'
    assert str(caught.value) == expected


def test_keys_of_every_method():
    """Expectation: entries have the shared keys where they say nothing; nothing else changes."""
    grid = {'compression': [2], 'seed': [0]}
    shared = {'rounds': 3, 'floor': 1}
    entries = ['snip', {'name': 'magnitude', 'floor': 2}]
    short = make_spec({**BASE, 'grid': {**grid, 'method': entries, 'every_method': shared}})
    written = [
        {'name': 'snip', 'rounds': 3, 'floor': 1},
        {'name': 'magnitude', 'rounds': 3, 'floor': 2},
    ]
    assert short == make_spec({**BASE, 'grid': {**grid, 'method': written}})
    for wrong in ('snip', {'name': 'snip'}):
        with pytest.raises(SpecError, match=r'grid\.every_method: expected a table of keys'):
            make_spec({**BASE, 'grid': {**grid, 'method': entries, 'every_method': wrong}})
    with pytest.raises(SpecError, match=r'grid\.method: missing'):
        make_spec({**BASE, 'grid': {**grid, 'every_method': shared}})
    with pytest.raises(SpecError, match=r'grid\.method\[0\]\.round'):
        make_spec({**BASE, 'grid': {**grid, 'method': entries, 'every_method': {'round': 1}}})
