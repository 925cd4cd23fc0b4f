"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from reidreg.errors import ConfigError


@contextlib.contextmanager
def exclusive(folder: Path, key: str, fix: str) -> Iterator[None]:
    """Hold a folder for this process; the system lets go of it however the process ends.

    On network file systems without locks two machines may still share a folder.

    Args:
        folder: It has to be there.
        key: The option that named it, for the error.
        fix: What to do about it, for the error.

    Raises:
        ConfigError: Another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read() or "another process"
            raise ConfigError(f"{key}: {folder} is in use by {holder}; {fix}") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
