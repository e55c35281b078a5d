"""The pages say what is true: their code runs, their links exist."""

import inspect
import re
import tomllib
from pathlib import Path

import pytest

import jaxprune
from jaxprune.sweep import make_spec

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
README = PAGES[0].read_text()


def blocks(language, page=PAGES[0]):
    return re.findall(rf'```{language}\n(.*?)```', page.read_text(), re.DOTALL)


@pytest.mark.script
def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for page in (PAGES[0], ROOT / 'docs' / 'python.md'):
        for block in blocks('python', page):
            exec(compile(block, page.name, 'exec'), names)
    printed = capsys.readouterr().out
    assert 'with 13310 weights' in printed  # 5 % of 266,200
    assert '(3, 3, 784, 300)' in printed
    assert 'MACs' in printed and (tmp_path / 'groups.svg').exists()
    assert sum(m.sum() for m in names['synflow_masks'].values()) == 2662
    in_place, pivoted = names['mass']
    assert pivoted > 1.1 * in_place and names['outputs'].shape == (2, 100)
    assert (tmp_path / 'runs' / 'demo' / 'plan.json').exists()
    for path, weights in jaxprune.pick(names['state'].params).items():
        assert not weights[~names['step_masks'][path]].any(), 'TrainState keeps pruned weights'


def test_toml_blocks_are_valid_specifications():
    for block in blocks('toml'):
        assert len(make_spec(tomllib.loads(block)).grid.method) == 3


def test_the_front_page_is_short():
    """Expectation: a newcomer reads it in five minutes."""
    assert len(README.splitlines()) <= 180


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_every_link_exists(page):
    for target in re.findall(r'\]\((?!https?:)([^)#]+)\)', page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_room_is_on_the_map():
    page = (ROOT / 'CONTRIBUTING.md').read_text()
    table = page[page.index('## Map of the rooms') : page.index('## Add a method')]
    for path in (ROOT / 'jaxprune').iterdir():
        if path.name.startswith('_'):
            continue
        if path.suffix == '.py' or (path / '__init__.py').exists():
            assert f'`{path.name}{"/" if path.is_dir() else ""}`' in table, path.name


def test_public_names_exist_and_stay_few():
    names = {name: getattr(jaxprune, name) for name in jaxprune.__all__}
    assert len([name for name, value in names.items() if not inspect.ismodule(value)]) <= 55
    assert all(value is not None for value in names.values())


@pytest.mark.parametrize('path', sorted((ROOT / 'experiments').rglob('*.toml')), ids=str)
def test_every_experiment_is_a_valid_specification(path):
    from jaxprune.sweep import load_spec

    assert load_spec(path).grid.method
