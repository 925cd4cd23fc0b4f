"""Which queries a report shows, and what came back for each."""

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
    """A gallery image where it came for a query.

    Args:
        path: Its file.
        pid: Whose image it is.
        camid: The camera that took it.
        distance: How far it is from the query.
        verdict: match, miss, or left out: the evaluation does not count it.
        position: Its place among those that count, from 1; None where it is left out.
    """

    path: str
    pid: int
    camid: int
    distance: float
    verdict: Verdict
    position: int | None


@dataclass(frozen=True)
class RankedQuery:
    """A query with the first of its gallery.

    Args:
        sort: Why it is shown: best, worst or random.
        path: Its file.
        pid: Whom to find.
        camid: The camera that took it.
        precision: Its average precision.
        images: The gallery, nearest first.
    """

    sort: str
    path: str
    pid: int
    camid: int
    precision: float
    images: tuple[RankedImage, ...]


def ranked_queries(evaluation: Evaluation, *, rows: int, k: int) -> list[RankedQuery]:
    """The best, the worst and some random queries, each with its ranked gallery.

    Args:
        evaluation: What to show.
        rows: Queries of each sort.
        k: Gallery images that count, for each query. As many again that are left out may stand
            between them.

    Raises:
        DataError: The features do not say which images they are of.
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
    chosen = [(sort, row) for sort, some in picked for row in some]
    if not chosen:
        return []
    sides = _take(query, [row for _, row in chosen]), gallery
    counted = _lists(*evaluation.evaluator.rank(*sides, 2 * k))
    everything = _lists(*evaluation.evaluator.rank_everything(*sides, 2 * k))
    return [
        RankedQuery(
            sort,
            query.paths[row],
            int(query.pids[row]),
            int(query.camids[row]),
            precision[row].item(),
            tuple(_ranked(gallery, int(query.pids[row]), first, all_first, k)),
        )
        for (sort, row), first, all_first in zip(chosen, counted, everything, strict=True)
    ]


def pick_queries(precision: Tensor, rows: int) -> list[tuple[str, list[int]]]:
    """Queries to show, none twice: the best, the worst, and some of the others.

    Args:
        precision: (Q,) average precision, NaN where a query has no match.
        rows: How many of each sort.
    """
    valid = torch.nonzero(~precision.isnan()).flatten()
    order = valid[torch.sort(precision[valid], descending=True, stable=True).indices].tolist()
    best = order[:rows]
    worst = [query for query in order[::-1][:rows] if query not in best]
    rest = [query for query in order if query not in best and query not in worst]
    some = np.random.default_rng(0).permutation(len(rest))[:rows]
    picked = [rest[position] for position in sorted(some.tolist())]
    sections = [("best", best), ("worst", worst), ("random", picked)]
    return [(sort, queries) for sort, queries in sections if queries]


def _lists(indices: Tensor, distances: Tensor) -> list[dict[int, float]]:
    """For each query its items, nearest first, with their distances."""
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
    """The first k items that count, and among them those that are left out."""
    position = 0
    # Where more than k are left out, the rest of those that count comes after `everything`.
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
