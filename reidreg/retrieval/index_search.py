"""The nearest of many vectors, exactly: what an index is built on, and measured against.

faiss compares float32 vectors and finds candidates; exact distances (`reidreg.retrieval.distances`)
put them in order. Of two items at equal distance the earlier one is nearer. For a gallery that is
searched once there is `reidreg.retrieval.ranked_lists`; here the gallery is prepared once and
searched often.
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

SPARE = 32  # further candidates that a search fetches, so that rounding cannot hide one
_BLOCK = 65_536  # vectors that are compared at a time
_HELD = 2**24  # float32 numbers of candidates' vectors that are held at a time: 64 MiB
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
        """These rows and then further ones; nothing is copied."""
        return Vectors([*self.pieces, piece])

    def take(self, index: IntArray) -> Float32Array:
        """Copies of some rows, (len(index), D)."""
        out = np.empty((len(index), self.dim), dtype=np.float32)
        holder = np.searchsorted(self._ends, index, side="right")
        for number in np.unique(holder):
            piece, here = self.pieces[number], holder == number
            out[here] = piece[index[here] - (self._ends[number] - len(piece))]
        return out

    def blocks(self, size: int = _BLOCK) -> Iterator[tuple[int, Float32Array]]:
        """All rows in order: the number of the first one, and up to `size` of them."""
        start = 0
        for piece in self.pieces:
            for span in spans(len(piece), size):
                yield start + span.start, piece[span]
            start += len(piece)


@dataclass(frozen=True, slots=True)
class Space:
    """How features are compared, and how faiss is given them.

    faiss always compares squared Euclidean distances of float32 vectors. For the cosine metric the
    vectors have length 1; for the Euclidean one they are divided by `scale`, so that no square
    overflows.

    Args:
        metric: `cosine` or `euclidean` (squared).
        scale: What vectors are divided by, 1 for cosine.
        longest: The norm of the longest item.
    """

    metric: str
    scale: float
    longest: float

    @classmethod
    def of(cls, metric: str, side: Side) -> Space:
        """The space of an index that begins with these items."""
        return cls(metric, side.longest or 1.0, side.longest)

    def with_items(self, side: Side) -> Space:
        """The space with further items in it."""
        return replace(self, longest=max(self.longest, side.longest))

    def side(self, name: str, features: Features, paths: Sequence[str] = ()) -> Side:
        """Features that are checked: finite and, for the cosine metric, not zero.

        Raises:
            DataError: They are not; the line names the first one.
        """
        return checked_side(name, features, self.metric, paths)

    def float32(self, side: Side, index: slice | IntArray) -> Float32Array:
        """Some vectors as faiss is given them, (n, D)."""
        vectors: Float32Array = np.ascontiguousarray(side.fast(index, self.scale).numpy())
        if not self.metric == "cosine" and not np.isfinite(vectors).all():
            raise DataError(
                f"features of norm {side.longest:.3g} do not fit an index of features of norm "
                f"{self.scale:.3g}; build it anew from all of them"
            )
        return vectors

    def scores(self, distances: FloatArray) -> Float32Array:
        """Distances as they are shown: cosine similarities, or squared Euclidean distances."""
        shown = 1 - distances if self.metric == "cosine" else distances
        with np.errstate(over="ignore"):  # infinite then
            return shown.astype(np.float32)


def checked_side(name: str, features: Features, metric: str, paths: Sequence[str] = ()) -> Side:
    """As `Space.side`, for a metric that is to be checked as well."""
    check_choice("metric", metric, METRICS)
    return Side(name, features, paths, metric, torch.device("cpu"))


# --------------------------------------------------------------------- candidates


def select(allowed: Mask | None) -> Any:
    """faiss's way to say which items may be found, or None for all of them."""
    import faiss

    if allowed is None:
        return None
    return faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))


class BruteForce:
    """Candidates by comparing a query with every item.

    Args:
        vectors: The items.
        space: How they are compared.
        keep: Whether to keep the float32 vectors for further searches; otherwise they are made of
            the items block by block, in constant memory.
    """

    def __init__(self, vectors: Vectors, space: Space, keep: bool = False) -> None:
        self.vectors, self.space = vectors, space
        self._kept = list(self._made(vectors)) if keep else None

    def extended(self, vectors: Vectors, space: Space, piece: Float32Array) -> BruteForce:
        """The same with a piece more, `vectors` being all of them."""
        out = BruteForce(vectors, space)
        if self._kept is not None:
            start = len(self.vectors)
            made = ((start + first, index) for first, index in out._made(Vectors([piece])))
            out._kept = [*self._kept, *made]
        return out

    def candidates(
        self, queries: Float32Array, fetch: int, allowed: Mask | None = None
    ) -> tuple[Float32Array, IntArray]:
        """The nearest items by float32 distances: those, and the items' numbers, (Q, fetch).

        Where there are fewer, the numbers are -1.
        """
        import faiss

        best = np.full((len(queries), fetch), np.inf, dtype=np.float32)
        items = np.full((len(queries), fetch), -1, dtype=np.int64)
        for start, block in self._kept or self._made(self.vectors):
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

    def _made(self, vectors: Vectors) -> Iterator[tuple[int, Any]]:
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
    """Candidates in the order of their exact distances.

    Args:
        queries: (Q, D) raw features.
        vectors: The raw features of all items.
        items: (Q, C) numbers of candidates, -1 for none.
        metric: `cosine` or `euclidean`.

    Returns:
        Distances (Q, C), infinite for none, and numbers (Q, C); both in order.
    """
    out = np.full(items.shape, np.inf)
    rows = max(1, _HELD // max(items.shape[1] * vectors.dim, 1))
    for span in spans(len(items), rows):
        query, column = np.nonzero(items[span] >= 0)
        if not len(query):
            continue
        found, place = np.unique(items[span][query, column], return_inverse=True)
        distances = Distances(queries[span], vectors.take(found), metric)
        pairs = query.astype(np.int64), place.reshape(-1).astype(np.int64)
        out[span][query, column] = distances.exact_pairs(*pairs, _BLOCK // 16, _GROUP)
    order = np.lexsort((items, out), axis=1)
    return np.take_along_axis(out, order, axis=1), np.take_along_axis(items, order, axis=1)


def exact_search(
    queries: Side, raw: Float32Array, force: BruteForce, k: int, allowed: Mask | None = None
) -> tuple[FloatArray, IntArray]:
    """The k nearest items of each query, without a doubt about any of them.

    Where the last one taken is not clearly nearer than all that were not fetched, more are.

    Args:
        queries: The checked queries.
        raw: Their features, (Q, D).
        force: The items.
        k: The length of the lists.
        allowed: (N,) the items that may be found, or None for all.

    Returns:
        Distances (Q, k) float64 and numbers of items (Q, k); where there are fewer, the
        distances are infinite and the numbers -1.
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
                least = _least(near[:, -1], queries, rows, space, vectors.dim)
                again.append(rows[~(exact[:, width - 1] < least)])
        unsure = np.concatenate(again) if again else unsure[:0]
        fetch = min(8 * fetch, count)
    return distances, items


def _least(last: Float32Array, queries: Side, rows: IntArray, space: Space, dim: int) -> FloatArray:
    """No item that was not fetched is nearer than this, whatever float32 rounded."""
    unit = space.metric == "cosine"
    reach = 1.0 if unit else np.maximum(queries.norms[rows].numpy(), space.longest) / space.scale
    # Sums of D products of the two vectors, of which neither is longer than the reach; the 16 are
    # the roundings of the vectors. What float32 cannot tell from zero is below the last term.
    rounding = (dim + 16) * 2.0**-22 * np.square(reach) + dim * 2.0**-140
    # Infinite where float32 overflowed: then there is no telling.
    known = np.where(np.isfinite(last), last.astype(np.float64) - rounding, -np.inf)
    return np.asarray(known * space.scale**2 * (0.5 if unit else 1.0))
