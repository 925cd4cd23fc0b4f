"""Verification and open-set figures against plain loops over all pairs."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from reidreg.errors import ConfigError, DataError
from reidreg.retrieval.pair_histogram import CELLS, count_pairs, histogram
from reidreg.retrieval.ranking import match_positions
from reidreg.retrieval.verification import (
    FARS,
    check_impostors,
    equal_error_rate,
    verification_figures,
)
from reidreg.values import Embeddings


def embeddings(features, pids, camids=None):
    features = torch.as_tensor(np.asarray(features, dtype=np.float32))
    camids = [0] * len(pids) if camids is None else camids
    return Embeddings(features, torch.tensor(pids), torch.tensor(camids))


def on_a_line(pids, squares):
    """Images on a line with these squared distances to a query at 0."""
    return embeddings(
        np.sqrt(np.asarray(squares, dtype=np.float64))[:, None], pids, [1] * len(pids)
    )


def figures_of(query, gallery, **options):
    rules = {key: options[key] for key in ("metric", "same_camera") if key in options}
    return verification_figures(query, gallery, match_positions(query, gallery, **rules), **options)


@st.composite
def pooled(draw, metric):
    """Embeddings drawn from a few vectors, so that many tie, and their true distances."""
    size = draw(st.integers(1, 6))
    pool = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).standard_normal((size, 12))
    pool = (pool * 10.0 ** draw(st.integers(-6, 6))).astype(np.float32)
    wide = pool.astype(np.float64)
    if metric == "cosine":
        wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    true = ((wide[:, None] - wide[None]) ** 2).sum(axis=2) / (2 if metric == "cosine" else 1)
    # Unequal distances must differ by more than the resolution of the cells.
    values = np.unique(true[np.triu_indices(size, 1)])
    assume(not len(values) or values[0] > 1e-3 * values[-1])
    assume((np.diff(values) > 1e-4 * values[:-1]).all())
    sides, picks = [], []
    for most in (6, 20):
        count = draw(st.integers(1, most))
        ids = st.lists(st.integers(-1, 4), min_size=count, max_size=count)
        cams = st.lists(st.integers(0, 2), min_size=count, max_size=count)
        picks.append(draw(st.lists(st.integers(0, size - 1), min_size=count, max_size=count)))
        sides.append(embeddings(pool[picks[-1]], draw(ids), draw(cams)))
    return sides[0], sides[1], true[np.ix_(picks[0], picks[1])]


class Naive:
    """All pairs in lists; every threshold is tried."""

    def __init__(self, query, gallery, rows, drop):
        self.genuine, self.impostor, self.lists = [], [], []
        for row, pid, camid in zip(rows, query.pids.tolist(), query.camids.tolist(), strict=True):
            if pid == -1:
                continue
            ids = gallery.pids.tolist(), gallery.camids.tolist()
            places = zip(row, range(len(row)), *ids, strict=True)
            items = sorted(
                (distance, place, other == pid)
                for distance, place, other, camera in places
                if other != -1 and not (drop and other == pid and camera == camid)
            )
            self.lists.append(items)
            self.genuine += [distance for distance, _, mate in items if mate]
            self.impostor += [distance for distance, _, mate in items if not mate]
        self.thresholds = [-1.0, *sorted({*self.genuine, *self.impostor})]

    def far(self, threshold):
        return sum(value <= threshold for value in self.impostor) / len(self.impostor)

    def tar(self, threshold):
        return sum(value <= threshold for value in self.genuine) / len(self.genuine)

    def alarms(self, threshold):
        nearest = [
            min([d for d, _, mate in items if not mate], default=9e99) for items in self.lists
        ]
        return sum(value <= threshold for value in nearest) / len(nearest)

    def identified(self, threshold):
        mated = [items for items in self.lists if any(mate for _, _, mate in items)]
        return sum(items[0][2] and items[0][0] <= threshold for items in mated) / len(mated)

    def loosest(self, rate, wanted):
        return max(t for t in self.thresholds if rate(t) <= wanted)

    def eer(self):
        points = [(self.far(t), self.tar(t)) for t in self.thresholds]
        for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
            if x1 + y1 >= 1:
                return x0 + (x1 - x0) * (1 - x0 - y0) / (x1 + y1 - x0 - y0)
        raise AssertionError("the curve ends at (1, 1)")


def check(case, metric, rule, far):
    query, gallery, rows = case
    naive = Naive(query, gallery, rows, rule == "drop")
    assume(naive.genuine and naive.impostor)
    found = figures_of(query, gallery, metric=metric, same_camera=rule, far=far)
    assert (found["num_genuine"], found["num_impostor"]) == (
        len(naive.genuine),
        len(naive.impostor),
    )
    assert found["eer"] == pytest.approx(naive.eer(), abs=1e-9)
    assert [entry["far"] for entry in found["tar_at_far"]] == sorted({*FARS, far})
    for entry in found["tar_at_far"]:
        loosest = naive.loosest(naive.far, entry["far"])
        assert entry["tar"] == pytest.approx(naive.tar(loosest))
        stored = as_distance(entry["threshold"], metric)
        assert naive.far(stored) == naive.far(loosest) <= entry["far"]
        assert naive.tar(stored) == naive.tar(loosest)
    for entry in found["dir_at_far"]:
        loosest = naive.loosest(naive.alarms, entry["far"])
        assert entry["dir"] == pytest.approx(naive.identified(loosest))
        stored = as_distance(entry["threshold"], metric)
        assert naive.alarms(stored) == naive.alarms(loosest) <= entry["far"]
    chosen = next(entry for entry in found["tar_at_far"] if entry["far"] == far)
    assert found["threshold"] == chosen["threshold"] and found["far"] == far


def as_distance(threshold, metric):
    # A pair next to a threshold may be rounded to its other side.
    return (1 - threshold if metric == "cosine" else threshold) * (1 - 2.0**-19)


RATES = st.sampled_from([1e-3, 0.05, 0.25, 1 / 3, 0.5, 0.9])


@settings(deadline=None)
@given(pooled("cosine"), st.sampled_from(["drop", "keep"]), RATES)
def test_figures_equal_trying_every_threshold_for_cosine(case, rule, far):
    check(case, "cosine", rule, far)


@settings(deadline=None)
@given(pooled("euclidean"), st.sampled_from(["drop", "keep"]), RATES)
def test_figures_equal_trying_every_threshold_for_squared_euclidean(case, rule, far):
    check(case, "euclidean", rule, far)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**18), min_size=2, max_size=30, unique=True), st.data())
def test_distances_one_part_in_two_to_the_fifteenth_apart_are_told_apart(steps, data):
    # Down to e**-8 of the largest. Two steps of the cells, so that rounding cannot merge them.
    squares = [4 * (1 + 2.0**-15) ** -step for step in steps]
    pids = data.draw(st.lists(st.sampled_from([1, 2]), min_size=len(steps), max_size=len(steps)))
    assume(set(pids) == {1, 2})
    query, gallery = embeddings([[0.0]], [1]), on_a_line(pids, squares)
    check((query, gallery, np.array([squares])), "euclidean", "drop", 0.3)


def test_a_worked_example_has_genuine_pairs_as_the_positive_class():
    query = embeddings([[0.0]], [1])
    gallery = on_a_line([1, 2, 1, 2, 2, 1, 2], [0.0, 0.1, 0.2, 0.4, 0.5, 0.6, 1.0])
    found = figures_of(query, gallery, metric="euclidean", far=0.25)
    entry = next(entry for entry in found["tar_at_far"] if entry["far"] == 0.25)
    # One impostor in four may be accepted: the one at 0.1. So genuine 0.0 and 0.2 are, too.
    assert entry["tar"] == 2 / 3
    assert 0.2 < found["threshold"] < 0.4 and found["threshold"] == pytest.approx(0.4, rel=1e-5)
    # From (1/4, 2/3) to (2/4, 2/3) the curve crosses 1 - TAR = 1/3.
    assert found["eer"] == pytest.approx(1 / 3)
    assert found["dir_at_far"][0]["dir"] == 1.0 and found["dir_at_far"][0]["threshold"] < 0.1


def test_equal_scores_accept_nothing_and_have_an_eer_of_one_half():
    query = embeddings(np.ones((3, 4)), [1, 2, 3])
    gallery = embeddings(np.ones((5, 4)), [1, 2, 3, 3, 4], [1] * 5)
    found = figures_of(query, gallery)
    assert found["eer"] == 0.5 and found["threshold"] > 1
    assert {entry["tar"] for entry in found["tar_at_far"]} == {0.0}
    assert {entry["dir"] for entry in found["dir_at_far"]} == {0.0}


def test_scores_that_do_not_overlap_have_no_error():
    query, gallery = embeddings(np.eye(3), [1, 2, 3]), embeddings(np.eye(3), [1, 2, 3], [1] * 3)
    found = figures_of(query, gallery)
    assert found["eer"] == 0 and 0 < found["threshold"] < 1
    # The loosest threshold is just above the cosine of orthogonal vectors.
    assert found["threshold"] == pytest.approx(0, abs=1e-5)
    assert found["tar_at_far"][0]["tar"] == found["dir_at_far"][0]["dir"] == 1


def test_queries_without_a_mate_count_for_far_but_not_for_dir():
    gallery = embeddings([[1, 0], [0, 1]], [1, 2], [1, 1])
    mated, stranger = embeddings([[1, 0.1]], [1]), embeddings([[1, 0], [0.1, 1]], [9, 1])
    query = Embeddings(
        *(torch.cat([getattr(mated, key), getattr(stranger, key)]) for key in KEYS),
    )
    found = figures_of(query, gallery, far=0.4)
    # The stranger's nearest is at cosine 1, the third's at 0.995, both above the mates of the rest.
    entry = next(entry for entry in found["dir_at_far"] if entry["far"] == 0.4)
    assert entry["dir"] == 0.0 and entry["threshold"] > 0.995
    entry = figures_of(query, gallery, far=0.7)["dir_at_far"][-1]
    assert entry["dir"] == 0.5 and 0.0995 < entry["threshold"] < 0.9951


KEYS = ("features", "pids", "camids")


def test_junk_is_left_out_of_both_sides():
    query, gallery = random_sides()
    clean = figures_of(query, gallery)
    more = [
        Embeddings(
            *(torch.cat([getattr(side, key), junk]) for key, junk in zip(KEYS, one, strict=True))
        )
        for side, one in (
            (query, (query.features[:9] + 0.1, torch.full((9,), -1), query.camids[:9])),
            (gallery, (query.features[:9], torch.full((9,), -1), query.camids[:9])),
        )
    ]
    assert figures_of(*more) == clean


def random_sides(dim=24, dtype=torch.float32, noise=1.0):
    draw = np.random.default_rng(3)
    people = draw.standard_normal((40, dim))
    sides = []
    for count in (150, 333):
        pids = draw.integers(0, 40, count)
        vectors = people[pids] + noise * draw.standard_normal((count, dim))
        sides.append(embeddings(vectors, pids, draw.integers(0, 3, count)))
    return [replace(side, features=side.features.to(dtype)) for side in sides]


def assert_as_near(one, other):
    """Rounding moves no pair by more than one cell, and changes figures by 1e-4 at most."""
    for kind in ("genuine", "impostor"):
        left, right = (
            np.bincount(counts.cells, getattr(counts, kind), CELLS).cumsum()
            for counts in (one, other)
        )
        assert left[-1] == right[-1]
        assert (left[:-1] <= right[1:]).all() and (right[:-1] <= left[1:]).all()
    assert np.abs(one.nearest_mate - other.nearest_mate).max() <= 1
    assert np.abs(one.nearest_impostor - other.nearest_impostor).max() <= 1
    assert equal_error_rate(one) == pytest.approx(equal_error_rate(other), abs=1e-4)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_counts_do_not_depend_on_the_tiles(metric):
    query, gallery = random_sides(dim=1024)
    seen = []
    small = count_pairs(
        query,
        gallery,
        metric=metric,
        budget_mib=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert_as_near(count_pairs(query, gallery, metric=metric), small)
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1)) and len(seen) > 100
    assert {total for _, total in seen} == {len(seen)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_narrow_features_are_compared_in_float32(dtype):
    sides = random_sides(dtype=dtype)
    wide = [replace(side, features=side.features.float()) for side in sides]
    assert_as_near(count_pairs(*sides), count_pairs(*wide))


def test_precision_settings_of_the_process_change_nothing():
    query, gallery = random_sides(dim=512)
    expected = count_pairs(query, gallery)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_as_near(expected, count_pairs(query, gallery))
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_gpu_counts_the_same(cuda):
    sides = random_sides(dim=512)
    moved = [replace(side, features=side.features.to(cuda)) for side in sides]
    assert_as_near(count_pairs(*sides), count_pairs(*moved))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_histogram_holds_every_pair_under_its_score(metric):
    query, gallery = random_sides()
    counts = count_pairs(query, gallery, metric=metric)
    bins = histogram(counts, 20)
    assert len(bins["edges"]) == 21 and (np.diff(bins["edges"]) > 0).all()
    x, y = query.features.double(), gallery.features.double()
    if metric == "cosine":
        scores = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(y).T
    else:
        scores = torch.cdist(x, y).square()
    other = query.pids[:, None] != gallery.pids
    expected, _ = np.histogram(scores[other].numpy(), bins["edges"])
    # A score next to an edge may fall to its other side; the outer edges are rounded too.
    assert np.abs(expected - bins["impostor"]).max() <= 5
    assert sum(bins["impostor"]) == counts.impostor.sum() == int(other.sum())
    assert sum(bins["genuine"]) == counts.genuine.sum()


def test_figures_are_plain_numbers():
    found = figures_of(*random_sides())
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert len(found["histogram"]["edges"]) == 101


@pytest.mark.parametrize("far", [0, 1, -0.1, float("nan")])
def test_a_rate_out_of_range_is_one_line(far):
    with pytest.raises(ConfigError, match=r"far: .* is out of range"):
        figures_of(*random_sides(), far=far)


def test_a_set_of_one_identity_is_an_error():
    side = embeddings(np.eye(3), [7, 7, -1], [0, 1, 0])
    with pytest.raises(DataError, match=r"all are of pid \[7\]"):
        figures_of(side, side)
    check_impostors([7], [7, -1, 8])
    with pytest.raises(DataError, match="different people"):
        check_impostors([7, -1], [7])


def test_matches_of_other_queries_are_refused():
    query, gallery = random_sides()
    matches = match_positions(query, gallery)
    fewer = Embeddings(*(getattr(query, key)[:9] for key in KEYS))
    with pytest.raises(DataError, match="matches are of 150 queries, but there are 9"):
        verification_figures(fewer, gallery, matches)
