"""Training images decoded and resized once, for all epochs and all ranks of a machine.

A cache is one uint8 array (N, H, W, 3), in one of two places.

In memory it is an anonymous file (memfd). Other processes of the same user, such as the other ranks
of a run, open it as /proc/PID/fd/FD, and the system frees it when the last of them ends, however it
ends. A lock in the cache folder lets one process build, and a notice beside it says where the
images are. On systems without memfd each process keeps a copy.

On disk it is a .npy file in the cache folder, which is moved into place when it is complete. Its
name holds a fingerprint of the images' paths, sizes and modification times and of the input's size,
so a file is never out of date; those of the same image folder and input size that no longer match
are deleted.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import socket
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from reidreg.config.sections import CacheSetting
from reidreg.data.cache_key import Wanted, cache_folder, describe_images
from reidreg.data.images import load_images
from reidreg.errors import ConfigError
from reidreg.files import PRIVATE, replacing
from reidreg.logs.console import logger
from reidreg.logs.progress import ProgressBar
from reidreg.machine.cores import count_cores
from reidreg.machine.interrupting import check_stop
from reidreg.machine.memory import GIB, available_memory, size_in_text

Pixels = NDArray[np.uint8]

_BLOCK = 32  # images that a thread decodes at a time
_SPARE = GIB  # bytes of disk that `auto` leaves free


class _Writable(Protocol):
    def write(self, content: memoryview, /) -> object: ...


class ImageCache:
    """Decoded and resized images.

    Args:
        images: (N, H, W, 3) uint8, read-only.
        descriptor: Of the anonymous file that holds them, if there is one. It is closed when this
            object is deleted; other processes cannot open the file after that.
    """

    def __init__(self, images: Pixels, descriptor: int | None = None) -> None:
        self.images = images
        if descriptor is not None:
            weakref.finalize(self, os.close, descriptor)

    def take(self, indices: Sequence[int], pin: bool = False) -> torch.Tensor:
        """Copy images out of the cache.

        Args:
            indices: Their positions.
            pin: Copy to pinned memory, for a CUDA device.

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
    """Open the cache of some images in another process's memory or on disk, or build it.

    A line of the log says where the cache is and why.

    Args:
        setting: memory, disk or none. auto is an existing cache, else memory if the images take no
            more than half of what is available, else disk if 1 GiB remains free, else none.
        paths: The image files.
        size: Height and width.

    Returns:
        The cache, or None if there is to be none.

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
                logger.info("training images: in memory already, shared (%s)", wanted.size_text)
                return shared
        if setting in ("disk", "auto"):
            kept = _open_file(wanted)
            if kept is not None:
                logger.info("training images: from %s (%s)", wanted.file, wanted.size_text)
                return kept
        choose = {"memory": _in_memory, "disk": _on_disk, "auto": _anywhere}[setting]
        return choose(wanted, notice)


# --------------------------------------------------------------------- places


def _anywhere(wanted: Wanted, notice: Path | None) -> ImageCache | None:
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
    logger.info("training images: not cached: they need %s (%s)", wanted.size_text, reason)
    return None


def _in_memory(wanted: Wanted, notice: Path | None) -> ImageCache:
    memory = available_memory()
    if memory is not None and wanted.bytes > memory:
        raise ConfigError(
            f"train.cache: the images need {wanted.size_text} of memory and {size_in_text(memory)} "
            "are available; use disk, none or a smaller --input.size"
        )
    try:
        cache = _build_in_memory(wanted, notice)
    except (OSError, MemoryError) as error:
        raise ConfigError(
            f"train.cache: no memory for {wanted.size_text} of images ({error}); use disk or none"
        ) from error
    of = "" if memory is None else f" of {size_in_text(memory)} available"
    logger.info("training images: cached in memory (%s%s)", wanted.size_text, of)
    return cache


def _build_in_memory(wanted: Wanted, notice: Path | None) -> ImageCache:
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
    _write_notice(notice, descriptor)
    return cache


def _attach(wanted: Wanted, notice: Path | None) -> ImageCache | None:
    """The images that another process of this machine holds in memory, if there is one.

    The notice may be of a process that has ended, whose number another one may have by now: so
    the name of the anonymous file is compared too.
    """
    if notice is None:
        return None
    try:
        pid, number = map(int, notice.read_text(encoding="utf-8").split())
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


def _write_notice(notice: Path, descriptor: int) -> None:
    notice.unlink(missing_ok=True)
    with open(os.open(notice, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE), "w") as file:
        file.write(f"{os.getpid()} {descriptor}")


def _memory_name(wanted: Wanted) -> str:
    return f"reidreg-{wanted.group}-{wanted.fingerprint}"


def _mapped(descriptor: int, wanted: Wanted) -> mmap.mmap:
    return mmap.mmap(descriptor, wanted.bytes, access=mmap.ACCESS_READ)


def _as_images(memory: mmap.mmap, wanted: Wanted) -> Pixels:
    return np.frombuffer(memory, dtype=np.uint8).reshape(wanted.shape)


def _on_disk(wanted: Wanted, notice: Path | None) -> ImageCache:
    folder = cache_folder()
    try:
        _delete_outdated(wanted)  # first: they may be what fills the disk
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
            f"train.cache: no room for {wanted.size_text} of images in {folder} "
            f"({error.strerror or error}); free some, set REIDREG_CACHE to another folder, or use "
            "--train.cache none"
        ) from error
    if cache is None:
        raise ConfigError(f"train.cache: {wanted.file} was changed while it was written; try again")
    logger.info("training images: cached in %s (%s)", wanted.file, wanted.size_text)
    return cache


def _open_file(wanted: Wanted) -> ImageCache | None:
    try:
        images = np.load(wanted.file, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError):
        return None
    if images.shape != wanted.shape or images.dtype != np.uint8:
        return None
    return ImageCache(images)


def _delete_outdated(wanted: Wanted) -> None:
    """Delete cache files of the same images in earlier states, and unfinished ones."""
    for pattern in (f"{wanted.group}-*.npy", f".{wanted.group}-*.partial"):
        for path in cache_folder().glob(pattern):
            path.unlink(missing_ok=True)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _one_builder(wanted: Wanted) -> Iterator[Path | None]:
    """Let one process at a time of this machine look for, or build, caches of a group.

    Yields:
        The notice, a file that says which process holds the images in memory, as "PID FD"; None
        where nothing can be locked, as in a folder that is read-only or, with some network file
        systems, has no locks.
    """
    try:
        place = _made(cache_folder()) / f".{wanted.group}-{socket.gethostname()}"
        lock = FileLock(f"{place}.lock", mode=PRIVATE)
        _wait_for(lock)
    except (NotImplementedError, OSError):
        yield None
        return
    try:
        yield Path(f"{place}.holder")
    finally:
        lock.release()


def _wait_for(lock: FileLock) -> None:
    seconds = 0.0
    while not lock.is_locked:
        try:
            lock.acquire(timeout=seconds)
        except Timeout:
            if not seconds:
                logger.info("training images: another process is building the cache; waiting")
            check_stop()
            seconds = 0.5


# --------------------------------------------------------------------- building


def _build(wanted: Wanted, target: _Writable) -> None:
    """Decode all images on all cores and write their pixels in order."""
    blocks = [wanted.paths[i : i + _BLOCK] for i in range(0, len(wanted.paths), _BLOCK)]
    cores = count_cores()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # in each of the pool's threads
    pool = ThreadPoolExecutor(cores)
    try:
        with ProgressBar("caching images", len(wanted.paths)) as bar:
            # Only a few blocks ahead: decoded ones wait in memory until they are written.
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
    """Write all of the content: an unbuffered file may take less at a time."""
    while content:
        written = target.write(content)
        content = content[written if isinstance(written, int) else len(content) :]
