"""The images of a data set: folders, file names, and what each image shows."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from reidreg.synthesis.request import Request
from reidreg.synthesis.sightings import Sighting, apportion, official_sightings, requested_sightings
from reidreg.synthesis.streams import FILE_NAMES, random_stream
from reidreg.values import JUNK

Kind = Literal["person", "distractor", "junk"]
Counts = dict[str, tuple[int, int, int]]
# Official numbers of images: sample_train, sample_query_reduced, sample_test_reduced.
_SAMPLE_TRAIN, _SAMPLE_QUERY, _SAMPLE_GALLERY = 2_838, 382, 1_199


@dataclass(frozen=True, slots=True)
class Crop:
    """One image to draw.

    Args:
        folder: The folder that holds it.
        name: Its file name.
        kind: An identity, a distractor (pid 0 in Market-1501), or junk (pid -1).
        pid: The number in its name.
        camid: The camera, from 1.
        index: Numbers the images of this pid from this camera.
    """

    folder: str
    name: str
    kind: Kind
    pid: int
    camid: int
    index: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All images of a data set.

    Args:
        crops: The images to draw.
        copies: Further folder -> images of `crops` that it holds as well.
    """

    crops: tuple[Crop, ...]
    copies: dict[str, tuple[Crop, ...]]

    def counts(self) -> Counts:
        """Folder -> (identities, images, cameras); distractors and junk are not identities."""
        folders: dict[str, list[Crop]] = defaultdict(list)
        for crop in self.crops:
            folders[crop.folder].append(crop)
        folders.update({name: list(crops) for name, crops in self.copies.items()})
        return {
            name: (
                len({crop.pid for crop in crops if crop.kind == "person"}),
                len(crops),
                len({crop.camid for crop in crops}),
            )
            for name, crops in folders.items()
        }


def plan(request: Request) -> Plan:
    """List the images of a data set without drawing any.

    Args:
        request: The parameters of the data set.
    """
    train, test = (
        official_sightings(request.seed) if request.full_size else requested_sightings(request)
    )
    crops = [crop for folder, seen in train.items() for crop in _crops_of(request, folder, seen)]
    query, gallery = _split_test(_crops_of(request, "", test))
    copies: dict[str, tuple[Crop, ...]] = {}
    if request.layout == "aihub_kaist":
        copies = _sample_folders(request, crops, query, gallery)
    else:
        gallery += _distractors_and_junk(request, len(gallery))
    return Plan((*crops, *query, *gallery), copies)


def _crops_of(request: Request, folder: str, sightings: Iterable[Sighting]) -> list[Crop]:
    """The images of identities; an empty folder stands for the test split."""
    sequences = (42, 43) if not folder else (31, 32, 34)
    return [
        Crop(folder, name, "person", pid, camid, index)
        for pid, camid, count in sightings
        for index, name in enumerate(_file_names(request, pid, camid, count, sequences))
    ]


def _file_names(
    request: Request, pid: int, camid: int, count: int, sequences: Sequence[int]
) -> list[str]:
    """File names of one identity before one camera: increasing frames of one sequence."""
    rng = random_stream(request.seed, FILE_NAMES, pid + 1, camid)
    first = int(rng.integers(1, 280))
    frames = (25 * (first + np.cumsum(rng.integers(1, 5, count)))).tolist()
    if request.layout == "aihub_kaist":
        sequence = sequences[int(rng.integers(len(sequences)))]
        return [f"{pid:04d}_c{camid:02d}s{sequence:02d}_{frame:06d}.jpg" for frame in frames]
    person = "-1" if pid == JUNK else f"{pid:04d}"
    sequence = int(rng.integers(1, 7))
    boxes = rng.integers(1, 8, count).tolist()
    return [
        f"{person}_c{camid}s{sequence}_{frame + 1:06d}_{box:02d}.jpg"
        for frame, box in zip(frames, boxes, strict=True)
    ]


def _split_test(crops: Iterable[Crop]) -> tuple[list[Crop], list[Crop]]:
    """Query: the first image from each camera. Gallery: the rest.

    A camera that took a single image gives a query only if it is the identity's first camera.
    """
    query: list[Crop] = []
    gallery: list[Crop] = []
    for _, group in itertools.groupby(crops, key=lambda crop: crop.pid):
        person = list(group)
        several = {crop.camid for crop in person if crop.index > 0}
        for crop in person:
            asks = crop.index == 0 and (crop.camid in several or crop is person[0])
            folder = "query" if asks else "bounding_box_test"
            moved = Crop(folder, crop.name, crop.kind, crop.pid, crop.camid, crop.index)
            (query if asks else gallery).append(moved)
    return query, gallery


def _distractors_and_junk(request: Request, gallery: int) -> list[Crop]:
    """The distractors and junk of a Market-1501 gallery, as a detector produces them."""
    crops: list[Crop] = []
    kinds: tuple[tuple[Kind, int, int], ...] = (("distractor", 0, 8), ("junk", JUNK, 12))
    for kind, pid, part in kinds:
        counts = apportion(max(4, gallery // part), [1.0] * request.cameras, least=0)
        for camid, count in enumerate(counts, start=1):
            names = _file_names(request, pid, camid, count, ())
            crops += [
                Crop("bounding_box_test", name, kind, pid, camid, index)
                for index, name in enumerate(names)
            ]
    return crops


def _sample_folders(
    request: Request, train: Sequence[Crop], query: Sequence[Crop], gallery: Sequence[Crop]
) -> dict[str, tuple[Crop, ...]]:
    """AIHub KAIST's sample folders: fewer identities, and fewer images of each."""
    pids = sorted({crop.pid for crop in train})
    count = min(100, max(2, math.ceil(len(pids) / 2)))
    chosen = {pids[position * len(pids) // count] for position in range(count)}
    some_train = [crop for crop in train if crop.pid in chosen]
    tested = sorted({crop.pid for crop in query})
    tested = tested[: min(100, max(2, math.ceil(len(tested) * 100 / 145)))]
    some_query = [crop for crop in query if crop.pid in tested]
    some_gallery = [crop for crop in gallery if crop.pid in tested]
    full = request.full_size
    each = 1 / max(1, request.images_per_camera - 1)
    return {
        "sample_train": _subsample(some_train, 1 / 2, _SAMPLE_TRAIN if full else None, least=2),
        "sample_query": tuple(some_query),
        "sample_test": tuple(some_gallery),
        "sample_query_reduced": _subsample(
            some_query, 1 / 2, _SAMPLE_QUERY if full else None, least=1
        ),
        "sample_test_reduced": _subsample(
            some_gallery, each, _SAMPLE_GALLERY if full else None, least=2
        ),
    }


def _subsample(
    crops: Sequence[Crop], share: float, total: int | None, least: int
) -> tuple[Crop, ...]:
    """Keep a share of each identity's images, or a total of all; the cameras take turns.

    With at least two gallery images of an identity, from two cameras, every query keeps a match.
    """
    people: dict[int, list[Crop]] = defaultdict(list)
    for crop in crops:
        people[crop.pid].append(crop)
    counts = [len(images) for images in people.values()]
    if total is None:
        sizes = [max(least, math.ceil(count * share)) for count in counts]
    else:
        sizes = apportion(total, counts, least)
    kept: list[Crop] = []
    for start, (images, size) in enumerate(zip(people.values(), sizes, strict=True)):
        kept += _round_robin(images, start)[:size]
    return tuple(kept)


def _round_robin(images: Sequence[Crop], start: int) -> list[Crop]:
    """Order one identity's images: the first of each camera, the second of each, and so on.

    Each identity starts with another camera, so that few images of each still cover all cameras.
    """
    cameras = sorted({crop.camid for crop in images})
    turn = {camid: (rank + start) % len(cameras) for rank, camid in enumerate(cameras)}
    return sorted(images, key=lambda crop: (crop.index, turn[crop.camid]))
