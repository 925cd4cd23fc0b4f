"""Draw the crops that a pedestrian detector would cut.

A person is a fixed set of traits, a camera a fixed viewpoint, light, lens and scene, and a crop one
person in one pose before one camera. Each of the three has its own random stream, so that a crop
depends on its arguments alone and not on the order of drawing.
"""

from __future__ import annotations

import numpy as np

from reidreg.synthesis.backgrounds import cut_backdrop
from reidreg.synthesis.cameras import camera_of
from reidreg.synthesis.figures import Figure
from reidreg.synthesis.occlusion import add_bystander, add_occluder, add_random_person, add_shadow
from reidreg.synthesis.people import Person, make_person, person_of
from reidreg.synthesis.photometry import develop, encode
from reidreg.synthesis.poses import make_pose
from reidreg.synthesis.projection import make_view, moved
from reidreg.synthesis.streams import CROP, DISTRACTOR_CROP, JUNK_CROP, random_stream


def draw_person(seed: int, pid: int, camid: int, index: int) -> bytes:
    """Draw a crop of an identity.

    Args:
        seed: The data set's seed.
        pid: The identity, 0 or more.
        camid: The camera, 1 or more.
        index: Numbers the crops of this identity and camera.

    Returns:
        A JPEG of 64 x 128 pixels; the same bytes for the same arguments.
    """
    return _draw(random_stream(seed, CROP, pid, camid, index), person_of(seed, pid), seed, camid)


def draw_distractor(seed: int, camid: int, index: int) -> bytes:
    """Draw a crop of no identity: some other person, or a piece of the scene.

    Args:
        seed: The data set's seed.
        camid: The camera, 1 or more.
        index: Numbers the camera's distractors.

    Returns:
        A JPEG of 64 x 128 pixels; the same bytes for the same arguments.
    """
    rng = random_stream(seed, DISTRACTOR_CROP, camid, index)
    if rng.random() < 0.6:
        return _draw(rng, make_person(rng), seed, camid)
    camera = camera_of(seed, camid)
    image = cut_backdrop(rng, camera)
    add_occluder(rng, image, camera, make_view(rng, camera, 0.0))
    return encode(develop(rng, image, camera), camera.quality)


def draw_junk(seed: int, camid: int, index: int) -> bytes:
    """Draw a false detection: a fragment of a person, or the scene alone.

    Args:
        seed: The data set's seed.
        camid: The camera, 1 or more.
        index: Numbers the camera's junk crops.

    Returns:
        A JPEG of 64 x 128 pixels; the same bytes for the same arguments.
    """
    rng = random_stream(seed, JUNK_CROP, camid, index)
    camera = camera_of(seed, camid)
    image = cut_backdrop(rng, camera)
    if rng.random() < 0.75:
        across = float(rng.uniform(0.3, 0.7)) * (1 if rng.random() < 0.5 else -1)
        down = float(rng.uniform(-0.6, 0.6))
        view = make_view(rng, camera, 0.0)
        scale = float(rng.uniform(1.0, 1.8))
        add_random_person(rng, image, camera, moved(view, across, down, scale, yaw=0.0))
    return encode(develop(rng, image, camera), camera.quality)


def _draw(rng: np.random.Generator, person: Person, seed: int, camid: int) -> bytes:
    camera = camera_of(seed, camid)
    pose = make_pose(rng, camera.heading)
    image = cut_backdrop(rng, camera)
    view = make_view(rng, camera, pose.yaw)
    add_bystander(rng, image, camera, view)
    Figure(image, person, pose, view, camera.light).paint()
    add_shadow(rng, image)
    add_occluder(rng, image, camera, view)
    return encode(develop(rng, image, camera), camera.quality)
