"""What an index stores beside its items: its recall, its model and its threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Recall:
    """The share of the exact nearest neighbours that an approximate index finds.

    It is measured with items of the index and without excluding a camera. Queries that are not in
    the index, and searches that exclude many of the nearest items, reach a slightly lower recall.

    Args:
        wanted: The recall that the settings were chosen for.
        reached: The share of the exact `k` nearest that is found; an item at the same distance
            counts as found.
        k: Neighbours of each query, without the query itself.
        queries: Items of the index that were searched for.
        items: Items in the index at the time.
    """

    wanted: float
    reached: float
    k: int
    queries: int
    items: int


@dataclass(frozen=True, slots=True)
class FeatureModel:
    """The model that extracted the features of an index.

    Args:
        ckpt: The checkpoint file, as an absolute path.
        digest: A SHA-256 of its weights and of the options that features depend on.
        config: The configuration that it was used with.
    """

    ckpt: str
    digest: str
    config: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Threshold:
    """The score from which two images count as the same person.

    Args:
        value: The least cosine similarity, or the greatest squared Euclidean distance.
        far: The false-accept rate that it was chosen for, or None.
    """

    value: float
    far: float | None = None


def record_of(cls: type[Any], values: dict[str, Any] | None) -> Any:
    """A record from the values that a manifest stores for it, or None."""
    return None if values is None else cls(**values)
