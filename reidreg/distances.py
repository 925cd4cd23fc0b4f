"""Distances between vectors that are the same whatever else is computed beside them.

A distance must be a function of its two vectors alone; but a matrix product adds up in an order
that depends on the tile's shape, the number of threads and the device, so that two equal vectors
may come out one unit in the last place apart. Hence two ways to a distance, both in float64:

- `Distances.approximate` is a plain matrix product, with a bound on its error. Where two items are
  further apart than the bound (nearly always), their order is certain.
- `Distances.exact` settles the rest. It writes each vector as `high + low` on two grids so coarse
  that every product, and every partial sum of products in whatever order, is a whole multiple of
  the grid's unit and fits the 53 bits of a float64. A sum without rounding has no order: the
  outcome is the same bits on every tile, thread count and device, and equal vectors tie.

A faster kernel, of lower precision, may replace `approximate` if it states its bound: the figures
cannot change, only the number of pairs that must be settled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reidreg.errors import ConfigError, DataError, did_you_mean

Features: TypeAlias = Tensor | NDArray[Any]
IntArray: TypeAlias = NDArray[np.int64]
FloatArray: TypeAlias = NDArray[np.float64]

METRICS = ("cosine", "euclidean")

_GROUP = 64  # queries whose matches are measured together


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


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is held at a time, so that the budget is kept.

    Args:
        queries: Query vectors.
        gallery: Gallery vectors.
        strip: Distances whose places among the matches are looked up at once.
    """

    queries: int
    gallery: int
    strip: int

    @classmethod
    def of(cls, budget_mib: float, dim: int) -> Plan:
        check_at_least("budget_mib", budget_mib, 1)
        budget = int(budget_mib * 2**20)
        side = math.isqrt(budget // 64)  # a tile of distances takes an eighth
        return cls(
            queries=max(1, min(side, budget // 8 // (dim * 16))),
            gallery=max(1, min(side, budget // 2 // (dim * 40))),
            strip=budget // 4 // 128,
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
        self.unit = metric == "cosine"
        pieces = spans(len(self.features), 1024)
        self.norms = torch.cat([_norms(self._raw(piece)) for piece in pieces])
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
        raw, where = self._raw(index), self._where(index)
        vectors = raw.div_(self.norms[where, None]) if self.unit else raw
        return Rows(vectors, self.squares[where])

    def split(self, index: slice | IntArray) -> tuple[Tensor, Tensor]:
        """Some vectors as `high + low`, for products without rounding.

        In units of the vector's scale, `high` is a multiple of 2**-26 and its norm is at most 1.
        By Cauchy and Schwarz any partial sum of products of two such vectors is at most 1, too, and
        a multiple of 2**-52. `low` is what is left, at most 2**-27 * sqrt(D) in norm, on a grid
        that leaves 53 bits to the sums of `high * low` and of `low * low` in the same way.
        """
        high = self.rows(index).vectors
        scale = self.scales[self._where(index), None]
        low = high.clone()
        low -= _round_to(high, scale * 2.0**-26)
        bits = 52 - math.ceil(math.log2(high.shape[1]) / 2)
        return high, _round_to(low, scale * 2.0**-bits)

    def _raw(self, index: slice | IntArray) -> Tensor:
        picked = self.features[index if isinstance(index, slice) else torch.from_numpy(index)]
        # Features are float32; float16 and bfloat16 fit into it, wider ones are brought to it.
        return picked.to(self.device).to(torch.float32).to(torch.float64)

    def _where(self, index: slice | IntArray) -> slice | Tensor:
        return index if isinstance(index, slice) else torch.from_numpy(index).to(self.device)

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
    ) -> Tensor:
        """Exact distances of single pairs, (M,).

        Args:
            queries: (M,) rows of the query side, equal ones side by side.
            items: (M,) rows of the gallery side.
            width: How many gallery vectors to hold at a time.
            group: How many queries to take together, with all items that any of them wants.
        """
        out = torch.empty(len(queries), dtype=torch.float64, device=self.device)
        starts = np.flatnonzero(np.diff(queries, prepend=-1))[::group]
        bounds = [*starts.tolist(), len(queries)]
        for start, stop in pairwise(bounds):
            rows, row = np.unique(queries[start:stop], return_inverse=True)
            columns, column = np.unique(items[start:stop], return_inverse=True)
            for span in spans(len(columns), width):
                here = np.flatnonzero((column >= span.start) & (column < span.stop))
                block = self.exact(rows, columns[span])
                index = self._index(row[here] * block.shape[1] + column[here] - span.start)
                out[self._index(here + start)] = block.flatten()[index]
        return out

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

    def _index(self, index: IntArray) -> Tensor:
        return torch.from_numpy(index).to(self.device)


def spans(count: int, size: int) -> list[slice]:
    """The slices that cut `count` rows into pieces of `size`."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _matrix(name: str, features: Features) -> Tensor:
    """The features as a 2-D tensor without gradient, copied only where torch cannot share them."""
    if not isinstance(features, Tensor):
        array = np.asarray(features)
        shared = array.flags.writeable and all(stride >= 0 for stride in array.strides)
        features = torch.from_numpy(array if shared else array.copy())
    if features.ndim != 2 or 0 in features.shape:
        shape = tuple(features.shape)
        raise DataError(f"{name} features: rows of vectors are needed, the shape is {shape}")
    if features.is_complex() or features.dtype == torch.bool:
        raise DataError(f"{name} features: real numbers are needed, not {features.dtype}")
    return features.detach()


def _norms(vectors: Tensor) -> Tensor:
    """Norms that depend on nothing but the vector: the squares are added up by halving.

    Element-wise additions have a fixed order, which a reduction over a dimension has not.
    """
    squares = vectors.square_()
    while squares.shape[1] > 1:
        half = squares.shape[1] // 2
        rest = squares[:, 2 * half :]
        squares = torch.cat([squares[:, :half] + squares[:, half : 2 * half], rest], dim=1)
    return squares[:, 0].sqrt()


def _round_to(values: Tensor, unit: Tensor) -> Tensor:
    """Round in place to multiples of a power of two: float64 has no finer steps near the shift."""
    shift = unit * (1.5 * 2.0**52)
    return values.add_(shift).sub_(shift)


def _apart(left: Tensor, right: Tensor) -> Tensor:
    """Squared Euclidean distances of vectors whose products are sums without rounding."""
    squares = (left * left).sum(dim=1)[:, None] + (right * right).sum(dim=1)
    return squares.sub_(left @ right.T, alpha=2)
