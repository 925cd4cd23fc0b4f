"""The values that travel between the parts: frozen, without behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a data set.

    Args:
        path: The image's file.
        pid: Whose image it is. -1 is junk, which evaluation ignores.
        camid: The camera that took it.
    """

    path: str
    pid: int
    camid: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What one training step sees.

    Args:
        images: (B, 3, H, W) float, normalised.
        pids: (B,) int64, labels 0..num_classes-1.
        camids: (B,) int64, camera indices 0..num_cameras-1.
    """

    images: Tensor
    pids: Tensor
    camids: Tensor


@dataclass(frozen=True, slots=True)
class Output:
    """What a model returns for a batch.

    Args:
        features: (B, D) the pooled feature before the neck; metric losses use it.
        embeddings: (B, E) what retrieval compares.
        logits: (B, num_classes), or None where a head has no classifier.
        branches: Further outputs with their weights, for heads of several branches. Each loss is
            applied to every branch and the weighted mean is taken; if there are branches, the
            fields above are not seen by a loss unless they are a branch too.
    """

    features: Tensor
    embeddings: Tensor
    logits: Tensor | None = None
    branches: tuple[tuple[Output, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The features of a split, with whose and where they are.

    Args:
        features: (N, D) float32; from a file of features perhaps float16 or bfloat16.
        pids: (N,) int64.
        camids: (N,) int64.
        paths: N file names, or an empty tuple where they are not known.
    """

    features: Tensor
    pids: Tensor
    camids: Tensor
    paths: tuple[str, ...] = ()
