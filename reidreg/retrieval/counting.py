"""Counts, for each match, how many gallery items come before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reidreg.retrieval.arrays import FloatArray, IntArray, ragged, starts_of
from reidreg.retrieval.blocks import spans


class Fences:
    """Counts, for each match, the gallery items that are no match and come before it.

    Every match is fenced by two scores, so far to either side of its own that an item's float32
    score below or above both says for certain which of the two comes first. Fences that overlap
    make one zone. What falls between zones is counted; what falls into a zone (a tie, as a rule) is
    settled by the exact distance and the place in the gallery; what falls behind a query's last
    zone, which in a trained model's lists is nearly all of the gallery, is not looked at again.

    Args:
        queries: (M,) the query of each match.
        items: (M,) the gallery item of each match, ascending within each query.
        values: (M,) float64, their distances; see `refine`.
        scores: (M,) float64, their scores.
        slack: How far an item's score may be from the one that its exact distance has.
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
        self.first = starts_of(self.sizes)
        lower = np.nextafter((scores - slack).astype(np.float32), np.float32(-np.inf))
        upper = np.nextafter((scores + slack).astype(np.float32), np.float32(np.inf))
        new = np.ones(len(queries), dtype=np.bool_)
        new[1:] = (queries[1:] != queries[:-1]) | (lower[1:] >= upper[:-1])
        begins = np.flatnonzero(new)
        self.zone_first = np.append(begins, len(queries))  # the first match of each zone
        self.zones = np.searchsorted(begins, self.first)  # the first zone of each query
        self.exact = np.zeros(len(begins), dtype=np.bool_)  # whose matches have exact distances
        self.lower = lower[begins]
        self.upper = upper[self.zone_first[1:] - 1] if len(begins) else upper
        # Items just before each match, and behind each query's last: query q's begin at first + q.
        self.before = np.zeros(len(queries) + count, dtype=np.int64)

    def settle(self, unsettled: Unsettled, values: FloatArray) -> None:
        """Count items whose distances are known so well that their order is certain."""
        place = self._place(unsettled, values) + unsettled.queries
        self.before += np.bincount(place, minlength=len(self.before))

    def nearest(self, unsettled: Unsettled, values: FloatArray) -> FloatArray:
        """How far each item is from the nearest match of its zone, by distance."""
        place = self._place(unsettled, values)
        first = self.zone_first[unsettled.zones]
        last = self.zone_first[unsettled.zones + 1] - 1
        below = np.abs(values - self.values[np.clip(place - 1, first, last)])
        return np.minimum(below, np.abs(values - self.values[np.clip(place, first, last)]))

    def refine(self, zones: IntArray, exact: Callable[[IntArray, IntArray], FloatArray]) -> None:
        """Make the distances of all matches of some zones exact, and order them anew.

        What was settled before is not touched by that: it is further from each match than the
        matches that change places are from each other.
        """
        zones = zones[~self.exact[zones]]
        self.exact[zones] = True
        sizes = self.zone_first[zones + 1] - self.zone_first[zones]
        where = ragged(self.zone_first[zones], sizes)
        queries = np.searchsorted(self.first, where, side="right") - 1
        items = self.items[where]
        values = exact(queries, items)
        order = np.lexsort((items, values, np.repeat(zones, sizes)))
        self.items[where], self.values[where] = items[order], values[order]

    def _place(self, unsettled: Unsettled, values: FloatArray) -> IntArray:
        """The match that each item comes just before: a binary search in its zone."""
        low = self.zone_first[unsettled.zones]
        high = self.zone_first[unsettled.zones + 1]
        widest = int((high - low).max(initial=0))
        for _ in range(widest.bit_length()):
            middle = np.minimum((low + high) // 2, len(self.values) - 1)
            near = self.values[middle]
            earlier = self.items[middle] < unsettled.items
            before = (near < values) | ((near == values) & earlier)
            going = low < high
            low = np.where(going & before, middle + 1, low)
            high = np.where(going & ~before, middle, high)
        return low

    def positions(self) -> IntArray:
        """(M,) The position of every match, from 1, ascending within each query."""
        total = np.concatenate([[0], np.cumsum(self.before)])
        start = self.first[:-1] + np.arange(len(self.sizes))
        others = total[ragged(start + 1, self.sizes)] - np.repeat(total[start], self.sizes)
        return np.asarray(others + ragged(np.ones_like(self.sizes), self.sizes), dtype=np.int64)


class Unsettled(NamedTuple):
    """Items that fell into a zone: their queries, themselves, and the zones, (n,) each."""

    queries: IntArray
    items: IntArray
    zones: IntArray


class Tally:
    """Counts, for some queries, the items that come before their zones.

    Those before a query's last zone are kept until they are many; then they are put in order, and
    the edges of the zones looked up among them. That takes one thread: numpy's steps are so short
    that two would wait for each other.

    Args:
        fences: Where the counts go.
        queries: (r,) ascending, at most `Plan.queries`; each has a match.
        most: How many scores to look at, and how many items to keep, at once.
        waiting: Where items go that must be settled.
    """

    def __init__(self, fences: Fences, queries: IntArray, most: int, waiting: WaitingRoom) -> None:
        # Queries without a match have no zone, so those of the others lie side by side.
        self._first, last = fences.zones[queries[0]], fences.zones[queries[-1] + 1]
        sizes = fences.zones[queries + 1] - fences.zones[queries]
        row = np.repeat(np.arange(len(queries)), sizes)
        edges = np.stack([fences.lower[self._first : last], fences.upper[self._first : last]], 1)
        self._edges = _keys(np.repeat(row, 2), edges.reshape(-1))
        self._places = fences.zone_first[self._first : last] + queries[row]
        self._last = fences.upper[fences.zones[queries + 1] - 1]
        self._fences, self._queries, self._most = fences, queries, most
        self._waiting = waiting
        self._kept: list[tuple[IntArray, IntArray]] = []  # keys and items

    def add(self, scores: Tensor, items: IntArray) -> None:
        """See a tile.

        Args:
            scores: (r, c) float32, infinite for items that are not to be counted.
            items: (c,) which gallery items the columns are.
        """
        for piece in spans(len(self._queries), max(1, self._most // max(1, len(items)))):
            rows, columns, values = _below(scores[piece], self._last[piece])
            self._kept.append((_keys(rows + piece.start, values), items[columns]))
            if sum(len(keys) for keys, _ in self._kept) >= self._most:
                self._count()

    def finish(self) -> None:
        """Count what is still kept."""
        if self._kept:
            self._count()

    def _count(self) -> None:
        keys, items = (np.concatenate(parts) for parts in zip(*self._kept, strict=True))
        self._kept = []
        keys += np.arange(len(keys))
        keys.sort()
        ends = np.searchsorted(keys, self._edges)
        inside = ends[1::2] - ends[::2]
        self._fences.before[self._places] += ends[::2] - np.append(0, ends[1:-1:2])
        zones = self._first + np.repeat(np.arange(len(inside)), inside)
        which = keys[ragged(ends[::2], inside)] & (2**_ORDINAL - 1)
        queries = np.searchsorted(self._fences.zones, zones, side="right") - 1
        self._waiting.add(Unsettled(queries, items[which], zones))


class WaitingRoom:
    """Items that must be settled, until they are many.

    Together, more of them are of one query, whose vector is then fetched once.

    Args:
        settle: Settles them.
        most: How many may wait.
    """

    def __init__(self, settle: Callable[[Unsettled], None], most: int) -> None:
        self._settle, self._most = settle, most
        self._held: list[Unsettled] = []

    def add(self, unsettled: Unsettled) -> None:
        self._held.append(unsettled)
        if sum(len(one.items) for one in self._held) > self._most:
            self.empty()

    def empty(self) -> None:
        """Settle those that are still there."""
        held, self._held = self._held, []
        if any(len(one.items) for one in held):
            self._settle(Unsettled(*(np.concatenate(parts) for parts in zip(*held, strict=True))))


# A key is a row, the bits of a score in an order of whole numbers, and a number for an item.
_ORDINAL = 20  # twice `Plan.strip`: as many may be kept, and as many be added to them


def _keys(rows: IntArray, scores: NDArray[np.float32]) -> IntArray:
    """Whole numbers that order as the rows do and, within a row, as the scores do."""
    bits = scores.view(np.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)
    return (rows << 32 + _ORDINAL) + (ordered << _ORDINAL)


def _below(
    scores: Tensor, last: NDArray[np.float32]
) -> tuple[IntArray, IntArray, NDArray[np.float32]]:
    """Rows, columns and values of the scores (r, c) below each row's last."""
    if scores.is_cuda:
        found = scores < torch.from_numpy(last).to(scores.device)[:, None]
        row, column = found.nonzero(as_tuple=True)
        return row.cpu().numpy(), column.cpu().numpy(), scores[row, column].cpu().numpy()
    values = scores.numpy()
    place = np.flatnonzero(values < last[:, None])
    row = place // values.shape[1]
    return row, place - row * values.shape[1], values.reshape(-1).take(place)
