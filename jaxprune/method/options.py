"""The options of methods: what they mean and the values they take.

Whole numbers that a program is unrolled over have a bound: above it, compiling would never end.
"""

from jaxprune.arguments import Option
from jaxprune.score.fisher import LABELS
from jaxprune.score.importance import BIASES, MODES

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
    'order': Option('of the derivative of ‖θ‖²: 0, 1 (θ g) or 2 (θ Hg)', low=0, high=2),
    'mode': Option('how products of a group are added up', choices=MODES),
    'bias': Option('what multiplies every product', choices=BIASES),
    'failure': Option('probability with which an error bound may be broken', above=0, high=1),
    'weight': Option('of the decorrelation against the pull to zero', above=0),
    'interval': Option('training steps after which the penalty grows', low=1),
    'increment': Option('by how much the penalty grows', above=0),
    'ceiling': Option('how far the penalty grows', above=0),
}
