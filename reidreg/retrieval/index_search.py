"""Exact nearest-neighbour search: the base of every index, and what its recall is measured against.

faiss compares float32 vectors and finds candidates; exact distances (`reidreg.retrieval.distances`)
put them in order. Of two items at equal distance the earlier one is nearer. For a gallery that is
searched once, use `reidreg.retrieval.ranked_lists`; here the gallery is prepared once and searched
often.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reidreg.errors import DataError
from reidreg.retrieval.arrays import FloatArray, IntArray
from reidreg.retrieval.blocks import spans
from reidreg.retrieval.distances import METRICS, Distances
from reidreg.retrieval.options import check_choice
from reidreg.retrieval.vectors import Features, Side

Float32Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

SPARE = 32  # candidates beyond k that a search fetches, so that rounding cannot hide a neighbour
_BLOCK = 65_536  # vectors that are compared at a time
_HELD = 2**24  # float32 values of candidates' vectors that are held at a time: 64 MiB
_GROUP = 8  # queries whose candidates are measured together


class Vectors:
    """Rows of float32 vectors in one or several pieces, each in memory or mapped from disk.

    Args:
        pieces: (n, D) float32 each, of one width.
    """

    def __init__(self, pieces: Sequence[Float32Array]) -> None:
        self.pieces = tuple(pieces)
        self.dim: int = self.pieces[0].shape[1]
        self._ends = np.cumsum([len(piece) for piece in self.pieces])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def followed_by(self, piece: Float32Array) -> Vectors:
        """These rows with further ones appended; nothing is copied."""
        return Vectors([*self.pieces, piece])

    def take(self, index: IntArray) -> Float32Array:
        """A copy of the selected rows, (len(index), D)."""
        out = np.empty((len(index), self.dim), dtype=np.float32)
        holder = np.searchsorted(self._ends, index, side="right")
        for number in np.unique(holder):
            piece, here = self.pieces[number], holder == number
            out[here] = piece[index[here] - (self._ends[number] - len(piece))]
        return out

    def blocks(self, size: int = _BLOCK) -> Iterator[tuple[int, Float32Array]]:
        """All rows in order: (index of the first row, up to `size` rows)."""
        start = 0
        for piece in self.pieces:
            for span in spans(len(piece), size):
                yield start + span.start, piece[span]
            start += len(piece)


@dataclass(frozen=True, slots=True)
class Space:
    """How features are compared, and how they are converted for faiss.

    faiss always computes squared Euclidean distances of float32 vectors. For the cosine metric the
    vectors are normalised; for euclidean they are divided by `scale`, so that no square overflows.

    Args:
        metric: `cosine` or `euclidean` (squared).
        scale: The divisor of vectors, 1 for cosine.
        longest: The norm of the longest item.
    """

    metric: str
    scale: float
    longest: float

    @classmethod
    def of(cls, metric: str, side: Side) -> Space:
        """The space of an index whose first items these are."""
        return cls(metric, side.longest or 1.0, side.longest)

    def with_items(self, side: Side) -> Space:
        """The space after adding items."""
        return replace(self, longest=max(self.longest, side.longest))

    def side(self, name: str, features: Features, paths: Sequence[str] = ()) -> Side:
        """Features, checked to be finite and, for the cosine metric, not zero.

        Raises:
            DataError: A feature is not; the message names the first one.
        """
        return checked_side(name, features, self.metric, paths)

    def float32(self, side: Side, index: slice | IntArray) -> Float32Array:
        """The selected vectors as faiss compares them, (n, D)."""
        vectors: Float32Array = np.ascontiguousarray(side.fast(index, self.scale).numpy())
        if not self.metric == "cosine" and not np.isfinite(vectors).all():
            raise DataError(
                f"features of norm {side.longest:.3g} do not fit an index of features of norm "
                f"{self.scale:.3g}; rebuild it from all features"
            )
        return vectors

    def scores(self, distances: FloatArray) -> Float32Array:
        """The scores of distances: cosine similarities, or squared Euclidean distances."""
        scores = 1 - distances if self.metric == "cosine" else distances
        with np.errstate(over="ignore"):  # beyond float32 they are infinite
            return scores.astype(np.float32)


def checked_side(name: str, features: Features, metric: str, paths: Sequence[str] = ()) -> Side:
    """As `Space.side`, for a metric that is not checked yet."""
    check_choice("metric", metric, METRICS)
    return Side(name, features, paths, metric, torch.device("cpu"))


# --------------------------------------------------------------------- candidates


def select(allowed: Mask | None) -> Any:
    """A faiss selector of the allowed items, or None for all."""
    import faiss

    if allowed is None:
        return None
    return faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))


class BruteForce:
    """Candidates by comparing each query with every item.

    Args:
        vectors: The items.
        space: How they are compared.
        keep: Whether to keep the converted vectors for further searches; otherwise each search
            converts the items block by block, in constant memory.
    """

    def __init__(self, vectors: Vectors, space: Space, keep: bool = False) -> None:
        self.vectors, self.space = vectors, space
        self._kept = list(self._converted(vectors)) if keep else None

    def extended(self, vectors: Vectors, space: Space, piece: Float32Array) -> BruteForce:
        """The same with one more piece; `vectors` are all of them."""
        out = BruteForce(vectors, space)
        if self._kept is not None:
            start = len(self.vectors)
            added = ((start + first, index) for first, index in out._converted(Vectors([piece])))
            out._kept = [*self._kept, *added]
        return out

    def candidates(
        self, queries: Float32Array, fetch: int, allowed: Mask | None = None
    ) -> tuple[Float32Array, IntArray]:
        """The nearest items in float32: distances (Q, fetch) and item numbers (Q, fetch).

        Missing items have number -1.
        """
        import faiss

        best = np.full((len(queries), fetch), np.inf, dtype=np.float32)
        items = np.full((len(queries), fetch), -1, dtype=np.int64)
        for start, block in self._kept or self._converted(self.vectors):
            count = min(fetch, block.ntotal)
            here = None if allowed is None else allowed[start : start + block.ntotal]
            params = faiss.SearchParameters(sel=select(here))
            found, labels = block.search(queries, count, params=params)
            found[labels < 0] = np.inf
            labels[labels >= 0] += start
            both = np.concatenate([best, found], axis=1), np.concatenate([items, labels], axis=1)
            order = np.argsort(both[0], axis=1, kind="stable")[:, :fetch]
            best, items = (np.take_along_axis(values, order, axis=1) for values in both)
        return best, items

    def _converted(self, vectors: Vectors) -> Iterator[tuple[int, Any]]:
        import faiss

        for start, block in vectors.blocks():
            side = self.space.side("gallery", block)
            index = faiss.IndexFlatL2(vectors.dim)
            index.add(self.space.float32(side, slice(None)))
            yield start, index


# --------------------------------------------------------------------- exact order


def measured(
    queries: Float32Array, vectors: Vectors, items: IntArray, metric: str
) -> tuple[FloatArray, IntArray]:
    """Candidates sorted by their exact distances.

    Args:
        queries: (Q, D) raw features.
        vectors: The raw features of all items.
        items: (Q, C) item numbers of candidates, -1 for none.
        metric: `cosine` or `euclidean`.

    Returns:
        Distances (Q, C), infinite for none, and item numbers (Q, C), nearest first.
    """
    out = np.full(items.shape, np.inf)
    rows = max(1, _HELD // max(items.shape[1] * vectors.dim, 1))
    for span in spans(len(items), rows):
        query, column = np.nonzero(items[span] >= 0)
        if not len(query):
            continue
        found, position = np.unique(items[span][query, column], return_inverse=True)
        distances = Distances(queries[span], vectors.take(found), metric)
        pairs = query.astype(np.int64), position.reshape(-1).astype(np.int64)
        out[span][query, column] = distances.exact_pairs(*pairs, _BLOCK // 16, _GROUP)
    order = np.lexsort((items, out), axis=1)
    return np.take_along_axis(out, order, axis=1), np.take_along_axis(items, order, axis=1)


def exact_search(
    queries: Side, raw: Float32Array, force: BruteForce, k: int, allowed: Mask | None = None
) -> tuple[FloatArray, IntArray]:
    """The k nearest items of each query, exactly.

    The search is repeated with more candidates for the queries whose k-th item is not certainly
    nearer than all items that were not fetched.

    Args:
        queries: The queries, checked.
        raw: Their raw features, (Q, D).
        force: The items.
        k: The length of the lists.
        allowed: (N,) the items that may be found, or None for all.

    Returns:
        Distances (Q, k) float64 and item numbers (Q, k); missing items have an infinite distance
        and number -1.
    """
    vectors, space = force.vectors, force.space
    everything = np.arange(len(vectors)) if allowed is None else np.flatnonzero(allowed)
    count = len(everything)
    distances = np.full((len(raw), k), np.inf)
    items = np.full((len(raw), k), -1, dtype=np.int64)
    unsure, fetch, width = np.arange(len(raw)), min(k + SPARE, count), min(k, count)
    while len(unsure) and width:
        again = []
        for span in spans(len(unsure), max(1, _HELD // fetch)):
            rows = unsure[span]
            if fetch < count:
                near, found = force.candidates(space.float32(queries, rows), fetch, allowed)
            else:
                found = np.tile(everything, (len(rows), 1))
            exact, found = measured(raw[rows], vectors, found, space.metric)
            distances[rows, :width], items[rows, :width] = exact[:, :width], found[:, :width]
            if fetch < count:
                least = _least_unfetched(near[:, -1], queries, rows, space, vectors.dim)
                again.append(rows[~(exact[:, width - 1] < least)])
        unsure = np.concatenate(again) if again else unsure[:0]
        fetch = min(8 * fetch, count)
    return distances, items


def _least_unfetched(
    last: Float32Array, queries: Side, rows: IntArray, space: Space, dim: int
) -> FloatArray:
    """(n,) A lower bound on the exact distance of all items that were not fetched.

    Args:
        last: (n,) the float32 distance of the last item fetched.
        queries: The query side.
        rows: (n,) query indices.
        space: How vectors are compared.
        dim: Their width.
    """
    unit = space.metric == "cosine"
    reach = 1.0 if unit else np.maximum(queries.norms[rows].numpy(), space.longest) / space.scale
    # The error of sums of D products of two vectors no longer than the reach, with 16 steps for the
    # rounding of the vectors; the last term bounds what float32 rounds to zero.
    rounding = (dim + 16) * 2.0**-22 * np.square(reach) + dim * 2.0**-140
    # Where float32 overflowed, nothing is known.
    known = np.where(np.isfinite(last), last.astype(np.float64) - rounding, -np.inf)
    return np.asarray(known * space.scale**2 * (0.5 if unit else 1.0))
