"""What `jaxprune list` and `jaxprune explain` say is complete, and its TOML works."""

import dataclasses
import subprocess
import sys
import tomllib

import pytest

from jaxprune import cli, data, flow, method, nn, optim
from jaxprune.allocation import ALLOCATIONS, LAYERWISE, SHARED
from jaxprune.catalogue import KINDS, entries, explain
from jaxprune.data.augment import AUGMENTATIONS
from jaxprune.errors import JaxpruneError
from jaxprune.schedule import SCHEDULES
from jaxprune.sweep import make_spec
from jaxprune.sweep.spec import SweepSpec

EVERY = [(kind, entry) for kind in KINDS for entry in entries(kind)]
BASE = """
name = "base"
[model]
name = "lenet300100"
[data]
name = "mnist_small"
[grid]
method = ["magnitude"]
compression = [1, 4]
seed = [0]
"""

#: What a specification may name, by where the program looks it up.
REGISTRIES = {
    'methods': method.METHODS,
    'models': nn.MODELS,
    'data': [*data.FACTS, *AUGMENTATIONS],
    'quantities': {**flow.QUANTITIES, **method.WATCHED},
    'allocations': [*SHARED, *LAYERWISE],
    'schedules': [*SCHEDULES, *optim.RATE_SCHEDULES],
    'optimizers': optim.names(),
}


@pytest.mark.parametrize('kind', REGISTRIES)
def test_every_name_is_listed(kind):
    """Expectation: the registries themselves."""
    assert sorted(entry.name for entry in entries(kind)) == sorted(REGISTRIES[kind])


def test_every_key_is_listed():
    """Expectation: a walk over the fields of the specification, written anew; and every option of
    a method or a model."""
    listed = {entry.name for entry in entries('keys')}
    for section in dataclasses.fields(SweepSpec):
        assert section.name in listed or not section.metadata
    some = 'train.epochs grid.seed grid.method.rewind grid.method.finetune.epochs engine.chunk'
    assert {*some.split(), 'record.flow', 'data.augment', 'model.name'} <= listed
    for at, registry in (('grid.method', method.METHODS), ('model', nn.MODELS)):
        for entry in registry.values():
            assert {f'{at}.{option}' for option in entry.options} <= listed
    assert set(ALLOCATIONS) == {*SHARED, *LAYERWISE}


@pytest.mark.parametrize(('kind', 'entry'), EVERY, ids=[f'{k}-{e.name}' for k, e in EVERY])
def test_every_entry_has_a_text_and_toml_that_works(kind, entry, tmp_path, monkeypatch):
    """Expectation: the program itself takes the snippet, laid over a small specification."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'small.safetensors').touch()  # a file that an example names
    assert entry.text and '\n' not in entry.text
    if kind == 'methods' and entry.name not in ('random', 'magnitude'):
        assert entry.paper
    if not entry.snippet:
        assert entry.name in ('model', 'data', 'grid')
        return
    table = tomllib.loads(BASE)
    for key, value in tomllib.loads(entry.snippet).items():
        table[key] = {**table.get(key, {}), **value} if isinstance(value, dict) else value
    if 'density' in table['grid']:
        del table['grid']['compression']
    make_spec(table)


def test_a_name_may_mean_several_things():
    """Expectation: by hand: LAMP is a method and an allocation; `epochs` a key of two sections."""
    assert [entry.kind for entry in explain('lamp')] == ['method', 'allocation']
    assert {entry.name for entry in explain('epochs')} == {
        'train.epochs',
        'grid.method.finetune.epochs',
    }
    assert [entry.name for entry in explain('train.epochs')] == ['train.epochs']


def test_unknown_names_get_a_suggestion(capsys):
    """Expectation: one line with the nearest name, exit status 2."""
    with pytest.raises(JaxpruneError, match="nothing is called 'synflo': did you mean 'synflow'"):
        explain('synflo')
    with pytest.raises(JaxpruneError, match="did you mean 'methods'"):
        entries('method')
    for arguments, says in (
        (['explain', 'epoch'], "did you mean 'epochs'?"),
        (['list', 'modles'], "did you mean 'models'?"),
        (['swep', 'my.toml'], "unknown command 'swep': did you mean 'sweep'?"),
    ):
        assert cli.main(arguments) == 2
        out, err = capsys.readouterr()
        assert says in err and err.count('\n') == 1 and not out


@pytest.mark.parametrize('kind', ['', *KINDS])
def test_lists_are_printed(kind, capsys):
    """Expectation: every name of the kind, or every kind."""
    assert cli.main(['list', kind] if kind else ['list']) == 0
    out = capsys.readouterr().out
    for name in [entry.name for entry in entries(kind)] if kind else KINDS:
        assert name in out


def test_a_reader_that_has_enough_is_no_error():
    """Expectation: `jaxprune list keys | head -1` ends in silence."""
    command = [sys.executable, '-c', 'from jaxprune.cli import main; raise SystemExit(main())']
    process = subprocess.Popen(
        [*command, 'list', 'keys'], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b''
    process.wait(timeout=60)


def test_an_explanation_is_printed(capsys):
    """Expectation: by hand, what the registry says of SynFlow."""
    assert cli.main(['explain', 'synflow']) == 0
    out = capsys.readouterr().out
    for part in ('synflow (method)', 'arXiv:2006.05467', 'rounds = 100', 'method = ['):
        assert part in out
