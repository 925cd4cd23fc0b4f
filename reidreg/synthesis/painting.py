"""Rasterising the parts of a figure: limbs, cloth with its pattern, and boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from reidreg.synthesis.canvas import steps
from reidreg.synthesis.colours import Colour, tone
from reidreg.synthesis.people import Garment
from reidreg.synthesis.projection import Joint, Point, Ring, View, convex_hull


def cloth_tile(garment: Garment, size: tuple[int, int], unit: float, yaw: float) -> Image.Image:
    """A rectangle of cloth, with the part of its pattern that is visible from this side."""
    width, height = size
    tile = Image.new("RGB", size, garment.base)
    draw = ImageDraw.Draw(tile)
    step = max(4.0, garment.period * unit)
    facing = math.cos(yaw)
    middle = width / 2 + math.sin(yaw) * width * 0.35
    edge = garment.at * height
    fill = garment.accent
    if garment.pattern in ("stripes", "checks"):
        for y in steps(step / 2, height, step):
            draw.rectangle((0, y, width, y + step * 0.45), fill=fill)
    if garment.pattern in ("pinstripes", "checks"):
        share = 0.3 if garment.pattern == "pinstripes" else 0.4
        for x in steps(middle % step - step, width, step):
            draw.rectangle((x, 0, x + step * share, height), fill=fill)
    elif garment.pattern == "dots":
        for row, y in enumerate(steps(step / 2, height, step)):
            for x in steps(middle % step - step * (0.5 if row % 2 else 1), width + step, step):
                draw.ellipse((x, y, x + step * 0.55, y + step * 0.55), fill=fill)
    elif garment.pattern == "yoke":
        draw.rectangle((0, 0, width, edge), fill=fill)
    elif garment.pattern == "band":
        draw.rectangle((0, edge, width, edge + unit * 0.06), fill=fill)
    elif garment.pattern == "logo" and facing > 0.15:
        wide = unit * 0.065 * facing
        top = height * 0.28
        draw.rectangle((middle - wide, top, middle + wide, top + unit * 0.09), fill=fill)
    elif garment.pattern == "panel" and abs(facing) > 0.15:
        wide = unit * 0.05 * abs(facing)
        draw.rectangle((middle - wide, 0, middle + wide, height), fill=fill)
    elif garment.pattern == "open" and facing > 0.1:
        wide = unit * 0.045 * facing
        draw.polygon(
            ((middle - wide * 1.3, 0), (middle + wide * 1.3, 0), (middle + wide, height),
             (middle - wide, height)), fill=fill,
        )  # fmt: skip
    return tile


@lru_cache(maxsize=8)
def cylinder_light(level: int) -> Image.Image:
    """The shading of a cylinder across its width, lit from level -3 (left) to 3 (right)."""
    across = np.linspace(-1.0, 1.0, 48)
    light = 1.0 - 0.34 * (across - 0.3 * level) ** 2
    return Image.fromarray(np.clip(light * 255, 90, 255).astype(np.uint8)[None, :])


class Painter:
    """Draws parts of a body onto an image.

    Args:
        image: Drawn on in place.
        view: The projection of the body.
        light: Side light, -1 (from the left) to 1.
    """

    def __init__(self, image: Image.Image, view: View, light: float) -> None:
        self.image = image
        self.draw = ImageDraw.Draw(image, "RGBA")
        self.view = view
        self.light = light

    def limb(self, a: Joint, b: Joint, ra: float, rb: float, colour: Colour) -> None:
        """A tapered rod with a lit side, of radius `ra` at `a` and `rb` at `b`."""
        (ax, ay), (bx, by) = self.view.point(*a), self.view.point(*b)
        length = math.hypot(bx - ax, by - ay) or 1.0
        ox, oy = (ay - by) / length, (bx - ax) / length
        ra, rb = ra * self.view.scale(a[1]), rb * self.view.scale(b[1])
        for share, brightness in ((1.0, 0.8), (0.62, 1.0)):
            slide = (1.0 - share) * (0.8 if self.light > 0 else -0.8)
            r, s = ra * share, rb * share
            px, qx = ax + slide * ra, bx + slide * rb
            fill = tone(colour, brightness)
            self.draw.polygon(
                ((px + ox * r, ay + oy * r), (qx + ox * s, by + oy * s),
                 (qx - ox * s, by - oy * s), (px - ox * r, ay - oy * r)), fill=fill,
            )  # fmt: skip
            self.draw.ellipse((px - r, ay - r, px + r, ay + r), fill=fill)
            self.draw.ellipse((qx - s, by - s, qx + s, by + s), fill=fill)

    def _outline(self, rings: Sequence[Ring]) -> list[Point]:
        """The outline of a stack of elliptic slices."""
        left: list[Point] = []
        right: list[Point] = []
        for ring in rings:
            x, y = self.view.point(0.0, ring[0], ring[3])
            half = self.view.half_width(ring)
            left.append((x - half, y))
            right.append((x + half, y))
        return left + right[::-1]

    def cloth(self, rings: Sequence[Ring], garment: Garment) -> None:
        """A garment around a stack of slices, with its pattern and the shading of a cylinder."""
        outline = self._outline(rings)
        x0, y0 = (math.floor(min(p[k] for p in outline)) for k in (0, 1))
        x1, y1 = (math.ceil(max(p[k] for p in outline)) for k in (0, 1))
        size = (max(1, x1 - x0), max(1, y1 - y0))
        tile = cloth_tile(garment, size, self.view.unit, self.view.yaw)
        shade = cylinder_light(round(3 * self.light)).resize(size, Image.Resampling.BILINEAR)
        tile = ImageChops.multiply(tile, shade.convert("RGB"))
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).polygon([(x - x0, y - y0) for x, y in outline], fill=255)
        self.image.paste(tile, (x0, y0), mask)

    def box(self, centre: Joint, size: Joint, colour: Colour) -> None:
        """A bag: the outline of a cuboid, with a darker pocket."""
        corners = [
            self.view.point(
                centre[0] + i * size[0], centre[1] + j * size[1], centre[2] + k * size[2]
            )
            for i in (-0.5, 0.5)
            for j in (-0.5, 0.5)
            for k in (-0.5, 0.5)
        ]
        outline = convex_hull(corners)
        self.draw.polygon(outline, fill=colour, outline=tone(colour, 0.6))
        cx, cy = self.view.point(*centre)
        pocket = [(cx + (x - cx) * 0.62, cy + (y - cy) * 0.4 + 6) for x, y in outline]
        self.draw.polygon(pocket, fill=tone(colour, 0.74))

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        """An ellipse with its centre and radii in pixels."""
        self.draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)
