"""Query x gallery -> a histogram of the distances of genuine and of impostor pairs.

Verification asks whether two images show the same person: a pair of one pid is genuine, the
positive class; a pair of two pids is an impostor. Distances are computed in float32 tile by tile,
and each is counted in one of `CELLS` cells; no pair is kept. The figures depend on the cells alone,
so two distances in one cell are a tie.

Cells are truncated float32 numbers: the 16 octaves below the largest distance that the longest
vectors allow, in 2**16 steps each. So the relative resolution is 2**-16, and distances below 2**-16
of the largest, such as those of equal vectors, share one cell. Round numbers such as 0.5 lie in the
middle of a cell. Rounding may move a pair next to an edge to the neighbouring cell, no further.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reidreg.retrieval.arrays import FloatArray, IntArray
from reidreg.retrieval.blocks import Progress, spans
from reidreg.retrieval.distances import Distances, full_float32
from reidreg.retrieval.matching import MatchLabels, labels_of_sides, same_pid
from reidreg.retrieval.options import check_at_least
from reidreg.values import JUNK, Embeddings

_OCTAVES, _STEP_BITS = 16, 16
_SHIFT = 23 - _STEP_BITS  # float32 has 23 fraction bits
_MOST = 4.0  # the squared distance of opposite vectors of length 1
_LEAST = _MOST * 2.0**-_OCTAVES
CELLS = _OCTAVES * 2**_STEP_BITS + 1


@dataclass(frozen=True, slots=True)
class PairCounts:
    """Numbers of pairs by distance, in cells; a larger cell is a larger distance.

    Args:
        cells: (C,) int64 ascending, the cells that hold a pair.
        genuine: (C,) int64, the number of pairs of the same pid.
        impostor: (C,) int64, the number of pairs of different pids.
        queries: (K,) the queries that were compared: all except junk.
        nearest_mate: (K,) the cell of each query's nearest genuine pair, CELLS if it has none.
        nearest_impostor: (K,) the cell of its nearest impostor pair, CELLS if it has none.
        metric: `cosine` or `euclidean`.
        scale: The divisor of the vectors; 1 for cosine.
    """

    cells: IntArray
    genuine: IntArray
    impostor: IntArray
    queries: IntArray
    nearest_mate: IntArray
    nearest_impostor: IntArray
    metric: str
    scale: float

    def threshold(self, refused: int) -> float:
        """The loosest threshold that refuses the cell `refused` and all larger ones.

        A pair is accepted if its cosine is at least the threshold or, for the metric euclidean, if
        its squared distance is at most the threshold.
        """
        edge = _bits(np.array([refused])) - (1 << _SHIFT - 1)
        return float(self._scores(_values(edge) if refused else np.array([-_LEAST]))[0])

    def scores(self) -> FloatArray:
        """(C,) The cosine or squared distance in the middle of each of `cells`."""
        return self._scores(np.where(self.cells > 0, _values(_bits(self.cells)), 0.0))

    def _scores(self, distances: FloatArray) -> FloatArray:
        return 1 - distances / 2 if self.metric == "cosine" else distances * self.scale**2


def _bits(cells: IntArray) -> IntArray:
    return (cells << _SHIFT) + int(np.float32(_LEAST).view(np.int32))


def _values(bits: IntArray) -> FloatArray:
    return bits.astype(np.int32).view(np.float32).astype(np.float64)


def _cells(distances: Tensor) -> Tensor:
    """The cells of float32 distances, computed in place as int32; CELLS for infinity."""
    first = int(_bits(np.zeros(1, dtype=np.int64))[0])
    bits = distances.clamp_(min=_LEAST).view(torch.int32)
    return bits.sub_(first - (1 << _SHIFT - 1)).bitwise_right_shift_(_SHIFT).clamp_(max=CELLS)


def count_pairs(
    query: Embeddings,
    gallery: Embeddings,
    *,
    metric: str = "cosine",
    same_camera: str = "drop",
    budget_mib: float = 256,
    progress: Progress | None = None,
) -> PairCounts:
    """Count genuine and impostor pairs by their distance.

    Junk on either side is left out and, unless `same_camera` is `keep`, pairs of the same pid and
    camera.

    Args:
        query: Q embeddings, on the CPU or a GPU.
        gallery: G embeddings; if either side is on a GPU, the GPU does the work.
        metric: `cosine` or `euclidean` (squared).
        same_camera: `drop` or `keep`.
        budget_mib: Memory to use in addition to the features, in MiB; the counts take about 40.
        progress: Called with the number of tiles done and of all.

    Raises:
        DataError: Shapes do not match, or a feature is not finite.
        ConfigError: An option is wrong.
    """
    labels = labels_of_sides(query, gallery, same_camera)
    distances = Distances(query.features, gallery.features, metric, (query.paths, gallery.paths))
    count = _PairCounter(distances, labels)
    rows, columns = _tiles(budget_mib, distances.dim)
    pieces, blocks = spans(len(labels.kept), columns), spans(len(count.queries), rows)
    with full_float32():
        for done, piece in enumerate(pieces):
            items = count.items(piece)
            for nth, block in enumerate(blocks):
                count.add(block, piece, items)
                if progress:
                    progress(done * len(blocks) + nth + 1, len(pieces) * len(blocks))
    genuine, impostor = (counts[:CELLS].cpu().numpy() for counts in (count.genuine, count.impostor))
    cells = np.flatnonzero(genuine | impostor)
    return PairCounts(
        cells=cells,
        genuine=genuine[cells],
        impostor=impostor[cells],
        queries=count.queries,
        nearest_mate=_nearest(count.nearest_mate),
        nearest_impostor=_nearest(count.nearest_impostor),
        metric=metric,
        scale=distances.scale,
    )


def _tiles(budget_mib: float, dim: int) -> tuple[int, int]:
    """The numbers of queries and gallery items to compare at a time."""
    check_at_least("budget_mib", budget_mib, 1)
    budget = int(budget_mib * 2**20)
    # 12 bytes per value: it is held as given, up to float64, and in float32. 16 bytes per distance:
    # pairs of one pid are held with their indices.
    columns = max(1, min(budget // 4 // (dim * 12), 2**14))
    return max(1, min(budget // 8 // (dim * 12), budget // 4 // (columns * 16))), columns


def _nearest(distances: Tensor) -> IntArray:
    return _cells(distances.clone()).cpu().numpy().astype(np.int64)


class _PairCounter:
    """The pairs counted so far.

    Args:
        distances: Both sides.
        labels: Their labels.
    """

    def __init__(self, distances: Distances, labels: MatchLabels) -> None:
        self.distances, self.labels, self.kept = distances, labels, labels.kept
        self.queries = np.flatnonzero(labels.query_pids != JUNK)
        self.genuine = torch.zeros(CELLS + 1, dtype=torch.int64, device=distances.device)
        self.impostor = torch.zeros_like(self.genuine)
        self.nearest_mate = torch.full((len(self.queries),), torch.inf, device=distances.device)
        self.nearest_impostor = self.nearest_mate.clone()

    def items(self, piece: slice) -> tuple[Tensor, Tensor]:
        """The gallery vectors (n, D) of a piece, and their squared norms (n,)."""
        side, index = self.distances.gallery, self.kept[piece]
        return self._vectors(side.fast(index, self.distances.scale))

    def add(self, block: slice, piece: slice, items: tuple[Tensor, Tensor]) -> None:
        """Count the tile of a block of queries and a piece of the kept items."""
        side, queries = self.distances.query, self.queries[block]
        vectors, squares = self._vectors(side.fast(queries, self.distances.scale))
        sums = squares[:, None] + items[1]
        tile = sums.addmm_(vectors, items[0].T, alpha=-2)
        self._take_same_pid(tile, block, self.kept[piece])
        nearest = self.nearest_impostor[block]
        torch.minimum(nearest, tile.amin(dim=1), out=nearest)
        _add_to(self.impostor, _cells(tile.flatten()))

    def _take_same_pid(self, tile: Tensor, block: slice, items: IntArray) -> None:
        """Count the genuine pairs of a tile and set all pairs of one pid to infinity."""
        labels, queries = self.labels, self.queries[block]
        row, column = same_pid(labels.query_pids[queries], labels.gallery_pids[items])
        other = labels.query_pid_cam_ids[queries[row]] != labels.gallery_pid_cam_ids[items[column]]
        rows, columns, mates = (
            torch.from_numpy(values).to(tile.device)
            for values in (row, column, other | (not labels.drop))
        )
        values = tile[rows, columns][mates]
        tile[rows, columns] = torch.inf
        self.nearest_mate[block].scatter_reduce_(0, rows[mates], values, "amin")
        _add_to(self.genuine, _cells(values))

    def _vectors(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        unit = self.distances.query.unit
        squares = vectors.new_ones(len(vectors)) if unit else vectors.square().sum(dim=1)
        return vectors, squares


def _add_to(counts: Tensor, cells: Tensor) -> None:
    if len(cells) > CELLS // 8:
        counts += torch.bincount(cells, minlength=len(counts))
    else:  # faster than a table of all cells
        counts.index_add_(0, cells, torch.ones_like(cells, dtype=counts.dtype))


def histogram(counts: PairCounts, bins: int = 100) -> dict[str, list[float] | list[int]]:
    """A histogram of both kinds of pair over the range of their scores, for a plot.

    Args:
        counts: The pairs.
        bins: The number of bins, of equal width.

    Returns:
        `edges` (bins + 1), ascending, in the unit of thresholds; `genuine` and `impostor` (bins),
        numbers of pairs.
    """
    scores = counts.scores()
    edges = np.histogram_bin_edges(scores, bins)

    def binned(pairs: IntArray) -> list[int]:
        found, _ = np.histogram(scores, edges, weights=pairs.astype(np.float64))
        return [int(count) for count in found]

    return {
        "edges": edges.tolist(),
        "genuine": binned(counts.genuine),
        "impostor": binned(counts.impostor),
    }
