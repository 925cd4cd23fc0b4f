"""Distances that depend on their two vectors alone, down to the last bit.

The summation order of a matrix product depends on the tile's shape, the number of threads and the
device, so two equal vectors may come out at slightly different distances. Hence there are three
kinds of distance, each more precise than the one before, with known bounds on their differences:

- `Distances.scores` is a plain matrix product in float32. If two scores differ by more than the
  bound (nearly always), the order of the items is certain.
- `Distances.pairs`, `Distances.near_pairs` and `Distances.approximate` are summed in float64.
- `Distances.exact` decides the rest. It writes each vector as `high + low` on two grids so coarse
  that every product, and every partial sum of products in any order, is a multiple of the grid's
  unit and fits the 53 bits of a float64. Without rounding the order of summation does not matter:
  the result has the same bits on every tile, thread count and device, and equal vectors tie.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from reidreg.errors import DataError
from reidreg.retrieval.arrays import FloatArray, IntArray
from reidreg.retrieval.blocks import in_threads, spans
from reidreg.retrieval.options import check_choice
from reidreg.retrieval.vectors import Features, Rows, Side

METRICS = ("cosine", "euclidean")

_GROUP = 64  # queries whose matches are measured together
_CHUNK = 128  # products that are summed in float32 at a time; shorter sums round less
_COLUMNS = 1024  # gallery items whose partial sums stay in the CPU's cache
_CACHED = 2**16  # float64 values that fit the CPU's cache


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 matrix products in full float32, whatever training has set.

    TF32, bfloat16 and autocast would invalidate the bounds on rounding errors.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class Distances:
    """Distances between two sets of features, in float64.

    Squared Euclidean, or 1 - cosine, which is computed as half the squared Euclidean distance of
    the vectors divided by their norms.

    Args:
        query: (Q, D) features.
        gallery: (G, D) features; pass the same object as `query` to compare a set with itself.
        metric: `cosine` or `euclidean`.
        paths: The files of the two sides, for errors.

    Raises:
        DataError: A side is empty or not 2-D, the widths differ, a value is not finite, or, for the
            cosine metric, a vector is zero.
        ConfigError: The metric is unknown.
    """

    def __init__(
        self,
        query: Features,
        gallery: Features,
        metric: str,
        paths: tuple[Sequence[str], Sequence[str]] = ((), ()),
    ) -> None:
        check_choice("metric", metric, METRICS)
        sides = [side for side in (query, gallery) if isinstance(side, Tensor) and side.is_cuda]
        self.device = sides[0].device if sides else torch.device("cpu")
        self.query = Side("query", query, paths[0], metric, self.device)
        self.gallery = self.query
        if gallery is not query:
            self.gallery = Side("gallery", gallery, paths[1], metric, self.device)
        self.dim, width = self.query.features.shape[1], self.gallery.features.shape[1]
        if self.dim != width:
            raise DataError(
                f"query features have {self.dim} values each, gallery features have {width}; "
                "both must come from the same model"
            )
        self.weight = 0.5 if metric == "cosine" else 1.0

    @property
    def slack(self) -> float:
        """Bound on the difference of a distance in float64 and the exact one.

        The error of a sum of D products is at most D * 2**-53 of the two norms' product; what the
        grids of `exact` leave out is at most D * 2**-50 of the squared sum of the norms. The rest
        is margin.
        """
        reach = (self.query.longest + self.gallery.longest) ** 2
        return self.weight * reach * (self.dim + 8) * 2.0**-49

    # A score orders a query's items as the distance does, with a smaller float32 error: minus the
    # cosine, or half of (squared distance - squared norm of the query), in units of scale**2.

    @property
    def scale(self) -> float:
        """The divisor of vectors in scores, so that none is longer than 1."""
        return max(self.query.longest, self.gallery.longest) or 1.0

    @property
    def score_slack(self) -> float:
        """Bound on the difference of a score and the score of the exact distance.

        The error of a sum of n float32 products in any order is at most n * 2**-24 of the two
        norms' product (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1),
        which is at most 1; with sums of `_CHUNK`, n is the largest number of additions that a
        product takes part in. Of the 10 extra steps, 8 are for the rounding of the vectors, the
        rest is margin. Euclidean scores have half squares added, which doubles the bound.
        """
        steps = min(self.dim, _CHUNK) + math.ceil(self.dim / _CHUNK) + 10
        return steps * 2.0**-24 * (1.0 if self.query.unit else 2.0) + 2 * self.slack / self.scale**2

    def score_of(self, queries: IntArray, values: FloatArray) -> FloatArray:
        """The scores (n,) float64 of exact distances (n,) to the queries (n,)."""
        if self.query.unit:
            return values - 1
        squares: FloatArray = self.query.squares.cpu().numpy()[queries]
        return (values - squares) / (2 * self.scale**2)

    def score_items(self, items: slice | IntArray) -> tuple[Tensor, Tensor | None]:
        """Gallery vectors (n, D) float32 for `scores`, and the term (n,) added to their scores."""
        vectors = self.gallery.fast(items, self.scale)
        if self.query.unit:
            return vectors, None
        squares = self.gallery.squares[self.gallery.where(items)]
        return vectors, (squares / (2 * self.scale**2)).to(torch.float32)

    def score_queries(self, queries: slice | IntArray) -> Tensor:
        """Query vectors (n, D) float32 for `scores`."""
        return self.query.fast(queries, self.scale, -1)

    def scores(self, queries: Tensor, items: tuple[Tensor, Tensor | None], out: Tensor) -> Tensor:
        """Scores (n, m) float32 within `score_slack`, written to `out`; needs `full_float32`."""
        vectors, added = items
        first, *rest = (slice(k, k + _CHUNK) for k in range(0, self.dim, _CHUNK))
        for some in spans(len(vectors), _COLUMNS if out.device.type == "cpu" else len(vectors)):
            torch.mm(queries[:, first], vectors[some, first].T, out=out[:, some])
            for part in rest:
                out[:, some].addmm_(queries[:, part], vectors[some, part].T)
        return out if added is None else out.add_(added)

    def approximate(self, queries: Rows, items: Rows) -> Tensor:
        """Distances (n, m) within `slack`, by one matrix product in float64."""
        sums = queries.squares[:, None] + items.squares
        weight = self.weight
        return sums.addmm_(queries.vectors, items.vectors.T, beta=weight, alpha=-2 * weight)

    def exact(self, queries: slice | IntArray, items: slice | IntArray) -> Tensor:
        """Distances (n, m) that depend on their two vectors alone; 0 for equal vectors."""
        high, low = self.query.split(queries)
        item_high, item_low = self.gallery.split(items)
        mixed = (high @ item_low.T).addmm_(low, item_high.T)
        mixed = (high * low).sum(dim=1)[:, None] + (item_high * item_low).sum(dim=1) - mixed
        out = _squared_distances(high, item_high) + _squared_distances(low, item_low) + 2 * mixed
        return out.clamp_(min=0).mul_(self.weight)

    def exact_pairs(
        self, queries: IntArray, items: IntArray, width: int, group: int = _GROUP
    ) -> FloatArray:
        """Exact distances of single pairs, (M,).

        Args:
            queries: (M,) query indices, equal ones adjacent.
            items: (M,) gallery indices.
            width: How many gallery vectors to hold at a time.
            group: How many queries to process together, with all of their items.
        """

        def measure(queries: IntArray, items: IntArray) -> FloatArray:
            return np.asarray(self.exact(queries, items).cpu().numpy())

        return self._in_blocks(queries, items, width, group, measure)

    def near_pairs(
        self, queries: IntArray, items: IntArray, width: int, group: int = _GROUP
    ) -> FloatArray:
        """As `exact_pairs`, but within `slack`; for pairs that share many of their items."""

        def measure(queries: IntArray, items: IntArray) -> FloatArray:
            return np.asarray(self.query.float64(queries) @ self.gallery.float64(items).T)

        width = min(width, max(1, 2 * _CACHED // self.dim))
        products = self._in_blocks(queries, items, width, group, measure)
        return self._of_products(products, queries, items)

    def _in_blocks(
        self,
        queries: IntArray,
        items: IntArray,
        width: int,
        group: int,
        measure: Callable[[IntArray, IntArray], FloatArray],
    ) -> FloatArray:
        out = np.empty(len(queries))
        starts = np.flatnonzero(np.diff(queries, prepend=-1))[::group]
        for start, stop in pairwise([*starts.tolist(), len(queries)]):
            rows, row = np.unique(queries[start:stop], return_inverse=True)
            columns, column = np.unique(items[start:stop], return_inverse=True)
            for span in spans(len(columns), width):
                here = np.flatnonzero((column >= span.start) & (column < span.stop))
                block = measure(rows, columns[span])
                out[start + here] = block[row[here], column[here] - span.start]
        return out

    def pairs(self, queries: IntArray, items: IntArray) -> FloatArray:
        """Distances of single pairs, (M,) float64, within `slack`, on several threads.

        Args:
            queries: (M,) query indices, equal ones adjacent.
            items: (M,) gallery indices.
        """
        most = max(1, _CACHED // self.dim)
        bounds = np.flatnonzero(np.diff(queries, prepend=-1, append=-1))
        cuts = [*range(0, len(queries), most)]
        runs = [slice(*ends) for ends in pairwise(np.unique([*bounds, *cuts]).tolist())]
        products = np.empty(len(queries))

        def multiply(some: slice) -> None:
            for run in runs[some]:
                query = self.query.float64(queries[run.start : run.start + 1])[0]
                # einsum sums in a fixed order, however many threads run.
                products[run] = np.einsum("kd,d->k", self.gallery.float64(items[run]), query)

        in_threads(multiply, spans(len(runs), 256))
        return self._of_products(products, queries, items)

    def listed(self, queries: IntArray, items: IntArray) -> FloatArray:
        """As `pairs`, for queries (n,) and their lists of items (n, m): distances (n, m)."""
        pairs = np.repeat(queries, items.shape[1]), items.reshape(-1)
        return self.pairs(*pairs).reshape(items.shape)

    def _of_products(self, products: FloatArray, queries: IntArray, items: IntArray) -> FloatArray:
        """Distances (M,) of pairs from the products of their features as given."""
        left: FloatArray = self.query.norms.cpu().numpy()[queries]
        right: FloatArray = self.gallery.norms.cpu().numpy()[items]
        if self.query.unit:
            values = 1 - products / (left * right)
        else:
            values = left * left + right * right - 2 * products
        return np.maximum(values, 0)

    def rows(self, queries: slice | IntArray, width: int, *, exact: bool = False) -> Tensor:
        """Distances of some queries to the whole gallery, (n, G).

        Args:
            queries: Query indices.
            width: How many gallery vectors to hold at a time.
            exact: Whether distances are exact, or within `slack`.
        """
        left = self.query.rows(queries)
        shape = len(left.squares), len(self.gallery)
        out = torch.empty(shape, dtype=torch.float64, device=self.device)
        for piece in spans(len(self.gallery), width):
            out[:, piece] = (
                self.exact(queries, piece)
                if exact
                else self.approximate(left, self.gallery.rows(piece))
            )
        return out


def _squared_distances(left: Tensor, right: Tensor) -> Tensor:
    """Squared Euclidean distances (n, m) of vectors whose products are summed without rounding."""
    squares = (left * left).sum(dim=1)[:, None] + (right * right).sum(dim=1)
    return squares.sub_(left @ right.T, alpha=2)
