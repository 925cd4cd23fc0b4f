"""One side of a comparison: the query vectors or the gallery vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reidreg.errors import DataError
from reidreg.retrieval.arrays import FloatArray, IntArray
from reidreg.retrieval.blocks import spans

Features: TypeAlias = Tensor | NDArray[Any]

_HELD = 2**20  # float64 values at a time; with fewer, torch's threads mostly wait
_NEAR_ONE = 4 * 2.0**-24  # how far from 1 the norm of a unit vector in float32 may be
_TAME = 1e-25  # norms from this to its reciprocal are far from float32's limits


class Rows(NamedTuple):
    """Vectors (n, D) in float64 as they are compared, and their squared norms (n,)."""

    vectors: Tensor
    squares: Tensor


class Side:
    """The vectors of one side; any rows of them, in the form that a computation needs.

    Only requested rows are converted, so the features are never copied as a whole. Methods take a
    slice or an index array that selects n rows. For the cosine metric, vectors are divided by their
    norms.

    Args:
        name: `query` or `gallery`, for errors.
        features: (N, D).
        paths: N files, or none, for errors.
        metric: `cosine` or `euclidean`.
        device: Where to compute.

    Raises:
        DataError: The features are empty or not 2-D, a value is not finite, or, for the cosine
            metric, a vector is zero.
    """

    def __init__(
        self, name: str, features: Features, paths: Sequence[str], metric: str, device: torch.device
    ) -> None:
        self.features = _matrix(name, features)
        self.device = device
        shared = self.features.device.type == "cpu" and self.features.dtype == torch.float32
        self._array = self.features.numpy() if shared else None
        self.unit = metric == "cosine"
        # numpy's square root is correctly rounded; torch's is not always, and may depend on the
        # position in the tensor.
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
        """The selected vectors in float64, as they are compared."""
        raw, where = self.raw(index), self.where(index)
        vectors = raw.div_(self.norms[where, None]) if self.unit else raw
        return Rows(vectors, self.squares[where])

    def fast(self, index: slice | IntArray, scale: float, sign: int = 1) -> Tensor:
        """The selected vectors (n, D) in float32: of length 1 or, for Euclid, divided by `scale`.

        The relative error of each number is at most 4 * 2**-24.
        """
        raw, where = self.picked(index).to(torch.float32), self.where(index)
        divisors = self.norms[where] if self.unit else self.norms.new_full((len(raw),), scale)
        if float((divisors - 1).abs().max()) <= _NEAR_ONE:  # no copy if the sign is positive
            return raw if sign > 0 else -raw
        if not _TAME <= float(divisors.min()) <= float(divisors.max()) <= 1 / _TAME:
            # The reciprocal or a number may be outside of float32's range.
            return (raw.to(torch.float64) * sign / divisors[:, None]).to(torch.float32)
        return raw * (sign / divisors).to(torch.float32)[:, None]

    def split(self, index: slice | IntArray) -> tuple[Tensor, Tensor]:
        """The selected vectors as `high + low`, whose products are sums without rounding.

        In units of the vector's scale, `high` is a multiple of 2**-26 and its norm is at most 1.
        By Cauchy-Schwarz any partial sum of products of two such vectors is at most 1, too, and a
        multiple of 2**-52. `low` is the rest, at most 2**-27 * sqrt(D) in norm, on a grid for which
        the sums of `high * low` and of `low * low` fit 53 bits in the same way.
        """
        high = self.rows(index).vectors
        scale = self.scales[self.where(index), None]
        low = high.clone()
        low -= _round_to(high, scale * 2.0**-26)
        bits = 52 - math.ceil(math.log2(high.shape[1]) / 2)
        return high, _round_to(low, scale * 2.0**-bits)

    def picked(self, index: slice | IntArray) -> Tensor:
        """The selected features (n, D) as given, in float32, float16 or bfloat16."""
        if isinstance(index, slice):
            picked = self.features[index]
        elif len(index) and index[-1] - index[0] + 1 == len(index) and (np.diff(index) == 1).all():
            # A view if the rows are adjacent: usually all gallery items are kept.
            picked = self.features[int(index[0]) : int(index[-1]) + 1]
        else:
            picked = self.features[torch.from_numpy(index)]
        narrow = picked.dtype in (torch.float16, torch.bfloat16)
        return picked.to(self.device, picked.dtype if narrow else torch.float32)

    def raw(self, index: slice | IntArray) -> Tensor:
        """The selected features (n, D) as given, in float64."""
        return self.picked(index).to(torch.float64)

    def float64(self, index: IntArray) -> FloatArray:
        """As `raw`, as a numpy array."""
        if self._array is not None:  # numpy picks single rows faster than torch
            return self._array[index].astype(np.float64)
        return np.asarray(self.raw(index).cpu().numpy())

    def where(self, index: slice | IntArray) -> slice | Tensor:
        """The selection as an index of `norms`, `squares` and `scales`."""
        return index if isinstance(index, slice) else torch.from_numpy(index).to(self.device)

    def _squared_norms(self) -> Tensor:
        """(N,) Squared norms that depend on the vector alone, summed by repeated halving.

        Element-wise additions have a fixed order; a reduction over a dimension does not.
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


def _matrix(name: str, features: Features) -> Tensor:
    """The features as a 2-D tensor without gradient, copied only if torch cannot share them."""
    if not isinstance(features, Tensor):
        array = np.asarray(features)
        if array.dtype.kind not in "fiu":
            raise DataError(f"{name} features: real numbers are needed, not {array.dtype}")
        if not array.dtype.isnative or array.dtype.itemsize > 8:  # torch has neither
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
    """Round in place to multiples of a power of two, float64's step size at the shift."""
    shift = unit * (1.5 * 2.0**52)
    return values.add_(shift).sub_(shift)
