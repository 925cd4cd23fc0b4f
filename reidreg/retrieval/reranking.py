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

from reidreg.errors import ConfigError
from reidreg.retrieval.arrays import FloatArray, IntArray, ragged, starts_of
from reidreg.retrieval.blocks import Progress, spans
from reidreg.retrieval.distances import Distances
from reidreg.retrieval.knn_graph import neighbour_graph
from reidreg.retrieval.options import check_at_least
from reidreg.retrieval.vectors import Features, Side

_BLOCK = 512  # images whose codes are made together
_PIECE = 1024  # gallery vectors that are held in float64
_CELLS = 2**22  # distances that are held together
_SHIFT = 1.5 * 2.0**12  # float64 has no steps finer than 2**-40 there
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
    progress: Progress | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Re-ranked distances, a few queries at a time, as `match_positions_of_rows` takes them.

    The neighbour search, which takes most of the time, is done when this is called; the rows are
    computed as they are asked for.

    Args:
        query_features: (Q, D).
        gallery_features: (G, D).
        metric: `cosine` or `euclidean`.
        k1: An image's k1 nearest, with itself k1 + 1, are candidates for mutual nearness.
        k2: An encoding is averaged over the image's k2 nearest, itself included; 1 leaves it.
        lam: Share of the original distance in the final one, 0..1.
        chunk: Queries at a time, at most; fewer where the gallery is large.
        progress: Called with the steps of the neighbour search done and of all.

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
    everyone = _together(direct, metric)
    neighbours = _neighbours(everyone, max(k1 + 1, k2), progress)
    codes = _encode(everyone, neighbours, k1)
    if k2 > 1:
        codes = _expand(codes, neighbours.items[:, :k2])
    return _rows(direct, codes, neighbours.divisors, lam, chunk)


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


def _together(direct: Distances, metric: str) -> Distances:
    """Query and gallery as one set, compared with itself."""
    sides = direct.query.features, direct.gallery.features
    everyone = torch.cat([side.to("cpu", torch.float32) for side in sides])
    return Distances(everyone, everyone, metric)


def _neighbours(distances: Distances, k: int, progress: Progress | None) -> _Neighbours:
    """The neighbour lists, cut to N, with distances divided by each row's largest."""
    graph = neighbour_graph(distances, k, progress=progress)
    # Where all images are equal there is nothing to divide by, and every distance is 0.
    divisors = np.where(graph.farthest > distances.slack, graph.farthest, 1.0)
    return _Neighbours(graph.items, graph.values / divisors[:, None], divisors)


def _mutual(items: IntArray) -> NDArray[np.bool_]:
    """(N, k) Whether each image is in turn in the list of the one in its list."""
    own = np.arange(len(items))[:, None, None]
    pieces = spans(len(items), _BLOCK)
    return np.concatenate([(items[items[span]] == own[span]).any(axis=2) for span in pieces])


def _encode(distances: Distances, neighbours: _Neighbours, k1: int) -> _Sparse:
    """Each image's mutual neighbours, with theirs if they mostly agree, by exp(-distance)."""
    near = neighbours.items[:, : k1 + 1]
    half = neighbours.items[:, : int(np.around(k1 / 2)) + 1]
    near_mutual, half_mutual = _mutual(near), _mutual(half)
    count = len(near)
    sizes, columns, values = [], [], []
    for span in spans(count, _BLOCK):
        keys = _members(span, near, near_mutual, half, half_mutual)
        row = keys // count - span.start
        weights = np.exp(-_looked_up(keys, span, distances, neighbours))
        sums = np.bincount(row, weights=weights, minlength=span.stop - span.start)
        sizes.append(np.bincount(row, minlength=span.stop - span.start))
        columns.append(keys % count)
        values.append(weights / sums[row])
    starts = starts_of(np.concatenate(sizes))
    return _Sparse(starts, np.concatenate(columns), np.concatenate(values))


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
    values[missing] = distances.pairs(row, member) / neighbours.divisors[row]
    return np.asarray(values)


def _expand(codes: _Sparse, lists: IntArray) -> _Sparse:
    """Query expansion: each code becomes the mean of those of the images in its list."""
    count, length = lists.shape
    sizes, columns, values = [], [], []
    for span in spans(count, _BLOCK):
        entries, owner = codes.take(lists[span].reshape(-1))
        keys, which = np.unique(
            owner // length * count + codes.columns[entries], return_inverse=True
        )
        sizes.append(np.bincount(keys // count, minlength=span.stop - span.start))
        columns.append(keys % count)
        values.append(np.bincount(which, weights=codes.values[entries]) / length)
    starts = starts_of(np.concatenate(sizes))
    return _Sparse(starts, np.concatenate(columns), np.concatenate(values))


def _transpose(codes: _Sparse, first: int) -> _Sparse:
    """From an entry to the images from `first` on that have it, counted from there."""
    count = len(codes.starts) - 1
    entries, row = codes.take(np.arange(first, count))
    columns = codes.columns[entries]
    order = np.argsort(columns, kind="stable")
    starts = starts_of(np.bincount(columns, minlength=count))
    return _Sparse(starts, row[order], codes.values[entries][order])


def _rows(
    direct: Distances, codes: _Sparse, divisors: FloatArray, lam: float, chunk: int
) -> Iterator[tuple[int, Tensor]]:
    """The final distances: (1 - lam) * Jaccard distance + lam * original distance / divisor."""
    num_query, num_gallery = len(direct.query), len(direct.gallery)
    index = _transpose(codes, num_query)
    for span in _chunks(codes, index, num_query, min(chunk, max(1, _CELLS // num_gallery))):
        yield span.start, torch.from_numpy(_final(direct, codes, index, span, divisors, lam))


def _final(
    direct: Distances,
    codes: _Sparse,
    index: _Sparse,
    span: slice,
    divisors: FloatArray,
    lam: float,
) -> NDArray[np.float32]:
    """(q, G) The final distances of some queries."""
    rows = _original(direct, span, lam / divisors[span])
    rows += 1 - lam
    shared = _overlaps(codes, index, span, len(direct.gallery))
    where = np.flatnonzero(shared)
    some = shared[where]
    rows.reshape(-1)[where] -= (1 - lam) * (some / (2 - some))
    # Near 0 float32 shows what a sum's order left over: round to multiples of 2**-40 before.
    rows += _SHIFT
    rows -= _SHIFT
    return rows.astype(np.float32)


def _chunks(codes: _Sparse, index: _Sparse, num_query: int, most: int) -> Iterator[slice]:
    """Runs of queries: as many as `most`, and no more pairs of entries than fit `_PAIRS`."""
    sizes = np.diff(index.starts)[codes.columns[: codes.starts[num_query]]]
    before = starts_of(sizes)[codes.starts[: num_query + 1]]
    start = 0
    while start < num_query:
        fits = int(np.searchsorted(before, before[start] + _PAIRS, side="right")) - 1
        stop = min(max(fits, start + 1), start + most, num_query)
        yield slice(start, stop)
        start = stop


def _original(direct: Distances, span: slice, factors: FloatArray) -> FloatArray:
    """(q, G) Distances of some queries, times a factor each.

    The product is in float64, and rounded later: equal images keep equal distances.
    """
    query, gallery = direct.query, direct.gallery
    rows = np.empty((span.stop - span.start, len(gallery)))
    vectors = query.rows(span).vectors.cpu().numpy() * factors[:, None]
    for piece in spans(len(gallery), _PIECE):
        products = rows[:, piece]
        np.matmul(vectors, _float64(gallery, piece).T, out=products)
        if query.unit:
            products /= -gallery.norms[piece].cpu().numpy()
            products += factors[:, None]
        else:
            squares = query.squares[span, None] + gallery.squares[piece]
            products *= -2
            products += squares.cpu().numpy() * factors[:, None]
    return rows


def _float64(side: Side, piece: slice) -> FloatArray:
    """Vectors (n, D) as they were given."""
    vectors = side.features[piece].to("cpu", torch.float32).to(torch.float64)
    return np.asarray(vectors.numpy())


def _overlaps(codes: _Sparse, index: _Sparse, span: slice, width: int) -> FloatArray:
    """(q * G) The sum, over all entries, of the smaller of the query's and the gallery image's."""
    entries, row = codes.take(np.arange(span.start, span.stop))
    there, which = index.take(codes.columns[entries])
    weights = np.minimum(codes.values[entries][which], index.values[there])
    where = row[which] * width + index.columns[there]
    cells = (span.stop - span.start) * width
    return np.bincount(where, weights=weights, minlength=cells).astype(np.float64, copy=False)
