"""What may stand in a specification, read off the registries and the fields of its classes.

`jaxprune list` and `jaxprune explain` print it, so that no table of names is written by hand.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import optax
import tomli_w

from jaxprune import data, flow, method, nn, optim
from jaxprune.allocation import ALLOCATIONS
from jaxprune.arguments import Option
from jaxprune.data.augment import AUGMENTATIONS
from jaxprune.errors import JaxpruneError, check_choice, nearest, quoted
from jaxprune.schedule import RISING, SCHEDULES
from jaxprune.sweep.parse import plain
from jaxprune.sweep.spec import FinetuneSpec, MethodSpec, SweepSpec


class Entry(NamedTuple):
    """One thing that a specification may name, or one of its keys.

    Attributes:
      kind: what it is, in the singular: 'method', 'key', ...
      name: how a specification writes it; for a key its section and name.
      text: what it is, in a sentence.
      paper: authors, year and identifier; '' where there is none.
      defaults: its options and their defaults.
      limits: what the value of a key may be; '' where anything of its type may.
      snippet: lines of TOML that use it, a part of a specification.
      options: its own options -> what they mean and may be.
    """

    kind: str
    name: str
    text: str
    paper: str = ''
    defaults: Mapping[str, Any] = {}
    limits: str = ''
    snippet: str = ''
    options: Mapping[str, str] = {}


def entries(kind: str) -> list[Entry]:
    """All entries of a kind, in the order of its registry.

    Args:
      kind: a key of `KINDS`.

    Raises:
      JaxpruneError: there is no such kind; the message offers the nearest one.
    """
    check_choice('list', kind, KINDS, JaxpruneError)
    return list(KINDS[kind][1]())


def explain(name: str) -> list[Entry]:
    """Everything that has a name: a method and an allocation may share one, and so may keys.

    Args:
      name: of an entry; a key with or without its sections.

    Raises:
      JaxpruneError: nothing has it; the message offers the nearest name.
    """
    every = [entry for kind in KINDS for entry in entries(kind)]
    found = [e for e in every if e.name == name]
    found = found or [e for e in every if e.kind == 'key' and e.name.endswith(f'.{name}')]
    if not found:
        names = {e.name.rpartition('.')[2] for e in every}
        close = nearest(name, names).split('? (')[0]
        hint = f'{close}?' if close.startswith('did you mean') else 'see `jaxprune list`'
        raise JaxpruneError(f'nothing is called {quoted(name)}: {hint}')
    return found


def _methods() -> Iterator[Entry]:
    for name, entry in method.METHODS.items():
        defaults = {
            'rounds': entry.rounds,
            'density_schedule': entry.density_schedule,
            'allocation': entry.allocation,
        }
        if 'data' in entry.needs or (entry.needs and entry.batch_norm == 'train'):
            defaults['batch_norm'] = entry.batch_norm
        table = f'{{ name = "{name}"{", " if entry.example else ""}{entry.example} }}'
        snippet = f'[grid]\nmethod = [{table}]'
        defaults |= entry.options
        options = {option: _meaning(method.OPTIONS[option]) for option in entry.options}
        yield Entry('method', name, entry.doc, entry.paper, defaults, '', snippet, options)


def _meaning(option: Option) -> str:
    """What an option is and what it may be."""
    limits = _limits(option)
    return f'{option.doc}: {limits}' if limits else option.doc


def _models() -> Iterator[Entry]:
    for name, entry in nn.MODELS.items():
        snippet = _model_snippet(name, entry.options)
        yield Entry('model', name, entry.doc, entry.paper, entry.options, '', snippet)


def _model_snippet(name: str, options: Mapping[str, Any]) -> str:
    """A model with options, and images that are large enough for it."""
    snippet = f'[model]\n{_toml({"name": name, **options})}'
    return snippet + ('\n[data]\nname = "cifar10"' if nn.model(name).min_side > 28 else '')


def _data() -> Iterator[Entry]:
    for name, facts in data.FACTS.items():
        text = (
            f'{facts.train_size:,} training and {facts.test_size:,} test images of '
            f'{" x ".join(map(str, facts.shape))}, {facts.classes} classes'
        )
        shipped = 'comes with the package' if name == 'mnist_small' else 'prepared by TFDS'
        yield Entry('data set', name, f'{text}; {shipped}.', snippet=f'[data]\nname = "{name}"')
    for name, make in AUGMENTATIONS.items():
        snippet = f'[data]\nname = "cifar10"\naugment = ["{name}"]'
        yield Entry('augmentation', name, _sentence(make), snippet=snippet)


def _quantities() -> Iterator[Entry]:
    for name, entry in flow.QUANTITIES.items():
        snippet = f'[record]\nevery = 20\nflow = ["{name}"]'
        yield Entry('quantity', name, f'{entry.description}.', snippet=snippet)
    for name, text in method.WATCHED.items():
        snippet = (
            f'[record]\nevery = 20\nflow = ["{name}"]\n[grid]\nmethod = [{{ name = "hesso", '
            'granularity = "unit", start = 1, end = 4 }]'
        )
        where = 'by layer, of methods that change training'
        yield Entry('quantity', name, _capital(f'{text}; {where}'), snippet=snippet)


def _allocations() -> Iterator[Entry]:
    for name, text in ALLOCATIONS.items():
        model = 'lenet5' if name.startswith('smart_ratio') else 'lenet300100'
        snippet = f'[model]\nname = "{model}"\n[grid]\nmethod = [{{ name = "magnitude", '
        yield Entry(
            'allocation', name, _capital(text), snippet=f'{snippet}allocation = "{name}" }}]'
        )


def _schedules() -> Iterator[Entry]:
    for name, make in SCHEDULES.items():
        when = 'name = "synflow", rounds = 10'
        if name in RISING:
            when = 'name = "acdc", start = 1, every = 1, end = 3'
        table = f'{{ {when}, density_schedule = "{name}" }}'
        snippet = f'[grid]\nmethod = [{table}]'
        yield Entry('density schedule', name, _sentence(make), snippet=snippet)
    for name, text in optim.RATE_SCHEDULES.items():
        more = '\nmilestones = [4, 6]' if name == 'step' else ''
        snippet = f'[train]\nschedule = "{name}"{more}'
        yield Entry('learning-rate schedule', name, _capital(text), snippet=snippet)


def _optimizers() -> Iterator[Entry]:
    for name in optim.names():
        defaults = optim.arguments(name)
        numbers = {k: v for k, v in defaults.items() if v is not None}
        snippet = _toml({'optimizer': name, 'learning_rate': 0.01, **numbers})
        text = _sentence(getattr(optax, name))
        yield Entry('optimizer', name, text, '', defaults, '', f'[train]\n{snippet}')


def _keys() -> Iterator[Entry]:
    yield from _section(SweepSpec, '')
    for option, owners in _owners(method.METHODS).items():
        yield _option('grid.method', option, method.OPTIONS[option], owners)
    for option, owners in _owners(nn.MODELS).items():
        yield _option('model', option, nn.OPTIONS[option], owners)


def _section(cls: type, where: str) -> Iterator[Entry]:
    """The keys of a section, those of its own sections after them."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        hint, name = hints[f.name], f'{where}.{f.name}' if where else f.name
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
        if f.metadata:
            option = f.metadata['option']
            snippet = _snippet(cls, where, f)
            default = {} if f.default is dataclasses.MISSING else {f.name: plain(f.default)}
            text = _capital(option.doc)
            yield Entry('key', name, text, '', default, _limits(option), snippet)
        if dataclasses.is_dataclass(inner):
            yield from _section(inner, name)


def _snippet(cls: type, where: str, f: dataclasses.Field) -> str:
    """Lines of TOML with a key."""
    example = f.metadata['example']
    if not example and dataclasses.is_dataclass(f.default):
        return ''
    if not example and f.default is not dataclasses.MISSING:
        example = _toml({f.name: plain(f.default)})
    if cls is FinetuneSpec:
        phase = _beside(example, 'epochs = 4, learning_rate = 0.01')
        example = f'start = 4, finetune = {{ {phase} }}'
    if cls in (FinetuneSpec, MethodSpec):
        inside = _beside(example, 'name = "magnitude"')
        return f'[grid]\nmethod = [{{ {inside} }}]'
    return f'[{where}]\n{example}' if where else example


def _beside(example: str, needed: str) -> str:
    """The inside of a table with what it cannot do without."""
    there = {part.split(' = ')[0] for part in example.split(', ')}
    missing = [part for part in needed.split(', ') if part.split(' = ')[0] not in there]
    return ', '.join([*missing, example])


def _option(where: str, name: str, option: Option, owners: Mapping[str, Any]) -> Entry:
    """An option of methods or models, at the first of its owners."""
    owner, value = next(iter(owners.items()))
    of = ', '.join(owners)
    if where == 'model':
        snippet = _model_snippet(owner, {name: value})
    else:
        more = method.METHODS[owner].example
        parts = [f'name = "{owner}"', *([more] if more else []), _toml({name: value})]
        snippet = f'[grid]\nmethod = [{{ {", ".join(parts)} }}]'
    text = f'{_capital(option.doc)} An option of {of}.'
    return Entry('key', f'{where}.{name}', text, '', {name: value}, _limits(option), snippet)


def _owners(registry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Option -> the entries that have it, with their defaults."""
    found: dict[str, dict[str, Any]] = {}
    for name, entry in registry.items():
        for option, default in entry.options.items():
            found.setdefault(option, {})[name] = default
    return found


def _limits(option: Option) -> str:
    """The values a key may have, in words."""
    if option.choices is not None:
        return f'one of {", ".join(choice for choice in option.choices if choice)}'
    bounds = (('at least', option.low), ('more than', option.above), ('at most', option.high))
    return ', '.join(f'{word} {bound:,}' for word, bound in bounds if bound is not None)


def _sentence(documented: Any) -> str:
    """The first sentence of a docstring."""
    first = (documented.__doc__ or '').strip().split('\n\n')[0]
    return ' '.join(first.split())


def _capital(text: str) -> str:
    """The text as a sentence."""
    return f'{text[0].upper()}{text[1:]}.'


def _toml(table: Mapping[str, Any]) -> str:
    return tomli_w.dumps(table).strip()


#: What `jaxprune list` can list: a title and the entries.
KINDS: dict[str, tuple[str, Callable[[], Iterator[Entry]]]] = {
    'methods': ('Pruning methods, for grid.method', _methods),
    'models': ('Models, for model.name', _models),
    'data': ('Data sets, for data.name, and augmentations, for data.augment', _data),
    'quantities': ('Quantities along training, for record.flow', _quantities),
    'allocations': ('Shares of the layers, for allocation of a method', _allocations),
    'schedules': ('Densities over rounds, and learning rates over training', _schedules),
    'optimizers': ('Optimizers of optax, for train.optimizer', _optimizers),
    'keys': ('Keys of a specification', _keys),
}
