"""A Ray cluster of two nodes on the loopback of this machine, for tests.

Each node has a loopback address of its own, and its processes have its name in their environment:
so they are found, killed and frozen, and none is left.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from jaxprune.fleet.ray_cluster import node_environment

# Not imported here: Ray reads its settings when it is imported, and the launcher sets some.
RAY = Path(sys.executable).with_name('ray')
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec('ray') is None or not RAY.exists() or sys.platform != 'linux',
    reason="needs Linux and pip install 'jaxprune[ray]'",
)

NODE = 'JAXPRUNE_TEST_NODE'


def processes(name):
    """Every process that was started by a node, or by its processes."""
    mark = f'{NODE}={name}\0'.encode()
    found = []
    for entry in Path('/proc').iterdir():
        with contextlib.suppress(OSError, ValueError):
            if mark in (entry / 'environ').read_bytes():
                found.append(int(entry.name))
    return found


def signal_node(name, number):
    for pid in processes(name):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill(name):
    """Kills a node with all its processes, as when its machine is switched off."""
    while processes(name):
        signal_node(name, signal.SIGKILL)
        time.sleep(0.05)


def until(condition, seconds, what):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f'{what}: not within {seconds} s'
        time.sleep(0.1)
    return value


def start(name, ip, *arguments):
    command = [RAY, 'start', f'--node-ip-address={ip}', '--num-cpus=1', '--disable-usage-stats']
    command += ['--object-store-memory=80000000', *arguments]
    started = subprocess.run(
        command, env={**os.environ, NODE: name}, capture_output=True, text=True, timeout=90
    )
    assert started.returncode == 0, started.stdout + started.stderr


@pytest.fixture(scope='module')
def head():
    """Name and address of a cluster of one node with one core; this machine is on it."""
    name = f'{os.getpid()}-head'
    logs = tempfile.mkdtemp(prefix='ray', dir='/tmp')  # paths of sockets have to be short
    with socket.socket() as free:
        free.bind(('127.0.0.2', 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {**node_environment(), 'RAY_AUTH_MODE': 'disabled'}.items():
            patch.setenv(key, value)
        try:
            options = ['--head', f'--port={port}', f'--temp-dir={logs}']
            start(name, '127.0.0.2', *options, '--include-dashboard=false')
            yield name, f'127.0.0.2:{port}'
        finally:
            kill(name)
            shutil.rmtree(logs, ignore_errors=True)


@pytest.fixture
def second(head, request):
    """Name of a second node with one core, for one test."""
    name = f'{os.getpid()}-{request.node.name}'
    try:
        start(name, '127.0.0.3', f'--address={head[1]}')
        yield name
    finally:
        kill(name)
