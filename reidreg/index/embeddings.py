"""Embeddings, checked and converted to what an index stores."""

from __future__ import annotations

import numpy as np
import torch

from reidreg.errors import DataError
from reidreg.index.files import Items
from reidreg.retrieval.index_search import Float32Array, checked_side
from reidreg.retrieval.vectors import Side
from reidreg.values import Embeddings


def checked_features(name: str, embeddings: Embeddings, metric: str) -> tuple[Float32Array, Side]:
    """The features as float32 (N, D), and the same prepared for distances.

    Raises:
        DataError: A feature is not finite or, for cosine, zero; or features, pids, camids and paths
            differ in number.
        ConfigError: The metric is unknown.
    """
    features = embeddings.features.detach().to("cpu", torch.float32).contiguous()
    side = checked_side(name, features, metric, embeddings.paths)
    counts = {len(features), len(embeddings.pids), len(embeddings.camids)}
    if len(counts) > 1 or len(embeddings.paths) not in (0, len(features)):
        raise DataError(
            f"{name}: {len(features)} features, {len(embeddings.pids)} pids, "
            f"{len(embeddings.camids)} camids and {len(embeddings.paths)} paths do not go together"
        )
    return features.numpy(), side


def items_of(embeddings: Embeddings, first: int) -> Items:
    """The pids, camids and paths; an item without a path is named by its number in the index.

    Args:
        embeddings: N embeddings.
        first: The number that the first one gets.

    Raises:
        DataError: A path contains a NUL character.
    """
    numbers = range(first, first + len(embeddings.pids))
    paths = embeddings.paths or tuple(f"#{number}" for number in numbers)
    if any("\0" in path for path in paths):
        raise DataError("a path contains a NUL character, which no file name can")
    return Items(
        embeddings.pids.cpu().numpy().astype(np.int64),
        embeddings.camids.cpu().numpy().astype(np.int64),
        paths,
    )
