"""Bootstrap confidence intervals of an evaluation's figures over its identities.

The percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13):
draw a sample of the same size with replacement, compute its figures, and repeat; the middle 95 % of
the figures is the interval.

Identities are drawn, each with all of its queries. Queries of one identity share matches and
clothes, so they succeed and fail together; drawing single queries would treat them as independent
and give intervals that are too narrow. The gallery and the model are fixed: an interval says
nothing about another training run. With few identities the intervals are still too narrow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reidreg.errors import DataError
from reidreg.retrieval.arrays import FloatArray
from reidreg.retrieval.blocks import spans
from reidreg.retrieval.matching import Ids
from reidreg.retrieval.metrics import average_precisions, inverse_negative_penalties
from reidreg.retrieval.options import check_at_least
from reidreg.retrieval.ranking import MatchPositions

LEVEL = 0.95
_HELD = 2**21  # weights that are held at a time


def bootstrap_intervals(
    matches: MatchPositions,
    pids: Ids,
    *,
    resamples: int = 1000,
    ap: str = "rectangle",
    seed: int = 0,
    chunk: int | None = None,
) -> dict[str, list[float]]:
    """The 95 % intervals of mAP, mINP and rank-k, by drawing identities.

    Args:
        matches: The positions of each query's matches.
        pids: (Q,) the queries' identities.
        resamples: The number of resamples.
        ap: `rectangle` or `trapezoid`, as for the figures.
        seed: The same seed gives the same intervals.
        chunk: Resamples at a time; None takes as many as fit 16 MiB.

    Returns:
        `mAP, mINP, rank1, rank5, rank10`, each with its lower and upper bound.

    Raises:
        DataError: No query has a match, or the number of pids is not that of the queries.
        ConfigError: An option is wrong.
    """
    check_at_least("resamples", resamples, 1)
    if chunk is not None:
        check_at_least("chunk", chunk, 1)
    identities = torch.as_tensor(pids).cpu().numpy()
    if len(identities) != len(matches.offsets) - 1:
        raise DataError(
            f"there are {len(identities)} pids, but matches of {len(matches.offsets) - 1} queries"
        )
    values = _values(matches, ap)
    sums = _sums(values, identities[np.diff(matches.offsets) > 0])
    generator = np.random.default_rng(seed)
    count = len(sums)
    means = np.empty((resamples, values.shape[1]))
    for span in spans(resamples, chunk or max(1, _HELD // count)):
        size = span.stop - span.start
        weights = generator.multinomial(count, np.full(count, 1 / count), size=size)
        totals = weights.astype(np.float64) @ sums
        means[span] = totals[:, :-1] / totals[:, -1:]
    tail = (1 - LEVEL) / 2
    ends = np.quantile(means, [tail, 1 - tail], axis=0)
    names = ("mAP", "mINP", "rank1", "rank5", "rank10")
    return {name: [float(end) for end in ends[:, i]] for i, name in enumerate(names)}


def _values(matches: MatchPositions, ap: str) -> FloatArray:
    """(V, 5) The figures of each valid query on its own."""
    first = matches.positions[matches.offsets[:-1][np.diff(matches.offsets) > 0]]
    columns = [average_precisions(matches, ap=ap), inverse_negative_penalties(matches)]
    columns += [(first <= rank).astype(np.float64) for rank in (1, 5, 10)]
    return np.stack(columns, axis=1)


def _sums(values: FloatArray, identities: NDArray[Any]) -> FloatArray:
    """(P, 6) The sums over each identity's queries, and their number."""
    _, owner = np.unique(identities, return_inverse=True)
    owned = np.column_stack([values, np.ones(len(values))])
    return np.stack([np.bincount(owner.reshape(-1), weights=column) for column in owned.T], axis=1)
