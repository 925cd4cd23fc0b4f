"""How work is divided: blocks that fit a memory budget, and threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch

from reidreg.retrieval.options import check_at_least

Progress: TypeAlias = Callable[[int, int], None]  # called with the steps done and their total

T = TypeVar("T")
R = TypeVar("R")

_MOST_QUERIES = 2**11  # a query's number then fits the sort keys of `reidreg.retrieval.counting`


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How many of each are held at a time to stay within a memory budget.

    Args:
        queries: Query vectors in float32.
        gallery: Gallery vectors in float32.
        exact: Gallery vectors prepared for exact distances.
        strip: Scores that are counted at a time.
    """

    queries: int
    gallery: int
    exact: int
    strip: int

    @classmethod
    def of(cls, budget_mib: float, dim: int, queries: int) -> MemoryPlan:
        """The plan for a budget in MiB, vectors of width `dim` and a number of queries."""
        check_at_least("budget_mib", budget_mib, 1)
        budget = int(budget_mib * 2**20)
        tile = budget // 64  # values of a sixteenth of it; square unless queries are few
        rows = max(1, min(queries, math.isqrt(tile), budget // 8 // (dim * 8), _MOST_QUERIES))
        return cls(
            queries=rows,
            gallery=_aligned(min(tile // rows, budget // 4 // (dim * 8), 2**16)),
            exact=max(1, budget // 4 // (dim * 40)),
            strip=min(budget // 8 // 64, 2**19),
        )


def spans(count: int, size: int) -> list[slice]:
    """Slices that cut `count` rows into pieces of `size`; the last may be smaller."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def even_spans(count: int, most: int) -> list[slice]:
    """The fewest slices of at most `most` rows, all of one size except the last.

    The size is a multiple of 64 if `most` is.
    """
    parts = max(1, -(-count // most))
    size = -(-count // parts)
    return spans(count, max(1, min(-(-size // 64) * 64, most)))


def _aligned(size: int) -> int:
    """The size rounded down to a multiple of 64; a size below 64 stays.

    Matrix products take up to twice as long if rows are not aligned.
    """
    return max(1, size // 64 * 64 or size)


def in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Map a function over items on as many threads as torch uses; numpy releases the GIL."""
    threads = min(torch.get_num_threads(), len(items))
    if threads < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))
