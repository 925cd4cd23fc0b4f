"""Poses: how a person walks and turns in one crop, and where their joints are then."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from reidreg.synthesis.people import SHOULDER_HEIGHT, Person
from reidreg.synthesis.projection import Joint


@dataclass(frozen=True, slots=True)
class Pose:
    """How a person stands or walks in one crop.

    Args:
        yaw: Where they face, in radians; 0 is towards the camera.
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


def make_pose(rng: np.random.Generator, heading: float) -> Pose:
    """Draw a pose of a person who walks along `heading`, in either direction."""
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


def leg_joints(person: Person, pose: Pose, side: int) -> tuple[Joint, Joint, Joint]:
    """Hip, knee and ankle; side is 1 for the left and -1 for the right."""
    angle = side * pose.stride * math.sin(pose.phase)
    flex = pose.stride * max(0.0, side * math.cos(pose.phase)) * 1.3
    half = (person.leg - 0.04) / 2
    x = side * person.hip * 0.52
    hip = (x, person.leg, 0.0)
    knee = (x, person.leg - half * math.cos(angle), half * math.sin(angle))
    low = angle - flex
    ankle = (x, knee[1] - half * math.cos(low), knee[2] + half * math.sin(low))
    return hip, knee, ankle


def arm_joints(person: Person, pose: Pose, side: int) -> tuple[Joint, Joint, Joint]:
    """Shoulder, elbow and hand; side is 1 for the left and -1 for the right."""
    angle = -side * pose.swing * math.sin(pose.phase)
    bend = pose.bend
    if pose.raised == side:
        angle, bend = 0.5, 2.2
    x = side * person.shoulder * 0.98
    shoulder = (x, SHOULDER_HEIGHT - 0.012, pose.lean)
    out = side * (0.02 + 0.03 * (person.girth - 0.8))
    elbow = (x + out, shoulder[1] - 0.165 * math.cos(angle), 0.165 * math.sin(angle))
    low = angle + bend
    hand = (x + out, elbow[1] - 0.165 * math.cos(low), elbow[2] + 0.165 * math.sin(low))
    return shoulder, elbow, hand
