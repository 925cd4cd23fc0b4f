"""k-reciprocal re-ranking: distances that take the neighbours' neighbours into account.

Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR 2017. Of all
N = Q + G images, each is encoded by the images that it shares mutual nearness with, weighted by
their distance; two images are near if their encodings overlap (Jaccard), and the final distance
mixes that with the original one.

An encoding has a few dozen entries, not N. So neighbour lists, encodings and the index from an
entry to the gallery images that have it are kept as sparse rows; no N x N array is made, and the
outcome is that of the dense definition.

Distances are squared Euclidean (of vectors divided by their norms if the metric is cosine), each
row divided by its largest value. A neighbour list holds at most N images: in a set with fewer
images than a list is long, it holds all of them. Every image given takes part, junk as well; leave
out beforehand what should not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reidreg.distances import (
    Distances,
    Features,
    FloatArray,
    IntArray,
    check_at_least,
    ragged,
    spans,
)
from reidreg.errors import ConfigError

_PAIRS = 2**20  # pairs (entry, gallery image) that are looked at together


class _Sparse(NamedTuple):
    """Sparse rows: row i has `columns[starts[i]:starts[i + 1]]`, and the values likewise."""

    starts: IntArray
    columns: IntArray
    values: FloatArray

    def take(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """Where the entries of some rows are, and which of the rows each belongs to."""
        sizes = self.starts[rows + 1] - self.starts[rows]
        return ragged(self.starts[rows], sizes), np.repeat(np.arange(len(rows)), sizes)


class _Neighbours(NamedTuple):
    """Of each image, nearest first: the images (N, k), their distances, and its row's divisor."""

    items: IntArray
    values: FloatArray
    divisors: FloatArray


def rerank_rows(
    query_features: Features,
    gallery_features: Features,
    *,
    metric: str = "cosine",
    k1: int = 20,
    k2: int = 6,
    lam: float = 0.3,
    chunk: int = 512,
) -> Iterator[tuple[int, Tensor]]:
    """Re-ranked distances, a few queries at a time, as `match_positions_of_rows` takes them.

    Args:
        query_features: (Q, D).
        gallery_features: (G, D).
        metric: `cosine` or `euclidean`.
        k1: An image's k1 nearest, with itself k1 + 1, are candidates for mutual nearness.
        k2: An encoding is averaged over the image's k2 nearest, itself included; 1 leaves it.
        lam: Share of the original distance in the final one, 0..1.
        chunk: Images at a time; a few times chunk x N float64 values are held.

    Returns:
        An iterator of the first query and distances (q, G) float32 on the CPU.

    Raises:
        DataError: The features do not fit together or are not finite.
        ConfigError: An option is wrong.
    """
    for key, value in (("k1", k1), ("k2", k2), ("chunk", chunk)):
        check_at_least(key, value, 1)
    if not 0 <= lam <= 1:
        raise ConfigError(f"lam: {lam} is no share; a number from 0 to 1 is needed")
    direct = Distances(query_features, gallery_features, metric)
    return _rerank(direct, metric, k1, k2, lam, chunk)


def clipping_note(num_images: int, k1: int = 20, k2: int = 6) -> str | None:
    """A line for the log if there are fewer images than a neighbour list is long, else None.

    Args:
        num_images: Query and gallery images together.
        k1: As for `rerank_rows`.
        k2: As for `rerank_rows`.
    """
    if num_images >= max(k1 + 1, k2):
        return None
    return (
        f"re-ranking: there are only {num_images} images, so neighbour lists of k1 + 1 = {k1 + 1} "
        f"and k2 = {k2} are cut to {num_images}"
    )


def _rerank(
    direct: Distances, metric: str, k1: int, k2: int, lam: float, chunk: int
) -> Iterator[tuple[int, Tensor]]:
    sides = direct.query.features, direct.gallery.features
    everyone = torch.cat([side.to(direct.device, torch.float32) for side in sides])
    distances = Distances(everyone, everyone, metric)
    neighbours = _neighbours(distances, max(k1 + 1, k2), chunk)
    codes = _encode(distances, neighbours, k1, chunk)
    if k2 > 1:
        codes = _expand(codes, neighbours.items[:, :k2], chunk)
    num_query, num_gallery = len(direct.query), len(direct.gallery)
    index = _transpose(codes, num_query)
    for span in spans(num_query, chunk):
        shared = _overlaps(codes, index, span, num_gallery)
        rows = direct.rows(span, 2 * chunk).cpu().numpy()
        rows /= neighbours.divisors[span, None]
        rows *= lam
        rows += (1 - lam) * (1 - shared / (2 - shared))
        yield span.start, torch.from_numpy(rows.astype(np.float32))


def _neighbours(distances: Distances, k: int, chunk: int) -> _Neighbours:
    """The neighbour lists, cut to N, with distances divided by each row's largest."""
    k = min(k, len(distances.gallery))
    found = list(nearest(distances, k, chunk=chunk))
    items = np.concatenate([items.cpu().numpy() for items, _, _ in found])
    values = np.concatenate([values.cpu().numpy() for _, values, _ in found])
    farthest = np.concatenate([far.cpu().numpy() for _, _, far in found])
    # Where all images are equal there is nothing to divide by, and every distance is 0.
    divisors = np.where(farthest > distances.slack, farthest, 1.0)
    return _Neighbours(items, values / divisors[:, None], divisors)


def nearest(
    distances: Distances, k: int, *, chunk: int = 512
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The k nearest gallery items of every query; of two at equal distance the earlier is nearer.

    Args:
        distances: What to search.
        k: How many, at most the gallery's size.
        chunk: Queries at a time; chunk x gallery distances are held.

    Yields:
        For each run of n queries the items (n, k) and their distances (n, k), nearest first, and
        the distance (n,) of the farthest item.
    """
    fetch = min(k + 1, len(distances.gallery))
    width = 2 * chunk
    for span in spans(len(distances.query), chunk):
        rows = distances.rows(span, width)
        values, items = rows.topk(fetch, largest=False)
        farthest = rows.amax(dim=1)
        unsure = (values.diff(dim=1) <= 2 * distances.slack).any(dim=1).nonzero()[:, 0]
        if len(unsure):
            again = distances.rows(unsure.cpu().numpy() + span.start, width, exact=True)
            ordered = again.sort(dim=1, stable=True)
            values[unsure], items[unsure] = ordered.values[:, :fetch], ordered.indices[:, :fetch]
        yield items[:, :k], values[:, :k], farthest


def _mutual(items: IntArray, chunk: int) -> NDArray[np.bool_]:
    """(N, k) Whether each image is in turn in the list of the one in its list."""
    own = np.arange(len(items))[:, None, None]
    pieces = spans(len(items), chunk)
    return np.concatenate([(items[items[span]] == own[span]).any(axis=2) for span in pieces])


def _encode(distances: Distances, neighbours: _Neighbours, k1: int, chunk: int) -> _Sparse:
    """Each image's mutual neighbours, with theirs if they mostly agree, by exp(-distance)."""
    near = neighbours.items[:, : k1 + 1]
    half = neighbours.items[:, : int(np.around(k1 / 2)) + 1]
    near_mutual, half_mutual = _mutual(near, chunk), _mutual(half, chunk)
    count = len(near)
    sizes, columns, values = [], [], []
    for span in spans(count, chunk):
        keys = _members(span, near, near_mutual, half, half_mutual)
        row = keys // count - span.start
        weights = np.exp(-_looked_up(keys, span, distances, neighbours))
        sums = np.bincount(row, weights=weights, minlength=span.stop - span.start)
        sizes.append(np.bincount(row, minlength=span.stop - span.start))
        columns.append(keys % count)
        values.append(weights / sums[row])
    starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    return _Sparse(starts.astype(np.int64), np.concatenate(columns), np.concatenate(values))


def _members(
    span: slice,
    near: IntArray,
    near_mutual: NDArray[np.bool_],
    half: IntArray,
    half_mutual: NDArray[np.bool_],
) -> IntArray:
    """The images that encode those of a span, as sorted keys image * N + member.

    To an image's mutual neighbours are added the mutual neighbours, in lists half as long, of each
    of them, if more than two thirds of these are among the former.
    """
    row, place = near_mutual[span].nonzero()
    row = row + span.start
    member = near[row, place]
    core = np.sort(row * len(near) + member)
    theirs = row[:, None] * len(near) + half[member]
    valid = half_mutual[member]
    found = np.searchsorted(core, theirs).clip(max=len(core) - 1)
    inside = (core[found] == theirs) & valid
    agree = 3 * inside.sum(axis=1) > 2 * valid.sum(axis=1)
    return np.unique(np.concatenate([core, theirs[agree][valid[agree]]]))


def _looked_up(
    keys: IntArray, span: slice, distances: Distances, neighbours: _Neighbours
) -> FloatArray:
    """Divided distances of pairs: most are in the neighbour lists, the others are computed."""
    count = len(neighbours.items)
    own = np.arange(span.start, span.stop)[:, None]
    listed = (own * count + neighbours.items[span]).reshape(-1)
    order = np.argsort(listed)
    found = order[np.searchsorted(listed, keys, sorter=order).clip(max=len(listed) - 1)]
    values = neighbours.values[span].reshape(-1)[found]
    missing = np.flatnonzero(listed[found] != keys)
    row, member = np.divmod(keys[missing], count)
    exact = distances.exact_pairs(row, member, 2 * (span.stop - span.start)).cpu().numpy()
    values[missing] = exact / neighbours.divisors[row]
    return np.asarray(values)


def _expand(codes: _Sparse, lists: IntArray, chunk: int) -> _Sparse:
    """Query expansion: each code becomes the mean of those of the images in its list."""
    count, length = lists.shape
    sizes, columns, values = [], [], []
    for span in spans(count, chunk):
        entries, owner = codes.take(lists[span].reshape(-1))
        keys, which = np.unique(
            owner // length * count + codes.columns[entries], return_inverse=True
        )
        sizes.append(np.bincount(keys // count, minlength=span.stop - span.start))
        columns.append(keys % count)
        values.append(np.bincount(which, weights=codes.values[entries]) / length)
    starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    return _Sparse(starts.astype(np.int64), np.concatenate(columns), np.concatenate(values))


def _transpose(codes: _Sparse, first: int) -> _Sparse:
    """From an entry to the images from `first` on that have it, counted from there."""
    count = len(codes.starts) - 1
    entries, row = codes.take(np.arange(first, count))
    columns = codes.columns[entries]
    order = np.argsort(columns, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(columns, minlength=count))])
    return _Sparse(starts.astype(np.int64), row[order], codes.values[entries][order])


def _overlaps(codes: _Sparse, index: _Sparse, span: slice, width: int) -> FloatArray:
    """(q, G) The sum, over all entries, of the smaller of the query's and the gallery image's."""
    height = span.stop - span.start
    shared = np.zeros(height * width)
    entries, row = codes.take(np.arange(span.start, span.stop))
    sizes = np.diff(index.starts)[codes.columns[entries]]
    cuts = np.searchsorted(np.cumsum(sizes), np.arange(_PAIRS, int(sizes.sum()), _PAIRS))
    for part in np.split(np.arange(len(entries)), cuts):
        there, which = index.take(codes.columns[entries[part]])
        mine = codes.values[entries[part]][which]
        where = row[part][which] * width + index.columns[there]
        shared += np.bincount(
            where, weights=np.minimum(mine, index.values[there]), minlength=len(shared)
        )
    return shared.reshape(height, width)
