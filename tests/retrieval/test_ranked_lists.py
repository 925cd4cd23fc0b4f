"""Ranked lists where float32 alone cannot order the items, and how they are completed."""

from __future__ import annotations

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reidreg.retrieval.distances import Distances
from reidreg.retrieval.ranked_lists import ExactLists, ranked_lists, sum_error
from reidreg.values import Embeddings


def embeddings(features, camid=0):
    features = torch.as_tensor(features)
    ids = torch.zeros(len(features), dtype=torch.int64)
    return Embeddings(features, ids, ids + camid)


def vectors(count, dim=24, seed=0):
    draw = np.random.default_rng(seed)
    return draw.standard_normal((count, dim)).astype(np.float32)


def sorted_exactly(query, gallery, k, metric):
    """Items and distances by a stable sort of all exact distances."""
    whole = slice(0, len(query)), slice(0, len(gallery))
    exact = Distances(torch.as_tensor(query), torch.as_tensor(gallery), metric).exact(*whole)
    values, items = exact.sort(dim=1, stable=True)
    return items[:, :k].tolist(), values[:, :k].float().tolist()


def listed(query, gallery, k, metric="cosine", **options):
    sides = embeddings(query), embeddings(gallery, camid=1)
    items, values = ranked_lists(*sides, k=k, metric=metric, **options)
    return items.tolist(), values.tolist()


@contextmanager
def counted_rows(monkeypatch):
    """Counts the queries for which all distances are computed."""
    counts = []
    original = ExactLists.whole_rows

    def counting(self, queries):
        counts.append(len(queries))
        original(self, queries)

    with monkeypatch.context() as patch:
        patch.setattr(ExactLists, "whole_rows", counting)
        yield counts


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(("crowd", "rows"), [(1, 0), (100, 0), (500, 3)])
def test_what_float32_cannot_order_is_searched_again(metric, crowd, rows, monkeypatch):
    # The crowd's members differ by less than float32 resolves in a product of vectors. A second
    # search fetches all of 100 members, but not all of 500.
    query, gallery = vectors(3), vectors(900, seed=1)
    gallery[50 : 50 + crowd] = query[0] + 1e-6 * vectors(crowd, seed=2)
    query = query[[0, 0, 0]] + 1e-6 * vectors(3, seed=3)
    with counted_rows(monkeypatch) as counts:
        found = listed(query, gallery, 5, metric)
    assert found == sorted_exactly(query, gallery, 5, metric)
    assert counts == [rows]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 6),
    st.integers(40, 400),
    st.sampled_from([1, 3, 20]),
    st.sampled_from([0.0, 1e-8, 1e-7, 1e-4]),
    st.sampled_from(["cosine", "euclidean"]),
    st.integers(-12, 12),
)
def test_lists_are_a_stable_sort_of_exact_distances(seed, size, count, k, spread, metric, exponent):
    draw = np.random.default_rng(seed)
    pool = draw.standard_normal((size, 6))
    sides = [
        pool[draw.integers(0, size, many)] + spread * draw.standard_normal((many, 6))
        for many in (4, count)
    ]
    query, gallery = ((side * 10.0**exponent).astype(np.float32) for side in sides)
    found = listed(query, gallery, k, metric, budget_mib=1)
    assert found == sorted_exactly(query, gallery, k, metric)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_precision_settings_of_the_process_change_nothing(metric):
    query, gallery = vectors(5), vectors(300, seed=1)
    gallery[:40] = query[0] + 1e-3 * vectors(40, seed=2)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = listed(query, gallery, 9, metric)
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == sorted_exactly(query, gallery, 9, metric)


def test_progress_ends_at_all_lists():
    seen = []
    gallery = vectors(900, seed=1)
    gallery[:500] = gallery[0]
    query = np.concatenate([gallery[:1], vectors(6)])
    listed(query, gallery, 3, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (7, 7)


def given_as(features, kind):
    if kind == "strided":
        return torch.as_tensor(np.repeat(features, 2, axis=1))[:, ::2]
    if kind == "transposed":
        return torch.as_tensor(np.asfortranarray(features))
    return torch.as_tensor(features).to(getattr(torch, kind))


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64", "strided", "transposed"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_pairs_equal_exact_distances_for_every_type_of_features(kind, metric):
    sides = given_as(vectors(6), kind), given_as(vectors(50, seed=1), kind)
    distances = Distances(*sides, metric)
    exact = distances.exact(slice(0, 6), slice(0, 50)).numpy()
    queries = np.array([3, 0, 5])
    items = np.random.default_rng(0).integers(0, 50, (3, 8))
    found = distances.listed(queries, items)
    assert np.abs(found - np.take_along_axis(exact[queries], items, axis=1)).max() < distances.slack
    row, item = np.array([1, 1, 1, 4]), np.array([9, 2, 9, 0])
    assert np.abs(distances.pairs(row, item) - exact[row, item]).max() < distances.slack
    assert distances.pairs(row[:0], item[:0]).shape == (0,)


def test_a_list_is_certain_only_if_all_other_items_are_farther():
    query, gallery = vectors(3), vectors(30, seed=1)
    distances = Distances(torch.as_tensor(query), torch.as_tensor(gallery), "cosine")
    exact = distances.exact(slice(0, 3), slice(0, 30)).numpy()
    lists = ExactLists(distances, 2)
    order = np.argsort(exact, axis=1)
    third = np.take_along_axis(exact, order, axis=1)[:, 2]
    least = third + np.array([0, -1e-3, 0]) * (third - np.sort(exact, axis=1)[:, 1])
    least[2] = np.sort(exact, axis=1)[2, 1]
    sure = lists.take(np.arange(3), order[:, [2, 1, 0]], least)
    assert sure.tolist() == [True, True, False]
    assert lists.items.tolist() == order[:, :2].tolist()


@pytest.mark.parametrize("dim", [1, 2, 64, 512, 4096])
def test_the_bound_on_float32_sums_holds_and_is_not_far_off(dim):
    worst = 0.0
    for seed in range(20):
        draw = np.random.default_rng(seed)
        # All terms positive and summed in sequence: the worst case for rounding.
        pair = [draw.uniform(0.9, 1, dim) for _ in range(2)]
        pair = [vector / np.linalg.norm(vector) for vector in pair]
        left, right = (vector.astype(np.float32) for vector in pair)
        total = float(np.cumsum(left * right, dtype=np.float32)[-1])
        worst = max(worst, abs(total - math.fsum(pair[0] * pair[1])))
    assert worst < sum_error(dim)
    assert sum_error(dim) < 2 * (dim + 16) * 2.0**-24


def test_features_on_a_gpu_give_the_same_lists(cuda):
    query, gallery = vectors(5), vectors(300, seed=1)
    moved = torch.as_tensor(query).to(cuda), torch.as_tensor(gallery).to(cuda)
    assert listed(*moved, 9) == sorted_exactly(query, gallery, 9, "cosine")
