"""Palettes, and colours drawn from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Colour = tuple[int, int, int]
CLOTH: tuple[Colour, ...] = (
    (28, 28, 32), (44, 44, 50), (78, 80, 86), (128, 130, 134), (186, 188, 190), (232, 232, 228),
    (30, 40, 84), (44, 78, 150), (104, 152, 208), (30, 88, 92), (36, 104, 60), (96, 108, 52),
    (150, 176, 96), (212, 190, 60), (224, 132, 44), (188, 44, 42), (120, 28, 46), (208, 96, 128),
    (228, 176, 190), (112, 64, 132), (110, 78, 52), (170, 136, 96), (214, 198, 166),
)  # fmt: skip
DENIM: tuple[Colour, ...] = ((40, 54, 88), (66, 92, 136), (112, 136, 168), (34, 36, 44))
HAIR: tuple[Colour, ...] = (
    (22, 18, 18), (38, 28, 24), (66, 44, 30), (110, 76, 44), (168, 134, 82), (150, 148, 146),
)  # fmt: skip
SKIN: tuple[Colour, ...] = (
    (238, 204, 178), (224, 182, 150), (204, 156, 122), (168, 118, 86), (120, 80, 58), (84, 56, 42),
)  # fmt: skip
GROUND: tuple[Colour, ...] = (
    (132, 130, 126), (96, 96, 100), (168, 160, 146), (150, 118, 102), (104, 122, 84),
    (186, 186, 184),
)  # fmt: skip


def pick_colour(rng: np.random.Generator, palette: Sequence[Colour], spread: int = 10) -> Colour:
    """Draw a colour of a palette, varied by at most `spread` in each channel."""
    base = palette[int(rng.integers(len(palette)))]
    return tint(base, *(int(rng.integers(-spread, spread + 1)) for _ in range(3)))


def pick_cloth_colour(rng: np.random.Generator) -> Colour:
    """Draw a colour of clothes: half of them are black, grey, white or navy."""
    return pick_colour(rng, CLOTH[:7] if rng.random() < 0.5 else CLOTH[7:])


def tint(colour: Colour, red: float, green: float, blue: float) -> Colour:
    """Add to each channel."""
    r, g, b = (
        min(255, max(0, round(c + d))) for c, d in zip(colour, (red, green, blue), strict=True)
    )
    return r, g, b


def tone(colour: Colour, factor: float) -> Colour:
    """Scale the brightness."""
    r, g, b = (min(255, round(c * factor)) for c in colour)
    return r, g, b
