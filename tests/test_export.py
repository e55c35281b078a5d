"""Compact networks in files: equal bit for bit, whole or not at all, without jaxprune."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune as jp
from jaxprune.errors import PruneError, StoreError


def forward(params, state, x):
    """Convolution, norm, rows of all pixels, a size that is written down; a tuple."""
    conv, (first, last) = params['conv'], params['dense']
    y = lax.conv_general_dilated(
        x['image'], conv['kernel'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    y = jax.nn.relu((y - state['mean']) * conv['scale'] + conv['bias'])
    rows = jax.nn.relu(y.reshape(-1, y.shape[-1]) @ first['kernel'])
    y = rows.reshape(*y.shape[:3], 8).reshape(y.shape[0], -1) @ last['kernel']
    return {'logits': y + x['shift'], 'mean': y.mean()}


def numbers(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def inputs(count):
    return {'image': numbers(count, 4, 4, 2), 'shift': numbers(count, 3)}


PARAMS = {
    'conv': {'kernel': numbers(3, 3, 2, 6), 'scale': numbers(6), 'bias': numbers(6)},
    'dense': ({'kernel': numbers(6, 8)}, {'kernel': numbers(4 * 4 * 8, 3).astype(jnp.bfloat16)}),
    'step': None,
}
STATE = {'mean': numbers(6)}


def halved(apply, params, x, model_state=None):
    """A network without every second group of all that may go."""
    leaves = dict(jp.tree.paths(params))
    masks = {path: np.ones(leaf.shape, bool) for path, leaf in leaves.items()}
    for family in jp.groups(apply, params, x, model_state).families:
        for member in family.members:
            if family.reason or member.role not in ('out', 'along'):
                continue
            mask = np.moveaxis(masks[member.path], member.axis, 0)
            mask[np.concatenate(member.indices[::2])] = False
    return jp.compact(apply, params, masks, x, model_state=model_state)


@pytest.fixture(scope='module')
def small():
    return halved(forward, PARAMS, inputs(2), STATE)


@pytest.fixture(scope='module')
def saved(small, tmp_path_factory):
    file = tmp_path_factory.mktemp('export') / 'new' / 'small.safetensors'
    return jp.save_compact(file, small, inputs(2))


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)


def test_a_network_comes_back_bit_for_bit(small, saved):
    """Expectation: any number of examples, though the file was made with two."""
    assert saved.batch is None and saved.platforms == ('cpu', 'cuda', 'tpu') and not saved.notes
    assert saved.size == saved.file.stat().st_size
    back = jp.load_compact(saved.file)
    equal(back.params, small.params)
    equal(back.model_state, small.model_state)
    assert small.params['conv']['kernel'].shape == (3, 3, 2, 3) and small.apply is not forward
    assert back.removed == small.removed and back.removed
    jax.tree.map(np.testing.assert_array_equal, back.kept, small.kept)
    for count in (1, 5):
        x = inputs(count)
        wanted = jax.jit(small.apply)(small.params, small.model_state, x)
        equal(back.apply(back.params, back.model_state, x), wanted)
        equal(jax.jit(back.apply)(back.params, back.model_state, x), wanted)


def test_a_loaded_network_is_trained_further(tmp_path):
    params = {'one': numbers(5, 6), 'two': numbers(6, 3)}

    def apply(params, x):
        return jax.nn.relu(x @ params['one']) @ params['two']

    x = numbers(4, 5)
    small = halved(apply, params, x)
    back = jp.load_compact(jp.save_compact(tmp_path / 'small', small, x, vjp_order=1).file)

    def gradient(apply):
        return jax.jit(jax.grad(lambda p: (apply(p, x) ** 2).sum()))(small.params)

    equal(gradient(back.apply), gradient(small.apply))


def test_a_function_of_so_many_examples_keeps_its_size(tmp_path):
    params = {'w': numbers(5, 4), 'v': numbers(4, 3)}

    def apply(params, x):
        assert x.shape[0] == 4, 'four examples, please'
        return jnp.tanh(x @ params['w']) @ params['v']

    small = halved(apply, params, numbers(4, 5))
    saved = jp.save_compact(tmp_path / 'small', small, numbers(4, 5))
    assert saved.batch == 4
    [note] = saved.notes
    assert 'as many examples as it was saved with' in note and 'four examples' in note
    back = jp.load_compact(saved.file)
    with pytest.raises(PruneError, match=r"'x' is float32 of shape \(3, 5\): .* of shape \(4, 5\)"):
        back.apply(back.params, numbers(3, 5))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda p, s, x: (p, x), 'apply takes params, model_state, x'),
        (lambda p, s, x: (PARAMS, s, x), r"'params/conv/bias' is float32 of shape \(6,\)"),
        (lambda p, s, x: (p | {'more': s['mean']}, s, x), 'arrays have unknown params/more'),
        (lambda p, s, x: (p, s, x['image']), 'another structure'),
        (lambda p, s, x: (p, s, x | {'shift': numbers(3, 3)}), r'\[2, 3\] examples'),
        (lambda p, s, x: (p, s, x | {'shift': numbers(2, 4)}), r"'shift' .* of shape \(b, 3\)"),
        (lambda p, s, x: (p, s, jax.tree.map(jnp.int32, x)), "'image' is int32"),
        (lambda p, s, x: (p, s, jax.tree.map(lambda a: a[:0], x)), r'of shape \(0, 4, 4, 2\)'),
    ],
)
def test_arguments_that_do_not_fit(saved, change, message):
    back = jp.load_compact(saved.file)
    with pytest.raises(PruneError, match=message) as raised:
        back.apply(*change(back.params, back.model_state, inputs(2)))
    assert len(str(raised.value).splitlines()) == 1


def test_files_that_are_no_network(saved, tmp_path):
    content = saved.file.read_bytes()
    length = int.from_bytes(content[:8], 'little')
    plain = json.dumps({'x': {'dtype': 'U8', 'shape': [1], 'data_offsets': [0, 1]}}).encode()
    broken = {
        'half': (content[: len(content) // 2], 'broken'),
        'flipped': (content[:-1] + bytes([content[-1] ^ 1]), 'broken'),
        'empty': (b'', 'broken'),
        'text': (b'hello, world', 'broken'),
        'metadata': (content[:8] + content[8 : 8 + length].replace(b'{\\"', b'{!\\"'), 'broken'),
        'other': (len(plain).to_bytes(8, 'little') + plain + b'\0', 'not a file of save_compact'),
    }
    for name, (written, message) in broken.items():
        (tmp_path / name).write_bytes(written)
        with pytest.raises(StoreError, match=f'{name}: .*{message}') as raised:
            jp.load_compact(tmp_path / name)
        assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(StoreError, match='no such file'):
        jp.load_compact(tmp_path / 'absent')
    with pytest.raises(StoreError, match=r'cannot be read|broken'):
        jp.load_compact(tmp_path)


def test_what_cannot_be_written(small, tmp_path):
    file = tmp_path / 'file'
    with pytest.raises(PruneError, match=r'takes what jp\.compact returns, not dict'):
        jp.save_compact(file, small.params, inputs(2))
    with pytest.raises(PruneError, match='cannot be exported'):
        jp.save_compact(file, small, {'image': numbers(2, 4, 4, 3), 'shift': numbers(2, 3)})
    odd = small._replace(params=small.params | {'seed': jax.random.key(0)})
    with pytest.raises(PruneError, match=r"'params/seed' has key<fry>"):
        jp.save_compact(file, odd, inputs(2))
    odd = small._replace(apply=lambda p, s, x: x, params={'few': jnp.zeros(3, jnp.int4)})
    with pytest.raises(PruneError, match=r'cannot be written: .*int4'):
        jp.save_compact(file, odd, inputs(2))
    odd = small._replace(apply=lambda *a: jax.tree_util.Partial(small.apply, small.apply(*a)))
    with pytest.raises(PruneError, match='dicts, lists or tuples'):
        jp.save_compact(file, odd, inputs(2))
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(small, tmp_path, monkeypatch):
    file = tmp_path / 'small'
    file.write_bytes(b'before')

    def killed(*_):
        raise OSError('the disk is full')

    with monkeypatch.context() as patched:
        patched.setattr('jaxprune.files.os.replace', killed)
        with pytest.raises(StoreError, match='cannot be written'):
            jp.save_compact(file, small, inputs(2))
    assert [path.name for path in tmp_path.iterdir()] == ['small']
    assert file.read_bytes() == b'before'
    jp.save_compact(file, small, inputs(2))
    assert jp.load_compact(file).removed == small.removed


@pytest.mark.script
def test_the_function_runs_without_jaxprune(small, saved, tmp_path):
    """Expectation: jax and safetensors alone compute the same bits."""
    x = inputs(3)
    np.savez(tmp_path / 'x.npz', **x)
    code = f"""
import sys
sys.modules['jaxprune'] = None
import jax
import numpy as np
import safetensors.numpy
from jax import export
tensors = safetensors.numpy.load_file({str(saved.file)!r})
program = export.deserialize(bytearray(tensors.pop('program')))
out = program.call(tensors, dict(np.load('x.npz')))
np.savez('out.npz', **out)
assert not any(name.startswith('jaxprune.') for name in sys.modules)
"""
    subprocess.run([sys.executable, '-c', code], check=True, cwd=tmp_path)
    equal(
        {name: jnp.asarray(a) for name, a in np.load(tmp_path / 'out.npz').items()},
        jax.jit(small.apply)(small.params, small.model_state, x),
    )
