"""Distances between vectors that are the same whatever else is computed beside them.

A distance must be a function of its two vectors alone; but a matrix product adds up in an order
that depends on the tile's shape, the number of threads and the device, so that two equal vectors
may come out one unit in the last place apart. Hence three ways to a distance, each surer than the
one before, and each with a bound on how far it is from the last:

- `Distances.scores` is a matrix product in float32, as fast as the machine has one. Where two items
  are further apart than the bound (nearly always), their order is certain.
- `Distances.pairs`, `Distances.near_pairs` and `Distances.approximate` add up in float64.
- `Distances.exact` settles the rest. It writes each vector as `high + low` on two grids so coarse
  that every product, and every partial sum of products in whatever order, is a whole multiple of
  the grid's unit and fits the 53 bits of a float64. A sum without rounding has no order: the
  outcome is the same bits on every tile, thread count and device, and equal vectors tie.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reidreg.errors import ConfigError, DataError, did_you_mean

Features: TypeAlias = Tensor | NDArray[Any]
IntArray: TypeAlias = NDArray[np.int64]
FloatArray: TypeAlias = NDArray[np.float64]

T = TypeVar("T")
R = TypeVar("R")

METRICS = ("cosine", "euclidean")

_GROUP = 64  # queries whose matches are measured together
_CHUNK = 128  # products that float32 adds up at a time
_COLUMNS = 1024  # gallery items whose sums stay in a cache meanwhile
_MOST_QUERIES = 2**11  # so that keys of 64 bits have room for a query's number
_CACHED = 2**16  # float64 values that fit a cache
_HELD = 2**20  # float64 values that threads share: with fewer, they wait for each other
_NEAR_ONE = 4 * 2.0**-24  # how far from 1 the norms are that float32 gives to unit vectors
_TAME = 1e-25  # norms between this and its reciprocal are far from float32's ends


def ragged(starts: IntArray, sizes: IntArray) -> IntArray:
    """The runs `starts[i], starts[i] + 1, ...` of the given sizes, one after the other."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()))


def check_choice(key: str, value: str, known: Sequence[str]) -> None:
    """Raise a ConfigError unless the value is one of those known."""
    if value not in known:
        raise ConfigError(f"{key}: {value!r} is unknown{did_you_mean(str(value), known)}")


def check_at_least(key: str, value: float, least: int) -> None:
    """Raise a ConfigError if the value is too small."""
    if not value >= least:
        raise ConfigError(f"{key}: {value} is too small; at least {least} is needed")


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 matrices in float32, whatever the process has set for its training.

    TF32, bfloat16 passes and autocast would make every bound on a rounding error wrong.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is held at a time, so that the budget is kept.

    Args:
        queries: Query vectors in float32.
        gallery: Gallery vectors in float32.
        exact: Gallery vectors in the parts that exact distances are made of.
        strip: Values whose places among the matches are looked up at once.
    """

    queries: int
    gallery: int
    exact: int
    strip: int

    @classmethod
    def of(cls, budget_mib: float, dim: int, queries: int) -> Plan:
        """The plan for a budget in MiB, vectors of `dim` numbers, and so many queries."""
        check_at_least("budget_mib", budget_mib, 1)
        budget = int(budget_mib * 2**20)
        tile = budget // 64  # a sixteenth: wide where queries are few, else square
        rows = max(1, min(queries, math.isqrt(tile), budget // 8 // (dim * 8), _MOST_QUERIES))
        return cls(
            queries=rows,
            gallery=_aligned(min(tile // rows, budget // 4 // (dim * 8), 2**16)),
            exact=max(1, budget // 4 // (dim * 40)),
            strip=min(budget // 8 // 64, 2**19),
        )


class Rows(NamedTuple):
    """Some vectors of one side, ready to be compared: (n, D) and their squared norms (n,)."""

    vectors: Tensor
    squares: Tensor


class Side:
    """One side's vectors, handed out in float64 a few at a time, so that none is copied twice.

    For the cosine metric they are divided by their norms.
    """

    def __init__(
        self, name: str, features: Features, paths: Sequence[str], metric: str, device: torch.device
    ) -> None:
        self.features = _matrix(name, features)
        self.device = device
        shared = self.features.device.type == "cpu" and self.features.dtype == torch.float32
        self._array = self.features.numpy() if shared else None
        self.unit = metric == "cosine"
        # numpy's root is correctly rounded, torch's is not always, nor the same in every place.
        self.norms = torch.from_numpy(np.sqrt(self._squared_norms().cpu().numpy())).to(device)
        self._check(name, paths)
        mantissas = torch.frexp(self.norms).mantissa
        one = torch.ones_like(self.norms)
        # The power of two just above each norm; division by the mantissa is exact.
        self.scales = one if self.unit else torch.where(mantissas > 0, self.norms / mantissas, one)
        self.squares = one if self.unit else self.norms.square()
        self.longest = 1.0 if self.unit else float(self.norms.max())

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, index: slice | IntArray) -> Rows:
        """Some vectors as they are compared; an index array or a slice says which."""
        raw, where = self.raw(index), self.where(index)
        vectors = raw.div_(self.norms[where, None]) if self.unit else raw
        return Rows(vectors, self.squares[where])

    def fast(self, index: slice | IntArray, scale: float, sign: int = 1) -> Tensor:
        """Some vectors (n, D) in float32: of length 1 or, for Euclid, divided by `scale`.

        Each number is within 4 units of float32's rounding, 4 * 2**-24, of its value.
        """
        raw, where = self.picked(index).to(torch.float32), self.where(index)
        divisors = self.norms[where] if self.unit else self.norms.new_full((len(raw),), scale)
        if float((divisors - 1).abs().max()) <= _NEAR_ONE:  # no copy, where the sign allows
            return raw if sign > 0 else -raw
        if not _TAME <= float(divisors.min()) <= float(divisors.max()) <= 1 / _TAME:
            # The reciprocal, or a number, is out of float32's range or next to its end.
            return (raw.to(torch.float64) * sign / divisors[:, None]).to(torch.float32)
        return raw * (sign / divisors).to(torch.float32)[:, None]

    def split(self, index: slice | IntArray) -> tuple[Tensor, Tensor]:
        """Some vectors as `high + low`, for products without rounding.

        In units of the vector's scale, `high` is a multiple of 2**-26 and its norm is at most 1.
        By Cauchy and Schwarz any partial sum of products of two such vectors is at most 1, too, and
        a multiple of 2**-52. `low` is what is left, at most 2**-27 * sqrt(D) in norm, on a grid
        that leaves 53 bits to the sums of `high * low` and of `low * low` in the same way.
        """
        high = self.rows(index).vectors
        scale = self.scales[self.where(index), None]
        low = high.clone()
        low -= _round_to(high, scale * 2.0**-26)
        bits = 52 - math.ceil(math.log2(high.shape[1]) / 2)
        return high, _round_to(low, scale * 2.0**-bits)

    def picked(self, index: slice | IntArray) -> Tensor:
        """Some vectors (n, D) as they were given, in float32 or a type that fits into it."""
        if isinstance(index, slice):
            picked = self.features[index]
        elif len(index) and index[-1] - index[0] + 1 == len(index) and (np.diff(index) == 1).all():
            # No copy of what lies side by side: `kept` is most often everything.
            picked = self.features[int(index[0]) : int(index[-1]) + 1]
        else:
            picked = self.features[torch.from_numpy(index)]
        narrow = picked.dtype in (torch.float16, torch.bfloat16)
        return picked.to(self.device, picked.dtype if narrow else torch.float32)

    def raw(self, index: slice | IntArray) -> Tensor:
        """Some vectors (n, D) as they were given, in float64."""
        return self.picked(index).to(torch.float64)

    def float64(self, index: IntArray) -> FloatArray:
        """As `raw`, in memory of the CPU."""
        if self._array is not None:  # numpy picks single rows faster than torch
            return self._array[index].astype(np.float64)
        return np.asarray(self.raw(index).cpu().numpy())

    def where(self, index: slice | IntArray) -> slice | Tensor:
        """An index for `norms` and the like."""
        return index if isinstance(index, slice) else torch.from_numpy(index).to(self.device)

    def _squared_norms(self) -> Tensor:
        """Sums of squares (n,) that depend on nothing but the vector: they are added up by halving.

        Element-wise additions have a fixed order, which a reduction over a dimension has not.
        """
        count, width = self.features.shape
        pieces = spans(count, max(1, _HELD // width))
        held = torch.empty((pieces[0].stop, width), dtype=torch.float64, device=self.device)
        out = torch.empty(count, dtype=torch.float64, device=self.device)
        for piece in pieces:
            values = held[: piece.stop - piece.start].copy_(self.picked(piece))
            values.mul_(values)
            width = values.shape[1]
            while width > 1:
                half = width // 2
                values[:, :half].add_(values[:, width - half : width])
                width -= half
            out[piece] = values[:, 0]
        return out

    def _check(self, name: str, paths: Sequence[str]) -> None:
        bad = ~torch.isfinite(self.norms)
        what, fix = "not finite", "check the model and its precision"
        if self.unit and not bool(bad.any()):
            bad = self.norms == 0
            what, fix = "zero, which has no cosine", "check the model, or use metric euclidean"
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            where = paths[first] if first < len(paths) else f"index {first}"
            count = f"{int(bad.sum())} of {len(self)}"
            raise DataError(f"{name} features: {count} are {what}, the first is {where}; {fix}")


class Distances:
    """Distances between two sets of features, in float64.

    Squared Euclidean, or 1 - cosine, which is computed as what it is: half the squared Euclidean
    distance of the vectors divided by their norms.

    Args:
        query: (Q, D) features.
        gallery: (G, D) features; the same object as `query` compares a set with itself.
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
        """An approximate distance and the exact one differ by less than this.

        A sum of D products is off by at most D * 2**-53 of the two norms' product; what the grids
        of `exact` leave out is at most D * 2**-50 of the norms' sum, squared. The rest is room.
        """
        reach = (self.query.longest + self.gallery.longest) ** 2
        return self.weight * reach * (self.dim + 8) * 2.0**-49

    # A query's scores rise with its distances, and are what float32 computes with the smallest
    # error: minus the cosine, or half of a squared distance less the query's own square, in units
    # of `scale` squared.

    @property
    def scale(self) -> float:
        """What vectors are divided by for their scores, so that none is longer than 1."""
        return max(self.query.longest, self.gallery.longest) or 1.0

    @property
    def score_slack(self) -> float:
        """A score and the one that follows from the exact distance differ by less than this.

        A sum of n float32 products in any order is off by at most n * 2**-24 of the two norms'
        product (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1), which
        is at most 1; adding up `_CHUNK` at a time makes n the longest way of an addend to the sum.
        8 of the 10 are what the vectors are off by, the rest is room; half squares are added for
        squared distances.
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
        """Gallery vectors (n, D) float32 for `scores`, with what is added to their scores."""
        vectors = self.gallery.fast(items, self.scale)
        if self.query.unit:
            return vectors, None
        squares = self.gallery.squares[self.gallery.where(items)]
        return vectors, (squares / (2 * self.scale**2)).to(torch.float32)

    def score_queries(self, queries: slice | IntArray) -> Tensor:
        """Query vectors (n, D) float32 for `scores`."""
        return self.query.fast(queries, self.scale, -1)

    def scores(self, queries: Tensor, items: tuple[Tensor, Tensor | None], out: Tensor) -> Tensor:
        """Scores (n, m) float32 within `score_slack`, written to `out`; in `full_float32` only."""
        vectors, added = items
        first, *rest = (slice(k, k + _CHUNK) for k in range(0, self.dim, _CHUNK))
        for some in spans(len(vectors), _COLUMNS if out.device.type == "cpu" else len(vectors)):
            torch.mm(queries[:, first], vectors[some, first].T, out=out[:, some])
            for part in rest:
                out[:, some].addmm_(queries[:, part], vectors[some, part].T)
        return out if added is None else out.add_(added)

    def approximate(self, queries: Rows, items: Rows) -> Tensor:
        """Distances (n, m) within `slack`, as fast as may be."""
        sums = queries.squares[:, None] + items.squares
        weight = self.weight
        return sums.addmm_(queries.vectors, items.vectors.T, beta=weight, alpha=-2 * weight)

    def exact(self, queries: slice | IntArray, items: slice | IntArray) -> Tensor:
        """Distances (n, m) that depend on their two vectors alone; equal vectors are at 0."""
        high, low = self.query.split(queries)
        item_high, item_low = self.gallery.split(items)
        mixed = (high @ item_low.T).addmm_(low, item_high.T)
        mixed = (high * low).sum(dim=1)[:, None] + (item_high * item_low).sum(dim=1) - mixed
        out = _apart(high, item_high) + _apart(low, item_low) + 2 * mixed
        return out.clamp_(min=0).mul_(self.weight)

    def exact_pairs(
        self, queries: IntArray, items: IntArray, width: int, group: int = _GROUP
    ) -> FloatArray:
        """Exact distances of single pairs, (M,).

        Args:
            queries: (M,) rows of the query side, equal ones side by side.
            items: (M,) rows of the gallery side.
            width: How many gallery vectors to hold at a time.
            group: How many queries to take together, with all items that any of them wants.
        """

        def measure(queries: IntArray, items: IntArray) -> FloatArray:
            return np.asarray(self.exact(queries, items).cpu().numpy())

        return self._in_blocks(queries, items, width, group, measure)

    def near_pairs(
        self, queries: IntArray, items: IntArray, width: int, group: int = _GROUP
    ) -> FloatArray:
        """As `exact_pairs`, within `slack`: for pairs of which many share their items."""

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
        """Distances of single pairs, (M,) float64, within `slack`, on any number of threads.

        Args:
            queries: (M,) rows of the query side, equal ones side by side.
            items: (M,) rows of the gallery side.
        """
        most = max(1, _CACHED // self.dim)
        bounds = np.flatnonzero(np.diff(queries, prepend=-1, append=-1))
        cuts = [*range(0, len(queries), most)]
        runs = [slice(*ends) for ends in pairwise(np.unique([*bounds, *cuts]).tolist())]
        products = np.empty(len(queries))

        def multiply(some: slice) -> None:
            for run in runs[some]:
                query = self.query.float64(queries[run.start : run.start + 1])[0]
                # einsum adds up in one order, whatever else runs.
                products[run] = np.einsum("kd,d->k", self.gallery.float64(items[run]), query)

        in_threads(multiply, spans(len(runs), 256))
        return self._of_products(products, queries, items)

    def listed(self, queries: IntArray, items: IntArray) -> FloatArray:
        """As `pairs`: distances (n, m) of queries (n,) to their items (n, m)."""
        pairs = np.repeat(queries, items.shape[1]), items.reshape(-1)
        return self.pairs(*pairs).reshape(items.shape)

    def _of_products(self, products: FloatArray, queries: IntArray, items: IntArray) -> FloatArray:
        """Distances (M,) of pairs from products of their vectors as they were given."""
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
            queries: Rows of the query side.
            width: How many gallery vectors to hold at a time.
            exact: Exact distances, or approximate ones.
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


def in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """What a function gives for each item; numpy lets as many of them run as torch has threads."""
    threads = min(torch.get_num_threads(), len(items))
    if threads < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def spans(count: int, size: int) -> list[slice]:
    """The slices that cut `count` rows into pieces of `size`."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def even_spans(count: int, most: int) -> list[slice]:
    """The fewest slices of at most `most` rows, all of a size but for the last.

    The size is a multiple of 64 if `most` is.
    """
    parts = max(1, -(-count // most))
    size = -(-count // parts)
    return spans(count, max(1, min(-(-size // 64) * 64, most)))


def _aligned(size: int) -> int:
    """The largest multiple of 64 that is no larger, or the size itself where there is none.

    Products of matrices take up to twice as long where rows begin anywhere in memory.
    """
    return max(1, size // 64 * 64 or size)


def _matrix(name: str, features: Features) -> Tensor:
    """The features as a 2-D tensor without gradient, copied only where torch cannot share them."""
    if not isinstance(features, Tensor):
        array = np.asarray(features)
        if array.dtype.kind not in "fiu":
            raise DataError(f"{name} features: real numbers are needed, not {array.dtype}")
        if not array.dtype.isnative or array.dtype.itemsize > 8:  # torch knows neither
            array = array.astype(np.float32)
        shared = array.flags.writeable and all(stride >= 0 for stride in array.strides)
        features = torch.from_numpy(array if shared else array.copy())
    if features.ndim != 2 or 0 in features.shape:
        shape = tuple(features.shape)
        raise DataError(f"{name} features: rows of vectors are needed, the shape is {shape}")
    if features.is_complex() or features.dtype == torch.bool:
        raise DataError(f"{name} features: real numbers are needed, not {features.dtype}")
    return features.detach()


def _round_to(values: Tensor, unit: Tensor) -> Tensor:
    """Round in place to multiples of a power of two: float64 has no finer steps near the shift."""
    shift = unit * (1.5 * 2.0**52)
    return values.add_(shift).sub_(shift)


def _apart(left: Tensor, right: Tensor) -> Tensor:
    """Squared Euclidean distances of vectors whose products are sums without rounding."""
    squares = (left * left).sum(dim=1)[:, None] + (right * right).sum(dim=1)
    return squares.sub_(left @ right.T, alpha=2)
