"""Processes that decode images: torch's data loader, its failures, and how many to start."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from reidreg.data.images import load_images
from reidreg.distributed.lifeline import end_with_parent
from reidreg.errors import DataError
from reidreg.machine.cores import count_cores

_MOST_WORKERS = 8  # more gain nothing: they share the bandwidth of the memory
_TIMEOUT = 600  # seconds for a batch; a loader that waits for ever looks like a slow epoch


@dataclass(frozen=True)
class _Failure:
    """An error that a loading process returns as a value.

    A raised one would arrive wrapped in its traceback, and our errors are one line.
    """

    error: DataError


class BatchImages(TorchDataset[Any]):
    """Whole batches of decoded, resized images, (B, H, W, 3) uint8, by lists of indices.

    Args:
        paths: The image files.
        size: Height and width.
    """

    def __init__(self, paths: Sequence[str], size: tuple[int, int]) -> None:
        self.paths = list(paths)
        self.size = size

    def __getitem__(self, indices: list[int]) -> Tensor | _Failure:
        try:
            return load_images([self.paths[index] for index in indices], self.size)
        except DataError as error:
            return _Failure(error)


def build_loader(
    images: BatchImages, batches: Any, workers: int, pin: bool, persistent: bool = True
) -> DataLoader[Any]:
    """torch's loader of batches of images; iterate over it with `load_batches`.

    Args:
        images: The images.
        batches: The lists of indices of each batch.
        workers: Loading processes; 0 loads in this one.
        pin: Use pinned memory, for a CUDA device.
        persistent: Keep the processes from one pass to the next.
    """
    # batch_size=None: our sampler gives whole batches, and our data set takes them.
    return DataLoader(
        images,
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=persistent and workers > 0,
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
        # A separate generator: otherwise each pass draws from the global one, and a resumed run
        # would see other dropout than an uninterrupted one.
        generator=torch.Generator(),
        timeout=_TIMEOUT if workers else 0,
    )


def load_batches(loader: DataLoader[Any]) -> Iterator[Tensor]:
    """One pass over a loader, (B, H, W, 3) uint8 each.

    Raises:
        DataError: An image cannot be read, or a loading process is gone.
    """
    try:
        for images in _started(loader):
            if isinstance(images, _Failure):
                # A new error: the old one would be held by its traceback, and with it the
                # loader, whose processes would outlive the failure.
                raise DataError(str(images.error))
            yield images
    except (ConnectionError, EOFError) as error:
        # torch reports a dead process by raising from a signal handler, which may run where
        # exceptions are swallowed, such as in a log handler; then the broken pipe is what is seen.
        raise _worker_lost(str(error)) from error


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """A loader's iterator, whose processes all live.

    torch notices the death of a process once all have started. One that died before, such as by a
    signal to the process group, would be waited for until the timeout.
    """
    batches = iter(loader)
    if not all(process.is_alive() for process in getattr(batches, "_workers", ())):
        raise _worker_lost("it ended as it started")
    return batches


@contextlib.contextmanager
def loading_processes() -> Iterator[None]:
    """Turn torch's error for a dead or silent loading process into a DataError of one line.

    torch raises it from a signal handler, so anywhere in the block, also in the middle of a step.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        raise _worker_lost(str(error).splitlines()[0]) from error


def _worker_lost(reason: str) -> DataError:
    return DataError(
        f"a loading process is gone ({reason}); if memory ran out, lower --train.workers"
    )


def _unchanged(value: Any) -> Any:
    return value


def _start_worker(worker: int) -> None:
    end_with_parent()
    if hasattr(os, "setpgrp"):
        # Ctrl-C and the signal of `timeout` go to the whole process group; the run finishes its
        # step and needs its workers for that.
        os.setpgrp()
    torch.set_num_threads(1)


def count_workers(setting: int | str) -> int:
    """The number of loading processes that `train.workers` means, in each process that trains.

    auto shares the cores among the processes that torchrun started on this machine.
    """
    if isinstance(setting, int):
        return setting
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(count_cores() // local, 1), _MOST_WORKERS)
