"""The exact k-nearest-neighbour graph of one set, with each image's farthest distance.

A set compared with itself is symmetric, so half of the tiles of a matrix product in float32 show
all pairs: each tile is looked at from both of its sides, and its nearest and farthest pairs are
kept. That is half of the work of a search, which would not tell the farthest. What float32 cannot
order is settled as for ranked lists (`reidreg.retrieval.ranked_lists`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reidreg.retrieval.arrays import FloatArray, IntArray
from reidreg.retrieval.blocks import Progress, spans
from reidreg.retrieval.distances import Distances
from reidreg.retrieval.ranked_lists import ExactLists, float32_vectors, sum_error

_SPARE = 16  # further neighbours that are kept, so that rounding cannot hide one
_TILE = 2048  # rows and columns of a tile
_BLOCK = 256  # rows that are put in order together

FloatTile = NDArray[np.float32]


class Graph(NamedTuple):
    """The neighbours of N images.

    Args:
        items: (N, k) the nearest images, nearest first; of two at equal distance the earlier one.
        values: (N, k) their distances.
        farthest: (N,) the distance of the farthest image.
    """

    items: IntArray
    values: FloatArray
    farthest: FloatArray


def neighbour_graph(distances: Distances, k: int, *, progress: Progress | None = None) -> Graph:
    """The k nearest of each image among all of them, itself included, and the farthest distance.

    The outcome does not depend on the number of threads.

    Args:
        distances: Of a set with itself.
        k: How many; cut to the size of the set.
        progress: Called with the number of tiles done and of all.
    """
    count = len(distances.query)
    k = min(k, count)
    near = _Extremes(count, min(k + _SPARE, count))
    _pass_by(distances, near, progress)
    lists = ExactLists(distances, k)
    everyone = np.arange(count)
    sure = [_take(lists, near, everyone[span]) for span in spans(count, _BLOCK)]
    unsure = everyone[~np.concatenate(sure)]
    lists.complete(unsure, everyone, np.full(len(unsure), 4 * near.fetch))
    farthest = distances.listed(everyone, near.last[:, None])[:, 0]
    return Graph(lists.items, lists.values, farthest)


class _Extremes:
    """The largest scores of each image so far, and the smallest; a higher score is nearer.

    `scores` and `items` (N, fetch) are the largest, in no order; `least` (N,) is the smallest of
    them, which a score must exceed to be taken in. `low` and `last` (N,) are the smallest of all.
    """

    def __init__(self, count: int, fetch: int) -> None:
        self.fetch = fetch
        self.scores = np.full((count, fetch), -np.inf, dtype=np.float32)
        self.items = np.zeros((count, fetch), dtype=np.int64)
        self.least = np.full(count, -np.inf, dtype=np.float32)
        self.low = np.full(count, np.inf, dtype=np.float32)
        self.last = np.zeros(count, dtype=np.int64)

    def see(self, tile: FloatTile, rows: slice, columns: slice) -> None:
        """Look at the scores of some images with others from the side of the rows."""
        above = tile > self.least[rows, None]
        if np.count_nonzero(above) > tile.size // 8 and tile.shape[1] > self.fetch:
            # The first tile of these rows: all of it is more than there was.
            strips = [_largest(tile[strip], self.fetch) for strip in spans(len(tile), _BLOCK)]
            row = np.repeat(np.arange(len(tile)), self.fetch)
            column = np.concatenate(strips).reshape(-1)
        else:
            row, column = _where(above)
        self._add(row + rows.start, column + columns.start, tile[row, column])
        column = tile.argmin(axis=1)
        self._lower(np.arange(rows.start, rows.stop), column + columns.start, tile.min(axis=1))

    def see_across(self, tile: FloatTile, rows: slice, columns: slice) -> None:
        """Look at the same scores from the side of the columns."""
        row, column = _where(tile > self.least[columns])
        order = np.argsort(column, kind="stable")
        row, column = row[order], column[order]
        self._add(column + columns.start, row + rows.start, tile[row, column])
        row, column = _where(tile < self.low[columns])
        scores = tile[row, column]
        order = np.argsort(-scores, kind="stable")
        # Of an image's new scores the lowest comes last, and stays.
        self._lower(column[order] + columns.start, row[order] + rows.start, scores[order])

    def _add(self, owners: IntArray, items: IntArray, scores: FloatTile) -> None:
        """Take in further scores; the owners are in order."""
        starts = np.flatnonzero(np.diff(owners, prepend=-1))
        if not len(starts):
            return
        own = owners[starts]
        sizes = np.diff(starts, append=len(owners))
        row = np.repeat(np.arange(len(own)), sizes)
        place = np.arange(len(owners)) - np.repeat(starts, sizes) + self.fetch
        shape = len(own), self.fetch + int(sizes.max())
        all_scores = np.full(shape, -np.inf, dtype=np.float32)
        all_items = np.zeros(shape, dtype=np.int64)
        all_scores[:, : self.fetch], all_items[:, : self.fetch] = self.scores[own], self.items[own]
        all_scores[row, place], all_items[row, place] = scores, items
        kept = _largest(all_scores, self.fetch)
        self.scores[own] = np.take_along_axis(all_scores, kept, axis=1)
        self.items[own] = np.take_along_axis(all_items, kept, axis=1)
        self.least[own] = self.scores[own].min(axis=1)

    def _lower(self, owners: IntArray, items: IntArray, scores: FloatTile) -> None:
        lower = scores < self.low[owners]
        self.low[owners[lower]], self.last[owners[lower]] = scores[lower], items[lower]


def _largest(scores: FloatTile, count: int) -> IntArray:
    """(n, count) Where the largest of each row are, in no order."""
    return np.argpartition(scores, -count, axis=1)[:, -count:]


def _where(mask: NDArray[np.bool_]) -> tuple[IntArray, IntArray]:
    """As np.nonzero, which is slow where little is true."""
    row, column = np.divmod(np.flatnonzero(mask), mask.shape[1])
    return row, column


def _pass_by(distances: Distances, near: _Extremes, progress: Progress | None) -> None:
    """Let all pairs pass by once.

    The score is the cosine, or minus half of the squared distance.
    """
    vectors = float32_vectors(distances, distances.query, np.arange(len(distances.query)))
    halves = None
    if not distances.query.unit:
        squares = distances.query.squares.cpu().numpy() / distances.scale**2
        halves = (squares / 2).astype(np.float32)
    blocks = spans(len(vectors), _TILE)
    # A tile of an image's own block comes first: sets are often ordered by pid, so that few pairs
    # of the other tiles are nearer than what it shows.
    tiles = [(one, one) for one in blocks]
    tiles += [(one, other) for nth, one in enumerate(blocks) for other in blocks[nth + 1 :]]
    for done, (rows, columns) in enumerate(tiles, 1):
        # numpy's product is in float32 whatever precision torch is set to.
        tile = vectors[rows] @ vectors[columns].T
        if halves is not None:
            tile -= halves[columns]
            tile -= halves[rows, None]
        near.see(tile, rows, columns)
        if rows != columns:
            near.see_across(tile, rows, columns)
        if progress:
            progress(done, len(tiles))


def _take(lists: ExactLists, near: _Extremes, queries: IntArray) -> NDArray[np.bool_]:
    """Fill in lists from the nearest pairs seen; says for which of the images they are certain."""
    distances = lists.distances
    order = np.argsort(-near.scores[queries], axis=1, kind="stable")
    items = np.take_along_axis(near.items[queries], order, axis=1)
    scores = np.take_along_axis(near.scores[queries], order, axis=1).astype(np.float64)
    error = sum_error(distances.dim)
    # An item beyond this cannot be among the first k.
    wanted = int((scores >= scores[:, lists.k - 1 : lists.k] - 2 * error).sum(axis=1).max())
    scale = 2 * distances.weight * distances.scale**2
    least = scale * ((1.0 if distances.query.unit else 0.0) - scores[:, -1] - error)
    if near.fetch == len(distances.query):
        least[:] = np.inf
    return lists.take(queries, items[:, :wanted], least)
