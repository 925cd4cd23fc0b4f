"""The single-shot protocol of CUHK03: repeated draws of a gallery with one image per identity.

Li et al., DeepReID: Deep Filter Pairing Neural Network for Person Re-identification, CVPR 2014. In
each repeat and for each query, one image of every identity is drawn from the gallery that the
same-camera rule leaves, and the query's one match is ranked among them. The CMC curve is the
average over the repeats. With one match, AP and INP are both 1 / position; mAP and mINP are its
mean over queries and repeats, and cannot be compared with figures that count every match.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from reidreg.errors import DataError
from reidreg.retrieval.arrays import IntArray, starts_of
from reidreg.retrieval.blocks import MemoryPlan, Progress, spans
from reidreg.retrieval.distances import Distances
from reidreg.retrieval.matching import Ids, MatchLabels, count_matchable, labels_of_sides
from reidreg.retrieval.options import check_at_least
from reidreg.retrieval.ranking import MatchPositions
from reidreg.values import Embeddings

Rows = Iterable[tuple[int, "Tensor | NDArray[Any]"]]


def single_shot_positions(
    query: Embeddings,
    gallery: Embeddings,
    *,
    metric: str = "cosine",
    same_camera: str = "drop",
    repeats: int = 10,
    seed: int = 0,
    budget_mib: float = 256,
    progress: Progress | None = None,
) -> MatchPositions:
    """The position of each query's one match in every repeat.

    All distances are computed exactly, which is fast enough for a gallery of thousands.

    Args:
        query: Q embeddings.
        gallery: G embeddings.
        metric: `cosine` or `euclidean` (squared).
        same_camera: `drop` or `keep`.
        repeats: The number of draws for each query.
        seed: The draws depend only on the seed, the query's index and the labels.
        budget_mib: Memory to use in addition to the features, in MiB.
        progress: Called with the number of queries done and of all.

    Returns:
        Positions of Q * repeats lists, the repeats of a query one after the other.

    Raises:
        DataError: Shapes do not match, a feature is not finite, or no query has a match.
        ConfigError: An option is wrong.
    """
    labels = labels_of_sides(query, gallery, same_camera)
    count_matchable(labels)
    distances = Distances(query.features, gallery.features, metric, (query.paths, gallery.paths))
    rows = _exact_rows(distances, budget_mib)
    return _positions(rows, labels, repeats, seed, progress)


def single_shot_positions_of_rows(
    rows: Rows,
    query_pids: Ids,
    query_camids: Ids,
    gallery_pids: Ids,
    gallery_camids: Ids,
    *,
    same_camera: str = "drop",
    repeats: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> MatchPositions:
    """As `single_shot_positions`, from given distances as `match_positions_of_rows` takes them.

    Raises:
        DataError: Distances are missing or not finite, or no query has a match.
        ConfigError: An option is wrong.
    """
    labels = MatchLabels.of(query_pids, query_camids, gallery_pids, gallery_camids, same_camera)
    count_matchable(labels)
    return _positions(rows, labels, repeats, seed, progress)


def _exact_rows(distances: Distances, budget_mib: float) -> Iterator[tuple[int, Tensor]]:
    plan = MemoryPlan.of(budget_mib, distances.dim, len(distances.query))
    # A row is held three times: on the device, on the CPU, and by identity.
    size = max(1, int(budget_mib * 2**20) // 4 // (len(distances.gallery) * 24))
    for span in spans(len(distances.query), min(size, plan.queries)):
        yield span.start, distances.rows(span, plan.exact, exact=True)


def _positions(
    rows: Rows, labels: MatchLabels, repeats: int, seed: int, progress: Progress | None
) -> MatchPositions:
    check_at_least("repeats", repeats, 1)
    draw = _Draw(labels, repeats, seed)
    total = len(labels.query_pids)
    found: dict[int, IntArray] = {}
    for start, chunk in rows:
        values = chunk.cpu().numpy() if isinstance(chunk, Tensor) else np.asarray(chunk)
        fits = values.shape[1:] == (len(labels.gallery_pids),) and start + len(values) <= total
        if not fits or not np.isfinite(values).all():
            raise DataError(f"distances from query {start} on are not finite, or do not fit")
        if not found.keys().isdisjoint(range(start, start + len(values))):
            raise DataError(f"distances from query {start} on are given twice")
        found |= {q: draw.positions(q, row) for q, row in enumerate(values, start)}
        if progress:
            progress(len(found), total)
    if len(found) < total:
        raise DataError(f"distances are missing for {total - len(found)} of {total} queries")
    sizes = np.repeat([len(found[query]) > 0 for query in range(total)], repeats)
    offsets = starts_of(sizes)
    positions = np.concatenate([found[query] for query in range(total)])
    return MatchPositions(positions, offsets, len(labels.gallery_pids))


class _Draw:
    """Draws galleries of one image per identity.

    Args:
        labels: The labels of both sides.
        repeats: The number of galleries to draw for each query.
        seed: The seed of the draws.
    """

    def __init__(self, labels: MatchLabels, repeats: int, seed: int) -> None:
        kept = labels.kept
        self.order = kept[np.argsort(labels.gallery_pids[kept], kind="stable")]
        self.pids, self.first, self.sizes = np.unique(
            labels.gallery_pids[self.order], return_index=True, return_counts=True
        )
        self.query_pids = labels.query_pids
        queries, items = labels.matches()
        counts = np.bincount(queries, minlength=len(labels.query_pids))
        self.matches = np.split(items, np.cumsum(counts)[:-1])
        self.repeats, self.seed = repeats, seed

    def positions(self, query: int, row: NDArray[Any]) -> IntArray:
        """(repeats,) The position of the match in each drawn gallery; (0,) if there is none."""
        matches = self.matches[query]
        if not len(matches):
            return np.empty(0, dtype=np.int64)
        # One generator per query, so that the draws do not depend on the size of chunks.
        draws = np.random.default_rng((self.seed, query)).random((self.repeats, len(self.pids)))
        items = self.order[self.first + (draws * self.sizes).astype(np.int64)]
        own = int(np.searchsorted(self.pids, self.query_pids[query]))
        match = matches[(draws[:, own] * len(matches)).astype(np.int64)][:, None]
        nearer = (row[items] < row[match]) | ((row[items] == row[match]) & (items < match))
        nearer[:, own] = False
        return np.asarray(nearer.sum(axis=1) + 1, dtype=np.int64)
