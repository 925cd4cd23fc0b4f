"""Query-gallery matches by their labels, and the filter of junk and same-camera items.

A gallery item matches a query if it has the same pid. Junk (pid -1) is left out for every query;
unless `same_camera` is `keep`, so are items of the query's pid and camera.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from reidreg.errors import DataError
from reidreg.retrieval.arrays import IntArray, ragged
from reidreg.retrieval.options import check_choice
from reidreg.values import JUNK, Embeddings

Ids: TypeAlias = Tensor | NDArray[Any] | Sequence[int]

SAME_CAMERA = ("drop", "keep")


@dataclass(frozen=True, slots=True)
class Matchable:
    """How many queries can be evaluated.

    Args:
        valid: Queries with a match.
        without_gallery: Queries whose pid is not in the gallery.
        same_camera_only: Queries whose pid is in the gallery, but only under their own camera.
    """

    valid: int
    without_gallery: int
    same_camera_only: int


@dataclass(frozen=True, slots=True)
class MatchLabels:
    """The labels of both sides.

    Args:
        query_pids: (Q,).
        gallery_pids: (G,).
        query_pid_cam_ids: (Q,) an id of each (pid, camid) pair.
        gallery_pid_cam_ids: (G,) likewise.
        query_camids: (Q,).
        drop: Whether gallery items of the query's pid and camera are left out.
        junk: Whether junk is left out.
    """

    query_pids: IntArray
    gallery_pids: IntArray
    query_pid_cam_ids: IntArray
    gallery_pid_cam_ids: IntArray
    query_camids: IntArray
    drop: bool
    junk: bool = True

    @classmethod
    def of(
        cls, query_pids: Ids, query_camids: Ids, gallery_pids: Ids, gallery_camids: Ids, rule: str
    ) -> MatchLabels:
        check_choice("same_camera", rule, SAME_CAMERA)
        queries, query_camids = _ids("query", query_pids, query_camids)
        gallery, gallery_camids = _ids("gallery", gallery_pids, gallery_camids)
        _, pids = np.unique(np.concatenate([queries, gallery]), return_inverse=True)
        known, cameras = np.unique(
            np.concatenate([query_camids, gallery_camids]), return_inverse=True
        )
        pid_cam_ids = (pids.reshape(-1) * len(known) + cameras.reshape(-1)).astype(np.int64)
        return cls(
            queries,
            gallery,
            pid_cam_ids[: len(queries)],
            pid_cam_ids[len(queries) :],
            query_camids,
            rule == "drop",
        )

    @property
    def kept(self) -> IntArray:
        """The gallery items that are not left out for every query, ascending."""
        everyone = np.arange(len(self.gallery_pids))
        return everyone[self.gallery_pids != JUNK] if self.junk else everyone

    def keep_all(self) -> MatchLabels:
        """The same labels with nothing left out."""
        return replace(self, drop=False, junk=False)

    def hidden(self) -> IntArray:
        """(Q,) The number of gallery items left out for their pid and camera."""
        if not self.drop:
            return np.zeros(len(self.query_pids), dtype=np.int64)
        return _occurrences(self.query_pid_cam_ids, self.gallery_pid_cam_ids[self.kept])

    def matches(self) -> tuple[IntArray, IntArray]:
        """All matching pairs: query indices and gallery indices, sorted by both."""
        queries, columns = same_pid(self.query_pids, self.gallery_pids[self.kept])
        items = self.kept[columns]
        if not self.drop:
            return queries, items
        other = self.query_pid_cam_ids[queries] != self.gallery_pid_cam_ids[items]
        return queries[other], items[other]


def same_pid(queries: IntArray, gallery: IntArray) -> tuple[IntArray, IntArray]:
    """All pairs of equal pids: query indices and gallery indices, sorted by both."""
    order = np.argsort(gallery, kind="stable")
    ordered = gallery[order]
    first = np.searchsorted(ordered, queries, side="left")
    sizes = np.searchsorted(ordered, queries, side="right") - first
    return np.repeat(np.arange(len(sizes)), sizes), order[ragged(first, sizes)]


def check_matchable(
    query_pids: Ids,
    query_camids: Ids,
    gallery_pids: Ids,
    gallery_camids: Ids,
    same_camera: str = "drop",
) -> Matchable:
    """Count the queries that have a match, from the labels alone.

    Args:
        query_pids: (Q,) identities.
        query_camids: (Q,) cameras.
        gallery_pids: (G,) identities; -1 is junk.
        gallery_camids: (G,) cameras.
        same_camera: `drop` leaves out gallery items of the query's pid and camera; `keep` does not.

    Raises:
        DataError: No query has a match; the message names the likely cause.
        ConfigError: `same_camera` is unknown.
    """
    labels = MatchLabels.of(query_pids, query_camids, gallery_pids, gallery_camids, same_camera)
    return count_matchable(labels)


def count_matchable(labels: MatchLabels) -> Matchable:
    """As `check_matchable`, for labels that are checked already."""
    shared = _occurrences(labels.query_pids, labels.gallery_pids[labels.kept])
    valid = int(np.count_nonzero(shared > labels.hidden()))
    absent = int(np.count_nonzero(shared == 0))
    if valid == 0:
        raise DataError(f"no query has a match in the gallery: {_why_unmatched(labels, absent)}")
    return Matchable(valid, absent, len(shared) - valid - absent)


def _why_unmatched(labels: MatchLabels, absent: int) -> str:
    count = len(labels.query_pids)
    if not len(labels.kept):
        return "all of its images are junk (pid -1); check its file names"
    if absent == count:
        one, other = int(labels.query_pids[0]), int(labels.gallery_pids[labels.kept[0]])
        return (
            f"none of the {count} query images has its pid there (query has {one}, "
            f"gallery has {other}, ...); check the two folders and how pids are read"
        )
    cameras = np.unique(labels.query_camids)
    found = f"all cameras are {cameras[0]}" if len(cameras) == 1 else "each pid has only one camera"
    rest = f", and {absent} of {count} query images have no image of their pid" if absent else ""
    return (
        f"{found}, so leaving out same-camera items removes every match{rest}; "
        "use same_camera keep, or check how cameras are read"
    )


def _ids(side: str, pids: Ids, camids: Ids) -> tuple[IntArray, IntArray]:
    """Both as int64 arrays, checked."""
    arrays = []
    for name, values in (("pids", pids), ("camids", camids)):
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        if array.ndim != 1 or not len(array):
            raise DataError(f"{side} {name}: one per image is needed, the shape is {array.shape}")
        if not np.issubdtype(array.dtype, np.integer):
            raise DataError(f"{side} {name}: integers are needed, not {array.dtype}")
        arrays.append(array.astype(np.int64))
    if len(arrays[0]) != len(arrays[1]):
        raise DataError(f"{side}: there are {len(arrays[0])} pids, but {len(arrays[1])} camids")
    return arrays[0], arrays[1]


def _occurrences(wanted: IntArray, among: IntArray) -> IntArray:
    """How often each wanted value occurs in `among`."""
    ordered = np.sort(among)
    last = np.searchsorted(ordered, wanted, side="right")
    return (last - np.searchsorted(ordered, wanted, side="left")).astype(np.int64)


def labels_of_sides(query: Embeddings, gallery: Embeddings, same_camera: str) -> MatchLabels:
    """The labels of both sides; checks that there is one for each feature."""
    labels = MatchLabels.of(query.pids, query.camids, gallery.pids, gallery.camids, same_camera)
    for name, features, pids in (
        ("query", query.features, labels.query_pids),
        ("gallery", gallery.features, labels.gallery_pids),
    ):
        count = features.shape[0] if features.ndim else 0
        if count != len(pids):
            raise DataError(f"{name}: there are {count} features, but {len(pids)} pids")
    return labels
