"""The README says what is true: its code runs, its links and names exist."""

import re
import tomllib
from pathlib import Path

import pytest

import jaxprune
from jaxprune import data, flow, method, nn
from jaxprune.sweep import make_spec

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


def blocks(language):
    return re.findall(rf'```{language}\n(.*?)```', README, re.DOTALL)


@pytest.mark.script
def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks('python'):
        exec(compile(block, 'README.md', 'exec'), names)
    printed = capsys.readouterr().out
    assert 'with 13310 weights' in printed  # 5 % of 266,200
    assert '(3, 3, 784, 300)' in printed
    assert sum(m.sum() for m in names['synflow_masks'].values()) == 2662
    assert (tmp_path / 'runs' / 'demo' / 'plan.json').exists()


def test_toml_blocks_are_valid_specifications():
    for block in blocks('toml'):
        assert len(make_spec(tomllib.loads(block)).grid.method) == 3


def test_every_name_and_link_exists():
    for target in re.findall(r'\]\((?!https?:)([^)#]+)\)', README):
        assert (ROOT / target).exists(), target
    for names in (method.METHODS, nn.MODELS, data.FACTS, data.AUGMENTATIONS, flow.QUANTITIES):
        for name in names:
            assert f'`{name}`' in README, name


def test_every_room_is_on_the_map():
    table = README[README.index('## Map of the rooms') : README.index('## Add a method')]
    for path in (ROOT / 'jaxprune').iterdir():
        if path.name.startswith('_'):
            continue
        if path.suffix == '.py' or (path / '__init__.py').exists():
            assert f'`{path.name}{"/" if path.is_dir() else ""}`' in table, path.name


def test_public_names_exist_and_stay_few():
    assert len(jaxprune.__all__) <= 42
    for name in jaxprune.__all__:
        assert getattr(jaxprune, name) is not None


@pytest.mark.parametrize('path', sorted((ROOT / 'experiments').rglob('*.toml')), ids=str)
def test_every_experiment_is_a_valid_specification(path):
    from jaxprune.sweep import load_spec

    assert load_spec(path).grid.method
