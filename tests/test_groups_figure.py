"""Pictures and tables of coupled groups: no text on text, files written whole, 120 columns."""

import itertools
import re

import jax
import jax.numpy as jnp
import pytest
from test_report import check_no_overlap

import jaxprune as jp
from jaxprune.errors import PruneError, StoreError
from jaxprune.nn import models
from jaxprune.report import groups_figure
from jaxprune.structure.group_table import short_reason, shortened

NETWORKS = {
    'lenet5': ((28, 28, 1), {}),
    'resnet20': ((32, 32, 3), {'width': 0.25}),
    'vit': ((32, 32, 3), {'dim': 32, 'depth': 2}),
    'mobilenet': ((32, 32, 3), {'width': 0.125}),
}


SLOW = pytest.param('mobilenet', marks=pytest.mark.slow)


@pytest.fixture(scope='module', params=['lenet5', 'resnet20', 'vit', SLOW])
def coupled(request):
    shape, options = NETWORKS[request.param]
    module = models.build(request.param, 10, **options)
    x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    variables = dict(jax.eval_shape(lambda x: module.init(jax.random.key(0), x), x))
    params, state = variables.pop('params'), variables or None

    def apply(params, *rest):
        *states, x = rest
        return module.apply({'params': params, **(states[0] if states else {})}, x)

    return jp.groups(apply, params, x, state)


def of(apply, params, size=6):
    return jp.groups(apply, params, jax.ShapeDtypeStruct((2, size), jnp.float32))


def two(first, last):
    """A network of two layers with those names."""
    w = jax.ShapeDtypeStruct((6, 6), jnp.float32)
    params = {first: {'kernel': w}, last: {'kernel': w}}
    return of(lambda p, x: jnp.tanh(x @ p[first]['kernel']) @ p[last]['kernel'], params)


def test_texts_do_not_touch_and_every_layer_is_there(coupled):
    """Expectation: a name for each module with weights, a label for each family, in order."""
    drawing = groups_figure.draw_groups(coupled)
    words = check_no_overlap(drawing)
    [axes] = drawing.axes
    top = {text.get_text(): text.get_position()[1] for text in axes.texts}
    layers = dict.fromkeys(
        member.path.rpartition('/')[0] or member.path
        for family in coupled.families
        for member in family.members
        if member.role != 'state'
    )
    assert layers.keys() <= words
    makers = [f.name.rpartition('/')[0] for f in coupled.families if f.kind == 'unit']
    assert sorted(makers, key=top.get) == makers
    texts = [text.get_text() for text in axes.texts]
    for kind, name in (('unit', 'unit'), ('head', 'head'), ('head_dim', 'head dim')):
        labels = [t for t in texts if re.fullmatch(rf'\d+ {name}s?( stays?.*)?', t)]
        wanted = [f for f in coupled.families if f.kind == kind]
        assert sorted(int(t.split()[0]) for t in labels) == sorted(f.size for f in wanted)
        assert sum('stay' in t for t in labels) == sum(bool(f.reason) for f in wanted)
    assert '[1] the raw input' in words


def test_rails_do_not_meet(coupled):
    """Expectation: two families never share a piece of a vertical line, nor a height in a layer."""
    rails, _ = groups_figure._rails(coupled)
    layers = groups_figure._layers(coupled, rails)
    places = groups_figure._places(layers, groups_figure._names(layers)[0], rails)
    lines = sorted(zip(places.lanes, places.ends, strict=True))
    for (lane, (_, bottom)), (other, (top, _)) in itertools.pairwise(lines):
        assert lane != other or bottom < top
    heights = list(places.ports.values())
    assert len(set(heights)) == len(heights)
    for (layer, _, _), y in places.ports.items():
        top, bottom = places.rows[layer]
        assert top < y < bottom
    colours = {(r.colour, str(r.dash)) for r in rails if not r.family.reason}
    assert len(colours) == sum(not r.family.reason for r in rails)


def test_the_table_fits_a_terminal(coupled):
    """Expectation: a row for each family, a numbered line for each reason, as wide as promised."""
    lines = str(coupled).splitlines()
    assert max(map(len, lines)) <= 120
    reasons = {short_reason(f.reason) for f in coupled.families if f.reason}
    assert sum(line.startswith('[') for line in lines) == len(reasons)
    rows = [line for line in lines if re.match(r'\d+ ', line)]
    assert [int(row.split()[0]) for row in rows] == [f.size for f in coupled.families]


@pytest.mark.parametrize('suffix', ['svg', 'PNG'])
def test_files_are_whole_and_the_same_again(tmp_path, suffix, monkeypatch):
    coupled, file = two('one', 'other'), tmp_path / 'new' / f'groups.{suffix}'
    jp.draw_groups(coupled, file)
    content = file.read_bytes()
    assert content.startswith(b'\x89PNG' if suffix == 'PNG' else b'<?xml')
    jp.draw_groups(coupled, str(file))
    assert file.read_bytes() == content

    def full(*_):
        raise OSError('the disk is full')

    with monkeypatch.context() as patched:
        patched.setattr('jaxprune.files.os.replace', full)
        with pytest.raises(StoreError, match='cannot be written'):
            jp.draw_groups(two('a', 'b'), file)
    assert file.read_bytes() == content
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_long_names_are_shortened_and_stay_apart():
    ends = [f'net/{"module/" * 20}{number}/{"x" * 40}' for number in (1, 2)]
    words = check_no_overlap(groups_figure.draw_groups(two(*ends)))
    assert any('layers are below' in word for word in words)
    ends = [f'{number}/{"module/" * 20}{"x" * 40}' for number in (1, 2)]
    drawing = groups_figure.draw_groups(two(*ends))
    words = check_no_overlap(drawing)
    [axes] = drawing.axes
    box = min((p.get_window_extent() for p in axes.patches), key=lambda extent: extent.x0)
    inside = [t.get_window_extent() for t in axes.texts if '…' in t.get_text()]
    assert all(box.x0 + 5 < t.x0 and t.x1 < box.x1 - 5 for t in inside)
    short = [word for word in words if '…' in word]
    assert len(short) == 2 and max(map(len, short)) == 32
    assert shortened('encoder/attention/query', 12) == 'enc…on/query'
    table = str(two(*ends))
    assert max(map(len, table.splitlines())) <= 120


def test_reasons_keep_the_operation_and_the_place():
    long = "'sort' at /a/b/net.py:12:16 (Net.<locals>.<genexpr>)"
    assert short_reason(f'sorted by {long}') == "sorted by 'sort' at net.py:12"
    assert short_reason(f'sorted by {long} in Net/a') == "sorted by 'sort' in Net/a"
    assert short_reason('the raw input') == 'the raw input'


def test_what_cannot_be_drawn(tmp_path):
    with pytest.raises(PruneError, match=r'takes what jp\.groups returns, not dict'):
        jp.draw_groups({'a': 'b' * 50})
    with pytest.raises(PruneError, match=r"must end in '\.svg' or '\.png'"):
        jp.draw_groups(two('a', 'b'), tmp_path / 'groups.pdf')
    with pytest.raises(PruneError, match='no group'):
        jp.draw_groups(of(lambda p, x: x, {'a': jax.ShapeDtypeStruct((6,), jnp.float32)}))
