"""Ranked galleries as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from reidreg.data.images import read_image
from reidreg.errors import DataError
from reidreg.report.figures import NAMES, is_number
from reidreg.report.galleries import RankedQuery

_TILE = (64, 128)
_GAP, _EDGE, _LINE, _LABEL = 10, 4, 15, 190
_PAPER, _INK, _FAINT, _EMPTY = "#ffffff", "#1d1d1f", "#6e6e73", "#e5e5e8"
# Frame and sign differ as well, for readers who cannot tell the colours apart.
_MATCH, _MISS, _QUERY = ("#1a7f37", "match"), ("#b3261e", "miss"), ("#1f4e9c", "query")


def draw_contact_sheet(queries: Sequence[RankedQuery], figures: Mapping[str, Any]) -> Image.Image:
    """Draw queries with their counted gallery images, nearest first.

    A match has a solid green frame and a tick, a miss a dashed red one and a cross. An image that
    cannot be read is an empty tile.

    Args:
        queries: The queries, group by group.
        figures: The figures of the title.
    """
    return _Sheet(queries, figures).image


class _Sheet:
    def __init__(self, queries: Sequence[RankedQuery], figures: Mapping[str, Any]) -> None:
        self.font = ImageFont.load_default(12)
        self.title = ImageFont.load_default(18)
        self.row_height = _TILE[1] + 2 * _LINE + 2 * _GAP
        groups = list(dict.fromkeys(query.group for query in queries))
        tiles = 1 + max((sum(_counted(query)) for query in queries), default=0)
        width = _LABEL + max(tiles, 8) * (_TILE[0] + _GAP) + 3 * _GAP
        height = 70 + len(queries) * self.row_height + 34 * len(groups)
        self.image = Image.new("RGB", (width, height), _PAPER)
        self.pen = ImageDraw.Draw(self.image)
        self._head(figures)
        top = 64
        for group in groups:
            self.pen.text((_GAP, top + 6), f"{group.capitalize()} queries", _INK, self.title)
            top += 34
            for query in queries:
                if query.group == group:
                    self._row(query, top)
                    top += self.row_height

    def _head(self, figures: Mapping[str, Any]) -> None:
        shown = [
            f"{NAMES[key]} {figures[key]:.1%}"
            for key in ("mAP", "rank1", "rank5")
            if is_number(figures.get(key))
        ]
        self.pen.text((_GAP, _GAP), "   ".join(shown), _INK, self.title)
        legend = (
            "nearest first; solid frame and tick: the same person; dashed and cross: another person"
        )
        self.pen.text((_GAP, 38), legend, _FAINT, self.font)

    def _row(self, query: RankedQuery, top: int) -> None:
        lines = [
            f"person {query.pid}, camera {query.camid}",
            f"AP {query.precision:.1%}",
            _printable(Path(query.path).name[:28]),
        ]
        for number, line in enumerate(lines):
            self.pen.text((_GAP, top + number * _LINE), line, _INK, self.font)
        self._tile(query.path, _LABEL, top, _QUERY, "query")
        left = _LABEL + 2 * _GAP
        for image, counted in zip(query.images, _counted(query), strict=True):
            if counted:
                left += _TILE[0] + _GAP
                style = _MATCH if image.verdict == "match" else _MISS
                self._tile(image.path, left, top, style, f"c{image.camid}  {image.distance:.2f}")

    def _tile(self, path: str, left: int, top: int, style: tuple[str, str], label: str) -> None:
        colour, name = style
        self.image.paste(_picture(path), (left, top))
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


def _counted(query: RankedQuery) -> list[bool]:
    """Which images of a query the evaluation counts."""
    return [image.position is not None for image in query.images]


def _picture(path: str) -> Image.Image:
    try:
        return read_image(path).resize(_TILE)
    except DataError:
        return Image.new("RGB", _TILE, _EMPTY)


def _printable(name: str) -> str:
    """A name with a question mark for each character that cannot be printed in a line."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)
