"""How the runs of a program are laid out in time and space.

All ways compute the same; they round differently, which training amplifies.
"""

from typing import Any, NamedTuple

from jaxprune import nn
from jaxprune.errors import SpecError

BATCHINGS = ('vmap', 'map', 'unroll')
STEPPINGS = ('scan', 'host')
#: Runs per device that a trial computes at once: enough to see what batching them brings. On the
#: CPU 'vmap' takes no more in a sweep either: 110 runs of LeNet-300-100, which leave the cache,
#: took twice the time of the trial.
TRIAL_RUNS = 4
#: Most runs of a chunk, per device: 'map' by memory and patience, 'vmap' the more the better
#: where no cache is left, 'unroll' gains nothing from more than a few.
_MOST_RUNS = {'map': 16, 'vmap': 512, 'unroll': 2}


def most_runs(batching: str, platform: str) -> int:
    """The most runs that a device is given in a chunk."""
    return TRIAL_RUNS if (batching, platform) == ('vmap', 'cpu') else _MOST_RUNS[batching]


class Strategy(NamedTuple):
    """A way to train many runs.

    Attributes:
      batching: 'vmap' computes the runs of a device as one batch; 'map' loops over them inside
        the compiled program; 'unroll' loops over them outside, a run per device at a time.
      stepping: 'scan' takes many steps per call of the compiled program, 'host' one.
      convolution: how to convolve, see `nn.conv`; events always convolve natively.
      devices: how many devices are used.
      batch_devices: how many of them share the batch of each run; the runs are split over the
        others.
    """

    batching: str
    stepping: str
    convolution: str
    devices: int
    batch_devices: int = 1

    def __str__(self) -> str:
        devices = f'{self.devices} device' + ('s' if self.devices > 1 else '')
        shared = f', {self.batch_devices} per run' if self.batch_devices > 1 else ''
        return f'{self.batching}, {self.stepping}, {self.convolution}, {devices}{shared}'


def usual(convolving: bool, platform: str, devices: int) -> Strategy:
    """What is fastest most of the time, as far as it was measured (`experiments/bench`).

    On the CPU a loop inside the program keeps the weights of one run in the cache, but XLA's
    convolution inside loops is 27 to 40 times slower (jax issue 12868).
    """
    if platform != 'cpu':
        return Strategy('vmap', 'scan', 'native', devices)
    if convolving:
        return Strategy('unroll', 'host', 'native', devices)
    return Strategy('map', 'scan', 'native', devices)


def candidates(convolving: bool, platform: str, devices: int) -> list[Strategy]:
    """The ways worth timing, the usual one first and the least likely last."""
    first = usual(convolving, platform, devices)
    found = []
    if not convolving or platform != 'cpu':
        found += [Strategy(b, 'scan', 'native', devices) for b in ('map', 'unroll', 'vmap')]
    if convolving:
        matrices = [name for name in nn.CONVOLUTIONS if name != 'native']
        found += [Strategy(b, 'scan', c, devices) for c in matrices for b in ('map', 'vmap')]
        found.append(Strategy('unroll', 'host', 'native', devices))
    if platform == 'cpu' and devices > 1:
        found.append(first._replace(devices=1))  # all cores for one run at a time
    return list(dict.fromkeys([first, *found]))


def forced(strategy: Strategy, engine: Any, devices: int) -> Strategy:
    """A strategy with what a specification's [engine] asks for in place.

    Args:
      engine: an `EngineSpec`.
      devices: how many there are.

    Raises:
      SpecError: a run is to be split over more devices than there are.
    """
    asked = {
        name: getattr(engine, name)
        for name in ('batching', 'stepping', 'convolution')
        if getattr(engine, name) != 'auto'
    }
    wanted = strategy.devices if engine.batch_devices <= strategy.devices else devices
    used = min(engine.devices or wanted, devices)
    if engine.batch_devices > used:
        raise SpecError(
            f'engine.batch_devices: a run on {engine.batch_devices} devices, where {used} are used'
        )
    used -= used % engine.batch_devices
    return strategy._replace(**asked, devices=used, batch_devices=engine.batch_devices)
