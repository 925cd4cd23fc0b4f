"""Ranked galleries as a picture: queries, and what came first for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from reidreg.data import read_image
from reidreg.errors import DataError
from reidreg.evaluation import Evaluation
from reidreg.values import Embeddings

_TILE = (64, 128)
_GAP, _EDGE, _LINE, _LABEL = 10, 4, 15, 190
_PAPER, _INK, _FAINT = "#ffffff", "#1d1d1f", "#6e6e73"
# Told apart by frame and by sign, for those who do not see the colours.
_MATCH, _MISS, _QUERY = ("#1a7f37", "match"), ("#b3261e", "miss"), ("#1f4e9c", "query")


def draw_report(evaluation: Evaluation, path: Path, *, rows: int = 4, k: int = 10) -> Path:
    """Draw ranked galleries of the best, the worst and some random queries.

    Each row shows a query and its nearest gallery images, nearest first, by the same ranking that
    the figures come from. A match has a solid green frame and a tick, a miss a dashed red one and
    a cross.

    Args:
        evaluation: What to show.
        path: The PNG to write.
        rows: Queries of each sort.
        k: Gallery images of each query.

    Returns:
        The path.

    Raises:
        DataError: The features do not say which images they are of.
    """
    if not (evaluation.query.paths and evaluation.gallery.paths):
        raise DataError("a report shows images, but these features come without paths")
    precision = evaluation.evaluator.precisions(evaluation.query, evaluation.gallery)
    sections = pick_queries(precision, rows)
    chosen = [query for _, queries in sections for query in queries]
    indices, distances = evaluation.evaluator.rank(
        _take(evaluation.query, chosen), evaluation.gallery, k
    )
    lists = dict(zip(chosen, zip(indices.tolist(), distances.tolist(), strict=True), strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    _Sheet(evaluation, precision, lists, k).draw(sections).save(path)
    return path


def pick_queries(precision: Tensor, rows: int) -> list[tuple[str, list[int]]]:
    """Queries to show, none twice: the best, the worst, and some of the others.

    Args:
        precision: (Q,) average precision, NaN where a query has no match.
        rows: How many of each sort.
    """
    valid = torch.nonzero(~precision.isnan()).flatten()
    order = valid[torch.sort(precision[valid], descending=True, stable=True).indices].tolist()
    best = order[:rows]
    worst = [query for query in order[::-1][:rows] if query not in best]
    rest = [query for query in order if query not in best and query not in worst]
    some = np.random.default_rng(0).permutation(len(rest))[:rows]
    picked = [rest[position] for position in sorted(some.tolist())]
    sections = [("Best", best), ("Worst", worst), ("Random", picked)]
    return [(title, queries) for title, queries in sections if queries]


def _take(embeddings: Embeddings, rows: Sequence[int]) -> Embeddings:
    index = torch.tensor(rows, dtype=torch.int64)
    return Embeddings(
        embeddings.features[index],
        embeddings.pids[index],
        embeddings.camids[index],
        tuple(embeddings.paths[row] for row in rows),
    )


class _Sheet:
    """The picture under way."""

    def __init__(
        self,
        evaluation: Evaluation,
        precision: Tensor,
        lists: dict[int, tuple[list[int], list[float]]],
        k: int,
    ) -> None:
        self.evaluation, self.precision, self.lists, self.k = evaluation, precision, lists, k
        self.font = ImageFont.load_default(12)
        self.title = ImageFont.load_default(18)
        self.row_height = _TILE[1] + 2 * _LINE + 2 * _GAP

    def draw(self, sections: list[tuple[str, list[int]]]) -> Image.Image:
        count = sum(len(queries) for _, queries in sections)
        width = _LABEL + (self.k + 1) * (_TILE[0] + _GAP) + 3 * _GAP
        height = 70 + count * self.row_height + 34 * len(sections)
        self.image = Image.new("RGB", (width, height), _PAPER)
        self.pen = ImageDraw.Draw(self.image)
        figures = self.evaluation.figures
        self.pen.text(
            (_GAP, _GAP),
            f"mAP {figures['mAP']:.1%}   rank-1 {figures['rank1']:.1%}   "
            f"rank-5 {figures['rank5']:.1%}",
            _INK,
            self.title,
        )
        legend = "nearest first; solid frame and tick: the same person; dashed and cross: another"
        self.pen.text((_GAP, 38), legend, _FAINT, self.font)
        top = 64
        for title, queries in sections:
            self.pen.text((_GAP, top + 6), f"{title} queries", _INK, self.title)
            top += 34
            for query in queries:
                self._row(query, top)
                top += self.row_height
        return self.image

    def _row(self, query: int, top: int) -> None:
        ours, gallery = self.evaluation.query, self.evaluation.gallery
        pid, camid = int(ours.pids[query]), int(ours.camids[query])
        lines = [
            f"person {pid}, camera {camid}",
            f"AP {self.precision[query].item():.1%}",
            Path(ours.paths[query]).name[:28],
        ]
        for number, line in enumerate(lines):
            self.pen.text((_GAP, top + number * _LINE), line, _INK, self.font)
        self._tile(ours.paths[query], _LABEL, top, _QUERY, "query")
        indices, distances = self.lists[query]
        for place, (item, distance) in enumerate(zip(indices, distances, strict=True)):
            if item < 0:
                continue
            kind = _MATCH if int(gallery.pids[item]) == pid else _MISS
            left = _LABEL + 2 * _GAP + (place + 1) * (_TILE[0] + _GAP)
            label = f"c{int(gallery.camids[item])}  {distance:.2f}"
            self._tile(gallery.paths[item], left, top, kind, label)

    def _tile(self, path: str, left: int, top: int, kind: tuple[str, str], label: str) -> None:
        colour, name = kind
        self.image.paste(read_image(path).resize(_TILE), (left, top))
        right, bottom = left + _TILE[0], top + _TILE[1]
        if name == "miss":
            self._dashed(left - 2, top - 2, right + 1, bottom + 1, colour)
        else:
            box = (left - 2, top - 2, right + 1, bottom + 1)
            self.pen.rectangle(box, outline=colour, width=_EDGE)
        self._sign(name, right - 18, top + 2, colour)
        self.pen.text((left, bottom + 4), label, _INK, self.font)

    def _dashed(self, left: int, top: int, right: int, bottom: int, colour: str) -> None:
        for x in range(left, right, 10):
            for y in (top, bottom - _EDGE + 1):
                self.pen.rectangle((x, y, min(x + 5, right), y + _EDGE - 1), fill=colour)
        for y in range(top, bottom, 10):
            for x in (left, right - _EDGE + 1):
                self.pen.rectangle((x, y, x + _EDGE - 1, min(y + 5, bottom)), fill=colour)

    def _sign(self, name: str, left: int, top: int, colour: str) -> None:
        if name == "query":
            return
        self.pen.rectangle((left, top, left + 15, top + 15), fill=colour)
        if name == "match":
            self.pen.line(
                [(left + 3, top + 8), (left + 6, top + 12), (left + 12, top + 4)], "white", 2
            )
        else:
            self.pen.line([(left + 4, top + 4), (left + 11, top + 11)], "white", 2)
            self.pen.line([(left + 11, top + 4), (left + 4, top + 11)], "white", 2)
