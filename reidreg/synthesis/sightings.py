"""Which camera sees which identity, and in how many images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from reidreg.synthesis.request import Request
from reidreg.synthesis.streams import OFFICIAL, SIGHTINGS, random_stream

# pid, camid, number of images
Sighting = tuple[int, int, int]
# The official AIHub KAIST folders: identities and images.
TRAIN_FOLDERS = {
    "bounding_box_train_1": (188, 20_119),
    "bounding_box_train_2": (175, 18_476),
    "bounding_box_train_3": (175, 18_495),
}
# Test identities, query images, gallery images: in the sample folders, and the rest.
_TEST_GROUPS = ((100, 732, 11_047), (45, 333, 4_338))
_OFFICIAL_CAMERAS = 16
_FIRST_TEST_PID = 1001


def requested_sightings(request: Request) -> tuple[dict[str, list[Sighting]], list[Sighting]]:
    """Sightings for the numbers of a request: three training identities for each test identity.

    Returns:
        Training folder -> sightings, and the sightings of the test split.
    """
    tested = max(2, round(request.identities / 4))
    trained = request.identities - tested
    if request.layout == "aihub_kaist":
        # With more than a thousand training identities, the test pids start at a later thousand.
        start, first_test = 0, math.ceil(max(1, trained - 1) / 1000) * 1000 + 1
        sizes = apportion(trained, [people for people, _ in TRAIN_FOLDERS.values()], least=2)
        folders = dict(zip(TRAIN_FOLDERS, sizes, strict=True))
    else:
        start, first_test, folders = 1, trained + 1, {"bounding_box_train": trained}
    train = {}
    for folder, people in folders.items():
        train[folder] = _draw_cameras(request, range(start, start + people))
        start += people
    return train, _draw_cameras(request, range(first_test, first_test + tested))


def _draw_cameras(request: Request, pids: range) -> list[Sighting]:
    """Draw the cameras that see each identity; the first one rotates, so that all are used."""
    sightings = []
    for position, pid in enumerate(pids):
        rng = random_stream(request.seed, SIGHTINGS, pid)
        first = position % request.cameras + 1
        others = [camid for camid in range(1, request.cameras + 1) if camid != first]
        fewest = max(1, math.ceil(0.6 * request.cameras) - 1)
        count = int(rng.integers(fewest, len(others) + 1))
        chosen = rng.permutation(others)[:count].tolist()
        sightings += [(pid, camid, request.images_per_camera) for camid in sorted([first, *chosen])]
    return sightings


def official_sightings(seed: int) -> tuple[dict[str, list[Sighting]], list[Sighting]]:
    """Sightings that add up to the counts of AIHub KAIST; returns as `requested_sightings`."""
    rng = random_stream(seed, OFFICIAL)
    train = {}
    start = 0
    for folder, (people, images) in TRAIN_FOLDERS.items():
        widths = rng.integers(5, 12, people).tolist()
        train[folder] = _spread_images(rng, start, widths, images, least=1)
        start += people
    test = []
    start = _FIRST_TEST_PID
    for people, queries, gallery in _TEST_GROUPS:
        # Each camera gives one query image and at least one gallery image of whom it sees.
        widths = apportion(queries, rng.uniform(0.6, 1.4, people).tolist(), least=2)
        test += _spread_images(rng, start, widths, queries + gallery, least=2)
        start += people
    return train, test


def _spread_images(
    rng: np.random.Generator, start: int, widths: Sequence[int], images: int, least: int
) -> list[Sighting]:
    """Spread images over identities, the n-th of which is seen by `widths[n]` cameras."""
    pairs = [
        (start + position, int(camid) + 1)
        for position, width in enumerate(widths)
        for camid in sorted(rng.permutation(_OFFICIAL_CAMERAS)[:width])
    ]
    counts = apportion(images, rng.uniform(0.2, 1.0, len(pairs)).tolist(), least)
    return [(pid, camid, count) for (pid, camid), count in zip(pairs, counts, strict=True)]


def apportion(total: int, weights: Sequence[float], least: int) -> list[int]:
    """Split a total in proportion to weights, by the method of largest remainders.

    Args:
        total: What the parts add up to.
        weights: One for each part.
        least: The smallest part.
    """
    parts = np.asarray(weights, dtype=np.float64)
    parts = parts / parts.sum() * (total - least * len(parts))
    whole = np.floor(parts).astype(np.int64)
    rest = total - least * len(parts) - int(whole.sum())
    whole[np.argsort(whole - parts, kind="stable")[:rest]] += 1
    return [int(count) + least for count in whole]
