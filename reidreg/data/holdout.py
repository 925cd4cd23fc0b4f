"""Training identities held out for validation, so that no model is chosen on the test set.

Whole people are held out, since a person whose images stand on both sides would be recognised and
not re-identified. They are split into query and gallery as Market-1501's test people are: one image
of each person and camera is looked for, among all others.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from reidreg.config.sections import ValidationConfig
from reidreg.errors import ConfigError, DataError
from reidreg.parts.interfaces import Dataset
from reidreg.values import Sample

_FEWEST = 2  # people on either side, so that there is someone to be told apart from


class HeldOut(Dataset):
    """Held-out people as a data set of their own, without a train split.

    Args:
        query: The images to look for.
        gallery: The images to look in.
    """

    def __init__(self, query: Sequence[Sample], gallery: Sequence[Sample]) -> None:
        self._query = query
        self._gallery = gallery

    @property
    def train(self) -> Sequence[Sample]:
        return ()

    @property
    def query(self) -> Sequence[Sample]:
        return self._query

    @property
    def gallery(self) -> Sequence[Sample]:
        return self._gallery


def hold_out(
    samples: Sequence[Sample], config: ValidationConfig, *, across_cameras: bool
) -> tuple[list[Sample], HeldOut]:
    """Take a share of the identities out of the training images.

    Who is held out depends on the identities and the seed alone, and a smaller share holds out
    some of those that a larger one does.

    Args:
        samples: Training images of known identities.
        config: The share, which is not 0, and the seed.
        across_cameras: A match has to come from another camera.

    Returns:
        The images that are left to train with, in order, and the people held out.

    Raises:
        ConfigError: The share leaves too few identities on one of the sides.
        DataError: No held-out person can be looked for.
    """
    pids = sorted({sample.pid for sample in samples})
    rng = np.random.default_rng(config.seed)
    shuffled = rng.permutation(np.asarray(pids, dtype=np.int64)).tolist()
    chosen = set(shuffled[: _count(config.identities, len(pids))])
    rest = [sample for sample in samples if sample.pid not in chosen]
    held = [sample for sample in samples if sample.pid in chosen]
    query, gallery = _query_and_gallery(held, rng, across_cameras)
    if not query:
        seen = "was seen by two cameras" if across_cameras else "has two images"
        raise DataError(
            f"validation.identities: none of the people held out {seen}, so nobody can be looked "
            "for; hold out more, or others by validation.seed"
        )
    return rest, HeldOut(query, gallery)


def _count(share: float, identities: int) -> int:
    """How many identities a share is.

    Raises:
        ConfigError: Too few, or too few are left.
    """
    count = round(share * identities)
    if _FEWEST <= count <= identities - _FEWEST:
        return count
    said = f"validation.identities: {share:g} of {identities} training identities is {count}"
    if identities < 2 * _FEWEST:
        raise ConfigError(f"{said}; too few to hold any out, use 0")
    if count < _FEWEST:
        least = math.ceil(100 * _FEWEST / identities) / 100
        raise ConfigError(f"{said}; at least {_FEWEST} are needed, which {least:g} gives")
    most = math.floor(100 * (identities - _FEWEST) / identities) / 100
    raise ConfigError(f"{said}; training needs {_FEWEST}, use at most {most:g}")


def _query_and_gallery(
    samples: Sequence[Sample], rng: np.random.Generator, across_cameras: bool
) -> tuple[list[Sample], list[Sample]]:
    """Split images so that every query has a match in the gallery."""
    people: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, sample in enumerate(samples):
        people[sample.pid][sample.camid].append(index)
    query: set[int] = set()
    for pid in sorted(people):
        query.update(_queries_of(people[pid], rng, across_cameras))
    return (
        [sample for index, sample in enumerate(samples) if index in query],
        [sample for index, sample in enumerate(samples) if index not in query],
    )


def _queries_of(
    cameras: dict[int, list[int]], rng: np.random.Generator, across_cameras: bool
) -> list[int]:
    """One image of a person from each camera that has another one to leave in the gallery.

    A person who has a single image by every camera lends one of them.
    """
    if across_cameras and len(cameras) < 2:
        return []
    several = [camid for camid in sorted(cameras) if len(cameras[camid]) > 1]
    if not several and len(cameras) > 1:
        several = [int(rng.choice(sorted(cameras)))]
    return [int(rng.choice(cameras[camid])) for camid in several]
