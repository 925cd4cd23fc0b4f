"""Samples to batches on the device: loading and views."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler as TorchSampler

from reidreg.config.sections import CacheSetting
from reidreg.data.image_cache import ImageCache, open_image_cache
from reidreg.data.images import load_images
from reidreg.data.labels import Labels
from reidreg.data.transforms import Augmentation
from reidreg.distributed.lifeline import end_with_parent
from reidreg.errors import DataError
from reidreg.logs.step_phases import UNHEARD, Phases
from reidreg.machine.cores import count_cores
from reidreg.parts.interfaces import Sampler
from reidreg.values import Batch, Sample

_MOST_WORKERS = 8  # more only wait for each other's memory


# --------------------------------------------------------------------- training


class TrainLoader:
    """Augmented batches of a training epoch on the device, from any step on.

    What a batch looks like depends on the seed, the epoch and its position alone: not on how many
    processes load, where images are cached, the device, or how many processes train. Those that
    train together draw the views of the whole global batch and each takes its own share.

    Args:
        samples: The train split.
        labels: Its numbering.
        sampler: What makes up the batches of this process.
        augmentation: How images are looked at.
        seed: Of the views.
        device: Where the batches go.
        workers: Loading processes; 0 loads in this one. With a cache there are none.
        cache: Where decoded images are kept, as `open_image_cache` takes it.
        rank: Which of the processes that train together this is.
        world_size: How many train together.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        labels: Labels,
        sampler: Sampler,
        augmentation: Augmentation,
        *,
        seed: int,
        device: torch.device,
        workers: int,
        cache: CacheSetting = "none",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._paths = [sample.path for sample in samples]
        self._pids = torch.tensor(labels.pid_labels(samples))
        self._camids = torch.tensor(labels.camera_indices(samples))
        self._plan = _Plan(sampler)
        self._augmentation = augmentation
        self._seed = seed
        self._device = device
        self._workers = workers
        self._cache_setting = cache
        self._rank, self._world_size = rank, world_size
        self._cache: ImageCache | None = None
        self._loader: DataLoader[Any] | None = None

    def prepare(self) -> None:
        """Fill the cache, if there is to be one; a second call changes nothing.

        Raises:
            ConfigError: There is no room for it.
            DataError: An image cannot be read.
        """
        if self._cache is not None or self._loader is not None:
            return
        size = self._augmentation.config.size
        self._cache = open_image_cache(self._cache_setting, self._paths, size)
        if self._cache is None:
            images = _Images(self._paths, size)
            pin = self._device.type == "cuda"
            self._loader = _loader(images, self._plan, self._workers, pin)

    @property
    def workers(self) -> int:
        """How many processes load, as is known once the loader is prepared."""
        return self._workers if self._cache is None else 0

    def pids_of(self, indices: Sequence[int]) -> Tensor:
        """The labels (B,) of training images."""
        return self._pids[list(indices)]

    def epoch(self, epoch: int, start: int = 0, phases: Phases = UNHEARD) -> Iterator[Batch]:
        """The batches of an epoch, from 0, beginning with the given one.

        Args:
            epoch: Which one.
            start: The position of the first batch.
            phases: Told when a batch goes to the device; not of a CUDA device, where that happens
                beside the step before.

        Raises:
            ConfigError: There is no room for the cache.
            DataError: An image cannot be read.
        """
        self.prepare()
        self._plan.sampler.set_epoch(epoch)
        self._plan.start = start
        if self._device.type == "cuda":
            return _one_ahead(self._batches(epoch, start, UNHEARD), self._stream, self._device)
        return self._batches(epoch, start, phases)

    @functools.cached_property
    def _stream(self) -> torch.cuda.Stream:
        """Where batches are made on a CUDA device.

        One for all epochs: torch keeps freed memory for the stream that it was used on, and with
        another stream for each epoch would soon keep that of 32.
        """
        stream: torch.cuda.Stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return stream

    def _batches(self, epoch: int, start: int, phases: Phases) -> Iterator[Batch]:
        pixels = zip(self._pixels(), self._plan, strict=True)
        for position, (images, indices) in enumerate(pixels, start=start):
            phases.begin("host to device")
            count = len(indices)
            key = (self._seed, epoch, position)
            views = self._augmentation.draw(count * self._world_size, key)
            own = views[self._rank * count : (self._rank + 1) * count]
            on_device = images.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
            yield Batch(
                self._augmentation(on_device, own),
                self._to_device(self._pids[indices]),
                self._to_device(self._camids[indices]),
            )

    def _pixels(self) -> Iterator[Tensor]:
        """The batches' images on the host, (B, H, W, 3) uint8."""
        if self._cache is None:
            assert self._loader is not None
            yield from _passed_on(self._loader)
        else:
            for indices in self._plan:
                yield self._cache.take(indices, pin=self._device.type == "cuda")

    def _to_device(self, ids: Tensor) -> Tensor:
        if self._device.type == "cuda":  # from pinned memory, without waiting
            ids = ids.pin_memory()
        return ids.to(self._device, non_blocking=True)


class _Plan(TorchSampler[list[int]]):
    """The batches of an epoch that are still to come."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.start = 0

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(self.sampler, self.start, None)

    def __len__(self) -> int:
        return len(self.sampler) - self.start


def _one_ahead(
    batches: Iterator[Batch], stream: torch.cuda.Stream, device: torch.device
) -> Iterator[Batch]:
    """Batches that are brought to a CUDA device while the step before still computes.

    Copies and augmentation go to a stream of their own; the host waits for neither.
    """
    waiting: tuple[Batch, torch.cuda.Event] | None = None
    while True:
        with torch.cuda.stream(stream):
            batch = next(batches, None)
            made = stream.record_event()
        if waiting is not None:
            yield _handed_over(*waiting, device)
        if batch is None:
            return
        waiting = (batch, made)


def _handed_over(batch: Batch, made: torch.cuda.Event, device: torch.device) -> Batch:
    """A batch that the current stream may use, made on another."""
    current = torch.cuda.current_stream(device)
    current.wait_event(made)
    for tensor in (batch.images, batch.pids, batch.camids):
        # Its memory is not to be used again by the other stream before this one is done with it.
        tensor.record_stream(current)
    return batch


# --------------------------------------------------------------------- evaluation


def eval_loader(
    samples: Sequence[Sample],
    size: tuple[int, int],
    *,
    batch_size: int,
    workers: int,
    pin: bool,
) -> Iterator[Tensor]:
    """Images in order, a batch at a time, (B, 3, H, W) uint8 in channels_last on the host.

    Args:
        samples: The images.
        size: Height and width.
        batch_size: Images in a batch; the last may have fewer.
        workers: Loading processes; 0 loads in this one.
        pin: Use pinned memory, for a CUDA device.

    Raises:
        DataError: An image cannot be read.
    """
    images = _Images([sample.path for sample in samples], size)
    indices = range(len(samples))
    plan = [list(indices[i : i + batch_size]) for i in indices[::batch_size]]
    # Starting processes costs more than a few batches.
    workers = min(workers, len(plan)) if len(plan) > 2 else 0
    for batch in _passed_on(_loader(images, plan, workers, pin, persistent=False)):
        yield batch.permute(0, 3, 1, 2)


# --------------------------------------------------------------------- loading processes


@dataclass(frozen=True)
class _Failure:
    """An error that travels from a loading process to ours as a value.

    A raised one would arrive wrapped in its traceback, and our errors are one line.
    """

    error: DataError


class _Images(TorchDataset[Any]):
    """Whole batches of decoded, resized images, (B, H, W, 3) uint8, by lists of indices."""

    def __init__(self, paths: Sequence[str], size: tuple[int, int]) -> None:
        self.paths = list(paths)
        self.size = size

    def __getitem__(self, indices: list[int]) -> Tensor | _Failure:
        try:
            return load_images([self.paths[index] for index in indices], self.size)
        except DataError as error:
            return _Failure(error)


def _loader(
    images: _Images, plan: Any, workers: int, pin: bool, persistent: bool = True
) -> DataLoader[Any]:
    # batch_size=None: our sampler gives batches, our data set takes them whole.
    return DataLoader(
        images,
        sampler=plan,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=persistent and workers > 0,
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
        # Its own generator: otherwise each pass draws from the global one, and a resumed run
        # would see other dropout than an uninterrupted one.
        generator=torch.Generator(),
        # A loader that waits for ever on a lost disk looks like a slow epoch.
        timeout=600 if workers else 0,
    )


def _passed_on(loader: DataLoader[Any]) -> Iterator[Tensor]:
    try:
        for images in loader:
            if isinstance(images, _Failure):
                # A new error: the old one would be held by its own traceback, and with it the
                # loader, whose processes would outlive the failure.
                raise DataError(str(images.error))
            yield images
    except (ConnectionError, EOFError) as error:
        # torch tells of a dead process by a signal, which may fall where errors are not passed on,
        # such as in a log handler.
        raise _gone(str(error)) from error


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
        raise _gone(str(error).splitlines()[0]) from error


def _gone(reason: str) -> DataError:
    return DataError(
        f"a loading process is gone ({reason}); if memory ran out, lower --train.workers"
    )


def _unchanged(value: Any) -> Any:
    return value


def _start_worker(worker: int) -> None:
    end_with_parent()
    if hasattr(os, "setpgrp"):
        # Ctrl-C goes to the whole process group, and so does what `timeout` sends; the run
        # finishes its step and needs its workers for that.
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
