"""Training images that are decoded and resized once, for every epoch and process of a machine.

They are one array (N, H, W, 3) of 8-bit pixels, in one of two places.

In memory it is an anonymous file without a name in any folder: other processes of the same user,
such as the other ranks of a run, open it as /proc/PID/fd/FD, and when the last of them ends,
however it ends, the system takes it back. A lock file in the cache folder lets one process build,
and tells the others where the images are. Systems without such files keep a copy in each process.

On disk it is a .npy file in the cache folder, which appears only when it is whole. Its name holds
a fingerprint of the images' paths, sizes and times of change and of the input's size, so a file
is never out of date; those of the same folder and input size that no longer match are deleted.

The folder is `images` in $REIDREG_CACHE, else in $XDG_CACHE_HOME/reidreg, else in
~/.cache/reidreg.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import socket
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from reidreg.config.sections import CacheSetting
from reidreg.data.images import load_images
from reidreg.errors import ConfigError, DataError
from reidreg.files import PRIVATE, replacing
from reidreg.logs.console import logger
from reidreg.logs.progress import ProgressBar
from reidreg.machine.cores import count_cores
from reidreg.machine.memory import GIB, available_memory, size_in_text

Pixels = NDArray[np.uint8]

_BLOCK = 32  # images that a thread decodes at a time
_SPARE = GIB  # bytes of a disk that `auto` leaves free


class _Writable(Protocol):
    def write(self, content: memoryview, /) -> object: ...


class ImageCache:
    """Decoded and resized images.

    Args:
        images: (N, H, W, 3) uint8, not to be written to.
        descriptor: Of the anonymous file that holds them, if one does; it is closed when this
            object goes, and others cannot open the file any more.
    """

    def __init__(self, images: Pixels, descriptor: int | None = None) -> None:
        self.images = images
        if descriptor is not None:
            weakref.finalize(self, os.close, descriptor)

    def take(self, indices: Sequence[int], pin: bool = False) -> torch.Tensor:
        """Copies of images.

        Args:
            indices: Which ones.
            pin: Copy them to pinned memory, for a CUDA device.

        Returns:
            (B, H, W, 3) uint8.
        """
        taken = torch.empty(len(indices), *self.images.shape[1:], dtype=torch.uint8, pin_memory=pin)
        # Any mode but `raise` lets numpy write into `out` directly.
        np.take(self.images, indices, axis=0, out=taken.numpy(), mode="clip")
        return taken


def open_image_cache(
    setting: CacheSetting, paths: Sequence[str], size: tuple[int, int]
) -> ImageCache | None:
    """The images, from another process or a file if they are there, else made now.

    A line of the log says where they are and why.

    Args:
        setting: Where they are kept: memory, disk or none. auto is what is there already, else
            memory if they take no more than half of what is available, else disk if 1 GiB remains
            free, else none.
        paths: The image files.
        size: Height and width.

    Returns:
        The cache, or None without one.

    Raises:
        ConfigError: There is not enough memory, or not enough room on the disk, for this setting.
        DataError: An image cannot be read.
    """
    if setting == "none":
        return None
    wanted = describe_images(paths, size)
    with _one_builder(wanted) as notice:
        if setting in ("memory", "auto"):
            shared = _attach(wanted, notice)
            if shared is not None:
                logger.info("training images: in memory already, shared (%s)", wanted.shown)
                return shared
        if setting in ("disk", "auto"):
            kept = _open_file(wanted)
            if kept is not None:
                logger.info("training images: from %s (%s)", wanted.file, wanted.shown)
                return kept
        choose = {"memory": _in_memory, "disk": _on_disk, "auto": _anywhere}[setting]
        return choose(wanted, notice)


# --------------------------------------------------------------------- what is wanted


@dataclass(frozen=True)
class Wanted:
    """The images that a cache is to hold.

    Args:
        paths: Their files.
        size: Height and width.
        group: What caches of the same folder and input size have in common.
        fingerprint: What changes with any of the files.
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
    def shown(self) -> str:
        return size_in_text(self.bytes)

    @property
    def file(self) -> Path:
        return cache_folder() / f"{self.group}-{self.fingerprint}.npy"


def describe_images(paths: Sequence[str], size: tuple[int, int]) -> Wanted:
    """Fingerprint images by path, size and time of change.

    Raises:
        DataError: One is gone.
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
    """Where image caches are."""
    own = os.environ.get("REIDREG_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(own) if own else Path(shared) / "reidreg").expanduser() / "images"


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


# --------------------------------------------------------------------- places


def _anywhere(wanted: Wanted, notice: IO[str] | None) -> ImageCache | None:
    memory = available_memory()
    if memory is not None and wanted.bytes <= memory // 2:
        return _in_memory(wanted, notice)
    short = "an unknown amount of memory" if memory is None else f"{size_in_text(memory)} of memory"
    try:
        room = shutil.disk_usage(_made(cache_folder())).free
        if wanted.bytes + _SPARE <= room:
            logger.info("training images: too many for half of %s that is available", short)
            return _on_disk(wanted, notice)
        reason = f"{short} and {size_in_text(room)} of disk in {cache_folder()} are available"
    except (OSError, ConfigError) as error:
        reason = str(error)
    logger.info("training images: not cached, for they need %s (%s)", wanted.shown, reason)
    return None


def _in_memory(wanted: Wanted, notice: IO[str] | None) -> ImageCache:
    memory = available_memory()
    if memory is not None and wanted.bytes > memory:
        raise ConfigError(
            f"train.cache: the images need {wanted.shown} of memory and {size_in_text(memory)} are "
            "available; use disk, none or a smaller --input.size"
        )
    try:
        cache = _build_in_memory(wanted, notice)
    except (OSError, MemoryError) as error:
        raise ConfigError(
            f"train.cache: no memory for {wanted.shown} of images ({error}); use disk or none"
        ) from error
    of = "" if memory is None else f" of {size_in_text(memory)} available"
    logger.info("training images: cached in memory (%s%s)", wanted.shown, of)
    return cache


def _build_in_memory(wanted: Wanted, notice: IO[str] | None) -> ImageCache:
    if not hasattr(os, "memfd_create") or notice is None:
        alone = mmap.mmap(-1, wanted.bytes)
        _build(wanted, alone)
        return ImageCache(_as_images(alone, wanted))
    descriptor = os.memfd_create(_memory_name(wanted))
    try:
        with open(descriptor, "wb", buffering=0, closefd=False) as file:
            _build(wanted, file)
        cache = ImageCache(_as_images(_mapped(descriptor, wanted), wanted), descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    notice.seek(0)
    notice.truncate()
    notice.write(f"{os.getpid()} {descriptor}")
    notice.flush()
    return cache


def _attach(wanted: Wanted, notice: IO[str] | None) -> ImageCache | None:
    """The images that another process of this machine holds in memory, if one does.

    The notice may be of another machine, or of a process that has ended: its number may be
    another's by now, so the file's name has to be ours too.
    """
    if notice is None:
        return None
    notice.seek(0)
    try:
        pid, number = map(int, notice.read().split())
        path = f"/proc/{pid}/fd/{number}"
        if os.readlink(path) != f"/memfd:{_memory_name(wanted)} (deleted)":
            return None
        descriptor = os.open(path, os.O_RDONLY)
    except (OSError, ValueError):
        return None
    try:
        return ImageCache(_as_images(_mapped(descriptor, wanted), wanted), descriptor)
    except (OSError, ValueError):
        os.close(descriptor)
        return None


def _memory_name(wanted: Wanted) -> str:
    return f"reidreg-{wanted.group}-{wanted.fingerprint}"


def _mapped(descriptor: int, wanted: Wanted) -> mmap.mmap:
    return mmap.mmap(descriptor, wanted.bytes, access=mmap.ACCESS_READ)


def _as_images(memory: mmap.mmap, wanted: Wanted) -> Pixels:
    return np.frombuffer(memory, dtype=np.uint8).reshape(wanted.shape)


def _on_disk(wanted: Wanted, notice: IO[str] | None) -> ImageCache:
    folder = cache_folder()
    try:
        _forget(wanted)  # first, for they may be what fills the disk
        room = shutil.disk_usage(_made(folder)).free
        if wanted.bytes > room:
            raise OSError(f"{size_in_text(room)} are free")
        with replacing(wanted.file, PRIVATE) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": wanted.shape}
            np.lib.format.write_array_header_1_0(file, header)
            _build(wanted, file)
        cache = _open_file(wanted)
    except OSError as error:
        raise ConfigError(
            f"train.cache: no room for {wanted.shown} of images in {folder} "
            f"({error.strerror or error}); free some, set REIDREG_CACHE to another folder, or use "
            "--train.cache none"
        ) from error
    if cache is None:
        raise ConfigError(f"train.cache: {wanted.file} was changed as it was written; try again")
    logger.info("training images: cached in %s (%s)", wanted.file, wanted.shown)
    return cache


def _open_file(wanted: Wanted) -> ImageCache | None:
    try:
        images = np.load(wanted.file, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError):
        return None
    if images.shape != wanted.shape or images.dtype != np.uint8:
        return None
    return ImageCache(images)


def _forget(wanted: Wanted) -> None:
    """Delete the files that images of the same folder had before they changed."""
    for pattern in (f"{wanted.group}-*.npy", f".{wanted.group}-*.partial"):
        for path in cache_folder().glob(pattern):
            path.unlink(missing_ok=True)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _one_builder(wanted: Wanted) -> Iterator[IO[str] | None]:
    """Let one process at a time of this machine look for, or make, caches of a group.

    Yields:
        The notice: a file that says which process holds the images in memory, as "PID FD"; or None
        on a system, or in a folder, where there are no locks.
    """
    try:
        import fcntl

        path = _made(cache_folder()) / f".{wanted.group}-{socket.gethostname()}.lock"
        file = open(os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE), "r+", encoding="utf-8")
    except (ImportError, OSError):
        yield None
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("training images: another process is making the cache; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # some network file systems have no locks
            yield None
            return
        yield file


# --------------------------------------------------------------------- making


def _build(wanted: Wanted, target: _Writable) -> None:
    """Write the pixels of all images, in order, decoded on every core."""
    blocks = [wanted.paths[i : i + _BLOCK] for i in range(0, len(wanted.paths), _BLOCK)]
    cores = count_cores()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of torch's own in each of ours
    pool = ThreadPoolExecutor(cores)
    try:
        with ProgressBar("caching images", len(wanted.paths)) as bar:
            # A few blocks ahead, and no more: what is decoded waits in memory to be written.
            ahead = 2 * cores
            pending = [pool.submit(load_images, block, wanted.size) for block in blocks[:ahead]]
            for place in range(len(blocks)):
                images = pending.pop(0).result()
                if place + ahead < len(blocks):
                    pending.append(pool.submit(load_images, blocks[place + ahead], wanted.size))
                _write(target, images.numpy().data.cast("B"))
                bar.advance(len(images))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _write(target: _Writable, content: memoryview) -> None:
    """Write all of it: unbuffered files may take less at a time."""
    while content:
        written = target.write(content)
        content = content[written if isinstance(written, int) else len(content) :]
