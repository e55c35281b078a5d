"""Files that are written whole or not at all, on disks and in object stores."""

import contextlib
import errno
import functools
import hashlib
import os
import platform
import re
import time
import uuid
from pathlib import Path
from typing import Any

#: What the name of a directory in an object store begins with.
REMOTE = ('s3://', 'gs://')
#: Names of temporary files: of which file, which machine and which process.
_TEMPORARY = re.compile(r'\..*\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.tmp')
#: What disks answer that have no second names for a file, such as mounted buckets.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
#: Seconds after which a temporary file of another machine belongs to nobody.
_ABANDONED = 86400.0


def place(name: str | Path) -> Any:
    """A directory or file by its name: a `Path`, or something that is used like one for `s3://`
    and `gs://`.

    Raises:
      ImportError: the packages for object stores are not installed.
    """
    if not str(name).startswith(REMOTE):
        return Path(name)
    from upath import UPath

    # What another machine just wrote must be visible.
    return UPath(str(name), use_listings_cache=False)


def is_remote(path: Any) -> bool:
    """Does a path lie in an object store?"""
    return not isinstance(path, Path) or str(path).startswith(REMOTE)


def write_whole(path: Any, content: bytes) -> None:
    """Writes a file so that a reader, or a crash at any moment, sees all of it or nothing.

    Raises:
      OSError: it cannot be written; what stood there before still stands.
    """
    if is_remote(path):
        path.write_bytes(content)
        return
    temporary = _temporary(path, content)
    try:
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _keep_name(path)


def create_whole(path: Any, content: bytes) -> bool:
    """Writes a file unless there is one: of several writers at once, one writes it.

    Returns:
      Did this call write it?

    Raises:
      OSError: it cannot be written.
    """
    if is_remote(path):
        try:
            path.fs.pipe_file(path.path, content, mode='create')
        except FileExistsError:
            return False
        return True
    if path.exists():
        return False
    temporary = _temporary(path, content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():
            return False
        os.replace(temporary, path)  # two writers at the same instant would both write
    finally:
        temporary.unlink(missing_ok=True)
    _keep_name(path)
    return True


def clock_ahead(directory: Any) -> float:
    """Seconds that the clock which dates the files of a directory is ahead of this machine's; 0
    where nothing can be written."""
    probe = directory / _temporary_name('clock')
    try:
        probe.write_bytes(b'')
        return probe.stat().st_mtime - time.time()
    except Exception:  # whatever a disk or a network raises
        return 0.0
    finally:
        with contextlib.suppress(Exception):
            probe.unlink()


def remove_abandoned(directory: Path) -> None:
    """Deletes temporary files of writers that died, here and up to two folders below.

    Those of this machine's living processes stay, and those of other machines for a day.
    """

    patterns = ('.*.tmp', '*/.*.tmp', '*/*/.*.tmp')
    for leftover in (path for pattern in patterns for path in directory.glob(pattern)):
        found = _TEMPORARY.fullmatch(leftover.name)
        if not found:  # somebody else's
            continue
        machine, process = found.groups()
        try:
            age = time.time() - leftover.stat().st_mtime
        except FileNotFoundError:
            continue
        dead = machine == machine_token() and not process_alive(int(process))
        if dead or age > _ABANDONED:
            leftover.unlink(missing_ok=True)


@functools.cache
def machine_token() -> str:
    """Eight letters that only processes have which see each other's process ids."""
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text()
        space = os.stat('/proc/self/ns/pid').st_ino
        seen = f'{boot} {space} {platform.node()}'
    except OSError:  # not Linux
        seen = f'{platform.node()} {uuid.getnode()}'
    return hashlib.sha256(seen.encode()).hexdigest()[:8]


def process_alive(process: int) -> bool:
    """Does a process of this machine live?"""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # not ours to ask
        return True
    return True


def _temporary_name(name: str) -> str:
    """A name that nobody else has. Readers look at the final suffix and never see such a file."""
    return f'.{name}.{machine_token()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp'


def _temporary(path: Path, content: bytes) -> Path:
    """A file beside `path`, written and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_temporary_name(path.name))
    try:
        with open(temporary, 'xb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _keep_name(path: Path) -> None:
    """Makes a new name survive a power cut."""
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
