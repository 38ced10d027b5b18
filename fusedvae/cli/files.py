"""Files that are the old ones or the new ones, whole, whenever the process or the machine stops; and directories that
one process at a time writes to."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from .errors import CommandError

try:
    import fcntl
except ImportError:  # no POSIX system: nothing there is locked
    fcntl = None  # type: ignore[assignment]

LOCK = "run.lock"
"""Of a directory that a process writes to: says which one, and is gone when that is done."""

_UNFINISHED = ".unfinished"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file beside ``path``, get it onto the disk, and give it the name ``path``.

    That file is a fresh one under a name that nobody knows, so that neither a link nor another process that writes
    the same thing can have a part in it. What is left of such files by processes that ended is removed.
    """
    try:
        _remove_leftovers(path)
        descriptor, unfinished = _fresh_file_beside(path)
        try:
            with open(descriptor, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(unfinished, path)  # while it is still locked: nobody takes it for a leftover
        finally:
            unfinished.unlink(missing_ok=True)
        if os.name == "posix":  # the new name is on the disk only when its directory is
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    except (OSError, RuntimeError) as error:  # a RuntimeError is how torch.save reports a full disk
        raise CommandError(f"cannot write {path}: {_of_the_system(error)}") from error


def _of_the_system(error: BaseException) -> BaseException:
    """The error with which a failure began: torch.save has one of its own for that a disk is full."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return found or error


def write_where_asked(path: Path, content: bytes) -> None:
    """Write to a name that a user gave: a file is replaced atomically; a link, a pipe or a device is written to."""
    try:
        kind = path.lstat().st_mode
    except OSError:
        kind = stat.S_IFREG  # there is nothing yet; if there cannot be, the attempt says why
    if stat.S_ISREG(kind):
        return write_atomically(path, lambda file: file.write(content))
    try:
        # Without waiting: a pipe that nobody reads would hold up the process for good.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NONBLOCK", 0), 0o666)
        with open(descriptor, "wb") as file:
            os.set_blocking(file.fileno(), True)
            file.write(content)
    except OSError as error:
        reason = "nobody reads that pipe" if error.errno == errno.ENXIO else str(error)
        raise CommandError(f"cannot write {path}: {reason}") from error


def _fresh_file_beside(path: Path) -> tuple[int, Path]:
    """A new file that this process alone has, locked for as long as it is open; its descriptor and its name."""
    while True:
        unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}{_UNFINISHED}")
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        # Before it was locked another process may have taken it for a leftover.
        if _lock(descriptor) and _is_named(descriptor, unfinished):
            return descriptor, unfinished
        os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Remove unfinished files that no process has locked any more. Links among them are not ours, and stay."""
    if fcntl is None:
        return
    for leftover in path.parent.glob(f"{path.name}.*{_UNFINISHED}"):
        try:
            descriptor = os.open(leftover, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode) and _lock(descriptor):
                leftover.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open file until it is closed, if no other process has. True where there are no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems have no locks at all: a run there is better than none.
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether an open file still has that name."""
    try:
        named = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(descriptor))


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """A block in which no other process writes to ``directory``: refused, with its name, if one does already.

    The system lets go of the lock when the process ends in whatever way; what is left of the file then harms nobody.
    """
    if fcntl is None:
        yield
        return
    path = directory / LOCK
    try:
        descriptor = _locked(path)
    except OSError as error:
        raise CommandError(f"cannot write to {directory}: {error}") from error
    try:
        yield
    finally:
        if _is_named(descriptor, path):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path) -> int:
    """The lock file of that name, opened and locked, with this process's name in it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        if not _lock(descriptor):
            holder = "".join(filter(str.isprintable, os.read(descriptor, 1000).decode(errors="replace")))
            os.close(descriptor)
            raise CommandError(
                f"{path.parent} is in use: {holder or 'another process'} writes to it; another --out leaves it alone"
            )
        if _is_named(descriptor, path):
            started = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {started}".encode())
            return descriptor
        os.close(descriptor)  # its holder was just done, and has removed it
