"""Pair counts -> EER, TAR@FAR, DIR@FAR, and the threshold for a false-accept rate.

A pair is accepted if its cosine is at least the threshold, or its squared Euclidean distance at
most. Genuine pairs, of one pid, are the positive class.

- FAR: the fraction of impostor pairs that are accepted. TAR: the fraction of genuine pairs.
- EER: the rate where FAR = 1 - TAR, on the ROC curve with straight lines between its points.
- Open-set identification also asks whether a query's identity is in the gallery at all. DIR is the
  fraction of queries with a mate in the gallery whose rank-1 item is a mate and accepted. Its FAR
  is the fraction of queries without a mate for which any item is accepted. Few data sets have such
  queries, so each query is used again with all images of its own pid removed; this needs only its
  nearest impostor, and no random choice.

Sources: ISO/IEC 19795-1, Biometric performance testing and reporting; Phillips, Grother and
Micheals, Evaluation Methods in Face Recognition, Handbook of Face Recognition, 2011.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reidreg.errors import ConfigError, DataError
from reidreg.retrieval.arrays import FloatArray, IntArray
from reidreg.retrieval.blocks import Progress
from reidreg.retrieval.matching import Ids
from reidreg.retrieval.pair_histogram import CELLS, PairCounts, count_pairs, histogram
from reidreg.retrieval.ranking import MatchPositions
from reidreg.values import JUNK, Embeddings

FARS = (1e-4, 1e-3, 1e-2)


def verification_figures(
    query: Embeddings,
    gallery: Embeddings,
    matches: MatchPositions,
    *,
    metric: str = "cosine",
    same_camera: str = "drop",
    far: float = 1e-3,
    budget_mib: float = 256,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """How well a threshold separates pairs of one identity from pairs of different identities.

    Junk is left out and, unless `same_camera` is `keep`, pairs of the same pid and camera. Scores
    are compared with the resolution that `reidreg.retrieval.pair_histogram` states.

    Args:
        query: Q embeddings.
        gallery: G embeddings.
        matches: The result of `match_positions` for the same sides, metric and rule.
        metric: `cosine` or `euclidean` (squared).
        same_camera: `drop` or `keep`.
        far: The false-accept rate of the threshold, more than 0 and less than 1.
        budget_mib: Memory to use in addition to the features, in MiB; the counts take about 40.
        progress: Called with the number of tiles done and of all.

    Returns:
        Ready for JSON: `metric, num_genuine, num_impostor, eer, far, threshold, tar_at_far,
        dir_at_far, histogram`. `tar_at_far` and `dir_at_far` have an entry for each FAR of 1e-4,
        1e-3, 1e-2 and `far`, with the loosest threshold whose FAR does not exceed it. Thresholds
        are cosines or squared distances.

    Raises:
        DataError: Shapes do not match, a feature is not finite, no query has a match, or all images
            show the same identity.
        ConfigError: An option is wrong.
    """
    if not 0 < far < 1:
        raise ConfigError(f"far: {far} is out of range; a number between 0 and 1 is needed")
    if len(matches.offsets) != len(query.pids) + 1:
        count = len(matches.offsets) - 1
        raise DataError(f"the matches are of {count} queries, but there are {len(query.pids)}")
    if not len(matches.positions):
        raise DataError("no query has a match in the gallery, so no pair is genuine")
    check_impostors(query.pids, gallery.pids)
    counts = count_pairs(
        query,
        gallery,
        metric=metric,
        same_camera=same_camera,
        budget_mib=budget_mib,
        progress=progress,
    )
    return figures_of_pairs(counts, _first_is_match(matches)[counts.queries], far)


def check_impostors(query_pids: Ids, gallery_pids: Ids) -> None:
    """Check from the labels alone that there is a pair of different identities.

    Args:
        query_pids: (Q,) identities; -1 is junk.
        gallery_pids: (G,) identities; -1 is junk.

    Raises:
        DataError: There is none, so a false-accept rate is not defined.
    """
    sides = [torch.as_tensor(pids).cpu().numpy() for pids in (query_pids, gallery_pids)]
    known = [pid for pid in np.unique(np.concatenate(sides)).tolist() if pid != JUNK]
    if len(known) < 2:
        raise DataError(
            f"verification needs images of different people, but all are of pid {known}; "
            "leave it off, or check how pids are read"
        )


def figures_of_pairs(counts: PairCounts, found: NDArray[np.bool_], far: float) -> dict[str, Any]:
    """The figures of `verification_figures`.

    Args:
        counts: The pairs.
        found: (K,) whether the rank-1 item of each compared query is a mate.
        far: The false-accept rate of the threshold.
    """
    rates = sorted({*FARS, far})
    points = [tar_at_far(counts, rate) for rate in rates]
    return {
        "metric": counts.metric,
        "num_genuine": int(counts.genuine.sum()),
        "num_impostor": int(counts.impostor.sum()),
        "eer": equal_error_rate(counts),
        "far": far,
        "threshold": points[rates.index(far)]["threshold"],
        "tar_at_far": points,
        "dir_at_far": [dir_at_far(counts, found, rate) for rate in rates],
        "histogram": histogram(counts),
    }


def tar_at_far(counts: PairCounts, far: float) -> dict[str, float]:
    """The fraction of genuine pairs accepted by the loosest threshold whose FAR is at most `far`.

    Args:
        counts: The pairs.
        far: The false-accept rate: the fraction of impostor pairs that are accepted.

    Returns:
        `far, tar, threshold`.
    """
    refused = _first_refused(counts.cells, counts.impostor, far)
    accepted = int(counts.genuine[counts.cells < refused].sum())
    tar = accepted / int(counts.genuine.sum())
    return {"far": far, "tar": tar, "threshold": counts.threshold(refused)}


def dir_at_far(counts: PairCounts, found: NDArray[np.bool_], far: float) -> dict[str, float]:
    """The fraction of queries identified by the loosest threshold whose FAR is at most `far`.

    Args:
        counts: The pairs.
        found: (K,) whether the rank-1 item of each compared query is a mate.
        far: The false-accept rate: the fraction of queries, with their own pid removed from the
            gallery, for which an item is accepted.

    Returns:
        `far, dir, threshold`.
    """
    refused = _first_refused(*np.unique(counts.nearest_impostor, return_counts=True), far)
    identified = int((found & (counts.nearest_mate < refused)).sum())
    mated = int((counts.nearest_mate < CELLS).sum())
    return {"far": far, "dir": identified / mated, "threshold": counts.threshold(refused)}


def equal_error_rate(counts: PairCounts) -> float:
    """The rate at which the fractions of accepted impostor and refused genuine pairs are equal."""
    accepted = np.concatenate([[0.0], _shares(counts.impostor)])
    sums = accepted + np.concatenate([[0.0], _shares(counts.genuine)])
    after = int(np.searchsorted(sums, 1.0))
    start, stop = accepted[after - 1], accepted[after]
    part = (1 - sums[after - 1]) / (sums[after] - sums[after - 1])
    return float(start + part * (stop - start))


def _shares(pairs: IntArray) -> FloatArray:
    """The cumulative fraction of pairs up to each cell."""
    return np.asarray(pairs.cumsum() / int(pairs.sum()))


def _first_refused(cells: IntArray, pairs: IntArray, far: float) -> int:
    """The first cell whose pairs would raise the fraction of accepted pairs above `far`."""
    return int(cells[np.searchsorted(_shares(pairs), far, side="right")])


def _first_is_match(matches: MatchPositions) -> NDArray[np.bool_]:
    """(Q,) Whether the rank-1 item of each query is a match."""
    some = np.diff(matches.offsets) > 0
    found = np.zeros(len(some), dtype=np.bool_)
    found[some] = matches.positions[matches.offsets[:-1][some]] == 1
    return found
