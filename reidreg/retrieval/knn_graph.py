"""The exact k-nearest-neighbour graph of one set, with each image's farthest distance.

The distances within one set are symmetric, so half of the tiles of a float32 matrix product hold
all pairs: of each tile, the nearest and farthest pairs of its rows and of its columns are kept.
This is half of the work of a search, which would not find the farthest. What float32 cannot order
is decided as in `reidreg.retrieval.ranked_lists`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reidreg.retrieval.arrays import FloatArray, IntArray
from reidreg.retrieval.blocks import Progress, spans
from reidreg.retrieval.distances import Distances
from reidreg.retrieval.ranked_lists import ExactLists, float32_vectors, sum_error

_SPARE = 16  # neighbours beyond k that are kept, so that rounding cannot hide one
TILE = 2048  # rows and columns of a tile
_BLOCK = 256  # rows that are sorted together

FloatTile = NDArray[np.float32]


class Graph(NamedTuple):
    """The neighbours of N images.

    Args:
        items: (N, k) the nearest images, nearest first; ties by index.
        values: (N, k) their distances.
        farthest: (N,) the distance of the farthest image.
    """

    items: IntArray
    values: FloatArray
    farthest: FloatArray


def neighbour_graph(
    distances: Distances,
    k: int,
    *,
    tile: int = TILE,
    progress: Progress | None = None,
) -> Graph:
    """The k nearest images of each image, itself included, and its farthest distance.

    The result does not depend on the number of threads.

    Args:
        distances: Of a set with itself.
        k: The number of neighbours, at most the size of the set.
        tile: Rows and columns of the tiles that are compared at a time.
        progress: Called with the number of tiles done and of all.
    """
    count = len(distances.query)
    k = min(k, count)
    near = _Extremes(count, min(k + _SPARE, count))
    _compare_all(distances, near, tile, progress)
    lists = ExactLists(distances, k)
    everyone = np.arange(count)
    sure = [_take(lists, near, everyone[span]) for span in spans(count, min(tile, _BLOCK))]
    unsure = everyone[~np.concatenate(sure)]
    lists.complete(unsure, everyone, np.full(len(unsure), 4 * near.fetch))
    farthest = distances.listed(everyone, near.last[:, None])[:, 0]
    return Graph(lists.items, lists.values, farthest)


class _Extremes:
    """The largest scores of each image so far, and its smallest; a higher score is nearer.

    `scores` and `items` (N, fetch) are the largest, unsorted; `least` (N,) is the smallest of them,
    which a new score must exceed. `low` and `last` (N,) are the smallest score of all and its item.
    """

    def __init__(self, count: int, fetch: int) -> None:
        self.fetch = fetch
        self.scores = np.full((count, fetch), -np.inf, dtype=np.float32)
        self.items = np.zeros((count, fetch), dtype=np.int64)
        self.least = np.full(count, -np.inf, dtype=np.float32)
        self.low = np.full(count, np.inf, dtype=np.float32)
        self.last = np.zeros(count, dtype=np.int64)

    def add_rows(self, tile: FloatTile, rows: slice, columns: slice) -> None:
        """Take in a tile of scores for the images of its rows."""
        above = tile > self.least[rows, None]
        if np.count_nonzero(above) > tile.size // 8 and tile.shape[1] > self.fetch:
            # Usually the first tile of these rows, where every score exceeds -inf.
            strips = [_largest(tile[strip], self.fetch) for strip in spans(len(tile), _BLOCK)]
            row = np.repeat(np.arange(len(tile)), self.fetch)
            column = np.concatenate(strips).reshape(-1)
        else:
            row, column = _where(above)
        self._add(row + rows.start, column + columns.start, tile[row, column])
        column = tile.argmin(axis=1)
        self._lower(np.arange(rows.start, rows.stop), column + columns.start, tile.min(axis=1))

    def add_columns(self, tile: FloatTile, rows: slice, columns: slice) -> None:
        """Take in a tile of scores for the images of its columns."""
        row, column = _where(tile > self.least[columns])
        order = np.argsort(column, kind="stable")
        row, column = row[order], column[order]
        self._add(column + columns.start, row + rows.start, tile[row, column])
        row, column = _where(tile < self.low[columns])
        scores = tile[row, column]
        order = np.argsort(-scores, kind="stable")
        # The lowest of an image's new scores is assigned last, so it stays.
        self._lower(column[order] + columns.start, row[order] + rows.start, scores[order])

    def _add(self, owners: IntArray, items: IntArray, scores: FloatTile) -> None:
        """Take in scores of the images `owners`, which are sorted."""
        starts = np.flatnonzero(np.diff(owners, prepend=-1))
        if not len(starts):
            return
        own = owners[starts]
        sizes = np.diff(starts, append=len(owners))
        row = np.repeat(np.arange(len(own)), sizes)
        column = np.arange(len(owners)) - np.repeat(starts, sizes) + self.fetch
        shape = len(own), self.fetch + int(sizes.max())
        all_scores = np.full(shape, -np.inf, dtype=np.float32)
        all_items = np.zeros(shape, dtype=np.int64)
        all_scores[:, : self.fetch], all_items[:, : self.fetch] = self.scores[own], self.items[own]
        all_scores[row, column], all_items[row, column] = scores, items
        kept = _largest(all_scores, self.fetch)
        self.scores[own] = np.take_along_axis(all_scores, kept, axis=1)
        self.items[own] = np.take_along_axis(all_items, kept, axis=1)
        self.least[own] = self.scores[own].min(axis=1)

    def _lower(self, owners: IntArray, items: IntArray, scores: FloatTile) -> None:
        lower = scores < self.low[owners]
        self.low[owners[lower]], self.last[owners[lower]] = scores[lower], items[lower]


def _largest(scores: FloatTile, count: int) -> IntArray:
    """(n, count) The columns of the largest scores of each row, unsorted."""
    return np.argpartition(scores, -count, axis=1)[:, -count:]


def _where(mask: NDArray[np.bool_]) -> tuple[IntArray, IntArray]:
    """As np.nonzero, but faster for sparse masks."""
    row, column = np.divmod(np.flatnonzero(mask), mask.shape[1])
    return row, column


def _compare_all(
    distances: Distances, near: _Extremes, size: int, progress: Progress | None
) -> None:
    """Compute the scores of all pairs, tile by tile: cosines, or minus half squared distances."""
    vectors = float32_vectors(distances, distances.query, np.arange(len(distances.query)))
    halves = None
    if not distances.query.unit:
        squares = distances.query.squares.cpu().numpy() / distances.scale**2
        halves = (squares / 2).astype(np.float32)
    blocks = spans(len(vectors), size)
    # Tiles on the diagonal come first: sets are often sorted by pid, so few pairs of other tiles
    # are nearer and have to be merged.
    tiles = [(one, one) for one in blocks]
    tiles += [(one, other) for nth, one in enumerate(blocks) for other in blocks[nth + 1 :]]
    for done, (rows, columns) in enumerate(tiles, 1):
        # numpy's product is in full float32, whatever precision torch is set to.
        tile = vectors[rows] @ vectors[columns].T
        if halves is not None:
            tile -= halves[columns]
            tile -= halves[rows, None]
        near.add_rows(tile, rows, columns)
        if rows != columns:
            near.add_columns(tile, rows, columns)
        if progress:
            progress(done, len(tiles))


def _take(lists: ExactLists, near: _Extremes, queries: IntArray) -> NDArray[np.bool_]:
    """Fill in lists from the nearest pairs found; returns which of the lists are certain."""
    distances = lists.distances
    order = np.argsort(-near.scores[queries], axis=1, kind="stable")
    items = np.take_along_axis(near.items[queries], order, axis=1)
    scores = np.take_along_axis(near.scores[queries], order, axis=1).astype(np.float64)
    error = sum_error(distances.dim)
    # Items with lower scores than these cannot be among the first k.
    wanted = int((scores >= scores[:, lists.k - 1 : lists.k] - 2 * error).sum(axis=1).max())
    scale = 2 * distances.weight * distances.scale**2
    least = scale * ((1.0 if distances.query.unit else 0.0) - scores[:, -1] - error)
    if near.fetch == len(distances.query):
        least[:] = np.inf
    return lists.take(queries, items[:, :wanted], least)
