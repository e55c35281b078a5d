"""What a sweep is: frozen dataclasses, read from TOML, checked before anything is written.

Each section of the file is one class below; each key is one field. Sections marked open take
further keys, the options of the model, method or optimizer they name.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxprune.allocation import ALLOCATIONS
from jaxprune.arguments import Option
from jaxprune.flow.orthogonal import GAINS
from jaxprune.method import REPAIRS, SCORED_ON
from jaxprune.nn import CONVOLUTIONS
from jaxprune.optim import RATE_SCHEDULES
from jaxprune.plan import MOST_ROUNDS
from jaxprune.schedule import SCHEDULES
from jaxprune.structure import TARGETS
from jaxprune.sweep.strategy import BATCHINGS, STEPPINGS

#: What a run may take back after a round: all but its masks, or the learning rate alone.
REWINDS = ('weights', 'rate')

#: Bumped when the meaning of a stored result changes.
FORMAT = 6


def _key(doc: str, *, default=dataclasses.MISSING, example: str = '', later=False, **limits):
    """A field with its explanation, the values it takes (see `Option`) and an example.

    Args:
      default: what it is without; a table is made anew for each specification.
      example: TOML lines of the section with this key and what it needs beside it; of a method the
        inside of its table. Without it the default is the example.
      later: sweeps were identified before this key was: it is not written out while it has its
        default.
    """
    made = {'default_factory': dict} if default == {} else {'default': default}
    metadata = {'option': Option(doc, **limits), 'example': example, 'later': later}
    return field(**made, metadata=metadata)


#: Keys of a method that say when its rounds happen.
WHEN = (
    'start',
    'every',
    'end',
    'time_unit',
    'rounds',
    'density_schedule',
    'rewind',
    'rewind_to',
    'restart',
)


@dataclass(frozen=True)
class ModelSpec:
    """[model]: open for the model's own options (`widths` of an mlp)."""

    name: str = _key('the name of a model', example='name = "lenet300100"')
    layer_widths: Mapping[str, int] = _key(
        'how many units single layers have (attention: how many heads), where it is not the usual '
        'number; `jp.compact_spec` writes those of a compact network',
        default={},
        example='name = "lenet300100"\nlayer_widths = { dense_0 = 40, dense_1 = 12 }',
        later=True,
        low=1,
    )
    params: str = _key(
        'a file of `jp.save_compact` from whose parameters and batch statistics all runs start; '
        'beside the specification if its path is relative',
        default='',
        example='params = "small.safetensors"',
        later=True,
    )
    params_sha256: str = _key(
        'of the file in params, which identifies the runs; filled in',
        default='',
        example=f'params = "small.safetensors"\nparams_sha256 = "{"0" * 64}"',
        later=True,
    )
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSpec:
    """[data]"""

    name: str = _key(
        "which: 'mnist_small' (shipped), 'mnist', 'fashion_mnist', 'cifar10', 'cifar100'",
        example='name = "mnist_small"',
    )
    augment: tuple[str, ...] = _key(
        "augmentations in order: 'crop', 'flip'", default=(), example='augment = ["crop", "flip"]'
    )
    train_examples: int = _key('use only the first so many; 0 for all', default=0, low=0)
    test_examples: int = _key('use only the first so many; 0 for all', default=0, low=0)


@dataclass(frozen=True)
class TrainSpec:
    """[train]: open for the optimizer's own arguments (`momentum`, `nesterov`, `b1`)."""

    optimizer: str = _key('an optax optimizer by name', default='sgd')
    learning_rate: float = _key('peak learning rate', default=0.1, above=0)
    schedule: str = _key(
        "how the rate falls: 'constant', 'cosine' or 'step'",
        default='cosine',
        choices=tuple(RATE_SCHEDULES),
    )
    milestones: tuple[float, ...] = _key(
        'epochs at which step multiplies the rate',
        default=(),
        example='schedule = "step"\nmilestones = [4, 6]',
    )
    factor: float = _key('by what step multiplies the rate', default=0.1, above=0)
    warmup_epochs: float = _key('epochs of linear increase from zero', default=0.0, low=0)
    epochs: int = _key('passes over the training set', default=10, low=1)
    batch_size: int = _key('examples per step', default=128, low=1)
    weight_decay: float = _key(
        'L2 added to the gradient; for optimizers that decay themselves (adamw) their own',
        default=0.0,
        low=0,
    )
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PruneSpec:
    """[prune]: the examples that scores use, drawn class-balanced from the training set."""

    samples_per_class: int = _key(
        'examples of each class in a batch, also for record.flow', default=10, low=1
    )
    batches: int = _key('batches per scoring round', default=1, low=1, high=1000)


@dataclass(frozen=True)
class FinetuneSpec:
    """The table `finetune` of a method: a phase after pruning with its own learning rate."""

    epochs: int = _key(
        'length of the phase; 0 for no such phase',
        default=0,
        low=0,
        example='epochs = 4, learning_rate = 0.01',
    )
    learning_rate: float = _key(
        'peak learning rate', default=0.0, low=0, example='epochs = 4, learning_rate = 0.01'
    )
    schedule: str = _key(
        "how the rate falls: 'constant', 'cosine' or 'step'",
        default='cosine',
        choices=tuple(RATE_SCHEDULES),
    )
    milestones: tuple[float, ...] = _key(
        'epochs of the phase at which step multiplies the rate',
        default=(),
        example='epochs = 4, learning_rate = 0.01, schedule = "step", milestones = [2, 3]',
    )
    factor: float = _key('by what step multiplies the rate', default=0.1, above=0)
    warmup_epochs: float = _key('epochs of linear increase from zero', default=0.0, low=0)
    each_round: bool = _key(
        'begin the phase after every round, and the next round at its end; otherwise after the '
        'last round only',
        default=False,
    )


@dataclass(frozen=True)
class MethodSpec:
    """An entry of grid.method: a name, or a table; open for the method's options.

    What is pruned: allocation, target, granularity, keep_all_units, floor, floor_share, cap,
    multiple.
    When: start, every, end, time_unit, rounds, density_schedule, rewind, restart, finetune.
    How: name, batch_norm, score_on, repair and the method's own options.
    """

    name: str = _key('the name of a method', example='name = "snip"')
    allocation: str = _key(
        f"how the weights kept are shared among layers: {', '.join(ALLOCATIONS)}; '' for the "
        'published one, mostly global',
        default='',
        choices=('', *ALLOCATIONS),
        example='name = "magnitude", allocation = "erk"',
    )
    target: str = _key(
        "what a compression of the grid means: 'direct' (weights, or units, before and after), "
        "'effective' (only weights on a path from input to output count), 'params' or 'flops' "
        '(those of the compact network, with granularity unit, head, head_dim or group)',
        default='direct',
        choices=TARGETS,
    )
    granularity: str = _key(
        "what competes: 'weight'; 'kernel' (all taps of a convolution from one input to one "
        "output); 'unit' (neurons and filters), 'head', 'head_dim' or 'group' "
        "(units and heads), each with all that goes along; '2:4' and the like: of every 4 weights "
        "in a row along a kernel's input axis 2 at most stay; '8x128' and the like: blocks of 8 "
        'input by 128 output channels. Compression, floor, cap and rounds count these',
        default='weight',
        example='granularity = "unit"',
    )
    keep_all_units: str = _key(
        'regular expression of layers that keep all units, besides those that have to',
        default='',
        example='granularity = "unit", keep_all_units = "dense_0"',
    )
    floor_share: float = _key(
        'share of its own weights (or units, ...) that any layer keeps more than',
        default=0.0,
        low=0,
        example='granularity = "unit", floor_share = 0.05',
    )
    floor: int = _key('fewest weights (or units, ...) that any layer keeps', default=0, low=0)
    cap: float = _key('largest density of any layer', default=1.0, above=0, high=1)
    multiple: int = _key(
        'every layer keeps a multiple of so many units, rounded up, as matrix hardware needs it: 8 '
        'or 128',
        default=1,
        low=1,
        example='granularity = "unit", multiple = 8',
    )
    label: str = _key(
        'how figures and tables call it', default='', example='label = "by magnitude"'
    )
    rounds: int = _key(
        'pruning rounds; 0 for the published number, or as many as every and end give',
        default=0,
        low=0,
        high=MOST_ROUNDS,
        example='name = "synflow", rounds = 10',
    )
    density_schedule: str = _key(
        f"density over the rounds: {', '.join(SCHEDULES)}; '' for the published one",
        default='',
        choices=('', *SCHEDULES),
        example='name = "synflow", density_schedule = "linear"',
    )
    start: float = _key(
        'when the first round happens; 0 is before training',
        default=0.0,
        low=0,
        example='start = 2',
    )
    every: float = _key(
        'time between two rounds; 0 for all rounds at once, or spread evenly up to end',
        default=0.0,
        low=0,
        example='name = "synflow", start = 1, every = 0.5, rounds = 4',
    )
    end: float = _key(
        'the latest time of a round; without every, rounds are spread evenly from start to end',
        default=0.0,
        low=0,
        example='name = "synflow", start = 1, end = 4, rounds = 4',
    )
    time_unit: str = _key(
        "what start, every, end and rewind_to count: 'epochs' (fractions too) or 'steps'",
        default='epochs',
        choices=('epochs', 'steps'),
        example='start = 500, time_unit = "steps"',
    )
    rewind: str = _key(
        "after each round: 'weights' takes weights, batch statistics and learning rate back to "
        "rewind_to and begins the optimizer anew, 'rate' takes only the learning rate back",
        default='',
        choices=('', *REWINDS),
        example='start = 4, every = 2, rounds = 3, rewind = "weights"',
    )
    rewind_to: float = _key(
        'to what time of training rewind goes back',
        default=0.0,
        low=0,
        example='start = 4, rewind = "weights", rewind_to = 0.5',
    )
    restart: bool = _key(
        'begin with a fresh optimizer after each round: moments of the weights kept are zero too',
        default=False,
        example='start = 2, restart = true',
    )
    finetune: FinetuneSpec = _key(
        'a phase after the last round with its own epochs, learning_rate, schedule',
        default=FinetuneSpec(),
        example='start = 4, finetune = { epochs = 4, learning_rate = 0.01 }',
    )
    repair: str = _key(
        "what the last round does to kept weights: 'orthp' makes kernels orthogonal, for units",
        default='',
        choices=('', *REPAIRS),
        example='granularity = "unit", repair = "orthp"',
    )
    repair_gain: str = _key(
        "the activation whose gain repaired kernels have: 'linear', 'relu', ...",
        default='linear',
        choices=tuple(GAINS),
        example='granularity = "unit", repair = "orthp", repair_gain = "relu"',
    )
    score_on: str = _key(
        "what scores that need data use: 'balanced' examples (see [prune]) or 'train_batch', that "
        'of the next training step',
        default='balanced',
        choices=SCORED_ON,
        example='name = "snip", start = 500, time_unit = "steps", score_on = "train_batch"',
    )
    batch_norm: str = _key(
        "while scoring: 'train' (batch statistics), 'eval' (running); '' for the published mode",
        default='',
        choices=('', 'train', 'eval'),
        example='name = "snip", batch_norm = "eval"',
    )
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GridSpec:
    """[grid]: every method x compression x seed x combination of [grid.train].

    A table `every_method` holds keys that all entries of `method` have unless they say otherwise.
    """

    method: tuple[MethodSpec, ...] = _key(
        'pruning methods', example='method = ["magnitude", "snip"]'
    )
    compression: tuple[float, ...] = _key(
        '1 / density; 1 is the dense control',
        default=(),
        low=1,
        example='compression = [1, 10, 100]',
    )
    density: tuple[float, ...] = _key(
        'in place of compression; 1 is the dense control',
        default=(),
        above=0,
        high=1,
        example='density = [1, 0.1, 0.01]',
    )
    seed: tuple[int, ...] = _key(
        'one run each; the seed fixes initialisation and data', low=0, example='seed = [0, 1, 2]'
    )
    train: Mapping[str, tuple] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordSpec:
    """[record]"""

    every_epochs: int = _key('evaluate after so many epochs, and at the end', default=1, low=1)
    every: int = _key(
        'along training, after every so many steps of an epoch and at its end, record the mean '
        'training loss since, and what evaluate and flow ask for, these at step 0 too; 0 for never',
        default=0,
        low=0,
    )
    evaluate: bool = _key(
        'evaluate at these steps too', default=False, example='every = 20\nevaluate = true'
    )
    rounds: bool = _key(
        'record right after each pruning round, too',
        default=False,
        example='every = 20\nevaluate = true\nrounds = true',
    )
    flow: tuple[str, ...] = _key(
        "quantities recorded at these steps too, such as 'weight_norm'; `jaxprune list quantities`",
        default=(),
        example='every = 20\nflow = ["weight_norm"]',
    )
    churn: bool = _key(
        'keep the predictions on the test set at each evaluation: the results then have churn, the '
        'share of them that differ from those of the dense run of the same seed',
        default=False,
    )
    compact_seeds: tuple[int, ...] = _key(
        'seeds whose pruned networks are cut out at the end, timed against the dense network, '
        'tested, and compared with the network as training left it: the columns latency_ratio, '
        'full_accuracy, compact_accuracy and compact_difference',
        default=(),
        example='compact_seeds = [0]',
    )


@dataclass(frozen=True)
class EngineSpec:
    """[engine]: how the machine is used; results depend on it by rounding only, if at all."""

    chunk: int = _key(
        'runs that are stored together, and trained on one machine; 0 for about a minute of two '
        'CPU cores. A sweep that was begun keeps its chunks',
        default=0,
        low=0,
    )
    checkpoint_minutes: float = _key(
        'save an unfinished chunk after so many minutes; 0 for only when a signal asks to leave',
        default=10.0,
        low=0,
    )
    batching: str = _key(
        "how the runs of a device are looped over: 'vmap' (as one batch), 'map' (inside the "
        "program), 'unroll' (outside of it); 'auto' for what was fastest",
        default='auto',
        choices=('auto', *BATCHINGS),
    )
    stepping: str = _key(
        "'scan' takes many steps per call of the compiled program, 'host' one",
        default='auto',
        choices=('auto', *STEPPINGS),
    )
    convolution: str = _key(
        "how training convolves: 'native', 'patches' (one matrix product), 'taps' (one per tap)",
        default='auto',
        choices=('auto', *CONVOLUTIONS),
    )
    devices: int = _key('most devices to use; 0 for as many as is fastest', default=0, low=0)
    batch_devices: int = _key(
        'devices that share the batch of each run, where one is too small for it',
        default=1,
        low=1,
    )
    probe: str = _key(
        "time the ways to train first: 'auto' (if the sweep is long and this was not done before "
        "on this machine), 'never' (what is remembered is still used)",
        default='auto',
        choices=('auto', 'never'),
    )


@dataclass(frozen=True)
class SweepSpec:
    """A whole sweep.

    Attributes:
      name: names the default output directory.
    """

    name: str = _key('a name for the output directory', example='name = "quickstart"')
    model: ModelSpec = _key('what is trained')
    data: DataSpec = _key('what it is trained on')
    grid: GridSpec = _key('which runs there are')
    train: TrainSpec = field(default_factory=TrainSpec)
    prune: PruneSpec = field(default_factory=PruneSpec)
    record: RecordSpec = field(default_factory=RecordSpec)
    engine: EngineSpec = field(default_factory=EngineSpec)
