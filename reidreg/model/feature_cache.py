"""The feature cache: another evaluation of the same model and images extracts nothing again.

A file is found by its key, a SHA-256 of everything that features depend on: the model (its weights,
the options of its parts, and the source of its classes and of the modules of their package that
they use), the input (size, normalisation, mirror images), the precision, the libraries' versions,
and the images (path, size and modification time, and the camera, which some models use). Protocol
and labels are not in it: pids and camids come from the data set each time.

A file holds its key and a checksum of its features. Both are verified on reading, and the features
of a damaged or replaced file are extracted again. A folder keeps at most 2 GiB: the least recently
used files are deleted, but never those in use.
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
_LIBRARIES = ("numpy", "pillow", "timm", "torch", "torchvision")  # identified by their versions
_NOT_HASHED = {*_LIBRARIES, "PIL", *sys.stdlib_module_names}


class FeatureCache:
    """An embedder that looks up features in a folder first, and stores those it extracts.

    Args:
        embedder: The embedder that extracts features.
        parts: The options of the model's parts.
        folder: The folder of the cache; created when there is something to store.
    """

    def __init__(self, embedder: Embedder, parts: Mapping[str, Any], folder: Path) -> None:
        self.embedder = embedder
        self.parts = parts
        self.folder = folder
        self._used: set[Path] = set()

    def embed(self, samples: Sequence[Sample], what: str) -> Embeddings:
        """As `Embedder.embed`; the log says when the features come from the cache.

        Args:
            samples: The images.
            what: The split's name, with which the file's name begins.
        """
        key, cached = self._look_up(samples, what) if world().is_main else (None, None)
        if broadcast(cached is not None):
            return embeddings_of(samples, cached) if cached is not None else _nothing()
        found = self.embedder.embed(samples, what)
        if key is not None:
            self._write(self._path(key, what), key, found.features)
        return found

    def _look_up(self, samples: Sequence[Sample], what: str) -> tuple[str | None, Tensor | None]:
        """The key of images, and their features in the cache; None for what there is not."""
        try:
            key = self.key(samples)
        except OSError:  # the source of a class is missing, or an image, which extraction reports
            return None, None
        path = self._path(key, what)
        self._used.add(path)
        cached = self._read(path, key, what)
        if cached is not None:
            logger.info("features of the %s from the cache (%s)", what, path)
        return key, cached

    def _path(self, key: str, what: str) -> Path:
        return self.folder / f"{what}-{key[:16]}.npz"

    def key(self, samples: Sequence[Sample]) -> str:
        """The key of the features of these images by this model.

        Raises:
            OSError: An image is gone, or a class of the model has no source file.
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
                    "images; extracting them again",
                    what,
                )
            return None
        features = _read_features(path, key)
        if features is None:
            logger.info("%s is damaged or was replaced; extracting the features again", path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # marks the use, for `prune`
        return features

    def _write(self, path: Path, key: str, features: Tensor) -> None:
        try:
            for partial in self.folder.glob(".*.partial"):
                partial.unlink(missing_ok=True)
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
    """What every rank but the first returns when the features come from the cache."""
    return embeddings_of([], torch.empty(0, 0))


def _read_features(path: Path, key: str) -> Tensor | None:
    """The features in a file, or None where it is damaged or has another key."""
    try:
        # Opened here: numpy does not close a file that it opened and cannot read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            features = torch.from_numpy(arrays["features"])
            found, checksum = str(arrays["key"]), str(arrays["sha256"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
    return features if (found, checksum) == (key, _checksum(key, features)) else None


def _checksum(key: str, features: Tensor) -> str:
    return digest_of(key, {"features": features})


def prune(folder: Path, used: Collection[Path], limit: int = LIMIT) -> None:
    """Delete the least recently used files of a cache, until the others are small enough.

    Args:
        folder: The folder of the cache.
        used: Files that are in use and are not deleted.
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


# --------------------------------------------------------------------- key


def describe_embedder(embedder: Embedder) -> dict[str, Any]:
    """Everything in an embedder that its features depend on, except the options of its parts.

    Raises:
        OSError: A class of the model has no source file, such as one defined in a notebook.
    """
    options = embedder.input
    return {
        "weights": weights_digest(embedder.model),
        "input": [options.size, options.mean, options.std, options.flip_test],
        "cameras": embedder.labels.camids,
        "device": embedder.device.type,
        "dtype": str(embedder.dtype),
        # Libraries choose kernels by the batch size, and the last bits depend on the kernel.
        "batch_size": embedder.batch_size,
        "code": _code_of([*map(type, embedder.model.modules()), type(embedder)]),
        "libraries": {name: _version(name) for name in _LIBRARIES},
    }


def weights_digest(model: torch.nn.Module) -> str:
    """A SHA-256 of a model's weights, which may be on any device."""
    return digest_of("", {name: value.cpu() for name, value in model.state_dict().items()})


def _code_of(classes: Iterable[type]) -> dict[str, str]:
    """Digests of the modules of classes, and of the modules of the same package that they use.

    The package's version would not do for a plugin under development.
    """
    digests: dict[str, str] = {}
    pending = {base.__module__ for cls in classes for base in cls.__mro__}
    while pending:
        name = pending.pop()
        package = name.partition(".")[0]
        if name in digests or package in _NOT_HASHED or name not in sys.modules:
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
    """The name of the module that a value comes from, or is."""
    if isinstance(value, types.ModuleType):
        return value.__name__
    return str(getattr(value, "__module__", None))


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # built from source, or under another name
        return ""


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
