"""Query x gallery -> how many pairs are how far apart, without keeping any pair.

Verification asks whether two images show the same person: a pair of one pid is genuine, and
genuine pairs are the positive class; a pair of two pids is an impostor. The tiles of float32
distances pass by once, and each distance is counted in one of `CELLS` cells. All that follows
depends on the cells alone, so two distances in one cell are a tie.

The cells are float32 numbers cut short: 16 octaves below the largest distance that the longest
vectors allow, each in 2**16 steps. So distances are told apart to one part in 2**16 of themselves,
and those below 2**-16 of the largest count as one, which is where equal vectors end up. A cell's
middle, not its edge, is where round numbers such as 0.5 lie. Rounding may move a pair that is next
to an edge to the cell beside it, and no further.
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
_SHIFT = 23 - _STEP_BITS  # float32 has 23 bits behind the point
_MOST = 4.0  # the squared distance of opposite vectors of length 1
_LEAST = _MOST * 2.0**-_OCTAVES
CELLS = _OCTAVES * 2**_STEP_BITS + 1


@dataclass(frozen=True, slots=True)
class PairCounts:
    """The pairs of two sides by their distance, in cells; a larger cell is further apart.

    Args:
        cells: (C,) int64 ascending, the cells with a pair in them.
        genuine: (C,) int64, how many pairs of the same pid.
        impostor: (C,) int64, how many pairs of different pids.
        queries: (K,) the queries that were compared: all but junk.
        nearest_mate: (K,) the cell of each one's nearest genuine pair, CELLS where it has none.
        nearest_impostor: (K,) the cell of its nearest impostor pair, CELLS where it has none.
        metric: `cosine` or `euclidean`.
        scale: What vectors were divided by; 1 for the cosine.
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
        """The loosest score that accepts no pair of a cell: 0 refuses all, CELLS none.

        A pair is accepted if its cosine is at least this, or, for the metric euclidean, if its
        squared distance is at most this.
        """
        edge = _bits(np.array([refused])) - (1 << _SHIFT - 1)
        return float(self._scores(_values(edge) if refused else np.array([-_LEAST]))[0])

    def scores(self) -> FloatArray:
        """(C,) The cosine, or the squared distance, in the middle of each of `cells`."""
        return self._scores(np.where(self.cells > 0, _values(_bits(self.cells)), 0.0))

    def _scores(self, distances: FloatArray) -> FloatArray:
        return 1 - distances / 2 if self.metric == "cosine" else distances * self.scale**2


def _bits(cells: IntArray) -> IntArray:
    return (cells << _SHIFT) + int(np.float32(_LEAST).view(np.int32))


def _values(bits: IntArray) -> FloatArray:
    return bits.astype(np.int32).view(np.float32).astype(np.float64)


def _cells(distances: Tensor) -> Tensor:
    """The cells of float32 distances, int32 in their place; CELLS for infinity."""
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
    """Count the genuine and the impostor pairs of two sides by their distance.

    What the protocol leaves out is left out: junk on either side, whose pid is not known, and,
    unless `same_camera` is `keep`, pairs of the same pid and the same camera.

    Args:
        query: Q embeddings, on the CPU or a GPU.
        gallery: G embeddings; where either side is on a GPU, the work is done there.
        metric: `cosine` or `euclidean` (squared).
        same_camera: `drop` or `keep`.
        budget_mib: Memory to use beside the features, in MiB; the counts alone take about 40.
        progress: Called with the number of tiles done and of all.

    Raises:
        DataError: The features or labels do not fit together, or are not finite.
        ConfigError: An option is wrong.
    """
    labels = labels_of_sides(query, gallery, same_camera)
    distances = Distances(query.features, gallery.features, metric, (query.paths, gallery.paths))
    count = _Count(distances, labels)
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
    """How many queries and gallery items to compare at a time."""
    check_at_least("budget_mib", budget_mib, 1)
    budget = int(budget_mib * 2**20)
    # A vector is held as it came and in float32; beside a distance there may be its place, which
    # is kept for pairs of one pid.
    columns = max(1, min(budget // 4 // (dim * 12), 2**14))
    return max(1, min(budget // 8 // (dim * 12), budget // 4 // (columns * 16))), columns


def _nearest(distances: Tensor) -> IntArray:
    return _cells(distances.clone()).cpu().numpy().astype(np.int64)


class _Count:
    """What is known of the pairs that have passed by.

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
        """Some gallery vectors (n, D) and their squares (n,)."""
        side, index = self.distances.gallery, self.kept[piece]
        return self._vectors(side.fast(index, self.distances.scale))

    def add(self, block: slice, piece: slice, items: tuple[Tensor, Tensor]) -> None:
        """Count a tile: some of the compared queries against some of the kept items."""
        side, queries = self.distances.query, self.queries[block]
        vectors, squares = self._vectors(side.fast(queries, self.distances.scale))
        sums = squares[:, None] + items[1]
        tile = sums.addmm_(vectors, items[0].T, alpha=-2)
        self._take_own(tile, block, self.kept[piece])
        nearest = self.nearest_impostor[block]
        torch.minimum(nearest, tile.amin(dim=1), out=nearest)
        _add_to(self.impostor, _cells(tile.flatten()))

    def _take_own(self, tile: Tensor, block: slice, items: IntArray) -> None:
        """Count the genuine pairs of a tile, and leave infinity where the pids are the same."""
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
    else:  # a table of all cells would take longer than adding one by one
        counts.index_add_(0, cells, torch.ones_like(cells, dtype=counts.dtype))


def histogram(counts: PairCounts, bins: int = 100) -> dict[str, list[float] | list[int]]:
    """Both kinds of pair in equal bins over the scores that occur, for a picture.

    Args:
        counts: The pairs.
        bins: How many.

    Returns:
        `edges` (bins + 1) ascending, in the unit of the thresholds; `genuine` and `impostor`
        (bins), how many pairs.
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
