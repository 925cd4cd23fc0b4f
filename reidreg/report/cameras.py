"""The table of camera pairs: query cameras by gallery cameras."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reidreg.report.figures import is_number

HEAT_LEVELS = 10  # colours of the heat map; page.css has a class for each


@dataclass(frozen=True)
class Cell:
    """The figures of one pair of cameras.

    Args:
        precision: mAP, a fraction.
        rank1: Rank-1, a fraction, or None.
        queries: Queries of one camera with a match in the other, or None.
        heat: The colour by mAP, 0..HEAT_LEVELS.
    """

    precision: float
    rank1: float | None
    queries: int | None
    heat: int


@dataclass(frozen=True)
class Matrix:
    """Cells by query camera (rows) and gallery camera (columns)."""

    columns: list[Any]
    rows: list[tuple[Any, list[Cell | None]]]


def camera_matrix(pairs: Sequence[Mapping[str, Any]]) -> Matrix | None:
    """The matrix of a list of camera pairs, or None if no pair has figures."""
    cells = {
        (pair["query_camera"], pair["gallery_camera"]): _cell(pair)
        for pair in pairs
        if is_number(pair.get("mAP"))
    }
    if not cells:
        return None
    rows = _sorted({query for query, _ in cells})
    columns = _sorted({gallery for _, gallery in cells})
    return Matrix(
        columns, [(row, [cells.get((row, column)) for column in columns]) for row in rows]
    )


def _cell(pair: Mapping[str, Any]) -> Cell:
    rank1 = pair.get("rank1")
    return Cell(
        precision=pair["mAP"],
        rank1=rank1 if is_number(rank1) else None,
        queries=pair.get("num_queries"),
        heat=round(min(max(pair["mAP"], 0.0), 1.0) * HEAT_LEVELS),
    )


def _sorted(cameras: set[Any]) -> list[Any]:
    """Numbers in ascending order, then names."""
    return sorted(cameras, key=lambda c: (isinstance(c, str), c if is_number(c) else 0, str(c)))
