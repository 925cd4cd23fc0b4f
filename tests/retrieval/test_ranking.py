"""Match positions and ranked lists against plain sorting and counting."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reidreg
from reidreg.errors import ConfigError, DataError
from reidreg.retrieval.distances import Distances, full_float32
from reidreg.retrieval.matching import check_matchable
from reidreg.retrieval.metrics import retrieval_figures
from reidreg.retrieval.ranked_lists import ranked_lists
from reidreg.retrieval.ranking import MatchPositions, match_positions, match_positions_of_rows
from reidreg.values import Embeddings


def embeddings(features, pids, camids=None, paths=()):
    features = torch.as_tensor(np.asarray(features, dtype=np.float32))
    camids = [0] * len(pids) if camids is None else camids
    return Embeddings(features, torch.tensor(pids), torch.tensor(camids), tuple(paths))


def by_query(found: MatchPositions) -> list[list[int]]:
    return [part.tolist() for part in np.split(found.positions, found.offsets[1:-1])]


def kept_order(row, pid, camid, gallery, drop):
    """The gallery as ranked for a query: sorted by distance and index, without items left out."""
    order = sorted(range(len(row)), key=lambda item: (row[item], item))
    pids, camids = gallery.pids.tolist(), gallery.camids.tolist()
    left_out = {
        item
        for item in order
        if pids[item] == -1 or (drop and pids[item] == pid and camids[item] == camid)
    }
    return [item for item in order if item not in left_out]


def naive_positions(rows, query, gallery, drop=True):
    expected = []
    for row, pid, camid in zip(rows, query.pids.tolist(), query.camids.tolist(), strict=True):
        order = kept_order(row, pid, camid, gallery, drop)
        expected.append([rank for rank, item in enumerate(order, 1) if gallery.pids[item] == pid])
    return expected


def squared_euclidean(query, gallery):
    x, y = query.features.double().numpy(), gallery.features.double().numpy()
    return [[float(((a - b) ** 2).sum()) for b in y] for a in x]


@st.composite
def pooled(draw, metric: str = "cosine", width: int = 12):
    """Embeddings drawn from a few vectors, so that there are many ties, and their true distances.

    The distance of two vectors of the pool is computed once, so equal vectors tie.
    """
    size = draw(st.integers(1, 6))
    seed = draw(st.integers(0, 2**32 - 1))
    pool = np.random.default_rng(seed).standard_normal((size, width)).astype(np.float32)
    pool *= 10.0 ** draw(st.integers(-6, 6))
    wide = pool.astype(np.float64)
    if metric == "cosine":
        wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    true = ((wide[:, None] - wide[None]) ** 2).sum(axis=2)
    sides, picks = [], []
    for most in (6, 20):
        count = draw(st.integers(1, most))
        many = st.lists(st.integers(0, size - 1), min_size=count, max_size=count)
        ids = st.lists(st.integers(-1, 4), min_size=count, max_size=count)
        cams = st.lists(st.integers(0, 2), min_size=count, max_size=count)
        picks.append(draw(many))
        sides.append(embeddings(pool[picks[-1]], draw(ids), draw(cams)))
    rows = true[np.ix_(picks[0], picks[1])].tolist()
    return sides[0], sides[1], rows


def compare(query, gallery, rows, *, metric, rule, budget_mib=256.0):
    expected = naive_positions(rows, query, gallery, rule == "drop")
    options = {"metric": metric, "same_camera": rule, "budget_mib": budget_mib}
    if not any(expected):
        with pytest.raises(DataError, match="no query has a match"):
            match_positions(query, gallery, **options)
        return
    found = match_positions(query, gallery, **options)
    assert by_query(found) == expected
    assert found.num_gallery == len(gallery.pids)


@settings(deadline=None)
@given(pooled("cosine"), st.sampled_from(["drop", "keep"]))
def test_positions_equal_sorting_for_cosine(case, rule):
    compare(*case, metric="cosine", rule=rule)


@settings(deadline=None)
@given(pooled("euclidean"), st.sampled_from(["drop", "keep"]))
def test_positions_equal_sorting_for_squared_euclidean(case, rule):
    compare(*case, metric="euclidean", rule=rule)


@settings(max_examples=20, deadline=None)
@given(pooled("cosine", width=4096), st.sampled_from([1, 2, 3]))
def test_positions_are_the_same_in_tiles_of_a_few_vectors(case, budget_mib):
    # A vector of 4,096 values leaves room for three to nine of the gallery in a tile.
    compare(*case, metric="cosine", rule="drop", budget_mib=budget_mib)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_whole_numbers_tie_although_their_vectors_differ(data):
    def vectors(count):
        entry = st.integers(-2, 2)
        return data.draw(
            st.lists(st.tuples(entry, entry), min_size=count, max_size=count), label="vectors"
        )

    count = data.draw(st.integers(1, 25))
    pids = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    query, gallery = embeddings(vectors(3), [0, 1, 2], [7, 8, 9]), embeddings(vectors(count), pids)
    compare(query, gallery, squared_euclidean(query, gallery), metric="euclidean", rule="drop")


def random_sides(num_query=150, num_gallery=333, dim=24, seed=0):
    """Some of the gallery twice, some of it junk, three cameras, and queries without a match."""
    draw = np.random.default_rng(seed)
    vectors = draw.standard_normal((num_gallery, dim)).astype(np.float32)
    vectors[draw.integers(0, num_gallery, 60)] = vectors[draw.integers(0, num_gallery, 60)]
    gallery = embeddings(vectors, draw.integers(-1, 12, num_gallery), draw.integers(0, 3, 333))
    picked = vectors[draw.integers(0, num_gallery, num_query)]
    noise = draw.standard_normal(picked.shape) * draw.integers(0, 2, (num_query, 1))
    pids = draw.integers(0, 15, num_query)
    return embeddings(picked + noise, pids, draw.integers(0, 3, num_query)), gallery


def test_positions_do_not_depend_on_the_budget_or_the_threads():
    query, gallery = random_sides()
    found = [
        match_positions(query, gallery, budget_mib=budget).positions.tolist()
        for budget in (1, 2, 5, 256)
    ]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        found.append(match_positions(query, gallery).positions.tolist())
    finally:
        torch.set_num_threads(threads)
    assert all(one == found[0] for one in found)
    assert len(found[0]) > 1000


@settings(max_examples=15, deadline=None)
@given(st.randoms(use_true_random=False))
def test_positions_do_not_depend_on_the_order_of_the_queries(random):
    query, gallery = random_sides(num_query=20)
    order = list(range(20))
    random.shuffle(order)
    moved = Embeddings(query.features[order], query.pids[order], query.camids[order])
    plain = by_query(match_positions(query, gallery))
    assert by_query(match_positions(moved, gallery)) == [plain[one] for one in order]


def test_equal_features_are_ranked_by_their_gallery_index():
    ones = np.full((700, 2048), 0.37)
    pids = [index % 5 for index in range(700)]
    query, gallery = embeddings(ones[:3], [0, 1, 2], [1, 1, 1]), embeddings(ones, pids)
    found = by_query(match_positions(query, gallery, budget_mib=4))
    assert found == [list(range(first, 701, 5)) for first in (1, 2, 3)]


def test_memory_is_bounded_although_all_features_of_a_collapsed_model_tie():
    pids = np.arange(4000) % 100
    ones = embeddings(np.ones((4000, 8)), pids, np.arange(4000) % 6)
    query = replace(ones, features=ones.features[:500], pids=ones.pids[:500])
    query = replace(query, camids=query.camids[:500])
    tracemalloc.start()
    match_positions(query, ones, budget_mib=16)  # each of 2 million pairs is a tie
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * 2**20


def test_a_worked_example_with_junk_a_tie_and_a_same_camera_match():
    query = embeddings([[0.0], [0.0], [9.0]], [1, 2, 3], [0, 0, 0])
    gallery = embeddings(
        [[1.0], [0.1], [-2.0], [2.0], [0.5], [3.0], [9.0]],
        [1, 1, 2, 1, -1, 2, 3],
        [1, 0, 1, 1, 1, 1, 0],
    )
    found = match_positions(query, gallery, metric="euclidean")
    # Query 0: its own camera's 0.1 and junk 0.5 are left out; 1.0, then -2.0 before 2.0 (a tie).
    # Query 1: 0.1, 1.0, then its match -2.0, the tie 2.0, and its match 3.0. Query 2: no match.
    assert by_query(found) == [[1, 3], [3, 5], []]
    result = retrieval_figures(found, ranks=3)
    assert result["mAP"] == pytest.approx(((1 + 2 / 3) / 2 + (1 / 3 + 2 / 5) / 2) / 2)
    assert result["mINP"] == pytest.approx((2 / 3 + 2 / 5) / 2)
    assert result["cmc"] == [0.5, 0.5, 1.0]
    assert (result["num_queries"], result["num_valid_queries"]) == (3, 2)
    kept = match_positions(query, gallery, metric="euclidean", same_camera="keep")
    assert by_query(kept) == [[1, 2, 4], [3, 5], [1]]


def market1501(distances, query, gallery, max_rank):
    """The protocol as published: sort, filter, find the hits, average."""
    precisions, penalties, curves = [], [], []
    for row, pid, camid in zip(distances, query.pids, query.camids, strict=True):
        order = np.argsort(row, kind="stable")
        junk = gallery.pids.numpy()[order] == -1
        same = (gallery.pids.numpy()[order] == int(pid)) & (
            gallery.camids.numpy()[order] == int(camid)
        )
        good = gallery.pids.numpy()[order][~junk & ~same] == int(pid)
        if not good.any():
            continue
        hits = np.flatnonzero(good) + 1
        precisions.append(np.mean(np.arange(1, len(hits) + 1) / hits))
        penalties.append(len(hits) / hits[-1])
        curves.append([float(hits[0] <= rank) for rank in range(1, max_rank + 1)])
    return np.mean(precisions), np.mean(penalties), np.mean(curves, axis=0)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_figures_are_those_of_the_market1501_protocol(metric):
    for seed in range(5):
        query, gallery = random_sides(seed=seed)
        x, y = query.features.double().numpy(), gallery.features.double().numpy()
        if metric == "cosine":
            x /= np.linalg.norm(x, axis=1, keepdims=True)
            y /= np.linalg.norm(y, axis=1, keepdims=True)
        # Computed row by row and element by element, so that equal vectors tie.
        rows = [((y - one) ** 2).sum(axis=1) for one in x]
        mean_ap, mean_inp, curve = market1501(rows, query, gallery, 50)
        found = retrieval_figures(match_positions(query, gallery, metric=metric))
        assert found["mAP"] == pytest.approx(mean_ap, abs=1e-6)
        assert found["mINP"] == pytest.approx(mean_inp, abs=1e-6)
        assert found["cmc"] == pytest.approx(curve.tolist(), abs=1e-6)
        assert found["num_valid_queries"] < found["num_queries"]


# -------------------------------------------------------------------------------- the distances


@pytest.mark.parametrize("dim", [1, 3, 100, 2048, 5000])
def test_exact_distances_are_the_same_bits_in_every_tile(dim):
    draw = np.random.default_rng(dim)
    x = (draw.standard_normal((9, dim)) * 10.0 ** draw.integers(-9, 9, (9, 1))).astype(np.float32)
    y = np.concatenate([x[:4], draw.standard_normal((70, dim)).astype(np.float32)])
    for metric in ("euclidean", "cosine"):
        distances = Distances(x, y, metric)
        whole = distances.exact(slice(0, 9), slice(0, 74))
        for row, column in [(0, 0), (3, 70), (8, 13)]:
            one = distances.exact(np.array([row]), np.array([column]))
            assert torch.equal(one[0, 0], whole[row, column])
        assert torch.equal(distances.exact(slice(0, 9), slice(5, 38)), whole[:, 5:38])
        pairs = distances.exact_pairs(np.repeat(np.arange(9), 74), np.tile(np.arange(74), 9), 7)
        assert np.array_equal(pairs.reshape(9, 74), whole)
        assert torch.equal(whole[:4, :4].diagonal(), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_distances_are_true_to_many_digits(metric):
    draw = np.random.default_rng(1)
    x, y = (draw.standard_normal((n, 300)).astype(np.float32) + 3 for n in (5, 7))
    distances = Distances(x, y, metric)
    exact, near = distances.exact(slice(0, 5), slice(0, 7)), distances.rows(slice(0, 5), 3)
    assert float((exact - near).abs().max()) < distances.slack
    for row, a in enumerate(x.astype(np.float64)):
        for column, b in enumerate(y.astype(np.float64)):
            if metric == "cosine":
                norms = math.sqrt(math.fsum(a * a)) * math.sqrt(math.fsum(b * b))
                true = 1 - math.fsum(a * b) / norms
            else:
                true = math.fsum((a - b) ** 2)
            assert float(exact[row, column]) == pytest.approx(true, rel=1e-12)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 600), st.integers(-18, 18))
def test_approximate_distances_keep_to_their_bound(seed, dim, exponent):
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((6, dim)) * 10.0 ** draw.integers(-3, 4, (6, 1)) * 10.0**exponent
    for metric in ("euclidean", "cosine"):
        distances = Distances(x.astype(np.float32), x[::-1].astype(np.float32), metric)
        exact = distances.exact(slice(0, 6), slice(0, 6))
        assert float((exact - distances.rows(slice(0, 6), 4)).abs().max()) < distances.slack


@settings(deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 700),
    st.integers(-37, 30),
    st.sampled_from(["spread", "offset", "alternating", "one large", "unit"]),
)
def test_scores_of_float32_keep_to_their_bound(seed, dim, exponent, kind):
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((6, dim))
    if kind == "offset":  # all nearly equal
        x = 1000 + x
    elif kind == "alternating":  # sums that cancel
        x = 1000 * (-1.0) ** np.arange(dim) + x
    elif kind == "one large":
        x[:, 0] = 1e6
    x = x * 10.0 ** draw.integers(-3, 2, (6, 1)) * 10.0**exponent
    if kind == "unit":
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    x = x.astype(np.float32)
    rows = np.arange(6)
    for metric in ("euclidean", "cosine"):
        distances = Distances(x, x[::-1].copy(), metric)
        with full_float32():
            tile = torch.empty(6, 6)
            distances.scores(distances.score_queries(rows), distances.score_items(rows), out=tile)
        exact = distances.exact(rows, rows).flatten().numpy()
        wanted = distances.score_of(np.repeat(rows, 6), exact)
        assert np.abs(tile.flatten().numpy() - wanted).max() < distances.score_slack
        pairs = np.repeat(rows, 6), np.tile(rows, 6)
        for found in (distances.pairs(*pairs), distances.near_pairs(*pairs, 4)):
            assert np.abs(found - exact).max() < distances.slack


@pytest.mark.parametrize(("units", "shared"), [(0, True), (3.5, True), (6, False)])
def test_vectors_of_nearly_unit_length_are_compared_without_a_copy(
    units: float, shared: bool
) -> None:
    draw = np.random.default_rng(0)
    unit = draw.standard_normal((50, 300))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    # Lengths that differ from 1 by this many float32 rounding units, up and down.
    lengths = 1 + units * 2.0**-24 * (-1.0) ** np.arange(50)[:, None]
    features = torch.from_numpy((unit * lengths).astype(np.float32))
    distances = Distances(features, features.clone(), "cosine")
    vectors, _ = distances.score_items(slice(0, 50))
    raw = distances.gallery.features
    assert (vectors.data_ptr() == raw.data_ptr()) is shared
    true = raw.double() / raw.double().norm(dim=1, keepdim=True)
    for sign, found in ((1, vectors), (-1, distances.score_queries(slice(0, 50)))):
        error = (sign * found.double() - true).abs()
        assert bool((error <= 4.01 * 2.0**-24 * true.abs()).all())
    assert torch.equal(raw, features)


def exact_positions(query, gallery, metric):
    """Positions from a stable sort of all exact distances."""
    distances = Distances(query.features, gallery.features, metric)
    everyone = slice(0, len(query.pids)), slice(0, len(gallery.pids))
    return naive_positions(distances.exact(*everyone).tolist(), query, gallery)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-3, 1e-5, 1e-6, 1e-7, 1e-8]),
    st.sampled_from(["cosine", "euclidean"]),
    st.integers(1, 300),
)
def test_what_float32_cannot_tell_apart_is_ordered_exactly(seed, gap, metric, dim):
    # A collapsed model: all features are nearly equal, many are equal.
    draw = np.random.default_rng(seed)
    pids, camids = draw.integers(0, 4, 90), draw.integers(0, 3, 90)
    steps = draw.integers(-2, 3, (90, dim)) * gap
    everyone = embeddings(draw.standard_normal(dim) + steps, pids, camids)
    query = Embeddings(everyone.features[:15], everyone.pids[:15], everyone.camids[:15])
    gallery = Embeddings(everyone.features[15:], everyone.pids[15:], everyone.camids[15:])
    expected = exact_positions(query, gallery, metric)
    assert by_query(match_positions(query, gallery, metric=metric)) == expected
    assert by_query(match_positions(query, gallery, metric=metric, budget_mib=1)) == expected


def test_positions_do_not_depend_on_the_precision_set_for_training():
    query, gallery = random_sides()
    expected = match_positions(query, gallery).positions.tolist()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert match_positions(query, gallery).positions.tolist() == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_other_number_types_are_computed_in_float32(dtype):
    query, gallery = random_sides(num_query=10)
    typed = [replace(side, features=(side.features * 50).to(dtype)) for side in (query, gallery)]
    plain = [replace(side, features=side.features.float()) for side in typed]
    expected = match_positions(*plain).positions.tolist()
    assert match_positions(*typed).positions.tolist() == expected


def test_strided_read_only_and_grad_features_are_accepted():
    query, gallery = random_sides(num_query=10)
    expected = match_positions(query, gallery).positions.tolist()
    strided = replace(gallery, features=gallery.features.T.contiguous().T)
    graded = replace(query, features=query.features.clone().requires_grad_())
    assert match_positions(graded, strided).positions.tolist() == expected
    frozen = gallery.features.numpy()[::-1].copy()[::-1]
    frozen.flags.writeable = False
    assert match_positions(query, replace(gallery, features=frozen)).positions.tolist() == expected


# ------------------------------------------------------------------------------------- the rows


@settings(max_examples=50, deadline=None)
@given(pooled("euclidean"), st.integers(1, 4), st.sampled_from(["drop", "keep"]), st.data())
def test_positions_of_given_rows_equal_sorting(case, step, rule, data):
    query, gallery, rows = case
    expected = naive_positions(rows, query, gallery, rule == "drop")
    chunks = [
        (start, torch.tensor(rows[start : start + step], dtype=torch.float64))
        for start in range(0, len(rows), step)
    ]
    chunks = data.draw(st.permutations(chunks))
    ids = query.pids, query.camids, gallery.pids, gallery.camids
    if any(expected):
        found = match_positions_of_rows(chunks, *ids, same_camera=rule, budget_mib=1)
        assert by_query(found) == expected


def test_rows_of_float32_in_pieces_equal_the_features_they_come_from():
    query, gallery = random_sides()
    rows = Distances(query.features, gallery.features, "cosine").rows(
        slice(0, 150), 100, exact=True
    )
    ids = query.pids, query.camids, gallery.pids, gallery.camids
    for kind in (rows, rows.T.contiguous().T, rows.numpy()):
        given_rows = [(0, kind[:70]), (70, kind[70:])]
        found = match_positions_of_rows(given_rows, *ids, budget_mib=1)
        assert found.positions.tolist() == match_positions(query, gallery).positions.tolist()
    seen = []
    single = [(0, rows.float())]
    match_positions_of_rows(single, *ids, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(150, 150)]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([(0, np.zeros((2, 3)))], "missing for 1 of 3 queries"),
        ([(0, np.zeros((2, 3))), (1, np.zeros((2, 3)))], "each once"),
        ([(0, np.zeros((3, 4)))], "3 gallery items"),
        ([(1, np.zeros((3, 3)))], "do not fit 3 queries"),
        ([(-1, np.zeros((1, 3)))], "do not fit 3 queries"),
        ([(0, np.zeros(3))], "do not fit"),
        ([(0, np.array([[0, 0, 0], [0, 0, np.nan], [0, 0, 0]]))], "those of query 1"),
    ],
)
def test_rows_that_do_not_fit_are_an_error(rows, line):
    ids = [1, 1, 1], [0, 0, 0], [1, 1, 1], [1, 1, 1]
    with pytest.raises(DataError, match=line):
        match_positions_of_rows(rows, *ids)


# ------------------------------------------------------------------------------------ the lists


def check_lists(query, gallery, k, metric, rule):
    """Lists are those of a sort, and the positions of their matches are those counted."""
    indices, distances = ranked_lists(query, gallery, k=k, metric=metric, same_camera=rule)
    assert (indices.dtype, distances.dtype) == (torch.int64, torch.float32)
    assert indices.shape == distances.shape == (len(query.pids), k)
    counted = by_query(match_positions(query, gallery, metric=metric, same_camera=rule))
    exact = Distances(query.features, gallery.features, metric).exact(
        slice(0, len(query.pids)), slice(0, len(gallery.pids))
    )
    for row, pid in enumerate(query.pids.tolist()):
        camid = int(query.camids[row])
        order = kept_order(exact[row].tolist(), pid, camid, gallery, rule == "drop")[:k]
        items = indices[row].tolist()
        assert items == order + [-1] * (k - len(order))
        hits = [rank for rank, item in enumerate(order, 1) if gallery.pids[item] == pid]
        assert hits == [rank for rank in counted[row] if rank <= k]
        expected = exact[row][order].float().tolist() + [math.inf] * (k - len(order))
        assert distances[row].tolist() == expected


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("rule", ["drop", "keep"])
@pytest.mark.parametrize("k", [1, 10, 500])
def test_lists_agree_with_the_counted_positions(metric, rule, k):
    query, gallery = random_sides(num_query=60)
    check_lists(query, gallery, k, metric, rule)


def test_lists_of_wildly_different_lengths_agree_with_the_counted_positions():
    query, gallery = random_sides(num_query=30)
    lengths = 10.0 ** np.random.default_rng(0).integers(-15, 15, (333, 1))
    features = gallery.features * torch.from_numpy(lengths.astype(np.float32))
    check_lists(query, replace(gallery, features=features), 7, "euclidean", "drop")


def test_lists_of_equal_features_follow_the_gallery_order():
    gallery = embeddings(np.full((200, 8), 0.37), [1, 2] * 100)
    query = embeddings(np.full((2, 8), 0.37), [1, 2], [5, 5])
    indices, distances = ranked_lists(query, gallery, k=4)
    assert indices.tolist() == [[0, 1, 2, 3]] * 2
    assert distances.tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize("count", range(100, 120, 2))
def test_lists_hold_where_the_search_cannot_tell_the_items_apart(count):
    # From item to item, fewer values are one unit in the last place above the query's. Divided by
    # the longest norm and rounded, all items equal the query for some counts.
    low = np.float32(1000)
    vectors = np.where(np.tri(count, dtype=bool)[::-1], np.nextafter(low, np.float32(2e3)), low)
    gallery = embeddings(vectors, [1, 2] * (count // 2))
    query = embeddings(np.full((3, count), low), [1, 2, 1], [5] * 3)
    indices, _ = ranked_lists(query, gallery, k=4, metric="euclidean")
    assert indices.tolist() == [[count - 1, count - 2, count - 3, count - 4]] * 3


def test_lists_leave_out_many_same_camera_items():
    draw = np.random.default_rng(0)
    near = draw.standard_normal((100, 8)) * 0.01 + 1
    gallery = embeddings(
        np.concatenate([near, draw.standard_normal((300, 8))]), [1] * 101 + [2] * 299, [0] * 400
    )
    query = embeddings(np.ones((1, 8)), [1], [0])
    indices, _ = ranked_lists(query, gallery, k=5)
    assert int(indices.min()) > 100
    check_lists(query, replace(gallery, camids=gallery.camids + 1), 5, "cosine", "drop")


def test_lists_of_a_gallery_of_junk_are_empty():
    gallery = embeddings(np.ones((3, 2)), [-1, -1, -1])
    indices, distances = ranked_lists(embeddings(np.ones((1, 2)), [1]), gallery, k=2)
    assert indices.tolist() == [[-1, -1]]
    assert distances.tolist() == [[math.inf, math.inf]]


# ----------------------------------------------------------------------------------- the errors


def test_matchable_counts_tell_the_two_reasons_apart():
    counts = check_matchable([1, 2, 3, -1], [0, 0, 0, 0], [1, 2, -1, 1], [1, 0, 0, 0])
    assert (counts.valid, counts.same_camera_only, counts.without_gallery) == (1, 1, 2)
    kept = check_matchable([1, 2, 3, -1], [0, 0, 0, 0], [1, 2, -1, 1], [1, 0, 0, 0], "keep")
    assert (kept.valid, kept.same_camera_only, kept.without_gallery) == (2, 0, 2)


@settings(deadline=None)
@given(pooled(), st.sampled_from(["drop", "keep"]))
def test_matchable_counts_equal_the_positions_that_are_found(case, rule):
    query, gallery, rows = case
    expected = naive_positions(rows, query, gallery, rule == "drop")
    if any(expected):
        ids = query.pids, query.camids, gallery.pids, gallery.camids
        counts = check_matchable(*ids, rule)
        assert counts.valid == sum(bool(hits) for hits in expected)
        assert counts.valid + counts.without_gallery + counts.same_camera_only == len(expected)
        found = retrieval_figures(match_positions(query, gallery, same_camera=rule))
        assert found["num_valid_queries"] == counts.valid


@pytest.mark.parametrize(
    ("ids", "line"),
    [
        (([1, 2], [0, 0], [1, 2], [0, 0]), "all cameras are 0.*use same_camera keep"),
        (([1, 2], [0, 1], [1, 2], [0, 1]), "each pid has only one camera.*same_camera keep"),
        (([1, 5], [0, 0], [1, 2], [0, 0]), "removes every match, and 1 of 2 query images"),
        (([8, 9], [0, 0], [1, 2], [1, 1]), "none of the 2 query images has its pid there"),
        (([1, 2], [0, 0], [-1, -1], [1, 1]), "all of its images are junk"),
    ],
)
def test_an_evaluation_without_any_match_names_the_cause(ids, line):
    with pytest.raises(DataError, match=f"no query has a match in the gallery: .*{line}") as error:
        check_matchable(*ids)
    assert "\n" not in str(error.value)
    query = embeddings(np.ones((2, 3)), ids[0], ids[1])
    with pytest.raises(DataError, match=line):
        match_positions(query, embeddings(np.ones((2, 3)), ids[2], ids[3]))


GOOD = np.ones((2, 3))
BAD_FEATURES = [
    (GOOD, np.ones((2, 4)), "query features have 3 values each, gallery features have 4"),
    (np.ones((0, 3)), GOOD, r"query: .*0 features, but 2 pids"),
    (GOOD, np.ones((2, 0)), "gallery features: rows of vectors"),
    (GOOD, np.ones(2), "gallery features: rows of vectors"),
    (GOOD, np.ones((2, 3, 1)), "gallery features: rows of vectors"),
    (np.array([[1, 2, 3], [1, np.nan, 3]]), GOOD, "1 of 2 are not finite, the first is q1.jpg"),
    (GOOD, np.array([[1, np.inf, 3], [1, -np.inf, 3]]), "2 of 2 are not finite.*index 0"),
    (GOOD, np.array([[1, 2, 3], [0, 0, 0]]), "1 of 2 are zero.*metric euclidean"),
]


@pytest.mark.parametrize(("query", "gallery", "line"), BAD_FEATURES)
def test_bad_features_are_one_line(query, gallery, line):
    sides = (
        embeddings(query, [1, 2], [0, 0], ["q0.jpg", "q1.jpg"]),
        embeddings(gallery, [1, 2], [1, 1]),
    )
    for rank in (match_positions, lambda *both: ranked_lists(*both, k=1)):
        with pytest.raises(DataError, match=line) as error:
            rank(*sides)
        assert "\n" not in str(error.value)


def test_a_zero_vector_is_fine_for_euclidean_distances():
    query, gallery = embeddings([[0.0], [1.0]], [1, 2]), embeddings([[0.0], [1.0]], [1, 2], [1, 1])
    assert by_query(match_positions(query, gallery, metric="euclidean")) == [[1], [1]]


@pytest.mark.parametrize(
    ("pids", "camids", "line"),
    [
        ([1, 2, 3], [0, 0, 0], "2 features, but 3 pids"),
        ([1, 2], [0], "2 pids, but 1 camids"),
        ([1.0, 2.0], [0, 0], "integers are needed"),
    ],
)
def test_bad_labels_are_one_line(pids, camids, line):
    good = embeddings(GOOD, [1, 2])
    with pytest.raises(DataError, match=f"gallery.*{line}"):
        match_positions(good, embeddings(GOOD, pids, camids))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"metric": "cosin"}, "metric: 'cosin' is unknown; did you mean 'cosine'"),
        ({"same_camera": "skip"}, "same_camera: 'skip' is unknown"),
        ({"budget_mib": 0}, "budget_mib: 0 is too small"),
        ({"k": 0}, "k: 0 is too small"),
    ],
)
def test_wrong_options_are_one_line(options, line):
    sides = embeddings(GOOD, [1, 2]), embeddings(GOOD, [1, 2], [1, 1])
    with pytest.raises(ConfigError, match=line):
        ranked_lists(*sides, **{"k": 1, **options})


def test_checks_hold_when_python_optimises():
    program = """
import numpy as np, torch
from reidreg.errors import ReidregError
from reidreg.retrieval.ranked_lists import ranked_lists
from reidreg.retrieval.ranking import match_positions
from reidreg.values import Embeddings
def side(features, camid):
    return Embeddings(torch.tensor(features), torch.tensor([1]), torch.tensor([camid]))
good, wrong = side([[1.0, 2.0]], 0), [[[1.0]], [[float("nan"), 1.0]], [[0.0, 0.0]], [[]], [1.0]]
for features in wrong:
    for rank in (match_positions, lambda *both: ranked_lists(*both, k=1)):
        try:
            rank(good, side(features, 1))
        except ReidregError:
            continue
        print("no error:", features)
"""
    root = str(Path(reidreg.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-O", "-c", program],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_progress_ends_at_all_tiles():
    query, gallery = random_sides()
    seen = []
    match_positions(
        query, gallery, budget_mib=1, progress=lambda done, total: seen.append((done, total))
    )
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {len(seen)}
    assert len(seen) > 1


def test_a_gpu_gives_the_same_positions(cuda):
    query, gallery = random_sides()
    moved = [replace(side, features=side.features.to(cuda)) for side in (query, gallery)]
    expected = match_positions(query, gallery).positions.tolist()
    assert match_positions(*moved).positions.tolist() == expected
    assert match_positions(moved[0], gallery).positions.tolist() == expected
    whole = slice(0, 150), slice(0, 333)
    here = Distances(query.features, gallery.features, "cosine").exact(*whole)
    there = Distances(moved[0].features, moved[1].features, "cosine").exact(*whole)
    assert torch.equal(here, there.cpu())


def test_a_list_of_everything_has_junk_and_same_camera_items_in_order():
    query = embeddings([[1.0, 0.0]], [1], [0])
    gallery = embeddings([[1.0, 0.3], [1.0, 0.1], [1.0, 0.2]], [1, 1, -1], [1, 0, 0])
    assert ranked_lists(query, gallery, k=3)[0].tolist() == [[0, -1, -1]]
    assert ranked_lists(query, gallery, k=3, everything=True)[0].tolist() == [[1, 2, 0]]
