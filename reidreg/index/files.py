"""The files of an index: one folder, its manifest replaced last.

    manifest.json           what the index is, and the size and SHA-256 of every other file
    vectors-000001.npy      the features as they were given, (N, D) float32, mapped when read
    items-000001.npz        pids and camids (N,) int64, and the names of the images
    candidates-000001.faiss what an approximate index finds its candidates with

A write makes new files under the next number, and then replaces the manifest: killed at any moment,
it leaves the old index or the new one, and whole. Files that no manifest names are deleted by the
next write. Nothing in an index can execute, and faiss parses no file whose checksum is wrong.
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
from reidreg.retrieval.distances import IntArray
from reidreg.retrieval.index_search import Vectors

FORMAT = "reidreg index"
VERSION = 1
MANIFEST = "manifest.json"
_OURS = re.compile(r"(vectors|items|candidates)-(\d{6})\.(npy|npz|faiss)")
_CHUNK = 2**22
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Items:
    """Who and what an index holds.

    Args:
        pids: (N,) int64, -1 where they are not known.
        camids: (N,) int64, likewise.
        paths: N names of images.
    """

    pids: IntArray
    camids: IntArray
    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pids)

    def followed_by(self, other: Items) -> Items:
        """These items and then others."""
        return Items(
            np.concatenate([self.pids, other.pids]),
            np.concatenate([self.camids, other.camids]),
            self.paths + other.paths,
        )


@dataclass(frozen=True, slots=True)
class Contents:
    """All that the folder of an index holds.

    Args:
        facts: What the manifest says of the index itself.
        vectors: The features.
        items: Whose they are.
        candidates: A faiss index, or None where every item is compared.
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
    """Write an index so that the folder holds either the old or the new one, and whole.

    The caller holds the folder (`reidreg.locking`).

    Raises:
        DataError: The folder cannot be written to, or the disk is full.
    """
    written: dict[str, dict[str, Any]] = {}
    number = _next_number(folder)
    writers: list[tuple[str, Callable[[_Counted], None]]] = [
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
                counted = _Counted(file)
                write(counted)
                written[name] = {"bytes": counted.count, "sha256": counted.digest.hexdigest()}
        sync(folder)
        with replacing(folder / MANIFEST) as file:
            file.write(_render(contents.facts, written))
        sync(folder)
    # faiss turns what its writer raises into a RuntimeError.
    except (OSError, RuntimeError) as error:
        _remove(folder, [name for name, _ in writers])
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"cannot write the index {folder}: {reason}") from error
    _remove(folder, [name for name in _numbered(folder) if name not in written])


class _Counted:
    """A file that counts and sums up what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.count, self.digest = file, 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.count += len(view)
        self.file.write(view)
        return len(view)


def _write_vectors(file: _Counted, vectors: Vectors) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(vectors), vectors.dim)}
    np.lib.format.write_array_header_1_0(file, header)
    for _, block in vectors.blocks():
        file.write(np.ascontiguousarray(block, dtype="<f4"))


def _write_items(file: _Counted, items: Items) -> None:
    # Names of any bytes, each as long as it is; numpy's texts are all as long as the longest.
    names = "\0".join(items.paths).encode("utf-8", "surrogateescape")
    arrays: dict[str, Any] = {
        "pids": items.pids,
        "camids": items.camids,
        "names": np.frombuffer(names, dtype=np.uint8),
    }
    with io.BytesIO() as archive:
        np.savez(archive, **arrays)
        file.write(archive.getbuffer())


def _write_faiss(file: _Counted, index: Any) -> None:
    import faiss

    faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def _render(facts: dict[str, Any], files: dict[str, dict[str, Any]]) -> bytes:
    manifest = {"format": FORMAT, "version": VERSION, **facts, "files": files}
    text = json.dumps({**manifest, "sha256": _digest(manifest)}, indent=2)
    return (text + "\n").encode()


def _digest(manifest: dict[str, Any]) -> str:
    """Of the manifest itself, without its own checksum."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _numbered(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if _OURS.fullmatch(path.name)]


def _next_number(folder: Path) -> int:
    """One that no file has, not even one that a killed write left."""
    numbers = [int(name.partition("-")[2][:6]) for name in _numbered(folder)]
    return max(numbers, default=0) + 1


def _remove(folder: Path, names: list[str]) -> None:
    for name in names:
        with contextlib.suppress(OSError):
            (folder / name).unlink()


# --------------------------------------------------------------------- reading


def holds_index(folder: Path) -> bool:
    """Whether there is an index, whole or damaged."""
    return (folder / MANIFEST).exists()


def read_contents(folder: Path) -> Contents:
    """Read an index, after its checksums.

    Raises:
        DataError: There is none, it is damaged, of a newer format, or no index of reidreg.
    """
    for _ in range(_ATTEMPTS - 1):
        manifest = read_manifest(folder)
        try:
            return _read(folder, manifest)
        except FileNotFoundError:
            continue  # Another process has just replaced the index, and deleted these files.
    try:
        return _read(folder, read_manifest(folder))
    except FileNotFoundError as error:
        raise _damaged(folder, f"{Path(error.filename).name} is missing") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest says, checked.

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
        raise DataError(f"{path} is no manifest of an index of reidreg")
    if not isinstance(manifest.get("version"), int) or manifest["version"] > VERSION:
        raise DataError(
            f"{folder} has format {manifest.get('version')}, this reidreg reads up to {VERSION}: "
            "upgrade reidreg"
        )
    digest = manifest.pop("sha256", None)
    if digest != _digest(manifest):
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
    except Exception as error:  # numpy and faiss raise whatever their parsers did
        raise _damaged(folder, _reason(error)) from error
    return Contents(facts, Vectors([vectors]), items, index)


def _check(folder: Path, name: str, wanted: dict[str, Any]) -> None:
    """Compare a file's size and checksum with the manifest's."""
    digest, count = hashlib.sha256(), 0
    if not _OURS.fullmatch(name):
        raise _damaged(folder, f"{MANIFEST} names {name!r}, which is no file of an index")
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
    return DataError(f"the index {folder} is damaged: {what}; build it anew")


def _reason(error: Exception) -> str:
    """What an error says, in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:100]
