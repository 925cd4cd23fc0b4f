"""The figures of each pair of cameras against a loop over all pairs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reidreg.errors import DataError
from reidreg.retrieval.cameras import camera_pairs
from reidreg.values import Embeddings


def embeddings(draw, most):
    """Images on an integer grid, so that there are many ties and distances are exact."""
    count = draw(st.integers(1, most))
    places = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=count)
    ids = st.lists(st.integers(-1, 3), min_size=count, max_size=count)
    cams = st.lists(st.integers(0, 3), min_size=count, max_size=count)
    features = torch.tensor(draw(places)[:count], dtype=torch.float32)
    return Embeddings(features, torch.tensor(draw(ids)), torch.tensor(draw(cams)))


def naive(query, gallery, drop):
    """Reduce both sides to one camera and walk down every list."""
    rows = []
    for own in sorted(set(query.camids.tolist())):
        for camera in sorted(set(gallery.camids.tolist())):
            precisions, firsts = [], []
            for vector, pid, cam in zip(query.features, query.pids, query.camids, strict=True):
                if cam != own:
                    continue
                items = [
                    (
                        float((vector - other).square().sum()),
                        index,
                        int(gallery.pids[index]) == pid,
                    )
                    for index, other in enumerate(gallery.features)
                    if gallery.camids[index] == camera
                    and gallery.pids[index] != -1
                    and not (drop and gallery.pids[index] == pid and camera == own)
                ]
                order = [mate for _, _, mate in sorted(items)]
                hits = [position for position, mate in enumerate(order, 1) if mate]
                if hits:
                    precisions.append(np.mean([n / hit for n, hit in enumerate(hits, 1)]))
                    firsts.append(hits[0] == 1)
            if precisions:
                found = len(firsts), np.mean(precisions), np.mean(firsts)
                rows.append((own, camera, *found))
    return rows


@settings(deadline=None, max_examples=60)
@given(st.data(), st.booleans())
def test_every_pair_equals_an_evaluation_of_its_two_cameras(data, drop):
    query, gallery = embeddings(data.draw, 8), embeddings(data.draw, 20)
    expected = naive(query, gallery, drop)
    found = camera_pairs(query, gallery, metric="euclidean", same_camera="drop" if drop else "keep")
    keys = ["query_camera", "gallery_camera", "num_queries", "mAP", "rank1"]
    assert [list(row) for row in found] == [keys] * len(expected)
    for row, values in zip(found, expected, strict=True):
        assert list(row.values()) == pytest.approx(list(values))


def sides():
    draw = np.random.default_rng(2)
    features = torch.tensor(draw.standard_normal((60, 8)), dtype=torch.float32)
    pids, camids = torch.arange(60) % 7, torch.tensor(draw.integers(0, 3, 60))
    return Embeddings(features, pids, camids)


def test_a_camera_without_matches_has_no_row_and_progress_counts_it():
    side = sides()
    # Camera 9 has images of one identity only, which is not among the queries.
    strangers = Embeddings(torch.ones(2, 8), torch.tensor([99, 99]), torch.tensor([9, 9]))
    gallery = Embeddings(
        *(torch.cat([getattr(side, k), getattr(strangers, k)]) for k in ("features", "pids")),
        torch.cat([side.camids, strangers.camids]),
    )
    seen = []
    rows = camera_pairs(side, gallery, progress=lambda done, total: seen.append((done, total)))
    assert {row["gallery_camera"] for row in rows} == {0, 1, 2}
    assert not [row for row in rows if row["query_camera"] == row["gallery_camera"]]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert {type(value) for row in rows for value in row.values()} == {int, float}


def test_with_one_camera_there_is_no_pair():
    side = replace(sides(), camids=torch.zeros(60, dtype=torch.int64))
    assert camera_pairs(side, side) == []
    (row,) = camera_pairs(side, side, same_camera="keep")
    assert row["num_queries"] == 60 and row["rank1"] == 1.0


def test_features_that_do_not_fit_are_one_line():
    side = sides()
    with pytest.raises(DataError, match="8 values each, gallery features have 4"):
        camera_pairs(side, replace(side, features=side.features[:, :4]))
