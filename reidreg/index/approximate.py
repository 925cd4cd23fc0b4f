"""Approximate indexes: faiss finds candidates without comparing a query with every item.

Candidates of every type are ordered by exact distances (`reidreg.retrieval.index_search`): a
neighbour may be missed, but none has a wrong place or score.

| type | how it finds candidates | in memory, per item of D numbers | 1 M x 512 |
|---|---|---|---|
| flat | compares with every item: exact | 4 D bytes | 2.0 GiB |
| ivf | cells of near items in half precision; the nearest are searched | 2 D + 8 | 1.0 GiB |
| hnsw | a graph of near neighbours (Malkov and Yashunin, 2018) | 4 D + 272 | 2.2 GiB |
| pq | cells of product codes (Jegou et al., 2011) of at most 64 bytes | 72 | 0.07 GiB |

The features, 4 D bytes an item, stay on disk memory-mapped; a search reads those of its candidates.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from reidreg.retrieval.arrays import IntArray
from reidreg.retrieval.blocks import spans
from reidreg.retrieval.index_search import SPARE, Float32Array, Mask, Space, Vectors, select
from reidreg.retrieval.options import check_choice

TYPES = ("flat", "ivf", "hnsw", "pq")
FLAT_BYTES = 2 * 2**30  # up to this size, comparing with every item takes a fraction of a second
IVF_BYTES = 32 * 2**30  # up to this size, half of it fits the memory of an ordinary server
_MIN_PER_CENTROID = 39  # training items per centroid; with fewer, faiss warns
_TRAINED_PER_CENTROID = 64  # more items slow down training and give no better cells
_CODE_VALUES = 16  # of a code of 4 bits
_MAX_CODES = 128  # codes of an item
_PCA_DIM = 256  # principal components that are kept for product codes
_HNSW_LINKS = 32  # neighbours of an item in the graph; twice as many in its bottom layer

# With fewer items an index cannot be trained; a flat one is fast enough for them.
MIN_ITEMS = {
    "flat": 1,
    "ivf": _MIN_PER_CENTROID * 16,
    "hnsw": 2,
    "pq": _MIN_PER_CENTROID * _CODE_VALUES,
}

Candidates = Any  # a faiss index
Settings = dict[str, int]  # search parameters of a faiss index, by name
Progress = Callable[[int, int], None]  # called with the items indexed and their total


def choose_type(wanted: str, count: int, dim: int, recall: float) -> str:
    """The type of index for a gallery.

    `auto` is flat up to 2 GiB of float32 (1 million items of 512 numbers), and of any size for a
    recall of 1; ivf up to 32 GiB (16 million of 512), of which it holds half in memory; pq above.
    It never chooses hnsw, which searches fastest but is built slowly, in one thread. With too few
    items to train the wanted type (fewer than 624), the index is flat.

    Args:
        wanted: `auto` or a type.
        count: Items.
        dim: The length of a feature.
        recall: The wanted recall, 0..1.

    Raises:
        ConfigError: The type is unknown.
    """
    check_choice("type", wanted, ("auto", *TYPES))
    size = 4 * count * dim
    if wanted == "auto":
        wanted = "ivf" if size <= IVF_BYTES else "pq"
        if recall >= 1 or size <= FLAT_BYTES:
            wanted = "flat"
    return wanted if count >= MIN_ITEMS[wanted] else "flat"


def build_candidates(
    index_type: str, vectors: Vectors, space: Space, progress: Progress | None = None
) -> Candidates:
    """A faiss index of the items, trained on a sample of them; the same for the same items.

    Args:
        index_type: `ivf`, `hnsw` or `pq`.
        vectors: The items.
        space: How they are compared.
        progress: Called with the number of items indexed and their total.
    """
    import faiss

    count, dim = len(vectors), vectors.dim
    index = faiss.index_factory(dim, _factory_string(index_type, count, dim), faiss.METRIC_L2)
    if not index.is_trained:
        rows = _training_rows(count)
        sample = vectors.take(rows)
        index.train(space.float32(space.side("gallery", sample), slice(None)))
    add_candidates(index, vectors, space, progress)
    return index


def add_candidates(
    index: Candidates, vectors: Vectors, space: Space, progress: Progress | None = None
) -> None:
    """Append items to a trained index."""
    done = 0
    with _one_thread() if _is_graph(index) else contextlib.nullcontext():
        for _, block in vectors.blocks(4096):
            side = space.side("gallery", block)
            index.add(space.float32(side, slice(None)))
            done += len(block)
            if progress is not None:
                progress(done, len(vectors))


def _factory_string(index_type: str, count: int, dim: int) -> str:
    """The description of an index for `faiss.index_factory`."""
    if index_type == "hnsw":
        return f"HNSW{_HNSW_LINKS},Flat"
    if index_type == "ivf":
        return f"IVF{_cells(count)},SQfp16"
    codes = max(1, min(_MAX_CODES, dim // 2))
    reduced = min(dim, _PCA_DIM) // codes * codes
    # PCA with a rotation that spreads the variance evenly over the codes; codes of the residuals
    # have 4 bits, so that faiss compares them in SIMD registers.
    return f"PCAR{reduced},IVF{_cells(count)},PQ{codes}x4fsr"


def _cells(count: int) -> int:
    """The number of cells: 4 sqrt(N), or as many as there are items to train."""
    return max(1, min(4 * math.isqrt(count), count // _MIN_PER_CENTROID))


def _training_rows(count: int) -> IntArray:
    """The items that an index is trained on, ascending."""
    wanted = max(_TRAINED_PER_CENTROID * _cells(count), 2**14)
    if wanted >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, wanted, replace=False))


def _is_graph(index: Candidates) -> bool:
    return hasattr(index, "hnsw")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Have faiss use one thread: with several, their order would change the graph."""
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


# --------------------------------------------------------------------- searching


def search_settings(index: Candidates) -> list[Settings]:
    """Settings of a search, from the fastest to the most thorough.

    Args:
        index: From `build_candidates`.
    """
    import faiss

    if _is_graph(index):
        return [{"efSearch": width} for width in _steps(16, 8192)]
    cells = faiss.extract_index_ivf(index).nlist
    if not isinstance(index, faiss.IndexPreTransform):
        return [{"nprobe": nprobe} for nprobe in _steps(1, cells)]
    # Codes are coarse: the more cells are searched, the more candidates need exact distances.
    return [
        {"nprobe": nprobe, "refine": min(128, 4 * math.isqrt(nprobe))}
        for nprobe in _steps(1, cells)
    ]


def _steps(first: int, last: int) -> list[int]:
    """Integers from the first to the last, each about sqrt(2) times the one before."""
    count = math.ceil(2 * math.log2(last / first))
    return sorted({round(first * 2 ** (step / 2)) for step in range(count)} | {last})


def find_candidates(
    index: Candidates,
    queries: Float32Array,
    k: int,
    settings: Settings,
    allowed: Mask | None = None,
) -> IntArray:
    """Candidates for the nearest items of each query.

    Args:
        index: From `build_candidates`.
        queries: (Q, D), from `Space.float32`.
        k: The number of neighbours wanted.
        settings: From `search_settings`.
        allowed: (N,) the items that may be found, or None for all.

    Returns:
        Item numbers (Q, C) with C > k where there are enough items, -1 where fewer are found.
    """
    fetch = min(max(k + SPARE, k * settings.get("refine", 1)), index.ntotal)
    params = _parameters(index, settings, fetch, select(allowed))
    found = [
        index.search(queries[span], fetch, params=params)[1] for span in spans(len(queries), 1024)
    ]
    return np.concatenate(found)


def _parameters(index: Candidates, settings: Settings, fetch: int, selector: Any) -> Any:
    import faiss

    if _is_graph(index):
        return faiss.SearchParametersHNSW(efSearch=max(settings["efSearch"], fetch), sel=selector)
    # Before version 1.13, faiss sized the tables of product codes by this value, and crashed.
    faiss.extract_index_ivf(index).nprobe = settings["nprobe"]
    cells = faiss.SearchParametersIVF(nprobe=settings["nprobe"], sel=selector)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=cells)
    return cells
