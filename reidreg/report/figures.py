"""The figures of an evaluation, arranged for a report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from reidreg.evaluation.figures import blocks

NAMES = {"mAP": "mAP", "mINP": "mINP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10"}
_TITLES = {"": "Raw", "reranked": "Re-ranked", "expanded": "Expanded"}


@dataclass(frozen=True)
class Figure:
    """One figure of one block.

    Args:
        value: The figure, a fraction.
        interval: Its 95 % confidence interval, or None.
        gain: The difference to the raw figure, or None for the raw figure itself.
    """

    value: float
    interval: tuple[float, float] | None
    gain: float | None


def titled_blocks(figures: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The raw figures and each post-processed block, by title."""
    return {_TITLES.get(name, name): block for name, block in blocks(figures).items()}


def figure_table(figures: Mapping[str, Any]) -> dict[str, list[Figure | None]]:
    """The available figures by name, each with a cell for each block."""
    columns = titled_blocks(figures).values()
    return {
        name: [_figure(figures, block, key) for block in columns]
        for key, name in NAMES.items()
        if any(is_number(block.get(key)) for block in columns)
    }


def _figure(raw: Mapping[str, Any], block: Mapping[str, Any], key: str) -> Figure | None:
    if not is_number(block.get(key)):
        return None
    interval = block.get("intervals", {}).get(key)
    compare = block is not raw and is_number(raw.get(key))
    return Figure(
        block[key],
        (interval[0], interval[1]) if interval else None,
        block[key] - raw[key] if compare else None,
    )


def skipped(figures: Mapping[str, Any]) -> list[str]:
    """How many queries are not counted, with a line for each reason."""
    reasons = {
        "without_gallery": "have no image of their person in the gallery",
        "same_camera_only": "have images of their person from their own camera only",
    }
    counts = figures.get("skipped", {})
    return [f"{counts[key]:,} {text}" for key, text in reasons.items() if counts.get(key)]


def is_number(value: object) -> TypeGuard[float]:
    """Whether a figure is a finite number; undefined figures are None or NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
