"""Figures for each pair of a query camera and a gallery camera."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from reidreg.retrieval.arrays import IntArray
from reidreg.retrieval.blocks import Progress
from reidreg.retrieval.matching import labels_of_sides
from reidreg.retrieval.metrics import average_precisions
from reidreg.retrieval.ranking import MatchPositions, match_positions
from reidreg.values import JUNK, Embeddings


def camera_pairs(
    query: Embeddings,
    gallery: Embeddings,
    *,
    metric: str = "cosine",
    same_camera: str = "drop",
    ap: str = "rectangle",
    budget_mib: float = 256,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """mAP and rank-1 of each camera's queries against the gallery images of one camera.

    The same-camera rule applies: with `same_camera` `drop` no camera is paired with itself. Each
    gallery camera is ranked once, which together costs one more evaluation.

    Args:
        query: Q embeddings.
        gallery: G embeddings.
        metric: `cosine` or `euclidean` (squared).
        same_camera: `drop` or `keep`.
        ap: `rectangle` or `trapezoid`.
        budget_mib: Memory to use in addition to the features, in MiB.
        progress: Called with the number of cameras done and of all.

    Returns:
        `query_camera, gallery_camera, num_queries, mAP, rank1` of each pair in which a query has a
        match, sorted by both cameras; `num_queries` counts the queries with a match.

    Raises:
        DataError: Shapes do not match, or a feature is not finite.
        ConfigError: An option is wrong.
    """
    query_camids = query.camids.cpu().numpy()
    cameras = np.unique(gallery.camids.cpu().numpy())
    rows = []
    for done, camera in enumerate(cameras.tolist(), 1):
        # Images of other cameras are made junk, which needs no copy and computes no distance.
        pids = gallery.pids.masked_fill(gallery.camids != camera, JUNK)
        alone = replace(gallery, pids=pids)
        if len(labels_of_sides(query, alone, same_camera).matches()[0]):
            matches = match_positions(
                query, alone, metric=metric, same_camera=same_camera, budget_mib=budget_mib
            )
            rows += _rows(matches, query_camids, camera, ap)
        if progress:
            progress(done, len(cameras))
    return sorted(rows, key=lambda row: (row["query_camera"], row["gallery_camera"]))


def _rows(
    matches: MatchPositions, query_camids: IntArray, camera: int, ap: str
) -> list[dict[str, Any]]:
    """The figures of each query camera against one gallery camera."""
    valid = np.diff(matches.offsets) > 0
    precisions = average_precisions(matches, ap=ap)
    hits = matches.positions[matches.offsets[:-1][valid]] == 1
    rows = []
    for query_camera in np.unique(query_camids[valid]).tolist():
        own = query_camids[valid] == query_camera
        rows.append(
            {
                "query_camera": query_camera,
                "gallery_camera": camera,
                "num_queries": int(own.sum()),
                "mAP": float(precisions[own].mean()),
                "rank1": float(hits[own].mean()),
            }
        )
    return rows
