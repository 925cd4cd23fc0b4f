"""Images to features: a model with the preprocessing, the device and the arithmetic it runs in."""

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
from reidreg.logs.console import ProgressBar
from reidreg.machine.devices import autocast, choose_device, choose_precision, current
from reidreg.model.model import Model
from reidreg.values import Embeddings, Sample


@dataclass(frozen=True)
class Embedder:
    """A model with all that turns image files into features.

    Args:
        model: The model.
        labels: The numbering it was trained with.
        input: Size, mean and std of its input, and whether mirror images count too.
        device: Where it runs.
        dtype: In which arithmetic.
        batch_size: Images at a time.
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
        """What makes pixels the model's input."""
        if self.input.mean is None or self.input.std is None:
            raise ValueError("the input's mean and std are resolved by resolve_input")
        return Normalisation(self.input.mean, self.input.std)

    def embed(self, samples: Sequence[Sample], what: str) -> Embeddings:
        """The features of images, in order, on the CPU.

        Several processes share the work. The first returns the features of all images, the others
        those that they made themselves.

        Args:
            samples: The images.
            what: What they are, for the progress bar and errors.

        Raises:
            DataError: There are none, or one cannot be read.
        """
        if not samples:
            raise DataError(f"{what}: there are no images to extract features of")
        everything, samples = samples, samples[world().share(len(samples))]
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
        with loading_processes(), current(self.device), ProgressBar(what, len(samples)) as bar:
            for images in batches:
                span = slice(done, done + len(images))
                found = self.features(images, camids[span])
                if not done:
                    # The features in one piece from the start, so that none is copied.
                    features = torch.empty(len(samples), found.shape[1])
                features[span] = found
                done += len(images)
                bar.advance(len(images))
        self.model.train(training)
        if world().is_main:
            samples = everything
        return embeddings_of(samples, collect_rows(features, len(everything)))

    @torch.inference_mode()
    def features(self, images: Tensor, camids: Tensor | None = None) -> Tensor:
        """The features of a batch, by a model that is in evaluation mode.

        With `flip_test` a feature is the mean of those of the image and of its mirror image. They
        are averaged as the model gives them, not divided by their norms first: a feature then
        keeps its scale, which the squared Euclidean distance sees, and the ranking normalises it
        where the metric is cosine.

        Args:
            images: (B, 3, H, W) uint8 in RGB, of the input's size, anywhere.
            camids: (B,) camera indices, or None for unknown ones.

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
    """Features (N, D) with the ids and paths of their samples."""
    return Embeddings(
        features,
        torch.tensor([sample.pid for sample in samples], dtype=torch.int64),
        torch.tensor([sample.camid for sample in samples], dtype=torch.int64),
        tuple(sample.path for sample in samples),
    )


def make_embedder(model: Model, labels: Labels, config: Config) -> Embedder:
    """The embedder of a model, as `train` and `input` say; the model moves to the device."""
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
    """The input's options with the backbone's normalisation where none is given."""
    return replace(
        config,
        mean=config.mean or model.backbone.mean,
        std=config.std or model.backbone.std,
    )
