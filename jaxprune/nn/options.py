"""The options of models: what they mean and the values they take."""

from jaxprune.arguments import Option
from jaxprune.nn.blocks import ACTIVATIONS
from jaxprune.nn.initial import INITIALISATIONS
from jaxprune.nn.lenet import POOLS
from jaxprune.nn.resnet import SHORTCUTS
from jaxprune.nn.vgg import ORDERS

DTYPES = ('float32', 'bfloat16')

OPTIONS: dict[str, Option] = {
    'widths': Option('units of each hidden layer, or maps of each convolution, from the input on'),
    'activation': Option('after each hidden layer', choices=ACTIVATIONS),
    'pool': Option('how maps are halved', choices=POOLS),
    'width': Option('factor on the number of maps', above=0, high=1000),
    'order': Option('of a convolution, its batch norm and ReLU', choices=ORDERS),
    'shortcut': Option('where a block changes the shape', choices=SHORTCUTS),
    'patch': Option('side of the square patches that become tokens', low=1),
    'dim': Option('numbers of a token', low=1),
    'depth': Option('blocks', low=1, high=100),
    'heads': Option('attention heads; they divide dim', low=1),
    'dtype': Option('of the computation; parameters stay float32', choices=DTYPES),
    'init': Option('how kernels are drawn', choices=INITIALISATIONS),
}
