"""Samples to batches on the device, for training and for evaluation."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Sampler as TorchSampler

from reidreg.config.sections import CacheSetting
from reidreg.data.image_cache import ImageCache, open_image_cache
from reidreg.data.labels import Labels
from reidreg.data.transforms import Augmentation
from reidreg.data.workers import BatchImages, build_loader, load_batches
from reidreg.logs.step_phases import NO_LISTENER, StepListener
from reidreg.parts.interfaces import Sampler
from reidreg.values import Batch, Sample

# --------------------------------------------------------------------- training


class TrainLoader:
    """Augmented batches of a training epoch on the device, from any step on.

    A batch depends on the seed, the epoch and its position alone: not on the number of loading
    processes, the cache, the device, or the number of ranks. Each rank draws the views of the
    whole global batch and takes its share of them.

    Args:
        samples: The train split.
        labels: Its labels and camera indices.
        sampler: The indices of this rank's batches.
        augmentation: The random views.
        seed: Of the views.
        device: Where the batches go.
        workers: Loading processes; 0 loads in this one. With a cache there are none.
        cache: Where decoded images are kept, as `open_image_cache` takes it.
        rank: The rank of this process.
        world_size: How many processes train.
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
        self._index_batches = _EpochBatches(sampler)
        self._augmentation = augmentation
        self._seed = seed
        self._device = device
        self._workers = workers
        self._cache_setting = cache
        self._rank, self._world_size = rank, world_size
        self._cache: ImageCache | None = None
        self._loader: DataLoader[Any] | None = None

    def prepare(self) -> None:
        """Fill the cache, or build the loader; a second call does nothing.

        Raises:
            ConfigError: There is no room for it.
            DataError: An image cannot be read.
        """
        if self._cache is not None or self._loader is not None:
            return
        size = self._augmentation.config.size
        self._cache = open_image_cache(self._cache_setting, self._paths, size)
        if self._cache is None:
            images = BatchImages(self._paths, size)
            pin = self._device.type == "cuda"
            self._loader = build_loader(images, self._index_batches, self._workers, pin)

    @property
    def workers(self) -> int:
        """How many processes load; known once the loader is prepared."""
        return self._workers if self._cache is None else 0

    def pids_of(self, indices: Sequence[int]) -> Tensor:
        """The labels (B,) of training images."""
        return self._pids[list(indices)]

    def epoch(
        self, epoch: int, start: int = 0, listener: StepListener = NO_LISTENER
    ) -> Iterator[Batch]:
        """The batches of an epoch.

        Args:
            epoch: Its number, from 0.
            start: The position of the first batch.
            listener: Called when a batch goes to the device; not for a CUDA device, where that
                overlaps with the step before.

        Raises:
            ConfigError: There is no room for the cache.
            DataError: An image cannot be read.
        """
        self.prepare()
        self._index_batches.sampler.set_epoch(epoch)
        self._index_batches.start = start
        if self._device.type == "cuda":
            return _prefetch(self._batches(epoch, start, NO_LISTENER), self._stream, self._device)
        return self._batches(epoch, start, listener)

    @functools.cached_property
    def _stream(self) -> torch.cuda.Stream:
        """The stream that batches are made on, of a CUDA device.

        One for all epochs: the allocator caches blocks per stream, and streams come from a pool
        of 32; a stream per epoch would soon hold the blocks of all of them.
        """
        stream: torch.cuda.Stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return stream

    def _batches(self, epoch: int, start: int, listener: StepListener) -> Iterator[Batch]:
        loaded = zip(self._pixels(), self._index_batches, strict=True)
        for position, (images, indices) in enumerate(loaded, start=start):
            listener.begin("host to device")
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
            yield from load_batches(self._loader)
        else:
            for indices in self._index_batches:
                yield self._cache.take(indices, pin=self._device.type == "cuda")

    def _to_device(self, ids: Tensor) -> Tensor:
        if self._device.type == "cuda":  # from pinned memory, without waiting
            ids = ids.pin_memory()
        return ids.to(self._device, non_blocking=True)


class _EpochBatches(TorchSampler[list[int]]):
    """The index lists of an epoch's batches, from `start` on."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.start = 0

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(self.sampler, self.start, None)

    def __len__(self) -> int:
        return len(self.sampler) - self.start


def _prefetch(
    batches: Iterator[Batch], stream: torch.cuda.Stream, device: torch.device
) -> Iterator[Batch]:
    """Make each batch on a CUDA device while the step before it still computes.

    Copies and augmentation are queued on a separate stream; the host waits for neither.
    """
    ready: tuple[Batch, torch.cuda.Event] | None = None
    while True:
        with torch.cuda.stream(stream):
            batch = next(batches, None)
            made = stream.record_event()
        if ready is not None:
            yield _for_current_stream(*ready, device)
        if batch is None:
            return
        ready = (batch, made)


def _for_current_stream(batch: Batch, made: torch.cuda.Event, device: torch.device) -> Batch:
    """Let the current stream use a batch that was made on another one."""
    current = torch.cuda.current_stream(device)
    current.wait_event(made)
    for tensor in (batch.images, batch.pids, batch.camids):
        # Keeps the allocator from reusing its memory before the current stream is done with it.
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
    images = BatchImages([sample.path for sample in samples], size)
    indices = range(len(samples))
    batches = [list(indices[i : i + batch_size]) for i in indices[::batch_size]]
    # Starting processes costs more than loading a few batches.
    workers = min(workers, len(batches)) if len(batches) > 2 else 0
    for batch in load_batches(build_loader(images, batches, workers, pin, persistent=False)):
        yield batch.permute(0, 3, 1, 2)
