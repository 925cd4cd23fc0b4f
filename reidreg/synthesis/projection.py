"""The projection of bodies to pixels.

Bodies live in a space of three axes, in units of the person's height: x to the person's left, y up
from the ground, z forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from reidreg.synthesis.cameras import Camera
from reidreg.synthesis.canvas import CANVAS_HEIGHT, CANVAS_WIDTH

Point = tuple[float, float]
Joint = tuple[float, float, float]
# Height, half width, half depth, and how far forward: one slice through a body.
Ring = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class View:
    """The projection from body space to pixels.

    Args:
        centre: Column of the body's axis.
        foot: Row of the ground under the body.
        unit: Pixels for one height of the person.
        yaw: Where the body faces.
        pitch: How far the camera looks down.
        taper: How much larger the head appears than the feet.
        roll: Lean of the image.
    """

    centre: float
    foot: float
    unit: float
    yaw: float
    pitch: float
    taper: float
    roll: float

    def scale(self, y: float) -> float:
        """Pixels per unit at height y."""
        return self.unit * (1.0 + self.taper * (y - 0.5))

    def depth(self, x: float, z: float) -> float:
        """How near to the camera a point is; larger is nearer."""
        return z * math.cos(self.yaw) - x * math.sin(self.yaw)

    def point(self, x: float, y: float, z: float) -> Point:
        """Column and row of a point of the body."""
        across = x * math.cos(self.yaw) + z * math.sin(self.yaw)
        up = y + self.taper * (y * y - y) / 2
        up = up * math.cos(self.pitch) - self.depth(x, z) * math.sin(self.pitch)
        column = self.centre + across * self.scale(y) + self.roll * (y - 0.5) * self.unit
        return column, self.foot - up * self.unit

    def half_width(self, ring: Ring) -> float:
        """Half of the visible width of an elliptic slice, in pixels."""
        y, width, depth, _ = ring
        seen = math.hypot(width * math.cos(self.yaw), depth * math.sin(self.yaw))
        return seen * self.scale(y)


def make_view(rng: np.random.Generator, camera: Camera, yaw: float) -> View:
    """Draw a view: where a person stands in the crop varies as it does in detections."""
    width, height = CANVAS_WIDTH, CANVAS_HEIGHT
    share = camera.size * float(np.clip(rng.normal(1.0, 0.045), 0.86, 1.14))
    middle = 0.5 + 0.5 * share + float(rng.normal(0.0, 0.02))
    return View(
        centre=width * (0.5 + camera.shift + float(rng.normal(0.0, 0.045))),
        foot=height * middle,
        unit=height * share,
        yaw=yaw,
        pitch=camera.pitch,
        taper=camera.taper,
        roll=camera.roll + float(rng.normal(0.0, 0.012)),
    )


def moved(view: View, across: float, down: float, scale: float, yaw: float) -> View:
    """The view of another person: shifted by shares of the canvas, scaled, and turned."""
    return replace(
        view,
        centre=view.centre + across * CANVAS_WIDTH,
        foot=view.foot + down * CANVAS_HEIGHT,
        unit=view.unit * scale,
        yaw=yaw,
    )


def convex_hull(points: Sequence[Point]) -> list[Point]:
    """The convex hull, by Andrew's monotone chain."""
    ordered = sorted(set(points))
    chains: list[list[Point]] = []
    for sequence in (ordered, ordered[::-1]):
        chain: list[Point] = []
        for p in sequence:
            while len(chain) > 1:
                (ax, ay), (bx, by) = chain[-2:]
                if (bx - ax) * (p[1] - ay) - (by - ay) * (p[0] - ax) > 0:
                    break
                chain.pop()
            chain.append(p)
        chains.append(chain[:-1])
    return chains[0] + chains[1]
