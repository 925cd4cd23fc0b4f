"""k-reciprocal re-ranking: distances that take the neighbours' neighbours into account.

Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR 2017. Each of the
N = Q + G images is encoded by its mutual nearest neighbours, weighted by their distance; the
Jaccard distance of two encodings is mixed with the original distance.

An encoding has a few dozen entries, not N. So neighbour lists, encodings and the inverted index
from an entry to the gallery images that have it are sparse rows; no N x N array is made, and the
result is that of the dense definition.

Distances are squared Euclidean (of unit vectors if the metric is cosine), each row divided by its
largest value. A neighbour list holds at most N images. All images take part, junk included: leave
it out beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reidreg.errors import ConfigError
from reidreg.retrieval.arrays import FloatArray, IntArray, ragged, starts_of
from reidreg.retrieval.blocks import Progress, spans
from reidreg.retrieval.distances import Distances
from reidreg.retrieval.knn_graph import TILE, neighbour_graph
from reidreg.retrieval.options import check_at_least
from reidreg.retrieval.vectors import Features, Side

_SHIFT = 1.5 * 2.0**12  # float64 has no steps finer than 2**-40 there


@dataclass(frozen=True, slots=True)
class Limits:
    """How much re-ranking holds at a time; it changes distances by rounding errors at most.

    Args:
        tile: Rows and columns of a tile of the neighbour search.
        block: Images that are encoded together.
        piece: Gallery vectors in float64.
        cells: Distances.
        pairs: Pairs (entry, gallery image) of the encodings.
    """

    tile: int = TILE
    block: int = 512
    piece: int = 1024
    cells: int = 2**22
    pairs: int = 2**20


LIMITS = Limits()


class _Sparse(NamedTuple):
    """Sparse rows: row i has columns `columns[starts[i]:starts[i + 1]]`; values likewise."""

    starts: IntArray
    columns: IntArray
    values: FloatArray

    def take(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """The positions of the entries of some rows, and which of the rows each belongs to."""
        sizes = self.starts[rows + 1] - self.starts[rows]
        return ragged(self.starts[rows], sizes), np.repeat(np.arange(len(rows)), sizes)


class _Neighbours(NamedTuple):
    """Each image's neighbours (N, k), nearest first, their divided distances, and the divisors."""

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
    limits: Limits = LIMITS,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Re-ranked distances, a few queries at a time, for `match_positions_of_rows`.

    The neighbour search, which takes most of the time, runs during this call; rows are computed on
    iteration.

    Args:
        query_features: (Q, D).
        gallery_features: (G, D).
        metric: `cosine` or `euclidean`.
        k1: The k1 nearest images, and the image itself, are candidates for mutual neighbours.
        k2: Encodings are averaged over the k2 nearest images, itself included; 1 turns it off.
        lam: Weight of the original distance in the final one, 0..1.
        chunk: The largest number of queries at a time; fewer if the gallery is large.
        limits: How much to hold at a time.
        progress: Called with the tiles of the neighbour search done and of all.

    Returns:
        An iterator of (first query, distances (q, G) float32 on the CPU).

    Raises:
        DataError: Shapes do not match, or a feature is not finite.
        ConfigError: An option is wrong.
    """
    for key, value in (("k1", k1), ("k2", k2), ("chunk", chunk)):
        check_at_least(key, value, 1)
    if not 0 <= lam <= 1:
        raise ConfigError(f"lam: {lam} is out of range; a number from 0 to 1 is needed")
    direct = Distances(query_features, gallery_features, metric)
    everyone = _together(direct, metric)
    neighbours = _neighbours(everyone, max(k1 + 1, k2), limits.tile, progress)
    codes = _encode(everyone, neighbours, k1, limits.block)
    if k2 > 1:
        codes = _expand(codes, neighbours.items[:, :k2], limits.block)
    return _rows(direct, codes, neighbours.divisors, lam, chunk, limits)


def clipping_note(num_images: int, k1: int = 20, k2: int = 6) -> str | None:
    """A log message if there are fewer images than a neighbour list is long, else None.

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
    """The distances within query and gallery as one set."""
    sides = direct.query.features, direct.gallery.features
    everyone = torch.cat([side.to("cpu", torch.float32) for side in sides])
    return Distances(everyone, everyone, metric)


def _neighbours(distances: Distances, k: int, tile: int, progress: Progress | None) -> _Neighbours:
    """The neighbour lists, at most N long, with distances divided by each row's largest."""
    graph = neighbour_graph(distances, k, tile=tile, progress=progress)
    # If all images are equal, every distance is 0 and the divisor must not be.
    divisors = np.where(graph.farthest > distances.slack, graph.farthest, 1.0)
    return _Neighbours(graph.items, graph.values / divisors[:, None], divisors)


def _mutual(items: IntArray, block: int) -> NDArray[np.bool_]:
    """(N, k) Whether each neighbour has the image in its own list."""
    own = np.arange(len(items))[:, None, None]
    pieces = spans(len(items), block)
    return np.concatenate([(items[items[span]] == own[span]).any(axis=2) for span in pieces])


def _encode(distances: Distances, neighbours: _Neighbours, k1: int, block: int) -> _Sparse:
    """Each image's encoding: its expanded mutual neighbours, weighted by exp(-distance)."""
    near = neighbours.items[:, : k1 + 1]
    half = neighbours.items[:, : int(np.around(k1 / 2)) + 1]
    near_mutual, half_mutual = _mutual(near, block), _mutual(half, block)
    count = len(near)
    sizes, columns, values = [], [], []
    for span in spans(count, block):
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
    """The members of the encodings of a span of images, as sorted keys image * N + member.

    They are the image's mutual neighbours and, for each of these, its own mutual neighbours in
    lists half as long, if more than two thirds of them are among the image's.
    """
    row, column = near_mutual[span].nonzero()
    row = row + span.start
    member = near[row, column]
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
    """Divided distances of pairs: most are in the neighbour lists, the rest is computed."""
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


def _expand(codes: _Sparse, lists: IntArray, block: int) -> _Sparse:
    """Local query expansion: each code becomes the mean of the codes of the images in its list."""
    count, length = lists.shape
    sizes, columns, values = [], [], []
    for span in spans(count, block):
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
    """The inverted index, from an entry to the images from `first` on; these count from 0."""
    count = len(codes.starts) - 1
    entries, row = codes.take(np.arange(first, count))
    columns = codes.columns[entries]
    order = np.argsort(columns, kind="stable")
    starts = starts_of(np.bincount(columns, minlength=count))
    return _Sparse(starts, row[order], codes.values[entries][order])


def _rows(
    direct: Distances, codes: _Sparse, divisors: FloatArray, lam: float, chunk: int, limits: Limits
) -> Iterator[tuple[int, Tensor]]:
    """The final distances: (1 - lam) * Jaccard distance + lam * original distance / divisor."""
    num_query, num_gallery = len(direct.query), len(direct.gallery)
    index = _transpose(codes, num_query)
    most = min(chunk, max(1, limits.cells // num_gallery))
    for span in _chunks(codes, index, num_query, most, limits.pairs):
        rows = _final(direct, codes, index, span, divisors, lam, limits.piece)
        yield span.start, torch.from_numpy(rows)


def _final(
    direct: Distances,
    codes: _Sparse,
    index: _Sparse,
    span: slice,
    divisors: FloatArray,
    lam: float,
    piece: int,
) -> NDArray[np.float32]:
    """(q, G) The final distances of some queries."""
    rows = _original(direct, span, lam / divisors[span], piece)
    rows += 1 - lam
    shared = _overlaps(codes, index, span, len(direct.gallery))
    where = np.flatnonzero(shared)
    some = shared[where]
    rows.reshape(-1)[where] -= (1 - lam) * (some / (2 - some))
    # Rounded to multiples of 2**-40: near 0, float32 would keep differences that come from the
    # order of summation.
    rows += _SHIFT
    rows -= _SHIFT
    return rows.astype(np.float32)


def _chunks(
    codes: _Sparse, index: _Sparse, num_query: int, most: int, pairs: int
) -> Iterator[slice]:
    """Runs of at most `most` queries and, unless one query has more, `pairs` pairs of entries."""
    sizes = np.diff(index.starts)[codes.columns[: codes.starts[num_query]]]
    before = starts_of(sizes)[codes.starts[: num_query + 1]]
    start = 0
    while start < num_query:
        fits = int(np.searchsorted(before, before[start] + pairs, side="right")) - 1
        stop = min(max(fits, start + 1), start + most, num_query)
        yield slice(start, stop)
        start = stop


def _original(direct: Distances, span: slice, factors: FloatArray, size: int) -> FloatArray:
    """(q, G) Distances of some queries, times a factor each.

    They are computed in float64 and rounded later, so that equal images are at equal distances.
    """
    query, gallery = direct.query, direct.gallery
    rows = np.empty((span.stop - span.start, len(gallery)))
    vectors = query.rows(span).vectors.cpu().numpy() * factors[:, None]
    for piece in spans(len(gallery), size):
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
    """Features (n, D) as given."""
    vectors = side.features[piece].to("cpu", torch.float32).to(torch.float64)
    return np.asarray(vectors.numpy())


def _overlaps(codes: _Sparse, index: _Sparse, span: slice, width: int) -> FloatArray:
    """(q * G,) The sum over all entries of min(query's value, gallery image's value)."""
    entries, row = codes.take(np.arange(span.start, span.stop))
    there, which = index.take(codes.columns[entries])
    weights = np.minimum(codes.values[entries][which], index.values[there])
    where = row[which] * width + index.columns[there]
    cells = (span.stop - span.start) * width
    return np.bincount(where, weights=weights, minlength=cells).astype(np.float64, copy=False)
