"""Pair counts -> EER, TAR@FAR, DIR@FAR, and the threshold that goes with a false-accept rate.

An operating point is a threshold: a pair is accepted if it scores at least that (cosine), or is at
most so far apart (squared Euclidean). Genuine pairs, of one pid, are the positive class.

- FAR: the share of impostor pairs that are accepted. TAR: the share of genuine pairs that are.
- EER: the rate where FAR = 1 - TAR, on the ROC curve drawn with straight lines between its points.
- Open-set identification asks more: whether a query's person is in the gallery at all, and who it
  is. DIR is the share of queries with a mate in the gallery whose first place is a mate that is
  accepted. Its FAR is the share of queries without a mate of which any item is accepted. Few sets
  have such queries; so each query is taken once more with all images of its own pid removed, which
  needs its nearest impostor alone and no choice by chance.

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
    """How well one threshold tells pairs of the same person from pairs of different people.

    What the protocol leaves out is left out: junk, and pairs of the same pid and camera. Scores
    are compared to the precision that `reidreg.retrieval.pair_histogram` states.

    Args:
        query: Q embeddings.
        gallery: G embeddings.
        matches: What `match_positions` gives for the same sides, metric and rule.
        metric: `cosine` or `euclidean` (squared).
        same_camera: `drop` or `keep`.
        far: The false-accept rate that the threshold is for, more than 0 and less than 1.
        budget_mib: Memory to use beside the features, in MiB; the counts alone take about 40.
        progress: Called with the number of tiles done and of all.

    Returns:
        Ready for JSON: `metric, num_genuine, num_impostor, eer, far, threshold, tar_at_far,
        dir_at_far, histogram`. `tar_at_far` and `dir_at_far` have an entry for each FAR of 1e-4,
        1e-3, 1e-2 and `far`, with the loosest threshold whose FAR is not above the wanted one.
        Thresholds are cosines, or squared distances.

    Raises:
        DataError: The features or labels do not fit together or are not finite, no query has a
            match, or all pairs show the same person.
        ConfigError: An option is wrong.
    """
    if not 0 < far < 1:
        raise ConfigError(f"far: {far} is no rate; a number between 0 and 1 is needed")
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
    """Look at the labels alone: is there a pair of different people?

    Args:
        query_pids: (Q,) identities; -1 is junk.
        gallery_pids: (G,) identities; -1 is junk.

    Raises:
        DataError: There is none, so that there is nothing to accept falsely.
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
        found: (K,) whether the first place of each compared query is a mate.
        far: The false-accept rate that the threshold is for.
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
    """`far`, and the share of genuine pairs that the loosest threshold within it accepts.

    Args:
        counts: The pairs.
        far: The wanted share of impostor pairs.

    Returns:
        `far, tar, threshold`.
    """
    refused = _first_refused(counts.cells, counts.impostor, far)
    accepted = int(counts.genuine[counts.cells < refused].sum())
    tar = accepted / int(counts.genuine.sum())
    return {"far": far, "tar": tar, "threshold": counts.threshold(refused)}


def dir_at_far(counts: PairCounts, found: NDArray[np.bool_], far: float) -> dict[str, float]:
    """`far`, and the share of queries that the loosest threshold within it identifies.

    Args:
        counts: The pairs.
        found: (K,) whether the first place of each compared query is a mate.
        far: The wanted share of queries, their own pid removed, of which an item is accepted.

    Returns:
        `far, dir, threshold`.
    """
    refused = _first_refused(*np.unique(counts.nearest_impostor, return_counts=True), far)
    identified = int((found & (counts.nearest_mate < refused)).sum())
    mated = int((counts.nearest_mate < CELLS).sum())
    return {"far": far, "dir": identified / mated, "threshold": counts.threshold(refused)}


def equal_error_rate(counts: PairCounts) -> float:
    """Where the share of accepted impostors equals that of refused genuine pairs."""
    accepted = np.concatenate([[0.0], _shares(counts.impostor)])
    sums = accepted + np.concatenate([[0.0], _shares(counts.genuine)])
    after = int(np.searchsorted(sums, 1.0))
    start, stop = accepted[after - 1], accepted[after]
    part = (1 - sums[after - 1]) / (sums[after] - sums[after - 1])
    return float(start + part * (stop - start))


def _shares(pairs: IntArray) -> FloatArray:
    """The share of pairs in each cell and those before it."""
    return np.asarray(pairs.cumsum() / int(pairs.sum()))


def _first_refused(cells: IntArray, pairs: IntArray, far: float) -> int:
    """The first of the cells that would bring the share of accepted pairs above the wanted one."""
    return int(cells[np.searchsorted(_shares(pairs), far, side="right")])


def _first_is_match(matches: MatchPositions) -> NDArray[np.bool_]:
    """(Q,) Whether the nearest item of each query's list is a match."""
    some = np.diff(matches.offsets) > 0
    found = np.zeros(len(some), dtype=np.bool_)
    found[some] = matches.positions[matches.offsets[:-1][some]] == 1
    return found
