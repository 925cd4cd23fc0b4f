"""The pixels of drawn re-identification data: people, cameras, and the crops a detector would cut.

A person is a fixed set of traits (build, hair, clothes, bag). A camera is a fixed viewpoint, light,
lens and scene. A crop is one person, in one pose, before one camera. Each of the three has a random
stream of its own, so that a crop depends on its own keys alone and never on the order of drawing.

Bodies live in a space of three axes, in units of the person's height: x to the person's left, y up
from the ground, z forward.
"""

from __future__ import annotations

import bisect
import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

WIDTH, HEIGHT = 64, 128
# Everything is drawn larger and then reduced, which gives smooth edges at little cost.
SUPER = 3
SCENE_WIDTH = 9 * WIDTH * SUPER

# One number for each kind of random stream, so that streams with equal keys stay apart.
_PERSON, _CAMERA, _SCENE, _CROP, _DISTRACTOR, _JUNK = range(6)

Colour = tuple[int, int, int]
Point = tuple[float, float]
Joint = tuple[float, float, float]
# Height, half width, half depth, and how far forward: one slice through a body.
Ring = tuple[float, float, float, float]

_CLOTH: tuple[Colour, ...] = (
    (28, 28, 32), (44, 44, 50), (78, 80, 86), (128, 130, 134), (186, 188, 190), (232, 232, 228),
    (30, 40, 84), (44, 78, 150), (104, 152, 208), (30, 88, 92), (36, 104, 60), (96, 108, 52),
    (150, 176, 96), (212, 190, 60), (224, 132, 44), (188, 44, 42), (120, 28, 46), (208, 96, 128),
    (228, 176, 190), (112, 64, 132), (110, 78, 52), (170, 136, 96), (214, 198, 166),
)  # fmt: skip
_DENIM: tuple[Colour, ...] = ((40, 54, 88), (66, 92, 136), (112, 136, 168), (34, 36, 44))
_HAIR: tuple[Colour, ...] = (
    (22, 18, 18), (38, 28, 24), (66, 44, 30), (110, 76, 44), (168, 134, 82), (150, 148, 146),
)  # fmt: skip
_SKIN: tuple[Colour, ...] = (
    (238, 204, 178), (224, 182, 150), (204, 156, 122), (168, 118, 86), (120, 80, 58), (84, 56, 42),
)  # fmt: skip


def _rng(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng([seed, *key])


def _pick(rng: np.random.Generator, odds: Mapping[str, float]) -> str:
    """A name, drawn in proportion to its odds."""
    at = float(rng.random()) * sum(odds.values())
    bounds = list(itertools.accumulate(odds.values()))
    return list(odds)[min(bisect.bisect_right(bounds, at), len(bounds) - 1)]


def _colour(rng: np.random.Generator, palette: Sequence[Colour], spread: int = 10) -> Colour:
    base = palette[int(rng.integers(len(palette)))]
    return _tint(base, *(int(rng.integers(-spread, spread + 1)) for _ in range(3)))


def _cloth_colour(rng: np.random.Generator) -> Colour:
    """Half of what people wear is black, grey, white or navy."""
    return _colour(rng, _CLOTH[:7] if rng.random() < 0.5 else _CLOTH[7:])


def _tint(colour: Colour, red: float, green: float, blue: float) -> Colour:
    r, g, b = (
        min(255, max(0, round(c + d))) for c, d in zip(colour, (red, green, blue), strict=True)
    )
    return r, g, b


def _tone(colour: Colour, factor: float) -> Colour:
    r, g, b = (min(255, round(c * factor)) for c in colour)
    return r, g, b


# ---------------------------------------------------------------------------- people


@dataclass(frozen=True, slots=True)
class Garment:
    """What a piece of cloth looks like.

    Args:
        pattern: plain, stripes, pinstripes, checks, dots, yoke, band, logo, panel, or open.
        base: The main colour.
        accent: The pattern's colour.
        period: Distance between repeats, in heights of the person.
        at: Where a single feature sits, from 0 (top) to 1 (hem).
    """

    pattern: str
    base: Colour
    accent: Colour
    period: float
    at: float


@dataclass(frozen=True, slots=True)
class Person:
    """What every crop of one identity shares; lengths are in heights of the person.

    Args:
        girth: Thickness of body and limbs, relative to the mean.
        shoulder: Half the width of the shoulders.
        hip: Half the width of the hips.
        leg: Height of the hip joints.
        head: Size of the head, relative to the mean.
        skin: Colour of the skin.
        hair: Colour of the hair.
        hair_style: bald, short, bob, long, tail, or bun.
        hat: none, cap, beanie, or brim.
        hat_colour: Colour of the hat.
        upper: The garment on the upper body.
        sleeve: Share of the arm that is covered.
        sleeve_colour: Colour of the sleeves.
        hem: Height at which the upper garment ends.
        lower: The garment on the legs.
        lower_kind: trousers, shorts, or skirt.
        lower_hem: Height at which the lower garment ends.
        shoes: Colour of the shoes.
        bag: none, backpack, handbag, or messenger.
        bag_colour: Colour of the bag.
        bag_size: Size of the bag, relative to the mean.
        bag_side: On which side it is carried, 1 for the left and -1 for the right.
    """

    girth: float
    shoulder: float
    hip: float
    leg: float
    head: float
    skin: Colour
    hair: Colour
    hair_style: str
    hat: str
    hat_colour: Colour
    upper: Garment
    sleeve: float
    sleeve_colour: Colour
    hem: float
    lower: Garment
    lower_kind: str
    lower_hem: float
    shoes: Colour
    bag: str
    bag_colour: Colour
    bag_size: float
    bag_side: int


_UPPER_ODDS = {
    "plain": 4.5, "stripes": 1.4, "pinstripes": 0.8, "checks": 1.3, "dots": 0.7, "yoke": 1.2,
    "band": 1.2, "logo": 1.6, "panel": 1.2, "open": 1.8,
}  # fmt: skip
_BAG_ODDS = {"none": 4.0, "backpack": 3.0, "handbag": 1.6, "messenger": 1.6}
_HAIR_ODDS = {"short": 4.0, "bald": 0.5, "bob": 1.4, "long": 1.8, "tail": 1.0, "bun": 0.6}
_HAT_ODDS = {"none": 7.0, "cap": 1.5, "beanie": 0.8, "brim": 0.5}


def _accent(rng: np.random.Generator, base: Colour) -> Colour:
    """A colour that stands out from another by brightness, which survives a colour cast."""
    for _ in range(12):
        colour = _cloth_colour(rng)
        if abs(sum(colour) - sum(base)) > 150:
            return colour
    return (236, 236, 232) if sum(base) < 380 else (30, 30, 36)


def _upper(rng: np.random.Generator) -> Garment:
    base = _cloth_colour(rng)
    return Garment(
        pattern=_pick(rng, _UPPER_ODDS),
        base=base,
        accent=_accent(rng, base),
        period=float(rng.uniform(0.04, 0.085)),
        at=float(rng.uniform(0.22, 0.6)),
    )


def _lower(rng: np.random.Generator, kind: str, upper: Garment) -> Garment:
    if kind == "skirt" and rng.random() < 0.4:
        return upper  # a dress
    jeans = kind == "trousers" and rng.random() < 0.45
    base = _colour(rng, _DENIM) if jeans else _cloth_colour(rng)
    odds = {"plain": 3.0, "faded": 1.2, "side": 1.2, "yoke": 0.6}
    if kind == "skirt":
        odds = {"plain": 3.0, "checks": 1.0, "band": 1.0, "dots": 0.5}
    return Garment(
        pattern=_pick(rng, odds),
        base=base,
        accent=_accent(rng, base),
        period=float(rng.uniform(0.04, 0.07)),
        at=float(rng.uniform(0.4, 0.8)),
    )


def make_person(rng: np.random.Generator) -> Person:
    """Draw the traits of one identity.

    Args:
        rng: The identity's own random stream.
    """
    upper = _upper(rng)
    kind = _pick(rng, {"trousers": 6.0, "shorts": 1.6, "skirt": 1.8})
    lower_hem = {"trousers": 0.045, "shorts": rng.uniform(0.24, 0.34), "skirt": 0.0}[kind]
    if kind == "skirt":
        lower_hem = rng.uniform(0.1, 0.36)
    leg = float(rng.uniform(0.455, 0.525))
    coat = upper.pattern in ("plain", "checks", "open") and rng.random() < 0.25
    contrast = upper.pattern in ("plain", "logo", "panel", "band") and rng.random() < 0.3
    return Person(
        girth=float(rng.uniform(0.82, 1.3)),
        shoulder=float(rng.uniform(0.108, 0.142)),
        hip=float(rng.uniform(0.078, 0.105)),
        leg=leg,
        head=float(rng.uniform(0.9, 1.14)),
        skin=_colour(rng, _SKIN, 6),
        hair=_colour(rng, _HAIR, 6),
        hair_style=_pick(rng, _HAIR_ODDS),
        hat=_pick(rng, _HAT_ODDS),
        hat_colour=_cloth_colour(rng),
        upper=upper,
        sleeve=(0.06, 0.42, 0.96, 0.96)[int(rng.integers(4))],
        sleeve_colour=upper.accent if contrast else upper.base,
        hem=float(rng.uniform(0.26, 0.36)) if coat else leg - float(rng.uniform(0.0, 0.05)),
        lower=_lower(rng, kind, upper),
        lower_kind=kind,
        lower_hem=float(lower_hem),
        shoes=_colour(rng, _CLOTH[:6] + _CLOTH[13:16] + _CLOTH[20:]),
        bag=_pick(rng, _BAG_ODDS),
        bag_colour=_cloth_colour(rng),
        bag_size=float(rng.uniform(0.75, 1.3)),
        bag_side=1 if rng.random() < 0.5 else -1,
    )


@lru_cache(maxsize=512)
def person_of(seed: int, pid: int) -> Person:
    """The identity with this number.

    Args:
        seed: The data set's seed.
        pid: The identity's number, 0 or more.
    """
    return make_person(_rng(seed, _PERSON, pid))


# ---------------------------------------------------------------------------- cameras


@dataclass(frozen=True, slots=True)
class Camera:
    """What every crop of one camera shares.

    Args:
        heading: The direction in which people cross the view, in radians; 0 is towards the camera.
        pitch: How far the camera looks down, in radians.
        taper: How much larger the head appears than the feet.
        roll: Lean of the image.
        size: Height of a person, as a share of the crop.
        shift: Where the detector's boxes sit, in crop widths from the middle.
        gains: Red, green and blue sensitivity.
        saturation: 0 is grey, 1 is the scene's own.
        gamma: Exponent of the tone curve.
        black: The darkest value, 0 to 1.
        white: The brightest value, 0 to 1; above 1 it clips.
        light: Side light, -1 (from the left) to 1.
        blur: Radius in pixels.
        detail: Resolution of the sensor relative to the crop's.
        noise: Standard deviation, in levels of 255.
        quality: JPEG quality.
        seed: The data set's seed, for the scene.
        camid: The camera's number, 1 or more, for the scene.
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


def _spread(start: float, camid: int, ratio: float) -> float:
    """The camid-th point in [0, 1) of an additive sequence that keeps its points apart."""
    return (start + camid * ratio) % 1.0


def _cast(hue: float, strength: float) -> tuple[float, float, float]:
    """Sensitivities that tint towards a hue; their mean is 1."""
    red, green, blue = (1.0 + strength * math.cos(2 * math.pi * (hue - k / 3)) for k in range(3))
    return red, green, blue


@lru_cache(maxsize=128)
def camera_of(seed: int, camid: int) -> Camera:
    """The camera with this number.

    Cast, exposure and viewing direction are spread evenly over the cameras of a seed, so that a
    data set of few cameras does not get two that look alike by chance.

    Args:
        seed: The data set's seed.
        camid: The camera's number, 1 or more.
    """
    starts = _rng(seed, _CAMERA).random(4)
    rng = _rng(seed, _CAMERA, camid)
    exposure = _spread(float(starts[1]), camid, 0.7548)
    grey = _spread(float(starts[3]), camid, 0.2755) < 0.13
    return Camera(
        heading=math.pi * (0.06 + 0.5 * _spread(float(starts[2]), camid, 0.5698)),
        pitch=float(rng.uniform(0.0, 0.32)),
        taper=float(rng.uniform(-0.03, 0.3)),
        roll=float(rng.uniform(-0.05, 0.05)),
        size=float(rng.uniform(0.84, 0.95)),
        shift=float(rng.uniform(-0.05, 0.05)),
        gains=_cast(_spread(float(starts[0]), camid, 0.618), float(rng.uniform(0.08, 0.18))),
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


# ---------------------------------------------------------------------------- scenes


def _ground_line(camera: Camera) -> int:
    """The row where the ground meets what stands behind it; steep cameras see more ground."""
    return round(HEIGHT * SUPER * (0.62 - 1.1 * camera.pitch))


def _rows(first: float, last: float, step: float) -> Iterator[float]:
    while first < last:
        yield first
        first += step


def _draw_wall(draw: ImageDraw.ImageDraw, rng: np.random.Generator, line: int) -> None:
    """Bricks or large panels."""
    base = _colour(rng, ((150, 96, 78), (176, 168, 154), (128, 128, 130), (196, 184, 150)), 16)
    mortar = _tone(base, 0.78)
    draw.rectangle((0, 0, SCENE_WIDTH, line), fill=base)
    course, length = (14.0, 40.0) if rng.random() < 0.5 else (70.0, 150.0)
    for row, top in enumerate(_rows(line % course - course, line, course)):
        draw.line((0, top, SCENE_WIDTH, top), fill=mortar, width=2)
        for x in _rows(row % 2 * length / 2, SCENE_WIDTH, length):
            draw.line((x, top, x, top + course), fill=mortar, width=2)


def _draw_glass(draw: ImageDraw.ImageDraw, rng: np.random.Generator, line: int) -> None:
    """Shop windows with frames and posters."""
    frame = _colour(rng, ((60, 62, 66), (200, 200, 198), (90, 70, 58)), 14)
    draw.rectangle((0, 0, SCENE_WIDTH, line), fill=frame)
    for x in _rows(10, SCENE_WIDTH, 160):
        pane = _colour(rng, ((96, 118, 132), (56, 68, 78), (160, 172, 172), (206, 196, 160)), 22)
        draw.rectangle((x, -5, x + 144, line - 12), fill=pane)
        draw.polygon(
            ((x + 30, 0), (x + 66, 0), (x + 30, line - 12), (x, line - 12)), fill=_tone(pane, 1.13)
        )
        if rng.random() < 0.5:
            top = float(rng.uniform(10, max(11, line - 110)))
            draw.rectangle((x + 60, top, x + 118, top + 76), fill=_colour(rng, _CLOTH, 20))


def _draw_fence(draw: ImageDraw.ImageDraw, rng: np.random.Generator, line: int) -> None:
    """A hedge or sky behind bars."""
    base = _colour(rng, ((74, 96, 58), (176, 190, 204), (116, 126, 96)), 14)
    draw.rectangle((0, 0, SCENE_WIDTH, line), fill=base)
    for _ in range(260):
        x, y = rng.uniform(0, SCENE_WIDTH), rng.uniform(0, line)
        r = rng.uniform(6, 26)
        leaf = _tone(base, float(rng.uniform(0.72, 1.22)))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=leaf)
    bar = _colour(rng, ((50, 54, 56), (190, 192, 190), (70, 96, 80)), 10)
    for x in _rows(0, SCENE_WIDTH, float(rng.uniform(22, 46))):
        draw.rectangle((x, line * 0.25, x + 5, line + 6), fill=bar)
    for y in (line * 0.28, line * 0.92):
        draw.rectangle((0, y, SCENE_WIDTH, y + 7), fill=bar)


def _draw_street(draw: ImageDraw.ImageDraw, rng: np.random.Generator, line: int) -> None:
    """Parked cars under a far facade."""
    base = _colour(rng, ((150, 148, 146), (178, 160, 138), (112, 116, 124)), 16)
    draw.rectangle((0, 0, SCENE_WIDTH, line), fill=base)
    for x in _rows(20, SCENE_WIDTH, 90):
        for y in _rows(line % 80 - 70, line - 90, 80):
            draw.rectangle((x, y, x + 44, y + 50), fill=_tone(base, float(rng.uniform(0.5, 0.8))))
    for x in _rows(float(rng.uniform(-80, 0)), SCENE_WIDTH, 290):
        paint = _colour(rng, _CLOTH, 16)
        draw.rounded_rectangle((x, line - 66, x + 230, line + 16), 26, fill=paint)
        roof, belt = line - 112, line - 62
        cabin = ((x + 46, belt), (x + 76, roof), (x + 168, roof), (x + 200, belt))
        draw.polygon(cabin, fill=_tone(paint, 0.72))
        for wheel in (x + 48, x + 182):
            draw.ellipse((wheel - 22, line - 6, wheel + 22, line + 38), fill=(26, 26, 28))


def _draw_indoor(draw: ImageDraw.ImageDraw, rng: np.random.Generator, line: int) -> None:
    """A corridor with doors and a skirting board."""
    base = _colour(rng, ((214, 208, 192), (186, 196, 204), (202, 190, 190)), 12)
    draw.rectangle((0, 0, SCENE_WIDTH, line), fill=base)
    for x in _rows(float(rng.uniform(0, 120)), SCENE_WIDTH, float(rng.uniform(230, 330))):
        door = _colour(rng, ((128, 92, 62), (86, 92, 104), (168, 60, 52), (224, 222, 214)), 12)
        draw.rectangle((x, line * 0.1, x + 104, line), fill=door)
        draw.rectangle((x + 12, line * 0.2, x + 92, line * 0.55), fill=_tone(door, 0.85))
    draw.rectangle((0, line - 14, SCENE_WIDTH, line), fill=_tone(base, 0.55))


_BACKDROPS = (_draw_wall, _draw_glass, _draw_fence, _draw_street, _draw_indoor)
_GROUND: tuple[Colour, ...] = (
    (132, 130, 126), (96, 96, 100), (168, 160, 146), (150, 118, 102), (104, 122, 84),
    (186, 186, 184),
)  # fmt: skip


def _draw_ground(draw: ImageDraw.ImageDraw, rng: np.random.Generator, line: int) -> None:
    """Tiles, planks or asphalt that run towards the camera."""
    base = _colour(rng, _GROUND, 12)
    bottom = HEIGHT * SUPER
    draw.rectangle((0, line, SCENE_WIDTH, bottom), fill=base)
    joint = _tone(base, float(rng.choice([0.72, 0.84, 1.2])))
    gap, step = 7.0, float(rng.uniform(1.18, 1.5))
    y = line + gap
    while y < bottom:
        draw.line((0, y, SCENE_WIDTH, y), fill=joint, width=2)
        gap *= step
        y += gap
    if rng.random() < 0.7:
        middle, pitch = SCENE_WIDTH / 2, float(rng.uniform(46, 120))
        for x in _rows(-2 * SCENE_WIDTH, 3 * SCENE_WIDTH, pitch):
            draw.line((middle + (x - middle) * 0.45, line, x, bottom), fill=joint, width=2)


@lru_cache(maxsize=128)
def _scene(camera: Camera) -> Image.Image:
    """The whole background of a camera; crops are cut from it."""
    rng = _rng(camera.seed, _SCENE, camera.camid)
    image = Image.new("RGB", (SCENE_WIDTH, HEIGHT * SUPER))
    draw = ImageDraw.Draw(image)
    line = _ground_line(camera)
    first = int(_rng(camera.seed, _SCENE).integers(len(_BACKDROPS)))
    _BACKDROPS[(first + camera.camid) % len(_BACKDROPS)](draw, rng, line)
    _draw_ground(draw, rng, line)
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.6, 2.2))))
    grain = rng.normal(0.0, 7.0, (HEIGHT * SUPER // 4, SCENE_WIDTH // 4))
    stain = rng.normal(0.0, 12.0, (6, 24))
    for field in (grain, stain):
        layer = Image.fromarray(np.clip(128 + field, 0, 255).astype(np.uint8))
        layer = layer.resize(image.size, Image.Resampling.BICUBIC).convert("RGB")
        image = ImageChops.add(image, layer, 1.0, -128)
    return image


# ---------------------------------------------------------------------------- figures


@dataclass(frozen=True, slots=True)
class Pose:
    """How a person holds himself in one crop.

    Args:
        yaw: Where he faces, in radians; 0 is towards the camera.
        turn: How far the head is turned from the body.
        phase: Position in the walking cycle, in radians.
        stride: Largest angle of the thighs, in radians.
        swing: Largest angle of the arms.
        bend: Angle of the elbows.
        raised: The side whose hand is at the ear, 1 or -1; 0 for none.
        lean: How far forward the shoulders are.
    """

    yaw: float
    turn: float
    phase: float
    stride: float
    swing: float
    bend: float
    raised: int
    lean: float


def _pose(rng: np.random.Generator, heading: float) -> Pose:
    walking = rng.random() < 0.8
    raised = (1 if rng.random() < 0.5 else -1) if rng.random() < 0.12 else 0
    return Pose(
        yaw=heading + math.pi * int(rng.integers(2)) + float(rng.normal(0.0, 0.45)),
        turn=float(rng.normal(0.0, 0.35)),
        phase=float(rng.uniform(0.0, 2 * math.pi)),
        stride=float(rng.uniform(0.25, 0.55) if walking else rng.uniform(0.02, 0.12)),
        swing=float(rng.uniform(0.1, 0.5) if walking else rng.uniform(0.0, 0.15)),
        bend=float(rng.uniform(0.1, 0.6)),
        raised=raised,
        lean=float(rng.uniform(0.0, 0.03)),
    )


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
        """How near to the camera a point is."""
        return z * math.cos(self.yaw) - x * math.sin(self.yaw)

    def point(self, x: float, y: float, z: float) -> Point:
        """Where a point of the body is seen."""
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


def _hull(points: Sequence[Point]) -> list[Point]:
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


def _tile(garment: Garment, size: tuple[int, int], unit: float, yaw: float) -> Image.Image:
    """Cloth of the given size, with what of its pattern can be seen from this side."""
    width, height = size
    tile = Image.new("RGB", size, garment.base)
    draw = ImageDraw.Draw(tile)
    step = max(4.0, garment.period * unit)
    facing = math.cos(yaw)
    middle = width / 2 + math.sin(yaw) * width * 0.35
    edge = garment.at * height
    fill = garment.accent
    if garment.pattern in ("stripes", "checks"):
        for y in _rows(step / 2, height, step):
            draw.rectangle((0, y, width, y + step * 0.45), fill=fill)
    if garment.pattern in ("pinstripes", "checks"):
        share = 0.3 if garment.pattern == "pinstripes" else 0.4
        for x in _rows(middle % step - step, width, step):
            draw.rectangle((x, 0, x + step * share, height), fill=fill)
    elif garment.pattern == "dots":
        for row, y in enumerate(_rows(step / 2, height, step)):
            for x in _rows(middle % step - step * (0.5 if row % 2 else 1), width + step, step):
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
def _shading(level: int) -> Image.Image:
    """A cylinder's light across the width; level -3 to 3 is where it comes from."""
    across = np.linspace(-1.0, 1.0, 48)
    light = 1.0 - 0.34 * (across - 0.3 * level) ** 2
    return Image.fromarray(np.clip(light * 255, 90, 255).astype(np.uint8)[None, :])


class _Figure:
    """Draws one person onto an image, far parts first."""

    def __init__(
        self, image: Image.Image, person: Person, pose: Pose, view: View, light: float
    ) -> None:
        self.image = image
        self.draw = ImageDraw.Draw(image, "RGBA")
        self.person = person
        self.pose = pose
        self.view = view
        self.light = light
        self.shoulder_y = 0.815

    def paint(self) -> None:
        """Draw the shadow and the whole person."""
        view, person = self.view, self.person
        front = math.cos(view.yaw) > 0
        sides = sorted((-1, 1), key=lambda side: view.depth(side, 0.0))
        self._shadow()
        if person.bag == "backpack" and front:
            self._backpack()
        self._arm(sides[0])
        for side in sides:
            self._leg(side)
        self._torso()
        if person.bag == "backpack":
            self._straps() if front else self._backpack()
        self._head()
        self._arm(sides[1])

    def _limb(self, a: Joint, b: Joint, ra: float, rb: float, colour: Colour) -> None:
        """A tapered rod with a lit side."""
        (ax, ay), (bx, by) = self.view.point(*a), self.view.point(*b)
        length = math.hypot(bx - ax, by - ay) or 1.0
        ox, oy = (ay - by) / length, (bx - ax) / length
        ra, rb = ra * self.view.scale(a[1]), rb * self.view.scale(b[1])
        for share, tone in ((1.0, 0.8), (0.62, 1.0)):
            slide = (1.0 - share) * (0.8 if self.light > 0 else -0.8)
            r, s = ra * share, rb * share
            px, qx = ax + slide * ra, bx + slide * rb
            fill = _tone(colour, tone)
            self.draw.polygon(
                ((px + ox * r, ay + oy * r), (qx + ox * s, by + oy * s),
                 (qx - ox * s, by - oy * s), (px - ox * r, ay - oy * r)), fill=fill,
            )  # fmt: skip
            self.draw.ellipse((px - r, ay - r, px + r, ay + r), fill=fill)
            self.draw.ellipse((qx - s, by - s, qx + s, by + s), fill=fill)

    def _column(self, rings: Sequence[Ring]) -> list[Point]:
        """The outline of a stack of elliptic slices."""
        left: list[Point] = []
        right: list[Point] = []
        for ring in rings:
            x, y = self.view.point(0.0, ring[0], ring[3])
            half = self.view.half_width(ring)
            left.append((x - half, y))
            right.append((x + half, y))
        return left + right[::-1]

    def _cloth(self, rings: Sequence[Ring], garment: Garment) -> None:
        """A garment around a stack of slices, with its pattern and a cylinder's light."""
        outline = self._column(rings)
        x0, y0 = (math.floor(min(p[k] for p in outline)) for k in (0, 1))
        x1, y1 = (math.ceil(max(p[k] for p in outline)) for k in (0, 1))
        size = (max(1, x1 - x0), max(1, y1 - y0))
        tile = _tile(garment, size, self.view.unit, self.view.yaw)
        shade = _shading(round(3 * self.light)).resize(size, Image.Resampling.BILINEAR)
        tile = ImageChops.multiply(tile, shade.convert("RGB"))
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).polygon([(x - x0, y - y0) for x, y in outline], fill=255)
        self.image.paste(tile, (x0, y0), mask)

    def _box(self, centre: Joint, size: Joint, colour: Colour) -> None:
        """A bag: the outline of a cuboid, with a darker pocket."""
        corners = [
            self.view.point(
                centre[0] + i * size[0], centre[1] + j * size[1], centre[2] + k * size[2]
            )
            for i in (-0.5, 0.5)
            for j in (-0.5, 0.5)
            for k in (-0.5, 0.5)
        ]
        outline = _hull(corners)
        self.draw.polygon(outline, fill=colour, outline=_tone(colour, 0.6))
        cx, cy = self.view.point(*centre)
        pocket = [(cx + (x - cx) * 0.62, cy + (y - cy) * 0.4 + 6) for x, y in outline]
        self.draw.polygon(pocket, fill=_tone(colour, 0.74))

    def _shadow(self) -> None:
        view = self.view
        x, y = view.centre - view.roll * view.unit / 2, view.foot
        wide, tall = 0.17 * view.unit, (0.012 + 0.1 * math.sin(view.pitch)) * view.unit
        x += self.light * wide
        self.draw.ellipse((x - wide, y - tall, x + wide, y + tall), fill=(10, 10, 16, 90))

    def _leg_joints(self, side: int) -> tuple[Joint, Joint, Joint]:
        person, pose = self.person, self.pose
        angle = side * pose.stride * math.sin(pose.phase)
        flex = pose.stride * max(0.0, side * math.cos(pose.phase)) * 1.3
        half = (person.leg - 0.04) / 2
        x = side * person.hip * 0.52
        hip = (x, person.leg, 0.0)
        knee = (x, person.leg - half * math.cos(angle), half * math.sin(angle))
        low = angle - flex
        ankle = (x, knee[1] - half * math.cos(low), knee[2] + half * math.sin(low))
        return hip, knee, ankle

    def _leg(self, side: int) -> None:
        person, lower = self.person, self.person.lower
        hip, knee, ankle = self._leg_joints(side)
        thick = person.girth * 0.056
        far = 0.82 if self.view.depth(side, 0.0) < 0 else 1.0
        toe = (ankle[0] + 0.012 * side, max(0.012, ankle[1] - 0.022), ankle[2] + 0.075)
        heel = (ankle[0], max(0.014, ankle[1] - 0.02), ankle[2] - 0.015)
        self._limb(heel, toe, 0.026, 0.021, _tone(person.shoes, far))
        trousers = person.lower_kind == "trousers"
        thigh = person.skin if person.lower_kind == "skirt" else lower.base
        shin = lower.base if trousers else person.skin
        if trousers and lower.pattern == "yoke":
            shin = lower.accent
        rest = thick * 0.56 if trousers else thick * 0.5
        self._limb(knee, ankle, thick * 0.74, rest, _tone(shin, far))
        self._limb(hip, knee, thick * 1.12, thick * 0.8, _tone(thigh, far))
        if lower.pattern == "faded" and trousers:
            self._limb(hip, knee, thick * 0.5, thick * 0.3, _tone(lower.base, 1.35 * far))
        if lower.pattern == "side" and person.lower_kind != "skirt":
            out = side * thick * 0.7
            a, b, c = ((x + out, y, z) for x, y, z in (hip, knee, ankle))
            self._limb(a, b, 0.011, 0.011, lower.accent)
            if trousers:
                self._limb(b, c, 0.011, 0.011, lower.accent)

    def _torso(self) -> None:
        person, lean = self.person, self.pose.lean
        body = person.girth
        hip: Ring = (person.leg, person.hip * body**0.5, 0.062 * body, 0.0)
        if person.lower_kind == "skirt":
            flare = 1.25 + 0.9 * (person.leg - person.lower_hem)
            hem: Ring = (person.lower_hem, hip[1] * flare, hip[2] * flare * 1.2, 0.0)
            waist: Ring = (person.leg + 0.08, hip[1] * 0.9, hip[2] * 0.95, 0.0)
            self._cloth((waist, hip, hem), person.lower)
        else:
            block = Garment("plain", person.lower.base, person.lower.base, 0.05, 0.5)
            low: Ring = (person.leg - 0.05, hip[1] * 0.98, hip[2], 0.0)
            self._cloth(((person.leg + 0.06, hip[1], hip[2], 0.0), hip, low), block)
        loose = 1.06 if person.hem > person.leg - 0.06 else 1.25
        shoulder = person.shoulder
        rings: list[Ring] = [
            (self.shoulder_y + 0.03, shoulder * 0.45, 0.04, lean),
            (self.shoulder_y + 0.004, shoulder * 0.97, 0.055 * body, lean),
            (self.shoulder_y - 0.09, shoulder * 0.93, 0.07 * body, lean * 0.7),
            (person.leg + 0.12, person.hip * body * 0.93, 0.065 * body, lean * 0.3),
            (min(person.leg, person.hem + 0.02), hip[1] * loose, hip[2] * loose, 0.0),
        ]
        if person.hem < person.leg - 0.02:
            rings.append((person.hem, hip[1] * loose * 1.08, hip[2] * loose * 1.15, 0.0))
        self._cloth(rings, person.upper)

    def _arm_joints(self, side: int) -> tuple[Joint, Joint, Joint]:
        person, pose = self.person, self.pose
        angle = -side * pose.swing * math.sin(pose.phase)
        bend = pose.bend
        if pose.raised == side:
            angle, bend = 0.5, 2.2
        x = side * person.shoulder * 0.98
        shoulder = (x, self.shoulder_y - 0.012, pose.lean)
        out = side * (0.02 + 0.03 * (person.girth - 0.8))
        elbow = (x + out, shoulder[1] - 0.165 * math.cos(angle), 0.165 * math.sin(angle))
        low = angle + bend
        hand = (x + out, elbow[1] - 0.165 * math.cos(low), elbow[2] + 0.165 * math.sin(low))
        return shoulder, elbow, hand

    def _arm(self, side: int) -> None:
        person = self.person
        shoulder, elbow, hand = self._arm_joints(side)
        thick = 0.037 * person.girth**0.6
        far = 0.8 if self.view.depth(side, 0.0) < 0 else 0.95
        near = self.view.depth(side, 0.0) >= 0
        carries = person.bag in ("handbag", "messenger") and side == person.bag_side
        if carries and not near:
            self._side_bag(hand, far)
        skin, cloth = _tone(person.skin, far), _tone(person.sleeve_colour, far)
        full = person.sleeve > 0.9
        self._limb(elbow, hand, thick * 0.8, thick * 0.66, cloth if full else skin)
        self._limb(hand, (hand[0], hand[1] - 0.012, hand[2]), 0.022, 0.018, skin)
        self._limb(shoulder, elbow, thick, thick * 0.82, cloth if person.sleeve > 0.4 else skin)
        if person.upper.pattern in ("stripes", "checks") and person.sleeve > 0.4:
            self._bands(shoulder, elbow, thick)
            if full:
                self._bands(elbow, hand, thick * 0.8)
        if carries and near:
            self._side_bag(hand, far)

    def _bands(self, a: Joint, b: Joint, thick: float) -> None:
        """Stripes across a sleeve."""
        (ax, ay), (bx, by) = self.view.point(*a), self.view.point(*b)
        wide = thick * self.view.scale(a[1]) * 0.92
        step = max(4.0, self.person.upper.period * self.view.unit)
        count = int(abs(by - ay) / step)
        for k in range(count):
            t = (k + 0.5) / max(1, count)
            x, y = ax + (bx - ax) * t, ay + (by - ay) * t
            fill = _tone(self.person.upper.accent, 0.92)
            self.draw.rectangle((x - wide, y, x + wide, y + step * 0.4), fill=fill)

    def _side_bag(self, hand: Joint, far: float) -> None:
        person = self.person
        colour = _tone(person.bag_colour, far)
        size = 0.12 * person.bag_size
        side = person.bag_side
        if person.bag == "handbag":
            grip = self.view.point(*hand)
            centre = (hand[0] + side * 0.012, hand[1] - 0.055 - size / 2, hand[2])
            middle = self.view.point(centre[0], centre[1] + size / 2, centre[2])
            self.draw.line((*grip, *middle), fill=_tone(colour, 0.7), width=4)
            self._box(centre, (0.05, size, size * 1.25), colour)
            return
        centre = (side * (person.hip + 0.05), person.leg + 0.02, -0.01)
        over = self.view.point(-side * person.shoulder * 0.5, self.shoulder_y + 0.015, 0.0)
        self.draw.line((*over, *self.view.point(*centre)), fill=_tone(colour, 0.8), width=6)
        self._box(centre, (0.055, size * 0.95, size * 1.4), colour)

    def _backpack(self) -> None:
        size = self.person.bag_size
        tall, deep = 0.235 * size, 0.1 * size
        centre = (0.0, self.shoulder_y - 0.01 - tall / 2, -0.055 * self.person.girth - deep / 2)
        self._box(centre, (0.19 * size, tall, deep), self.person.bag_colour)

    def _straps(self) -> None:
        person = self.person
        depth = 0.06 * person.girth
        for side in (-1, 1):
            x = side * person.shoulder * 0.55
            top = self.view.point(x, self.shoulder_y + 0.02, depth * 0.3)
            low = self.view.point(x * 1.2, self.shoulder_y - 0.19, depth)
            self.draw.line((*top, *low), fill=_tone(person.bag_colour, 0.9), width=8)

    def _ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        self.draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)

    def _head(self) -> None:
        person, view = self.person, self.view
        yaw = view.yaw + self.pose.turn
        tall = 0.068 * person.head
        base = (0.0, 0.995 - tall, self.pose.lean + 0.012)
        self._limb((0.0, 0.82, self.pose.lean), base, 0.032, 0.03, _tone(person.skin, 0.85))
        x, y = view.point(*base)
        unit = view.scale(0.93)
        rx = 0.054 * person.head * unit * (1.0 + 0.12 * abs(math.sin(yaw)))
        ry = tall * unit
        hair = _tone(person.skin, 0.95) if person.hair_style == "bald" else person.hair
        front = math.cos(yaw) > -0.1
        if front:
            self._hair(x, y, rx, ry, yaw)
        self._ellipse(x, y, rx, ry, hair)
        reach = max(0.0, (math.cos(yaw) + 0.5) / 1.5) ** 0.5
        if reach > 0.0:
            face = rx * (0.35 + 0.5 * reach)
            slide = math.sin(yaw) * (rx - face) * 1.02
            self._ellipse(x + slide, y + ry * 0.16, face, ry * 0.82, person.skin)
            self._ellipse(x + slide, y + ry * 0.95, face * 0.5, ry * 0.1, _tone(person.skin, 0.8))
        if not front:
            self._hair(x, y, rx, ry, yaw)
        self._hat(x, y, rx, ry, yaw)

    def _hair(self, x: float, y: float, rx: float, ry: float, yaw: float) -> None:
        """What hangs or is tied behind the head."""
        style, colour = self.person.hair_style, self.person.hair
        back = x - math.sin(yaw) * rx * 0.5
        if style in ("long", "bob"):
            fall = 2.5 if style == "long" else 1.15
            self.draw.rounded_rectangle(
                (back - rx * 1.08, y - ry * 0.6, back + rx * 1.08, y + ry * fall), rx * 0.9, colour
            )
        elif style == "tail":
            tail = x - math.sin(yaw) * rx * 1.15
            self.draw.rounded_rectangle(
                (tail - rx * 0.38, y - ry * 0.3, tail + rx * 0.38, y + ry * 2.0), rx * 0.3, colour
            )
        elif style == "bun":
            knot = x - math.sin(yaw) * rx * 0.9
            self._ellipse(knot, y - ry * 0.95, rx * 0.5, ry * 0.4, colour)

    def _hat(self, x: float, y: float, rx: float, ry: float, yaw: float) -> None:
        hat, colour = self.person.hat, self.person.hat_colour
        if hat == "none":
            return
        top, rim = y - ry * 1.12, y - ry * 0.25
        box = (x - rx * 1.1, top, x + rx * 1.1, 2 * rim - top)
        self.draw.chord(box, 180, 360, fill=colour)
        dark = _tone(colour, 0.75)
        if hat == "beanie":
            self.draw.rectangle((x - rx * 1.08, rim - ry * 0.2, x + rx * 1.08, rim), fill=dark)
        elif hat == "brim":
            self.draw.ellipse((x - rx * 1.8, rim - 4, x + rx * 1.8, rim + 5), fill=dark)
        elif math.cos(yaw) > -0.4:
            tip = x + math.sin(yaw) * rx * 0.9
            self.draw.ellipse((tip - rx * 0.95, rim - 3, tip + rx * 0.95, rim + 5), fill=dark)


# ---------------------------------------------------------------------------- crops


def _view(rng: np.random.Generator, camera: Camera, yaw: float) -> View:
    """Where the detector's box puts a person: never quite the same twice."""
    width, height = WIDTH * SUPER, HEIGHT * SUPER
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


def _moved(view: View, across: float, down: float, scale: float, yaw: float) -> View:
    """The view of somebody who stands elsewhere."""
    return replace(
        view,
        centre=view.centre + across * WIDTH * SUPER,
        foot=view.foot + down * HEIGHT * SUPER,
        unit=view.unit * scale,
        yaw=yaw,
    )


def _backdrop(rng: np.random.Generator, camera: Camera) -> Image.Image:
    """A piece of the camera's scene, somewhere along the way that people walk."""
    scene = _scene(camera)
    width, height = WIDTH * SUPER, HEIGHT * SUPER
    zoom = float(rng.uniform(0.86, 1.0))
    left = float(rng.uniform(0, scene.width - width * zoom))
    top = float(rng.uniform(0, height * (1 - zoom)))
    box = (left, top, left + width * zoom, top + height * zoom)
    return scene.resize((width, height), Image.Resampling.BILINEAR, box=box)


def _stranger(rng: np.random.Generator, image: Image.Image, camera: Camera, view: View) -> None:
    """Another person, beside or behind the one that the crop is about."""
    pose = _pose(rng, camera.heading)
    _Figure(image, make_person(rng), pose, view, camera.light).paint()


def _behind(rng: np.random.Generator, image: Image.Image, camera: Camera, view: View) -> None:
    """Somebody in the distance, now and then."""
    if rng.random() < 0.2:
        across = float(rng.uniform(0.25, 0.6)) * (1 if rng.random() < 0.5 else -1)
        scale = float(rng.uniform(0.5, 0.85))
        far = _moved(view, across, -0.12 * (1 - scale) - 0.04, scale, view.yaw)
        _stranger(rng, image, camera, far)


def _before(rng: np.random.Generator, image: Image.Image, camera: Camera, view: View) -> None:
    """What hides a part of the person, now and then."""
    width, height = image.size
    draw = ImageDraw.Draw(image, "RGBA")
    kind = _pick(rng, {"none": 6.6, "pole": 1.0, "rail": 0.8, "object": 1.1, "person": 0.9})
    colour = _colour(rng, _GROUND + _CLOTH[:6], 16)
    if kind == "pole":
        x, thick = float(rng.uniform(0, width)), float(rng.uniform(8, 24))
        draw.rectangle((x, 0, x + thick, height), fill=colour)
        draw.rectangle((x, 0, x + thick * 0.35, height), fill=_tone(colour, 1.2))
    elif kind == "rail":
        y = float(rng.uniform(0.55, 0.85)) * height
        for k in range(3):
            draw.rectangle((0, y + 30 * k, width, y + 30 * k + 8), fill=colour)
    elif kind == "object":
        y, x = float(rng.uniform(0.6, 0.9)) * height, float(rng.uniform(-0.6, 0.7)) * width
        box = (x, y, x + float(rng.uniform(0.5, 1.0)) * width, height + 40)
        draw.rounded_rectangle(box, 14, fill=colour, outline=_tone(colour, 0.7), width=4)
    elif kind == "person":
        across = float(rng.uniform(0.42, 0.62)) * (1 if rng.random() < 0.5 else -1)
        _stranger(rng, image, camera, _moved(view, across, 0.04, 1.05, view.yaw))


def _cast_shadow(rng: np.random.Generator, image: Image.Image) -> None:
    """The shadow of a building or a tree over a part of the crop, now and then."""
    if rng.random() > 0.3:
        return
    width, height = image.size
    a, b = (float(v) for v in rng.uniform(0.1, 0.9, 2))
    if rng.random() < 0.5:
        shape = ((0.0, a * height), (width, b * height), (width, height), (0.0, height))
    else:
        shape = ((a * width, 0.0), (width, 0.0), (width, height), (b * width, height))
    depth = int(rng.integers(50, 120))
    ImageDraw.Draw(image, "RGBA").polygon(shape, fill=(12, 14, 30, depth))


@lru_cache(maxsize=128)
def _illumination(camera: Camera) -> Image.Image:
    """Side light and the lens's dark corners, as a factor for each pixel."""
    y, x = np.mgrid[-1.0 : 1.0 : HEIGHT * 1j, -1.0 : 1.0 : WIDTH * 1j]
    field = 1.0 + 0.5 * camera.light * x - 0.1 * y - 0.1 * (x * x + y * y)
    field = np.clip(field / field.max(), 0.25, 1.0)
    return Image.fromarray(np.round(255 * field).astype(np.uint8)).convert("RGB")


def _curve(camera: Camera, exposure: float) -> list[int]:
    """The tone curve, one entry for each level."""
    table = []
    for level in range(256):
        value = min(1.0, level / 255 * exposure) ** camera.gamma
        value = camera.black + (camera.white - camera.black) * value
        table.append(min(255, max(0, round(255 * value))))
    return table


def _matrix(camera: Camera, drift: Sequence[float]) -> tuple[float, ...]:
    """Saturation and colour cast, as rows of a colour matrix."""
    rows: list[float] = []
    luma = (0.299, 0.587, 0.114)
    for k, gain in enumerate(camera.gains):
        keep = [camera.saturation * (k == j) for j in range(3)]
        mix = [(1 - camera.saturation) * weight for weight in luma]
        rows += [gain * drift[k] * (a + b) for a, b in zip(keep, mix, strict=True)]
        rows.append(0.0)
    return tuple(rows)


def _develop(rng: np.random.Generator, image: Image.Image, camera: Camera) -> Image.Image:
    """From the scene in front of a camera to what its sensor makes of it."""
    image = image.reduce(SUPER)
    detail = camera.detail * float(rng.uniform(0.75, 1.0))
    small = (max(16, round(WIDTH * detail)), max(32, round(HEIGHT * detail)))
    image = image.resize(small, Image.Resampling.BILINEAR)
    image = image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    image = ImageChops.multiply(image, _illumination(camera))
    image = image.convert("RGB", _matrix(camera, rng.uniform(0.95, 1.05, 3).tolist()))
    image = image.point(_curve(camera, float(rng.uniform(0.8, 1.2))) * 3)
    image = image.filter(ImageFilter.GaussianBlur(camera.blur * float(rng.uniform(0.6, 1.4))))
    pixels = np.asarray(image, dtype=np.float32)
    luma = rng.standard_normal((HEIGHT, WIDTH, 1), dtype=np.float32) * camera.noise
    chroma = rng.standard_normal((HEIGHT, WIDTH, 3), dtype=np.float32) * (0.5 * camera.noise)
    return Image.fromarray(np.clip(pixels + luma + chroma, 0, 255).astype(np.uint8))


def _encode(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def draw_person(seed: int, pid: int, camid: int, index: int) -> bytes:
    """A crop of an identity.

    Args:
        seed: The data set's seed.
        pid: The identity's number, 0 or more.
        camid: The camera's number, 1 or more.
        index: Which of the identity's crops before this camera.

    Returns:
        A JPEG of 64 x 128 pixels; the same bytes for the same arguments.
    """
    return _draw(_rng(seed, _CROP, pid, camid, index), person_of(seed, pid), seed, camid)


def _draw(rng: np.random.Generator, person: Person, seed: int, camid: int) -> bytes:
    camera = camera_of(seed, camid)
    pose = _pose(rng, camera.heading)
    image = _backdrop(rng, camera)
    view = _view(rng, camera, pose.yaw)
    _behind(rng, image, camera, view)
    _Figure(image, person, pose, view, camera.light).paint()
    _cast_shadow(rng, image)
    _before(rng, image, camera, view)
    return _encode(_develop(rng, image, camera), camera.quality)


def draw_distractor(seed: int, camid: int, index: int) -> bytes:
    """A crop that belongs to no identity: a stranger, or a piece of the scene.

    Args:
        seed: The data set's seed.
        camid: The camera's number, 1 or more.
        index: Which of the camera's distractors.

    Returns:
        A JPEG of 64 x 128 pixels; the same bytes for the same arguments.
    """
    rng = _rng(seed, _DISTRACTOR, camid, index)
    if rng.random() < 0.6:
        return _draw(rng, make_person(rng), seed, camid)
    camera = camera_of(seed, camid)
    image = _backdrop(rng, camera)
    _before(rng, image, camera, _view(rng, camera, 0.0))
    return _encode(_develop(rng, image, camera), camera.quality)


def draw_junk(seed: int, camid: int, index: int) -> bytes:
    """A detector's mistake: a person's fragment at the border, or nothing but the scene.

    Args:
        seed: The data set's seed.
        camid: The camera's number, 1 or more.
        index: Which of the camera's mistakes.

    Returns:
        A JPEG of 64 x 128 pixels; the same bytes for the same arguments.
    """
    rng = _rng(seed, _JUNK, camid, index)
    camera = camera_of(seed, camid)
    image = _backdrop(rng, camera)
    if rng.random() < 0.75:
        across = float(rng.uniform(0.3, 0.7)) * (1 if rng.random() < 0.5 else -1)
        down = float(rng.uniform(-0.6, 0.6))
        place = _moved(_view(rng, camera, 0.0), across, down, float(rng.uniform(1.0, 1.8)), 0.0)
        _stranger(rng, image, camera, place)
    return _encode(_develop(rng, image, camera), camera.quality)
