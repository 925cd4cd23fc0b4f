"""How far the figures of an evaluation might be off by the choice of its people.

The percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13):
draw as many as there are, with replacement, compute the figures of what was drawn, and repeat; the
middle 95 % of them is the interval.

What is drawn are identities, each with all of its queries. The queries of one person share their
matches and their clothes, so that they succeed and fail together; drawing them one by one would
take them for independent and give intervals that are too narrow. The gallery and the model stay as
they are: an interval says nothing about another training run, and with few identities it is too
narrow itself.
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
_WEIGHTS = 2**21  # how often each identity is drawn, for as many resamples as fit


def bootstrap_intervals(
    matches: MatchPositions,
    pids: Ids,
    *,
    resamples: int = 1000,
    ap: str = "rectangle",
    seed: int = 0,
) -> dict[str, list[float]]:
    """The 95 % intervals of mAP, mINP and rank-k, by drawing identities.

    Args:
        matches: Where each query's matches stand.
        pids: (Q,) whose image each query is.
        resamples: How often to draw.
        ap: `rectangle` or `trapezoid`, as for the figures.
        seed: Of the draws; the same seed gives the same intervals.

    Returns:
        `mAP, mINP, rank1, rank5, rank10`, each with its low and its high end.

    Raises:
        DataError: No query has a match, or there is not one pid for each query.
        ConfigError: An option is wrong.
    """
    check_at_least("resamples", resamples, 1)
    people = torch.as_tensor(pids).cpu().numpy()
    if len(people) != len(matches.offsets) - 1:
        raise DataError(
            f"there are {len(people)} pids, but matches of {len(matches.offsets) - 1} queries"
        )
    values = _values(matches, ap)
    sums = _sums(values, people[np.diff(matches.offsets) > 0])
    draws = np.random.default_rng(seed)
    count = len(sums)
    means = np.empty((resamples, values.shape[1]))
    for span in spans(resamples, max(1, _WEIGHTS // count)):
        times = draws.multinomial(count, np.full(count, 1 / count), size=span.stop - span.start)
        totals = times.astype(np.float64) @ sums
        means[span] = totals[:, :-1] / totals[:, -1:]
    tail = (1 - LEVEL) / 2
    ends = np.quantile(means, [tail, 1 - tail], axis=0)
    names = ("mAP", "mINP", "rank1", "rank5", "rank10")
    return {name: [float(end) for end in ends[:, i]] for i, name in enumerate(names)}


def _values(matches: MatchPositions, ap: str) -> FloatArray:
    """(V, 5) What each valid query adds to the figures."""
    first = matches.positions[matches.offsets[:-1][np.diff(matches.offsets) > 0]]
    columns = [average_precisions(matches, ap=ap), inverse_negative_penalties(matches)]
    columns += [(first <= rank).astype(np.float64) for rank in (1, 5, 10)]
    return np.stack(columns, axis=1)


def _sums(values: FloatArray, people: NDArray[Any]) -> FloatArray:
    """(P, 6) The sums of each identity's queries, and how many queries it has."""
    _, owner = np.unique(people, return_inverse=True)
    owned = np.column_stack([values, np.ones(len(values))])
    return np.stack([np.bincount(owner.reshape(-1), weights=column) for column in owned.T], axis=1)
