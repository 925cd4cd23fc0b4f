"""Features that are kept, so that evaluating again with another protocol extracts nothing again.

A kept file is found by a key: a SHA-256 of all that features depend on. That is the model (its
weights, its parts' options, and the source of its classes with what their modules use of their own
package), the input (size, normalisation, mirror images), the arithmetic, the libraries' versions,
and the images (path, size and time of change of each, and its camera, which some models see).
Protocol and labels are no part of it: pids and camids come from the data set each time.

The file holds its key and a checksum of its features, and both are looked at when it is read: what
is damaged, or was put there by hand, is extracted anew. A folder keeps at most 2 GiB, of which
whatever was not used for longest goes first; the features just used stay, however large they are.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import sys
import types
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reidreg.distributed.group import broadcast, world
from reidreg.files import PRIVATE, replacing
from reidreg.logs.console import logger
from reidreg.model.checkpoint import digest_of, run_folder_of
from reidreg.model.embedder import Embedder, embeddings_of
from reidreg.values import Embeddings, Sample

VERSION = 1
LIMIT = 2 * 2**30  # bytes that a folder may keep
# Their versions stand for their source.
_LIBRARIES = ("numpy", "pillow", "timm", "torch", "torchvision")
_ELSEWHERE = {*_LIBRARIES, "PIL", *sys.stdlib_module_names}


class FeatureCache:
    """An embedder that looks for kept features first, and keeps those it has to make.

    Args:
        embedder: What makes features.
        parts: The options of the model's parts.
        folder: Where they are kept; made when there is something to keep.
    """

    def __init__(self, embedder: Embedder, parts: Mapping[str, Any], folder: Path) -> None:
        self.embedder = embedder
        self.parts = parts
        self.folder = folder
        self._used: set[Path] = set()

    def embed(self, samples: Sequence[Sample], what: str) -> Embeddings:
        """As `Embedder.embed`; a line of the log says whether the features were kept ones.

        Args:
            samples: The images.
            what: The split's name, which the file's name begins with.
        """
        key, kept = self._look(samples, what) if world().is_main else (None, None)
        if broadcast(kept is not None):
            return embeddings_of(samples, kept) if kept is not None else _nothing()
        found = self.embedder.embed(samples, what)
        if key is not None:
            self._write(self._path(key, what), key, found.features)
        return found

    def _look(self, samples: Sequence[Sample], what: str) -> tuple[str | None, Tensor | None]:
        """The key of images, if they have one, and the features that are kept under it, if any."""
        try:
            key = self.key(samples)
        except OSError:  # An image is gone, as will be said, or the source of a class.
            return None, None
        path = self._path(key, what)
        self._used.add(path)
        kept = self._read(path, key, what)
        if kept is not None:
            logger.info("features of the %s from the cache (%s)", what, path)
        return key, kept

    def _path(self, key: str, what: str) -> Path:
        return self.folder / f"{what}-{key[:16]}.npz"

    def key(self, samples: Sequence[Sample]) -> str:
        """What the features of these images by this model are known by.

        Raises:
            OSError: An image is gone, or a class of the model has no source to be known by.
        """
        cameras = self.embedder.labels.camera_indices(samples)
        images = []
        for sample, camera in zip(samples, cameras, strict=True):
            status = os.stat(sample.path)
            images.append([sample.path, status.st_size, status.st_mtime_ns, camera])
        return _hash([VERSION, self._model, images])

    @functools.cached_property
    def _model(self) -> str:
        return _hash([describe_embedder(self.embedder), self.parts])

    def _read(self, path: Path, key: str, what: str) -> Tensor | None:
        if not path.exists():
            if any(self.folder.glob(f"{what}-*.npz")):
                logger.info(
                    "the cached features of the %s are of another model, other options or other "
                    "images; extracting anew",
                    what,
                )
            return None
        features = _read_kept(path, key)
        if features is None:
            logger.info("%s is damaged, or not what its name says; extracting anew", path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the last use, by which `prune` goes
        return features

    def _write(self, path: Path, key: str, features: Tensor) -> None:
        try:
            for left in self.folder.glob(".*.partial"):
                left.unlink(missing_ok=True)
            with replacing(path, PRIVATE) as file:
                np.savez(
                    file,
                    features=features.numpy(),
                    key=np.array(key),
                    sha256=np.array(_checksum(key, features)),
                )
            prune(self.folder, self._used)
        except OSError as error:
            reason = error.strerror or error
            logger.info("features are not cached: cannot write to %s (%s)", self.folder, reason)


def cache_folder_of(ckpt: Path) -> Path:
    """The folder of a checkpoint's feature cache: in its run's folder, wherever the output goes."""
    return run_folder_of(ckpt) / "feature_cache"


def _nothing() -> Embeddings:
    """What a process that extracted nothing returns beside the first one."""
    return embeddings_of([], torch.empty(0, 0))


def _read_kept(path: Path, key: str) -> Tensor | None:
    """Kept features, or None where the file is damaged or of another key."""
    try:
        # numpy leaves open what it opened itself and cannot read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            features = torch.from_numpy(arrays["features"])
            found, checksum = str(arrays["key"]), str(arrays["sha256"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
    return features if (found, checksum) == (key, _checksum(key, features)) else None


def _checksum(key: str, features: Tensor) -> str:
    return digest_of(key, {"features": features})


def prune(folder: Path, used: Collection[Path], limit: int = LIMIT) -> None:
    """Delete what was not used for longest, until the rest is small enough.

    Args:
        folder: The folder of a cache.
        used: Files that stay.
        limit: Bytes that may remain.
    """
    files = []
    for path in folder.glob(f"*-{'[0-9a-f]' * 16}.npz"):
        with contextlib.suppress(FileNotFoundError):  # another process prunes too
            status = path.stat()
            files.append((path not in used, -status.st_mtime_ns, status.st_size, path))
    total = 0
    for unused, _, size, path in sorted(files):
        total += size
        if unused and total > limit:
            path.unlink(missing_ok=True)


# --------------------------------------------------------------------- what features depend on


def describe_embedder(embedder: Embedder) -> dict[str, Any]:
    """All of an embedder that its features depend on, but for the options of its parts.

    Raises:
        OSError: A class of the model has no source, as one that was typed into a notebook.
    """
    options = embedder.input
    return {
        "weights": weights_digest(embedder.model),
        "input": [options.size, options.mean, options.std, options.flip_test],
        "cameras": embedder.labels.camids,
        "device": embedder.device.type,
        "dtype": str(embedder.dtype),
        # Kernels are chosen by the batch's size, and with them the last bits.
        "batch_size": embedder.batch_size,
        "code": _code_of([*map(type, embedder.model.modules()), type(embedder)]),
        "libraries": {name: _version(name) for name in _LIBRARIES},
    }


def weights_digest(model: torch.nn.Module) -> str:
    """A SHA-256 of a model's weights, wherever they are."""
    return digest_of("", {name: value.cpu() for name, value in model.state_dict().items()})


def _code_of(classes: Iterable[type]) -> dict[str, str]:
    """Digests of the source of classes, and of all that their modules use of their own package.

    A version would do for what is installed, but not for a plugin that somebody is working on.
    """
    digests: dict[str, str] = {}
    pending = {base.__module__ for cls in classes for base in cls.__mro__}
    while pending:
        name = pending.pop()
        package = name.partition(".")[0]
        if name in digests or package in _ELSEWHERE or name not in sys.modules:
            continue
        module = sys.modules[name]
        digests[name] = _source_digest(module)
        used = {_home(value) for value in vars(module).values()}
        pending |= {other for other in used if other.partition(".")[0] == package}
    return digests


def _source_digest(module: types.ModuleType) -> str:
    source = getattr(module, "__file__", None)
    if source is not None:
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()
    if hasattr(module, "__path__"):
        return ""  # a folder without an __init__.py
    raise OSError(f"{module.__name__} has no source")


def _home(value: object) -> str:
    """The module that a value comes from, or is."""
    if isinstance(value, types.ModuleType):
        return value.__name__
    return str(getattr(value, "__module__", None))


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # built by hand, or under another name
        return ""


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
