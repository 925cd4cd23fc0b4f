"""How the work is cut up: blocks that fit a memory budget, and threads that share them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch

from reidreg.retrieval.options import check_at_least

Progress: TypeAlias = Callable[[int, int], None]  # called with the steps done and of all

T = TypeVar("T")
R = TypeVar("R")

_MOST_QUERIES = 2**11  # so that keys of 64 bits have room for a query's number


@dataclass(frozen=True, slots=True)
class MemoryPlan:
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
    def of(cls, budget_mib: float, dim: int, queries: int) -> MemoryPlan:
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


def in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """What a function gives for each item; numpy lets as many of them run as torch has threads."""
    threads = min(torch.get_num_threads(), len(items))
    if threads < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))
