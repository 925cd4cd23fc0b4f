"""Training identities held out for validation, so that no model is chosen on the test set.

Whole identities are held out: one with images on both sides would test classification, not
re-identification. They are split into query and gallery as in Market-1501: one image of each
identity and camera is a query, all others are the gallery.
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

_FEWEST = 2  # identities on either side, so that there is a negative for each


class HeldOut(Dataset):
    """The held-out identities as a data set with an empty train split.

    Args:
        query: The query images.
        gallery: The gallery images.
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

    The choice depends on the identities and the seed alone, and a smaller share holds out a subset
    of what a larger one does.

    Args:
        samples: Training images of known identities.
        config: The share, which is not 0, and the seed.
        across_cameras: Whether a match has to come from another camera.

    Returns:
        The images that are left for training, in order, and the held-out identities.

    Raises:
        ConfigError: The share leaves too few identities on one of the sides.
        DataError: No held-out identity gives a query with a match.
    """
    pids = sorted({sample.pid for sample in samples})
    rng = np.random.default_rng(config.seed)
    shuffled = rng.permutation(np.asarray(pids, dtype=np.int64)).tolist()
    chosen = set(shuffled[: _count(config.identities, len(pids))])
    rest = [sample for sample in samples if sample.pid not in chosen]
    held_out = [sample for sample in samples if sample.pid in chosen]
    query, gallery = _query_and_gallery(held_out, rng, across_cameras)
    if not query:
        condition = "was seen by two cameras" if across_cameras else "has two images"
        raise DataError(
            f"validation.identities: none of the held-out people {condition}, so there is no query "
            "with a match; hold out more people, or others with another validation.seed"
        )
    return rest, HeldOut(query, gallery)


def _count(share: float, identities: int) -> int:
    """The number of identities that a share stands for.

    Raises:
        ConfigError: They are too few, or too few are left for training.
    """
    count = round(share * identities)
    if _FEWEST <= count <= identities - _FEWEST:
        return count
    found = f"validation.identities: {share:g} of {identities} training identities is {count}"
    if identities < 2 * _FEWEST:
        raise ConfigError(f"{found}; too few to hold any out, use 0")
    if count < _FEWEST:
        least = math.ceil(100 * _FEWEST / identities) / 100
        raise ConfigError(f"{found}; at least {_FEWEST} are needed, use at least {least:g}")
    most = math.floor(100 * (identities - _FEWEST) / identities) / 100
    raise ConfigError(f"{found}; training needs {_FEWEST}, use at most {most:g}")


def _query_and_gallery(
    samples: Sequence[Sample], rng: np.random.Generator, across_cameras: bool
) -> tuple[list[Sample], list[Sample]]:
    """Split images so that every query has a match in the gallery."""
    images: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, sample in enumerate(samples):
        images[sample.pid][sample.camid].append(index)
    query: set[int] = set()
    for pid in sorted(images):
        query.update(_queries_of(images[pid], rng, across_cameras))
    return (
        [sample for index, sample in enumerate(samples) if index in query],
        [sample for index, sample in enumerate(samples) if index not in query],
    )


def _queries_of(
    cameras: dict[int, list[int]], rng: np.random.Generator, across_cameras: bool
) -> list[int]:
    """One image of an identity from each camera that has another one to leave in the gallery.

    Where every camera has a single image, one of these becomes the query.
    """
    if across_cameras and len(cameras) < 2:
        return []
    several = [camid for camid in sorted(cameras) if len(cameras[camid]) > 1]
    if not several and len(cameras) > 1:
        several = [int(rng.choice(sorted(cameras)))]
    return [int(rng.choice(cameras[camid])) for camid in several]
