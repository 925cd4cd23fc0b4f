"""Ranked lists: the nearest gallery items of each query, exactly and in order.

faiss finds candidates in float32, by brute force; exact distances (`reidreg.distances`) put them
in order. Of two items at equal distance the earlier one in the gallery is nearer.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reidreg.distances import (
    Distances,
    FloatArray,
    IntArray,
    Plan,
    Side,
    check_at_least,
    spans,
)
from reidreg.matching import JUNK, MatchLabels, labels_of_sides
from reidreg.values import Embeddings

_SPARE = 32  # further neighbours that a search fetches, so that rounding cannot hide one


def ranked_lists(
    query: Embeddings,
    gallery: Embeddings,
    *,
    k: int,
    metric: str = "cosine",
    same_camera: str = "drop",
    everything: bool = False,
    budget_mib: float = 256,
) -> tuple[Tensor, Tensor]:
    """The k nearest gallery items of each query, exactly as `match_positions` counts them.

    faiss finds the candidates, in float32 and by brute force; their exact distances put them in
    order. Where the last one taken is not clearly nearer than all that faiss did not return, the
    query's whole row is computed.

    Args:
        query: Q embeddings.
        gallery: G embeddings.
        k: The length of the lists; may exceed the gallery.
        metric: `cosine` or `euclidean` (squared).
        same_camera: `drop` leaves out gallery items of the query's pid and camera; `keep` leaves
            out junk alone.
        everything: Leave nothing out, neither junk nor items of the query's camera.
        budget_mib: Memory to use beside the features and a float32 copy of them, in MiB.

    Returns:
        Gallery indices (Q, k) int64, -1 where there are fewer, and distances (Q, k) float32,
        infinite where there are fewer; both on the CPU.

    Raises:
        DataError: The features or labels do not fit together, or are not finite.
        ConfigError: An option is wrong.
    """
    check_at_least("k", k, 1)
    labels = labels_of_sides(query, gallery, same_camera)
    if everything:
        labels = labels.keep_all()
    distances = Distances(query.features, gallery.features, metric, (query.paths, gallery.paths))
    plan = Plan.of(budget_mib, distances.dim)
    search = _Search(distances, labels, k, plan)
    indices = torch.full((len(labels.query_pids), k), -1, dtype=torch.int64)
    values = torch.full((len(labels.query_pids), k), torch.inf, dtype=torch.float32)
    unsure = search.by_faiss(indices, values)
    rows = max(1, int(budget_mib * 2**20) // 4 // (len(labels.gallery_pids) * 32))
    for span in spans(len(unsure), rows):
        search.by_rows(unsure[span], indices, values)
    return indices, values


class _Search:
    """Fills in ranked lists."""

    def __init__(self, distances: Distances, labels: MatchLabels, k: int, plan: Plan) -> None:
        self.distances, self.labels, self.k, self.plan = distances, labels, k, plan
        self.kept = labels.kept
        self.scale = max(distances.query.longest, distances.gallery.longest) or 1.0

    def by_faiss(self, indices: Tensor, values: Tensor) -> IntArray:
        """Fill in the lists of all queries for which a search suffices; returns the others."""
        import faiss

        hidden = self.labels.hidden()
        fetch = self.k + hidden + _SPARE
        everyone = np.arange(len(hidden))
        if fetch.min() >= len(self.kept):
            return everyone
        base = self._float32(self.distances.gallery, self.kept)
        unsure = [everyone[fetch >= len(self.kept)]]
        searched = everyone[fetch < len(self.kept)]
        for span in spans(len(searched), self.plan.queries):
            queries = searched[span]
            wanted = self._float32(self.distances.query, queries)
            found = faiss.knn(wanted, base, int(fetch[queries].max()), metric=faiss.METRIC_L2)
            sure = self._take(queries, found[0], self.kept[found[1]], indices, values)
            unsure.append(queries[~sure])
        return np.concatenate(unsure)

    def by_rows(self, queries: IntArray, indices: Tensor, values: Tensor) -> None:
        """Fill in the lists of some queries from all of their exact distances."""
        rows = self.distances.rows(queries, self.plan.gallery, exact=True).cpu().numpy()
        everything = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
        rows[self._left_out(queries, everything)] = np.inf
        order = np.argsort(rows, axis=1, kind="stable")[:, : self.k]
        self._fill(queries, order, np.take_along_axis(rows, order, axis=1), indices, values)

    def _take(
        self,
        queries: IntArray,
        found: NDArray[np.float32],
        items: IntArray,
        indices: Tensor,
        values: Tensor,
    ) -> NDArray[np.bool_]:
        """Fill in lists from candidates; says for which queries they are certain."""
        pairs = np.repeat(queries, items.shape[1]), items.reshape(-1)
        exact = self.distances.exact_pairs(*pairs, self.plan.gallery).cpu().numpy()
        exact = exact.reshape(items.shape)
        exact[self._left_out(queries, items)] = np.inf
        order = np.lexsort((items, exact), axis=1)[:, : self.k]
        taken = np.take_along_axis(exact, order, axis=1)
        self._fill(queries, np.take_along_axis(items, order, axis=1), taken, indices, values)
        # All that faiss did not return are at least as far as the last one that it did, but for
        # the rounding of D float32 products of vectors that are at most 1 long.
        rounding = (self.distances.dim + 16) * 2.0**-22
        least = (found[:, -1] - rounding) * self.scale**2 * self.distances.weight
        return np.asarray(taken[:, -1] < least)

    def _fill(
        self,
        queries: IntArray,
        items: IntArray,
        found: FloatArray,
        indices: Tensor,
        values: Tensor,
    ) -> None:
        items = np.where(np.isfinite(found), items, -1)
        where = torch.from_numpy(queries)
        indices[where, : items.shape[1]] = torch.from_numpy(items)
        values[where, : items.shape[1]] = torch.from_numpy(found.astype(np.float32))

    def _left_out(self, queries: IntArray, items: IntArray) -> NDArray[np.bool_]:
        labels = self.labels
        out = (labels.gallery_pids[items] == JUNK) & labels.junk
        if labels.drop:
            out |= labels.gallery_places[items] == labels.query_places[queries, None]
        return np.asarray(out)

    def _float32(self, side: Side, index: IntArray) -> NDArray[np.float32]:
        """The vectors divided by the longest norm, so that no square overflows."""
        out = np.empty((len(index), self.distances.dim), dtype=np.float32)
        for span in spans(len(index), self.plan.gallery):
            out[span] = side.rows(index[span]).vectors.div_(self.scale).cpu().numpy()
        return out
