"""Samples to batches: labels, decoding, transforms, loaders."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler as TorchSampler

from reidreg.errors import DataError
from reidreg.interfaces import Dataset, Sampler
from reidreg.lifeline import end_with_parent
from reidreg.transforms import Transform
from reidreg.values import Batch, Sample

# Crops are small; what is larger is a mistake or a bomb.
MAX_PIXELS = 50_000_000
FORMATS = ("JPEG", "PNG", "BMP", "WEBP")


@dataclass(frozen=True)
class Labels:
    """How training numbers identities and cameras: by rank among the sorted raw ids.

    Args:
        pids: The training identities; their positions are the labels.
        camids: The training cameras; their positions are the indices.
    """

    pids: tuple[int, ...]
    camids: tuple[int, ...]

    def pid_labels(self, samples: Sequence[Sample]) -> list[int]:
        """The label of each sample's identity."""
        label = {pid: position for position, pid in enumerate(self.pids)}
        return [label[sample.pid] for sample in samples]

    def camera_indices(self, samples: Sequence[Sample]) -> list[int]:
        """The index of each sample's camera, -1 for one that training did not see."""
        index = {camid: position for position, camid in enumerate(self.camids)}
        return [index.get(sample.camid, -1) for sample in samples]


def training_samples(dataset: Dataset) -> list[Sample]:
    """The training images of known identities: junk (pid -1) is left out.

    Raises:
        DataError: There are none, or of fewer than two identities.
    """
    samples = [sample for sample in dataset.train if sample.pid >= 0]
    identities = {sample.pid for sample in samples}
    if len(identities) < 2:
        raise DataError(
            f"the train split holds {len(samples)} images of {len(identities)} identities; "
            "training needs at least 2 identities"
        )
    return samples


def labels_of(samples: Sequence[Sample]) -> Labels:
    """The numbering that training with these samples uses."""
    return Labels(
        pids=tuple(sorted({sample.pid for sample in samples})),
        camids=tuple(sorted({sample.camid for sample in samples})),
    )


def statistics(samples: Sequence[Sample]) -> tuple[int, int, int]:
    """Identities, images and cameras of a split; junk and distractors count as images alone."""
    pids = {sample.pid for sample in samples if sample.pid >= 0}
    return len(pids), len(samples), len({sample.camid for sample in samples})


# --------------------------------------------------------------------- images


def read_image(path: str) -> Image.Image:
    """Decode an image file to 8-bit RGB.

    Raises:
        DataError: The file is missing, empty, truncated, not a JPEG, PNG, BMP or WebP, or larger
            than 50 million pixels.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of what we refuse, and of palettes that it converts all the same.
            warnings.simplefilter("ignore")
            return _decode(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: the image is gone") from error
    # Pillow raises these for damaged files, SyntaxError for some broken PNGs among them.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0].replace(f" '{path}'", "")
        raise DataError(f"{path}: cannot be decoded ({reason})") from error


def _decode(path: str) -> Image.Image:
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{path}: {image.width} x {image.height} pixels are no crop")
        if image.mode.startswith("I;16"):
            # convert() would clip 16 bits to white.
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


@dataclass(frozen=True)
class _Failure:
    """An error that travels from a loading process to ours as a value.

    A raised one would arrive wrapped in its traceback, and our errors are one line.
    """

    error: DataError


class _Images(TorchDataset[Any]):
    """Whole batches of transformed images, by lists of (index, seed)."""

    def __init__(self, paths: Sequence[str], transform: Transform) -> None:
        self.paths = list(paths)
        self.transform = transform

    def __getitem__(self, items: list[tuple[int, int]]) -> Tensor | _Failure:
        try:
            return torch.stack([self._view(index, seed) for index, seed in items])
        except DataError as error:
            return _Failure(error)

    def _view(self, index: int, seed: int) -> Tensor:
        # A seed for each view makes it the same in any process, in any order, after any resume.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.transform(read_image(self.paths[index]))


class _Plan(TorchSampler[list[tuple[int, int]]]):
    """The batches of an epoch that are still to come, each image with its seed."""

    def __init__(self, sampler: Sampler, seed: int) -> None:
        self.sampler = sampler
        self.seed = seed
        self.start = 0

    def batches(self) -> Iterator[list[int]]:
        for position, batch in enumerate(self.sampler):
            if position >= self.start:
                yield batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for position, batch in enumerate(self.batches(), start=self.start):
            key = np.random.SeedSequence((self.seed, self.sampler.epoch, position))
            seeds = key.generate_state(len(batch), np.uint64) >> np.uint64(1)
            yield list(zip(batch, seeds.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.sampler) - self.start


class TrainLoader:
    """Batches of a training epoch, from any step on.

    Args:
        samples: The train split.
        labels: Its numbering.
        sampler: What makes up the batches.
        transform: Image to tensor, random.
        seed: Of the transforms.
        workers: Loading processes; 0 loads in this one.
        pin: Use pinned memory, for a CUDA device.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        labels: Labels,
        sampler: Sampler,
        transform: Transform,
        *,
        seed: int,
        workers: int,
        pin: bool,
    ) -> None:
        self._pids = torch.tensor(labels.pid_labels(samples))
        self._camids = torch.tensor(labels.camera_indices(samples))
        self._plan = _Plan(sampler, seed)
        paths = [sample.path for sample in samples]
        self._loader = _loader(_Images(paths, transform), self._plan, workers, pin)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from 0, beginning with the given one.

        Raises:
            DataError: An image cannot be read.
        """
        self._plan.sampler.set_epoch(epoch)
        self._plan.start = start
        batches = zip(_passed_on(self._loader), self._plan.batches(), strict=True)
        for images, indices in batches:
            yield Batch(images, self._pids[indices], self._camids[indices])


def eval_loader(
    samples: Sequence[Sample], transform: Transform, *, batch_size: int, workers: int, pin: bool
) -> Iterator[Tensor]:
    """Images in order, (B, 3, H, W) a batch.

    Raises:
        DataError: An image cannot be read.
    """
    paths = [sample.path for sample in samples]
    items = [(index, 0) for index in range(len(paths))]
    plan = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    # Starting processes costs more than a few batches.
    workers = min(workers, len(plan)) if len(plan) > 2 else 0
    yield from _passed_on(_loader(_Images(paths, transform), plan, workers, pin, persistent=False))


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
    for images in loader:
        if isinstance(images, _Failure):
            # A new error: the old one would be held by its own traceback, and with it the loader,
            # whose processes would outlive the failure.
            raise DataError(str(images.error))
        yield images


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
        reason = str(error).splitlines()[0]
        raise DataError(
            f"a loading process is gone ({reason}); if memory ran out, lower --train.workers"
        ) from error


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
    """The number of loading processes that `train.workers` means."""
    if isinstance(setting, int):
        return setting
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, 8)
