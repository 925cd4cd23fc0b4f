"""Cameras: viewpoint, light, lens and sensor, fixed for each camid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from reidreg.synthesis.streams import CAMERA, random_stream


@dataclass(frozen=True, slots=True)
class Camera:
    """What all crops of one camera share.

    Args:
        heading: The direction in which people cross the view, in radians; 0 is towards the camera.
        pitch: How far the camera looks down, in radians.
        taper: How much larger the head appears than the feet.
        roll: Lean of the image.
        size: Height of a person, as a share of the crop.
        shift: Where the detector's boxes sit, in crop widths from the middle.
        gains: Gains of red, green and blue.
        saturation: 0 is grey, 1 leaves the scene as it is.
        gamma: Exponent of the tone curve.
        black: The darkest value, 0 to 1.
        white: The brightest value, 0 to 1; above 1 it clips.
        light: Side light, -1 (from the left) to 1.
        blur: Radius in pixels.
        detail: Resolution of the sensor relative to the crop's.
        noise: Standard deviation, in levels of 255.
        quality: JPEG quality.
        seed: The data set's seed, for the scene.
        camid: The camera, 1 or more, for the scene.
    """

    heading: float
    pitch: float
    taper: float
    roll: float
    size: float
    shift: float
    gains: tuple[float, float, float]
    saturation: float
    gamma: float
    black: float
    white: float
    light: float
    blur: float
    detail: float
    noise: float
    quality: int
    seed: int
    camid: int


def _additive_recurrence(start: float, camid: int, ratio: float) -> float:
    """The camid-th point in [0, 1) of an additive recurrence, a low-discrepancy sequence."""
    return (start + camid * ratio) % 1.0


def _colour_cast(hue: float, strength: float) -> tuple[float, float, float]:
    """Channel gains that tint towards a hue; their mean is 1."""
    red, green, blue = (1.0 + strength * math.cos(2 * math.pi * (hue - k / 3)) for k in range(3))
    return red, green, blue


@lru_cache(maxsize=128)
def camera_of(seed: int, camid: int) -> Camera:
    """The camera with this camid.

    Cast, exposure and viewing direction are spread evenly over the cameras of a seed, so that a
    data set of few cameras does not get two similar ones by chance.

    Args:
        seed: The data set's seed.
        camid: The camera, 1 or more.
    """
    starts = random_stream(seed, CAMERA).random(4).tolist()
    rng = random_stream(seed, CAMERA, camid)
    hue = _additive_recurrence(starts[0], camid, 0.618)
    exposure = _additive_recurrence(starts[1], camid, 0.7548)
    grey = _additive_recurrence(starts[3], camid, 0.2755) < 0.13
    return Camera(
        heading=math.pi * (0.06 + 0.5 * _additive_recurrence(starts[2], camid, 0.5698)),
        pitch=float(rng.uniform(0.0, 0.32)),
        taper=float(rng.uniform(-0.03, 0.3)),
        roll=float(rng.uniform(-0.05, 0.05)),
        size=float(rng.uniform(0.84, 0.95)),
        shift=float(rng.uniform(-0.05, 0.05)),
        gains=_colour_cast(hue, strength=float(rng.uniform(0.08, 0.18))),
        saturation=0.12 if grey else float(rng.uniform(0.5, 1.15)),
        gamma=1.4 - 0.75 * exposure,
        black=float(rng.uniform(0.0, 0.16)),
        white=0.8 + 0.35 * exposure,
        light=float(rng.uniform(-0.45, 0.45)),
        blur=float(rng.uniform(0.2, 0.85)),
        detail=float(rng.uniform(0.6, 1.0)),
        noise=float(rng.uniform(2.0, 9.0)),
        quality=int(rng.integers(58, 93)),
        seed=seed,
        camid=camid,
    )
