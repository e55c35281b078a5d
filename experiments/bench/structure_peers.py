"""Torch-Pruning and torch-kirigami on the networks of `structure_nets`, for `structure.py`.

Both run their network once to build a graph. It is small, so PyTorch gets one thread: with more it
is several times slower where other work runs beside. Each gets its network in evaluation mode.
"""

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import structure_nets as nets
import torch
import torch_pruning
from structure_nets import PAIRS, JaxOps, Pair, chosen, masks_of
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torch_kirigami import DependencyGraph
from torch_kirigami.pruning import PlanningError, Pruner, unique_groups

import jaxprune as jp
from jaxprune import tree
from jaxprune.errors import first_line

torch.set_num_threads(1)
#: How far outputs of two frameworks may differ, relative to the largest.
AGREE = 1e-4


class TorchNet(nn.Module):
    """The layers of a pair as modules; subclasses bring `forward`."""

    def __init__(self, layers: nets.Layers) -> None:
        super().__init__()
        for name, kind in layers.items():
            if isinstance(kind, nets.Free):
                self.register_parameter(name, nn.Parameter(torch.randn(kind.shape)))
            else:
                self.add_module(name, _module(kind))
        for name, kind in layers.items():
            if isinstance(kind, nets.Tied):
                getattr(self, name).weight = getattr(self, kind.to).weight

    def layer(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, name)(x)

    def free(self, name: str) -> torch.Tensor:
        return getattr(self, name)

    def relu(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x)

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x)

    def softmax(self, x: torch.Tensor) -> torch.Tensor:
        return F.softmax(x, -1)

    def cat(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts, 1)

    def halves(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.chunk(2, -1)

    def permute(self, x: torch.Tensor, *order: int) -> torch.Tensor:
        return x.permute(*order)

    def flatten(self, x: torch.Tensor) -> torch.Tensor:
        return torch.flatten(x, 1)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).transpose(1, 2)

    def heads(self, x: torch.Tensor, size: int) -> torch.Tensor:
        return x.reshape(x.shape[0], x.shape[1], -1, size).transpose(1, 2)

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(2)

    def max_pool(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, 2)

    def pixel_shuffle(self, x: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(x, 2)


def _module(kind: NamedTuple) -> nn.Module:
    match kind:
        case nets.Conv(inputs, outputs, side, stride, groups):
            pad = side // 2 if side % 2 else 0
            return nn.Conv2d(inputs, outputs, side, stride, pad, groups=groups, bias=False)
        case nets.Linear(inputs, outputs):
            return nn.Linear(inputs, outputs)
        case nets.Tied(_, inputs, outputs):
            return nn.Linear(inputs, outputs, bias=False)
        case nets.BatchNorm(maps):
            return nn.BatchNorm2d(maps)
        case nets.LayerNorm(size):
            return nn.LayerNorm(size)
        case nets.Embedding(words, size):
            return nn.Embedding(words, size)
    raise TypeError(kind)


def torch_net(pair: Pair) -> TorchNet:
    """The network in evaluation mode, with statistics that are not 0 and 1."""
    torch.manual_seed(0)
    kind = type('Net', (TorchNet,), {'forward': lambda self, x: pair.forward(self, x)})
    model = kind(pair.layers).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for array in (module.weight, module.bias, module.running_mean):
                nn.init.uniform_(array, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


# --- one network ---------------------------------------------------------------------------------


Root = tuple[str, int, list[int]]


class Case(NamedTuple):
    """A network, what is removed from it, and its outputs under the masks.

    Attributes:
      model: in PyTorch, masked: zeros where something is removed.
      apply, params, state: in JAX, as it was.
      removed: family -> groups.
      roots: (layer, axis of its weight, indices): the same for PyTorch.
      seeds: one index of each of these groups; the same as `roots` where a group is an index.
      masks: of all parameters.
      expected: outputs of the masked network.
    """

    pair: Pair
    model: TorchNet
    apply: Callable
    params: Any
    state: Any
    x: np.ndarray
    removed: dict[str, list[int]]
    roots: list[Root]
    seeds: list[Root]
    masks: dict[str, np.ndarray]
    expected: np.ndarray


def nested(named: Any) -> dict[str, Any]:
    """PyTorch's arrays as `{layer: {name: array}}`."""
    made: dict[str, Any] = {}
    for path, array in named:
        if path.endswith('num_batches_tracked'):
            continue
        *layer, name = path.split('.')
        at = made.setdefault(layer[0], {}) if layer else made
        at[name] = np.array(array.detach())
    return made


def case_of(name: str, fraction: float) -> Case:
    pair = PAIRS[name]
    model = torch_net(pair)
    params, state = nested(model.named_parameters()), nested(model.named_buffers())
    x = pair.inputs()

    def apply(params, state, x):
        return pair.forward(JaxOps(pair.layers, params, state), x)

    read = jp.groups(apply, params, x, state, normalisation=pair.normalisation)
    removed = chosen(read, fraction, pair.only)
    shapes = {path: leaf.shape for path, leaf in tree.paths(params)}
    masks = masks_of(read, removed, shapes)
    masked = dict(tree.paths(tree.apply_masks(params, masks)))
    with torch.no_grad():
        for path, array in model.named_parameters():
            array.copy_(torch.tensor(np.asarray(masked[path.replace('.', '/')])))
        expected = model(torch.tensor(x)).numpy()
    roots, seeds = roots_of(read, removed, None), roots_of(read, removed, 1)
    return Case(pair, model, apply, params, state, x, removed, roots, seeds, masks, expected)


def roots_of(read, removed: dict[str, list[int]], most: int | None) -> list[Root]:
    """For each layer that makes a family first: the axis of its weight, and what goes.

    Args:
      most: how many indices of each group, None for all.
    """
    made: dict[tuple[str, int], set[int]] = {}
    for family in read.families:
        if family.name in removed:
            first = next(m for m in family.members if m.role == 'out' and '/' in m.path)
            at = made.setdefault((first.path.split('/')[0], first.axis), set())
            for number in removed[family.name]:
                at.update(first.indices[number][:most].tolist())
    return [(layer, axis, sorted(at)) for (layer, axis), at in made.items()]


# --- who takes part ------------------------------------------------------------------------------


class Cut(NamedTuple):
    """A network after the removal: its outputs, parameters and multiply-accumulates."""

    outputs: np.ndarray
    params: int
    macs: int


class Refused(Exception):
    """Raised where a library says that it will not."""


def our_groups(case: Case) -> tuple[int, int]:
    # A new function each time: JAX keeps what it traced.
    read = jp.groups(
        lambda *arguments: case.apply(*arguments), case.params, case.x, case.state,
        normalisation=case.pair.normalisation,
    )  # fmt: skip
    free = [family for family in read.families if not family.reason]
    return len(free), sum(family.size for family in free)


def our_cut(case: Case) -> Cut:
    small = jp.compact(
        case.apply, case.params, case.masks, case.x, model_state=case.state,
        normalisation=case.pair.normalisation,
    )  # fmt: skip
    one = case.x[:1]
    cost = jp.cost(small.apply, small.params, one, small.model_state)
    outputs = np.asarray(small.apply(small.params, small.model_state, case.x))
    return Cut(outputs, cost.params, cost.macs)


def pruning_graph(model: TorchNet, x: torch.Tensor) -> Any:
    return torch_pruning.DependencyGraph().build_dependency(model, example_inputs=x, verbose=False)


def pruning_graph_of(case: Case) -> Any:
    return pruning_graph(case.model, torch.tensor(case.x))


def last_layer(model: nn.Module) -> nn.Module:
    return [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]


def pruning_groups(case: Case) -> tuple[int, int]:
    """Torch-Pruning: it has to be told to leave the last layer."""
    graph = pruning_graph(case.model, torch.tensor(case.x))
    kinds = (nn.Conv2d, nn.Linear, nn.Embedding)
    found = list(graph.get_all_groups([last_layer(case.model)], root_module_types=kinds))
    return len(found), sum(len(group[0].idxs) for group in found)


def pruning_cut(case: Case) -> Cut:
    model = copy.deepcopy(case.model)
    graph = pruning_graph(model, torch.tensor(case.x))
    for layer, _, at in case.roots:
        module = getattr(model, layer)
        prune = graph.get_pruner_of_module(module).prune_out_channels
        group = graph.get_pruning_group(module, prune, idxs=at)
        if not graph.check_pruning_group(group):
            raise Refused(f'check_pruning_group says no for {layer}')
        group.prune()
    return counted(model, case.x)


def kirigami_pruner(model: TorchNet, x: torch.Tensor) -> Pruner:
    return Pruner(model, graph=DependencyGraph.build(model, args=(x,)))


def kirigami_graph_of(case: Case) -> Any:
    return DependencyGraph.build(case.model, args=(torch.tensor(case.x),))


def kirigami_groups(case: Case) -> tuple[int, int]:
    pruner = kirigami_pruner(case.model, torch.tensor(case.x))
    space = pruner.discover_candidates()
    return len(space.channel_axes), len(unique_groups(pruner.parameter_groups(space.candidates)))


def kirigami_cut(case: Case) -> Cut:
    model = copy.deepcopy(case.model)
    pruner = kirigami_pruner(model, torch.tensor(case.x))
    remove = [
        pruner.graph.parameter(f'{layer}.weight').axis(axis).select(at)
        for layer, axis, at in case.roots
    ]
    model, _ = pruner.apply(pruner.plan_remove(remove))
    return counted(model, case.x)


def counted(model: nn.Module, x: np.ndarray) -> Cut:
    """Parameters, and the multiply-accumulates of one example as PyTorch counts them."""
    with torch.no_grad():
        outputs = model(torch.tensor(x)).numpy()
        with FlopCounterMode(display=False) as counter:
            model(torch.tensor(x[:1]))
    return Cut(outputs, sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)


#: Builds the graph; finds all groups (families, groups); removes.
LIBRARIES: dict[str, tuple[Callable, Callable, Callable]] = {
    'jaxprune': (our_groups, our_groups, our_cut),
    'Torch-Pruning': (pruning_graph_of, pruning_groups, pruning_cut),
    'kirigami': (kirigami_graph_of, kirigami_groups, kirigami_cut),
}
REFUSALS: tuple[type[Exception], ...] = (Refused, jp.PruneError, PlanningError)


# --- side by side ---------------------------------------------------------------------------------


class Rows(NamedTuple):
    """What was found for a network.

    Attributes:
      finding: a row of the table of groups.
      removing: a row of the table of removals.
      notes: what failed, in words.
      agrees: whether our smaller network equals the masked one.
    """

    finding: dict[str, Any]
    removing: dict[str, Any]
    notes: list[str]
    agrees: bool


def side_by_side(name: str, rounds: int, fraction: float = 0.3) -> Rows:
    """All libraries on one network."""
    case = case_of(name, fraction)
    finding: dict[str, Any] = {'net': name}
    removing: dict[str, Any] = {'net': name, 'removed': sum(map(len, case.removed.values()))}
    notes: list[str] = []
    agrees = True
    if case.pair.normalisation == 'sliced':
        far = distance(our_cut(case).outputs, case.expected)
        notes.append(f'{name}: a norm over what is left gives other outputs, {far:.0%} away; '
                     'the smaller networks are compared with that of jaxprune')  # fmt: skip
        case = case._replace(expected=our_cut(case).outputs)
    graphs = {}
    for library, (graph, find, cut) in LIBRARIES.items():
        try:
            families, groups = quietly(lambda find=find: find(case))
            finding[library], graphs[library] = f'{groups} in {families}', graph
            if find is not graph:
                [seconds] = in_turns(case, {library: find}, 1)[library]
                finding[f'{library} groups ms'] = f'{1e3 * seconds:.1f}'
        except Exception as error:
            finding[library] = 'fails'
            notes.append(f'{name}, groups, {library}: {said(error)}')
        try:
            found = quietly(lambda cut=cut: cut(case))
            removing[f'{library} params'] = f'{found.params:,}'
            removing[f'{library} MMACs'] = f'{found.macs / 1e6:.3f}'
            removing[library] = verdict(case, found)
        except Exception as error:
            removing[library] = 'refuses' if isinstance(error, REFUSALS) else 'fails'
            notes.append(f'{name}, removal, {library}: {said(error)}')
        if library == 'jaxprune':
            agrees = removing[library] == 'equal'
        elif case.seeds != case.roots:
            where = f'{name}, one index of each group, {library}'
            removing[f'{library}, one index'] = completes(case, where, cut, notes)
    for library, times in in_turns(case, graphs, rounds).items():
        finding[f'{library} ms'] = f'{1e3 * statistics.median(times):.1f}'
    return Rows(finding, removing, notes, agrees)


def completes(case: Case, where: str, cut: Callable, notes: list[str]) -> str:
    """Whether the rest of a group goes along where only one index is asked for."""
    try:
        found = quietly(lambda: cut(case._replace(roots=case.seeds)))
    except Exception as error:
        notes.append(f'{where}: {said(error)}')
        return 'refuses' if isinstance(error, REFUSALS) else 'fails'
    same = found.params == our_cut(case).params
    return verdict(case, found) + ('' if same else f', {found.params:,} parameters')


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


def verdict(case: Case, found: Cut) -> str:
    if found.outputs.shape != case.expected.shape:
        return f'outputs have shape {found.outputs.shape}'
    far = distance(found.outputs, case.expected)
    return 'equal' if far < AGREE else f'differs by {far:.0%}'


def quietly(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return call()


def said(error: Exception) -> str:
    return f'{type(error).__name__}: {first_line(error)[:200]}'


def in_turns(case: Case, calls: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of CPU of each call, in turns, after the first ones above; all have one thread."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.process_time()
            quietly(lambda call=call: call(case))
            times[name].append(time.process_time() - began)
    return times
