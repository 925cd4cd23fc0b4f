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
from reidreg.retrieval.blocks import Plan, Progress, even_spans, spans
from reidreg.retrieval.counting import Fences, Tally, Unsettled, WaitingRoom
from reidreg.retrieval.distances import Distances, full_float32
from reidreg.retrieval.matching import Ids, MatchLabels, count_matchable, labels_of_sides, same_pid
from reidreg.values import Embeddings

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
    fences = Fences(queries, items, values, scores, distances.score_slack, len(labels.query_pids))
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
    fences: Fences,
    plan: Plan,
    progress: Progress | None,
) -> None:
    """Let the gallery pass by the queries, tile by tile."""
    pieces = even_spans(len(labels.kept), plan.gallery)
    valid = np.flatnonzero(fences.sizes)
    blocks = even_spans(len(valid), plan.queries)
    memory = torch.empty(plan.queries * plan.gallery, dtype=torch.float32, device=distances.device)
    waiting = WaitingRoom(functools.partial(_settle, distances, fences, plan), plan.strip)
    for done, block in enumerate(blocks):
        rows = valid[block]
        vectors = distances.score_queries(rows)
        tally = Tally(fences, rows, plan.strip, waiting)
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


def _settle(distances: Distances, fences: Fences, plan: Plan, unsettled: Unsettled) -> None:
    """Find the order of those that float32 could not tell apart: by float64, then exactly."""
    order = np.argsort(unsettled.queries, kind="stable")
    unsettled = Unsettled(*(part[order] for part in unsettled))
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
    fences = Fences(queries, items, values, values, 0.0, len(chunk))

    def settle(unsettled: Unsettled) -> None:
        found = chunk[unsettled.queries, unsettled.items].double().cpu().numpy()
        fences.settle(unsettled, found)

    valid = np.flatnonzero(fences.sizes)
    waiting = WaitingRoom(settle, plan.strip)
    for block in spans(len(valid), plan.queries):
        rows = valid[block]
        tally = Tally(fences, rows, plan.strip, waiting)
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
