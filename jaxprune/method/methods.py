"""The methods a specification may name. To add one: a score in `score/`, a line here, a test.

A method that changes training has a file of its own in this room, and a line here.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxprune import score
from jaxprune.errors import lookup
from jaxprune.method.admm import admm
from jaxprune.method.by_rank import increg, spp
from jaxprune.method.dhspg import dhspg
from jaxprune.method.feedback import dpf, gmp, sr_ste, straight
from jaxprune.method.greg import greg1, greg2
from jaxprune.method.group_penalties import group_norm, proximal, slimming
from jaxprune.method.hesso import hesso
from jaxprune.method.hspg import hspg
from jaxprune.method.lean import lean, operator_norm
from jaxprune.method.movement import movement, soft_movement
from jaxprune.method.orthogonal import orthogonal
from jaxprune.method.regrow import acdc, rigl, set_
from jaxprune.method.soft_threshold import soft_threshold
from jaxprune.method.top_kast import top_kast
from jaxprune.method.tpp import tpp
from jaxprune.method.unify import unify
from jaxprune.types import Problem, Pruner, ScoreFn


class Method(NamedTuple):
    """A method's registry entry.

    Attributes:
      title: how tables and figures write it.
      doc: what it keeps, in a sentence or two.
      paper: authors, year and identifier; '' where there is none.
      score: builds the score from a problem, the batch-norm mode (True = batch statistics) and the
        method's options.
      needs: what an event must be given, see `types.NEEDS`.
      batch_norm: published mode while scoring: 'train' (batch statistics) or 'eval' (running).
      rounds: published number of rounds.
      density_schedule: published schedule of densities over the rounds.
      allocation: published allocation of weights to layers.
      rewind: what a run takes back after each round, 'weights' or ''.
      scheduled: densities may follow any schedule; else the first round or the last decides.
      monotone: pruned weights never return.
      grouped: the score takes `by`: what is removed together.
      coupled: it prunes coupled groups and nothing else.
      averages: the option 'momentum' averages scores over rounds.
      options: further options of the method with their published values. Numbers are traced, so
        runs that differ in them share a program; whole numbers and words are not.
      example: the inside of a table of `grid.method` with what the method cannot do without.
      make: builds the whole pruner, for methods that change training: `(asked, **options) ->
        pruner`, see `lasting.Asked`. Such a method acts between its first round and its last.
    """

    title: str
    score: Callable[..., ScoreFn] | None
    doc: str
    paper: str = ''
    needs: frozenset[str] = frozenset()
    batch_norm: str = 'eval'
    rounds: int = 1
    density_schedule: str = 'exponential'
    allocation: str = 'global'
    rewind: str = ''
    scheduled: bool = True
    monotone: bool = True
    grouped: bool = False
    coupled: bool = False
    averages: bool = False
    options: Mapping[str, Any] = {}
    example: str = ''
    make: Callable[..., Pruner] | None = None

    @property
    def hooked(self) -> bool:
        """Does the method change the training step?"""
        return self.make is not None


_data, _shape = frozenset({'data'}), frozenset({'shape'})
_data_initial = frozenset({'data', 'initial'})
_shape_fresh = frozenset({'shape', 'fresh_init'})


def _of(make: Callable[..., ScoreFn]) -> Callable[..., ScoreFn]:
    """A score that knows the problem and the batch-norm mode."""
    return lambda problem, train, **options: make(problem, train=train, **options)


def _measure(title: str, name: str, doc: str) -> Method:
    """An importance of the gradient-flow study; its temperature is an option."""
    point = {'temperature': 1.0, **score.MEASURES[name]}
    temperature = {'temperature': point.pop('temperature')}

    def make(problem: Problem, train: bool, **options: Any) -> ScoreFn:
        return score.importance(problem, train=train, **point, **options)

    return Method(title, make, doc, _FLOW, _data, grouped=True, options=temperature)


def _units(make: Callable[..., ScoreFn], title: str, doc: str, paper: str, **rest: Any) -> Method:
    """A score of coupled groups."""
    entry = {'example': 'granularity = "unit"', 'needs': _data, **rest}
    return Method(title, _of(make), doc, paper, grouped=True, coupled=True, **entry)


def _training(
    make: Callable[..., Pruner],
    title: str,
    doc: str,
    paper: str,
    *,
    rounds: int = 2,
    density_schedule: str = 'constant',
    scheduled: bool = True,
    **options: Any,
) -> Method:
    """A method that drives coupled groups to zero while a network trains."""
    return Method(
        title,
        None,
        doc,
        paper,
        rounds=rounds,
        density_schedule=density_schedule,
        scheduled=scheduled,
        coupled=True,
        options=options,
        example='granularity = "unit", start = 2, end = 6',
        make=make,
    )


def _sparse_training(
    make: Callable[..., Pruner], title: str, doc: str, paper: str, **rest: Any
) -> Method:
    """A method that chooses its masks anew while a network trains."""
    entry = {
        'rounds': 10,
        'density_schedule': 'cubic',
        'monotone': False,
        'example': 'start = 0, every = 0.5, end = 6',
        **rest,
    }
    return Method(title, None, doc, paper, make=make, **entry)


def _pulling(make: Callable[..., Pruner], title: str, doc: str, paper: str, **rest: Any) -> Method:
    """A method that pulls at weights, or groups of any kind, while a network trains."""
    entry = {
        'rounds': 2,
        'density_schedule': 'constant',
        'allocation': 'uniform',
        'example': 'start = 0, end = 6',
        **rest,
    }
    return Method(title, None, doc, paper, make=make, **entry)


def _preset(make: Callable[..., ScoreFn], **settings: Any) -> Callable[..., ScoreFn]:
    """A score with some of its options settled."""
    return functools.partial(make, **settings)


_SHAPLEY = 'Ancona, Öztireli & Gross 2020, arXiv:2006.01795'
_TAYLOR = 'Molchanov et al. 2019, arXiv:1906.10771'
_FLOW = 'Lubana & Dick 2021, arXiv:2009.11839'
_LEAN = 'Schoonhoven et al. 2020, arXiv:2011.06923'
_MOVEMENT = 'Sanh, Wolf & Rush 2020, arXiv:2005.07683'
_GREG = 'Wang, Qin, Zhang & Fu 2021, arXiv:2012.09243'
_FORCE = 'de Jorge et al. 2021, arXiv:2006.09081'


METHODS: dict[str, Method] = {
    'random': Method(
        'random',
        lambda problem, train: score.random(),
        'A uniform draw. The control of every comparison; best with a layerwise allocation.',
    ),
    'magnitude': Method(
        'magnitude', lambda problem, train: score.magnitude(), 'The largest weights by abs(w).'
    ),
    # The paper removes 20 % of what is left in a round: 10 rounds to a density of 0.107.
    'lottery': Method(
        'lottery ticket',
        lambda problem, train: score.magnitude(),
        'Train, prune the smallest of the trained weights, take the others back to what they were '
        'at rewind_to, and train again: iterative magnitude pruning.',
        'Frankle & Carbin 2019, arXiv:1803.03635; Frankle et al. 2020, arXiv:1912.05671',
        rounds=10,
        rewind='weights',
        example='start = 6, rewind_to = 0.5',
    ),
    'lamp': Method(
        'LAMP',
        lambda problem, train: score.lamp(),
        'abs(w)² over the sum of the squares that are at least as large in the layer.',
        'Lee et al. 2021, arXiv:2010.07611',
    ),
    'snip': Method(
        'SNIP',
        _of(score.snip),
        'abs(w g): the effect of removing a weight on the loss.',
        'Lee et al. 2019, arXiv:1810.02340',
        _data,
    ),
    # The paper's 60 rounds; the code of the effective-sparsity study takes 300.
    'iter_snip': Method(
        'Iter-SNIP',
        _of(score.snip),
        'SNIP in rounds, with fresh data in each.',
        _FORCE,
        _data,
        'train',
        rounds=60,
    ),
    'force': Method(
        'FORCE',
        _of(score.force),
        'SNIP in rounds that scores pruned weights too, as if they came back: they may return.',
        _FORCE,
        _data,
        'train',
        rounds=60,
        monotone=False,
    ),
    'grasp': Method(
        'GraSP',
        _of(score.grasp),
        'w Hg, signed: keeps the norm of the gradient after pruning.',
        'Wang et al. 2020, arXiv:2002.07376',
        _data,
        'train',
        options={'temperature': 200.0},
    ),
    'synflow': Method(
        'SynFlow',
        lambda problem, train: score.synflow(problem),
        'abs(w) dR/dabs(w) of the summed outputs R of the net of absolute values. No data, and no '
        'overflow at any depth.',
        'Tanaka et al. 2020, arXiv:2006.05467',
        _shape,
        rounds=100,
    ),
    'lookahead': Method(
        'lookahead',
        lambda problem, train: score.lookahead(problem),
        'abs(w) times the norms of the weights before and after it: the smallest distortion of the '
        'outputs over three layers. No data.',
        'Park, Lee, Mo & Shin 2020, arXiv:2002.04809',
        _shape,
    ),
    'taylor': Method(
        'Taylor',
        _of(score.taylor),
        'The mean over minibatches of abs(w g), or of its square.',
        'Molchanov et al. 2019, arXiv:1906.10771',
        _data,
        options={'power': 1},
    ),
    'fisher': Method(
        'Fisher',
        _of(score.fisher),
        'w² F / 2, F the mean squared gradient of single examples: optimal brain damage.',
        'LeCun, Denker & Solla 1990; Theis et al. 2018, arXiv:1801.05787',
        _data,
        options={'labels': 'data'},
    ),
    # In 60 rounds this is GraSP-It of the same code.
    'gradient_norm': Method(
        'gradient norm',
        _of(score.gradient_norm),
        'g²: the largest gradients. With rounds = 60, GraSP-It of the FORCE authors.',
        _FORCE,
        _data,
        'train',
    ),
    # The number of rounds is ours; the paper's is not known to us, its code defaults to one.
    'ntk_sap': Method(
        'NTK-SAP',
        _of(score.ntk_sap),
        'The effect of a weight on the trace of the tangent kernel, at noise inputs and fresh '
        'weights in each round. No data.',
        'Wang, Li & Sun 2023, arXiv:2304.02840',
        _shape_fresh,
        'train',
        rounds=20,
        options={'samples': 100, 'repeats': 1, 'epsilon': 0.01},
    ),
    'prospr': Method(
        'ProsPr',
        _of(score.prospr),
        'The effect of removing a weight on the loss a few training steps later.',
        'Alizadeh et al. 2022, arXiv:2202.08132',
        _data,
        'train',
        options={'steps': 3, 'learning_rate': 0.1, 'first_order': False},
    ),
    'sipp': Method(
        'SiPP',
        _of(score.sipp),
        'The largest share of a weight in the sum that it takes part in, over examples. Inputs '
        'only, the labels are not used.',
        'Baykal, Liebenwein, Gilitschenski, Feldman & Rus 2019, arXiv:1910.05422',
        _data,
    ),
    # Its allocation is a part of it: all layers in one ranking.
    'pfp': Method(
        'PFP',
        _of(score.pfp),
        'Channels by the error bound at which their readers still keep them. With granularity '
        'unit whole units, else what reads them; target effective counts the published budget.',
        'Liebenwein, Baykal, Lang, Feldman & Rus 2020, arXiv:1911.07412',
        _data,
        grouped=True,
        options={'failure': 1e-16},
        example='granularity = "unit"',
    ),
    'loss_preservation': _measure(
        'loss preservation', 'loss_preservation', 'abs(θ g): weight by weight this is SNIP.'
    ),
    'biased_loss_preservation': _measure(
        'biased loss preservation', 'biased_loss_preservation', 'abs(θ) abs(θ g).'
    ),
    'gradient_norm_increase': _measure(
        'gradient-norm increase',
        'gradient_norm_increase',
        'θ Hg, signed: GraSP, with the gradient of all parameters.',
    ),
    'gradient_norm_preservation': _measure(
        'gradient-norm preservation', 'gradient_norm_preservation', 'abs(θ Hg).'
    ),
    'importance': Method(
        'importance',
        _of(score.importance),
        'The family of which the four before, and magnitude, are points.',
        _FLOW,
        _data_initial,
        grouped=True,
        options={'order': 1, 'mode': 'sum_of_abs', 'bias': 'none', 'temperature': 1.0},
    ),
    'gate_taylor': _units(
        score.gate_taylor,
        'Taylor (gates)',
        'The change of the loss without a unit, by the slope along a gate on it, after its norm.',
        _TAYLOR,
        averages=True,
        options={
            'order': 1,
            'sign': 'square',
            'per': 'batch',
            'place': 'norm',
            'shared': 'sum',
            'at_once': 64,
            'momentum': 0.0,
        },
    ),
    'shapley': _units(
        score.unit_shapley,
        'Shapley',
        'The mean increase of the loss when a unit is removed, over random orders of removal.',
        _SHAPLEY,
        options={
            'permutations': 5,
            'estimator': 'permutation',
            'aggregate': 'mean',
            'place': 'activation',
            'at_once': 64,
        },
    ),
    'leave_one_out': _units(
        score.unit_leave_one_out,
        'leave one out',
        'The exact change of the loss when a unit alone is removed: the oracle of others.',
        _TAYLOR,
        options={'sign': 'signed', 'place': 'activation', 'at_once': 64},
    ),
    'apoz': _units(
        _preset(score.activation_score, measure='apoz'),
        'APoZ',
        'How often a unit is active: one minus the average percentage of zeros.',
        'Hu, Peng, Tai & Tang 2016, arXiv:1607.03250',
        options={'place': 'activation'},
    ),
    'sensitivity': _units(
        _preset(score.activation_score, measure='sensitivity'),
        'sensitivity',
        "The size of the loss's slope along a unit's activations, summed over positions.",
        'Mozer & Smolensky 1989; as in Ancona et al. 2020, arXiv:2006.01795',
        options={'place': 'activation'},
    ),
    'taylor_output': _units(
        _preset(score.activation_score, measure='taylor_output'),
        'Taylor (outputs)',
        'The mean of abs(z dL/dz) over examples and positions, of length one in each layer.',
        'Molchanov et al. 2017, arXiv:1611.06440',
        options={'place': 'activation'},
    ),
    'group_score': _units(
        score.coupled_score,
        'group score',
        'A number for each weight, added up over what is removed together, then normalised in the '
        'layer; every choice is an option.',
        'Fang et al. 2023, arXiv:2301.12900',
        options={
            'measure': 'square',
            'parameters': 'kernels',
            'members': 'all',
            'reduce': 'mean',
            'root': False,
            'normalise': 'mean',
        },
    ),
    'fpgm': _units(
        _preset(score.coupled_score, measure='fpgm', members='out', reduce='sum'),
        'FPGM',
        'The sum of distances from the other filters of the layer: what others can replace goes.',
        'He et al. 2019, arXiv:1811.00250',
        needs=frozenset(),
        options={'normalise': 'none'},
    ),
    'bn_scale': _units(
        _preset(score.coupled_score, measure='magnitude', members='out', reduce='mean'),
        'BN scale',
        'The size of the scale of the norm that follows, averaged over the layers of a sum.',
        'Liu et al. 2017, arXiv:1708.06519',
        needs=frozenset(),
        options={'parameters': 'scale$', 'normalise': 'none'},
    ),
    'lean': Method(
        'LEAN',
        lambda problem, train, **options: lean(problem, **options),
        'Single kernels on paths of large products of operator norms: the best path first, then '
        "the best of what is left. No data. What competes is granularity = 'kernel'.",
        _LEAN,
        _shape,
        rounds=15,
        grouped=True,
        options={'side': 16},
        example='granularity = "kernel"',
    ),
    'operator_norm': Method(
        'operator norm',
        lambda problem, train, **options: operator_norm(problem, **options),
        'The operator norm of each single kernel, times the scale of its batch norm: what LEAN is '
        "compared with. No data. What competes is granularity = 'kernel'.",
        _LEAN,
        _shape,
        rounds=15,
        grouped=True,
        options={'side': 16, 'scaled': True},
        example='granularity = "kernel"',
    ),
    'tpp': _training(
        tpp,
        'TPP',
        'Units: chosen in the first round by the mean of abs(w), pruned in the last; in between a '
        'growing penalty pulls them to zero and decorrelates them from the rest.',
        'Wang & Fu 2023, arXiv:2207.12534',
        scheduled=False,
        weight=1000.0,
        interval=10,
        increment=1e-4,
        ceiling=1.0,
    ),
    'hspg': _training(
        hspg,
        'HSPG',
        'OTO: a penalty on the lengths of groups; later a group that a step would turn around '
        'becomes exactly zero. The last round removes the shortest.',
        'Chen et al. 2021, arXiv:2107.07467',
        penalty=1e-3,
        half_space=0.0,
        half_space_dense=0.0,
        second_at=0.25,
        cut='target',
    ),
    'dhspg': _training(
        dhspg,
        'DHSPG',
        'OTOv2: redundant groups are chosen in the first step, penalised as strongly as each '
        'needs, and projected to zero until the target is met.',
        'Chen et al. 2023, arXiv:2303.06862',
        penalty=1e-3,
        half_space=0.0,
        half_space_dense=0.0,
        second_at=0.0,
        tolerance=0.05,
        amplify=2.0,
        most_times=10.0,
        exact=True,
    ),
    # Ten periods, and the round that removes what is zero.
    'hesso': _training(
        hesso,
        'HESSO',
        'OTOv3: after each round but the last the redundant groups, by five criteria together, '
        'shrink to exactly zero until the next one.',
        'Chen et al. 2024, arXiv:2409.09085',
        rounds=11,
        density_schedule='linear_early',
        variant='paper',
    ),
    'proximal': _training(
        proximal,
        'group lasso',
        'A penalty on the lengths of groups by proximal steps, which make groups exactly zero. The '
        'last round removes the shortest.',
        'Yuan & Lin 2006; Parikh & Boyd 2014',
        penalty=1e-3,
        cut='target',
    ),
    'group_norm': _training(
        group_norm,
        'group norm',
        'All groups decay, weak ones up to 16 times as fast, what reads them included; the last '
        'round removes the weakest.',
        'Fang et al. 2023, arXiv:2301.12900',
        penalty=5e-4,
        strongest=16.0,
        scales='scale$',
    ),
    'slimming': _training(
        slimming,
        'slimming',
        'A penalty on the scales of norms; the last round removes the groups with the smallest.',
        'Liu et al. 2017, arXiv:1708.06519',
        penalty=1e-4,
        scales='scale$',
    ),
    'gmp': _sparse_training(
        gmp,
        'GMP',
        'Gradual magnitude pruning: the largest weights in rounds. Pruned ones stand still and '
        'return if others shrink below them.',
        'Zhu & Gupta 2017, arXiv:1710.01878',
        allocation='uniform',
    ),
    'dpf': _sparse_training(
        dpf,
        'DPF',
        'Dynamic pruning with feedback: dense weights follow the gradient of the masked network, '
        'and the largest make the next mask.',
        'Lin, Stich, Barba, Dmitriev & Jaggi 2020, arXiv:2006.07253',
    ),
    'straight': _sparse_training(
        straight,
        'straight-through',
        "As DPF, with masks by size or, by = 'random', drawn anew in each round.",
        'Bengio, Léonard & Courville 2013, arXiv:1308.3432; Lee et al. 2023, arXiv:2304.14082',
        options={'by': 'magnitude'},
    ),
    'sr_ste': _sparse_training(
        sr_ste,
        'SR-STE',
        'As DPF, and what is pruned now is pulled to zero, so that fewer weights return.',
        'Zhou et al. 2021, arXiv:2102.04010',
        density_schedule='constant',
        options={'pull': 2e-4},
        example='granularity = "2:4", start = 0, every = 0.5, end = 6',
    ),
    'acdc': _sparse_training(
        acdc,
        'AC/DC',
        'The largest weights and all weights by turns; what comes back is zero.',
        'Peste, Iofinova, Vladu & Alistarh 2021, arXiv:2106.12379',
        rounds=9,
        density_schedule='alternate',
        example='start = 1, every = 1, end = 9',
    ),
    'movement': _sparse_training(
        movement,
        'movement',
        'Learned scores: weights that move away from zero stay. Pruned weights get no gradient, '
        'their scores do.',
        _MOVEMENT,
        allocation='uniform',
        options={'score_rate': 0.01, 'score_optimizer': 'adam'},
    ),
    'soft_movement': _sparse_training(
        soft_movement,
        'soft movement',
        'As movement, with a threshold on the scores and a penalty on their sigmoid; the last '
        'round keeps the best.',
        _MOVEMENT,
        density_schedule='constant',
        scheduled=False,
        rounds=2,
        options={
            'score_rate': 0.01,
            'score_optimizer': 'adam',
            'threshold': 0.1,
            'penalty': 1.0,
            'cut': 'target',
        },
        example='start = 0, end = 6',
    ),
    'str': _sparse_training(
        soft_threshold,
        'STR',
        'A threshold for each layer, learned with the weights, that makes small ones zero; the '
        'last round keeps the largest.',
        'Kusupati et al. 2020, arXiv:2002.03231',
        density_schedule='constant',
        scheduled=False,
        rounds=2,
        options={'initial': -10.0, 'cut': 'target'},
        example='start = 0, end = 6',
    ),
    'set': _sparse_training(
        set_,
        'SET',
        'Random masks at first; then the smallest weights go and as many grow at random.',
        'Mocanu et al. 2018, arXiv:1707.04780',
        allocation='erk',
        density_schedule='constant',
        options={'drop': 0.3, 'skip': True},
    ),
    'rigl': _sparse_training(
        rigl,
        'RigL',
        'Random masks at first; then the smallest weights go and as many grow where the gradient '
        'is largest.',
        'Evci, Gale, Menick, Castro & Elsen 2020, arXiv:1911.11134',
        allocation='erk',
        density_schedule='constant',
        needs=frozenset({'train_batch'}),
        batch_norm='train',
        options={'drop': 0.3, 'skip': True},
    ),
    'top_kast': _sparse_training(
        top_kast,
        'Top-KAST',
        'The largest weights compute, and the next largest learn as well; the others stand still.',
        'Jayakumar, Pascanu, Rae, Osindero & Elsen 2020, arXiv:2106.03517',
        allocation='uniform',
        density_schedule='constant',
        options={'explore': 0.1, 'penalty': 1e-4},
    ),
    'greg1': _pulling(
        greg1,
        'GReg-1',
        'What is smallest in the first round is pulled to zero by a growing penalty, and pruned in '
        'the last.',
        _GREG,
        scheduled=False,
        options={'interval': 10, 'increment': 1e-4, 'ceiling': 1.0, 'enough': 1000.0},
    ),
    'greg2': _pulling(
        greg2,
        'GReg-2',
        'All are pulled alike at first; what is smallest in the second round is pulled on to zero, '
        'and pruned in the last.',
        _GREG,
        scheduled=False,
        rounds=3,
        options={
            'interval': 10,
            'increment': 1e-4,
            'ceiling': 1.0,
            'enough': 1000.0,
            'pick_increment': 1e-5,
            'pick_ceiling': 0.01,
            'recover': -1e-4,
        },
    ),
    # The number of rounds is ours: one in 180 steps is published, until enough are gone.
    'spp': _pulling(
        spp,
        'SPP',
        'Each group computes with a probability; in each round those that are small lose some of '
        'it, the others win, and what is at zero is removed.',
        'Wang, Zhang, Wang & Hu 2018, arXiv:1709.06994',
        rounds=60,
        options={'amount': 0.05, 'bend': 0.25},
        example='granularity = "1x512", start = 0, every = 0.1, end = 6',
    ),
    'increg': _pulling(
        increg,
        'IncReg',
        'As SPP, with a penalty in place of chance.',
        'Wang, Zhang, Wang, Lu & Hu 2018, arXiv:1811.08390',
        rounds=60,
        options={'amount': 0.05, 'bend': 0.25, 'ceiling': 1.0},
        example='granularity = "1x512", start = 0, every = 0.1, end = 6',
    ),
    'admm': _pulling(
        admm,
        'ADMM',
        'Weights are drawn to the nearest pruned network, which moves with them in rounds; the '
        'last round prunes.',
        'Zhang et al. 2018, arXiv:1804.03294',
        rounds=20,
        options={'strength': 1e-4, 'strength_end': 0.1},
    ),
    'unify': _pulling(
        unify,
        'unification',
        'ADMM to blocks in which all weights have one size; the last round but one prunes, and '
        'then each block trains as one number.',
        'arXiv:2106.08301',
        scheduled=False,
        rounds=20,
        options={'unified': 1.0, 'strength': 1e-4, 'strength_end': 0.1},
        example='granularity = "4x4", start = 0, end = 6',
    ),
    'orthogonal': _pulling(
        orthogonal,
        'orthogonal',
        'The largest weights; a penalty keeps kernels orthogonal, after pruning or before it.',
        'Xie, Xiong & Pu 2017, arXiv:1703.01827; Wang & Fu 2023, arXiv:2207.12534',
        scheduled=False,
        options={'penalty': 1e-3, 'when': 'after'},
    ),
}


def method(name: str) -> Method:
    """The registry entry of a method.

    Raises:
      PruneError: there is no method of that name.
    """
    return lookup('method', name, METHODS)
