"""Atomic writes, and folders that one process at a time writes to."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from reidreg.errors import ConfigError

PRIVATE = 0o600  # for what is made from people's images


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """Write a file atomically: readers find the old content or all of the new one.

    The content goes to a hidden `.NAME.PID.partial` beside the file, which is moved into place if
    the block ends without an error and deleted otherwise. A kill may leave it behind.

    Args:
        path: The file; its folder is made if it is missing.
        mode: Its permissions, before the umask.

    Raises:
        OSError: The folder cannot be written to, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(
        partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode
    )
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders; its rename is durable by itself.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def exclusive(folder: Path, key: str, fix: str) -> Iterator[None]:
    """Lock a folder for this process; the system releases the lock however the process ends.

    Args:
        folder: An existing folder.
        key: The option that named it, for the error.
        fix: What the user can do, for the error.

    Raises:
        ConfigError: Another process holds the lock, or the folder cannot be locked.
    """
    # filelock takes flock: on NFS, Linux makes it a lock that other machines see; on file systems
    # that keep it to one machine (such as Lustre with `localflock`) two machines may share a
    # folder. Without flock (ENOSYS) filelock 4 takes a lock file instead, and 3 gives up.
    lock = FileLock(folder / ".lock")
    # A side file: filelock truncates its own, and Windows lets no other process read it.
    holder = folder / ".lock.holder"
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ConfigError(f"{key}: {folder} is in use by {_holder_in(holder)}; {fix}") from error
    except NotImplementedError:
        yield
        return
    except OSError as error:
        raise ConfigError(f"{key}: {folder} cannot be locked ({error.strerror}); {fix}") from error
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _holder_in(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text(encoding="utf-8") or "another process"
    return "another process"
