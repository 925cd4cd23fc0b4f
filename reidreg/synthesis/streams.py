"""Random streams: one for each thing that is drawn, so that the order of drawing is irrelevant."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping

import numpy as np

# The first number of a key, one for each kind of stream.
PERSON, CAMERA, SCENE, CROP, DISTRACTOR_CROP, JUNK_CROP = range(6)
FILE_NAMES, SIGHTINGS, OFFICIAL = 100, 101, 102


def random_stream(seed: int, *key: int) -> np.random.Generator:
    """The generator for a key: a kind from above, then what identifies one thing of that kind."""
    return np.random.default_rng([seed, *key])


def pick(rng: np.random.Generator, odds: Mapping[str, float]) -> str:
    """Draw a name with probability proportional to its odds."""
    at = float(rng.random()) * sum(odds.values())
    bounds = list(itertools.accumulate(odds.values()))
    return list(odds)[min(bisect.bisect_right(bounds, at), len(bounds) - 1)]
