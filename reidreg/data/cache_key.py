"""What an image cache holds, and the name and folder of its file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from platformdirs import user_cache_path

from reidreg.errors import DataError
from reidreg.machine.memory import size_in_text


@dataclass(frozen=True)
class Wanted:
    """The images that a cache has to hold.

    Args:
        paths: Their files.
        size: Height and width.
        group: The same for all caches of one image folder and input size.
        fingerprint: Changes with any of the files.
    """

    paths: tuple[str, ...]
    size: tuple[int, int]
    group: str
    fingerprint: str

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.paths), *self.size, 3)

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def size_text(self) -> str:
        return size_in_text(self.bytes)

    @property
    def file(self) -> Path:
        return cache_folder() / f"{self.group}-{self.fingerprint}.npy"


def describe_images(paths: Sequence[str], size: tuple[int, int]) -> Wanted:
    """Fingerprint images by path, file size and modification time.

    Raises:
        DataError: An image is gone.
    """
    absolute = [os.path.abspath(path) for path in paths]
    states = []
    for path in absolute:
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError(f"{path}: the image is gone") from error
        states.append([path, status.st_size, status.st_mtime_ns])
    folder = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return Wanted(
        paths=tuple(absolute),
        size=size,
        group=f"{_hash(folder)}-{size[0]}x{size[1]}",
        fingerprint=_hash([states, size]),
    )


def cache_folder() -> Path:
    """The folder of the image caches: in $REIDREG_CACHE, else in the user's cache folder."""
    own = os.environ.get("REIDREG_CACHE")
    root = Path(own) if own else user_cache_path("reidreg", appauthor=False)
    return root.expanduser() / "images"


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
