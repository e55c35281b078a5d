"""PyTorch training of several runs: a plain loop over them, or all of them in one step.

In this process or in one of its own. As a process it reads a `Job` from its input, then lists of
batches, and answers each with seconds and losses: so arrangements of threads and processes can be
timed against each other. OpenMP's threads wait passively: two that spin beside any other load were
70 times slower than one.
"""

import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).parent
PASSIVE = {'OMP_WAIT_POLICY': 'PASSIVE', 'GOMP_SPINCOUNT': '0', 'KMP_BLOCKTIME': '0'}


class Job(NamedTuple):
    """What is trained.

    Attributes:
      net: name of the model, see `torch_nets.net`.
      images: `(n, channels, height, width)`, normalised, float32.
      labels: `(n,)`.
      states: parameters and masks of each run, path -> array in flax's layout.
      masked: multiply the weights by their masks after each step.
      learning_rate, momentum: of SGD.
      threads: that one matrix product may use.
      device: 'cpu' or 'cuda'.
      graphs: replay a CUDA graph of the step.
      stacked: one step for all runs, `torch.func.vmap` over their stacked weights.
    """

    net: str
    images: np.ndarray
    labels: np.ndarray
    states: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]
    masked: bool
    learning_rate: float
    momentum: float
    threads: int
    device: str = 'cpu'
    graphs: bool = False
    stacked: bool = False


class Way(NamedTuple):
    """An arrangement: so many processes, each with so many threads."""

    processes: int
    threads: int

    def __str__(self) -> str:
        processes = f'{self.processes} process{"es" if self.processes > 1 else ""}'
        return f'{processes}, {self.threads} thread{"s" if self.threads > 1 else ""}'


def ways(cores: int, runs: int) -> list[Way]:
    """One process with 1, 2, 4, ... all threads; and a process for each core."""
    threads = sorted({*(2**i for i in range(cores.bit_length()) if 2**i <= cores), cores})
    many = [Way(min(cores, runs), 1)] if min(cores, runs) > 1 else []
    return [*(Way(1, n) for n in threads), *many]


def trainer(job: Job) -> Callable[[Sequence[np.ndarray]], list[float]]:
    """`batches of each run (steps, batch) -> mean losses`, one run after another or all at once."""
    import torch

    torch.set_num_threads(job.threads)
    if job.device == 'cuda':
        # What JAX takes for float32 there: products on tensor cores, convolutions by trial.
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    images = torch.tensor(job.images, device=job.device)
    labels = torch.tensor(job.labels, device=job.device).long()
    return (_stacked if job.stacked else _one_by_one)(job, images, labels)


def _one_by_one(
    job: Job, images: Any, labels: Any
) -> Callable[[Sequence[np.ndarray]], list[float]]:
    import torch
    import torch_nets
    from torch.nn import functional

    net = torch_nets.net(job.net)

    def loaded(parameters: dict[str, np.ndarray], masks: dict[str, np.ndarray]):
        weights = {path: leaf.requires_grad_() for path, leaf in _tensors(job, parameters).items()}
        kept = _tensors(job, masks)
        optimizer = torch.optim.SGD(weights.values(), lr=job.learning_rate, momentum=job.momentum)

        def step(indices):
            optimizer.zero_grad(set_to_none=not job.graphs)
            loss = functional.cross_entropy(net(weights, images[indices]), labels[indices])
            loss.backward()
            optimizer.step()
            if job.masked:
                with torch.no_grad():
                    for path, mask in kept.items():
                        weights[path] *= mask
            return loss.detach()

        def momenta():
            return [optimizer.state[weight]['momentum_buffer'] for weight in weights.values()]

        return _as_graph(step, list(weights.values()), momenta) if job.graphs else step

    steps = [loaded(*state) for state in job.states]

    def epoch(batches: Sequence[np.ndarray]) -> list[float]:
        means = []
        for step, order in zip(steps, batches, strict=True):
            rows = torch.tensor(order, device=job.device).long()
            means.append(torch.stack([step(indices) for indices in rows]).mean())
        return [float(mean) for mean in means]

    return epoch


def _stacked(job: Job, images: Any, labels: Any) -> Callable[[Sequence[np.ndarray]], list[float]]:
    """All runs in one step: their weights stacked, the gradient vmapped, SGD by fused updates."""
    import torch
    import torch_nets
    from torch.nn import functional

    net = torch_nets.net(job.net)

    def joined(trees: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
        each = [_tensors(job, tree) for tree in trees]
        return {path: torch.stack([tree[path] for tree in each]) for path in each[0]}

    weights, kept = (joined(trees) for trees in zip(*job.states, strict=True))
    momenta = {path: torch.zeros_like(leaf) for path, leaf in weights.items()}

    def loss_of(weights, images, labels):
        return functional.cross_entropy(net(weights, images), labels)

    gradients = torch.func.vmap(torch.func.grad_and_value(loss_of))

    @torch.no_grad()
    def step(indices):
        slopes, losses = gradients(weights, images[indices], labels[indices])
        own, pace = list(weights.values()), list(momenta.values())
        torch._foreach_mul_(pace, job.momentum)
        torch._foreach_add_(pace, [slopes[path] for path in weights])
        torch._foreach_add_(own, pace, alpha=-job.learning_rate)
        if job.masked:
            torch._foreach_mul_([weights[path] for path in kept], list(kept.values()))
        return losses

    if job.graphs:
        step = _as_graph(step, list(weights.values()), lambda: list(momenta.values()))

    def epoch(batches: Sequence[np.ndarray]) -> list[float]:
        rows = torch.tensor(np.stack(batches, axis=1), device=job.device).long()
        return torch.stack([step(indices) for indices in rows]).mean(0).tolist()

    return epoch


def _tensors(job: Job, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Arrays of flax in PyTorch's layout, on the job's device."""
    import torch
    import torch_nets

    return {
        path: torch.tensor(torch_nets.laid_out(path, leaf), device=job.device).contiguous()
        for path, leaf in arrays.items()
    }


def _as_graph(
    step: Callable[[Any], Any], weights: list[Any], momenta: Callable[[], list[Any]]
) -> Callable[[Any], Any]:
    """The step as a CUDA graph, as PyTorch's notes have it.

    Warm up on another stream, put all back as it was, capture once; then copy the indices in and
    replay.
    """
    import torch

    held: dict[str, Any] = {}

    def replay(indices):
        if not held:  # captured at the first call
            held['static'] = indices.clone()
            before = [weight.detach().clone() for weight in weights]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    step(held['static'])
            torch.cuda.current_stream().wait_stream(side)
            held['graph'] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(held['graph']):
                held['loss'] = step(held['static'])
            with torch.no_grad():
                for weight, old, momentum in zip(weights, before, momenta(), strict=True):
                    weight.copy_(old)
                    momentum.zero_()
        held['static'].copy_(indices)
        held['graph'].replay()
        return held['loss'].clone()

    return replay


class Pool(NamedTuple):
    """Processes that train.

    Attributes:
      epoch: `batches of each run -> mean losses`.
      close: ends the processes.
    """

    epoch: Callable[[Sequence[np.ndarray]], list[float]]
    close: Callable[[], None]


def pool(job: Job, way: Way) -> Pool:
    """The runs of a job, shared out among processes of their own.

    Raises:
      RuntimeError: a process fails; with the last line of what it said.
    """
    environment = {**os.environ, **PASSIVE, 'OMP_NUM_THREADS': str(way.threads)}
    workers = [
        subprocess.Popen(
            [sys.executable, HERE / 'torch_loop.py'],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        for _ in range(way.processes)
    ]

    def close() -> None:
        for worker in workers:
            worker.kill()
            worker.communicate()

    def ask(messages: Sequence[Any]) -> list[Any]:
        try:
            for worker, message in zip(workers, messages, strict=True):
                pickle.dump(message, worker.stdin)
                worker.stdin.flush()
            return [pickle.load(worker.stdout) for worker in workers]
        except (EOFError, BrokenPipeError):
            said = b'\n'.join(worker.communicate()[1] for worker in workers if worker.poll())
            lines = said.decode(errors='replace').strip().splitlines() or ['it ended']
            raise RuntimeError(f'PyTorch: {lines[-1]}') from None

    shares = [range(i, len(job.states), way.processes) for i in range(way.processes)]
    ask([job._replace(states=[job.states[i] for i in s], threads=way.threads) for s in shares])

    def epoch(batches: Sequence[np.ndarray]) -> list[float]:
        answers = ask([[batches[i] for i in share] for share in shares])
        places, losses = (itertools.chain.from_iterable(parts) for parts in (shares, answers))
        found = dict(zip(places, losses, strict=True))
        return [found[i] for i in range(len(batches))]

    return Pool(epoch, close)


def main() -> None:
    """A worker: a job, then batches until the input ends."""
    epoch = trainer(pickle.load(sys.stdin.buffer))
    answer: Any = []
    while True:
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        try:
            answer = epoch(pickle.load(sys.stdin.buffer))
        except EOFError:
            return


if __name__ == '__main__':
    main()
