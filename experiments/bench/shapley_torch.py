"""Shapley values of the units of a layer in plain PyTorch, for `shapley.py`.

The loop of Ancona et al. (2020, arXiv:2006.01795): remove units one by one, and credit each
increase of the loss to the unit just removed. Networks have jaxprune's own arrays. OpenMP's threads
wait passively: two that spin beside other work are many times slower than one.
"""

import os

import numpy as np
from torch_loop import PASSIVE

os.environ.update(PASSIVE)  # read once, when torch is imported

import torch
from shapley_ways import Case, one_by_one
from torch.nn import functional as F
from torch_nets import Parameters, dense, laid_out

from jaxprune import tree

#: Masks that `batched` puts side by side.
AT_ONCE = 16


def layers(p: Parameters, name: str) -> list:
    """The functions that follow one another, each up to the activation where its units may go."""

    def flat(x):
        return x.permute(0, 2, 3, 1).flatten(1) if x.ndim == 4 else x

    def linear(layer, before=lambda x: x):
        return lambda x: F.relu(dense(p, layer, flat(before(x))))

    def last(layer, before=lambda x: x):
        return lambda x: dense(p, layer, flat(before(x)))

    def conv(layer, before=lambda x: x):
        kernel, bias = p[f'{layer}/kernel'], p[f'{layer}/bias']
        return lambda x: F.relu(F.conv2d(before(x), kernel, bias))

    def conv_bn(number, before=lambda x: x):
        kernel, norm = p[f'conv_{number}/kernel'], f'bn_{number}'
        still = [p[f'{norm}/{part}'] for part in ('mean', 'var', 'scale', 'bias')]

        def run(x):
            x = F.conv2d(before(x), kernel, padding=kernel.shape[-1] // 2)
            return F.relu(F.batch_norm(x, *still, eps=1e-5))

        return run

    def largest(x):
        return F.max_pool2d(x, 2)

    def average(x):
        return F.avg_pool2d(x, 2)

    if name == 'LeNet-300-100':
        return [linear('dense_0'), linear('dense_1'), last('dense_2')]
    if name.startswith('LeNet-5'):
        return [conv('conv_0'), conv('conv_1', average), linear('dense_0', average),
                linear('dense_1'), last('dense_2')]  # fmt: skip
    if name == 'small VGG':
        pools = [conv_bn(i, largest if i and i % 2 == 0 else lambda x: x) for i in range(6)]
        return [*pools, last('dense_0', largest)]
    raise KeyError(name)


def ways(case: Case, threads: tuple[int, ...]) -> dict:
    """Name -> a function that returns the values `(n, examples)` along the case's orders."""
    named = [*tree.paths(case.view.params), *tree.paths(case.view.model_state)]
    p = {
        path.removeprefix('batch_stats/'): torch.tensor(laid_out(path, np.asarray(leaf)).copy())
        for path, leaf in named
    }
    rest = layers(p, case.name)
    at = list(case.gated.sizes).index(case.layer) + 1
    images = torch.tensor(np.asarray(case.batch.x)).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(np.asarray(case.batch.y)).long()

    def run(x, functions):
        for function in functions:
            x = function(x)
        return x

    def loss(z, masks):
        """Losses `(masks, examples)` of masks `(masks, n)`."""
        keep = torch.tensor(masks, dtype=z.dtype).reshape(len(masks), 1, -1, *[1] * (z.ndim - 2))
        logits = run((z * keep).flatten(0, 1), rest[at:])
        return F.cross_entropy(logits, labels.repeat(len(masks)), reduction='none').reshape(
            len(masks), -1
        )

    def network(mask):
        return loss(run(images, rest[:at]), mask[None])[0]

    def tail():
        z = run(images, rest[:at])
        return one_by_one(lambda mask: loss(z, mask[None])[0], case.orders)()

    def batched():
        z, total = run(images, rest[:at]), 0
        for order in case.orders:
            masks = np.argsort(order) >= np.arange(case.n + 1)[:, None]
            parts = [loss(z, masks[i : i + AT_ONCE]) for i in range(0, case.n + 1, AT_ONCE)]
            credits = np.empty((case.n, len(labels)), np.float32)
            credits[order] = np.diff(torch.cat(parts).numpy(), axis=0)
            total = total + credits
        return total / len(case.orders)

    def within(count, values):
        def run():
            torch.set_num_threads(count)
            with torch.inference_mode():
                return values()

        return run

    made = {'network': one_by_one(network, case.orders), 'tail': tail, f'tail, {AT_ONCE}': batched}
    return {
        f'PyTorch loop, {what}, {count}': within(count, values)
        for what, values in made.items()
        for count in threads
    }
