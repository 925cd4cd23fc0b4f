"""The values that parts exchange: frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

JUNK = -1  # the pid of images that evaluation leaves out


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a data set.

    Args:
        path: The image's file.
        pid: The identity; `JUNK` (-1) is left out of evaluation.
        camid: The camera.
    """

    path: str
    pid: int
    camid: int


@dataclass(frozen=True, slots=True)
class Batch:
    """The input of one training step.

    Args:
        images: (B, 3, H, W) float, normalised.
        pids: (B,) int64, class labels 0..num_classes-1.
        camids: (B,) int64, camera indices 0..num_cameras-1.
    """

    images: Tensor
    pids: Tensor
    camids: Tensor


@dataclass(frozen=True, slots=True)
class Output:
    """What a model returns for a batch.

    Args:
        features: (B, D) the pooled features before the neck, used by metric losses.
        embeddings: (B, E) what retrieval compares.
        logits: (B, num_classes), or None if the head has no classifier.
        branches: (output, weight) pairs of a head with several branches. Each loss is applied to
            every branch and the weighted mean is taken; the fields above then reach a loss only
            if they are a branch too.
    """

    features: Tensor
    embeddings: Tensor
    logits: Tensor | None = None
    branches: tuple[tuple[Output, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The features of a split with their labels.

    Args:
        features: (N, D) float32; from a feature file also float16 or bfloat16.
        pids: (N,) int64.
        camids: (N,) int64.
        paths: N file names, or an empty tuple if they are unknown.
    """

    features: Tensor
    pids: Tensor
    camids: Tensor
    paths: tuple[str, ...] = ()

    def without_junk(self) -> Embeddings:
        """The same without junk, or the same object if there is none.

        If every pid is -1, as for a folder of unlabelled images, no pid is known and all are kept.
        """
        known = self.pids != JUNK
        if not bool(known.any()) or bool(known.all()):
            return self
        paths = tuple(path for path, keep in zip(self.paths, known.tolist(), strict=False) if keep)
        return replace(
            self,
            features=self.features[known],
            pids=self.pids[known],
            camids=self.camids[known],
            paths=paths,
        )
