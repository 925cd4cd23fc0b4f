"""The six kinds of part: an abstract class and a registry for each.

A part's constructor stores its options and builds its modules; it reads no file, downloads
nothing and touches no GPU. A class may have a static method `check(options)` that raises
ValueError("option: what is wrong") for a combination of options that is not allowed; it is called
before any data is read.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from reidreg.parts.registry import Registry
from reidreg.values import Embeddings, Output, Sample

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Dataset(ABC):
    """Images with identities and cameras, in the three splits of re-identification.

    A split is read on first access: evaluation needs no training images, and training no others.
    """

    @property
    @abstractmethod
    def train(self) -> Sequence[Sample]:
        """The training images, with the data set's own pids and camids: reidreg relabels them."""

    @property
    @abstractmethod
    def query(self) -> Sequence[Sample]:
        """The query images."""

    @property
    @abstractmethod
    def gallery(self) -> Sequence[Sample]:
        """The gallery images."""

    def folders(self) -> Mapping[str, str]:
        """Split to its folder, for the log."""
        return {}

    def notes(self) -> list[str]:
        """Remarks on this copy of the data for the user, a line each."""
        return []


class Sampler(ABC):
    """Which images make up each batch of an epoch.

    The batches depend only on the seed and the epoch, not on the epochs that were iterated before:
    an exact resume needs nothing else.
    """

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0, whose batches the next iteration yields."""
        self.epoch = epoch

    @abstractmethod
    def __iter__(self) -> Iterator[list[int]]:
        """The batches of this epoch, each a list of indices into the train split."""

    @abstractmethod
    def __len__(self) -> int:
        """The exact number of batches of this epoch, known before it starts."""

    def state_dict(self) -> dict[str, Any]:
        """The state that a resume needs."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        self.epoch = int(state["epoch"])


class Backbone(nn.Module, ABC):
    """Images to a feature map or tokens.

    `dim` is the number of channels C. `mean` and `std` are the normalisation that the pretrained
    weights expect. With `uses_camids` set, `forward` also receives the camera indices.
    """

    uses_camids: ClassVar[bool] = False
    dim: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __init__(self) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, images: Tensor, camids: Tensor | None = None) -> Tensor:
        """Compute features.

        Args:
            images: (B, 3, H, W) float, normalised.
            camids: (B,) camera indices, -1 for a camera that is not in the training data; only if
                `uses_camids`.

        Returns:
            A map (B, C, h, w) or tokens (B, N, C).
        """

    def load_pretrained(self) -> str | None:
        """Load the weights that the options name; called once, when a new run starts.

        Returns:
            A line for the log that says what was loaded, or None if nothing was.
        """
        return None


class Head(nn.Module, ABC):
    """Backbone features to the `Output` that losses and retrieval use.

    `dim` is the width D of `Output.features`. With `uses_camids` set, `forward` also
    receives the camera indices.
    """

    uses_camids: ClassVar[bool] = False
    dim: int

    def __init__(self) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, features: Tensor, camids: Tensor | None = None) -> Output:
        """Pool and classify.

        Args:
            features: What the backbone returned, in float32: (B, C, h, w) or (B, N, C).
            camids: As for the backbone.
        """


class Loss(nn.Module, ABC):
    """A model output and labels to a scalar.

    A loss may have parameters. Those in the optimizer that `make_optimizer` returns see the
    gradient of the unweighted loss; the others join the model's optimizer. `compares_images` is set
    if the value depends on which images share a batch.
    """

    compares_images: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, output: Output, pids: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            output: What the model returned for the batch.
            pids: (B,) labels 0..num_classes-1.

        Returns:
            A scalar.
        """

    def make_optimizer(self) -> Optimizer | None:
        """A separate optimizer for the loss's parameters, or None to let the model's step them."""
        return None


class Evaluator(ABC):
    """Query and gallery features to figures."""

    @abstractmethod
    def evaluate(self, query: Embeddings, gallery: Embeddings) -> dict[str, Any]:
        """Compute the figures.

        Returns:
            A mapping that JSON can hold; figures are fractions 0..1. Figures after post-processing
            are in a nested block with the same keys: `{"mAP": ..., "reranked": {"mAP": ...}}`.
            The keys `skipped`, `intervals`, `cameras` and `verification` have the form that the
            evaluator `retrieval` gives them.

        Raises:
            DataError: The features are not finite, or no query can be matched.
        """

    @abstractmethod
    def rank(self, query: Embeddings, gallery: Embeddings, k: int) -> tuple[Tensor, Tensor]:
        """The nearest gallery items of each query, for galleries and searches.

        Returns:
            Indices (Q, k) int64, -1 where there are fewer, and distances (Q, k) float32.
        """

    def rank_everything(
        self, query: Embeddings, gallery: Embeddings, k: int
    ) -> tuple[Tensor, Tensor]:
        """As `rank`, but including the items that the evaluation leaves out, for display.

        An evaluator that leaves nothing out need not override it.
        """
        return self.rank(query, gallery, k)

    def precisions(self, query: Embeddings, gallery: Embeddings) -> Tensor:
        """The average precision of each query, (Q,) float64, NaN where it has no match.

        Uses `rank` over the whole gallery, a few queries at a time; override it if there is a
        faster way.
        """
        values = []
        for start in range(0, len(query.pids), 64):
            some = slice(start, start + 64)
            rows = Embeddings(query.features[some], query.pids[some], query.camids[some])
            indices, _ = self.rank(rows, gallery, len(gallery.pids))
            for row, pid in zip(indices, rows.pids, strict=True):
                hits = torch.nonzero(gallery.pids[row[row >= 0]] == pid).flatten() + 1
                counts = torch.arange(1, len(hits) + 1)
                values.append((counts / hits).mean().item() if len(hits) else math.nan)
        return torch.tensor(values, dtype=torch.float64)

    def check_ids(self, query: Sequence[Sample], gallery: Sequence[Sample]) -> list[str]:
        """Check from the labels, before training, that the evaluation can succeed.

        Returns:
            Notes for the log, a line each.

        Raises:
            DataError: No query has a match.
        """
        return []


DATASETS: Registry[Dataset] = Registry("dataset", Dataset)  # type: ignore[type-abstract]
SAMPLERS: Registry[Sampler] = Registry("sampler", Sampler)  # type: ignore[type-abstract]
BACKBONES: Registry[Backbone] = Registry("backbone", Backbone)  # type: ignore[type-abstract]
HEADS: Registry[Head] = Registry("head", Head)  # type: ignore[type-abstract]
LOSSES: Registry[Loss] = Registry("loss", Loss)  # type: ignore[type-abstract]
EVALUATORS: Registry[Evaluator] = Registry("evaluator", Evaluator)  # type: ignore[type-abstract]

REGISTRIES: dict[str, Registry[Any]] = {
    registry.kind: registry
    for registry in (DATASETS, SAMPLERS, BACKBONES, HEADS, LOSSES, EVALUATORS)
}
