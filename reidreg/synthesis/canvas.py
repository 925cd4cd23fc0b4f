"""The sizes of crops and of the canvases that they are drawn on."""

from __future__ import annotations

from collections.abc import Iterator

# Pixels of a crop.
WIDTH, HEIGHT = 64, 128
# Everything is drawn larger and then reduced, which gives smooth edges at little cost.
SUPERSAMPLING = 3
CANVAS_WIDTH, CANVAS_HEIGHT = WIDTH * SUPERSAMPLING, HEIGHT * SUPERSAMPLING
SCENE_WIDTH = 9 * CANVAS_WIDTH


def steps(first: float, last: float, step: float) -> Iterator[float]:
    """Positions from `first` until `last`, a step apart."""
    while first < last:
        yield first
        first += step
