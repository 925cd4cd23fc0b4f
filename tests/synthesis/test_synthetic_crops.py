"""The looks of drawn crops: identities and cameras can be told apart, and depend on the seed."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from reidreg.synthesis.cameras import camera_of
from reidreg.synthesis.canvas import HEIGHT, WIDTH
from reidreg.synthesis.crops import draw_distractor, draw_junk, draw_person
from reidreg.synthesis.people import person_of


def pixels(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)), dtype=np.float64)


def test_a_crop_depends_on_its_keys_alone() -> None:
    first = draw_person(0, 3, 2, 1)
    for pid in range(3):
        draw_person(0, pid, 1, 0)
    camera_of.cache_clear()
    person_of.cache_clear()
    assert draw_person(0, 3, 2, 1) == first
    others = [draw_person(*key) for key in ((1, 3, 2, 1), (0, 4, 2, 1), (0, 3, 1, 1), (0, 3, 2, 0))]
    assert first not in others
    assert pixels(first).shape == (HEIGHT, WIDTH, 3)


def test_crops_of_one_camera_share_its_light_and_cameras_differ() -> None:
    means = np.array(
        [
            [pixels(draw_person(0, pid, camid, 0)).mean((0, 1)) for pid in range(12)]
            for camid in range(1, 7)
        ]
    )
    between = means.mean(1)
    gaps = np.linalg.norm(between[:, None] - between[None], axis=-1)[~np.eye(6, dtype=bool)]
    assert gaps.min() > 8
    assert between.std(0).mean() > 1.5 * means.std(1).mean()


def test_identities_can_be_told_apart_before_one_camera() -> None:
    crops = np.array(
        [
            [
                pixels(draw_person(0, pid, 3, k)).reshape(16, 8, 8, 8, 3).mean((1, 3))
                for k in range(12)
            ]
            for pid in range(10)
        ]
    ).reshape(10, 12, -1)
    known, asked = crops[:, :6].mean(1), crops[:, 6:].mean(1)
    distances = np.linalg.norm(asked[:, None] - known[None], axis=-1)
    assert np.mean(distances.argmin(1) == np.arange(10)) >= 0.8


def test_identities_are_all_different() -> None:
    assert len({person_of(0, pid) for pid in range(500)}) == 500


def test_raw_colours_do_not_find_identities_in_other_cameras() -> None:
    pids = range(16)
    features = np.array(
        [
            [pixels(draw_person(0, pid, camid, 0))[::4, ::4].ravel() for pid in pids]
            for camid in range(1, 7)
        ]
    )
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    first = [
        np.argmax(features[a] @ features[b].T, axis=1) == np.arange(len(pids))
        for a in range(6)
        for b in range(6)
        if a != b
    ]
    assert np.mean(first) < 0.5


@pytest.mark.parametrize("draw", [draw_junk, draw_distractor])
def test_distractors_and_junk_differ_by_index_and_camera(
    draw: Callable[[int, int, int], bytes],
) -> None:
    crops = [draw(0, camid, index) for camid in (1, 2) for index in range(5)]
    assert len(set(crops)) == 10
    assert draw(0, 2, 4) == crops[-1]
    assert {pixels(crop).shape for crop in crops} == {(HEIGHT, WIDTH, 3)}
