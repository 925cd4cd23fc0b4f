"""The queries that a report shows, with their ranked gallery images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from reidreg.errors import DataError
from reidreg.evaluation.evaluate import Evaluation
from reidreg.values import Embeddings

Verdict = Literal["match", "miss", "left out"]


@dataclass(frozen=True)
class RankedImage:
    """A gallery image in the ranked list of a query.

    Args:
        path: Its file.
        pid: Its identity.
        camid: Its camera.
        distance: Its distance to the query.
        verdict: match, miss, or left out (not counted by the evaluation).
        position: Its rank among the counted images, from 1; None if it is left out.
    """

    path: str
    pid: int
    camid: int
    distance: float
    verdict: Verdict
    position: int | None


@dataclass(frozen=True)
class RankedQuery:
    """A query with the first images of its ranked list.

    Args:
        group: Why it is shown: best, worst or random.
        path: Its file.
        pid: Its identity.
        camid: Its camera.
        precision: Its average precision.
        images: Gallery images, nearest first.
    """

    group: str
    path: str
    pid: int
    camid: int
    precision: float
    images: tuple[RankedImage, ...]


def ranked_queries(evaluation: Evaluation, *, rows: int, k: int) -> list[RankedQuery]:
    """The best, the worst and some random queries, each with its ranked gallery.

    Args:
        evaluation: The evaluation.
        rows: Queries of each group.
        k: Counted gallery images of each query. Up to k that are left out may come between them.

    Raises:
        DataError: There is not one path for each feature.
    """
    query, gallery = evaluation.query, evaluation.gallery
    for side, name in ((query, "query"), (gallery, "gallery")):
        if len(side.paths) != len(side.pids):
            raise DataError(
                f"ranked galleries show images, but the {name} has {len(side.paths)} paths for "
                f"{len(side.pids)} features"
            )
    precision = evaluation.evaluator.precisions(query, gallery)
    picked = pick_queries(precision, rows)
    chosen = [(group, row) for group, some in picked for row in some]
    if not chosen:
        return []
    sides = _take(query, [row for _, row in chosen]), gallery
    counted = _lists(*evaluation.evaluator.rank(*sides, 2 * k))
    everything = _lists(*evaluation.evaluator.rank_everything(*sides, 2 * k))
    return [
        RankedQuery(
            group,
            query.paths[row],
            int(query.pids[row]),
            int(query.camids[row]),
            precision[row].item(),
            tuple(_ranked(gallery, int(query.pids[row]), first, all_first, k)),
        )
        for (group, row), first, all_first in zip(chosen, counted, everything, strict=True)
    ]


def pick_queries(precision: Tensor, rows: int) -> list[tuple[str, list[int]]]:
    """The rows of the queries to show: the best, the worst, and random ones of the rest.

    Args:
        precision: (Q,) average precision, NaN where a query has no match.
        rows: Queries of each group.
    """
    valid = torch.nonzero(~precision.isnan()).flatten()
    order = valid[torch.sort(precision[valid], descending=True, stable=True).indices].tolist()
    best = order[:rows]
    worst = [query for query in order[::-1][:rows] if query not in best]
    rest = [query for query in order if query not in best and query not in worst]
    some = np.random.default_rng(0).permutation(len(rest))[:rows]
    picked = [rest[position] for position in sorted(some.tolist())]
    groups = [("best", best), ("worst", worst), ("random", picked)]
    return [(group, queries) for group, queries in groups if queries]


def _lists(indices: Tensor, distances: Tensor) -> list[dict[int, float]]:
    """The distances of each query by gallery row, nearest first."""
    return [
        {item: distance for item, distance in zip(*lists, strict=True) if item >= 0}
        for lists in zip(indices.tolist(), distances.tolist(), strict=True)
    ]


def _ranked(
    gallery: Embeddings,
    pid: int,
    counted: dict[int, float],
    everything: dict[int, float],
    k: int,
) -> Iterator[RankedImage]:
    """The first k counted images, with those that are left out between them."""
    position = 0
    # Where more than k are left out, the remaining counted images follow after `everything`.
    for item, distance in {**everything, **counted}.items():
        if position == min(k, len(counted)):
            return
        counts = item in counted
        position += counts
        own = int(gallery.pids[item])
        yield RankedImage(
            gallery.paths[item],
            own,
            int(gallery.camids[item]),
            distance,
            "left out" if not counts else "match" if own == pid else "miss",
            position if counts else None,
        )


def _take(embeddings: Embeddings, rows: Sequence[int]) -> Embeddings:
    index = torch.tensor(rows, dtype=torch.int64)
    return Embeddings(
        embeddings.features[index],
        embeddings.pids[index],
        embeddings.camids[index],
        tuple(embeddings.paths[row] for row in rows),
    )
