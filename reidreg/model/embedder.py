"""Images to features: a model with its preprocessing, device and precision."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reidreg.config.sections import Config, InputConfig
from reidreg.data.labels import Labels
from reidreg.data.loading import eval_loader
from reidreg.data.transforms import Normalisation
from reidreg.data.workers import count_workers, loading_processes
from reidreg.distributed.group import collect_rows, world
from reidreg.errors import DataError
from reidreg.logs.progress import ProgressBar
from reidreg.machine.devices import autocast, choose_device, choose_precision, on_device
from reidreg.model.model import Model
from reidreg.values import Embeddings, Sample


@dataclass(frozen=True)
class Embedder:
    """A model with everything that turns image files into features.

    Args:
        model: The model.
        labels: The identities and cameras it was trained with.
        input: Size, mean and std of its input, and whether to average with mirror images.
        device: The device it runs on.
        dtype: The precision it runs in.
        batch_size: Images in a batch.
        workers: Loading processes.
    """

    model: Model
    labels: Labels
    input: InputConfig
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    workers: int

    @functools.cached_property
    def normalisation(self) -> Normalisation:
        """The normalisation of the model's input."""
        if self.input.mean is None or self.input.std is None:
            raise ValueError("mean and std of the input are not resolved; use resolve_input")
        return Normalisation(self.input.mean, self.input.std)

    def embed(self, samples: Sequence[Sample], what: str) -> Embeddings:
        """The features of images, in order, on the CPU.

        All ranks share the work. Rank 0 returns the features of all images, every other rank those
        of its own share.

        Args:
            samples: The images.
            what: What they are called in the progress bar and in errors.

        Raises:
            DataError: There are none, or one cannot be read.
        """
        if not samples:
            raise DataError(f"{what}: there are no images to extract features of")
        all_samples, samples = samples, samples[world().share(len(samples))]
        camids = torch.tensor(self.labels.camera_indices(samples))
        training = self.model.training
        self.model.eval()
        features, done = torch.empty(0), 0
        batches = eval_loader(
            samples,
            self.input.size,
            batch_size=self.batch_size,
            workers=self.workers,
            pin=self.device.type == "cuda",
        )
        with (
            loading_processes(),
            on_device(self.device),
            ProgressBar(what, len(samples)) as bar,
        ):
            for images in batches:
                span = slice(done, done + len(images))
                found = self.features(images, camids[span])
                if not done:
                    # Allocated once for all batches, so that none is copied again.
                    features = torch.empty(len(samples), found.shape[1])
                features[span] = found
                done += len(images)
                bar.advance(len(images))
        self.model.train(training)
        if world().is_main:
            samples = all_samples
        return embeddings_of(samples, collect_rows(features, len(all_samples)))

    @torch.inference_mode()
    def features(self, images: Tensor, camids: Tensor | None = None) -> Tensor:
        """The features of a batch; the model has to be in evaluation mode.

        With `flip_test` a feature is the mean of those of the image and of its mirror image. They
        are averaged without normalising them first: the feature keeps its scale, on which the
        squared Euclidean distance depends, and for cosine the ranking normalises it.

        Args:
            images: (B, 3, H, W) uint8 in RGB, of the input's size, on any device.
            camids: (B,) camera indices, or None where all are unknown.

        Returns:
            (B, D) float32 on the CPU.
        """
        cuda = self.device.type == "cuda"  # from pinned memory, without waiting
        images = self.normalisation(images.to(self.device, non_blocking=cuda))
        if camids is not None:
            camids = camids.to(self.device)
        with autocast(self.device, self.dtype):
            found: Tensor = self.model(images, camids).embeddings.float()
            if self.input.flip_test:
                mirrored = self.model(images.flip(-1), camids).embeddings.float()
                found = (found + mirrored) / 2
        return found.cpu()


def embeddings_of(samples: Sequence[Sample], features: Tensor) -> Embeddings:
    """Features (N, D) with the pids, camids and paths of their samples."""
    return Embeddings(
        features,
        torch.tensor([sample.pid for sample in samples], dtype=torch.int64),
        torch.tensor([sample.camid for sample in samples], dtype=torch.int64),
        tuple(sample.path for sample in samples),
    )


def make_embedder(model: Model, labels: Labels, config: Config) -> Embedder:
    """The embedder of a model as configured in `train` and `input`; moves it to the device."""
    device = choose_device(config.train.device)
    return Embedder(
        model=model.to(device=device, memory_format=torch.channels_last),  # type: ignore[call-overload]
        labels=labels,
        input=resolve_input(config.input, model),
        device=device,
        dtype=choose_precision(config.train.precision, device),
        batch_size=config.train.eval_batch_size,
        workers=count_workers(config.train.workers),
    )


def resolve_input(config: InputConfig, model: Model) -> InputConfig:
    """The section `input`, with the backbone's mean and std where none are given."""
    return replace(
        config,
        mean=config.mean or model.backbone.mean,
        std=config.std or model.backbone.std,
    )
