"""Let only one process at a time write to a folder or a file.

The lock is advisory: a program that does not ask for the lock can still write. It is the lock of a small file in the
folder, or next to the file. The kernel releases a lock when the process that holds it ends, even by `kill -9`. On
Windows, and on file systems without locks, nothing is locked.
"""

import contextlib
import errno
import os
import socket
from pathlib import Path

from .errors import UserError


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".ddpm_hf.lock"
# A folder from elsewhere can hold a link to a file that we would overwrite, or a pipe, which would make us wait.
NO_TRAPS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
HELD = set()  # the file descriptors of the locks that this process holds


def _let_go():
    """Close the inherited locks in a forked process. Otherwise they would stay after the parent process was killed."""
    while HELD:
        os.close(HELD.pop())


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go)


def lock_path(place: Path) -> Path:
    """Return the path of the lock file of `place`: inside a folder, or next to an .npz file."""
    return place.with_name(f".{place.name}.lock") if place.suffix == ".npz" else place / LOCK


def writer_of(place: Path) -> str | None:
    """Return a description of the process that holds the lock of `place`, or None if no process holds the lock.

    Nothing is written.
    """
    try:
        descriptor = os.open(lock_path(place), os.O_RDONLY | NO_TRAPS)
    except OSError:
        return None
    try:
        # Take a shared lock, because all processes of a launch look here and must not refuse each other.
        return None if _lock(descriptor, shared=True) else _name_in(descriptor)
    finally:
        os.close(descriptor)


def check_unlocked(place: Path, remedy: str):
    """Raise a UserError that ends with `remedy` if another process holds the lock of `place`. Nothing is written."""
    if (writer := writer_of(place)) is not None:
        raise _in_use(place, writer, remedy)


@contextlib.contextmanager
def locked(place: Path, remedy: str):
    """During a `with` block, hold the lock of `place`: an existing folder, or an .npz file to write.

    Raises:
        UserError: if another process holds the lock. The message ends with `remedy`.
        OSError: if the lock file cannot be written.
    """
    path = lock_path(place)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_TRAPS, 0o666)
        if not _lock(descriptor):
            writer = _name_in(descriptor)
            os.close(descriptor)
            raise _in_use(place, writer, remedy)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # the process that had the lock before has just removed this file, so open a new one
    HELD.add(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        if descriptor in HELD:  # not in a forked process
            HELD.remove(descriptor)
            with contextlib.suppress(OSError):  # the folder may be gone
                path.unlink()
            os.close(descriptor)


def _in_use(place: Path, writer: str, remedy: str) -> UserError:
    return UserError(f"{place} is in use, {writer} writes to it: {remedy}.")


def _name_in(descriptor: int) -> str:
    """Return what the process that holds a lock has written into the lock file, e.g. "process 12 on host"."""
    return os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"


def _lock(descriptor: int, shared: bool = False) -> bool:
    """Try to lock an open file. Return False if another process holds the lock, else True.

    On a system without locks, return True.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)  # other errors: this file system has no locks
    return True
