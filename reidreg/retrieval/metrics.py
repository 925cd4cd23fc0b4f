"""Match positions -> CMC, mAP and mINP, as fractions 0..1 in float64.

Positions stay ragged (the number of matches varies by query): a sum per query is a sum over a run.
A query is valid if it has a match; the others are in no figure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from reidreg.errors import DataError
from reidreg.retrieval.arrays import FloatArray, IntArray
from reidreg.retrieval.options import check_at_least, check_choice

if TYPE_CHECKING:
    from reidreg.retrieval.ranking import MatchPositions

AP = ("rectangle", "trapezoid")


def retrieval_figures(
    matches: MatchPositions, *, ranks: int = 50, ap: str = "rectangle"
) -> dict[str, Any]:
    """The figures of an evaluation, ready for JSON.

    Args:
        matches: The positions of each query's matches.
        ranks: The length of the CMC curve; may exceed the gallery's size.
        ap: `rectangle` or `trapezoid`, see `average_precisions`.

    Returns:
        `mAP, mINP, rank1, rank5, rank10, cmc, num_queries, num_valid_queries, num_gallery`.

    Raises:
        DataError: No query has a match.
        ConfigError: An option is wrong.
    """
    precisions = average_precisions(matches, ap=ap)
    curve = cmc(matches, ranks=ranks)
    first = cmc(matches, ranks=10)
    return {
        "mAP": float(precisions.mean()),
        "mINP": float(inverse_negative_penalties(matches).mean()),
        "rank1": float(first[0]),
        "rank5": float(first[4]),
        "rank10": float(first[9]),
        "cmc": [float(share) for share in curve],
        "num_queries": len(matches.offsets) - 1,
        "num_valid_queries": len(precisions),
        "num_gallery": matches.num_gallery,
    }


def average_precisions(matches: MatchPositions, *, ap: str = "rectangle") -> FloatArray:
    """The average precision of each valid query, in query order.

    `rectangle`: AP = (1/R) sum over the R hits of hits so far / position, as in current papers.
    `trapezoid`: each hit counts the mean of the precision at it and just before it (1 before the
    first item), as in the toolkit of Market-1501 (Zheng et al., ICCV 2015); usually lower.

    Args:
        matches: The positions of each query's matches.
        ap: `rectangle` or `trapezoid`.

    Raises:
        DataError: No query has a match.
        ConfigError: `ap` is unknown.
    """
    check_choice("ap", ap, AP)
    starts, sizes = _runs(matches)
    positions = matches.positions.astype(np.float64)
    hits = np.arange(1, len(positions) + 1) - np.repeat(starts, sizes)
    precisions = hits / positions
    if ap == "trapezoid":
        # The precision before the first item, 0 / 0, is taken as 1.
        before = np.ones_like(positions)
        np.divide(hits - 1, positions - 1, out=before, where=positions > 1)
        precisions = (before + precisions) / 2
    return np.asarray(np.add.reduceat(precisions, starts) / sizes, dtype=np.float64)


def inverse_negative_penalties(matches: MatchPositions) -> FloatArray:
    """The INP of each valid query, in query order: R / position of the last of its R matches.

    Source: Ye et al., Deep Learning for Person Re-identification: A Survey and Outlook, TPAMI 2021.

    Raises:
        DataError: No query has a match.
    """
    starts, sizes = _runs(matches)
    return np.asarray(sizes / matches.positions[starts + sizes - 1], dtype=np.float64)


def cmc(matches: MatchPositions, *, ranks: int = 50) -> FloatArray:
    """The cumulative matching characteristic, (ranks,).

    Entry k - 1 is the fraction of valid queries whose first match is at position k or before. The
    curve never falls; beyond the size of the gallery it stays at its last value.

    Raises:
        DataError: No query has a match.
        ConfigError: `ranks` is less than 1.
    """
    check_at_least("ranks", ranks, 1)
    starts, _ = _runs(matches)
    first = np.minimum(matches.positions[starts] - 1, ranks)
    return np.asarray(np.bincount(first, minlength=ranks).cumsum()[:ranks] / len(starts))


def _runs(matches: MatchPositions) -> tuple[IntArray, IntArray]:
    """The starts and lengths of the valid queries' runs."""
    sizes = np.diff(matches.offsets)
    valid = sizes > 0
    if not valid.any():
        raise DataError("no query has a match in the gallery, so there is nothing to average")
    return matches.offsets[:-1][valid], sizes[valid]
