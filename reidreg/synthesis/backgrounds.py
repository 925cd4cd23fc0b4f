"""Backgrounds: one wide scene for each camera, from which crops are cut."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from reidreg.synthesis.cameras import Camera
from reidreg.synthesis.canvas import CANVAS_HEIGHT, CANVAS_WIDTH, SCENE_WIDTH, steps
from reidreg.synthesis.colours import CLOTH, GROUND, pick_colour, tone
from reidreg.synthesis.streams import SCENE, random_stream


def _ground_line(camera: Camera) -> int:
    """The row where the ground ends; a camera that looks down steeply sees more ground."""
    return round(CANVAS_HEIGHT * (0.62 - 1.1 * camera.pitch))


def _draw_wall(draw: ImageDraw.ImageDraw, rng: np.random.Generator, line: int) -> None:
    """Bricks or large panels."""
    base = pick_colour(rng, ((150, 96, 78), (176, 168, 154), (128, 128, 130), (196, 184, 150)), 16)
    mortar = tone(base, 0.78)
    draw.rectangle((0, 0, SCENE_WIDTH, line), fill=base)
    course, length = (14.0, 40.0) if rng.random() < 0.5 else (70.0, 150.0)
    for row, top in enumerate(steps(line % course - course, line, course)):
        draw.line((0, top, SCENE_WIDTH, top), fill=mortar, width=2)
        for x in steps(row % 2 * length / 2, SCENE_WIDTH, length):
            draw.line((x, top, x, top + course), fill=mortar, width=2)


def _draw_glass(draw: ImageDraw.ImageDraw, rng: np.random.Generator, line: int) -> None:
    """Shop windows with frames and posters."""
    frame = pick_colour(rng, ((60, 62, 66), (200, 200, 198), (90, 70, 58)), 14)
    draw.rectangle((0, 0, SCENE_WIDTH, line), fill=frame)
    panes = ((96, 118, 132), (56, 68, 78), (160, 172, 172), (206, 196, 160))
    for x in steps(10, SCENE_WIDTH, 160):
        pane = pick_colour(rng, panes, 22)
        draw.rectangle((x, -5, x + 144, line - 12), fill=pane)
        draw.polygon(
            ((x + 30, 0), (x + 66, 0), (x + 30, line - 12), (x, line - 12)), fill=tone(pane, 1.13)
        )
        if rng.random() < 0.5:
            top = float(rng.uniform(10, max(11, line - 110)))
            draw.rectangle((x + 60, top, x + 118, top + 76), fill=pick_colour(rng, CLOTH, 20))


def _draw_fence(draw: ImageDraw.ImageDraw, rng: np.random.Generator, line: int) -> None:
    """A hedge or sky behind bars."""
    base = pick_colour(rng, ((74, 96, 58), (176, 190, 204), (116, 126, 96)), 14)
    draw.rectangle((0, 0, SCENE_WIDTH, line), fill=base)
    for _ in range(260):
        x, y = rng.uniform(0, SCENE_WIDTH), rng.uniform(0, line)
        r = rng.uniform(6, 26)
        leaf = tone(base, float(rng.uniform(0.72, 1.22)))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=leaf)
    bar = pick_colour(rng, ((50, 54, 56), (190, 192, 190), (70, 96, 80)), 10)
    for x in steps(0, SCENE_WIDTH, float(rng.uniform(22, 46))):
        draw.rectangle((x, line * 0.25, x + 5, line + 6), fill=bar)
    for y in (line * 0.28, line * 0.92):
        draw.rectangle((0, y, SCENE_WIDTH, y + 7), fill=bar)


def _draw_street(draw: ImageDraw.ImageDraw, rng: np.random.Generator, line: int) -> None:
    """Parked cars under a far facade."""
    base = pick_colour(rng, ((150, 148, 146), (178, 160, 138), (112, 116, 124)), 16)
    draw.rectangle((0, 0, SCENE_WIDTH, line), fill=base)
    for x in steps(20, SCENE_WIDTH, 90):
        for y in steps(line % 80 - 70, line - 90, 80):
            draw.rectangle((x, y, x + 44, y + 50), fill=tone(base, float(rng.uniform(0.5, 0.8))))
    for x in steps(float(rng.uniform(-80, 0)), SCENE_WIDTH, 290):
        paint = pick_colour(rng, CLOTH, 16)
        draw.rounded_rectangle((x, line - 66, x + 230, line + 16), 26, fill=paint)
        roof, belt = line - 112, line - 62
        cabin = ((x + 46, belt), (x + 76, roof), (x + 168, roof), (x + 200, belt))
        draw.polygon(cabin, fill=tone(paint, 0.72))
        for wheel in (x + 48, x + 182):
            draw.ellipse((wheel - 22, line - 6, wheel + 22, line + 38), fill=(26, 26, 28))


def _draw_indoor(draw: ImageDraw.ImageDraw, rng: np.random.Generator, line: int) -> None:
    """A corridor with doors and a skirting board."""
    base = pick_colour(rng, ((214, 208, 192), (186, 196, 204), (202, 190, 190)), 12)
    draw.rectangle((0, 0, SCENE_WIDTH, line), fill=base)
    for x in steps(float(rng.uniform(0, 120)), SCENE_WIDTH, float(rng.uniform(230, 330))):
        door = pick_colour(rng, ((128, 92, 62), (86, 92, 104), (168, 60, 52), (224, 222, 214)), 12)
        draw.rectangle((x, line * 0.1, x + 104, line), fill=door)
        draw.rectangle((x + 12, line * 0.2, x + 92, line * 0.55), fill=tone(door, 0.85))
    draw.rectangle((0, line - 14, SCENE_WIDTH, line), fill=tone(base, 0.55))


_BACKDROPS = (_draw_wall, _draw_glass, _draw_fence, _draw_street, _draw_indoor)


def _draw_ground(draw: ImageDraw.ImageDraw, rng: np.random.Generator, line: int) -> None:
    """Tiles, planks or asphalt that run towards the camera."""
    base = pick_colour(rng, GROUND, 12)
    bottom = CANVAS_HEIGHT
    draw.rectangle((0, line, SCENE_WIDTH, bottom), fill=base)
    joint = tone(base, float(rng.choice([0.72, 0.84, 1.2])))
    gap, step = 7.0, float(rng.uniform(1.18, 1.5))
    y = line + gap
    while y < bottom:
        draw.line((0, y, SCENE_WIDTH, y), fill=joint, width=2)
        gap *= step
        y += gap
    if rng.random() < 0.7:
        middle, pitch = SCENE_WIDTH / 2, float(rng.uniform(46, 120))
        for x in steps(-2 * SCENE_WIDTH, 3 * SCENE_WIDTH, pitch):
            draw.line((middle + (x - middle) * 0.45, line, x, bottom), fill=joint, width=2)


@lru_cache(maxsize=128)
def _scene(camera: Camera) -> Image.Image:
    """The whole background of a camera."""
    rng = random_stream(camera.seed, SCENE, camera.camid)
    image = Image.new("RGB", (SCENE_WIDTH, CANVAS_HEIGHT))
    draw = ImageDraw.Draw(image)
    line = _ground_line(camera)
    first = int(random_stream(camera.seed, SCENE).integers(len(_BACKDROPS)))
    _BACKDROPS[(first + camera.camid) % len(_BACKDROPS)](draw, rng, line)
    _draw_ground(draw, rng, line)
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.6, 2.2))))
    grain = rng.normal(0.0, 7.0, (CANVAS_HEIGHT // 4, SCENE_WIDTH // 4))
    stain = rng.normal(0.0, 12.0, (6, 24))
    for field in (grain, stain):
        layer = Image.fromarray(np.clip(128 + field, 0, 255).astype(np.uint8))
        layer = layer.resize(image.size, Image.Resampling.BICUBIC).convert("RGB")
        image = ImageChops.add(image, layer, 1.0, -128)
    return image


def cut_backdrop(rng: np.random.Generator, camera: Camera) -> Image.Image:
    """Cut a random piece of canvas size from the camera's scene."""
    scene = _scene(camera)
    width, height = CANVAS_WIDTH, CANVAS_HEIGHT
    zoom = float(rng.uniform(0.86, 1.0))
    left = float(rng.uniform(0, scene.width - width * zoom))
    top = float(rng.uniform(0, height * (1 - zoom)))
    box = (left, top, left + width * zoom, top + height * zoom)
    return scene.resize((width, height), Image.Resampling.BILINEAR, box=box)
