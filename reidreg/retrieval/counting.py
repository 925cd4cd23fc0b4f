"""Count, for each match, the gallery items that come before it.

A match's score is known only to within the rounding of float32, so it stands for an interval of
scores. Items between intervals are counted by their float32 scores; only items inside an interval
(ties, as a rule) need a more precise distance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reidreg.retrieval.arrays import FloatArray, IntArray, ragged, starts_of
from reidreg.retrieval.blocks import spans


class ScoreIntervals:
    """The matches' score intervals, and how many non-matching items come before each match.

    Outside of a match's interval, an item's float32 score alone decides which of the two comes
    first. Overlapping intervals of a query are merged. An item inside an interval is ordered by its
    exact distance and its gallery index. Items behind a query's last interval, which for a trained
    model are nearly all, are not looked at again.

    Args:
        queries: (M,) the query of each match.
        items: (M,) the gallery item of each match, ascending within each query.
        values: (M,) float64, the matches' distances; see `refine`.
        scores: (M,) float64, the matches' scores.
        slack: Bound on the difference of an item's score and the score of its exact distance.
        count: The number of queries.
    """

    def __init__(
        self,
        queries: IntArray,
        items: IntArray,
        values: FloatArray,
        scores: FloatArray,
        slack: float,
        count: int,
    ) -> None:
        order = np.lexsort((values, queries))  # stable: of equal values the earlier item first
        queries, scores = queries[order], scores[order]
        self.items, self.values = items[order], values[order]
        self.sizes = np.bincount(queries, minlength=count).astype(np.int64)
        self.first_match = starts_of(self.sizes)  # of each query
        lower = np.nextafter((scores - slack).astype(np.float32), np.float32(-np.inf))
        upper = np.nextafter((scores + slack).astype(np.float32), np.float32(np.inf))
        new = np.ones(len(queries), dtype=np.bool_)
        new[1:] = (queries[1:] != queries[:-1]) | (lower[1:] >= upper[:-1])
        begins = np.flatnonzero(new)
        self.starts = np.append(begins, len(queries))  # the first match of each interval
        self.first_interval = np.searchsorted(begins, self.first_match)  # of each query
        self.exact = np.zeros(len(begins), dtype=np.bool_)  # whose matches have exact distances
        self.lower = lower[begins]
        self.upper = upper[self.starts[1:] - 1] if len(begins) else upper
        # Items between neighbouring matches. Query q has a slot before each of its matches and one
        # behind the last; its slots begin at first_match[q] + q.
        self.before = np.zeros(len(queries) + count, dtype=np.int64)

    def count(self, undecided: Undecided, values: FloatArray) -> None:
        """Count items whose distances (n,) are precise enough to make their order certain."""
        slot = self._next_match(undecided, values) + undecided.queries
        self.before += np.bincount(slot, minlength=len(self.before))

    def nearest(self, undecided: Undecided, values: FloatArray) -> FloatArray:
        """(n,) The difference in distance to the nearest match of the item's interval."""
        match = self._next_match(undecided, values)
        first = self.starts[undecided.intervals]
        last = self.starts[undecided.intervals + 1] - 1
        below = np.abs(values - self.values[np.clip(match - 1, first, last)])
        return np.minimum(below, np.abs(values - self.values[np.clip(match, first, last)]))

    def refine(
        self, intervals: IntArray, exact: Callable[[IntArray, IntArray], FloatArray]
    ) -> None:
        """Make the distances of all matches of some intervals exact, and sort them again.

        Earlier counts stay valid: a counted item is further from each match than the matches that
        change places are from each other.
        """
        intervals = intervals[~self.exact[intervals]]
        self.exact[intervals] = True
        sizes = self.starts[intervals + 1] - self.starts[intervals]
        where = ragged(self.starts[intervals], sizes)
        queries = np.searchsorted(self.first_match, where, side="right") - 1
        items = self.items[where]
        values = exact(queries, items)
        order = np.lexsort((items, values, np.repeat(intervals, sizes)))
        self.items[where], self.values[where] = items[order], values[order]

    def _next_match(self, undecided: Undecided, values: FloatArray) -> IntArray:
        """(n,) The match that each item comes just before: a binary search in its interval."""
        low = self.starts[undecided.intervals]
        high = self.starts[undecided.intervals + 1]
        widest = int((high - low).max(initial=0))
        for _ in range(widest.bit_length()):
            middle = np.minimum((low + high) // 2, len(self.values) - 1)
            value = self.values[middle]
            earlier = self.items[middle] < undecided.items
            before = (value < values) | ((value == values) & earlier)
            searching = low < high
            low = np.where(searching & before, middle + 1, low)
            high = np.where(searching & ~before, middle, high)
        return low

    def positions(self) -> IntArray:
        """(M,) The position of every match, from 1, ascending within each query."""
        total = np.concatenate([[0], np.cumsum(self.before)])
        start = self.first_match[:-1] + np.arange(len(self.sizes))
        others = total[ragged(start + 1, self.sizes)] - np.repeat(total[start], self.sizes)
        return np.asarray(others + ragged(np.ones_like(self.sizes), self.sizes), dtype=np.int64)


class Undecided(NamedTuple):
    """Items inside an interval: their queries, gallery indices and intervals, (n,) each."""

    queries: IntArray
    items: IntArray
    intervals: IntArray


class TileCounter:
    """Counts, for a block of queries, the items between their intervals, tile by tile.

    Items before a query's last interval are collected; a full buffer is sorted, and the bounds of
    the intervals are looked up in it. This runs on one thread: numpy's steps are so short that two
    threads would wait for each other.

    Args:
        intervals: Where the counts are added.
        queries: (r,) ascending, at most `MemoryPlan.queries`; each has a match.
        most: How many scores to look at, and how many items to collect, at a time.
        deferred: Where items inside an interval go.
    """

    def __init__(
        self, intervals: ScoreIntervals, queries: IntArray, most: int, deferred: Deferred
    ) -> None:
        # Queries without a match have no interval, so those of the others are adjacent.
        first_interval = intervals.first_interval
        self._first, last = first_interval[queries[0]], first_interval[queries[-1] + 1]
        sizes = first_interval[queries + 1] - first_interval[queries]
        row = np.repeat(np.arange(len(queries)), sizes)
        lower, upper = (side[self._first : last] for side in (intervals.lower, intervals.upper))
        self._bounds = _keys(np.repeat(row, 2), np.stack([lower, upper], 1).reshape(-1))
        self._slots = intervals.starts[self._first : last] + queries[row]
        self._last = intervals.upper[first_interval[queries + 1] - 1]
        self._intervals, self._queries, self._most = intervals, queries, most
        self._deferred = deferred
        self._kept: list[tuple[IntArray, IntArray]] = []  # keys and items

    def add(self, scores: Tensor, items: IntArray) -> None:
        """Count a tile.

        Args:
            scores: (r, c) float32, infinite for items that are not to be counted.
            items: (c,) the gallery indices of the columns.
        """
        for piece in spans(len(self._queries), max(1, self._most // max(1, len(items)))):
            rows, columns, values = _below(scores[piece], self._last[piece])
            self._kept.append((_keys(rows + piece.start, values), items[columns]))
            if sum(len(keys) for keys, _ in self._kept) >= self._most:
                self._count()

    def finish(self) -> None:
        """Count what is still in the buffer."""
        if self._kept:
            self._count()

    def _count(self) -> None:
        keys, items = (np.concatenate(parts) for parts in zip(*self._kept, strict=True))
        self._kept = []
        keys += np.arange(len(keys))
        keys.sort()
        ends = np.searchsorted(keys, self._bounds)
        inside = ends[1::2] - ends[::2]
        self._intervals.before[self._slots] += ends[::2] - np.append(0, ends[1:-1:2])
        intervals = self._first + np.repeat(np.arange(len(inside)), inside)
        which = keys[ragged(ends[::2], inside)] & (2**_ORDINAL - 1)
        queries = np.searchsorted(self._intervals.first_interval, intervals, side="right") - 1
        self._deferred.add(Undecided(queries, items[which], intervals))


class Deferred:
    """Collects undecided items and resolves many at a time.

    More of them then share a query, whose vector is fetched once.

    Args:
        resolve: Decides the order of undecided items and counts them.
        most: How many items to collect.
    """

    def __init__(self, resolve: Callable[[Undecided], None], most: int) -> None:
        self._resolve, self._most = resolve, most
        self._held: list[Undecided] = []

    def add(self, undecided: Undecided) -> None:
        self._held.append(undecided)
        if sum(len(one.items) for one in self._held) > self._most:
            self.flush()

    def flush(self) -> None:
        """Resolve all items collected so far."""
        held, self._held = self._held, []
        if any(len(one.items) for one in held):
            self._resolve(Undecided(*(np.concatenate(parts) for parts in zip(*held, strict=True))))


# A sort key is, from high to low bits: the row, the score's bits in sortable order, the item's
# number in the buffer.
_ORDINAL = 20  # twice `MemoryPlan.strip`: as many may be kept, and as many be added to them


def _keys(rows: IntArray, scores: NDArray[np.float32]) -> IntArray:
    """Integers that sort by row and, within a row, by score; the item's number is left at 0."""
    bits = scores.view(np.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)
    return (rows << 32 + _ORDINAL) + (ordered << _ORDINAL)


def _below(
    scores: Tensor, last: NDArray[np.float32]
) -> tuple[IntArray, IntArray, NDArray[np.float32]]:
    """Rows, columns and values of the scores (r, c) below their row's `last` (r,)."""
    if scores.is_cuda:
        found = scores < torch.from_numpy(last).to(scores.device)[:, None]
        row, column = found.nonzero(as_tuple=True)
        return row.cpu().numpy(), column.cpu().numpy(), scores[row, column].cpu().numpy()
    values = scores.numpy()
    flat = np.flatnonzero(values < last[:, None])
    row = flat // values.shape[1]
    return row, flat - row * values.shape[1], values.reshape(-1).take(flat)
