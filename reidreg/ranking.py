"""Query x gallery -> the exact position of every match, and ranked lists.

Count, do not sort. CMC, AP and INP need nothing but the position of each match in its query's
list, and a match's position is one more than the number of gallery items that come before it. So
the distances of the few matches are computed first; then the gallery passes by in tiles, and of
each tile is kept only how many items fall between which matches. No row is sorted, no query x
gallery matrix is held, and no list is cut at some k.

An item comes before another if its distance is smaller or, at equal distance, if it stands earlier
in the gallery. `reidreg.distances` says how equal vectors come to be at exactly equal distances.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reidreg.distances import (
    Distances,
    FloatArray,
    IntArray,
    Side,
    check_at_least,
    check_choice,
    ragged,
    spans,
)
from reidreg.errors import DataError
from reidreg.values import Embeddings

Ids: TypeAlias = Tensor | NDArray[Any] | Sequence[int]
Progress: TypeAlias = Callable[[int, int], None]

SAME_CAMERA = ("drop", "keep")
JUNK = -1  # a gallery item of this pid is left out for every query

_SPARE = 32  # further neighbours that a search fetches, so that rounding cannot hide one


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


@dataclass(frozen=True, slots=True)
class Matchable:
    """How many queries can be evaluated.

    Args:
        valid: Queries with a match.
        without_gallery: Queries whose identity is not in the gallery.
        same_camera_only: Queries whose identity is there, but under their own camera only.
    """

    valid: int
    without_gallery: int
    same_camera_only: int


# ---------------------------------------------------------------------------------- the labels


@dataclass(frozen=True, slots=True)
class _Labels:
    """The pids of both sides, and a number for each (pid, camera)."""

    query_pids: IntArray
    gallery_pids: IntArray
    query_places: IntArray
    gallery_places: IntArray
    query_camids: IntArray
    drop: bool

    @classmethod
    def of(
        cls, query_pids: Ids, query_camids: Ids, gallery_pids: Ids, gallery_camids: Ids, rule: str
    ) -> _Labels:
        check_choice("same_camera", rule, SAME_CAMERA)
        queries, query_camids = _ids("query", query_pids, query_camids)
        gallery, gallery_camids = _ids("gallery", gallery_pids, gallery_camids)
        _, pids = np.unique(np.concatenate([queries, gallery]), return_inverse=True)
        known, cameras = np.unique(
            np.concatenate([query_camids, gallery_camids]), return_inverse=True
        )
        places = (pids.reshape(-1) * len(known) + cameras.reshape(-1)).astype(np.int64)
        return cls(
            queries,
            gallery,
            places[: len(queries)],
            places[len(queries) :],
            query_camids,
            rule == "drop",
        )

    @property
    def kept(self) -> IntArray:
        """The gallery items that are not junk, ascending."""
        return np.flatnonzero(self.gallery_pids != JUNK).astype(np.int64)

    def hidden(self) -> IntArray:
        """(Q,) How many gallery items are left out because the query's camera took them."""
        if not self.drop:
            return np.zeros(len(self.query_pids), dtype=np.int64)
        return _occurrences(self.query_places, self.gallery_places[self.kept])

    def matches(self) -> tuple[IntArray, IntArray]:
        """All pairs (query, gallery item) that are a match, ordered by both."""
        order = self.kept[np.argsort(self.gallery_pids[self.kept], kind="stable")]
        pids = self.gallery_pids[order]
        first = np.searchsorted(pids, self.query_pids, side="left")
        sizes = np.searchsorted(pids, self.query_pids, side="right") - first
        queries = np.repeat(np.arange(len(sizes)), sizes)
        items = order[ragged(first, sizes)]
        if not self.drop:
            return queries, items
        other = self.query_places[queries] != self.gallery_places[items]
        return queries[other], items[other]


def check_matchable(
    query_pids: Ids,
    query_camids: Ids,
    gallery_pids: Ids,
    gallery_camids: Ids,
    same_camera: str = "drop",
) -> Matchable:
    """Look at the labels alone: how many queries have a match.

    Args:
        query_pids: (Q,) identities.
        query_camids: (Q,) cameras.
        gallery_pids: (G,) identities; -1 is junk.
        gallery_camids: (G,) cameras.
        same_camera: `drop` leaves out gallery items of the query's pid and camera; `keep` does not.

    Raises:
        DataError: No query has a match; the line names the likely cause.
        ConfigError: `same_camera` is neither.
    """
    labels = _Labels.of(query_pids, query_camids, gallery_pids, gallery_camids, same_camera)
    return _matchable(labels)


def _matchable(labels: _Labels) -> Matchable:
    shared = _occurrences(labels.query_pids, labels.gallery_pids[labels.kept])
    valid = int(np.count_nonzero(shared > labels.hidden()))
    absent = int(np.count_nonzero(shared == 0))
    if valid == 0:
        raise DataError(f"no query has a match in the gallery: {_why_unmatched(labels, absent)}")
    return Matchable(valid, absent, len(shared) - valid - absent)


def _why_unmatched(labels: _Labels, absent: int) -> str:
    count = len(labels.query_pids)
    if not len(labels.kept):
        return "all of its images are junk (pid -1); check its file names"
    if absent == count:
        one, other = int(labels.query_pids[0]), int(labels.gallery_pids[labels.kept[0]])
        return (
            f"not one of the {count} query images has its pid there (query has {one}, "
            f"gallery has {other}, ...); check the two folders and how pids are read"
        )
    cameras = np.unique(labels.query_camids)
    found = f"all cameras are {cameras[0]}" if len(cameras) == 1 else "each pid has only one camera"
    rest = f", and {absent} of {count} query images have no image of their pid" if absent else ""
    return (
        f"{found}, so leaving out same-camera items removes every match{rest}; "
        "use same_camera keep, or check how cameras are read"
    )


def _ids(side: str, pids: Ids, camids: Ids) -> tuple[IntArray, IntArray]:
    """Both as int64, after the checks that the rest relies on."""
    arrays = []
    for name, values in (("pids", pids), ("camids", camids)):
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        if array.ndim != 1 or not len(array):
            raise DataError(f"{side} {name}: one per image is needed, the shape is {array.shape}")
        if not np.issubdtype(array.dtype, np.integer):
            raise DataError(f"{side} {name}: integers are needed, not {array.dtype}")
        arrays.append(array.astype(np.int64))
    if len(arrays[0]) != len(arrays[1]):
        raise DataError(f"{side}: there are {len(arrays[0])} pids, but {len(arrays[1])} camids")
    return arrays[0], arrays[1]


def _occurrences(wanted: IntArray, among: IntArray) -> IntArray:
    """How often each of the wanted values is among the others."""
    ordered = np.sort(among)
    last = np.searchsorted(ordered, wanted, side="right")
    return (last - np.searchsorted(ordered, wanted, side="left")).astype(np.int64)


# -------------------------------------------------------------------------------- the counting


@dataclass(frozen=True, slots=True)
class _Plan:
    """How much is held at a time, so that the budget is kept.

    Args:
        queries: Query vectors.
        gallery: Gallery vectors.
        strip: Distances whose places among the matches are looked up at once.
    """

    queries: int
    gallery: int
    strip: int

    @classmethod
    def of(cls, budget_mib: float, dim: int) -> _Plan:
        check_at_least("budget_mib", budget_mib, 1)
        budget = int(budget_mib * 2**20)
        side = math.isqrt(budget // 64)  # a tile of distances takes an eighth
        return cls(
            queries=max(1, min(side, budget // 8 // (dim * 16))),
            gallery=max(1, min(side, budget // 2 // (dim * 40))),
            strip=budget // 4 // 128,
        )


class _Tally:
    """For each match of some queries: how many gallery items that are no match come before it.

    Every match is fenced by two edges, `slack` to either side of its distance, and one search
    tells how many edges lie below an item's distance. An even number says for certain which
    matches the item comes before; an odd number says that it is too close to one (a tie, as a
    rule), which is then settled by the exact distance and the place in the gallery.

    Args:
        labels: The labels of both sides.
        queries: (r,) the queries; row i of the distances belongs to `queries[i]`.
        sizes: (r,) how many matches each has.
        items: (m,) the gallery items that match, query by query.
        values: (m,) their exact distances.
        slack: How far an added distance may be from the exact one.
    """

    def __init__(
        self,
        labels: _Labels,
        queries: IntArray,
        sizes: IntArray,
        items: IntArray,
        values: Tensor,
        slack: float = 0.0,
    ) -> None:
        device = values.device
        rows = np.repeat(np.arange(len(queries)), sizes)
        order = torch.from_numpy(np.lexsort((items, values.cpu().numpy(), rows))).to(device)
        self.values = values[order]
        self.items = torch.from_numpy(items).to(device)[order]
        self.slack = slack
        self.sizes = sizes
        self.first = torch.from_numpy(_starts(sizes)).to(device)
        self.slot_first = 2 * self.first + torch.arange(len(self.first), device=device)
        self.slots = torch.zeros(int(self.slot_first[-1]), dtype=torch.int64, device=device)
        self.odd = torch.from_numpy(ragged(np.zeros_like(sizes), 2 * sizes + 1) % 2 == 1).to(device)
        self.query_pids = torch.from_numpy(labels.query_pids[queries]).to(device)
        self.gallery_pids = torch.from_numpy(labels.gallery_pids).to(device)

    def add(
        self,
        distances: Tensor,
        columns: IntArray,
        strip: int,
        exact: Callable[[IntArray, IntArray], Tensor] | None = None,
    ) -> None:
        """Count a tile.

        Args:
            distances: (r, c) distances within `slack`.
            columns: (c,) which gallery items the columns are; no junk.
            strip: How many distances to look up at once.
            exact: Gives the exact distances of pairs (row, column); None if `distances` are exact.
        """
        if not len(self.values):
            return
        here = torch.from_numpy(columns).to(distances.device)
        widest = max(len(columns), 2 * int(self.sizes.max(initial=0)))
        for span in spans(len(distances), max(1, strip // widest)):
            # All of the query's own pid are either a match, which is not counted, or left out.
            own = self.query_pids[span, None] == self.gallery_pids[here]
            values = distances[span].masked_fill(own, torch.finfo(distances.dtype).max)
            values = values.contiguous()
            slots = torch.searchsorted(self._edges(span), values, right=True, out_int32=True)
            begin, end = self.slot_first[span.start], self.slot_first[span.stop]
            flat = slots + (self.slot_first[span, None] - begin).to(torch.int32)
            counts = torch.bincount(flat.flatten(), minlength=int(end - begin))
            self.slots[begin:end] += counts
            if bool((counts * self.odd[begin:end]).any()):
                self._settle(span, slots, values, here, exact)

    def positions(self) -> IntArray:
        """(m,) The position of every match, from 1, ascending within each query."""
        # What is left in odd slots has been settled and counted in an even one.
        counts = self.slots[~self.odd].cpu().numpy()
        before = np.concatenate([[0], np.cumsum(counts)])
        starts = _starts(self.sizes + 1)[:-1]
        others = before[ragged(starts + 1, self.sizes)] - np.repeat(before[starts], self.sizes)
        nth = ragged(np.ones_like(self.sizes), self.sizes)
        return np.asarray(others + nth, dtype=np.int64)

    def _edges(self, span: slice) -> Tensor:
        """(rows, 2 * most matches) The two edges of each match, ascending, then infinity."""
        first, sizes = self.first[span, None], self.first[span.start + 1 : span.stop + 1, None]
        sizes = sizes - first
        nth = torch.arange(int(sizes.max()), device=first.device)
        values = self.values[(first + nth).clamp_(max=len(self.values) - 1)]
        lower = values - self.slack
        upper = torch.nextafter(values + self.slack, torch.full_like(values, torch.inf))
        edges = torch.stack([lower, upper], dim=2).masked_fill_(
            (nth >= sizes)[:, :, None], torch.inf
        )
        # Where fences overlap, the later begins where the earlier ends.
        return edges.flatten(1).cummax(dim=1).values

    def _settle(
        self,
        span: slice,
        slots: Tensor,
        values: Tensor,
        columns: Tensor,
        exact: Callable[[IntArray, IntArray], Tensor] | None,
    ) -> None:
        """Count the items that are too close to a match for the search to tell."""
        row, column = (slots % 2 == 1).nonzero(as_tuple=True)
        if exact is None:
            settled = values[row, column]
        else:
            settled = exact((row + span.start).cpu().numpy(), column.cpu().numpy())
        row = row + span.start
        place = self._place(row, settled, columns[column])
        self.slots += torch.bincount(self.slot_first[row] + 2 * place, minlength=len(self.slots))

    def _place(self, row: Tensor, value: Tensor, item: Tensor) -> Tensor:
        """How many of its row's matches come before each item: a binary search."""
        low, high = self.first[row], self.first[row + 1]
        for _ in range(int(self.sizes.max()).bit_length()):
            middle = ((low + high) // 2).clamp_(max=len(self.values) - 1)
            near = self.values[middle]
            before = (near < value) | ((near == value) & (self.items[middle] < item))
            going = low < high
            low = torch.where(going & before, middle + 1, low)
            high = torch.where(going & ~before, middle, high)
        return low - self.first[row]


def _starts(sizes: IntArray) -> IntArray:
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
    labels = _labels(query, gallery, same_camera)
    distances = Distances(query.features, gallery.features, metric, (query.paths, gallery.paths))
    _matchable(labels)
    plan = _Plan.of(budget_mib, distances.dim)
    queries, items = labels.matches()
    sizes = np.bincount(queries, minlength=len(labels.query_pids)).astype(np.int64)
    offsets = _starts(sizes)
    # Side by side, queries of one pid share the matches whose distances are wanted first.
    valid = np.flatnonzero(sizes)
    valid = valid[np.argsort(labels.query_pids[valid], kind="stable")]
    tallies = []
    for span in spans(len(valid), plan.queries):
        rows = valid[span]
        some = items[ragged(offsets[rows], sizes[rows])]
        values = distances.exact_pairs(np.repeat(rows, sizes[rows]), some, plan.gallery)
        tallies.append((rows, _Tally(labels, rows, sizes[rows], some, values, distances.slack)))
    _count(distances, labels.kept, tallies, plan, progress)
    positions = np.empty(len(items), dtype=np.int64)
    for rows, tally in tallies:
        positions[ragged(offsets[rows], sizes[rows])] = tally.positions()
    return MatchPositions(positions, offsets, len(labels.gallery_pids))


def _count(
    distances: Distances,
    kept: IntArray,
    tallies: Sequence[tuple[IntArray, _Tally]],
    plan: _Plan,
    progress: Progress | None,
) -> None:
    """Let the gallery pass by the queries."""
    pieces = spans(len(kept), plan.gallery)
    for done, piece in enumerate(pieces):
        columns = kept[piece]
        items = distances.gallery.rows(columns)
        for nth, (rows, tally) in enumerate(tallies):

            def exact(
                row: IntArray,
                column: IntArray,
                rows: IntArray = rows,
                columns: IntArray = columns,
            ) -> Tensor:
                return distances.exact_pairs(rows[row], columns[column], plan.gallery, plan.queries)

            tile = distances.approximate(distances.query.rows(rows), items)
            tally.add(tile, columns, plan.strip, exact)
            if progress:
                progress(done * len(tallies) + nth + 1, len(pieces) * len(tallies))


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
    labels = _Labels.of(query_pids, query_camids, gallery_pids, gallery_camids, same_camera)
    _matchable(labels)
    plan = _Plan.of(budget_mib, 1)
    total = len(labels.query_pids)
    queries, items = labels.matches()
    sizes = np.bincount(queries, minlength=total).astype(np.int64)
    offsets = _starts(sizes)
    positions = np.zeros(len(items), dtype=np.int64)
    seen = np.zeros(total, dtype=np.bool_)
    for start, values in rows:
        chunk = _rows(start, values, seen, len(labels.gallery_pids))
        own = np.arange(start, start + len(chunk))
        some = items[offsets[start] : offsets[start + len(chunk)]]
        index = np.repeat(np.arange(len(chunk)), sizes[own]), some
        tally = _Tally(labels, own, sizes[own], some, chunk[index])
        for piece in spans(len(labels.kept), plan.gallery):
            columns = labels.kept[piece]
            tally.add(chunk[:, torch.from_numpy(columns)], columns, plan.strip)
        positions[offsets[start] : offsets[start + len(chunk)]] = tally.positions()
        if progress:
            progress(int(seen.sum()), total)
    if not seen.all():
        raise DataError(f"distances are missing for {int((~seen).sum())} of {total} queries")
    return MatchPositions(positions, offsets, len(labels.gallery_pids))


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


def _labels(query: Embeddings, gallery: Embeddings, same_camera: str) -> _Labels:
    """The labels of both sides, as many as there are features."""
    for name, side in (("query", query), ("gallery", gallery)):
        count = side.features.shape[0] if side.features.ndim else 0
        if count != len(side.pids):
            raise DataError(f"{name}: there are {count} features, but {len(side.pids)} pids")
    return _Labels.of(query.pids, query.camids, gallery.pids, gallery.camids, same_camera)


# -------------------------------------------------------------------------------- ranked lists


def ranked_lists(
    query: Embeddings,
    gallery: Embeddings,
    *,
    k: int,
    metric: str = "cosine",
    same_camera: str = "drop",
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
        budget_mib: Memory to use beside the features and a float32 copy of them, in MiB.

    Returns:
        Gallery indices (Q, k) int64, -1 where there are fewer, and distances (Q, k) float32,
        infinite where there are fewer; both on the CPU.

    Raises:
        DataError: The features or labels do not fit together, or are not finite.
        ConfigError: An option is wrong.
    """
    check_at_least("k", k, 1)
    labels = _labels(query, gallery, same_camera)
    distances = Distances(query.features, gallery.features, metric, (query.paths, gallery.paths))
    plan = _Plan.of(budget_mib, distances.dim)
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

    def __init__(self, distances: Distances, labels: _Labels, k: int, plan: _Plan) -> None:
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
        out = labels.gallery_pids[items] == JUNK
        if labels.drop:
            out |= labels.gallery_places[items] == labels.query_places[queries, None]
        return np.asarray(out)

    def _float32(self, side: Side, index: IntArray) -> NDArray[np.float32]:
        """The vectors divided by the longest norm, so that no square overflows."""
        out = np.empty((len(index), self.distances.dim), dtype=np.float32)
        for span in spans(len(index), self.plan.gallery):
            out[span] = side.rows(index[span]).vectors.div_(self.scale).cpu().numpy()
        return out
