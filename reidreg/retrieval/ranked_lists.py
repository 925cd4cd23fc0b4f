"""Ranked lists: the nearest gallery items of each query, exactly and in order.

faiss finds candidates in float32 by brute force; distances in float64 sort them, and exact ones
(`reidreg.retrieval.distances`) decide near ties. Of two items at equal distance the one with the
smaller gallery index is nearer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reidreg.retrieval.arrays import FloatArray, IntArray
from reidreg.retrieval.blocks import Progress, spans
from reidreg.retrieval.distances import Distances
from reidreg.retrieval.matching import MatchLabels, labels_of_sides
from reidreg.retrieval.options import check_at_least
from reidreg.retrieval.vectors import Side
from reidreg.values import JUNK, Embeddings

LeftOut: TypeAlias = Callable[[IntArray, IntArray], NDArray[np.bool_]]

_SPARE = 32  # candidates beyond k that a search fetches, so that rounding cannot hide a neighbour
_WIDER = 8  # a second search fetches this many times as many candidates
_UNIT = 2.0**-24  # the largest relative error of one float32 operation


def ranked_lists(
    query: Embeddings,
    gallery: Embeddings,
    *,
    k: int,
    metric: str = "cosine",
    same_camera: str = "drop",
    everything: bool = False,
    budget_mib: float = 256,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest gallery items of each query, in the order that `match_positions` counts.

    faiss finds candidates in float32 by brute force; their exact distances sort them. If the k-th
    item is not certainly nearer than all items that faiss did not return, a second search fetches
    more; if that is not enough, all distances of the query are computed.

    Args:
        query: Q embeddings.
        gallery: G embeddings.
        k: The length of the lists; may exceed the gallery's size.
        metric: `cosine` or `euclidean` (squared).
        same_camera: `drop` leaves out gallery items of the query's pid and camera; `keep` leaves
            out junk only.
        everything: Leave nothing out, neither junk nor items of the query's pid and camera.
        budget_mib: Memory to use in addition to the features and a float32 copy of them, in MiB.
        progress: Called with the number of finished lists and of all.

    Returns:
        Gallery indices (Q, k) int64 and distances (Q, k) float32, on the CPU; -1 and infinity fill
        a list that is shorter than k.

    Raises:
        DataError: Shapes do not match, or a feature is not finite.
        ConfigError: An option is wrong.
    """
    check_at_least("k", k, 1)
    check_at_least("budget_mib", budget_mib, 1)
    labels = labels_of_sides(query, gallery, same_camera)
    if everything:
        labels = labels.keep_all()
    distances = Distances(query.features, gallery.features, metric, (query.paths, gallery.paths))
    lists = ExactLists(distances, k, _left_out(labels), budget_mib, progress)
    everyone = np.arange(len(labels.query_pids))
    lists.complete(everyone, labels.kept, k + labels.hidden() + _SPARE)
    return torch.from_numpy(lists.items), torch.from_numpy(lists.rounded())


class ExactLists:
    """Ranked lists that are filled from candidates, in the order of exact distances.

    `items` (Q, k) and `values` (Q, k), distances within `distances.slack`, are the lists so far;
    item -1 at an infinite distance means none.

    Args:
        distances: Between the queries and the gallery.
        k: The length of the lists.
        left_out: A mask of the items (n, m) that are left out of the lists of queries (n,).
        budget_mib: Memory to use in addition to the features and a float32 copy of them, in MiB.
        progress: Called with the number of finished lists and of all.
    """

    def __init__(
        self,
        distances: Distances,
        k: int,
        left_out: LeftOut | None = None,
        budget_mib: float = 256,
        progress: Progress | None = None,
    ) -> None:
        self.distances, self.k, self.left_out = distances, k, left_out
        self._progress, self._done = progress, 0
        self.items = np.full((len(distances.query), k), -1, dtype=np.int64)
        self.values = np.full((len(distances.query), k), np.inf)
        budget = int(budget_mib * 2**20)
        self._width = max(1, budget // 4 // (distances.dim * 40))  # exact distances hold 5 copies
        self._rows = max(1, budget // 4 // (len(distances.gallery) * 64))

    def complete(self, queries: IntArray, kept: IntArray, fetch: IntArray) -> None:
        """Fill in the lists of some queries.

        Args:
            queries: (n,) query indices.
            kept: (m,) the gallery items that are not left out for every query, ascending.
            fetch: (n,) the numbers of candidates of the first search.
        """
        for times in (1, _WIDER):
            sure = self.search(queries, kept, fetch * times)
            queries, fetch = queries[~sure], fetch[~sure]
        self.whole_rows(queries)

    def search(self, queries: IntArray, kept: IntArray, fetch: IntArray) -> NDArray[np.bool_]:
        """Fill in lists from candidates that faiss finds; returns which lists are certain.

        Queries that need as many candidates as there are items are skipped.
        """
        sure = np.zeros(len(queries), dtype=np.bool_)
        searched = np.flatnonzero(fetch < len(kept))
        if not len(searched):
            return sure
        base = float32_vectors(self.distances, self.distances.gallery, kept)
        for span in spans(len(searched), self._width):
            some = searched[span]
            items, least = self._found(queries[some], base, int(fetch[some].max()))
            sure[some] = self.take(queries[some], kept[items], least)
        return sure

    def take(self, queries: IntArray, items: IntArray, least: FloatArray) -> NDArray[np.bool_]:
        """Fill in lists from candidates; returns which lists are certain.

        Args:
            queries: (n,) query indices.
            items: (n, m) their candidates.
            least: (n,) a lower bound on the distances of all other items.
        """
        self._fill(queries, items, self.distances.listed(queries, items))
        sure = self.values[queries, -1] + self.distances.slack < least
        self._advance(int(sure.sum()))
        return np.asarray(sure)

    def whole_rows(self, queries: IntArray) -> None:
        """Fill in the lists of some queries from their distances to the whole gallery."""
        for span in spans(len(queries), self._rows):
            rows = self.distances.rows(queries[span], self._width).cpu().numpy()
            self._fill(queries[span], np.tile(np.arange(rows.shape[1]), (len(rows), 1)), rows)
            self._advance(len(rows))

    def rounded(self) -> NDArray[np.float32]:
        """The lists' distances (Q, k) in float32.

        Small distances are made exact, since float32 resolves them more finely than `slack`.
        """
        values = self.values.copy()
        row, column = np.nonzero(values <= self.distances.slack * 2.0**26)
        values[row, column] = self._exact(row, self.items[row, column])
        with np.errstate(over="ignore"):  # beyond float32 they are infinite
            return values.astype(np.float32)

    def _exact(self, queries: IntArray, items: IntArray) -> FloatArray:
        return self.distances.exact_pairs(queries, items, self._width)

    def _advance(self, count: int) -> None:
        self._done += count
        if self._progress:
            self._progress(self._done, len(self.items))

    def _found(
        self, queries: IntArray, base: NDArray[np.float32], fetch: int
    ) -> tuple[IntArray, FloatArray]:
        """The nearest rows of `base` (n, fetch), and a lower bound (n,) on the other distances."""
        import faiss

        distances = self.distances
        wanted = float32_vectors(distances, distances.query, queries)
        if distances.query.unit:
            scores, items = faiss.knn(wanted, base, fetch, metric=faiss.METRIC_INNER_PRODUCT)
            return items, 1 - scores[:, -1].astype(np.float64) - sum_error(distances.dim)
        squares, items = faiss.knn(wanted, base, fetch, metric=faiss.METRIC_L2)
        # faiss computes |x|^2 + |y|^2 - 2xy, so the error of a sum counts four times.
        least = squares[:, -1].astype(np.float64) - 4 * sum_error(distances.dim)
        return items, least * distances.scale**2

    def _fill(self, queries: IntArray, items: IntArray, values: FloatArray) -> None:
        """Make lists of candidates (n, m) at distances within `slack`; overwrites `values`."""
        if self.left_out is not None:
            values[self.left_out(queries, items)] = np.inf
        items, values = _ordered(items, values)
        unclear = self._resolve(queries, items, values)
        items[unclear], values[unclear] = _ordered(items[unclear], values[unclear])
        items, values = items[:, : self.k], values[:, : self.k]
        self.items[queries, : items.shape[1]] = np.where(np.isfinite(values), items, -1)
        self.values[queries, : items.shape[1]] = values

    def _resolve(self, queries: IntArray, items: IntArray, values: FloatArray) -> NDArray[np.bool_]:
        """Make the distances of near ties exact, in place; returns (n,) which rows have changed.

        Only runs of near ties that begin among the first k matter.
        """
        finite = np.isfinite(values[:, 1:])
        reach = values[:, :-1] + 2 * self.distances.slack
        joined = np.zeros(values.shape, dtype=np.bool_)
        joined[:, 1:] = finite & (values[:, 1:] <= reach)
        begins = np.where(joined, 0, np.arange(values.shape[1]))
        near = np.maximum.accumulate(begins, axis=1) < self.k
        joined[:, :-1] |= joined[:, 1:]
        row, column = np.nonzero(joined & near)
        values[row, column] = self._exact(queries[row], items[row, column])
        changed = np.zeros(len(values), dtype=np.bool_)
        changed[row] = True
        return changed


def float32_vectors(distances: Distances, side: Side, index: IntArray) -> NDArray[np.float32]:
    """Vectors (n, D) of one side, no longer than 1, as a search compares them."""
    out = np.empty((len(index), distances.dim), dtype=np.float32)
    for span in spans(len(index), 1024):
        out[span] = side.fast(index[span], distances.scale).cpu().numpy()
    return out


def sum_error(dim: int) -> float:
    """Bound on the float32 error of the product of two vectors of width `dim`, no longer than 1.

    In any order of summation, the error of n operations is at most n u / (1 - n u) of the sum of
    absolute values, which the norms bound (Higham, Accuracy and Stability of Numerical Algorithms,
    2002, section 3.1). Of the 16 extra steps, 6 are for the rounding of the vectors and 5 for that
    of sums with their squares.
    """
    steps = dim + 16
    return steps * _UNIT / (1 - steps * _UNIT)


def _ordered(items: IntArray, values: FloatArray) -> tuple[IntArray, FloatArray]:
    """Rows sorted by value; of equal values the smaller item first."""
    order = np.lexsort((items, values), axis=1)
    return np.take_along_axis(items, order, axis=1), np.take_along_axis(values, order, axis=1)


def _left_out(labels: MatchLabels) -> LeftOut:
    def left_out(queries: IntArray, items: IntArray) -> NDArray[np.bool_]:
        out = (labels.gallery_pids[items] == JUNK) & labels.junk
        if labels.drop:
            out |= labels.gallery_pid_cam_ids[items] == labels.query_pid_cam_ids[queries, None]
        return np.asarray(out)

    return left_out
