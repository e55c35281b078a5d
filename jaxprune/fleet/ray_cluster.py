"""Chunks of a sweep as tasks of a Ray cluster: on a laptop, on VMs, on Kubernetes, on TPU hosts.

A task starts the command of its chunk as a process of its own, so that an exit code means the same
as on every other engine. Three processes take part on a node:

- the worker of Ray runs the task, and waits. It does not import jax.
- the keeper (`_keep`) starts the command and tells the worker how it ended. It is no child of the
  worker: when a driver leaves or dies, Ray kills workers with their children and process groups by
  SIGKILL. The keeper notices that its worker is gone and sends SIGTERM to the command.
- the command saves when it gets SIGTERM, and exits with 75.

Ray starts a task again on another node if its worker or node is lost. The first copy may live on
there, so a chunk can run twice: the directory of the sweep takes the first result.
"""

import contextlib
import inspect
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

from jaxprune.errors import JaxpruneError, first_line, quoted
from jaxprune.fleet.launcher import CPU_DEVICES, Ended, Launcher, Resources, Task

#: Seconds that a command has for saving after SIGTERM, before it is killed.
_GRACE = 120
#: When a silent node counts as dead: after five checks, a second apart, each of which may take two.
_HEALTH = {
    'health_check_initial_delay_ms': 1000,
    'health_check_period_ms': 1000,
    'health_check_timeout_ms': 2000,
    'health_check_failure_threshold': 5,
}
#: When a driver gives up a connection to a silent node. Ray waits for this even if the node counts
#: as dead already. The tasks of a frozen node were retried within 40 s; with Ray's values, 438 s.
_KEEPALIVE = {'grpc_client_keepalive_time_ms': 10_000, 'grpc_client_keepalive_timeout_ms': 10_000}


class ClusterError(JaxpruneError):
    """A cluster that is missing, cannot be reached, or does not have what a chunk needs."""


def node_environment() -> dict[str, str]:
    """What to set before `ray start` on each node, so that a lost node is noticed within a minute.

    `ray_launcher` sets the same variables in its own process, where they are not set yet.
    """
    values = {f'RAY_{name}': str(value) for name, value in (_KEEPALIVE | _HEALTH).items()}
    return {'RAY_USAGE_STATS_ENABLED': '0', **values}


def ray_launcher(resources: Resources, address: str = '', retries: int = 3) -> Launcher:
    """Runs chunks as tasks of a Ray cluster.

    The tasks belong to this process: when it ends, Ray ends them. So `held` is always empty, and a
    new coordinator submits again what is not finished. The settings of `node_environment` only
    take effect if nothing imported ray before.

    Args:
      resources: what each chunk gets. Without `cpus` a chunk counts as one core.
      address: `host:port` of a cluster, or `auto` for the one that this machine is a node of. This
        machine has to be a node of the cluster. Empty: a cluster of this machine alone, which
        `close` ends.
      retries: how many times Ray starts a chunk again whose worker or node was lost.

    Raises:
      ClusterError: if ray is not installed, if no cluster answers, or if this machine alone does
        not have the resources.
    """
    os.environ.update({k: v for k, v in node_environment().items() if k not in os.environ})
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ClusterError("Ray is not installed: pip install 'jaxprune[ray]'") from error
    _connect(ray, address)
    _check_resources(ray, resources, address)
    remote = ray.remote(**_options(resources, retries))(_chunk_task(resources))
    chunks = {}  # of the tasks that have not ended

    def submit(tasks: Sequence[Task]) -> None:
        chunks.update({remote.remote(task.command): task.chunk for task in tasks})

    def ended() -> list[Ended]:
        ready, _ = ray.wait(list(chunks), num_returns=len(chunks), timeout=0) if chunks else ([], 0)
        return [_ended(ray, ref, chunks.pop(ref)) for ref in ready]

    def close() -> None:
        with contextlib.suppress(Exception):  # the cluster may be gone
            for ref in chunks:
                ray.cancel(ref)
            if chunks:  # a cancelled task ends when its command has saved
                ray.wait(list(chunks), num_returns=len(chunks), timeout=_GRACE)
        chunks.clear()
        ray.shutdown()

    return Launcher(held=set, submit=submit, ended=ended, close=close)


def _connect(ray: ModuleType, address: str) -> None:
    """Joins a cluster, or starts one. Ray's log stays in its files."""
    if '://' in address:
        raise ClusterError(
            f'{quoted(address)} is an address for Ray clients: start the sweep on a node of the '
            f'cluster, with --address auto'
        )
    quiet = {'log_to_driver': False, 'logging_level': 'CRITICAL'}
    # 'local' where Ray would take None for RAY_ADDRESS. A store of objects holds results of tasks:
    # here they are a line each. Ray finds the address of a machine by a packet to a public host.
    started = {
        'include_dashboard': False,
        'object_store_memory': 100_000_000,
        '_node_ip_address': '127.0.0.1',
        '_system_config': _HEALTH,
    }
    try:
        if address not in ('', 'auto'):  # Ray would try for minutes, and print what it tries
            host, _, port = address.rpartition(':')
            socket.create_connection((host, int(port)), timeout=10).close()
        with warnings.catch_warnings():
            # JAX warns of forks; the programs that Ray starts so do not use JAX.
            warnings.filterwarnings('ignore', r'os\.fork\(\)', RuntimeWarning)
            with _own_handler():
                ray.init(address or 'local', **quiet, **({} if address else started))
    except Exception as error:
        where = f'no Ray cluster at {quoted(address)}' if address else 'Ray does not start'
        # A token in a file is used for 'auto', but only sent to a named address if this is set.
        token = 'InvalidAuthToken' in str(error.__cause__)
        why = 'it asks for a token, set RAY_AUTH_MODE=token' if token else first_line(error)
        raise ClusterError(f'{where}: {why}') from error
    # Ray prints pages about each lost worker, whatever `log_to_driver` says: only its debugger has
    # a way to stop it. Without this name a later Ray is not quiet, nothing else.
    ray._private.worker._worker_logs_enabled = False


@contextlib.contextmanager
def _own_handler() -> Iterator[None]:
    """Keeps what this process does on SIGTERM: `ray.init` would end it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_resources(ray: ModuleType, resources: Resources, address: str) -> None:
    """Says so if no node has what a chunk needs: Ray would wait without a word."""
    needs = {'CPU': resources.cpus or 1, 'GPU': resources.gpus, 'TPU': resources.tpus}
    alive = [node['Resources'] for node in ray.nodes() if node['Alive']]
    if any(all(node.get(name, 0) >= n for name, n in needs.items()) for node in alive):
        return
    wanted = ', '.join(f'{n} {name}' for name, n in needs.items() if n)
    if not address:
        ray.shutdown()
        raise ClusterError(f'this machine does not have what a chunk needs: {wanted}')
    line = f'no node of the Ray cluster has what a chunk needs, so far: {wanted}'
    print(f'jaxprune: {line}', file=sys.stderr)


def _options(resources: Resources, retries: int) -> dict:
    """Options of the tasks. Ray hides from a task the GPUs and TPU chips that it did not ask for.

    A task that ended with an exit code has ended: only lost workers and nodes are retried.
    """
    options = {'max_retries': retries, 'name': 'chunk'}
    if resources.cpus:
        options['num_cpus'] = resources.cpus
    if resources.gpus:
        options['num_gpus'] = resources.gpus
    if resources.tpus:
        options['resources'] = {'TPU': resources.tpus}
    return options


def _chunk_task(resources: Resources) -> Callable[[tuple[str, ...]], tuple[int | None, str]]:
    """The function that a worker runs.

    It names nothing of this module, so Ray sends all of it and a worker does not import jaxprune:
    that would take seconds and 0.3 GiB.
    """
    keeper = f'{inspect.getsource(_keep)}\n_keep()\n'
    grace = str(_GRACE)
    count = CPU_DEVICES  # a local name goes with the function
    devices = 0 if resources.gpus or resources.tpus else resources.cpus

    def run(command: tuple[str, ...]) -> tuple[int | None, str]:
        flags = os.environ.get('XLA_FLAGS', '')
        if devices and count not in flags:
            flags = f'{flags} {count}={devices}'.strip()
        environment = {**os.environ, 'RAY_USAGE_STATS_ENABLED': '0'}
        if flags:
            environment['XLA_FLAGS'] = flags
        process = subprocess.Popen(
            [sys.executable, '-I', '-S', '-c', keeper, grace, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        try:
            # Ray cancels a task by KeyboardInterrupt, which Python raises between short calls only.
            while not select.select([process.stdout], [], [], 0.5)[0]:
                pass
        finally:
            process.stdin.close()  # the keeper ends a command that still runs
            answer = process.stdout.read().decode()
            process.wait()
        if not answer:
            return None, f'{socket.gethostname()}: the keeper of the command was killed'
        code, line = answer.split(' ', 1)
        if int(code) < 0:
            return None, f'{socket.gethostname()}: killed by signal {-int(code)}'
        return int(code), f'{socket.gethostname()}: {line.strip() or f"exit code {code}"}'

    return run


def _keep() -> None:
    """Runs a command while a worker lives; a program of its own, which only has its own names.

    Arguments of the program: the seconds of grace, the command. Its standard input ends when the
    worker is gone. Its standard output gets one line: the exit code, and the last line that the
    command printed. All that the command prints goes to standard error, the log of the worker.
    """
    import os
    import signal
    import subprocess
    import sys
    import threading
    import time

    if os.fork():  # Ray kills the children of a worker, but not the children of these
        os._exit(0)
    os.setsid()
    try:
        child = subprocess.Popen(
            sys.argv[2:],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
        )
    except OSError as error:
        print(127, error, flush=True)  # as shells do
        os._exit(0)
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, lambda number, _: child.send_signal(number))
    last = ['']

    def read() -> None:
        for line in child.stdout:
            print(line, end='', file=sys.stderr, flush=True)
            last[0] = line.strip()[:500] or last[0]

    def end_with_worker() -> None:
        sys.stdin.read()
        child.terminate()
        time.sleep(float(sys.argv[1]))
        child.kill()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    threading.Thread(target=end_with_worker, daemon=True).start()
    code = child.wait()
    reader.join(timeout=1)  # a process that the command left behind may hold its output open
    print(code, last[0], flush=True)
    os._exit(0)


def _ended(ray: ModuleType, ref: object, chunk: str) -> Ended:
    """How a task ended: the code of its command, or what Ray says."""
    try:
        return Ended(chunk, *ray.get(ref))
    except Exception as error:
        return Ended(chunk, None, f'{type(error).__name__}: {first_line(error)}')
