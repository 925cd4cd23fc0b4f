"""Query x gallery -> the exact position of every match.

Count, do not sort. CMC, AP and INP need nothing but the position of each match in its query's
list, and a match's position is one more than the number of gallery items that come before it. So
the distances of the few matches are computed first; then the gallery passes by in tiles, and of
each tile is kept only how many items fall between which matches. No row is sorted, no query x
gallery matrix is held, and no list is cut at some k.

An item comes before another if its distance is smaller or, at equal distance, if it stands earlier
in the gallery. `reidreg.retrieval.distances` says how equal vectors come to be at exactly equal
distances.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reidreg.errors import DataError
from reidreg.machine.cores import one_thread_for_numpy
from reidreg.retrieval.distances import (
    Distances,
    FloatArray,
    IntArray,
    Plan,
    even_spans,
    full_float32,
    ragged,
    spans,
)
from reidreg.retrieval.matching import Ids, MatchLabels, count_matchable, labels_of_sides, same_pid
from reidreg.values import Embeddings

Progress: TypeAlias = Callable[[int, int], None]

_GROUP = 8  # queries whose matches are measured together
_FEW = 1 / 16  # share of a block's pairs up to which they are looked at one by one


@dataclass(frozen=True, slots=True)
class MatchPositions:
    """Where each query's matches stand in its list.

    Args:
        positions: (M,) int64, from 1, ascending within each query.
        offsets: (Q + 1,) int64; query q's matches are `positions[offsets[q]:offsets[q + 1]]`. A
            query without a match has none.
        num_gallery: The size of the gallery, with all that was left out for some query.
    """

    positions: IntArray
    offsets: IntArray
    num_gallery: int


# -------------------------------------------------------------------------------- the counting


class _Fences:
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

    def settle(self, unsettled: _Unsettled, values: FloatArray) -> None:
        """Count items whose distances are known so well that their order is certain."""
        place = self._place(unsettled, values) + unsettled.queries
        self.before += np.bincount(place, minlength=len(self.before))

    def nearest(self, unsettled: _Unsettled, values: FloatArray) -> FloatArray:
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

    def _place(self, unsettled: _Unsettled, values: FloatArray) -> IntArray:
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


class _Unsettled(NamedTuple):
    """Items that fell into a zone: their queries, themselves, and the zones, (n,) each."""

    queries: IntArray
    items: IntArray
    zones: IntArray


class _Tally:
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

    def __init__(
        self, fences: _Fences, queries: IntArray, most: int, waiting: _WaitingRoom
    ) -> None:
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
        self._waiting.add(_Unsettled(queries, items[which], zones))


class _WaitingRoom:
    """Items that must be settled, until they are many.

    Together, more of them are of one query, whose vector is then fetched once.

    Args:
        settle: Settles them.
        most: How many may wait.
    """

    def __init__(self, settle: Callable[[_Unsettled], None], most: int) -> None:
        self._settle, self._most = settle, most
        self._held: list[_Unsettled] = []

    def add(self, unsettled: _Unsettled) -> None:
        self._held.append(unsettled)
        if sum(len(one.items) for one in self._held) > self._most:
            self.empty()

    def empty(self) -> None:
        """Settle those that are still there."""
        held, self._held = self._held, []
        if any(len(one.items) for one in held):
            self._settle(_Unsettled(*(np.concatenate(parts) for parts in zip(*held, strict=True))))


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


def starts_of(sizes: IntArray) -> IntArray:
    """Where each of the runs starts, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def match_positions(
    query: Embeddings,
    gallery: Embeddings,
    *,
    metric: str = "cosine",
    same_camera: str = "drop",
    budget_mib: float = 256,
    progress: Progress | None = None,
) -> MatchPositions:
    """The exact position of every match in its query's list.

    The outcome does not depend on the budget, the number of threads or the order of the queries.

    Args:
        query: Q embeddings, on the CPU or a GPU.
        gallery: G embeddings; where either side is on a GPU, the work is done there.
        metric: `cosine` or `euclidean` (squared).
        same_camera: `drop` leaves out gallery items of the query's pid and camera; `keep` leaves
            out junk alone.
        budget_mib: Memory to use beside the features, in MiB.
        progress: Called with the number of tiles done and of all.

    Raises:
        DataError: The features or labels do not fit together, are not finite, or match nowhere.
        ConfigError: An option is wrong.
    """
    labels = labels_of_sides(query, gallery, same_camera)
    count_matchable(labels)
    distances = Distances(query.features, gallery.features, metric, (query.paths, gallery.paths))
    plan = Plan.of(budget_mib, distances.dim, len(labels.query_pids))
    queries, items = labels.matches()
    # Side by side, queries of one pid share the matches whose distances are wanted.
    order = np.argsort(labels.query_pids[queries], kind="stable")
    queries, items = queries[order], items[order]
    some = [slice(*ends) for ends in pairwise(_cuts(labels.query_pids[queries], queries))]
    with one_thread_for_numpy():
        values = np.concatenate(
            [distances.near_pairs(queries[part], items[part], plan.exact) for part in some]
        )
    scores = distances.score_of(queries, values)
    fences = _Fences(queries, items, values, scores, distances.score_slack, len(labels.query_pids))
    with full_float32():
        _pass_by(distances, labels, fences, plan, progress)
    return MatchPositions(fences.positions(), fences.first, len(labels.gallery_pids))


def _cuts(pids: IntArray, queries: IntArray) -> list[int]:
    """Where to cut matches, ordered by pid and query, so that no pid is cut that need not be.

    The vectors of a pid's gallery items are then fetched once. Each part has the fewest whole pids
    that make `_GROUP` queries.
    """
    # Not by differences, which overflow where pids are as far apart as int64 allows.
    begins = np.flatnonzero(np.append(True, pids[1:] != pids[:-1]))
    number = np.cumsum(np.append(False, queries[1:] != queries[:-1]))[begins]
    parts = number // _GROUP
    return [*begins[np.flatnonzero(np.diff(parts, prepend=-1))].tolist(), len(pids)]


def _pass_by(
    distances: Distances,
    labels: MatchLabels,
    fences: _Fences,
    plan: Plan,
    progress: Progress | None,
) -> None:
    """Let the gallery pass by the queries, tile by tile."""
    pieces = even_spans(len(labels.kept), plan.gallery)
    valid = np.flatnonzero(fences.sizes)
    blocks = even_spans(len(valid), plan.queries)
    memory = torch.empty(plan.queries * plan.gallery, dtype=torch.float32, device=distances.device)
    waiting = _WaitingRoom(functools.partial(_settle, distances, fences, plan), plan.strip)
    for done, block in enumerate(blocks):
        rows = valid[block]
        vectors = distances.score_queries(rows)
        tally = _Tally(fences, rows, plan.strip, waiting)
        for nth, piece in enumerate(pieces):
            columns = labels.kept[piece]
            tile = memory[: len(rows) * len(columns)].view(len(rows), len(columns))
            distances.scores(vectors, distances.score_items(columns), out=tile)
            _hide_own(tile, labels, rows, columns)
            tally.add(tile, columns)
            if progress:
                progress(done * len(pieces) + nth + 1, len(blocks) * len(pieces))
        tally.finish()
    waiting.empty()


def _hide_own(tile: Tensor, labels: MatchLabels, rows: IntArray, columns: IntArray) -> None:
    """Make a tile's (r, c) pairs of one pid infinite: a match is not counted, the rest left out."""
    tile[same_pid(labels.query_pids[rows], labels.gallery_pids[columns])] = torch.inf


def _settle(distances: Distances, fences: _Fences, plan: Plan, unsettled: _Unsettled) -> None:
    """Find the order of those that float32 could not tell apart: by float64, then exactly."""
    order = np.argsort(unsettled.queries, kind="stable")
    unsettled = _Unsettled(*(part[order] for part in unsettled))
    block = len(np.unique(unsettled.queries)) * len(np.unique(unsettled.items))
    pairs = unsettled.queries, unsettled.items
    if len(unsettled.items) <= _FEW * block:
        values = distances.pairs(*pairs)
    else:  # so many that whole blocks cost less than one after the other
        with one_thread_for_numpy():
            values = distances.near_pairs(*pairs, plan.exact)
    close = np.flatnonzero(fences.nearest(unsettled, values) <= 3 * distances.slack)
    if len(close):
        exact = functools.partial(distances.exact_pairs, width=plan.exact)
        fences.refine(np.unique(unsettled.zones[close]), exact)
        values[close] = exact(*(side[close] for side in pairs))
    fences.settle(unsettled, values)


def match_positions_of_rows(
    rows: Iterable[tuple[int, Tensor | NDArray[Any]]],
    query_pids: Ids,
    query_camids: Ids,
    gallery_pids: Ids,
    gallery_camids: Ids,
    *,
    same_camera: str = "drop",
    budget_mib: float = 256,
    progress: Progress | None = None,
) -> MatchPositions:
    """The exact position of every match, from distances that are given.

    Args:
        rows: Pairs of a first query and the distances (q, G) of that and the following ones; each
            query once, in any order.
        query_pids: (Q,) identities.
        query_camids: (Q,) cameras.
        gallery_pids: (G,) identities; -1 is junk.
        gallery_camids: (G,) cameras.
        same_camera: As for `match_positions`.
        budget_mib: Memory to use beside the rows, in MiB.
        progress: Called with the number of queries done and of all.

    Raises:
        DataError: Distances are missing or not finite, or no query has a match.
        ConfigError: An option is wrong.
    """
    labels = MatchLabels.of(query_pids, query_camids, gallery_pids, gallery_camids, same_camera)
    count_matchable(labels)
    total = len(labels.query_pids)
    plan = Plan.of(budget_mib, 1, total)
    queries, items = labels.matches()
    offsets = starts_of(np.bincount(queries, minlength=total))
    positions = np.zeros(len(items), dtype=np.int64)
    seen = np.zeros(total, dtype=np.bool_)
    for start, values in rows:
        chunk = _rows(start, values, seen, len(labels.gallery_pids))
        span = slice(offsets[start], offsets[start + len(chunk)])
        if span.stop > span.start:
            matches = queries[span] - start, items[span]
            positions[span] = _of_chunk(chunk, labels, start, *matches, plan)
        if progress:
            progress(int(seen.sum()), total)
    if not seen.all():
        raise DataError(f"distances are missing for {int((~seen).sum())} of {total} queries")
    return MatchPositions(positions, offsets, len(labels.gallery_pids))


def _of_chunk(
    chunk: Tensor,
    labels: MatchLabels,
    start: int,
    queries: IntArray,
    items: IntArray,
    plan: Plan,
) -> IntArray:
    """The positions of the matches (query, item) in some rows of given distances."""
    values = chunk[queries, items].double().cpu().numpy()
    # The score is the distance in float32, which differs by no more than the next number's edge.
    fences = _Fences(queries, items, values, values, 0.0, len(chunk))

    def settle(unsettled: _Unsettled) -> None:
        found = chunk[unsettled.queries, unsettled.items].double().cpu().numpy()
        fences.settle(unsettled, found)

    valid = np.flatnonzero(fences.sizes)
    waiting = _WaitingRoom(settle, plan.strip)
    for block in spans(len(valid), plan.queries):
        rows = valid[block]
        tally = _Tally(fences, rows, plan.strip, waiting)
        for piece in spans(len(labels.kept), plan.gallery):
            columns = labels.kept[piece]
            tile = chunk[torch.from_numpy(rows)[:, None], torch.from_numpy(columns)].float()
            _hide_own(tile, labels, start + rows, columns)
            tally.add(tile, columns)
        tally.finish()
    waiting.empty()
    return fences.positions()


def _rows(start: int, values: Tensor | NDArray[Any], seen: NDArray[np.bool_], width: int) -> Tensor:
    """A checked chunk of distances; marks its queries as seen."""
    chunk = torch.as_tensor(values).detach()
    if chunk.dtype not in (torch.float32, torch.float64):
        chunk = chunk.to(torch.float32)
    fits = chunk.ndim == 2 and chunk.shape[1] == width and 0 <= start <= len(seen) - len(chunk)
    if not fits or seen[start : start + len(chunk)].any():
        raise DataError(
            f"distances from query {start} on, of shape {tuple(chunk.shape)}, do not fit "
            f"{len(seen)} queries, each once, and {width} gallery items"
        )
    if not bool(torch.isfinite(chunk).all()):
        first = start + int((~torch.isfinite(chunk)).any(dim=1).nonzero()[0])
        raise DataError(f"distances are not finite, the first are those of query {first}")
    seen[start : start + len(chunk)] = True
    return chunk
