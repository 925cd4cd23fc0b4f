"""Approximate indexes: candidates without a look at every item, by faiss.

Whatever the type, its candidates are put in order by exact distances (`reidreg.nearest`), so that
approximate means that a neighbour may be missed, never that one is misplaced or its score is off.

| type | what it is | in memory, per item of D numbers | 1 M x 512 |
|---|---|---|---|
| flat | every item is compared: exact | 4 D bytes | 2.0 GiB |
| ivf | cells of near items in half precision; the nearest are searched | 2 D + 8 | 1.0 GiB |
| hnsw | a graph of near neighbours (Malkov and Yashunin, 2018) | 4 D + 272 | 2.2 GiB |
| pq | cells of product codes (Jegou et al., 2011) of 64 bytes at most | 72 | 0.07 GiB |

The items themselves, 4 D bytes each, stay on disk and are mapped; a search reads its candidates.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from reidreg.retrieval.distances import IntArray, check_choice, spans
from reidreg.retrieval.index_search import SPARE, Float32Array, Mask, Space, Vectors, select

TYPES = ("flat", "ivf", "hnsw", "pq")
FLAT_BYTES = 2 * 2**30  # up to here, comparing with everything takes a fraction of a second
IVF_BYTES = 32 * 2**30  # up to here, half of it fits an ordinary server's memory
_TRAINED_ON = 39  # items for each centroid, the fewest that faiss takes without a warning
_ENOUGH = 64  # items for each centroid; more make a slower training, but no better cells
_CODE_VALUES = 16  # of half a byte of a product code
_CODES = 128  # half bytes of an item, at most
_REDUCED = 256  # numbers that are left for product codes
_LINKS = 32  # neighbours of an item in the graph, twice as many at its bottom

# Fewer items do not train an index; they are few enough to compare with each.
FEWEST = {"flat": 1, "ivf": _TRAINED_ON * 16, "hnsw": 2, "pq": _TRAINED_ON * _CODE_VALUES}

Settings = dict[str, int]
Report = Callable[[int, int], None]


def choose_type(wanted: str, count: int, dim: int, recall: float) -> str:
    """The type of index for a gallery.

    `auto` is flat up to 2 GiB of float32 (1 million items of 512 numbers) and wherever a recall of
    1 is wanted; ivf up to 32 GiB (16 million of 512), of which it holds half in memory; pq beyond.
    It never takes hnsw, which answers fastest but is built in one thread, and slowly. Where there
    are too few items to train the type that is wanted (624), it is flat.

    Args:
        wanted: `auto` or a type.
        count: Items.
        dim: Numbers of each.
        recall: The recall that is wanted.

    Raises:
        ConfigError: The type is unknown.
    """
    check_choice("type", wanted, ("auto", *TYPES))
    size = 4 * count * dim
    if wanted == "auto":
        wanted = "ivf" if size <= IVF_BYTES else "pq"
        if recall >= 1 or size <= FLAT_BYTES:
            wanted = "flat"
    return wanted if count >= FEWEST[wanted] else "flat"


def build_candidates(index_type: str, vectors: Vectors, space: Space, report: Report) -> Any:
    """A faiss index of the items, trained on a sample of them; the same for the same items.

    Args:
        index_type: `ivf`, `hnsw` or `pq`.
        vectors: The items.
        space: How they are compared.
        report: Told how many items are in, and of how many.
    """
    import faiss

    count, dim = len(vectors), vectors.dim
    index = faiss.index_factory(dim, _recipe(index_type, count, dim), faiss.METRIC_L2)
    if not index.is_trained:
        rows = _training_rows(count)
        sample = vectors.take(rows)
        index.train(space.float32(space.side("gallery", sample), slice(None)))
    add_candidates(index, vectors, space, report)
    return index


def add_candidates(index: Any, vectors: Vectors, space: Space, report: Report) -> None:
    """Put further items into a trained index."""
    done = 0
    with _one_thread() if _is_graph(index) else contextlib.nullcontext():
        for _, block in vectors.blocks(4096):
            side = space.side("gallery", block)
            index.add(space.float32(side, slice(None)))
            done += len(block)
            report(done, len(vectors))


def _recipe(index_type: str, count: int, dim: int) -> str:
    """What faiss's index_factory is asked for."""
    if index_type == "hnsw":
        return f"HNSW{_LINKS},Flat"
    if index_type == "ivf":
        return f"IVF{_cells(count)},SQfp16"
    codes = max(1, min(_CODES, dim // 2))
    reduced = min(dim, _REDUCED) // codes * codes
    # The principal components, rotated so that each code has as much to say; codes of 4 bits, of
    # the residuals, are compared in registers.
    return f"PCAR{reduced},IVF{_cells(count)},PQ{codes}x4fsr"


def _cells(count: int) -> int:
    """4 sqrt(N), as long as there are items enough to train so many."""
    return max(1, min(4 * math.isqrt(count), count // _TRAINED_ON))


def _training_rows(count: int) -> IntArray:
    wanted = max(_ENOUGH * _cells(count), 2**14)
    if wanted >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, wanted, replace=False))


def _is_graph(index: Any) -> bool:
    return hasattr(index, "hnsw")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The order in which threads insert items would decide the graph."""
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


# --------------------------------------------------------------------- searching


def ladder(index: Any) -> list[Settings]:
    """Settings of a search, each slower and more thorough than the one before.

    Args:
        index: From `build_candidates`.
    """
    import faiss

    if _is_graph(index):
        return [{"efSearch": width} for width in _steps(16, 8192)]
    cells = faiss.extract_index_ivf(index).nlist
    if not isinstance(index, faiss.IndexPreTransform):
        return [{"nprobe": nprobe} for nprobe in _steps(1, cells)]
    # Codes are coarse: the more cells are searched, the more candidates are looked at exactly.
    return [
        {"nprobe": nprobe, "refine": min(128, 4 * math.isqrt(nprobe))}
        for nprobe in _steps(1, cells)
    ]


def _steps(first: int, last: int) -> list[int]:
    """Whole numbers from the first to the last, each about sqrt(2) times the one before."""
    count = math.ceil(2 * math.log2(last / first))
    return sorted({round(first * 2 ** (step / 2)) for step in range(count)} | {last})


def candidates(
    index: Any, queries: Float32Array, k: int, settings: Settings, allowed: Mask | None = None
) -> IntArray:
    """The items that an index holds for near, (Q, C) numbers, -1 where it finds fewer.

    Args:
        index: From `build_candidates`.
        queries: (Q, D) as `Space.float32` gives them.
        k: How many neighbours are wanted; C is larger.
        settings: From `ladder`.
        allowed: (N,) the items that may be found, or None for all.
    """
    fetch = min(max(k + SPARE, k * settings.get("refine", 1)), index.ntotal)
    params = _parameters(index, settings, fetch, select(allowed))
    found = [
        index.search(queries[span], fetch, params=params)[1] for span in spans(len(queries), 1024)
    ]
    return np.concatenate(found)


def _parameters(index: Any, settings: Settings, fetch: int, selector: Any) -> Any:
    import faiss

    if _is_graph(index):
        return faiss.SearchParametersHNSW(efSearch=max(settings["efSearch"], fetch), sel=selector)
    # Before 1.13 faiss sized the tables of product codes by the index's own value, and crashed.
    faiss.extract_index_ivf(index).nprobe = settings["nprobe"]
    cells = faiss.SearchParametersIVF(nprobe=settings["nprobe"], sel=selector)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=cells)
    return cells
