"""Coupled groups against those that published code finds, and the networks that it cuts out.

`golden/structured` holds what OTO v3 (tianyic/only_train_once 5d0963d) and DepGraph (Torch-Pruning
1.6.1) find in small networks, indices and numbers; `golden/structured/README.md` describes them.
Everything here is compared with those files: index sets exactly, outputs to 1e-5.

Where ours differ on purpose, each held by a test that is named here (`docs/groups.md` tells users):

OTO
  - lists only what makes a unit. Ours list what reads it too, as 'in' members; they are compared
    with DepGraph's.
  - lists a batch norm behind a concatenation as a group of its own, 'auxiliary', with `aux_of`.
    Here its slices are members of the groups that they follow: `oto_members` moves them there.
  - calls the width of an encoder prunable, until it is marked by hand. Here it stays, since a norm
    runs over it: `test_a_width_that_a_norm_runs_over_stays`. With `normalisation='sliced'` it may
    go.
  - has either heads or whole dimensions of all heads. Here there are both, and dimensions of
    queries and keys are apart from those of values: `test_heads_and_dimensions_of_heads`.
  - lists the last layer as a group that is not prunable. So do ours, and say why: its units are
    the network's output. Ours also list the axis that reads the raw input.
DepGraph
  - leaves out the last layer if it is told to. Here that follows from the outputs.
  - makes a group from the last layer that computes it. Ours are in forward order, and named after
    the first: only the numbers of members are the same, not their order.
  - cuts the width of an encoder. Ours do so with `normalisation='sliced'`; the numbers are the
    same: `test_depgraph_example`.
  - lets single rows of queries, keys and values go with one row of what follows, whichever head
    they belong to; nothing keeps heads equally long. Here they are heads, and dimensions of all
    heads: `test_heads_and_dimensions_of_heads`.
  - lets single channels of grouped convolutions go; what can be cut is found when it is cut. Here
    they are whole groups of the convolution, or one channel of each:
    `test_grouped_convolutions`. The example that it cuts is one of ours.
  - knows biases and statistics as parts of their layer, not as members. Ours are members.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from structured_nets import load, tree_of

import jaxprune as jp
from jaxprune import tree

OTO = ('convnet', 'densenet', 'encoder', 'mlp', 'mobilenet', 'resnet', 'resnet2')
DEPGRAPH = (
    *('convnet', 'densenet', 'encoder', 'grouped'),
    *('mlp', 'mobilenet', 'resnet20', 'vgg'),
)
TOLERANCE = 1e-5


@functools.cache
def read(name, normalisation='refuse'):
    file, _, forward, params, stats = load(name)
    return jp.groups(forward, params, file['x'], stats, normalisation=normalisation)


def index_sets(member):
    return [at.tolist() for at in member.indices]


def made(family):
    """(path, axis) -> index sets of what makes a family's units, without what reads them."""
    return {(m.path, m.axis): index_sets(m) for m in family.members if m.role in ('out', 'along')}


def statistics(family):
    return {m.path for m in family.members if m.role == 'state'}


def without(path):
    """A path of the files without 'params/' or 'batch_stats/' in front."""
    return path.split('/', 1)[1]


# --- OTO ----------------------------------------------------------------------------------------


def oto_members(groups):
    """For each group: members, statistics, may it go, which groups are zeroed.

    The slices of a batch norm behind a concatenation are handed to the groups that they follow.
    """
    found = {}
    for group in groups:
        if not group['is_auxiliary']:
            own = {(without(m['path']), m['axis']): m['index_sets'] for m in group['members']}
            states = set(map(without, group['batch_stats']))
            for m in group['members']:
                found[without(m['path'])] = (own, states, group)
    for group in groups:
        if group['is_auxiliary']:
            start = 0
            for path, size in group['aux_of']:
                own, states, source = found[without(path)]
                assert size == source['num_groups']
                for m in group['members']:
                    own[without(m['path']), m['axis']] = m['index_sets'][start : start + size]
                states |= set(map(without, group['batch_stats']))
                start += size
    return list({id(own): (own, states, group) for own, states, group in found.values()}.values())


def removal(params, families):
    """Masks without some groups: all that makes them, biases and scales too."""
    masks = {path: np.ones(leaf.shape, bool) for path, leaf in tree.paths(params)}
    for family, numbers in families:
        for m in family.members:
            if m.role in ('out', 'along'):
                for n in numbers:
                    np.moveaxis(masks[m.path], m.axis, 0)[m.indices[n]] = False
    return masks


@pytest.mark.parametrize('name', OTO)
def test_oto_groups(name):
    """The same slices in the same groups, the same statistics, and the same that may go."""
    meta = load(f'oto_groups_{name}')[1]
    families = read(f'oto_groups_{name}').families
    expected = oto_members(meta['groups'])
    matched = []
    for own, states, group in expected:
        [family] = [f for f in families if made(f) == own]
        assert statistics(family) == states
        assert family.size == group['num_groups']
        assert (not family.reason) == group['is_prunable']
        assert family.zero_invariant or family.reason
        matched.append(family.name)
    others = [f for f in families if f.name not in matched]
    for family in others:  # see the docstring of this file
        assert family.kind == 'head_dim' or family.reason == 'the raw input'


@pytest.mark.parametrize('name', OTO)
def test_oto_subnets(name):
    """Zeroed groups leave its outputs; what is cut out is its smaller network, to the last bit."""
    file, meta, forward, params, stats = load(f'oto_groups_{name}')
    families = read(f'oto_groups_{name}').families
    zeroed = [
        (next(f for f in families if made(f) == own), group['zeroed_groups'])
        for own, _, group in oto_members(meta['groups'])
    ]
    masks = removal(params, zeroed)
    masked = tree.apply_masks(params, masks)
    assert_same_arrays(masked, tree_of(file, 'zeroed/params/'))
    run = jax.jit(forward)
    for values, key in ((params, 'y_full'), (masked, 'y_zeroed')):
        np.testing.assert_allclose(run(values, stats, file['x']), file[key], atol=TOLERANCE)
    small = jp.compact(forward, params, masks, file['x'], model_state=stats)
    assert_same_arrays(small.params, tree_of(file, 'subnet/params/'))
    assert_same_arrays(small.model_state, tree_of(file, 'subnet/batch_stats/'))
    y = jax.jit(small.apply)(small.params, small.model_state, file['x'])
    np.testing.assert_allclose(y, file['y_subnet'], atol=TOLERANCE)
    assert sum(small.removed.values()) == sum(len(numbers) for _, numbers in zeroed)


def assert_same_arrays(ours, theirs):
    ours, theirs = (dict(tree.paths(t)) for t in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


# --- DepGraph -----------------------------------------------------------------------------------


def depgraph_members(group):
    """(layer, side) -> the indices that go with each channel of the root."""
    found = {}
    for m in group['members']:
        at = [[] for _ in range(group['num'])]
        for index, root in zip(m['idxs'], m['root_idxs'], strict=True):
            at[root].append(index)
        found[m['layer'], m['side']] = at
    return found


def sides(family, root):
    """A family as DepGraph writes it: (layer, side) -> indices for each channel of its root."""
    [maker] = [m for m in family.members if m.path == f'{root}/kernel' and m.role != 'in']
    channels = [int(at[0]) for at in maker.indices]
    assert all(len(at) == 1 for at in maker.indices)
    found = {}
    for m in family.members:
        layer, leaf = m.path.rsplit('/', 1)
        if leaf in ('kernel', 'scale'):
            at = [None] * family.size
            for channel, indices in zip(channels, index_sets(m), strict=True):
                at[channel] = indices
            found[layer, 'in' if m.role == 'in' else 'out'] = at
    return found


def makes(family, layer):
    return any(m.path == f'{layer}/kernel' and m.role != 'in' for m in family.members)


@pytest.mark.parametrize('name', DEPGRAPH)
def test_depgraph_groups(name):
    """The same channels go with those of the root, in what makes them and in what reads them."""
    _, meta, _, params, _ = load(f'depgraph_{name}')
    normalisation = 'sliced' if name == 'encoder' else 'refuse'
    families = read(f'depgraph_{name}', normalisation).families
    apart = {'encoder': ['attention0/self/value'], 'grouped': ['gc', 'b0_pw']}.get(name, [])
    roots = []
    for group in meta['groups']:
        if group['root'] in apart:
            continue  # differ on purpose, see below
        [family] = [f for f in families if makes(f, group['root'])]
        assert sides(family, group['root']) == depgraph_members(group)
        assert not family.reason
        roots.append(family.name)
        # Biases and statistics go with their layers.
        layers = {layer for layer, side in depgraph_members(group) if side == 'out'}
        biases = {f'{layer}/bias' for layer in layers if 'bias' in params[layer]}
        assert {m.path for m in family.members if m.path.endswith('/bias')} == biases
    if not apart:
        assert {f.name for f in families if not f.reason} == set(roots)
    [last] = [f for f in families if any(makes(f, layer) for layer in meta['ignored'])]
    assert last.reason == "the network's output"


@pytest.mark.parametrize('name', DEPGRAPH)
def test_depgraph_example(name):
    """Cutting what it cut gives its network: the same arrays, the same outputs."""
    file, meta, forward, params, stats = load(f'depgraph_{name}')
    normalisation = 'sliced' if name == 'encoder' else 'refuse'
    example = meta['pruned_example']
    chosen = []
    for family in read(f'depgraph_{name}', normalisation).families:
        for m in family.members:
            if (m.path, m.role) == (f'{example["root"]}/kernel', 'out'):
                whole = [n for n, at in enumerate(index_sets(m)) if {*at} <= {*example['idxs']}]
                chosen += [(family, whole)] if whole else []
    masks = removal(params, chosen)
    options = {'model_state': stats, 'normalisation': normalisation}
    small = jp.compact(forward, params, masks, file['x'], **options)
    assert_same_arrays(small.params, tree_of(file, 'pruned_example/params/'))
    assert_same_arrays(small.model_state, tree_of(file, 'pruned_example/batch_stats/'))
    y = jax.jit(small.apply)(small.params, small.model_state, file['x'])
    np.testing.assert_allclose(y, file['pruned_example/y'], atol=TOLERANCE)


# --- where ours differ --------------------------------------------------------------------------


def test_a_width_that_a_norm_runs_over_stays():
    """OTO says it may go and its authors mark it by hand; DepGraph cuts it, norms and all."""
    meta = load('oto_groups_encoder')[1]
    marked = [g for g in meta['groups'] if g['is_prunable_default'] and not g['is_prunable']]
    assert [without(path) for path in meta['marked_unprunable']] == ['embed/kernel']
    assert len(marked) == 1
    [stays] = [f for f in read('oto_groups_encoder').families if makes(f, 'embed')]
    assert stays.reason.startswith('normalised or reduced over by')
    [goes] = [f for f in read('oto_groups_encoder', 'sliced').families if makes(f, 'embed')]
    assert not goes.reason
    assert made(goes) == made(stays)


def test_heads_and_dimensions_of_heads():
    """By the reshape of 12 rows into 4 heads of 3: a head is 3 rows, a dimension one of each."""
    families = read('depgraph_encoder').families
    name = 'attention0/self/{}/kernel'
    heads = [[3 * h + d for d in range(3)] for h in range(4)]
    dims = [[3 * h + d for h in range(4)] for d in range(3)]
    found = [
        {m.path: index_sets(m) for m in f.members if m.path.endswith('kernel')}
        for f in families
        if f.kind != 'unit'
    ]
    projections = [name.format(n) for n in ('query', 'key', 'value')]
    reader = 'attention0/output/dense/kernel'
    assert found == [
        dict.fromkeys([*projections, reader], heads),
        dict.fromkeys(projections[:2], dims),
        dict.fromkeys([projections[2], reader], dims),
    ]
    # DepGraph: row by row, the same for all four.
    [group] = [g for g in load('depgraph_encoder')[1]['groups'] if 'value' in g['root']]
    rows = [[i] for i in range(12)]
    assert all(at == rows for at in depgraph_members(group).values())


def test_grouped_convolutions():
    """4 groups of 3 inputs and 4 outputs: by hand, channel g * 3 + i meets row i of group g."""
    families = [f for f in read('depgraph_grouped').families if not f.reason]
    found = [
        {m.path: index_sets(m) for m in f.members if m.path in ('b0_pw/kernel', 'gc/kernel')}
        for f in families[1:]
    ]
    assert [f.size for f in families[1:]] == [4, 3, 4]
    inputs, outputs = np.arange(12).reshape(4, 3), np.arange(16).reshape(4, 4)
    assert found[0] == {'b0_pw/kernel': inputs.tolist(), 'gc/kernel': outputs.tolist()}
    assert found[1] == {'b0_pw/kernel': inputs.T.tolist(), 'gc/kernel': [[0], [1], [2]]}
    assert found[2] == {'gc/kernel': outputs.T.tolist()}
    # DepGraph: channel by channel, with the same readers.
    for group, reader in (('gc', ('head', 'in')), ('b0_pw', ('gc', 'in'))):
        [theirs] = [g for g in load('depgraph_grouped')[1]['groups'] if g['root'] == group]
        members = depgraph_members(theirs)
        assert reader in members
        assert all(at == [[i] for i in range(theirs['num'])] for at in members.values())


def test_a_copy_is_not_silenced_by_what_is_added_to_it():
    """Expectation: by hand. Of `repeat(x a, 2) + x b` the second axis of copies can be cut, since
    all that reads it would be; but with its slices of `b` at zero it still has those of `a`."""

    def apply(params, x):
        h = jnp.repeat(x @ params['a'], 2, axis=-1) + x @ params['b']
        return jax.nn.relu(h) @ params['c']

    shapes = {'a': (3, 4), 'b': (3, 8), 'c': (8, 2)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    families = {f.name: f for f in jp.groups(apply, params, jnp.ones((2, 3))).families}
    assert families['a'].size == 4 and families['b'].size == 2
    assert not families['b'].zero_invariant
