"""Checks across keys and against the registries, and the defaults that depend on a name."""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any

from jaxprune import data, flow, method, nn, optim
from jaxprune.data.augment import AUGMENTATIONS
from jaxprune.errors import JaxpruneError, SpecError, nearest
from jaxprune.sweep.parse import fits_device, limits, section
from jaxprune.sweep.spec import MethodSpec, SweepSpec, TrainSpec

#: How labels write an allocation, where its name will not do.
_ALLOCATION_TITLES = {
    'uniform_plus': 'uniform+',
    'erk': 'ERK',
    'igq': 'IGQ',
    'smart_ratio': 'smart ratio',
    'smart_ratio_vgg': 'smart ratio, VGG',
    'lamp': 'LAMP allocation',
}
_TRAIN_KEYS = tuple(f.name for f in dataclasses.fields(TrainSpec) if f.name != 'options')


def check(spec: SweepSpec, source: str) -> SweepSpec:
    """The specification with names resolved to their published defaults.

    Raises:
      SpecError: an unknown name or option, or values that cannot go together.
    """

    def fail(at: str, message: str):
        raise SpecError(f'{source}: {at}: {message}')

    def known(at: str, name: str, valid) -> None:
        if name not in valid:
            fail(at, f"'{name}' is unknown, {nearest(name, valid)}")

    if not _is_file_name(spec.name):
        fail('name', f'expected a plain file name, not {spec.name!r}')
    known('model.name', spec.model.name, nn.MODELS)
    known('data.name', spec.data.name, data.FACTS)
    for i, name in enumerate(spec.data.augment):
        known(f'data.augment[{i}]', name, AUGMENTATIONS)
    model = dataclasses.replace(
        spec.model,
        options=_options(
            spec.model.options, nn.model(spec.model.name).options, spec.model.name, 'model', fail
        ),
    )
    if 'init' in model.options:
        known('model.init', model.options['init'], nn.INITIALISATIONS)
    facts = data.facts(spec.data.name)
    if min(facts.shape[:2]) < nn.model(model.name).min_side:
        small = f'{facts.shape} of {spec.data.name}'
        fail('model.name', f"'{model.name}' needs larger images than {small}")
    for i, name in enumerate(spec.record.flow):
        known(f'record.flow[{i}]', name, flow.QUANTITIES)
    if (spec.record.flow or spec.record.evaluate) and not spec.record.every:
        fail('record.every', 'expected after how many steps to record')
    train = _train(spec.train, 'train', fail)
    methods = tuple(_method(m, f'grid.method[{i}]', fail) for i, m in enumerate(spec.grid.method))
    for key in ('method', 'compression', 'seed'):
        if not getattr(spec.grid, key):
            fail(f'grid.{key}', 'expected at least one value')
    labels = [m.label for m in methods]
    for kind, values in (
        ('label', labels),
        ('compression', spec.grid.compression),
        ('seed', spec.grid.seed),
    ):
        twice = [v for i, v in enumerate(values) if v in values[:i]]
        if twice and kind == 'label':
            fail('grid.method', f"two entries are called '{twice[0]}': give one another label")
        if twice:
            fail(f'grid.{kind}', f'{twice[0]} is listed twice')
    grid_train = _grid_train(train, spec.grid.train, source, fail)
    grid = dataclasses.replace(spec.grid, method=methods, train=grid_train)
    examples = spec.data.train_examples or facts.train_size
    for key, size in (('train_examples', facts.train_size), ('test_examples', facts.test_size)):
        if getattr(spec.data, key) > size:
            fail(f'data.{key}', f'{spec.data.name} has only {size}')
    for i, m in enumerate(methods):
        last = m.after_epochs * m.rounds
        if m.after_epochs and last >= min(v.epochs for v in variants(train, grid_train)):
            fail(
                f'grid.method[{i}].after_epochs',
                f'the last round, after {last} epochs, is too late',
            )
    for variant in variants(train, grid_train):
        _train(variant, 'train', fail)
        if variant.batch_size > examples:
            fail('train.batch_size', f'{variant.batch_size} is more than {examples} examples')
        if not fits_device(examples // variant.batch_size * variant.epochs, int):
            fail('train.epochs', f'{variant.epochs} are more than 2**31 steps')
    return dataclasses.replace(spec, model=model, train=train, grid=grid)


def _is_file_name(name: str) -> bool:
    plain_text = name.isprintable() and name == name.strip() and not set(name) & set('/\\')
    # File systems take 255 bytes; the hash follows the name.
    return plain_text and 0 < len(name.encode()) <= 200 and not name.startswith('.')


def variants(train: TrainSpec, grid: Mapping[str, tuple]) -> list[TrainSpec]:
    """The training settings of every combination of [grid.train]."""
    return [
        with_values(train, dict(zip(grid, values, strict=True)))
        for values in itertools.product(*grid.values())
    ]


def with_values(train: TrainSpec, values: Mapping[str, Any]) -> TrainSpec:
    """The training settings with some keys or optimizer arguments replaced."""
    options = {k: v for k, v in values.items() if k not in _TRAIN_KEYS}
    return dataclasses.replace(
        train,
        options={**train.options, **options},
        **{k: v for k, v in values.items() if k in _TRAIN_KEYS},
    )


def _options(given: Mapping, valid: Mapping, owner: str, at: str, fail) -> dict[str, Any]:
    """Options with defaults filled in; types follow the default's."""
    options = dict(valid)
    for key, value in given.items():
        if key not in valid:
            tail = nearest(key, valid) if valid else 'it has none'
            fail(f'{at}.{key}', f"unknown key or option of '{owner}', {tail}")
        options[key] = _like(value, valid[key], f'{at}.{key}', fail)
    return options


def _like(value: Any, default: Any, at: str, fail) -> Any:
    """The value, if it has the type of the default."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, bool):
        if not isinstance(value, bool):
            fail(at, f'expected true or false, not {value!r}')
    elif isinstance(default, float):
        if not number:
            fail(at, f'expected a number, not {value!r}')
        if not fits_device(value, float):
            fail(at, f'expected {limits(float)}, not {value!r}')
        return float(value)
    elif isinstance(default, list):
        whole = isinstance(value, (list, tuple)) and all(
            isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in value
        )
        if not whole:
            fail(at, f'expected a list of positive whole numbers, not {value!r}')
        for i, v in enumerate(value):
            if not fits_device(v, int):
                fail(f'{at}[{i}]', f'expected {limits(int)}, not {v}')
        return list(value)
    elif isinstance(default, str) and not isinstance(value, str):
        fail(at, f'expected a string, not {value!r}')
    return value


def _train(train: TrainSpec, at: str, fail) -> TrainSpec:
    try:
        arguments = optim.arguments(train.optimizer)
    except JaxpruneError as error:
        fail(f'{at}.optimizer', str(error))
    options = {}
    for key, value in train.options.items():
        if key not in arguments:
            tail = nearest(key, [*_TRAIN_KEYS, *arguments])
            fail(f'{at}.{key}', f"unknown key, and no argument of '{train.optimizer}', {tail}")
        options[key] = _argument(value, arguments[key], f'{at}.{key}', fail)
    if train.schedule == 'step' and not train.milestones:
        fail(f'{at}.milestones', "expected the epochs of schedule 'step'")
    if train.milestones and train.schedule != 'step':
        fail(f'{at}.milestones', f"schedule '{train.schedule}' has none; expected schedule 'step'")
    for i, milestone in enumerate(train.milestones):
        # One past the end is no mistake: `--set train.epochs=2` tries out a long recipe.
        if not milestone > 0:
            fail(f'{at}.milestones[{i}]', f'expected a positive epoch, not {milestone}')
    if train.warmup_epochs >= train.epochs:
        fail(f'{at}.warmup_epochs', f'expected fewer than the {train.epochs} epochs')
    return dataclasses.replace(train, options=options)


def _argument(value: Any, default: Any, at: str, fail) -> Any:
    """An optimizer argument: true or false where optax has a truth value, else a number."""
    if isinstance(default, bool):
        return _like(value, default, at, fail)
    return _like(value, 0.0, at, fail)


def _grid_train(train: TrainSpec, grid: Mapping[str, Any], source: str, fail) -> dict[str, tuple]:
    """[grid.train] with every value checked as its [train] key would be."""
    checked = {}
    swept = grid.get('optimizer')
    optimizer = swept[0] if isinstance(swept, tuple) and swept else train.optimizer
    for key, values in grid.items():
        at = f'grid.train.{key}'
        if not isinstance(values, tuple) or not values:
            fail(at, f'expected a list of values, not {values!r}')
        # Each value is read as if it stood in [train]; whether all go together is seen later.
        tables = [{'optimizer': optimizer, key: value} for value in values]
        read = [section(TrainSpec, table, source, 'grid.train') for table in tables]
        if key in _TRAIN_KEYS:
            checked[key] = tuple(getattr(t, key) for t in read)
        else:
            checked[key] = tuple(_train(t, 'grid.train', fail).options[key] for t in read)
        if len(set(map(repr, checked[key]))) < len(values):
            fail(at, 'a value is listed twice')
    return checked


def _method(spec: MethodSpec, at: str, fail) -> MethodSpec:
    """A method of the grid with the published values of its registry entry written out."""
    if spec.name not in method.METHODS:
        fail(f'{at}.name', f"'{spec.name}' is unknown, {nearest(spec.name, method.METHODS)}")
    entry = method.method(spec.name)
    where = (
        ''
        if spec.allocation == 'global'
        else f' ({_ALLOCATION_TITLES.get(spec.allocation, spec.allocation)})'
    )
    aim = ' to effective' if spec.target == 'effective' else ''
    aim += ' (units)' if spec.granularity == 'unit' else ''
    label = spec.label or entry.title + where + aim
    if label == 'dense':
        fail(f'{at}.label', "'dense' is the name of the control: choose another")
    if spec.granularity == 'unit':
        for key, wrong in (
            ('allocation', spec.allocation not in ('global', 'uniform')),
            ('target', spec.target != 'direct'),
            ('cap', spec.cap != 1),
            ('name', not entry.monotone),
        ):
            if wrong:
                fail(f'{at}.{key}', f"{getattr(spec, key)!r} does not go with granularity 'unit'")
        try:
            re.compile(spec.keep_all_units)
        except re.error as error:
            fail(
                f'{at}.keep_all_units', f'{spec.keep_all_units!r} is no regular expression: {error}'
            )
        if spec.floor_share >= 1:
            fail(f'{at}.floor_share', f'expected a share below 1, not {spec.floor_share}')
    elif spec.floor_share:
        fail(f'{at}.floor_share', "is a share of units, with granularity 'unit'")
    elif spec.keep_all_units:
        fail(f'{at}.keep_all_units', "names layers that keep all units, with granularity 'unit'")
    if spec.after_epochs and (spec.target == 'effective' or not entry.monotone):
        what = "target 'effective'" if spec.target == 'effective' else f"'{spec.name}'"
        fail(f'{at}.after_epochs', f'{what} prunes before training only')
    if spec.restart and not spec.after_epochs:
        fail(f'{at}.restart', 'goes with after_epochs: before training there is nothing to restart')
    published = ('train' if entry.train else 'eval') if 'data' in entry.needs else ''
    if spec.batch_norm and not published:
        fail(f'{at}.batch_norm', f"'{spec.name}' looks at no data: there is no mode to choose")
    return dataclasses.replace(
        spec,
        label=label,
        rounds=spec.rounds or entry.rounds,
        density_schedule=spec.density_schedule or entry.density_schedule,
        batch_norm=spec.batch_norm or published,
        options=_options(spec.options, entry.options, spec.name, at, fail),
    )
