"""The files of an index: one folder, whose manifest is written last.

    manifest.json           a description of the index, size and SHA-256 of every other file
    vectors-000001.npy      the features as they were given, (N, D) float32, memory-mapped
    items-000001.npz        pids and camids (N,) int64, and the paths of the images
    candidates-000001.faiss the faiss index of an approximate index

A write creates files under the next number and then replaces the manifest. If it is killed, the
folder holds the complete old index or the complete new one; the next write deletes files that the
manifest does not name. Reading executes nothing, and faiss parses no file whose checksum is wrong.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from reidreg.errors import DataError
from reidreg.files import replacing, sync
from reidreg.retrieval.arrays import IntArray
from reidreg.retrieval.index_search import Vectors

FORMAT = "reidreg index"
VERSION = 1
MANIFEST = "manifest.json"
_INDEX_FILE = re.compile(r"(vectors|items|candidates)-(\d{6})\.(npy|npz|faiss)")
_CHUNK = 2**22  # bytes that are hashed at a time
_ATTEMPTS = 3  # reads of an index that other processes keep replacing


@dataclass(frozen=True, slots=True)
class Items:
    """The labels and paths of the items of an index.

    Args:
        pids: (N,) int64, -1 where unknown.
        camids: (N,) int64, -1 where unknown.
        paths: N paths or names of images.
    """

    pids: IntArray
    camids: IntArray
    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pids)

    def followed_by(self, other: Items) -> Items:
        """These items, followed by others."""
        return Items(
            np.concatenate([self.pids, other.pids]),
            np.concatenate([self.camids, other.camids]),
            self.paths + other.paths,
        )


@dataclass(frozen=True, slots=True)
class Contents:
    """An index as it is stored.

    Args:
        facts: The description of the index in its manifest.
        vectors: The features.
        items: Their pids, camids and paths.
        candidates: A faiss index, or None for an exact index.
    """

    facts: dict[str, Any]
    vectors: Vectors
    items: Items
    candidates: Any

    def counts(self) -> set[int]:
        """How many items each part holds: one number if the parts belong together."""
        items = self.items
        held = len(self.vectors) if self.candidates is None else self.candidates.ntotal
        counts = {len(items), len(items.camids), len(items.paths), len(self.vectors)}
        return {*counts, held, self.facts["items"]}


# --------------------------------------------------------------------- writing


def write_contents(folder: Path, contents: Contents) -> None:
    """Write an index; at every moment the folder holds the complete old or the complete new one.

    The caller must have locked the folder (`reidreg.files.exclusive`).

    Raises:
        DataError: The folder cannot be written to, or the disk is full.
    """
    written: dict[str, dict[str, Any]] = {}
    number = _next_number(folder)
    writers: list[tuple[str, Callable[[_HashingWriter], None]]] = [
        (f"vectors-{number:06d}.npy", lambda file: _write_vectors(file, contents.vectors)),
        (f"items-{number:06d}.npz", lambda file: _write_items(file, contents.items)),
    ]
    if contents.candidates is not None:
        writers.append(
            (f"candidates-{number:06d}.faiss", lambda file: _write_faiss(file, contents.candidates))
        )
    try:
        for name, write in writers:
            with replacing(folder / name) as file:
                hashing = _HashingWriter(file)
                write(hashing)
                written[name] = {"bytes": hashing.count, "sha256": hashing.digest.hexdigest()}
        sync(folder)
        with replacing(folder / MANIFEST) as file:
            file.write(_render(contents.facts, written))
        sync(folder)
    # faiss turns an exception of its writer into a RuntimeError.
    except (OSError, RuntimeError) as error:
        _remove(folder, [name for name, _ in writers])
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"cannot write the index {folder}: {reason}") from error
    _remove(folder, [name for name in _numbered(folder) if name not in written])


class _HashingWriter:
    """Passes bytes on to a file, counting and hashing them."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.count, self.digest = file, 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.count += len(view)
        self.file.write(view)
        return len(view)


def _write_vectors(file: _HashingWriter, vectors: Vectors) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(vectors), vectors.dim)}
    np.lib.format.write_array_header_1_0(file, header)
    for _, block in vectors.blocks():
        file.write(np.ascontiguousarray(block, dtype="<f4"))


def _write_items(file: _HashingWriter, items: Items) -> None:
    # As bytes: a path may be invalid UTF-8, and a numpy text array pads all to the longest.
    names = "\0".join(items.paths).encode("utf-8", "surrogateescape")
    arrays: dict[str, Any] = {
        "pids": items.pids,
        "camids": items.camids,
        "names": np.frombuffer(names, dtype=np.uint8),
    }
    with io.BytesIO() as archive:
        np.savez(archive, **arrays)
        file.write(archive.getbuffer())


def _write_faiss(file: _HashingWriter, index: Any) -> None:
    import faiss

    faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def _render(facts: dict[str, Any], files: dict[str, dict[str, Any]]) -> bytes:
    manifest = {"format": FORMAT, "version": VERSION, **facts, "files": files}
    text = json.dumps({**manifest, "sha256": manifest_digest(manifest)}, indent=2)
    return (text + "\n").encode()


def manifest_digest(manifest: dict[str, Any]) -> str:
    """The SHA-256 of a manifest without its own checksum."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _numbered(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if _INDEX_FILE.fullmatch(path.name)]


def _next_number(folder: Path) -> int:
    """A number that no file has, including files that a killed write left."""
    numbers = [int(name.partition("-")[2][:6]) for name in _numbered(folder)]
    return max(numbers, default=0) + 1


def _remove(folder: Path, names: list[str]) -> None:
    for name in names:
        with contextlib.suppress(OSError):
            (folder / name).unlink()


# --------------------------------------------------------------------- reading


def holds_index(folder: Path) -> bool:
    """Whether a folder holds an index, even a damaged one."""
    return (folder / MANIFEST).exists()


def read_contents(folder: Path) -> Contents:
    """Read an index after checking its checksums.

    Raises:
        DataError: There is none, or it is damaged, of a newer format, or not one of reidreg.
    """
    for _ in range(_ATTEMPTS - 1):
        manifest = read_manifest(folder)
        try:
            return _read(folder, manifest)
        except FileNotFoundError:
            continue  # Another process replaced the index and deleted these files.
    try:
        return _read(folder, read_manifest(folder))
    except FileNotFoundError as error:
        raise _damaged(folder, f"{Path(error.filename).name} is missing") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, checked and without its own checksum.

    Raises:
        DataError: As for `read_contents`.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"no index at {folder} (it has no {MANIFEST}); `reidreg index build` makes one"
        ) from error
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{MANIFEST} cannot be read ({_reason(error)})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is not the manifest of a reidreg index")
    if not isinstance(manifest.get("version"), int) or manifest["version"] > VERSION:
        raise DataError(
            f"{folder} has format {manifest.get('version')}, this reidreg reads up to {VERSION}: "
            "upgrade reidreg"
        )
    digest = manifest.pop("sha256", None)
    if digest != manifest_digest(manifest):
        raise _damaged(folder, f"{MANIFEST} does not match its checksum")
    return manifest


def _read(folder: Path, manifest: dict[str, Any]) -> Contents:
    facts, files = dict(manifest), manifest["files"]
    for key in ("format", "version", "files"):
        facts.pop(key)
    by_kind = {name.partition("-")[0]: name for name in files}
    for name, wanted in files.items():
        _check(folder, name, wanted)
    try:
        vectors = np.load(folder / by_kind["vectors"], mmap_mode="r", allow_pickle=False)
        items = _read_items(folder / by_kind["items"])
        index = None
        if "candidates" in by_kind:
            index = _read_faiss(folder / by_kind["candidates"])
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy and faiss raise exceptions of any type
        raise _damaged(folder, _reason(error)) from error
    return Contents(facts, Vectors([vectors]), items, index)


def _check(folder: Path, name: str, wanted: dict[str, Any]) -> None:
    """Compare the size and checksum of a file with those in the manifest."""
    digest, count = hashlib.sha256(), 0
    if not _INDEX_FILE.fullmatch(name):
        raise _damaged(folder, f"{MANIFEST} names {name!r}, which is not a file of an index")
    try:
        with (folder / name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != wanted["bytes"]:
                raise _damaged(folder, f"{name} has {size:,} bytes, not {wanted['bytes']:,}")
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                count += len(chunk)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _damaged(folder, f"{name} cannot be read ({_reason(error)})") from error
    if digest.hexdigest() != wanted["sha256"]:
        raise _damaged(folder, f"{name} does not match its checksum")


def _read_items(path: Path) -> Items:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        names = arrays["names"].tobytes().decode("utf-8", "surrogateescape")
        return Items(arrays["pids"], arrays["camids"], tuple(names.split("\0")))


def _read_faiss(path: Path) -> Any:
    import faiss

    with path.open("rb") as file:
        return faiss.read_index(faiss.PyCallbackIOReader(file.read))


def _damaged(folder: Path, what: str) -> DataError:
    return DataError(
        f"the index {folder} is damaged: {what}; rebuild it with `reidreg index build`"
    )


def _reason(error: Exception) -> str:
    """The message of an error, in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:100]
