"""What surrounds and hides a person: other people, objects, shadows."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from reidreg.synthesis.cameras import Camera
from reidreg.synthesis.colours import CLOTH, GROUND, pick_colour, tone
from reidreg.synthesis.figures import Figure
from reidreg.synthesis.people import make_person
from reidreg.synthesis.poses import make_pose
from reidreg.synthesis.projection import View, moved
from reidreg.synthesis.streams import pick


def add_random_person(
    rng: np.random.Generator, image: Image.Image, camera: Camera, view: View
) -> None:
    """Draw a random person into a view."""
    pose = make_pose(rng, camera.heading)
    Figure(image, make_person(rng), pose, view, camera.light).paint()


def add_bystander(rng: np.random.Generator, image: Image.Image, camera: Camera, view: View) -> None:
    """Draw another person in the distance into one crop of five."""
    if rng.random() < 0.2:
        across = float(rng.uniform(0.25, 0.6)) * (1 if rng.random() < 0.5 else -1)
        scale = float(rng.uniform(0.5, 0.85))
        far = moved(view, across, -0.12 * (1 - scale) - 0.04, scale, view.yaw)
        add_random_person(rng, image, camera, far)


def add_occluder(rng: np.random.Generator, image: Image.Image, camera: Camera, view: View) -> None:
    """Draw something that hides a part of the person, or nothing."""
    width, height = image.size
    draw = ImageDraw.Draw(image, "RGBA")
    kind = pick(rng, {"none": 6.6, "pole": 1.0, "rail": 0.8, "object": 1.1, "person": 0.9})
    colour = pick_colour(rng, GROUND + CLOTH[:6], 16)
    if kind == "pole":
        x, thick = float(rng.uniform(0, width)), float(rng.uniform(8, 24))
        draw.rectangle((x, 0, x + thick, height), fill=colour)
        draw.rectangle((x, 0, x + thick * 0.35, height), fill=tone(colour, 1.2))
    elif kind == "rail":
        y = float(rng.uniform(0.55, 0.85)) * height
        for k in range(3):
            draw.rectangle((0, y + 30 * k, width, y + 30 * k + 8), fill=colour)
    elif kind == "object":
        y, x = float(rng.uniform(0.6, 0.9)) * height, float(rng.uniform(-0.6, 0.7)) * width
        box = (x, y, x + float(rng.uniform(0.5, 1.0)) * width, height + 40)
        draw.rounded_rectangle(box, 14, fill=colour, outline=tone(colour, 0.7), width=4)
    elif kind == "person":
        across = float(rng.uniform(0.42, 0.62)) * (1 if rng.random() < 0.5 else -1)
        add_random_person(rng, image, camera, moved(view, across, 0.04, 1.05, view.yaw))


def add_shadow(rng: np.random.Generator, image: Image.Image) -> None:
    """Draw the shadow of a building or a tree over a part of some crops."""
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
