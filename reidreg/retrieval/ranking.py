"""Query x gallery -> the exact position of every match.

Positions are counted, not sorted. CMC, AP and INP need only the position of each match in its
query's list, which is one more than the number of gallery items before it. So the distances of the
few matches are computed first; then all distances are computed tile by tile, and of each tile only
the number of items between neighbouring matches is kept. No row is sorted, no query x gallery
matrix is held, and no list is cut at some k.

An item comes before another if its distance is smaller or, at equal distance, if its gallery index
is. `reidreg.retrieval.distances` explains why equal vectors are at exactly equal distances.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reidreg.errors import DataError
from reidreg.machine.cores import one_thread_for_numpy
from reidreg.retrieval.arrays import IntArray, starts_of
from reidreg.retrieval.blocks import MemoryPlan, Progress, even_spans, spans
from reidreg.retrieval.counting import Deferred, ScoreIntervals, TileCounter, Undecided
from reidreg.retrieval.distances import Distances, full_float32
from reidreg.retrieval.matching import Ids, MatchLabels, count_matchable, labels_of_sides, same_pid
from reidreg.values import Embeddings

_GROUP = 8  # queries whose matches are measured together
_FEW = 1 / 16  # up to this share of a block's pairs, single pairs cost less than the whole block


@dataclass(frozen=True, slots=True)
class MatchPositions:
    """The position of each query's matches in its ranked list.

    Args:
        positions: (M,) int64, from 1, ascending within each query.
        offsets: (Q + 1,) int64; query q's matches are `positions[offsets[q]:offsets[q + 1]]`,
            which is empty for a query without a match.
        num_gallery: The size of the gallery, including items left out for some queries.
    """

    positions: IntArray
    offsets: IntArray
    num_gallery: int


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

    The result does not depend on the budget, the number of threads or the order of the queries.

    Args:
        query: Q embeddings, on the CPU or a GPU.
        gallery: G embeddings; if either side is on a GPU, the GPU does the work.
        metric: `cosine` or `euclidean` (squared).
        same_camera: `drop` leaves out gallery items of the query's pid and camera; `keep` leaves
            out junk only.
        budget_mib: Memory to use in addition to the features, in MiB.
        progress: Called with the number of tiles done and of all.

    Raises:
        DataError: Shapes do not match, a feature is not finite, or no query has a match.
        ConfigError: An option is wrong.
    """
    labels = labels_of_sides(query, gallery, same_camera)
    count_matchable(labels)
    distances = Distances(query.features, gallery.features, metric, (query.paths, gallery.paths))
    plan = MemoryPlan.of(budget_mib, distances.dim, len(labels.query_pids))
    queries, items = labels.matches()
    # Queries of one pid share their matches, whose vectors are fetched once if they are adjacent.
    order = np.argsort(labels.query_pids[queries], kind="stable")
    queries, items = queries[order], items[order]
    some = [slice(*ends) for ends in pairwise(_cuts(labels.query_pids[queries], queries))]
    with one_thread_for_numpy():
        values = np.concatenate(
            [distances.near_pairs(queries[part], items[part], plan.exact) for part in some]
        )
    scores = distances.score_of(queries, values)
    slack, count = distances.score_slack, len(labels.query_pids)
    intervals = ScoreIntervals(queries, items, values, scores, slack, count)
    with full_float32():
        _count_all(distances, labels, intervals, plan, progress)
    offsets = intervals.first_match
    return MatchPositions(intervals.positions(), offsets, len(labels.gallery_pids))


def _cuts(pids: IntArray, queries: IntArray) -> list[int]:
    """Where to cut matches that are sorted by pid and query.

    Each part has the fewest whole pids that make `_GROUP` queries, so that the vectors of a pid's
    gallery items are fetched once.
    """
    # Compared, not subtracted: a difference of two int64 pids may overflow.
    begins = np.flatnonzero(np.append(True, pids[1:] != pids[:-1]))
    number = np.cumsum(np.append(False, queries[1:] != queries[:-1]))[begins]
    parts = number // _GROUP
    return [*begins[np.flatnonzero(np.diff(parts, prepend=-1))].tolist(), len(pids)]


def _count_all(
    distances: Distances,
    labels: MatchLabels,
    intervals: ScoreIntervals,
    plan: MemoryPlan,
    progress: Progress | None,
) -> None:
    """Score the whole gallery tile by tile and count the items before each match."""
    pieces = even_spans(len(labels.kept), plan.gallery)
    valid = np.flatnonzero(intervals.sizes)
    blocks = even_spans(len(valid), plan.queries)
    memory = torch.empty(plan.queries * plan.gallery, dtype=torch.float32, device=distances.device)
    deferred = Deferred(functools.partial(_resolve, distances, intervals, plan), plan.strip)
    for done, block in enumerate(blocks):
        rows = valid[block]
        vectors = distances.score_queries(rows)
        counter = TileCounter(intervals, rows, plan.strip, deferred)
        for nth, piece in enumerate(pieces):
            columns = labels.kept[piece]
            tile = memory[: len(rows) * len(columns)].view(len(rows), len(columns))
            distances.scores(vectors, distances.score_items(columns), out=tile)
            _hide_same_pid(tile, labels, rows, columns)
            counter.add(tile, columns)
            if progress:
                progress(done * len(pieces) + nth + 1, len(blocks) * len(pieces))
        counter.finish()
    deferred.flush()


def _hide_same_pid(tile: Tensor, labels: MatchLabels, rows: IntArray, columns: IntArray) -> None:
    """Set a tile's (r, c) pairs of one pid to infinity: only non-matching items are counted."""
    tile[same_pid(labels.query_pids[rows], labels.gallery_pids[columns])] = torch.inf


def _resolve(
    distances: Distances, intervals: ScoreIntervals, plan: MemoryPlan, undecided: Undecided
) -> None:
    """Count items that float32 could not order: by distances in float64, then by exact ones."""
    order = np.argsort(undecided.queries, kind="stable")
    undecided = Undecided(*(part[order] for part in undecided))
    block = len(np.unique(undecided.queries)) * len(np.unique(undecided.items))
    pairs = undecided.queries, undecided.items
    if len(undecided.items) <= _FEW * block:
        values = distances.pairs(*pairs)
    else:
        with one_thread_for_numpy():
            values = distances.near_pairs(*pairs, plan.exact)
    close = np.flatnonzero(intervals.nearest(undecided, values) <= 3 * distances.slack)
    if len(close):
        exact = functools.partial(distances.exact_pairs, width=plan.exact)
        intervals.refine(np.unique(undecided.intervals[close]), exact)
        values[close] = exact(*(side[close] for side in pairs))
    intervals.count(undecided, values)


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
    """The exact position of every match, from given distances.

    Args:
        rows: Pairs (first query, distances (q, G) of it and the following queries); each query
            once, in any order.
        query_pids: (Q,) identities.
        query_camids: (Q,) cameras.
        gallery_pids: (G,) identities; -1 is junk.
        gallery_camids: (G,) cameras.
        same_camera: As for `match_positions`.
        budget_mib: Memory to use in addition to the rows, in MiB.
        progress: Called with the number of queries done and of all.

    Raises:
        DataError: Distances are missing or not finite, or no query has a match.
        ConfigError: An option is wrong.
    """
    labels = MatchLabels.of(query_pids, query_camids, gallery_pids, gallery_camids, same_camera)
    count_matchable(labels)
    total = len(labels.query_pids)
    plan = MemoryPlan.of(budget_mib, 1, total)
    queries, items = labels.matches()
    offsets = starts_of(np.bincount(queries, minlength=total))
    positions = np.zeros(len(items), dtype=np.int64)
    seen = np.zeros(total, dtype=np.bool_)
    for start, values in rows:
        chunk = _checked_rows(start, values, seen, len(labels.gallery_pids))
        span = slice(offsets[start], offsets[start + len(chunk)])
        if span.stop > span.start:
            matches = queries[span] - start, items[span]
            positions[span] = _positions_in_rows(chunk, labels, start, *matches, plan)
        if progress:
            progress(int(seen.sum()), total)
    if not seen.all():
        raise DataError(f"distances are missing for {int((~seen).sum())} of {total} queries")
    return MatchPositions(positions, offsets, len(labels.gallery_pids))


def _positions_in_rows(
    chunk: Tensor,
    labels: MatchLabels,
    start: int,
    queries: IntArray,
    items: IntArray,
    plan: MemoryPlan,
) -> IntArray:
    """The positions of the matches (query, item) in some rows of given distances."""
    values = chunk[queries, items].double().cpu().numpy()
    # The score is the distance rounded to float32, which the interval allows for without slack.
    intervals = ScoreIntervals(queries, items, values, values, 0.0, len(chunk))

    def resolve(undecided: Undecided) -> None:
        found = chunk[undecided.queries, undecided.items].double().cpu().numpy()
        intervals.count(undecided, found)

    valid = np.flatnonzero(intervals.sizes)
    deferred = Deferred(resolve, plan.strip)
    for block in spans(len(valid), plan.queries):
        rows = valid[block]
        counter = TileCounter(intervals, rows, plan.strip, deferred)
        for piece in spans(len(labels.kept), plan.gallery):
            columns = labels.kept[piece]
            tile = chunk[torch.from_numpy(rows)[:, None], torch.from_numpy(columns)].float()
            _hide_same_pid(tile, labels, start + rows, columns)
            counter.add(tile, columns)
        counter.finish()
    deferred.flush()
    return intervals.positions()


def _checked_rows(
    start: int, values: Tensor | NDArray[Any], seen: NDArray[np.bool_], width: int
) -> Tensor:
    """A chunk of distances, checked, as a tensor; marks its queries as seen."""
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
