"""Checks across keys and against the registries, and the defaults that depend on a name."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxprune import data, flow, method, nn, optim
from jaxprune.arguments import Option, outside
from jaxprune.data.augment import AUGMENTATIONS
from jaxprune.errors import JaxpruneError, SpecError, nearest, quoted, shown
from jaxprune.plan import MOST_ROUNDS
from jaxprune.sweep.parse import fits_device, limits, section
from jaxprune.sweep.spec import FinetuneSpec, GridSpec, MethodSpec, RecordSpec, SweepSpec, TrainSpec
from jaxprune.sweep.timeline import rounds_until, timeline_of

#: How labels write an allocation, where its name will not do.
_ALLOCATION_TITLES = {
    'uniform_down': 'uniform, rounded down',
    'uniform_plus': 'uniform+',
    'erk': 'ERK',
    'igq': 'IGQ',
    'smart_ratio': 'smart ratio',
    'smart_ratio_vgg': 'smart ratio, VGG',
    'lamp': 'LAMP allocation',
}
#: A grid is a list on the host, and so are the rows of a run.
_MOST_RUNS, _MOST_MOMENTS = 1_000_000, 1_000_000
_METHOD_KEYS = tuple(f.name for f in dataclasses.fields(MethodSpec) if f.name != 'options')
#: Keys of earlier formats, and what to write now.
_REPLACED = {
    'after_epochs': 'write start = k, every = k for rounds after every k epochs',
    'over': 'write density_schedule',
    'whole': 'write keep_all_units',
}
_REPAIR_TITLES = {'orthp': 'OrthP'}
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
            fail(at, f'{quoted(name)} is unknown, {nearest(name, valid)}')

    if not _is_file_name(spec.name):
        fail('name', f'expected a plain file name, not {shown(spec.name)}')
    known('model.name', spec.model.name, nn.MODELS)
    known('data.name', spec.data.name, data.FACTS)
    for i, name in enumerate(spec.data.augment):
        known(f'data.augment[{i}]', name, AUGMENTATIONS)
    model = dataclasses.replace(
        spec.model,
        options=_options(
            spec.model.options,
            nn.model(spec.model.name).options,
            nn.OPTIONS,
            spec.model.name,
            'model',
            fail,
        ),
    )
    facts = data.facts(spec.data.name)
    if min(facts.shape[:2]) < nn.model(model.name).min_side:
        small = f'{facts.shape} of {spec.data.name}'
        fail('model.name', f"'{model.name}' needs larger images than {small}")
    for i, name in enumerate(spec.record.flow):
        known(f'record.flow[{i}]', name, {**flow.QUANTITIES, **method.WATCHED})
    if spec.record.churn and 1 not in {*spec.grid.compression, *spec.grid.density}:
        fail('record.churn', 'goes by the dense runs: expected 1 among the densities of the grid')
    for seed in spec.record.compact_seeds:
        if seed not in spec.grid.seed:
            fail('record.compact_seeds', f'{seed} is not among grid.seed')
    recorded = spec.record.flow or spec.record.evaluate
    if recorded and not (spec.record.every or spec.record.rounds):
        fail('record.every', 'expected after how many steps to record')
    if spec.record.rounds and not recorded:
        fail('record.rounds', 'expected what to record, in record.flow or record.evaluate')
    train = _train(spec.train, 'train', fail)
    methods = tuple(_method(m, f'grid.method[{i}]', fail) for i, m in enumerate(spec.grid.method))
    spec = dataclasses.replace(spec, grid=_by_compression(spec.grid, fail))
    for key in ('method', 'compression', 'seed'):
        if not getattr(spec.grid, key):
            fail(f'grid.{key}', 'expected at least one value')
    labels = [m.label for m in methods]
    for kind, values in (
        ('label', labels),
        ('compression', spec.grid.compression),
        ('seed', spec.grid.seed),
    ):
        twice = _twice(values)
        if twice and kind == 'label':
            fail(
                'grid.method', f'two entries are called {quoted(twice[0])}: give one another label'
            )
        if twice:
            fail(f'grid.{kind}', f'{twice[0]} is listed twice')
    grid_train = _grid_train(train, spec.grid.train, source, fail)
    grid = dataclasses.replace(spec.grid, method=methods, train=grid_train)
    _size(grid, fail)
    examples = spec.data.train_examples or facts.train_size
    for key, size in (('train_examples', facts.train_size), ('test_examples', facts.test_size)):
        if getattr(spec.data, key) > size:
            fail(f'data.{key}', f'{spec.data.name} has only {size}')
    for variant in variants(train, grid_train):
        _train(variant, 'train', fail)
        if variant.batch_size > examples:
            fail('train.batch_size', f'{variant.batch_size} is more than {examples} examples')
        epoch = examples // variant.batch_size
        for i, m in enumerate(methods):
            _times(variant, m, epoch, f'grid.method[{i}]', fail)
        _moments(variant, spec.record, epoch, fail)
    return dataclasses.replace(spec, model=model, train=train, grid=grid)


def _size(grid: GridSpec, fail) -> None:
    """Whether so many runs can be listed at all."""
    axes = {'method': grid.method, 'compression': grid.compression, 'seed': grid.seed}
    axes |= {f'train.{key}': values for key, values in grid.train.items()}
    runs = math.prod(map(len, axes.values()))
    if runs > _MOST_RUNS:
        longest = max(axes, key=lambda key: len(axes[key]))
        fail(f'grid.{longest}', f'the grid has {runs:,} runs, more than {_MOST_RUNS:,}')


def _moments(train: TrainSpec, record: RecordSpec, epoch: int, fail) -> None:
    """Whether so many rows of results can be held at all."""
    for key, steps in (('every_epochs', record.every_epochs * epoch), ('every', record.every)):
        moments = train.epochs * epoch // steps if steps else 0
        if moments > _MOST_MOMENTS:
            text = f'{moments:,} rows for each run are more than {_MOST_MOMENTS:,}'
            fail(f'record.{key}', f'{text}: expected a larger number')


def _twice(values: Sequence[Any]) -> list[Any]:
    """The values that a list holds more than once."""
    return [value for value, count in collections.Counter(values).items() if count > 1]


def _key_name(key: Any) -> str:
    """A key that nobody knows, for the path of a message."""
    return quoted(key)[1:-1]


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


def _options(
    given: Mapping,
    valid: Mapping,
    limits: Mapping[str, Option],
    owner: str,
    at: str,
    fail,
    keys: Collection[str] = (),
) -> dict[str, Any]:
    """Options with defaults filled in; types follow the default's.

    Args:
      valid: the owner's options with their defaults.
      limits: the values that options take.
      keys: those that stand beside the options, for suggestions.
    """
    options = dict(valid)
    for key, value in given.items():
        if key not in valid:
            if key in _REPLACED and keys:
                fail(f'{at}.{key}', f'is no key any more: {_REPLACED[key]}')
            known = [*valid, *(k for k in keys if k != 'name')]
            tail = nearest(key, known) if known else 'it has none'
            fail(f'{at}.{_key_name(key)}', f"unknown key or option of '{owner}', {tail}")
        options[key] = _like(value, valid[key], f'{at}.{key}', fail)
        if wrong := outside(options[key], limits[key]):
            fail(f'{at}.{key}', wrong)
    return options


def _like(value: Any, default: Any, at: str, fail) -> Any:
    """The value, if it has the type of the default."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, bool):
        if not isinstance(value, bool):
            fail(at, f'expected true or false, not {shown(value)}')
    elif isinstance(default, float):
        if not number:
            fail(at, f'expected a number, not {shown(value)}')
        if not fits_device(value, float):
            fail(at, f'expected {limits(float)}, not {shown(value)}')
        return float(value)
    elif isinstance(default, int):
        if not isinstance(value, int) or isinstance(value, bool):
            fail(at, f'expected a whole number, not {shown(value)}')
        if not fits_device(value, int):
            fail(at, f'expected {limits(int)}, not {shown(value)}')
    elif isinstance(default, list):
        whole = isinstance(value, (list, tuple)) and all(
            isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in value
        )
        if not whole or not value:
            fail(at, f'expected a list of positive whole numbers, not {shown(value)}')
        for i, v in enumerate(value):
            if not fits_device(v, int):
                fail(f'{at}[{i}]', f'expected {limits(int)}, not {shown(v)}')
        return list(value)
    elif isinstance(default, str) and not isinstance(value, str):
        fail(at, f'expected a string, not {shown(value)}')
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
            fail(
                f'{at}.{_key_name(key)}',
                f"unknown key, and no argument of '{train.optimizer}', {tail}",
            )
        options[key] = _argument(value, arguments[key], f'{at}.{key}', fail)
    _schedule(train, at, fail)
    return dataclasses.replace(train, options=options)


def _schedule(phase: TrainSpec | FinetuneSpec, at: str, fail) -> None:
    """The learning-rate schedule of training, or of the phase after pruning."""
    if phase.schedule == 'step' and not phase.milestones:
        fail(f'{at}.milestones', "expected the epochs of schedule 'step'")
    if phase.milestones and phase.schedule != 'step':
        fail(f'{at}.milestones', f"schedule '{phase.schedule}' has none; expected schedule 'step'")
    for i, milestone in enumerate(phase.milestones):
        # One past the end is no mistake: `--set train.epochs=2` tries out a long recipe.
        if not milestone > 0:
            fail(f'{at}.milestones[{i}]', f'expected a positive epoch, not {milestone}')
    if phase.warmup_epochs >= phase.epochs:
        fail(f'{at}.warmup_epochs', f'expected fewer than the {phase.epochs} epochs')


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
        at = f'grid.train.{_key_name(key)}'
        if not isinstance(values, tuple) or not values:
            fail(at, f'expected a list of values, not {shown(values)}')
        # Each value is read as if it stood in [train]; whether all go together is checked later.
        tables = [{'optimizer': optimizer, key: value} for value in values]
        read = [section(TrainSpec, table, source, 'grid.train') for table in tables]
        if key in _TRAIN_KEYS:
            checked[key] = tuple(getattr(t, key) for t in read)
        else:
            checked[key] = tuple(_train(t, 'grid.train', fail).options[key] for t in read)
        if len(set(map(repr, checked[key]))) < len(values):
            fail(at, 'a value is listed twice')
    return checked


def _by_compression(grid: GridSpec, fail) -> GridSpec:
    """The grid with densities written as compressions."""
    if not grid.density:
        return grid
    if grid.compression:
        fail('grid.density', 'expected either density or compression, not both')
    if twice := _twice(grid.density):
        fail('grid.density', f'{twice[0]} is listed twice')
    return dataclasses.replace(grid, compression=tuple(1 / d for d in grid.density), density=())


def _method(spec: MethodSpec, at: str, fail) -> MethodSpec:
    """A method of the grid with the published values of its registry entry written out."""
    if spec.name not in method.METHODS:
        fail(f'{at}.name', f'{quoted(spec.name)} is unknown, {nearest(spec.name, method.METHODS)}')
    entry = method.method(spec.name)
    spec = dataclasses.replace(
        spec,
        allocation=spec.allocation or _usual_allocation(spec),
        rewind=spec.rewind or entry.rewind,
    )
    options = _options(
        spec.options, entry.options, method.OPTIONS, spec.name, at, fail, _METHOD_KEYS
    )
    label = spec.label or entry.title + _what_else(spec)
    if label == 'dense':
        fail(f'{at}.label', "'dense' is the name of the control: choose another")
    during = bool(spec.start or spec.every or spec.end or spec.finetune.epochs)
    choices = method.Choices(
        **{key: getattr(spec, key) for key in method.Choices._fields if key != 'apart'},
        apart=bool(spec.every or spec.end) if entry.hooked else during,
    )
    for key, message in method.broken_rules(entry, choices):
        fail(f'{at}.{key}', message)
    _when(spec, at, fail)
    if spec.end and spec.end < spec.start:
        fail(f'{at}.end', f'{spec.end:g} is before start, {spec.start:g}')
    rounds = spec.rounds or (rounds_until(spec) if spec.every and spec.end else entry.rounds)
    if rounds > MOST_ROUNDS:
        fail(f'{at}.every', f'makes {rounds:,} rounds up to end, more than {MOST_ROUNDS:,}')
    if entry.hooked and (spec.rewind or spec.finetune.each_round):
        key = 'rewind' if spec.rewind else 'finetune.each_round'
        fail(f'{at}.{key}', f"sets the clock while '{spec.name}' is at work")
    if entry.hooked and rounds < 2:
        fail(f'{at}.rounds', f"'{spec.name}' needs two rounds: the first and the last")
    return dataclasses.replace(
        spec,
        label=label,
        rounds=rounds,
        density_schedule=spec.density_schedule or entry.density_schedule,
        batch_norm=spec.batch_norm or (entry.batch_norm if 'data' in entry.needs else ''),
        options=options,
    )


def _usual_allocation(spec: MethodSpec) -> str:
    return method.usual_allocation(method.method(spec.name), spec.granularity, spec.target)


def _what_else(spec: MethodSpec) -> str:
    """What a label says beside the method's name."""
    words = ''
    if spec.allocation != _usual_allocation(spec):
        words = f' ({_ALLOCATION_TITLES.get(spec.allocation, spec.allocation)})'
    words += '' if spec.target == 'direct' else f' to {spec.target}'
    if spec.granularity != 'weight':
        coupled = spec.granularity in method.COUPLED
        words += f' ({method.plural(spec.granularity) if coupled else spec.granularity})'
    words += f' + {_REPAIR_TITLES[spec.repair]}' if spec.repair else ''
    rewound = {'': '', 'weights': ', rewound', 'rate': ', rate rewound'}[spec.rewind]
    return words + (rewound if spec.rewind != method.method(spec.name).rewind else '')


def _when(spec: MethodSpec, at: str, fail) -> None:
    """Keys of *when* that need one another."""
    during = bool(spec.start or spec.every or spec.end)
    if spec.restart and not during:
        fail(
            f'{at}.restart', 'is for rounds during training: before it there is nothing to restart'
        )
    if spec.rewind and not spec.start:
        fail(f'{at}.rewind', 'is for rounds during training: expected a start later than rewind_to')
    if spec.rewind == 'weights' and spec.restart:
        fail(f'{at}.restart', "rewind = 'weights' begins the optimizer anew already")
    if spec.rewind_to and not spec.rewind:
        fail(f'{at}.rewind_to', "goes with rewind = 'weights' or 'rate'")
    if spec.rewind and spec.finetune.epochs:
        fail(f'{at}.rewind', 'does not go with finetune: both say where training goes on')
    if spec.time_unit == 'steps':
        for key in ('start', 'every', 'end', 'rewind_to'):
            if getattr(spec, key) % 1:
                fail(f'{at}.{key}', f'expected a whole number of steps, not {getattr(spec, key)}')
    finetune = spec.finetune
    if spec.score_on == 'train_batch' and (spec.rewind or finetune.epochs):
        fail(f'{at}.score_on', "'train_batch' is the batch of the next step: not with a new clock")
    if not finetune.epochs:
        if finetune != FinetuneSpec():
            fail(f'{at}.finetune.epochs', 'expected the length of the phase after pruning')
        return
    if not spec.start:
        fail(f'{at}.start', 'missing; finetune replaces the training that is left after pruning')
    if not finetune.learning_rate:
        fail(f'{at}.finetune.learning_rate', 'missing; expected the peak learning rate')
    _schedule(finetune, f'{at}.finetune', fail)


def _times(train: TrainSpec, spec: MethodSpec, epoch: int, at: str, fail) -> None:
    """Whether all rounds of a method happen while a run lasts."""
    try:
        timeline = timeline_of(train, spec, epoch)
    except SpecError as error:  # begins with the key
        key, _, message = str(error).partition(': ')
        fail(f'{at}.{key}', message)
    if spec.score_on == 'train_batch' and timeline.events[-1].step == timeline.steps:
        fail(f'{at}.score_on', 'no training step follows the last round')
    if not fits_device(timeline.steps, int):
        fail('train.epochs', f'{train.epochs} are more than 2**31 steps')
