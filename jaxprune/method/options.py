"""The options of methods: what they mean and the values they take.

Whole numbers that a program is unrolled over have a bound: above it, compiling would never end.
"""

from jaxprune.arguments import Option
from jaxprune.method.feedback import STRAIGHT
from jaxprune.method.hesso import VARIANTS
from jaxprune.method.lasting import CUTS
from jaxprune.method.movement import SCORE_OPTIMIZERS
from jaxprune.method.orthogonal import WHEN
from jaxprune.score.coupled import AGGREGATIONS, COUPLED_MEASURES, MEMBERS
from jaxprune.score.fisher import LABELS
from jaxprune.score.gate_taylor import PER, SHARED, SIGNS
from jaxprune.score.group_importance import NORMALISATIONS
from jaxprune.score.importance import BIASES, MODES
from jaxprune.score.shapley import AGGREGATIONS as AGGREGATES
from jaxprune.structure import PLACES

#: Most times that a score repeats its work inside one program.
_UNROLLED = 100

OPTIONS: dict[str, Option] = {
    'temperature': Option('the logits are divided by it before the loss', above=0),
    'power': Option('1 for |w g|, 2 for its square', low=1, high=2),
    'labels': Option("'data' for those given, 'model' for the network's own", choices=LABELS),
    'samples': Option('random inputs per repeat', low=1, high=100_000),
    'repeats': Option('draws of weights, noise and inputs', low=1, high=_UNROLLED),
    'epsilon': Option('size of the perturbation of the weights', above=0),
    'steps': Option('training steps that the score looks ahead', low=0, high=_UNROLLED),
    'learning_rate': Option('of the steps that the score looks ahead'),
    'first_order': Option('ignore how the gradients of these steps depend on the mask'),
    'order': Option('of the derivative: of ‖θ‖², 2 is θ Hg; along a gate 1 or 2', low=0, high=2),
    'mode': Option('how products of a group are added up', choices=MODES),
    'sign': Option('what a change of the loss counts as', choices=SIGNS),
    'per': Option("whose loss changes: a batch's mean, or each example's", choices=PER),
    'place': Option('where gates sit, or activations are taken', choices=PLACES),
    'shared': Option('what a gate of several layers has', choices=SHARED),
    'permutations': Option('orders in which the units of a layer are removed', low=1, high=100_000),
    'estimator': Option(
        'how orders are drawn', choices=('permutation', 'antithetic', 'stratified')
    ),
    'aggregate': Option('of the values of examples', choices=AGGREGATES),
    'at_once': Option('units or orders that are computed together', low=1),
    'momentum': Option('share of the average of earlier rounds', low=0, high=1),
    'measure': Option('what a weight counts for', choices=COUPLED_MEASURES),
    'parameters': Option("'kernels', or a regular expression of paths that count"),
    'members': Option("'out', or 'all' with the slices that read", choices=MEMBERS),
    'reduce': Option("how a group's slices become one number", choices=AGGREGATIONS),
    'root': Option('take the square root of that'),
    'normalise': Option('over the groups of a layer', choices=NORMALISATIONS),
    'bias': Option('what multiplies every product', choices=BIASES),
    'side': Option('of the images that operator norms are taken on', low=1, high=1024),
    'scaled': Option('times the scale of the batch norm on the way'),
    'failure': Option('probability with which an error bound may be broken', above=0, high=1),
    'weight': Option('of the decorrelation against the pull to zero', above=0),
    'interval': Option('training steps after which the penalty grows', low=1),
    'increment': Option('by how much the penalty grows', above=0),
    'penalty': Option('factor of the penalty', above=0),
    'enough': Option('how many times as large kept weights are when it stops growing', above=0),
    'pick_increment': Option('by how much the penalty on all grows', above=0),
    'pick_ceiling': Option('how far the penalty on all grows', above=0),
    'recover': Option('penalty on what is kept, once it is chosen; below 0 it grows'),
    'amount': Option('what the lowest rank loses in a round', above=0),
    'bend': Option('share of amount that is lost at the centre of the curve', above=0, high=1),
    'strength': Option('how strongly weights are drawn to the pruned network at first', above=0),
    'strength_end': Option('the same in the last round that moves it', above=0),
    'unified': Option('share of the kept blocks whose weights get one size', low=0, high=1),
    'explore': Option('density of the weights that learn and do not compute', low=0, high=1),
    'when': Option("the penalty acts 'after' pruning, or 'before' it", WHEN),
    'half_space': Option(
        'a group x that becomes y is projected to zero if y.x is below this share of x.x; of '
        'convolutions and heads',
        low=0,
        high=1,
    ),
    'half_space_dense': Option('the same of dense layers', low=0, high=1),
    'second_at': Option(
        'where projections begin, as a share of the way from the first round to the last',
        low=0,
        high=1,
    ),
    'cut': Option(
        "what the last round removes: as many as the 'target' asks for, or what is 'zero'",
        choices=CUTS,
    ),
    'tolerance': Option('share of all groups penalised beyond the target', low=0, high=1),
    'amplify': Option('how much more than needed a growing group is penalised', above=0),
    'most_times': Option('the largest penalty, in units of penalty', low=1),
    'exact': Option('never project more groups than the target asks for'),
    'variant': Option("ramp and choice as in the 'paper', or as in the authors' 'code'", VARIANTS),
    'strongest': Option('how many times as fast the weakest group decays', low=1),
    'scales': Option('a regular expression of the paths of scales of norms'),
    'by': Option("'magnitude', or 'random' for a new draw in each round", STRAIGHT),
    'pull': Option('how strongly pruned weights are pulled to zero', low=0),
    'drop': Option('share of the kept weights that go in a round, at step 0', low=0, high=1),
    'score_rate': Option('learning rate of the scores', above=0),
    'score_optimizer': Option('how scores are trained', SCORE_OPTIMIZERS),
    'initial': Option('s of every layer at first; its sigmoid is the threshold'),
    'threshold': Option('on the sigmoid of the scores, in the end', low=0, high=1),
    'skip': Option('the optimizer takes no step where weights are dropped and grown'),
    'ceiling': Option('how far the penalty grows', above=0),
}
