"""The single-shot protocol of CUHK03 against a loop that draws one image at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reidreg.errors import ConfigError, DataError
from reidreg.retrieval.metrics import cmc, retrieval_figures
from reidreg.retrieval.ranking import match_positions
from reidreg.retrieval.singleshot import single_shot_positions, single_shot_positions_of_rows
from reidreg.values import Embeddings


def embeddings(draw, most):
    """Images on an integer grid, so that there are many ties and distances are exact."""
    count = draw(st.integers(1, most))
    places = st.lists(
        st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=count, max_size=count
    )
    ids = st.lists(st.integers(-1, 4), min_size=count, max_size=count)
    cams = st.lists(st.integers(0, 2), min_size=count, max_size=count)
    features = torch.tensor(draw(places), dtype=torch.float32)
    return Embeddings(features, torch.tensor(draw(ids)), torch.tensor(draw(cams)))


def remaining(query, gallery, q, drop):
    """The gallery items that are not left out for a query, by pid."""
    by_pid = {}
    for item, (pid, camid) in enumerate(
        zip(gallery.pids.tolist(), gallery.camids.tolist(), strict=True)
    ):
        own = pid == query.pids[q] and camid == query.camids[q]
        if pid != -1 and not (drop and own):
            by_pid.setdefault(pid, []).append(item)
    return by_pid


def possible_positions(query, gallery, q, drop):
    """Every position that the match can have in any draw."""
    by_pid = remaining(query, gallery, q, drop)
    mates = by_pid.pop(int(query.pids[q]), [])

    def key(item):
        return float((query.features[q] - gallery.features[item]).square().sum()), item

    found = set()
    for mate in mates:
        always = sum(all(key(i) < key(mate) for i in items) for items in by_pid.values())
        sometimes = sum(any(key(i) < key(mate) for i in items) for items in by_pid.values())
        found |= set(range(1 + always, 2 + sometimes))
    return found


@settings(deadline=None, max_examples=60)
@given(st.data(), st.booleans())
def test_positions_are_possible_in_a_draw_of_one_image_per_identity(data, drop):
    query, gallery = embeddings(data.draw, 6), embeddings(data.draw, 20)
    possible = [possible_positions(query, gallery, q, drop) for q in range(len(query.pids))]
    options = {"metric": "euclidean", "same_camera": "drop" if drop else "keep", "repeats": 25}
    if not any(possible):
        with pytest.raises(DataError, match="no query has a match"):
            single_shot_positions(query, gallery, **options)
        return
    found = single_shot_positions(query, gallery, **options)
    lists = np.split(found.positions, found.offsets[1:-1])
    assert len(lists) == len(query.pids) * 25
    for q, allowed in enumerate(possible):
        own = [one.tolist() for one in lists[q * 25 : (q + 1) * 25]]
        if not allowed:
            assert own == [[]] * 25
        else:
            assert {len(one) for one in own} == {1} and {one[0] for one in own} <= allowed


def naive_draws(query, gallery, q, repeats, seed):
    """Positions in galleries that are drawn one after the other, with another generator."""
    draw = np.random.default_rng(seed)
    by_pid = remaining(query, gallery, q, True)
    positions = []
    for _ in range(repeats):
        chosen = {pid: items[draw.integers(len(items))] for pid, items in by_pid.items()}
        keys = {
            pid: (float((query.features[q] - gallery.features[item]).square().sum()), item)
            for pid, item in chosen.items()
        }
        positions.append(sorted(keys, key=keys.get).index(int(query.pids[q])) + 1)
    return positions


def random_sides(dim=3):
    draw = np.random.default_rng(0)
    sides = []
    for count in (12, 90):
        features = torch.tensor(draw.standard_normal((count, dim)), dtype=torch.float32)
        ids = torch.tensor(draw.integers(0, 9, count)), torch.tensor(draw.integers(0, 3, count))
        sides.append(Embeddings(features, *ids))
    return sides


def test_every_image_of_an_identity_is_drawn_equally_often():
    query, gallery = random_sides()
    found = single_shot_positions(query, gallery, metric="euclidean", repeats=1000)
    for q, own in enumerate(found.positions.reshape(12, 1000)[:4]):
        expected = np.bincount(naive_draws(query, gallery, q, 1000, q), minlength=11) / 1000
        shares = np.bincount(own, minlength=11) / 1000
        # Five standard errors of the difference of two shares.
        assert np.abs(shares - expected).max() < 5 * np.sqrt(2 * 0.25 / 1000)


def test_with_one_image_per_identity_it_is_the_protocol_of_market1501():
    draw = np.random.default_rng(5)
    features = torch.tensor(draw.standard_normal((50, 8)), dtype=torch.float32)
    gallery = Embeddings(features, torch.arange(50), torch.ones(50, dtype=torch.int64))
    query = Embeddings(features[:20] + 0.9, torch.arange(20), torch.zeros(20, dtype=torch.int64))
    found = single_shot_positions(query, gallery, repeats=3)
    expected = match_positions(query, gallery).positions
    assert found.positions.tolist() == np.repeat(expected, 3).tolist()
    figures = retrieval_figures(found)
    assert figures["mAP"] == pytest.approx((1 / expected).mean()) == figures["mINP"]


def test_the_curve_is_the_average_over_the_repeats():
    query, gallery = random_sides()
    found = single_shot_positions(query, gallery, repeats=7)
    table = found.positions.reshape(12, 7)
    curves = [[(column <= k).mean() for k in range(1, 10)] for column in table.T]
    assert cmc(found, ranks=9) == pytest.approx(np.mean(curves, axis=0))


def test_draws_depend_on_the_seed_and_not_on_the_budget():
    query, gallery = random_sides(dim=4096)
    seen = []
    first = single_shot_positions(query, gallery, seed=1).positions.tolist()
    small = single_shot_positions(
        query, gallery, seed=1, budget_mib=1, progress=lambda done, total: seen.append(done)
    )
    assert small.positions.tolist() == first and len(seen) > 1 and seen[-1] == 12
    assert single_shot_positions(query, gallery, seed=2).positions.tolist() != first


def test_given_distances_give_the_same_positions():
    query, gallery = random_sides()
    rows = torch.cdist(query.features.double(), gallery.features.double())
    ids = query.pids, query.camids, gallery.pids, gallery.camids
    found = single_shot_positions_of_rows([(5, rows[5:]), (0, rows[:5].numpy())], *ids)
    expected = single_shot_positions(query, gallery, metric="euclidean")
    assert found.positions.tolist() == expected.positions.tolist()
    assert found.offsets.tolist() == expected.offsets.tolist()


def test_wrong_input_is_one_line():
    query, gallery = random_sides()
    ids = query.pids, query.camids, gallery.pids, gallery.camids
    rows = torch.zeros(12, 90)
    for given_rows, line in (
        ([(0, rows[:, 1:])], "from query 0 on are not finite, or do not fit"),
        ([(0, rows / 0)], "from query 0 on are not finite, or do not fit"),
        ([(5, rows)], "from query 5 on are not finite, or do not fit"),
        ([(0, rows[:5])], "missing for 7 of 12 queries"),
        ([(0, rows[:8]), (6, rows[6:])], "from query 6 on are given twice"),
    ):
        with pytest.raises(DataError, match=line):
            single_shot_positions_of_rows(given_rows, *ids)
    with pytest.raises(ConfigError, match="repeats: 0 is too small"):
        single_shot_positions(query, gallery, repeats=0)
    alone = replace(gallery, pids=gallery.pids + 100)
    with pytest.raises(DataError, match="no query has a match"):
        single_shot_positions(query, alone)
