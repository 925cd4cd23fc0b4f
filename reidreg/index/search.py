"""The search in an index: exact, or among the candidates that faiss finds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reidreg.errors import DataError
from reidreg.index.approximate import (
    Candidates,
    Progress,
    Settings,
    add_candidates,
    find_candidates,
)
from reidreg.retrieval.arrays import FloatArray, IntArray
from reidreg.retrieval.index_search import (
    BruteForce,
    Float32Array,
    Mask,
    Space,
    Vectors,
    exact_search,
    measured,
)
from reidreg.retrieval.vectors import Features, Side

Group = tuple[IntArray, Mask | None]


def groups_by_camera(
    count: int, exclude_camids: Sequence[int] | Tensor | None, camids: IntArray
) -> list[Group]:
    """Rows of queries that exclude the same camera, each with the items that they may find.

    Args:
        count: Queries.
        exclude_camids: (Q,) the camera that each query excludes, or None to exclude none.
        camids: (N,) cameras of the items.

    Raises:
        DataError: There is not one camera for each query.
    """
    if exclude_camids is None:
        return [(np.arange(count), None)]
    excluded = np.asarray(exclude_camids)
    if excluded.shape != (count,):
        raise DataError(f"there are {count} queries, but {excluded.shape} cameras to leave out")
    return [(np.flatnonzero(excluded == camid), camids != camid) for camid in np.unique(excluded)]


class IndexSearch:
    """Finds the nearest items, ordered by exact distances.

    Args:
        vectors: The features of the items, as they were given.
        space: How features are compared.
        candidates: A faiss index of the items, or None to compare each query with every item.
    """

    def __init__(self, vectors: Vectors, space: Space, candidates: Candidates | None) -> None:
        self.candidates = candidates
        self._all = BruteForce(vectors, space, keep=candidates is None)

    @property
    def vectors(self) -> Vectors:
        """The features of the items, as they were given."""
        return self._all.vectors

    @property
    def space(self) -> Space:
        """How features are compared."""
        return self._all.space

    def side(self, name: str, features: Features, paths: Sequence[str] = ()) -> Side:
        """Features, checked and prepared for distances (`Space.side`)."""
        return self.space.side(name, features, paths)

    def add(self, features: Float32Array, side: Side, progress: Progress | None) -> None:
        """Append items, given as float32 features and prepared.

        Raises:
            DataError: They are too long for the index; then nothing has changed.
        """
        space, vectors = self.space.with_items(side), self.vectors.followed_by(features)
        space.float32(side, slice(None))  # raises before anything is changed
        if self.candidates is not None:
            add_candidates(self.candidates, Vectors([features]), space, progress)
        self._all = self._all.extended(vectors, space, features)

    def nearest(
        self, queries: Side, k: int, settings: Settings, groups: Sequence[Group]
    ) -> tuple[FloatArray, IntArray]:
        """The k nearest items of each query.

        Args:
            queries: Q prepared queries.
            k: The length of the lists.
            settings: How thoroughly the candidates are searched.
            groups: From `groups_by_camera`.

        Returns:
            Distances (Q, k), infinite where there are fewer items, and their numbers (Q, k), -1
            there.
        """
        raw = queries.features.to(torch.float32).numpy()
        items = np.full((len(raw), k), -1, dtype=np.int64)
        distances = np.full((len(raw), k), np.inf)
        for rows, allowed in groups:
            side = self.side("query", raw[rows]) if allowed is not None else queries
            distances[rows], items[rows] = self._nearest(side, raw[rows], k, settings, allowed)
        return distances, items

    def _nearest(
        self, queries: Side, raw: Float32Array, k: int, settings: Settings, allowed: Mask | None
    ) -> tuple[FloatArray, IntArray]:
        if self.candidates is None:
            return self.exact(queries, raw, k, allowed)
        distances, items = self.approximate(queries, raw, k, settings, allowed)
        # A graph or a few cells may hold fewer of the allowed items than there are.
        wanted = k if allowed is None else min(k, int(np.count_nonzero(allowed)))
        short = np.flatnonzero((items[:, :wanted] < 0).any(axis=1))
        if len(short):
            side = self.side("query", raw[short])
            distances[short], items[short] = self.exact(side, raw[short], k, allowed)
        return distances, items

    def exact(
        self, queries: Side, raw: Float32Array, k: int, allowed: Mask | None = None
    ) -> tuple[FloatArray, IntArray]:
        """The k nearest of all items, as distances and numbers (Q, k)."""
        return exact_search(queries, raw, self._all, k, allowed)

    def approximate(
        self,
        queries: Side,
        raw: Float32Array,
        k: int,
        settings: Settings,
        allowed: Mask | None = None,
    ) -> tuple[FloatArray, IntArray]:
        """The k nearest of the candidates that faiss finds, as distances and numbers (Q, k)."""
        prepared = self.space.float32(queries, slice(None))
        found = find_candidates(self.candidates, prepared, k, settings, allowed)
        distances, items = measured(raw, self.vectors, found, self.space.metric)
        return distances[:, :k].copy(), items[:, :k].copy()
