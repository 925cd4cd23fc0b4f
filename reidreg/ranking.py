"""Query x gallery -> the exact position of every match.

Count, do not sort. CMC, AP and INP need nothing but the position of each match in its query's
list, and a match's position is one more than the number of gallery items that come before it. So
the distances of the few matches are computed first; then the gallery passes by in tiles, and of
each tile is kept only how many items fall between which matches. No row is sorted, no query x
gallery matrix is held, and no list is cut at some k.

An item comes before another if its distance is smaller or, at equal distance, if it stands earlier
in the gallery. `reidreg.distances` says how equal vectors come to be at exactly equal distances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reidreg.distances import (
    Distances,
    IntArray,
    Plan,
    ragged,
    spans,
)
from reidreg.errors import DataError
from reidreg.matching import Ids, MatchLabels, count_matchable, labels_of_sides
from reidreg.values import Embeddings

Progress: TypeAlias = Callable[[int, int], None]


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
        labels: MatchLabels,
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
    labels = labels_of_sides(query, gallery, same_camera)
    distances = Distances(query.features, gallery.features, metric, (query.paths, gallery.paths))
    count_matchable(labels)
    plan = Plan.of(budget_mib, distances.dim)
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
    plan: Plan,
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
    labels = MatchLabels.of(query_pids, query_camids, gallery_pids, gallery_camids, same_camera)
    count_matchable(labels)
    plan = Plan.of(budget_mib, 1)
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
