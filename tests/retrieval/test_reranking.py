"""Sparse re-ranking against the dense definition."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reidreg.errors import ConfigError, DataError
from reidreg.retrieval.metrics import retrieval_figures
from reidreg.retrieval.ranking import match_positions, match_positions_of_rows
from reidreg.retrieval.reranking import Limits, clipping_note, rerank_rows
from reidreg.values import Embeddings


def mutual_neighbours(rank, image, count):
    forward = rank[image, :count]
    return [one for one in forward if image in rank[one, :count]]


def dense(query, gallery, metric="cosine", k1=20, k2=6, lam=0.3):
    """Zhong et al., CVPR 2017, with N x N arrays and a loop over all images."""
    features = np.concatenate([query, gallery]).astype(np.float64)
    if metric == "cosine":
        features /= np.linalg.norm(features, axis=1, keepdims=True)
    count = len(features)
    distances = np.array([((features - one) ** 2).sum(axis=1) for one in features])
    largest = distances.max(axis=1, keepdims=True)
    distances = distances / np.where(largest > 0, largest, 1)
    rank = np.argsort(distances, axis=1, kind="stable")
    half = int(np.around(k1 / 2)) + 1
    codes = np.zeros((count, count))
    for image in range(count):
        core = mutual_neighbours(rank, image, k1 + 1)
        members = list(core)
        for one in core:
            theirs = mutual_neighbours(rank, one, half)
            if len(np.intersect1d(theirs, core)) > 2 / 3 * len(theirs):
                members += theirs
        members = np.unique(np.array(members, dtype=int))
        weights = np.exp(-distances[image, members])
        codes[image, members] = weights / weights.sum()
    if k2 != 1:
        codes = np.array([codes[rank[image, :k2]].mean(axis=0) for image in range(count)])
    first = len(query)
    shared = np.array([np.minimum(one, codes[first:]).sum(axis=1) for one in codes[:first]])
    return (1 - lam) * (1 - shared / (2 - shared)) + lam * distances[:first, first:]


def sparse(query, gallery, **options):
    found = list(rerank_rows(torch.from_numpy(query), torch.from_numpy(gallery), **options))
    starts = [start for start, _ in found]
    sizes = [len(rows) for _, rows in found]
    assert starts == np.cumsum([0, *sizes[:-1]]).tolist()
    assert {rows.dtype for _, rows in found} == {torch.float32}
    return torch.cat([rows for _, rows in found]).numpy()


def clustered(num_query, num_gallery, *, dim=16, identities=8, seed=0):
    draw = np.random.default_rng(seed)
    centres = draw.standard_normal((identities, dim))
    pids = [draw.integers(0, identities, size) for size in (num_query, num_gallery)]
    return [
        (centres[pid] + 0.7 * draw.standard_normal((len(pid), dim))).astype(np.float32)
        for pid in pids
    ], pids


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(("k1", "k2", "lam"), [(20, 6, 0.3), (7, 3, 0.0), (20, 1, 0.5), (1, 2, 1)])
def test_distances_equal_the_dense_definition(metric, k1, k2, lam):
    (query, gallery), _ = clustered(30, 170)
    options = {"metric": metric, "k1": k1, "k2": k2, "lam": lam}
    expected = dense(query, gallery, **options)
    assert sparse(query, gallery, **options) == pytest.approx(expected, abs=1e-5)
    assert sparse(query, gallery, chunk=7, **options) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(
    "limits", [Limits(block=7), Limits(piece=7), Limits(cells=1000), Limits(pairs=2000)]
)
def test_limits_on_what_is_held_change_nothing(limits, metric):
    (query, gallery), _ = clustered(30, 170)
    whole = sparse(query, gallery, metric=metric)
    assert sparse(query, gallery, metric=metric, limits=limits) == pytest.approx(whole, abs=1e-7)


def test_equal_gallery_images_are_at_equal_distances_wherever_they_stand():
    (query, gallery), _ = clustered(30, 170)
    gallery[[60, 169]] = gallery[3]
    query[:10] = gallery[3] * np.arange(1, 11)[:, None]
    for lam in (0.3, 1.0):
        found = sparse(query, gallery, lam=lam, limits=Limits(piece=50))
        assert found[:, [60, 169]].tolist() == found[:, [3, 3]].tolist()
        assert found[:10, [3, 60, 169]].min() >= 0


def test_memory_is_far_below_that_of_a_matrix_of_all_pairs():
    (query, gallery), _ = clustered(200, 4800, identities=400)
    tracemalloc.start()
    for _ in rerank_rows(query, gallery, k1=6, k2=2, chunk=16, limits=Limits(tile=256)):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5000 * 5000 * 4 / 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_types_are_computed_in_float32(dtype):
    narrow = [torch.from_numpy(side).to(dtype) for side in clustered(10, 60)[0]]
    found, wide = (
        torch.cat([rows for _, rows in rerank_rows(*sides)])
        for sides in (narrow, [side.float() for side in narrow])
    )
    assert torch.equal(found, wide)


def test_features_on_a_gpu_give_the_same_rows(cuda):
    sides = [torch.from_numpy(side) for side in clustered(10, 60)[0]]
    for metric in ("cosine", "euclidean"):
        here, there = (
            torch.cat([rows for _, rows in rerank_rows(*on, metric=metric)])
            for on in (sides, [side.to(cuda) for side in sides])
        )
        assert there.numpy() == pytest.approx(here.numpy(), abs=1e-6)


def test_the_search_is_done_before_the_first_row():
    (query, gallery), _ = clustered(10, 60)
    seen = []
    rows = rerank_rows(query, gallery, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 1)]
    assert next(rows)[0] == 0


def test_some_members_lie_outside_of_the_neighbour_list():
    # In a chain, the neighbours' neighbours reach further than the list of k1 + 1 images.
    line = np.arange(40, dtype=np.float32)[:, None] ** 1.5
    options = {"metric": "euclidean", "k1": 4, "k2": 2}
    assert sparse(line[:9], line[9:], **options) == pytest.approx(
        dense(line[:9], line[9:], **options), abs=1e-5
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 8),
    st.integers(1, 30),
    st.integers(1, 12),
    st.sampled_from([1, 2, 5, 20]),
    st.sampled_from([1, 2, 6]),
    st.sampled_from(["cosine", "euclidean"]),
)
def test_sets_full_of_duplicates_equal_the_dense_definition(
    seed, num_query, num_gallery, size, k1, k2, metric
):
    draw = np.random.default_rng(seed)
    pool = draw.standard_normal((size, 5)).astype(np.float32)
    query, gallery = (
        pool[draw.integers(0, size, num_query)],
        pool[draw.integers(0, size, num_gallery)],
    )
    options = {"metric": metric, "k1": k1, "k2": k2}
    expected = dense(query, gallery, **options)
    assert sparse(query, gallery, **options) == pytest.approx(expected, abs=1e-5)
    assert sparse(query, gallery, chunk=3, **options) == pytest.approx(expected, abs=1e-5)


def test_more_equal_images_than_a_list_holds_equal_the_dense_definition():
    # The later ones are in no list, not even their own, so their encoding is empty.
    (query, gallery), _ = clustered(5, 20)
    gallery[5:] = gallery[5]
    query[3:] = gallery[5]
    for options in ({"k1": 4, "k2": 1}, {"k1": 4, "k2": 3}):
        expected = dense(query, gallery, **options)
        assert sparse(query, gallery, **options) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (1, 30), (3, 1), (4, 9)])
def test_sets_smaller_than_a_neighbour_list_equal_the_dense_definition(size):
    (query, gallery), _ = clustered(*size, identities=2)
    assert sparse(query, gallery) == pytest.approx(dense(query, gallery), abs=1e-5)


def test_all_images_equal_gives_a_finite_distance():
    same = np.full((30, 4), 0.3, dtype=np.float32)
    found = sparse(same[:10], same[10:], k1=5, k2=2)
    assert np.isfinite(found).all()
    assert found == pytest.approx(dense(same[:10], same[10:], k1=5, k2=2), abs=1e-5)


def test_a_weight_of_one_keeps_the_original_order():
    (query, gallery), (query_pids, gallery_pids) = clustered(10, 60)
    ids = [torch.from_numpy(pids) for pids in (query_pids, gallery_pids)]
    zeros, ones = torch.zeros(10, dtype=torch.int64), torch.ones(60, dtype=torch.int64)
    sides = (
        Embeddings(torch.from_numpy(query), ids[0], zeros),
        Embeddings(torch.from_numpy(gallery), ids[1], ones),
    )
    raw = match_positions(*sides)
    rows = rerank_rows(sides[0].features, sides[1].features, lam=1.0, chunk=4)
    kept = match_positions_of_rows(rows, ids[0], zeros, ids[1], ones)
    assert kept.positions.tolist() == raw.positions.tolist()
    mixed = rerank_rows(sides[0].features, sides[1].features, k1=8, k2=3, chunk=4)
    better = retrieval_figures(match_positions_of_rows(mixed, ids[0], zeros, ids[1], ones))
    assert better["mAP"] > retrieval_figures(raw)["mAP"]


def test_clipped_lists_are_reported():
    assert clipping_note(21) is None
    assert clipping_note(9, k1=5, k2=6) is None
    assert clipping_note(20) == (
        "re-ranking: there are only 20 images, so neighbour lists of k1 + 1 = 21 and k2 = 6 are "
        "cut to 20"
    )


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"k1": 0}, "k1: 0 is too small"),
        ({"k2": 0}, "k2: 0 is too small"),
        ({"chunk": 0}, "chunk: 0 is too small"),
        ({"lam": 1.5}, "lam: 1.5 is out of range"),
        ({"lam": float("nan")}, "lam: nan is out of range"),
        ({"metric": "dot"}, "metric: 'dot' is unknown"),
    ],
)
def test_wrong_options_are_errors_before_the_first_row(options, line):
    with pytest.raises(ConfigError, match=line):
        rerank_rows(np.ones((2, 3)), np.ones((2, 3)), **options)


def test_bad_features_are_errors_before_the_first_row():
    good = np.ones((2, 3))
    for bad, line in [
        (np.ones((2, 4)), "query features have 3 values each, gallery features have 4"),
        (np.ones((0, 3)), "gallery features: rows of vectors"),
        (np.array([[1, 2, np.nan]]), "gallery features: 1 of 1 are not finite"),
        (np.zeros((2, 3)), "gallery features: 2 of 2 are zero"),
    ]:
        with pytest.raises(DataError, match=line):
            rerank_rows(good, bad)
